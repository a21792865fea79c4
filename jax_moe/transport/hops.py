"""A dispatch by hops: each token goes once to each rank of a hop that holds any of its experts, and one row comes back.

Shape suffixes: t rows this rank routes, n rows a rank brings to a hop or has received by the last, r rows it has
received by this one, K experts per token, N ranks of a hop, W expert width, R rows of this rank's experts.

With one hop, tokens go straight to their experts' ranks. With two they cross to each node that holds any of their
experts, to the rank with the same place in it, and fan out there. "ragged", "padded" and "one_sided" differ only in a
hop's lane (see `lanes`).

Received rows lie by source rank, then in the source's order; after two hops that is by source in the node, then by the
token's home node, then by token. An expert's rows lie in this order, and a token's by slot. Each rank sums its experts'
rows of a token in float32, and a hop back sums what the ranks made of it in order of rank, in float32: the same bits
each time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jax_moe import plan as plans
from jax_moe._typing import Array, Float32, Int32
from jax_moe.plan import Plan
from jax_moe.transport import base, copies
from jax_moe.transport.copies import Copies, Targets


class Lane(Protocol):
    """See `lanes`."""

    def there(self, tree: Any) -> Any: ...

    def back(self, tree: Any) -> Any: ...


OpenLane = Callable[[Targets, tuple[str, ...]], tuple[Copies, Lane, Array]]
"""Copies' places, the lane, and the number of copies dropped, from targets and the axes of the hop."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Hop:
    """What a hop needs to move other arrays the same way, and to come back."""

    copies: Copies
    lane: Lane


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["hops", "plan", "weights_nK", "dropped"],
    meta_fields=["implementation"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class HopsHandle:
    """What combine needs to undo a dispatch.

    Attributes:
      hops: in the order of dispatch.
      plan: the rows of this rank's experts, over the n rows received.
      weights_nK: (n, K) float32 what each counts at combine.
      dropped: int32, copies dropped for want of room, of all hops.
      implementation: of the kernels.
    """

    hops: tuple[Hop, ...]
    plan: Plan
    weights_nK: Float32[Array, "n K"]
    dropped: Int32[Array, ""]
    implementation: str | None


def send(tree: Any, hop: Hop, implementation: str | None = None) -> Any:
    """Moves each array (n, ...) of a pytree by one hop: (received rows, ...), zeros in rows that hold nothing."""
    return hop.lane.there(copies.spread(tree, hop.copies, implementation))


def back(tree: Any, hop: Hop, implementation: str | None = None) -> Any:
    """Brings each array (received rows, W) float32 of a pytree home and sums it by token: (n, W) float32."""
    return copies.collect(hop.lane.back(tree), hop.copies, implementation)


def carry(tree: Any, handle: HopsHandle) -> Any:
    """Moves each array (t, ...) of a pytree as dispatch moved tokens: (n, ...)."""
    for hop in handle.hops:
        tree = send(tree, hop, handle.implementation)
    return tree


def open_hop(
    x_nW: Any,
    ids_nK: Int32[Array, "n K"],
    weights_nK: Float32[Array, "n K"],
    *,
    axes: tuple[str, ...],
    ranks: int,
    owner: Callable[[Array], Array],
    nobody: int,
    open_lane: OpenLane,
    implementation: str | None = None,
) -> tuple[Hop, Any, Int32[Array, "r K"], Float32[Array, "r K"], Int32[Array, ""]]:
    """Decides where rows go by one hop, and brings them and their routing there.

    Args:
      x_nW: (n, W) each of a pytree.
      ids_nK, weights_nK: (n, K) routing of each row.
      axes: mesh axes of the hop that have more than one rank.
      ranks: N.
      owner: rank of this hop, of any ids but `nobody`.
      nobody: the id that is no expert's.
      open_lane: of the transport.
      implementation: of the kernels.

    Returns:
      The hop; the rows received, (r, W), their ids (r, K) and weights (r, K), ids `nobody` where an expert is not
      beyond this rank or the row holds nothing; the number of copies dropped.
    """
    owner_nK = jnp.where(ids_nK == nobody, ranks, owner(ids_nK))
    places, lane, dropped = open_lane(copies.find_targets(owner_nK, ranks), axes)
    hop = Hop(copies=places, lane=lane)
    # Ids ride along with the weights, so that there is one small array to move; float32 holds them exactly to 2^24.
    # They count from one here, since rows that hold nothing are zeros.
    routing_n2K = jnp.concatenate([(ids_nK + 1).astype(jnp.float32), weights_nK], axis=1)
    routing_r2K, x_rW = send((routing_n2K, x_nW), hop, implementation)
    ids_rK, weights_rK = jnp.split(routing_r2K, 2, axis=1)
    ids_rK = ids_rK.astype(jnp.int32) - 1
    me = jax.lax.axis_index(axes) if axes else 0
    here_rK = (ids_rK >= 0) & (ids_rK != nobody) & (owner(ids_rK) == me)
    return hop, x_rW, jnp.where(here_rK, ids_rK, nobody), weights_rK, dropped


def dispatch(
    x_tW: Any,
    topk_ids_tK: Int32[Array, "t K"],
    topk_weights_tK: Float32[Array, "t K"],
    *,
    hops: tuple[tuple[str, ...], ...],
    open_lane: OpenLane,
    first_expert: Int32[Array, ""] | int,
    num_local_experts: int,
    weight_on_input: bool = False,
    implementation: str | None = None,
) -> tuple[Any, HopsHandle]:
    """`base.Transport.dispatch` by hops.

    Args:
      hops: mesh axes of each hop, those of more than one rank; flattened, in order, they number the ranks.
      open_lane: of the transport.
      x_tW and the rest: as in `base.Transport.dispatch`.
    """
    sizes = [math.prod(jax.lax.axis_size(axis) for axis in axes) for axes in hops]
    nobody = num_local_experts * math.prod(sizes)
    ids_nK, weights_nK = topk_ids_tK, topk_weights_tK
    opened, dropped, beyond = [], jnp.zeros((), jnp.int32), nobody
    for axes, ranks in zip(hops, sizes, strict=True):
        # Experts beyond one rank of this hop are a block of the experts beyond one rank of the hop before.
        within, beyond = beyond, beyond // ranks
        hop, x_tW, ids_nK, weights_nK, lost = open_hop(
            x_tW,
            ids_nK,
            weights_nK,
            axes=axes,
            ranks=ranks,
            owner=lambda ids, within=within, beyond=beyond: ids % within // beyond,
            nobody=nobody,
            open_lane=open_lane,
            implementation=implementation,
        )
        opened.append(hop)
        dropped += lost
    plan = plans.make_plan(
        ids_nK, first_expert=first_expert, num_local_experts=num_local_experts, implementation=implementation
    )
    rows_RW, handle = base.take_rows(
        x_tW, weights_nK, plan, axes=(), weight_on_input=weight_on_input, implementation=implementation
    )
    return rows_RW, HopsHandle(
        hops=tuple(opened),
        plan=plan,
        weights_nK=handle.weights_nK,
        dropped=dropped,
        implementation=implementation,
    )


def combine(y_RW: Any, handle: HopsHandle) -> Any:
    """`base.Transport.combine` by hops."""
    here = base.Handle(plan=handle.plan, weights_nK=handle.weights_nK, axes=(), implementation=handle.implementation)
    y_nW = base.sum_rows(y_RW, here)
    for hop in reversed(handle.hops):
        y_nW = back(y_nW, hop, handle.implementation)
    return y_nW
