"""What a layer is (`MoEConfig`, `RouterConfig`) and how it is spread over devices (`ParallelConfig`).

Frozen, keyword-only, and checked when they are made: an error names the field, its value and what is allowed. Nothing
here imports JAX, and every class is hashable, so a configuration can be a static argument of `jax.jit`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from jax_moe.capabilities import ACROSS_NODES, CAPABILITIES, SLOTTED, TRANSPORT_DTYPES, serving

Source = Literal["gate", "logits", "ids"]
Scoring = Literal["softmax", "sigmoid"]
ActivationName = Literal["silu", "gelu", "gelu_tanh", "swigluoai", "relu2"]
GateUpLayout = Literal["concatenated", "interleaved"]
DType = Literal["bfloat16", "float16", "float32"]
TokenLayout = Literal["dp", "dp_tp"]
TransportName = Literal["local", "allgather", "ragged", "padded", "one_sided"]

SOURCES = ("gate", "logits", "ids")
SCORINGS = ("softmax", "sigmoid")
GATED_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai")
UNGATED_ACTIVATIONS = ("silu", "gelu", "relu2")
GATE_UP_LAYOUTS = ("concatenated", "interleaved")
DTYPES = ("bfloat16", "float16", "float32")
TOKEN_LAYOUTS = ("dp", "dp_tp")
TRANSPORTS = tuple(CAPABILITIES)


def _fail(owner: str, field: str, value: Any, allowed: str) -> None:
    raise ValueError(f"{owner}.{field} = {value!r}: expected {allowed}")


def _one_of(owner: Any, field: str, allowed: tuple[str, ...]) -> None:
    value = getattr(owner, field)
    if value not in allowed:
        _fail(type(owner).__name__, field, value, "one of " + ", ".join(repr(a) for a in allowed))


def _integer(owner: Any, field: str, minimum: int) -> None:
    value = getattr(owner, field)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        _fail(type(owner).__name__, field, value, f"an int, at least {minimum}")


def _boolean(owner: Any, field: str) -> None:
    value = getattr(owner, field)
    if not isinstance(value, bool):
        _fail(type(owner).__name__, field, value, "True or False")


def _number(owner: Any, field: str) -> None:
    value = getattr(owner, field)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        _fail(type(owner).__name__, field, value, "a finite number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose their experts.

    Attributes:
      source: "gate": the layer computes logits with its own weights; "logits": the caller gives them; "ids": the
        caller gives ids and weights, which are used as they are.
      scoring: what turns logits into scores.
      renormalize: divide the chosen weights by their sum.
      num_groups: experts are split into this many equal groups, in order; 1 means no groups.
      groups_kept: the groups a token may choose from.
      score_correction_bias: a bias per expert that takes part in choosing, never in weighing.
      scaling_factor: multiplies the weights at the end.
      weight_on_input: weigh the expert's input row instead of its output row.
    """

    source: Source = "gate"
    scoring: Scoring = "softmax"
    renormalize: bool = False
    num_groups: int = 1
    groups_kept: int = 1
    score_correction_bias: bool = False
    scaling_factor: float = 1.0
    weight_on_input: bool = False

    def __post_init__(self) -> None:
        _one_of(self, "source", SOURCES)
        _one_of(self, "scoring", SCORINGS)
        for field in ("renormalize", "score_correction_bias", "weight_on_input"):
            _boolean(self, field)
        _integer(self, "num_groups", 1)
        _integer(self, "groups_kept", 1)
        _number(self, "scaling_factor")
        if self.groups_kept > self.num_groups:
            _fail("RouterConfig", "groups_kept", self.groups_kept, f"at most num_groups = {self.num_groups}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """What one mixture-of-experts layer is, apart from where it runs.

    Attributes:
      num_experts: routed experts, E.
      top_k: experts per token, K.
      hidden_size: width of the tokens, D.
      intermediate_size: width inside a routed expert, F.
      activation: gated: "silu", "gelu", "gelu_tanh", "swigluoai"; ungated: "silu", "gelu", "relu2".
      gated: an expert has a gate and an up projection (2F rows), else only an up projection (F rows).
      gate_up_layout: how the 2F rows lie: "concatenated" (gate, then up) or "interleaved" (g0, u0, g1, u1...).
      swiglu_alpha, swiglu_limit: of "swigluoai".
      expert_bias: experts have biases on both projections.
      num_shared_experts: shared experts, run as one FFN on every token.
      shared_intermediate_size: its width, S; None means num_shared_experts * intermediate_size.
      shared_gate: the shared expert's output is weighed by a sigmoid of one projection of the token.
      latent_size: routed experts read and write this width instead of hidden_size, L.
      dtype: of tokens, weights and rows: "bfloat16", "float16" or "float32". What passes 65504 in float16 is infinite.
      quantization: None; no format is implemented.
      router: see `RouterConfig`.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: ActivationName = "silu"
    gated: bool = True
    gate_up_layout: GateUpLayout = "concatenated"
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    expert_bias: bool = False
    num_shared_experts: int = 0
    shared_intermediate_size: int | None = None
    shared_gate: bool = False
    latent_size: int | None = None
    dtype: DType = "bfloat16"
    quantization: None = None
    router: RouterConfig = RouterConfig()

    def __post_init__(self) -> None:
        for field in ("num_experts", "top_k", "hidden_size", "intermediate_size"):
            _integer(self, field, 1)
        _integer(self, "num_shared_experts", 0)
        for field in ("shared_intermediate_size", "latent_size"):
            if getattr(self, field) is not None:
                _integer(self, field, 1)
        for field in ("gated", "expert_bias", "shared_gate"):
            _boolean(self, field)
        for field in ("swiglu_alpha", "swiglu_limit"):
            _number(self, field)
        if self.swiglu_limit <= 0:
            _fail("MoEConfig", "swiglu_limit", self.swiglu_limit, "more than 0")
        _one_of(self, "activation", GATED_ACTIVATIONS if self.gated else UNGATED_ACTIVATIONS)
        _one_of(self, "gate_up_layout", GATE_UP_LAYOUTS)
        _one_of(self, "dtype", DTYPES)
        if self.quantization is not None:
            _fail("MoEConfig", "quantization", self.quantization, "None (no quantized format is implemented)")
        if not isinstance(self.router, RouterConfig):
            _fail("MoEConfig", "router", self.router, "a RouterConfig")
        if self.shared_gate and not self.shared_width:
            _fail("MoEConfig", "shared_gate", True, "False without shared experts")
        self._check_top_k()

    def _check_top_k(self) -> None:
        router = self.router
        if self.num_experts % router.num_groups:
            _fail("RouterConfig", "num_groups", router.num_groups, f"a divisor of num_experts = {self.num_experts}")
        eligible = self.num_experts // router.num_groups * router.groups_kept
        if self.top_k > eligible:
            _fail("MoEConfig", "top_k", self.top_k, f"at most the {eligible} experts a token may choose from")

    @property
    def shared_width(self) -> int:
        """Width inside the shared expert, S; 0 when there is none."""
        if self.shared_intermediate_size is not None:
            return self.shared_intermediate_size
        return self.num_shared_experts * self.intermediate_size

    @property
    def expert_width(self) -> int:
        """Width a routed expert reads and writes, W: the latent's, or the hidden size."""
        return self.latent_size or self.hidden_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the layer is spread over a mesh with axes ("dp", "tp"), or over nodes with ("node", "local", "tp").

    After construction `sequence_parallel` and `transport` are never None.

    Attributes:
      dp: data-parallel size: tokens are split over it.
      tp: tensor-parallel size.
      expert_parallel: experts are split over all dp * tp ranks, in blocks; else every rank has a part of each.
      sequence_parallel: each tp rank takes its own chunk of the tokens. None: derived, `ep > tp > 1`.
      token_layout: "dp": tokens are split over dp and equal over tp; "dp_tp": already split over both, in and out.
      transport: what moves rows to experts. None: derived, "allgather" when ep > 1, else "local". `CAPABILITIES` says
        which serves what.
      nodes: groups of dp // nodes neighbouring dp ranks that a token enters once and fans out in; node = dp_index //
        (dp // nodes). Only the transport and the names of the mesh axes depend on it.
      capacity_factor: "padded" and "one_sided" only. Slots from one rank to another, as a multiple of an even spread of
        the copies; what does not fit is dropped and counted. None: room for all.
      max_rows: "ragged" only. Received copies a rank accepts; the rest is dropped and counted. None: all.
    """

    dp: int = 1
    tp: int = 1
    expert_parallel: bool = False
    sequence_parallel: bool | None = None
    token_layout: TokenLayout = "dp"
    transport: TransportName | None = None
    nodes: int = 1
    capacity_factor: float | None = None
    max_rows: int | None = None

    def __post_init__(self) -> None:
        _integer(self, "dp", 1)
        _integer(self, "tp", 1)
        _boolean(self, "expert_parallel")
        if self.sequence_parallel is None:
            object.__setattr__(self, "sequence_parallel", self.ep > self.tp > 1)
        _boolean(self, "sequence_parallel")
        if self.transport is None:
            object.__setattr__(self, "transport", "allgather" if self.ep > 1 else "local")
        _one_of(self, "transport", TRANSPORTS)
        _one_of(self, "token_layout", TOKEN_LAYOUTS)
        if self.sequence_parallel and not self.expert_parallel:
            _fail("ParallelConfig", "sequence_parallel", True, "False without expert_parallel")
        if self.sequence_parallel and self.tp == 1:
            _fail("ParallelConfig", "sequence_parallel", True, "False with tp = 1: there is nothing to split over")
        if self.token_layout == "dp_tp" and not self.sequence_parallel:
            _fail("ParallelConfig", "token_layout", "dp_tp", "'dp' without sequence_parallel")
        self._check_transport()

    def _check_transport(self) -> None:
        # Experts on one rank: there is nothing to move, and "local" says so.
        unmoved = self.transport == "local" and self.ep == 1
        if self.mode not in CAPABILITIES[str(self.transport)] and not unmoved:
            allowed = " or ".join(repr(name) for name in serving(self.mode))
            why = {
                "local": f": experts are split over {self.ep} ranks, and it moves nothing",
                "allgather": ": it needs expert_parallel",
            }.get(str(self.transport), ": it needs expert_parallel, and sequence_parallel when tp > 1")
            _fail("ParallelConfig", "transport", self.transport, f"{allowed} in mode {self.mode!r}{why}")
        _integer(self, "nodes", 1)
        if self.nodes > 1 and self.transport not in ACROSS_NODES:
            able = " or ".join(repr(name) for name in sorted(ACROSS_NODES))
            _fail("ParallelConfig", "nodes", self.nodes, f"1 with transport {self.transport!r}; {able} can cross nodes")
        if self.dp % self.nodes:
            _fail("ParallelConfig", "nodes", self.nodes, f"a divisor of dp = {self.dp}")
        if self.capacity_factor is not None:
            _number(self, "capacity_factor")
            if self.transport not in SLOTTED:
                other = f"None with transport {self.transport!r}; it belongs to {' and '.join(map(repr, SLOTTED))}"
                _fail("ParallelConfig", "capacity_factor", self.capacity_factor, other)
            if not 0 < self.capacity_factor < float("inf"):
                _fail("ParallelConfig", "capacity_factor", self.capacity_factor, "a positive, finite number")
        if self.max_rows is not None:
            _integer(self, "max_rows", 1)
            if self.transport != "ragged":
                other = f"None with transport {self.transport!r}; it belongs to 'ragged'"
                _fail("ParallelConfig", "max_rows", self.max_rows, other)

    @property
    def dp_axes(self) -> tuple[str, ...]:
        """Mesh axes that are the data-parallel axis together."""
        return ("node", "local") if self.nodes > 1 else ("dp",)

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """All mesh axes; a rank's number is its index along them, flattened."""
        return (*self.dp_axes, "tp")

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Size of each mesh axis, in order."""
        dp = {"node": self.nodes, "local": self.dp // self.nodes} if self.nodes > 1 else {"dp": self.dp}
        return {**dp, "tp": self.tp}

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Mesh axes that the rows of x are split over."""
        return self.mesh_axes if self.native else self.dp_axes

    @property
    def mode(self) -> str:
        """The parallel mode in words, one of `capabilities.MODES`."""
        if not self.expert_parallel:
            return "+".join(name for name, size in (("DP", self.dp), ("TP", self.tp)) if size > 1) or "single"
        if self.sp:
            return "EP+SP native" if self.native else "EP+SP"
        return "EP, SP off" if self.tp > 1 else "DP+EP"

    @property
    def world(self) -> int:
        """Number of ranks, N."""
        return self.dp * self.tp

    @property
    def ep(self) -> int:
        """Number of ranks the experts are split over."""
        return self.world if self.expert_parallel else 1

    @property
    def sp(self) -> bool:
        """Whether each tp rank routes its own chunk of tokens, given so ("dp_tp") or cut by the layer."""
        return bool(self.sequence_parallel)

    @property
    def native(self) -> bool:
        """Whether tokens come and go already split over dp and tp."""
        return self.token_layout == "dp_tp"

    @property
    def expert_tp(self) -> int:
        """Number of ranks the width of an expert is split over."""
        return 1 if self.expert_parallel else self.tp

    @property
    def shared_tp(self) -> int:
        """Number of ranks the width of the shared expert is split over: under SP it runs whole on its own chunk."""
        return 1 if self.sp else self.tp


def check(config: MoEConfig, parallel: ParallelConfig) -> None:
    """Checks that the layer can be split this way.

    Raises:
      ValueError: names the field that does not divide.
    """
    if config.dtype not in TRANSPORT_DTYPES[str(parallel.transport)]:
        allowed = f"one of {sorted(TRANSPORT_DTYPES[str(parallel.transport)])} with transport {parallel.transport!r}"
        _fail("MoEConfig", "dtype", config.dtype, allowed)
    if config.num_experts % parallel.ep:
        _fail("MoEConfig", "num_experts", config.num_experts, f"a multiple of ep = {parallel.ep}")
    if config.intermediate_size % parallel.expert_tp:
        _fail("MoEConfig", "intermediate_size", config.intermediate_size, f"a multiple of tp = {parallel.tp}")
    if config.shared_width % parallel.shared_tp:
        _fail("MoEConfig", "shared width", config.shared_width, f"a multiple of tp = {parallel.tp}")
