"""The layer: scatter, route, dispatch, experts, combine, shared expert, reduce, gather.

The only place with `shard_map`, and with the reductions of the layer (a transport has those of its own pair).

Shape suffixes: T rows of the whole batch, t rows on this shard, c rows this rank routes (t, or its sequence-parallel
chunk), D hidden size, W expert width, E experts, K experts per token, R rows of this rank's experts.

A branch (routed, shared) is partial over some mesh axes, says so, and is summed over them exactly once. Sums across
ranks are carried in float32 and the layer's output is rounded once.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jax_moe import activation as activations
from jax_moe import checks, experts, kernels, router, sharding, stages, tokens, transport
from jax_moe import trace as traces
from jax_moe._compat import all_gather_replicated, settle
from jax_moe._typing import Array, Float, Float32, Int
from jax_moe.activation import Activation
from jax_moe.capabilities import SLOTTED
from jax_moe.config import MoEConfig, ParallelConfig
from jax_moe.kernels import for_platform, for_rows
from jax_moe.linear import linear
from jax_moe.params import MoEParams, SharedParams
from jax_moe.stages import Lessons

_TRANSPORTS = {
    "local": transport.local,
    "allgather": transport.allgather,
    "ragged": transport.ragged,
    "padded": transport.padded,
    "one_sided": transport.one_sided,
}


def moe(
    params: MoEParams,
    x_TD: Float[Array, "T D"],
    *,
    config: MoEConfig,
    parallel: ParallelConfig,
    mesh: Mesh,
    router_logits: Float[Array, "T E"] | None = None,
    topk_ids: Int[Array, "T K"] | None = None,
    topk_weights: Float[Array, "T K"] | None = None,
    counts: Int[Array, " shards"] | None = None,
    implementation: str | None = None,
    trace: bool = False,
    lessons: Lessons | None = None,
) -> Any:
    """Mixture-of-experts layer over a mesh, with global arrays. Compiled once for each configuration and shape.

    Args:
      params: from `shard` for the same config, parallel and mesh.
      x_TD: (T, D) in config.dtype. T = dp * t, split over "dp" and equal over "tp"; or, with token_layout "dp_tp",
        T = dp * tp * t, split over both. Where there are nodes, "dp" is the pair ("node", "local").
      config, parallel, mesh: static.
      router_logits: (T, E), when config.router.source is "logits"; lies as x does, like the two below.
      topk_ids: (T, K) integers, distinct within a token, when it is "ids". An id outside of [0, E) goes nowhere.
      topk_weights: (T, K), likewise.
      counts: real rows of each shard of x, (dp,) integers, or (dp * tp,) with "dp_tp"; the rows after them are padding,
        may hold NaN, and come back as zeros. None: all are real. Checked against t when their values are at hand;
        inside `jit` they are clipped to [0, t].
      implementation: of the experts' products: None picks, "reference", "mosaic_gpu" (Hopper) or "triton". Rows and
        routing go by it too, except that "mosaic_gpu" has none for them, and they are picked.
      trace: also return what was decided and what each stage gave. Costs nothing when off.
      lessons: what stages hand on in place of their own results, with `trace` alone; see `Lessons`.

    Returns:
      y (T, D) in config.dtype, laid out as x; with trace, (y, Trace).

    Raises:
      ValueError: an argument that does not fit, with its value and what was expected.
      NotImplementedError: the named implementation cannot run this; it says what it would take.

    Example:
      >>> import jax, jax.numpy as jnp, jax_moe as jm
      >>> config = jm.MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=16, dtype="float32")
      >>> parallel = jm.ParallelConfig()
      >>> mesh = jm.make_mesh(parallel)
      >>> params = jm.shard(jm.init(jax.random.key(0), config), config, parallel, mesh)
      >>> jm.moe(params, jnp.ones((3, 8)), config=config, parallel=parallel, mesh=mesh).shape
      (3, 8)
    """
    sharding.check_mesh(parallel, mesh)
    sharding.check_params(params, config, parallel)
    shards = tokens.num_counts(parallel)
    given = checks.routing(config, x_TD, router_logits, topk_ids, topk_weights, shards=shards)
    checks.counts(counts, shards, x_TD.shape[0] // shards)
    implementation = for_platform(implementation, mesh.devices.flat[0].platform)
    checks.implementation(implementation)
    checks.lessons(lessons, config, trace=trace)

    counts = counts if counts is None else jnp.asarray(counts)
    return _compiled(params, x_TD, given, counts, lessons, config, parallel, mesh, implementation, trace)


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8, 9))
def _compiled(
    params: MoEParams,
    x_TD: Array,
    given: dict[str, Array],
    counts: Array | None,
    lessons: Lessons | None,
    config: MoEConfig,
    parallel: ParallelConfig,
    mesh: Mesh,
    implementation: str | None,
    trace: bool,
) -> Any:
    """The layer over the mesh; arguments are checked. Under an outer jit this is traced once for all equal layers."""
    rows = PartitionSpec(parallel.token_axes)
    in_specs = (
        sharding.param_specs(config, parallel),
        rows,
        dict.fromkeys(given, rows),
        PartitionSpec(),
        PartitionSpec(),
    )
    out_specs = (rows, PartitionSpec(parallel.mesh_axes)) if trace else rows

    def local(
        params: MoEParams, x_tD: Array, given: dict[str, Array], counts: Array | None, lessons: Lessons | None
    ) -> Any:
        return _forward(params, x_tD, given, counts, lessons, config, parallel, implementation, trace)

    # Types of varying axes are left off: kernels need not state them, and gradients come out the same.
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return mapped(params, x_TD, given, counts, lessons)


def moe_local(
    params: MoEParams,
    x_tD: Float[Array, "t D"],
    *,
    config: MoEConfig,
    parallel: ParallelConfig,
    router_logits: Float[Array, "t E"] | None = None,
    topk_ids: Int[Array, "t K"] | None = None,
    topk_weights: Float[Array, "t K"] | None = None,
    counts: Int[Array, " shards"] | None = None,
    implementation: str | None = None,
    trace: bool = False,
    lessons: Lessons | None = None,
) -> Any:
    """The same layer inside the caller's own `shard_map`, over the axes of `parallel.mesh_axes` at least.

    Args:
      params: this rank's part: specs `param_specs(config, parallel)` on what `shard` returned.
      x_tD: (t, D), this rank's rows: equal over "tp", or with token_layout "dp_tp" different everywhere.
      config, parallel: static.
      router_logits, topk_ids, topk_weights: this rank's rows, as in `moe`.
      counts: of all shards, the same on every rank, as in `moe`; clipped to [0, t].
      implementation, trace, lessons: as in `moe`; the trace is this rank's, lessons are whole, and equal on all ranks.

    Returns:
      y (t, D), laid out as x; with trace, (y, Trace).

    Raises:
      ValueError: an argument that does not fit, or no axes of the sizes in `parallel` around the call.
      NotImplementedError: the named implementation cannot run this; it says what it would take.
    """
    checks.axes(parallel)
    sharding.check_params(params, config, parallel, local=True)
    given = checks.routing(config, x_tD, router_logits, topk_ids, topk_weights, shards=1)
    checks.counts(counts, tokens.num_counts(parallel), x_tD.shape[0])
    checks.implementation(implementation)
    checks.lessons(lessons, config, trace=trace)
    counts = counts if counts is None else jnp.asarray(counts)
    return _forward(params, x_tD, given, counts, lessons, config, parallel, implementation, trace)


def scatter_sequence(x_tD: Float[Array, "t D"], tp: int) -> Float[Array, "c D"]:
    """This tp rank's chunk, rows [j * c, (j + 1) * c) with c = ceil(t / tp), of rows that are equal over tp.

    Padded with zeros past the end: for t = 5 and tp = 4, c = 2, and rank 2 has row 4 and a zero, rank 3 two zeros.
    """
    chunk = -(-x_tD.shape[0] // tp)
    padded = jnp.pad(x_tD, ((0, chunk * tp - x_tD.shape[0]), (0, 0)))
    return jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index("tp") * chunk, chunk)


def gather_sequence(y_cD: Float[Array, "c D"], rows: int) -> Float[Array, "t D"]:
    """All chunks of the tp ranks, in order, trimmed to the t = `rows` that were scattered."""
    return all_gather_replicated(y_cD, "tp")[:rows]


def shared_expert(shared: SharedParams, x_cD: Float[Array, "c D"], activation: Activation) -> Float32[Array, "c D"]:
    """The shared expert on every token: an FFN in the arithmetic of the experts, times a sigmoid gate if it has one.

    Args:
      shared: whole, or this tp rank's part; then the result is partial over tp, gate and all: the gate is linear.
      x_cD: (c, D).
      activation: see `Activation`.

    Returns:
      (c, D) float32, not rounded.
    """
    h_cS = activations.apply(linear(x_cD, shared.gate_up), activation).astype(x_cD.dtype)
    y_cD = linear(h_cS, shared.down)
    return y_cD if shared.gate is None else y_cD * jax.nn.sigmoid(linear(x_cD, shared.gate))


def reduce_partial(y_cD: Float32[Array, "c D"], axes: tuple[str, ...]) -> Float32[Array, "c D"]:
    """Completes a float32 sum over the mesh axes it is partial over; none: it is complete already."""
    return jax.lax.psum(y_cD, axes) if axes else y_cD


@dataclasses.dataclass(frozen=True)
class _Branch:
    """A float32 summand of the output, and the mesh axes it has yet to be summed over."""

    value_cD: Array
    partial_over: tuple[str, ...]


def _forward(
    params: MoEParams,
    x_tD: Array,
    given: dict[str, Array],
    counts: Array | None,
    lessons: Lessons | None,
    config: MoEConfig,
    parallel: ParallelConfig,
    implementation: str | None,
    trace: bool,
) -> Any:
    """One rank's part of the layer; arguments are checked."""
    rows = x_tD.shape[0]
    if rows == 0:
        # No rank has rows, since shards are of one size: nobody waits for a collective, and XLA has none of size zero.
        return (x_tD, traces.empty(config, parallel)) if trace else x_tD
    activation = activations.from_config(config)
    cut = parallel.sp and not parallel.native
    if cut:
        x_tD = scatter_sequence(x_tD, parallel.tp)
        given = {name: scatter_sequence(array, parallel.tp) for name, array in given.items()}
    real_c = None
    if tokens.has_padding(rows, counts, parallel):
        counts_n = tokens.real_counts(rows, counts, parallel)
        real_c = jnp.arange(x_tD.shape[0], dtype=jnp.int32) < counts_n[tokens.routing_rank(parallel)]
    x_cD = _zero_padding(x_tD, real_c)

    tap = stages.OFF
    if trace:
        tap = traces.Recorder(rows, x_tD.shape[0], counts, config, parallel, lessons)
    routed = None
    if real_c is None and not trace:
        routed = _few_tokens(params, x_cD, given, config, parallel, activation, implementation)
    if routed is None:
        ids_cK, weights_cK = _route(params, x_cD, given, real_c, config, for_rows(implementation), tap)
        routed = _routed_experts(params, x_cD, ids_cK, weights_cK, config, parallel, activation, implementation, tap)
    branches = [routed]
    if params.shared is not None:
        shared_cD = tap("shared", shared_expert(params.shared, x_cD, activation))
        branches.append(_Branch(shared_cD, ("tp",) if parallel.shared_tp > 1 else ()))
    y_cD = _zero_padding(_sum_branches(branches), real_c).astype(x_cD.dtype)
    y_tD = settle(gather_sequence(y_cD, rows) if cut else y_cD, () if parallel.native else ("tp",))
    return (y_tD, tap.trace(token_axes(parallel))) if isinstance(tap, traces.Recorder) else y_tD


