"""What every transport is given, and what its two functions look like.

A transport is a module with `dispatch` and `combine`. `dispatch` returns this rank's rows, sorted by expert, and a
frozen handle; `combine` needs the handle and the results, nothing else. All transports agree with each other.

Shapes: `n` this rank's real tokens, `t` the tokens its plan sees, `W` width, `K` slots, `R` rows on this rank.
"""

import dataclasses
from typing import Protocol

import torch
from torch.distributed import ProcessGroup

from torch_moe import plan as plans
from torch_moe import rows as row_ops
from torch_moe._typing import Tensor
from torch_moe.plan import Plan


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
    """

    group: ProcessGroup | None
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Handle:
    """What `combine` needs to know of `dispatch`.

    Attributes:
        plan: over the tokens that reached this rank, with the bound on rows that holds for any ids.
        num_rows: rows in use, the sum of the plan's group sizes.
        weights: (t, K) float32, each slot's factor in the sum: the router's weight, or one where it went to the input.
        exchange: whom results go back to.
    """

    plan: Plan
    num_rows: int
    weights: Tensor
    exchange: Exchange


class Transport(Protocol):
    """The two functions of a transport module."""

    def dispatch(
        self,
        x_nW: Tensor,
        topk_ids_nK: Tensor,
        topk_weights_nK: Tensor,
        *,
        placement: Placement,
        exchange: Exchange,
        weight_on_input: bool = False,
    ) -> tuple[Tensor, Handle]:
        """Rows (R, W) in the dtype of x for this rank's experts, sorted by expert, and the handle."""
        ...

    def combine(self, y_RW: Tensor, handle: Handle) -> Tensor:
        """This rank's tokens (n, W) float32, summed over their experts on every rank of the exchange."""
        ...


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
    x_tW: Tensor,
    topk_ids_tK: Tensor,
    topk_weights_tK: Tensor,
    *,
    placement: Placement,
    exchange: Exchange,
    weight_on_input: bool,
    expected_rows: int | None,
) -> tuple[Tensor, Handle]:
    """Plans the tokens that reached this rank and gathers one row per token-expert pair that stays here."""
    plan = plans.make_plan(topk_ids_tK, **dataclasses.asdict(placement))
    num_rows = rows_in_use(plan, expected_rows)
    # The bound is for shapes that must not depend on data. Here they may, and the rows in use can be far fewer.
    used = plan.trimmed(num_rows)
    rows_RW = row_ops.gather_rows(x_tW, used.row_token, used.position)
    weights_tK = topk_weights_tK
    if weight_on_input:
        weight_R = row_ops.gather_weights(topk_weights_tK, used.row_token, used.row_slot, used.position)
        rows_RW = (rows_RW.float() * weight_R[:, None]).to(x_tW.dtype)
        weights_tK = torch.ones_like(topk_weights_tK)
    return rows_RW, Handle(plan=plan, num_rows=num_rows, weights=weights_tK, exchange=exchange)


def sum_rows(y_RW: Tensor, handle: Handle) -> Tensor:
    """(t, W) float32: every token that reached this rank, summed over its experts here."""
    used = handle.plan.trimmed(handle.num_rows)
    return row_ops.combine_rows(y_RW, handle.weights, used.row_token, used.row_slot, used.position)
