"""What will run for a configuration, and why, in words."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_moe import activation as activations
from jax_moe import kernels, layer, router, sharding
from jax_moe._compat import ragged_all_to_all_works
from jax_moe.config import MoEConfig, ParallelConfig, check
from jax_moe.estimate import estimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """Printable; each attribute is a paragraph, in the order of the fields.

    Attributes:
      mode: the parallel mode in words.
      sizes: what each rank holds.
      transport: how rows reach their experts.
      moves: bytes a rank sends for that, and holds.
      kernels: implementation of each operation; of a product that a kernel computes, its tile too.
      reductions: where each branch is summed over ranks.
    """

    mode: str
    sizes: str
    transport: str
    moves: str
    kernels: str
    reductions: str

    def __str__(self) -> str:
        """One line for each field."""
        width = max(len(field.name) for field in dataclasses.fields(self))
        return "\n".join(f"{f.name:<{width}}  {getattr(self, f.name)}" for f in dataclasses.fields(self))


def explain(
    config: MoEConfig,
    parallel: ParallelConfig,
    mesh: Mesh | None = None,
    *,
    tokens_per_rank: int = 1024,
    implementation: str | None = None,
) -> Explanation:
    """Says which parallel mode, transport and kernels a layer will use, and where its sums are completed.

    Args:
      config, parallel: the layer and its spread.
      mesh: where it will run; None: on the default platform.
      tokens_per_rank: rows each rank routes, for the bytes and the tiles; see `estimate`.
      implementation: as the layer will be given it.

    Returns:
      An `Explanation`; print it.

    Raises:
      ValueError: a layer that cannot be spread so, or a mesh of another size.
      NotImplementedError: the named implementation cannot run it.

    Example:
      >>> import jax_moe as jm
      >>> config = jm.MoEConfig(num_experts=8, top_k=2, hidden_size=16, intermediate_size=32)
      >>> jm.explain(config, jm.ParallelConfig(dp=2, expert_parallel=True)).transport
      'allgather over dp: every token to every rank, sums scattered back'
    """
    check(config, parallel)
    if mesh is not None:
        sharding.check_mesh(parallel, mesh)
    return Explanation(
        mode=_mode(parallel),
        sizes=_sizes(config, parallel),
        transport=_transport(parallel),
        moves=_moves(config, parallel, tokens_per_rank),
        kernels=_kernels(config, parallel, mesh, implementation, tokens_per_rank),
        reductions=_reductions(config, parallel),
    )


def _mode(parallel: ParallelConfig) -> str:
    dp, tp = parallel.dp, parallel.tp
    if parallel.world == 1:
        return "one rank"
    if not parallel.expert_parallel:
        names = {"DP": dp, "TP": tp}
        used = " + ".join(f"{name} {size}" for name, size in names.items() if size > 1)
        return f"{used}: every expert on every rank" + (", its width split over tp" if tp > 1 else "")
    mode = f"EP {parallel.ep} (dp {dp} x tp {tp}): whole experts, E split over {'dp and tp' if tp > 1 else 'dp'}"
    if parallel.native:
        return f"{mode}; SP native: tokens come and go split over dp and tp"
    if parallel.sp:
        return f"{mode}; SP: each tp rank routes its chunk of the tokens, results are gathered over tp"
    return f"{mode}; SP off: every tp rank routes the same tokens" if tp > 1 else mode


def _sizes(config: MoEConfig, parallel: ParallelConfig) -> str:
    parts = [
        f"{config.num_experts // parallel.ep} of {config.num_experts} experts",
        f"{config.intermediate_size // parallel.expert_tp} of width {config.intermediate_size}",
        f"experts read {config.expert_width}" + (f" (latent of {config.hidden_size})" if config.latent_size else ""),
    ]
    if config.shared_width:
        parts.append(f"shared expert {config.shared_width // parallel.shared_tp} of width {config.shared_width}")
    return "each rank: " + ", ".join(parts) + f"; {config.dtype}"


def _transport(parallel: ParallelConfig) -> str:
    axes = layer.gathered_axes(parallel)
    if not axes:
        return f"{parallel.transport}: nothing moves, tokens are where their experts are"
    name = f"{parallel.transport} over {' and '.join(axes)}"
    if parallel.transport == "allgather":
        return f"{name}: every token to every rank, sums scattered back"
    text = f"{name}: a token once to each rank that holds any of its experts"
    if parallel.nodes > 1:
        text += f", by way of one rank on each of {parallel.nodes} nodes"
    if parallel.transport == "ragged":
        text += ", exact sizes" if ragged_all_to_all_works() else ", exact sizes, in equal blocks between processes"
        text += f"; a rank accepts {parallel.max_rows} rows" if parallel.max_rows else ""
    else:
        slots = f"; slots for {parallel.capacity_factor:g} times an even spread" if parallel.capacity_factor else ""
        text += ", in slots for each pair of ranks" + slots
        text += ", stored there by the sender's kernel" if parallel.transport == "one_sided" else ""
    return text + "; one row back for each, summed in order of rank"


def _moves(config: MoEConfig, parallel: ParallelConfig, tokens_per_rank: int) -> str:
    costs = estimate(config, parallel, tokens_per_rank)
    about = "" if costs.exact else "about "
    parts = []
    for hop, where in zip(
        costs.hops, ("across nodes", "inside the node") if parallel.nodes > 1 else ("",), strict=True
    ):
        parts.append(
            f"{where + ': ' if where else ''}dispatch sends {about}{_bytes(hop.dispatch_bytes)} in "
            f"{hop.dispatch_messages} messages, combine {about}{_bytes(hop.combine_bytes)} in {hop.combine_messages}, "
            f"buffers hold {_bytes(hop.buffer_bytes)}"
        )
    note = "" if costs.exact else "; if routing is uniform"
    return f"each rank, for {tokens_per_rank} tokens of its own: " + "; ".join(parts) + note


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _kernels(
    config: MoEConfig, parallel: ParallelConfig, mesh: Mesh | None, implementation: str | None, tokens_per_rank: int
) -> str:
    if mesh is not None:
        implementation = kernels.for_platform(implementation, mesh.devices.flat[0].platform)
    held, width = config.num_experts // parallel.ep, config.expert_width
    inter = config.intermediate_size // parallel.expert_tp
    rows = estimate(config, parallel, tokens_per_rank).expert_rows
    dtype, activation = jnp.dtype(config.dtype), activations.from_config(config)

    def product(depth: int, outputs: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        shapes = ((max(rows, 1), depth), (held, outputs, depth))
        return (*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), jax.ShapeDtypeStruct((held,), jnp.int32))

    x, w_up, sizes = product(width, inter * (2 if config.gated else 1))
    h, w_down, _ = product(inter, width)
    operands = {
        "grouped_matmul": (h, w_down, sizes, None, dtype),
        "gate_up": (x, w_up, sizes, activation, None),
    }
    said = []
    for name in kernels.OPERATIONS:
        if name in kernels.FUSED:
            continue
        named = implementation if name in operands else kernels.for_rows(implementation)
        chosen = kernels.chosen(name, named, *operands.get(name, ()))
        tile = kernels.tile_of(chosen, rows, held, config.gated and name == "gate_up") if name in operands else None
        said.append(f"{name}: {chosen}" + (f" ({tile})" if tile else ""))
    text = ", ".join(said)
    if implementation is None and layer.may_gather_ahead(config, parallel):
        x_and_index = jax.ShapeDtypeStruct((tokens_per_rank, width), dtype), jax.ShapeDtypeStruct((rows,), jnp.int32)
        chosen = kernels.chosen("gather_gate_up", None, *x_and_index, w_up, sizes, activation, None)
        if chosen != "reference":
            text += f"; without trace rows are gathered while others are multiplied, gather_gate_up: {chosen}"
    if implementation is None and layer.may_fuse(config, parallel):
        shape = jax.ShapeDtypeStruct
        few_x = shape((tokens_per_rank, width), dtype)
        logits = shape((tokens_per_rank, config.num_experts), jnp.float32)
        rule = router.rule(config.router, config.top_k)
        few = (few_x, logits, None, w_up, None, w_down, None, activation, rule)
        if (chosen := kernels.chosen("few_tokens", None, *few)) != "reference":
            text += f"; or, without padding and trace, all in one few_tokens: {chosen}"
    return text


def _reductions(config: MoEConfig, parallel: ParallelConfig) -> str:
    gathered, partial = layer.gathered_axes(parallel), layer.routed_partial_over(parallel)
    steps = []
    if gathered:
        steps.append(f"inside combine over {' and '.join(gathered)}")
    if partial:
        where = "before it leaves the latent" if config.latent_size else "by the layer"
        steps.append(f"over {' and '.join(partial)} {where}")
    text = "routed: " + (", then ".join(steps) or "complete as it is")
    if config.shared_width:
        together = parallel.shared_tp > 1 and partial and not config.latent_size
        over = "over tp by the layer" + (", in one sum with the routed" if together else "")
        text += "; shared: " + (over if parallel.shared_tp > 1 else "whole on each rank's tokens, complete as it is")
    return text + "; sums across ranks in float32"
