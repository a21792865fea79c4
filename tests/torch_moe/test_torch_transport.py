"""Transports move rows exactly, and all agree with each other."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from torch_moe import transport
from torch_moe.transport.base import Exchange, Placement, weigh

SIZES = (3, 0, 4, 2)
EXPERTS, TOP_K, WIDTH = 8, 3, 5


def batch():
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(sum(SIZES), WIDTH, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(sum(SIZES))]).int()
    return x, ids, torch.rand(sum(SIZES), TOP_K, generator=generator)


def local(weight_on_input=False):
    x, ids, weights = batch()
    rows, handle = transport.local.dispatch(
        {"values": x},
        ids,
        weights,
        placement=Placement(num_experts=EXPERTS, first_expert=0, local_experts=EXPERTS),
        exchange=Exchange(group=None, sizes=(len(x),)),
        weight_on_input=weight_on_input,
    )
    return weigh(rows["values"], handle), handle


def allgather_on_rank(rank, weight_on_input):
    own = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    x, ids, weights = (value[own] for value in batch())
    rows, handle = transport.allgather.dispatch(
        {"values": x},
        ids,
        weights,
        placement=Placement(num_experts=EXPERTS, first_expert=2 * rank, local_experts=2),
        exchange=Exchange(group=dist.group.WORLD, sizes=SIZES),
        weight_on_input=weight_on_input,
    )
    rows = weigh(rows["values"], handle)
    expert = torch.repeat_interleave(2 * rank + torch.arange(2), handle.plan.group_sizes)
    combined = transport.allgather.combine(rows * (expert[:, None] + 1), handle)
    return rows.numpy(), handle.plan.group_sizes.numpy(), combined.numpy()


@pytest.mark.parametrize("weight_on_input", [False, True])
def test_allgather_hands_each_rank_its_block_of_the_local_rows_and_sums_the_same(pool, weight_on_input):
    rows, handle = local(weight_on_input)
    expert = torch.repeat_interleave(torch.arange(EXPERTS), handle.plan.group_sizes)
    combined = transport.local.combine(rows * (expert[:, None] + 1), handle)
    results = pool.run(allgather_on_rank, weight_on_input)
    np.testing.assert_array_equal(np.concatenate([found for found, _, _ in results]), rows)
    np.testing.assert_array_equal(np.concatenate([sizes for _, sizes, _ in results]), handle.plan.group_sizes)
    np.testing.assert_allclose(np.concatenate([y for _, _, y in results]), combined, rtol=1e-6)


def test_combine_undoes_dispatch_by_the_sum_of_weights():
    x, _, weights = batch()
    rows, handle = local()
    torch.testing.assert_close(transport.local.combine(rows, handle), x * weights.sum(-1, keepdim=True))


def test_a_weight_on_the_input_is_applied_there_and_nowhere_else():
    x, _, weights = batch()
    rows, handle = local(weight_on_input=True)
    assert torch.equal(rows, x[handle.plan.row_token] * weights[handle.plan.row_token, handle.plan.row_slot, None])
    torch.testing.assert_close(transport.local.combine(rows, handle), x * weights.sum(-1, keepdim=True))
    assert not transport.local.combine(torch.ones_like(rows), handle).sub(TOP_K).any()


def test_a_sentinel_in_the_ids_is_routed_nowhere():
    x, ids, weights = batch()
    ids[4] = EXPERTS
    placement = Placement(num_experts=EXPERTS, first_expert=0, local_experts=EXPERTS)
    x[4] = float("nan")
    weights[4] = float("nan")
    rows, handle = transport.local.dispatch(
        {"values": x}, ids, weights, placement=placement, exchange=Exchange(group=None, sizes=(len(x),))
    )
    rows = rows["values"]
    assert handle.num_rows == (len(x) - 1) * TOP_K == len(rows)
    y = transport.local.combine(rows, handle)
    assert not y[4].any()
    assert y.isfinite().all()


def test_more_rows_than_the_bound_are_an_error():
    with pytest.raises(ValueError, match="topk_ids ask for 2 rows: allowed are 1, with no expert twice for a token"):
        transport.allgather.dispatch(
            {"values": torch.zeros(1, 4)},
            torch.tensor([[3, 3]]),
            torch.ones(1, 2),
            placement=Placement(num_experts=4, first_expert=3, local_experts=1),
            exchange=Exchange(group=None, sizes=(1,)),
        )


def test_a_handle_is_frozen():
    _, handle = local()
    with pytest.raises(AttributeError):
        handle.num_rows = 3
