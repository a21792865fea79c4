"""Collectives over uneven and empty ranks, exactly, and their gradients."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from torch_moe import collectives

SIZES = [(2, 2, 2, 2), (5, 0, 1, 3), (0, 0, 0, 4), (0, 0, 0, 0)]


def values_of(rank, rows, width=3):
    return (100.0 * rank + torch.arange(float(rows * width))).view(rows, width)


def gather(rank, sizes, dtype):
    x = values_of(rank, sizes[rank]).to(dtype)
    out = collectives.all_gather_rows(x, sizes, dist.group.WORLD)
    expected = torch.cat([values_of(other, size) for other, size in enumerate(sizes)]).to(dtype)
    assert out.dtype == dtype
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gathered_rows_are_every_ranks_in_order(pool, sizes, dtype):
    pool.run(gather, sizes, dtype)


def gather_gradient(rank, sizes):
    x = values_of(rank, sizes[rank]).requires_grad_()
    out = collectives.all_gather_rows(x, sizes, dist.group.WORLD)
    out.backward(values_of(rank, sum(sizes)))
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    assert torch.equal(x.grad, sum(values_of(other, sum(sizes))[own] for other in range(4)))


def reduce_scatter(rank, sizes):
    x = values_of(rank, sum(sizes)).requires_grad_()
    out = collectives.reduce_scatter_rows(x, sizes, dist.group.WORLD)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    assert torch.equal(out, sum(values_of(other, sum(sizes))[own] for other in range(4)))
    out.backward(values_of(rank, sizes[rank]))
    assert torch.equal(x.grad, torch.cat([values_of(other, size) for other, size in enumerate(sizes)]))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_reduce_scatter_and_gather_are_each_others_gradients(pool, sizes):
    pool.run(gather_gradient, sizes)
    pool.run(reduce_scatter, sizes)


def sum_in_rank_order(rank):
    x = torch.tensor([[1e8], [1.0], [-1e8], [1.0]])[rank].expand(4, 1).contiguous()
    return collectives.reduce_scatter_rows(x, (1, 1, 1, 1), dist.group.WORLD).item()


def test_a_reduce_scatter_adds_up_in_rank_order(pool):
    total = np.float32(0)
    for value in (1e8, 1.0, -1e8, 1.0):
        total = np.float32(total + np.float32(value))
    assert pool.run(sum_in_rank_order) == [total] * 4


def reduce_and_enter(rank):
    x = torch.full((2, 2), float(rank + 1), requires_grad=True)
    total = collectives.all_reduce(x, dist.group.WORLD)
    assert torch.equal(total, torch.full((2, 2), 10.0))
    assert torch.equal(x, torch.full((2, 2), float(rank + 1))), "the input changed"
    total.backward(torch.full((2, 2), 3.0))
    assert torch.equal(x.grad, torch.full((2, 2), 3.0))

    x = torch.ones(2, 2, requires_grad=True)
    collectives.replicated(x, dist.group.WORLD).backward(torch.full((2, 2), float(rank)))
    assert torch.equal(x.grad, torch.full((2, 2), 6.0))

    x = torch.ones(2, requires_grad=True)
    once = collectives.on_first(x, rank == 0)
    assert once.tolist() == ([1, 1] if rank == 0 else [0, 0])
    once.backward(torch.tensor([2.0, 3.0]))
    assert x.grad.tolist() == [2, 3]


def test_a_sum_and_a_value_used_by_all_are_each_others_gradients(pool):
    pool.run(reduce_and_enter)


def scatter_and_gather(rank, rows):
    x = values_of(0, rows).requires_grad_()
    chunk = -(-rows // 4)
    own = collectives.scatter_rows(x, chunk, 4, rank, dist.group.WORLD)
    real = max(min(rows - rank * chunk, chunk), 0)
    assert torch.equal(own[:real], x[rank * chunk : rank * chunk + real])
    assert torch.equal(own[real:], torch.zeros(chunk - real, 3))
    back = collectives.gather_rows(own, rows, 4, rank, dist.group.WORLD)
    assert torch.equal(back, x)
    back.backward(values_of(0, rows))
    assert torch.equal(x.grad, values_of(0, rows))


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 9])
def test_a_scattered_sequence_comes_back_whole_and_so_does_its_gradient(pool, rows):
    pool.run(scatter_and_gather, rows)


def share(rank):
    return collectives.share_integers([rank, 10 * rank], dist.group.WORLD, torch.device("cpu"))


def test_integers_are_shared_in_rank_order(pool):
    assert pool.run(share) == [[[0, 0], [1, 10], [2, 20], [3, 30]]] * 4


def claim_a_wrong_size(rank):
    with pytest.raises(AssertionError, match=rf"3 rows on rank {rank}, expected 2 of sizes \(2, 2, 2, 2\)"):
        collectives.all_gather_rows(torch.zeros(3, 1), (2, 2, 2, 2), dist.group.WORLD)


def test_rows_that_do_not_match_the_sizes_are_told_with_the_sizes(pool):
    pool.run(claim_a_wrong_size)


def test_one_rank_alone_sends_nothing():
    x = torch.randn(3, 2)
    assert collectives.all_gather_rows(x, (3,), None) is x
    assert collectives.reduce_scatter_rows(x, (3,), None) is x
    assert collectives.all_reduce(x, None) is x
    assert collectives.replicated(x, None) is x
    assert collectives.share_integers([4, 5], None, x.device) == [[4, 5]]