def _zero_padding(x: Array, real_c: Array | None) -> Array:
    """Zeros in rows that are no tokens; by choice and not by product, since they may hold NaN."""
    return x if real_c is None else jnp.where(real_c[:, None], x, jnp.zeros_like(x))


def _few_tokens(
    params: MoEParams,
    x_cD: Array,
    given: dict[str, Array],
    config: MoEConfig,
    parallel: ParallelConfig,
    activation: Activation,
    implementation: str | None,
) -> _Branch | None:
    """The routed experts in one operation, where there is a kernel for it; None where there is not.

    A name is for the operations one by one, so it is never taken with one.
    """
    if implementation is not None or not may_fuse(config, parallel):
        return None
    rule, weights = router.rule(config.router, config.top_k), params.experts
    logits = jax.ShapeDtypeStruct((x_cD.shape[0], config.num_experts), jnp.float32)
    first, second = (weights.gate_up, weights.gate_up_bias), (weights.down, weights.down_bias)
    operands = (x_cD, logits, params.router.bias, *first, *second, activation, rule)
    if kernels.chosen("few_tokens", implementation, *operands) == "reference":
        return None
    y_cD = kernels.few_tokens(
        x_cD,
        _logits(params, x_cD, given),
        params.router.bias,
        weights.gate_up,
        weights.down,
        activation=activation,
        rule=rule,
        bias_EM=weights.gate_up_bias,
        bias_EW=experts.down_bias(weights, _adds_bias(parallel)),
    )
    return _Branch(y_cD, routed_partial_over(parallel))


