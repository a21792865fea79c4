"""Collectives over rows, with their gradients. A group of None stands for a single rank: nothing is sent.

Shapes: `n` rows on this rank, `T` rows of all ranks together, `W` width, `N` ranks of the group.

Sizes differ between ranks and may be zero. Every rank is given all sizes and so derives the same shapes; the only calls
left out are those that every rank leaves out, because no rank has a row.

The gradients follow one convention. The loss is a sum over tokens. Ranks that hold the same tokens hold the same loss,
and count it once; so the gradient of a sum over ranks is the identity, and the gradient of a value that every rank of a
group uses for its own part of the work is the sum of the parts.
"""

# The decorator that forbids a second derivative hides the signature of `backward`.
# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from torch_moe._typing import Tensor

# torch 2.13 renamed it; the old name warns there and is the only one before.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def share_integers(values: Sequence[int], group: ProcessGroup | None, device: torch.device) -> list[list[int]]:
    """Every rank's `values`, in rank order. All ranks must give equally many."""
    if group is None:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.int64, device=device)
    everyone = torch.empty(dist.get_world_size(group) * len(values), dtype=torch.int64, device=device)
    _all_gather_single(everyone, mine, group=group)
    return everyone.view(-1, len(values)).tolist()


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """x with zero rows appended up to `rows` of them; x itself where it has that many."""
    missing = rows - x.shape[0]
    return x if missing == 0 else F.pad(x, [0, 0] * (x.dim() - 1) + [0, missing])


def _check_sizes(x: Tensor, rows: int, sizes: Sequence[int], group: ProcessGroup) -> None:
    ranks = dist.get_world_size(group)
    assert len(sizes) == ranks, f"sizes {tuple(sizes)} for {ranks} ranks"
    assert x.shape[0] == rows, (
        f"{x.shape[0]} rows on rank {dist.get_rank(group)}, expected {rows} of sizes {tuple(sizes)}"
    )


def _all_gather(x: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    _check_sizes(x, sizes[dist.get_rank(group)], sizes, group)
    most = max(sizes)
    if most == 0:
        return torch.empty_like(x)
    gathered = x.new_empty(len(sizes) * most, *x.shape[1:])
    _all_gather_single(gathered, pad_rows(x, most).contiguous(), group=group)
    if min(sizes) == most:
        return gathered
    return torch.cat([part[:size] for part, size in zip(gathered.split(most), sizes, strict=True)])


def _reduce_scatter(x: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    # gloo has no reduce-scatter of uneven sizes. Sending each rank its rows and adding them up in rank order moves the
    # same bytes, pads nothing, and fixes the order of the sum.
    _check_sizes(x, sum(sizes), sizes, group)
    if max(sizes) == 0:
        return torch.empty_like(x)
    own = sizes[dist.get_rank(group)]
    received = x.new_empty(len(sizes) * own, *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), [own] * len(sizes), list(sizes), group=group)
    parts = received.view(len(sizes), own, *x.shape[1:])
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def sum_ranks(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over the group, on every rank of it. No gradient."""
    if group is None:
        return x
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _all_to_all(x: Tensor, send: Sequence[int] | None, receive: Sequence[int] | None, group: ProcessGroup) -> Tensor:
    if send is None or receive is None:
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.shape[0]:  # Equal parts have one size on all ranks, so all leave the call out or none.
            dist.all_to_all_single(received, x.contiguous(), group=group)
        return received
    _check_sizes(x, sum(send), send, group)
    received = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), list(receive), list(send), group=group)
    return received


def exchange_integers(values_N: Tensor, group: ProcessGroup | None) -> Tensor:
    """Entry i of `values_N` goes to rank i: (N,) to what each rank had for this one (N,). No gradient."""
    return values_N if group is None else _all_to_all(values_N, None, None, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, send, receive, group):
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(x, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _all_to_all(grad, ctx.receive, ctx.send, ctx.group), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes, group):
        ctx.sizes, ctx.group = sizes, group
        return _all_gather(x, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _reduce_scatter(grad.float(), ctx.sizes, ctx.group).to(grad.dtype), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes, group):
        ctx.sizes, ctx.group = sizes, group
        return _reduce_scatter(x, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _all_gather(grad, ctx.sizes, ctx.group), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return sum_ranks(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, None


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return sum_ranks(grad.float(), ctx.group).to(grad.dtype), None


class _OnFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, first):
        return x.view_as(x) if first else torch.zeros_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, chunk, ranks, rank, group):
        ctx.rows, ctx.chunk, ctx.ranks, ctx.group = x.shape[0], chunk, ranks, group
        # A copy, also where nothing is padded: what a Function returns must not be a view of its input.
        return pad_rows(x[rank * chunk : (rank + 1) * chunk].clone(), chunk)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _all_gather(grad, [ctx.chunk] * ctx.ranks, ctx.group)[: ctx.rows], None, None, None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, ranks, rank, group):
        ctx.chunk, ctx.rank = x.shape[0], rank
        return _all_gather(x, [ctx.chunk] * ranks, group)[:rows]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        own = grad[ctx.rank * ctx.chunk : (ctx.rank + 1) * ctx.chunk]
        return pad_rows(own, ctx.chunk), None, None, None, None


def all_gather_rows(x: Tensor, sizes: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """Every rank's rows, in rank order: (n, ...) to (T, ...). Gradient: summed in float32, each row to its owner.

    Args:
        x: this rank's rows, as many as its entry of `sizes`.
        sizes: rows of every rank.
        group: the ranks, or None for one.
    """
    return x if group is None else _AllGather.apply(x, tuple(sizes), group)


def reduce_scatter_rows(x: Tensor, sizes: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """Adds up every rank's (T, ...) in rank order and keeps this rank's rows (n, ...). Gradient: all-gather."""
    return x if group is None else _ReduceScatter.apply(x, tuple(sizes), group)


def all_to_all_rows(
    x: Tensor, send: Sequence[int] | None, receive: Sequence[int] | None, group: ProcessGroup | None
) -> Tensor:
    """Each rank's part of the rows goes to it. Gradient: the reverse exchange.

    Args:
        x: (M, ...) rows by destination rank.
        send: how many go to each rank; None: equally many to each, on all ranks.
        receive: how many come from each rank; None with `send`.
        group: the ranks, or None for one.

    Returns:
        (M', ...) rows by source rank.
    """
    if group is None:
        return x
    return _AllToAll.apply(x, send, receive, group)


def all_reduce(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over the group, on every rank of it. Gradient: the identity."""
    return x if group is None else _AllReduce.apply(x, group)


def replicated(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """x itself, equal on every rank of a group whose ranks do different parts with it. Gradient: the parts' sum."""
    return x if group is None else _Replicated.apply(x, group)


def on_first(x: Tensor, first: bool) -> Tensor:
    """x on the first rank and zeros on the others, for what a sum over ranks must hold once. Gradient: the identity."""
    return _OnFirst.apply(x, first)


def scatter_rows(x: Tensor, chunk: int, ranks: int, rank: int, group: ProcessGroup) -> Tensor:
    """Rows [rank * chunk, (rank + 1) * chunk) of x, which all ranks hold, padded with zeros. Gradient: all-gather."""
    return _ScatterRows.apply(x, chunk, ranks, rank, group)


def gather_rows(x: Tensor, rows: int, ranks: int, rank: int, group: ProcessGroup) -> Tensor:
    """Equal chunks of all ranks, in rank order, trimmed to `rows`. Gradient: this rank's rows."""
    return _GatherRows.apply(x, rows, ranks, rank, group)
