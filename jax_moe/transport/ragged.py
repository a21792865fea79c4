"""Each token goes once to each rank that holds any of its experts, and no row more: exact sizes in static buffers.

Ranks first tell each other how many rows they have for whom. `bounds.ragged` says how large the buffers are; with
`max_rows` a rank accepts the first `max_rows` copies in order of arrival and counts the others as dropped.
"""

from __future__ import annotations

from typing import Any

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
    max_rows: int | None = None,
    first_expert: Int32[Array, ""] | int,
    num_local_experts: int,
    weight_on_input: bool = False,
    implementation: str | None = None,
) -> tuple[Any, by_hops.HopsHandle]:
    """See `base.Transport.dispatch`; `hops` are the mesh axes of each hop, `max_rows` caps what it brings to a rank."""

    def open_lane(targets: Targets, axes: tuple[str, ...]) -> tuple[Copies, lanes.Segments, Array]:
        ranks = targets.sizes_N.shape[0]
        limit = bounds.ragged(targets.target_nm.shape[0], topk_ids_tK.shape[1], ranks, max_rows)
        lane, dropped = lanes.segments(targets.sizes_N, axes, send=limit.send, receive=limit.receive, pair=limit.pair)
        places = copies.lay_out(targets, lane.sending.first_N, lane.sending.size_N, limit.send)
        return places, lane, dropped

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