def may_fuse(config: MoEConfig, parallel: ParallelConfig) -> bool:
    """Whether the routed experts of few tokens can be one operation: all of it is here, and nothing comes between."""
    router_here = config.router.source != "ids" and not config.router.weight_on_input
    return router_here and parallel.transport == "local" and config.latent_size is None


def may_gather_ahead(config: MoEConfig, parallel: ParallelConfig) -> bool:
    """Whether rows can be gathered while others are multiplied: their tokens are here, and nothing is done to rows."""
    return parallel.transport == "local" and not config.router.weight_on_input


def _logits(params: MoEParams, x_cD: Array, given: dict[str, Array]) -> Array:
    """The router's logits, computed or given."""
    if "router_logits" in given:
        return given["router_logits"].astype(jnp.float32)
    assert params.router.gate is not None, "the parameters were checked"
    return router.compute_logits(x_cD, params.router.gate)


def _adds_bias(parallel: ParallelConfig) -> Array | bool:
    """Whether this rank adds the second projection's bias: where its width is split, one rank does."""
    return jax.lax.axis_index("tp") == 0 if parallel.expert_tp > 1 else True


def _route(
    params: MoEParams,
    x_cD: Array,
    given: dict[str, Array],
    real_c: Array | None,
    config: MoEConfig,
    implementation: str | None,
    tap: stages.Tap,
) -> tuple[Array, Array]:
    """Ids and weights. Padding goes nowhere: id E, weight zero."""
    if config.router.source == "ids":
        ids_cK, weights_cK = given["topk_ids"].astype(jnp.int32), given["topk_weights"].astype(jnp.float32)
        ids_cK = jnp.where((ids_cK >= 0) & (ids_cK < config.num_experts), ids_cK, config.num_experts)
    else:
        logits_cE = _logits(params, x_cD, given)
        if config.router.source == "logits":
            logits_cE = _zero_padding(logits_cE, real_c)
        ids_cK, weights_cK = router.route(
            tap("logits", logits_cE),
            params.router.bias,
            router=config.router,
            top_k=config.top_k,
            implementation=implementation,
        )
    if real_c is not None:
        ids_cK = jnp.where(real_c[:, None], ids_cK, config.num_experts)
    return tap("topk_ids", ids_cK), tap("topk_weights", _zero_padding(weights_cK, real_c))


