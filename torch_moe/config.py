"""What the layer is (`MoEConfig`, `RouterConfig`) and how it is spread over ranks (`ParallelConfig`).

Frozen, keyword-only, validated on construction. Every error is a `ValueError` that names the field, the value it had
and what is allowed, and is raised before anything is allocated or communicated.
"""

import dataclasses
import math
import operator
from typing import Any, Literal, get_args

from torch_moe.capabilities import ACROSS_NODES, CAPABILITIES, SLOTTED, TRANSPORT_DTYPES, serving

Source = Literal["gate", "logits", "ids"]
Scoring = Literal["softmax", "sigmoid"]
ActivationName = Literal["silu", "gelu", "gelu_tanh", "swigluoai", "relu2"]
GateUpLayout = Literal["concatenated", "interleaved"]
DtypeName = Literal["bfloat16", "float32"]
TokenLayout = Literal["dp", "dp_tp"]
TransportName = Literal["local", "allgather", "ragged", "padded", "one_sided"]

GATED_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai")
UNGATED_ACTIVATIONS = ("silu", "gelu", "relu2")


def _one_of(owner: Any, field: str, allowed: tuple[Any, ...]) -> None:
    value = getattr(owner, field)
    if value not in allowed:
        raise ValueError(f"{field}={value!r}: allowed are {', '.join(map(repr, allowed))}")


def _whole_number(owner: Any, field: str, least: int) -> None:
    value = getattr(owner, field)
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise ValueError(f"{field}={value!r}: allowed is a whole number of at least {least}")
    # NumPy's integers are welcome, but must not make the configuration unequal or unhashable.
    object.__setattr__(owner, field, number)


def _flags(owner: Any, *fields: str) -> None:
    for field in fields:
        _one_of(owner, field, (True, False))


