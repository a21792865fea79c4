"""What every transport is given, and what its functions look like.

A transport is a module with `dispatch`, `combine` and `carry`. `dispatch` returns this rank's rows, sorted by expert,
and a frozen handle; `combine` needs the handle and the results, nothing else; `carry` moves any other value per token
the same way. All transports agree with each other.

What travels is a mapping of tensors by name: the values alone, or with the scales of a format that quantizes before it
sends. A transport moves them and never looks inside.

Shapes: `n` this rank's real tokens, `t` the tokens its plan sees, `W` width, `K` slots, `R` rows on this rank.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch.distributed import ProcessGroup

from torch_moe import plan as plans
from torch_moe import rows as row_ops
from torch_moe._typing import Float, Int32, Tensor
from torch_moe.mesh import Axis
from torch_moe.plan import Plan
from torch_moe.transport.hop import Hop, Payload, back


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """The contiguous block of experts on this rank.

    Attributes:
        num_experts: E, over all ranks.
        first_expert: the first of this rank's.
        local_experts: e, how many this rank holds.
    """

    num_experts: int
    first_expert: int
    local_experts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """Whom tokens are exchanged with.

    Attributes:
        group: the ranks, or None for this one alone.
        sizes: real tokens of each of them, in rank order.
        rows: the most rows any of them has, padding included. Only `padded` reads it.
        levels: the same ranks in one level or, across nodes, two: from the outermost. `ragged` and `padded` read it.
        capacity_factor: see `bounds.slots`.
        max_rows: token copies a rank accepts, None for all.
    """

    group: ProcessGroup | None
    sizes: tuple[int, ...]
    rows: int = 0
    levels: tuple[Axis, ...] = ()
    capacity_factor: float | None = None
    max_rows: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Handle:
    """What `combine` needs to know of `dispatch`.

    Attributes:
        plan: over the tokens that reached this rank, with the bound on rows that holds for any ids.
        num_rows: length of the row arrays: the sum of the plan's group sizes, or the bound where `to_bound`.
        to_bound: row arrays reach up to the bound, and the host does not know how many of the rows are in use.
        weights: (t, K) float32, each slot's factor in the sum: the router's weight, or one where it went to the input.
        input_weights: (R,) float32, each row's factor on the experts' input, or None.
        exchange: whom results go back to.
        hops: how copies travelled, from the first hop on; empty for transports that do not copy token by token.
        dropped: () int32, copies this rank dropped.
    """

    plan: Plan
    num_rows: int
    to_bound: bool
    weights: Tensor
    input_weights: Tensor | None
    exchange: Exchange
    hops: tuple[Hop, ...]
    dropped: Int32[Tensor, ""]

    @property
    def rows_in_use(self) -> int | None:
        """The sum of the plan's group sizes, None where the host does not know it."""
        return None if self.to_bound else self.num_rows


class Transport(Protocol):
    """The functions of a transport module."""

    def dispatch(
        self,
        payload: Payload,
        topk_ids_nK: Tensor,
        topk_weights_nK: Tensor,
        *,
        placement: Placement,
        exchange: Exchange,
        weight_on_input: bool = False,
    ) -> tuple[dict[str, Tensor], Handle]:
        """The payload's rows (R, ...) for this rank's experts, sorted by expert, and the handle."""
        ...

    def combine(self, y_RW: Tensor, handle: Handle) -> Tensor:
        """This rank's tokens (n, W) float32, summed over their experts on every rank of the exchange."""
        ...

    def carry(self, values_n: Tensor, handle: Handle) -> Tensor:
        """One value per token, (n, ...), moved as the tokens were: (t, ...), as the handle's plan counts them."""
        ...


def levels(placement: Placement, exchange: Exchange) -> list[tuple[Axis, int]]:
    """Each level of ranks, from the outermost, and the experts that one of its ranks stands for."""
    inner = [math.prod(axis.ranks for axis in exchange.levels[depth + 1 :]) for depth in range(len(exchange.levels))]
    return [(axis, placement.local_experts * ranks) for axis, ranks in zip(exchange.levels, inner, strict=True)]


def rows_in_use(plan: Plan, expected: int | None) -> int:
    """The number of rows the plan fills.

    Args:
        plan: the plan.
        expected: the number where the host can tell it from the sizes, which spares CUDA a round trip.

    Raises:
        ValueError: more rows than the bound, which takes a token that names an expert twice.
    """
    if expected is not None and plan.group_sizes.is_cuda:
        return expected
    used = int(plan.group_sizes.sum())
    bound = plan.row_token.shape[0]
    if used > bound:
        raise ValueError(f"topk_ids ask for {used} rows: allowed are {bound}, with no expert twice for a token")
    return used


def make_rows(
    payload: Payload,
    topk_ids_tK: Tensor,
    topk_weights_tK: Tensor,
    *,
    placement: Placement,
    exchange: Exchange,
    weight_on_input: bool,
    expected_rows: int | None,
    to_bound: bool = False,
    hops: Sequence[Hop] = (),
) -> tuple[dict[str, Tensor], Handle]:
    """Plans the tokens that reached this rank and gathers one row per token-expert pair that stays here."""
    plan = plans.make_plan(topk_ids_tK, **dataclasses.asdict(placement))
    # The bound is for shapes that must not depend on data. Where they may, the rows in use can be far fewer.
    num_rows = plan.row_token.shape[0] if to_bound else rows_in_use(plan, expected_rows)
    used = plan.trimmed(num_rows)
    rows = {name: _gather(values, used) for name, values in payload.items()}
    weights_tK, weights_R = topk_weights_tK, None
    if weight_on_input:
        weights_R = row_ops.gather_weights(topk_weights_tK, used.row_token, used.row_slot, used.position)
        weights_tK = torch.ones_like(topk_weights_tK)
    none = torch.zeros((), dtype=torch.int32, device=topk_ids_tK.device)
    return rows, Handle(
        plan=plan,
        num_rows=num_rows,
        to_bound=to_bound,
        weights=weights_tK,
        input_weights=weights_R,
        exchange=exchange,
        hops=tuple(hops),
        dropped=sum((hop.dropped for hop in hops), start=none),
    )


def _gather(values_t: Tensor, plan: Plan) -> Tensor:
    if values_t.dtype.itemsize == 1 and values_t.is_floating_point():
        return _gather(values_t.view(torch.uint8), plan).view(values_t.dtype)
    return row_ops.gather_rows(values_t, plan.row_token, plan.position)


def weigh(rows_RW: Float[Tensor, "R W"], handle: Handle) -> Float[Tensor, "R W"]:
    """The experts' input: the rows, times their weights in float32 and rounded once where these belong to the input."""
    if handle.input_weights is None:
        return rows_RW
    return (rows_RW.float() * handle.input_weights[:, None]).to(rows_RW.dtype)


def sum_rows(y_RW: Tensor, handle: Handle) -> Tensor:
    """(t, W) float32: every token that reached this rank, summed over its experts here."""
    used = handle.plan.trimmed(handle.num_rows)
    return row_ops.combine_rows(y_RW, handle.weights, used.row_token, used.row_slot, used.position)


def return_sums(y_tW: Tensor, handle: Handle) -> Tensor:
    """(n, W) float32: the hops backwards, from the sums on this rank to its own tokens."""
    for hop in reversed(handle.hops):
        y_tW = back(y_tW, hop)
    return y_tW