def _routed_experts(
    params: MoEParams,
    x_cD: Array,
    ids_cK: Array,
    weights_cK: Array,
    config: MoEConfig,
    parallel: ParallelConfig,
    activation: Activation,
    implementation: str | None,
    tap: stages.Tap,
) -> _Branch:
    """Dispatch, experts, combine; around them the latent's projections, which every rank has whole."""
    mover = _TRANSPORTS[str(parallel.transport)]
    num_local_experts = config.num_experts // parallel.ep
    first_expert: Array | int = 0
    if parallel.expert_parallel:
        first_expert = (jax.lax.axis_index(parallel.mesh_axes) * num_local_experts).astype(jnp.int32)
    x_cW = x_cD
    if params.latent is not None:
        x_cW = tap("latent_in", linear(x_cD, params.latent.down).astype(x_cD.dtype))

    held = {
        "first_expert": first_expert,
        "num_local_experts": num_local_experts,
        "implementation": for_rows(implementation),
    }
    together = may_gather_ahead(config, parallel) and tap is stages.OFF
    if together and experts.gathers_ahead(x_cW, ids_cK.size, params.experts, activation, implementation):
        handle = transport.local.keep(ids_cK, weights_cK, **held)
        sizes_e = handle.plan.group_sizes_e
        h_RF = kernels.gather_gate_up(
            x_cW,
            handle.plan.row_token_R,
            params.experts.gate_up,
            sizes_e,
            activation=activation,
            bias_eM=params.experts.gate_up_bias,
        )
    else:
        options = transport_options(parallel) | held
        rows_RW, handle = mover.dispatch(
            x_cW, ids_cK, weights_cK, **options, weight_on_input=config.router.weight_on_input
        )
        tap.arrived(handle)
        sizes_e = handle.plan.group_sizes_e
        h_RF = experts.gate_up(
            tap("dispatch", rows_RW),
            params.experts,
            sizes_e,
            activation=activation,
            tap=tap,
            implementation=implementation,
        )
    y_RW = experts.down(
        tap("activation", h_RF),
        params.experts,
        sizes_e,
        adds_bias=_adds_bias(parallel),
        implementation=implementation,
    )
    y_cW = tap("combine", mover.combine(tap("down", y_RW), handle))
    routed = _Branch(y_cW, routed_partial_over(parallel))
    if params.latent is None:
        return routed
    # Out of the latent only when the sum over ranks is complete: it is rounded there, and rounding is not linear.
    latent_cL = reduce_partial(routed.value_cD, routed.partial_over).astype(x_cD.dtype)
    return _Branch(tap("latent_out", linear(latent_cL, params.latent.up)), ())


