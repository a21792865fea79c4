"""Each token goes once to each rank that holds any of its experts, in fixed slots for each pair of ranks.

Nobody asks for sizes: shapes are known when the program is compiled, and an empty slot is known by what is in it.
`bounds.padded` says how many slots there are. Without a capacity factor every copy has one. With it, the first copies
in the source's order take the slots of a rank; the others are dropped, with all their experts there, and the source
counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jax_moe._typing import Array, Float32, Int32
from jax_moe.transport import bounds, copies, lanes
from jax_moe.transport import hops as by_hops
from jax_moe.transport.copies import Copies, Targets


def dispatch(
    x_tW: Any,
    topk_ids_tK: Int32[Array, "t K"],
    topk_weights_tK: Float32[Array, "t K"],
    *,
    hops: tuple[tuple[str, ...], ...],
    capacity_factor: float | None = None,
    first_expert: Int32[Array, ""] | int,
    num_local_experts: int,
    weight_on_input: bool = False,
    implementation: str | None = None,
    lane: Callable[[tuple[str, ...]], by_hops.Lane] = lanes.Slots,
) -> tuple[Any, by_hops.HopsHandle]:
    """See `base.Transport.dispatch`; `hops` are the mesh axes of each hop, `capacity_factor` is `ParallelConfig`'s.

    `lane` moves the slots over the axes of a hop.
    """

    def open_lane(targets: Targets, axes: tuple[str, ...]) -> tuple[Copies, by_hops.Lane, Array]:
        ranks = targets.sizes_N.shape[0]
        limit = bounds.padded(targets.target_nm.shape[0], topk_ids_tK.shape[1], ranks, capacity_factor)
        first_N = jnp.arange(ranks, dtype=jnp.int32) * limit.pair
        room_N = jnp.full((ranks,), limit.pair, jnp.int32)
        dropped = jnp.sum(jnp.maximum(targets.sizes_N - limit.pair, 0))
        return copies.lay_out(targets, first_N, room_N, limit.send), lane(axes), dropped

    return by_hops.dispatch(
        x_tW,
        topk_ids_tK,
        topk_weights_tK,
        hops=hops,
        open_lane=open_lane,
        first_expert=first_expert,
        num_local_experts=num_local_experts,
        weight_on_input=weight_on_input,
        implementation=implementation,
    )


def combine(y_RW: Any, handle: by_hops.HopsHandle) -> Any:
    """See `base.Transport.combine`. Partial sums come back in float32, one row for each token and rank."""
    return by_hops.combine(y_RW, handle)