def _finite(owner: Any, field: str, *, positive: bool) -> None:
    value = getattr(owner, field)
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or (positive and value <= 0):
        raise ValueError(f"{field}={value!r}: allowed is a finite{' positive' if positive else ''} number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose experts.

    Attributes:
        source: "gate": logits from a gate inside the layer; "logits": the caller gives logits; "ids": the caller gives
            expert ids and weights, which are taken as they are.
        scoring: how logits become scores.
        renormalize: divide the chosen weights by their sum.
        num_groups: experts are split into this many equal blocks for grouped top-k; 1 is plain top-k.
        groups_kept: blocks a token may choose from.
        score_correction_bias: a bias per expert that takes part in selection and never in the weights.
        scaling_factor: multiplies the weights, last.
        weight_on_input: the weight multiplies the expert's input, and its output is summed unweighted.
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
        _one_of(self, "source", get_args(Source))
        _one_of(self, "scoring", get_args(Scoring))
        _flags(self, "renormalize", "score_correction_bias", "weight_on_input")
        _whole_number(self, "num_groups", 1)
        _whole_number(self, "groups_kept", 1)
        if self.groups_kept > self.num_groups:
            raise ValueError(f"groups_kept={self.groups_kept}: allowed is at most num_groups={self.num_groups}")
        _finite(self, "scaling_factor", positive=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The layer's mathematics and sizes, independent of how many ranks compute it.

    Attributes:
        num_experts: E.
        top_k: K, experts per token.
        hidden_size: D, the width of x, the router's input and the shared expert's input.
        intermediate_size: F of each routed expert.
        activation: gated: silu, gelu, gelu_tanh, swigluoai; ungated: silu, gelu, relu2.
        gated: whether the first product has a gate half and an up half.
        gate_up_layout: rows of gate_up: all gate rows and then all up rows, or in turns.
        swiglu_alpha: slope inside swigluoai's sigmoid.
        swiglu_limit: clamp of swigluoai.
        expert_bias: gate_up and down of the routed experts have biases.
        num_shared_experts: shared experts, computed as one of their joint width.
        shared_intermediate_size: that width; None is num_shared_experts * intermediate_size. Given alone it implies
            a shared expert.
        shared_gate: a sigmoid gate on the shared expert's output.
        latent_size: L, the routed experts' width behind a projection; None: they read x itself.
        dtype: of activations and parameters.
        quantization: None.
        router: how tokens choose experts.
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
    dtype: DtypeName = "bfloat16"
    quantization: None = None
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        for field in ("num_experts", "top_k", "hidden_size", "intermediate_size"):
            _whole_number(self, field, 1)
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k}: allowed is at most num_experts={self.num_experts}")
        _flags(self, "gated", "expert_bias", "shared_gate")
        if self.gated:
            _one_of(self, "activation", GATED_ACTIVATIONS)
        elif self.activation not in UNGATED_ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: allowed with gated=False are {UNGATED_ACTIVATIONS}")
        _one_of(self, "gate_up_layout", get_args(GateUpLayout))
        _finite(self, "swiglu_alpha", positive=False)
        _finite(self, "swiglu_limit", positive=True)
        _whole_number(self, "num_shared_experts", 0)
        for field in ("shared_intermediate_size", "latent_size"):
            if getattr(self, field) is not None:
                _whole_number(self, field, 1)
        if self.shared_gate and self.shared_width == 0:
            raise ValueError(
                "shared_gate=True: allowed only with num_shared_experts >= 1 or a shared_intermediate_size"
            )
        _one_of(self, "dtype", get_args(DtypeName))
        _one_of(self, "quantization", (None,))
        if not isinstance(self.router, RouterConfig):
            raise ValueError(f"router={self.router!r}: allowed is a RouterConfig")
        self._check_groups()

    def _check_groups(self) -> None:
        groups, kept = self.router.num_groups, self.router.groups_kept
        if self.num_experts % groups:
            raise ValueError(f"num_groups={groups}: allowed are divisors of num_experts={self.num_experts}")
        choosable = self.num_experts // groups * kept
        if self.top_k > choosable:
            raise ValueError(
                f"top_k={self.top_k}: allowed is at most {choosable}, the experts in groups_kept={kept} of "
                f"num_groups={groups} groups"
            )

    @property
    def shared_width(self) -> int:
        """S, the shared expert's intermediate size; 0 when there is none."""
        if self.shared_intermediate_size is not None:
            return self.shared_intermediate_size
        return self.num_shared_experts * self.intermediate_size

    @property
    def expert_width(self) -> int:
        """W, the width of a routed expert's input and output: the latent's, or D."""
        return self.latent_size or self.hidden_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the layer is spread over a (dp, tp) mesh of ranks; rank = dp_index * tp + tp_index.

    Attributes:
        dp: ranks over which tokens are split.
        tp: ranks that share one DP rank's tokens.
        expert_parallel: experts are split over all dp * tp ranks, whole.
        sequence_parallel: each tp rank routes its own chunk of the tokens. None: derived, on when ep > tp > 1. After
            construction the field holds the resolved value.
        token_layout: "dp": tokens come split over dp and replicated over tp, and leave so; "dp_tp": already split over
            dp and tp on the sequence, both ways (needs sequence parallelism). Never inferred from a shape.
        transport: how rows reach their experts; `CAPABILITIES` says which serves which mode. None: derived, "allgather"
            when ep > 1 and "local" otherwise. After construction the field holds the resolved value.
        nodes: for "ragged" and "padded": groups of dp / nodes * tp ranks that a token enters once and fans out in. With
            more than one the mesh has axes ("node", "local", "tp"); ranks keep their order.
        capacity_factor: "padded" and "one_sided" only: slots for so many times the copies of an even spread; what
            finds no slot is dropped. None: slots for all.
        max_rows: "ragged" only: token copies a rank accepts; later ones are dropped. None: all.
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
        _whole_number(self, "dp", 1)
        _whole_number(self, "tp", 1)
        _flags(self, "expert_parallel")
        _one_of(self, "sequence_parallel", (None, True, False))
        if self.sequence_parallel is None:
            object.__setattr__(self, "sequence_parallel", self.ep > self.tp > 1)
        elif self.sequence_parallel and not self.expert_parallel:
            raise ValueError("sequence_parallel=True: allowed only with expert_parallel=True")
        elif self.sequence_parallel and self.tp == 1:
            raise ValueError(f"sequence_parallel=True: allowed only with tp of at least 2, not tp={self.tp}")
        _one_of(self, "token_layout", get_args(TokenLayout))
        if self.token_layout == "dp_tp" and not self.sequence_parallel:
            raise ValueError("token_layout='dp_tp': allowed only with sequence parallelism")
        self._resolve_transport()

    def _resolve_transport(self) -> None:
        if self.transport is None:
            object.__setattr__(self, "transport", "allgather" if self.ep > 1 else "local")
        _one_of(self, "transport", get_args(TransportName))
        name, mode = str(self.transport), self.mode
        alone = name == "local" and self.ep == 1
        if mode not in CAPABILITIES[name] and not alone:
            allowed = ", ".join(map(repr, serving(mode)))
            why = ""
            if name in ACROSS_NODES and self.expert_parallel:
                why = f"; {name!r} needs sequence_parallel=True with tp={self.tp}, so that ranks differ in their tokens"
            raise ValueError(f"transport={name!r} in mode {mode!r}: allowed is {allowed}{why}")
        self._check_transport_options(name)

    def _check_transport_options(self, name: str) -> None:
        _whole_number(self, "nodes", 1)
        if self.nodes > 1 and name not in ACROSS_NODES:
            allowed = ", ".join(map(repr, sorted(ACROSS_NODES)))
            raise ValueError(
                f"nodes={self.nodes} with transport={name!r} in mode {self.mode!r}: allowed transports are {allowed}"
            )
        if self.dp % self.nodes:
            raise ValueError(f"nodes={self.nodes}: allowed are divisors of dp={self.dp}")
        for field, owners in (("capacity_factor", SLOTTED), ("max_rows", ("ragged",))):
            value = getattr(self, field)
            if value is not None and name not in owners:
                allowed = " or ".join(map(repr, owners))
                raise ValueError(
                    f"{field}={value!r} with transport={name!r} in mode {self.mode!r}: allowed is transport={allowed}"
                )
        if self.capacity_factor is not None:
            _finite(self, "capacity_factor", positive=True)
        if self.max_rows is not None:
            _whole_number(self, "max_rows", 1)

    @property
    def mode(self) -> str:
        """The parallel mode, by its name in `CAPABILITIES`."""
        if not self.expert_parallel:
            return "+".join(name for name, size in (("DP", self.dp), ("TP", self.tp)) if size > 1) or "single"
        if self.token_layout == "dp_tp":
            return "EP+SP native"
        if self.sp:
            return "EP+SP"
        return "EP, SP off" if self.tp > 1 else "DP+EP"

    @property
    def ep(self) -> int:
        """Ranks over which experts are split."""
        return self.dp * self.tp if self.expert_parallel else 1

    @property
    def sp(self) -> bool:
        """Whether sequence parallelism is on."""
        return bool(self.sequence_parallel)

    @property
    def world(self) -> int:
        """Ranks in the mesh."""
        return self.dp * self.tp

    @property
    def splits_intermediate(self) -> bool:
        """Whether F of the routed experts is split over tp."""
        return self.tp > 1 and not self.expert_parallel

    @property
    def splits_shared(self) -> bool:
        """Whether the shared expert is split over tp: whenever tp ranks hold the same tokens."""
        return self.tp > 1 and not self.sp


def check(config: MoEConfig, parallel: ParallelConfig) -> None:
    """Raises `ValueError` where a layer cannot be spread this way: a size that does not divide, a dtype not carried."""
    carried = TRANSPORT_DTYPES[str(parallel.transport)]
    if config.dtype not in carried:
        raise ValueError(
            f"dtype={config.dtype!r} with transport={parallel.transport!r} in mode {parallel.mode!r}: allowed are "
            f"{', '.join(map(repr, sorted(carried)))}"
        )
    if config.num_experts % parallel.ep:
        raise ValueError(f"num_experts={config.num_experts}: allowed are multiples of ep={parallel.ep}")
    if parallel.splits_intermediate and config.intermediate_size % parallel.tp:
        raise ValueError(f"intermediate_size={config.intermediate_size}: allowed are multiples of tp={parallel.tp}")
    if parallel.splits_shared and config.shared_width % parallel.tp:
        raise ValueError(f"shared_width={config.shared_width}: allowed are multiples of tp={parallel.tp}")
