"""The layer: the only place that knows process groups, and the only place that reduces.

    x - (SP scatter) - route - dispatch - experts - combine - (SP gather) - y
                        '------------- shared expert -----------'

Shapes: `t` rows of x on this rank, `n` real tokens this rank routes, `c` rows of a sequence chunk, `D` hidden size, `W`
the routed experts' width, `E` experts, `K` experts per token, `S` the shared expert's intermediate size.

Each branch, routed and shared, says over which mesh axes its value is still a partial sum. Branches that are partial
over the same axes are added first, and every sum is reduced once:

    parallel mode         routed        shared
    one rank, DP, DP+EP   complete      complete
    TP                    partial: tp   partial: tp
    EP+SP, native         complete      complete      (each rank runs the whole shared expert on its own chunk)
    EP, tp>1, SP off      partial: tp   partial: tp
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from torch_moe import collectives, experts, inputs, layout, matmul, params, router, trace, transport
from torch_moe._typing import Float, Float32, Int, Tensor
from torch_moe.activation import Activation
from torch_moe.config import MoEConfig, ParallelConfig, check
from torch_moe.layout import TokenLayout
from torch_moe.mesh import Ranks, find_ranks
from torch_moe.stages import Lessons, check_lessons
from torch_moe.trace import Recorder, Tap
from torch_moe.transport.base import Exchange, Handle, Placement, Transport, weigh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """A branch's (n, D) float32 and the mesh axes over which it is still to be summed."""

    value: Tensor
    partial_over: tuple[str, ...]


def scatter_sequence(
    x_tD: Float[Tensor, "t D"] | Int[Tensor, "t K"], *, tp: int, tp_index: int, group: ProcessGroup
) -> Float[Tensor, "c D"] | Int[Tensor, "c K"]:
    """This tp rank's chunk of rows that all tp ranks hold: ceil(t / tp) rows, zeros past the end."""
    return collectives.scatter_rows(x_tD, layout.chunk_rows(x_tD.shape[0], tp), tp, tp_index, group)


def gather_sequence(
    y_cD: Float[Tensor, "c D"], *, rows: int, tp: int, tp_index: int, group: ProcessGroup
) -> Float[Tensor, "t D"]:
    """The chunks of all tp ranks, in order, trimmed to the rows that came in."""
    return collectives.gather_rows(y_cD, rows, tp, tp_index, group)


def reduce_partial(value: Float32[Tensor, "n D"], *, partial_over: tuple[str, ...], ranks: Ranks) -> Tensor:
    """Completes a partial sum, in float32."""
    for axis in partial_over:
        value = collectives.all_reduce(value, ranks.over(axis))
    return value


def shared_expert(
    x_nD: Float[Tensor, "n D"],
    gate_up_MD: Float[Tensor, "M D"],
    down_DS: Float[Tensor, "D S"],
    gate_1D: Float[Tensor, "1 D"] | None,
    *,
    activation: Activation,
    enter: Callable[[Tensor], Tensor] = lambda value: value,
) -> Float32[Tensor, "n D"]:
    """The shared expert, or this rank's part of its intermediate size, in which case the result is a partial sum.

    Args:
        x_nD: (n, D); x itself also where the routed experts read a latent.
        gate_up_MD: (2S, D), or (S, D) ungated.
        down_DS: (D, S).
        gate_1D: (1, D) sigmoid gate, or None.
        activation: the experts'.
        enter: applied to whole values before ranks take different parts of the work.

    Returns:
        (n, D) float32.
    """
    inner_nM = matmul.linear(enter(x_nD), gate_up_MD, tensor_cores=True)
    h_nS = experts.activate(inner_nM, activation=activation).to(x_nD.dtype)
    y_nD = matmul.linear(h_nS, down_DS, tensor_cores=True)
    if gate_1D is not None:
        y_nD = y_nD * enter(torch.sigmoid(matmul.linear(x_nD, gate_1D, tensor_cores=False)))
    return y_nD