def token_axes(parallel: ParallelConfig) -> tuple[str, ...]:
    """Mesh axes of more than one rank over which tokens differ."""
    return tuple(axis for axis, size in parallel.axis_sizes.items() if size > 1 and (axis != "tp" or parallel.sp))


def gathered_axes(parallel: ParallelConfig) -> tuple[str, ...]:
    """Mesh axes of more than one rank over which tokens differ while experts are split: the transport's to cross."""
    return token_axes(parallel) if parallel.expert_parallel else ()


def hop_axes(parallel: ParallelConfig) -> tuple[tuple[str, ...], ...]:
    """The same axes, by hop: all at once, or first across nodes and then inside of one."""
    axes = gathered_axes(parallel)
    return (axes,) if parallel.nodes == 1 else (("node",), tuple(axis for axis in axes if axis != "node"))


def transport_options(parallel: ParallelConfig) -> dict[str, Any]:
    """What the transport's `dispatch` wants to know of the mesh."""
    if parallel.transport == "ragged":
        return {"hops": hop_axes(parallel), "max_rows": parallel.max_rows}
    if parallel.transport in SLOTTED:
        return {"hops": hop_axes(parallel), "capacity_factor": parallel.capacity_factor}
    return {"axes": gathered_axes(parallel)}


def routed_partial_over(parallel: ParallelConfig) -> tuple[str, ...]:
    """Mesh axes the combined routed output is partial over: F, or the experts, split over tp for equal tokens."""
    return ("tp",) if parallel.tp > 1 and not parallel.sp else ()


def _sum_branches(branches: list[_Branch]) -> Array:
    """Adds all branches, those that are partial over the same axes before their one reduction."""
    partial: dict[tuple[str, ...], Array] = {}
    for branch in branches:
        axes, value = branch.partial_over, branch.value_cD
        partial[axes] = partial[axes] + value if axes in partial else value
    complete = [reduce_partial(value_cD, axes) for axes, value_cD in partial.items()]
    return sum(complete[1:], start=complete[0])