class MoE(nn.Module):
    """A mixture-of-experts layer that holds this rank's part of the parameters.

    Parameters are NaN until `load_params`.

    Gradients: the loss is a sum over tokens, taken by every rank over its own y; tp ranks that hold the same tokens
    take the same loss, which counts once. After backward the gradients of x and of all parameters are complete over tp,
    and those of experts split by expert parallelism are complete. The others are this DP rank's part: sum them over dp.
    Backward communicates, so every rank calls it, and x requires a gradient on all ranks or on none.

    Args:
        config: the layer.
        parallel: how it is spread; one rank by default.
        device_mesh: `make_mesh(parallel)`, or any mesh of its shape and axes: ("dp", "tp"), with nodes
            ("node", "local", "tp"); None for one rank.
        device: of the parameters; by default the mesh's current device.

    Raises:
        ValueError: sizes that do not divide, or another mesh than `parallel` says.

    Example:
        >>> config = MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=16, dtype="float32")
        >>> moe = MoE(config)
        >>> moe.load_params(params.init(config))
        >>> moe(torch.randn(3, 8)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        config: MoEConfig,
        parallel: ParallelConfig | None = None,
        device_mesh: DeviceMesh | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        parallel = ParallelConfig() if parallel is None else parallel
        check(config, parallel)
        self.config = config
        self.parallel = parallel
        self.ranks = find_ranks(parallel, device_mesh)
        if device is None and device_mesh is not None and device_mesh.device_type != "cpu":
            kind = device_mesh.device_type
            device = torch.device(kind, torch.get_device_module(kind).current_device())
        self.activation = Activation(
            name=config.activation,
            gated=config.gated,
            layout=config.gate_up_layout,
            alpha=config.swiglu_alpha,
            limit=config.swiglu_limit,
        )
        index = self.ranks.dp_index * parallel.tp + self.ranks.tp_index
        local_experts = config.num_experts // parallel.ep
        self.placement = Placement(
            num_experts=config.num_experts,
            first_expert=index * local_experts if parallel.expert_parallel else 0,
            local_experts=local_experts,
        )
        parts = params.allocate(
            config, parallel, dp_index=self.ranks.dp_index, tp_index=self.ranks.tp_index, device=device
        )
        self.experts = params.ExpertParams(parts)
        self.router = params.RouterParams(parts)
        self.shared = params.SharedParams(parts) if config.shared_width else None
        self.latent = params.LatentParams(parts) if config.latent_size is not None else None

    @torch.no_grad()
    def load_params(self, full: Mapping[str, Tensor]) -> None:
        """Copies this rank's part of whole parameters in checkpoint layout.

        Args:
            full: exactly the names of `params.specs(config)`. Only this rank's part of each is read.

        Raises:
            ValueError: a name is missing or unknown, or a shape or dtype is another.
        """
        params.check_full(full, self.config)
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, target in own.items():
            part = params.local_part(
                name, full[name], self.config, self.parallel, dp_index=self.ranks.dp_index, tp_index=self.ranks.tp_index
            )
            target.copy_(part)

    def forward(
        self,
        x_tD: Float[Tensor, "t D"],
        *,
        router_logits: Float[Tensor, "t E"] | None = None,
        topk_ids: Int[Tensor, "t K"] | None = None,
        topk_weights: Float[Tensor, "t K"] | None = None,
        counts: Sequence[int] | None = None,
        trace: bool = False,
        lessons: Lessons | None = None,
    ) -> Tensor | tuple[Tensor, trace.Trace]:
        """Routes every real token to its experts and sums what they answer. Every rank of the mesh must call it.

        Args:
            x_tD: (t, D) in the configuration's dtype: this rank's tokens, the same on the tp ranks of a DP rank, unless
                the token layout is "dp_tp". t may differ between DP ranks and may be 0.
            router_logits: (t, E), given exactly when the router's source is "logits". Lies as x does.
            topk_ids: (t, K) integers, given exactly when the source is "ids"; distinct within a token.
            topk_weights: (t, K) floating point, with topk_ids.
            counts: real rows of x per DP rank (layout "dp_tp": per rank), the same sequence on every rank. Rows past
                them are padding, which may hold anything. None: every row is real.
            trace: also return the routing, the sort and the result of each stage.
            lessons: what stages hand on in place of their own results; with `trace` alone.

        Returns:
            (t, D) in the configuration's dtype, zeros in padding rows; with `trace`, also a `Trace`.

        Raises:
            ValueError: an input of another shape, dtype or value than allowed, before anything is communicated; or,
                on every rank alike, sizes that do not fit together between ranks.
        """
        inputs.check_x(x_tD, self.config)
        counts = None if counts is None else layout.check_counts(counts, self.parallel)
        rows = x_tD.shape[0]
        real = layout.own_count(counts, rows, self.parallel, self.ranks.dp_index, self.ranks.tp_index)
        inputs.check_routing(router_logits, topk_ids, topk_weights, config=self.config, rows=rows, real=real)
        if lessons is not None:
            if not trace:
                raise ValueError("lessons with trace=False: allowed is trace=True, which shows what came of them")
            check_lessons(lessons, self.config)
        tokens = self._locate(rows, real, counts, x_tD.device, everyone=trace)
        tap = self._recorder(tokens, lessons, x_tD.device) if trace else Tap()

        x_nD = self._own(x_tD, tokens)
        given = (router_logits, topk_ids, topk_weights)
        own = (None if value is None else self._own(value, tokens) for value in given)
        ids_nK, weights_nK = self._route(x_nD, *own, tap=tap)
        branches = [self._routed_branch(x_nD, ids_nK, weights_nK, tokens, tap)]
        if self.shared is not None:
            branches.append(self._shared_branch(x_nD, self.shared, tap))
        y_nD = self._complete(branches).to(x_tD.dtype)

        y_tD = collectives.pad_rows(y_nD, tokens.own_rows)
        if self._scatters:
            y_tD = gather_sequence(y_tD, rows=tokens.array_rows, **self._sequence)
        return (y_tD, self._trace(tap)) if isinstance(tap, Recorder) else y_tD

    @property
    def _scatters(self) -> bool:
        """Whether tokens come replicated over tp and each tp rank takes its chunk."""
        return self.parallel.sp and self.parallel.token_layout == "dp"

    @property
    def _sequence(self) -> dict[str, Any]:
        """Between whom a sequence is split."""
        return {"tp": self.parallel.tp, "tp_index": self.ranks.tp_index, "group": self.ranks.tp}

    @property
    def _partial_over(self) -> tuple[str, ...]:
        """Axes over which ranks hold the same tokens and parts of the work."""
        return ("tp",) if self.parallel.tp > 1 and not self.parallel.sp else ()

    def _enter(self, value: Tensor) -> Tensor:
        """Marks a value that is whole on every tp rank, where tp ranks go on to do different parts with it."""
        return collectives.replicated(value, self.ranks.tp) if self._partial_over else value

    def _whole(self, parameter: Tensor) -> Tensor:
        """Marks a parameter that is whole on every tp rank, where tp ranks apply it to different tokens."""
        return collectives.replicated(parameter, self.ranks.tp) if self.parallel.sp else parameter

    def _locate(
        self, rows: int, real: int, counts: tuple[int, ...] | None, device: torch.device, *, everyone: bool
    ) -> TokenLayout:
        """Where this rank's tokens lie; asks the ranks it shares work with for their sizes."""
        parallel, ranks = self.parallel, self.ranks
        everyone = everyone or parallel.ep > 1
        given = (-1,) if counts is None else counts
        expected = parallel.world if parallel.token_layout == "dp_tp" else parallel.dp
        message = [rows, *given, *[-1] * (expected - len(given))]
        reported = collectives.share_integers(message, ranks.world if everyone else ranks.tp, device)
        first = 0 if everyone else ranks.dp_index * parallel.tp
        arrays = [report[0] for report in reported]
        layout.check_agreement(
            arrays, [report[1:] for report in reported], parallel, range(first, first + len(reported))
        )
        if not everyone:
            return TokenLayout(
                array_rows=rows, own_rows=rows, own_real=real, sizes=(real,), most_rows=rows, offset=None
            )
        by_rank = layout.real_by_rank(arrays, counts, parallel)
        index = ranks.dp_index * parallel.tp + ranks.tp_index if parallel.sp else ranks.dp_index
        return TokenLayout(
            array_rows=rows,
            own_rows=layout.chunk_rows(rows, parallel.tp) if self._scatters else rows,
            own_real=by_rank[index],
            sizes=by_rank if parallel.ep > 1 else (real,),
            most_rows=layout.chunk_rows(max(arrays), parallel.tp) if self._scatters else max(arrays),
            offset=sum(by_rank[:index]),
        )

    def _own(self, value: Tensor, tokens: TokenLayout) -> Tensor:
        """The real rows that this rank routes. Cutting padding off here keeps whatever it holds out of every sum."""
        if self._scatters:
            value = scatter_sequence(value, **self._sequence)
        return value[: tokens.own_real]

    def _route(
        self, x_nD: Tensor, logits: Tensor | None, topk_ids: Tensor | None, topk_weights: Tensor | None, *, tap: Tap
    ) -> tuple[Tensor, Tensor]:
        if topk_ids is not None and topk_weights is not None:
            ids, weights = topk_ids.to(torch.int32), topk_weights.float()
        else:
            if logits is None:
                logits = router.compute_logits(x_nD, self._whole(cast(Tensor, self.router.gate)))
            logits = tap.by_token("logits", logits.float())
            ids, weights = router.route(logits, self.router.bias, router=self.config.router, top_k=self.config.top_k)
        return tap.by_token("topk_ids", ids), tap.by_token("topk_weights", weights)

    @property
    def _mover(self) -> Transport:
        return cast(Transport, getattr(transport, cast(str, self.parallel.transport)))

    def _exchange(self, tokens: TokenLayout) -> Exchange:
        group = None
        if self.parallel.ep > 1:
            group = self.ranks.dp if self._partial_over else self.ranks.world
        return Exchange(
            group=group,
            sizes=tokens.sizes,
            rows=tokens.most_rows,
            levels=self.ranks.levels,
            capacity_factor=self.parallel.capacity_factor,
            max_rows=self.parallel.max_rows,
        )

    def _routed_branch(self, x_nD: Tensor, ids_nK: Tensor, weights_nK: Tensor, tokens: TokenLayout, tap: Tap) -> Branch:
        mover = self._mover
        x_nW = x_nD
        if self.latent is not None:
            x_nW = matmul.linear(x_nD, self._whole(self.latent.down), tensor_cores=True).to(x_nD.dtype)
            x_nW = tap.by_token("latent_in", x_nW)
        rows, handle = mover.dispatch(
            {"values": self._enter(x_nW)},
            ids_nK,
            self._enter(weights_nK),
            placement=self.placement,
            exchange=self._exchange(tokens),
            weight_on_input=self.config.router.weight_on_input,
        )
        tap.arrived(mover.carry, handle)
        rows_RW = tap.by_row("dispatch", weigh(rows["values"], handle))
        y_RW = tap.by_row("down", self._run_experts(rows_RW, handle, tap))
        y_nW = tap.by_token("combine", mover.combine(y_RW, handle))
        routed = Branch(value=y_nW, partial_over=self._partial_over)
        if self.latent is None:
            return routed
        whole_nL = reduce_partial(routed.value, partial_over=routed.partial_over, ranks=self.ranks).to(x_nD.dtype)
        up_nD = matmul.linear(whole_nL, self._whole(self.latent.up), tensor_cores=True)
        return Branch(value=tap.by_token("latent_out", up_nD), partial_over=())

    def _run_experts(self, rows_RW: Tensor, handle: Handle, tap: Tap) -> Tensor:
        weights = self.experts
        down_bias = weights.down_bias
        if down_bias is not None and self.parallel.splits_intermediate:
            # Every tp rank adds up its part of F; the bias belongs to the sum, once.
            down_bias = collectives.on_first(down_bias, self.ranks.tp_index == 0)
        sizes, num_rows = handle.plan.group_sizes, handle.rows_in_use
        h_RF = experts.gate_up(
            rows_RW,
            weights.gate_up,
            sizes,
            activation=self.activation,
            bias_eM=weights.gate_up_bias,
            num_rows=num_rows,
            between=lambda product_RM: tap.by_row("gate_up", product_RM),
        )
        h_RF = tap.by_row("activation", h_RF)
        return experts.down(h_RF, weights.down, sizes, bias_eW=down_bias, num_rows=num_rows)

    def _shared_branch(self, x_nD: Tensor, weights: params.SharedParams, tap: Tap) -> Branch:
        value = shared_expert(
            x_nD,
            self._whole(weights.gate_up),
            self._whole(weights.down),
            None if weights.gate is None else self._whole(weights.gate),
            activation=self.activation,
            enter=self._enter,
        )
        return Branch(value=tap.by_token("shared", value), partial_over=self._partial_over)

    def _complete(self, branches: Sequence[Branch]) -> Tensor:
        """Adds the branches up, each reduced over just the axes it is partial over."""
        sums: dict[tuple[str, ...], Tensor] = {}
        for branch in branches:
            held = sums.get(branch.partial_over)
            sums[branch.partial_over] = branch.value if held is None else held + branch.value
        done = [reduce_partial(value, partial_over=axes, ranks=self.ranks) for axes, value in sums.items()]
        return sum(done[1:], start=done[0])

    def _recorder(self, tokens: TokenLayout, lessons: Lessons | None, device: torch.device) -> Recorder:
        return Recorder(self.config, self.parallel, self.ranks.tp_index, tokens, lessons, device)

    @torch.no_grad()
    def _trace(self, recorder: Recorder) -> trace.Trace:
        load = collectives.sum_ranks(recorder.count_choices(), self.ranks.world if self.parallel.sp else self.ranks.dp)
        return recorder.trace(load)
