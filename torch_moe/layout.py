"""Which rows of which rank are real tokens, and what number each has. Pure arithmetic on the host.

Words: a rank's *array rows* are the rows of the x it is given; its *real* rows are the first so many of them; its *own*
rows are those it routes, which under sequence parallelism is its chunk of the array. Tokens are numbered over real rows
only, in rank order, the *dense index*.

Worked example, dp=1, tp=2 with sequence parallelism, 5 array rows of which 4 are real:

    chunk = ceil(5 / 2) = 3;  rank 0 routes rows 0 1 2, all real;  rank 1 routes rows 3 4 and one row of padding, 1 real
    sizes (3, 1);  dense index on rank 0: 0 1 2, on rank 1: 3 -1 -1
"""

import dataclasses
from collections.abc import Sequence

import torch

from torch_moe._typing import Int32, Tensor
from torch_moe.config import ParallelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """This rank's place in the batch.

    Attributes:
        array_rows: t, rows of the array this rank was given and will return.
        own_rows: rows this rank routes, padding included: its chunk under sequence parallelism, else `array_rows`.
        own_real: the real ones among them, which come first.
        sizes: `own_real` of every rank that tokens are exchanged with, in rank order; without exchange, of this rank.
        most_rows: the largest `own_rows` of those ranks.
        offset: the dense index of this rank's first real row, None where no rank asked.
    """

    array_rows: int
    own_rows: int
    own_real: int
    sizes: tuple[int, ...]
    most_rows: int
    offset: int | None

    def dense_index(self, device: torch.device) -> Int32[Tensor, " own"]:
        """(own_rows,) int32, each own row's number among all real tokens, -1 for padding."""
        assert self.offset is not None, "the sizes of the other ranks were not exchanged"
        row = torch.arange(self.own_rows, device=device, dtype=torch.int32)
        return torch.where(row < self.own_real, row + self.offset, -1)


def chunk_rows(rows: int, tp: int) -> int:
    """Rows of one rank's chunk, padding included: ceil(rows / tp)."""
    return -(-rows // tp)


def real_in_chunk(real: int, chunk: int, index: int) -> int:
    """How many of the first `real` rows lie in chunk `index`."""
    return min(max(real - index * chunk, 0), chunk)


def check_counts(counts: Sequence[int], parallel: ParallelConfig) -> tuple[int, ...]:
    """The counts as a tuple of ints.

    Raises:
        ValueError: not one count per DP rank (native layout: per rank), or a negative one.
    """
    expected = parallel.world if parallel.token_layout == "dp_tp" else parallel.dp
    values = tuple(int(count) for count in counts)
    if len(values) != expected:
        per = "rank" if parallel.token_layout == "dp_tp" else "DP rank"
        raise ValueError(f"counts={values}: allowed is one per {per}, {expected} of them")
    if any(value < 0 for value in values):
        raise ValueError(f"counts={values}: allowed are counts of at least 0")
    return values


def own_count(
    counts: Sequence[int] | None, array_rows: int, parallel: ParallelConfig, dp_index: int, tp_index: int
) -> int:
    """Real rows of this rank's array.

    Raises:
        ValueError: the count reaches past the array.
    """
    if counts is None:
        return array_rows
    index = dp_index * parallel.tp + tp_index if parallel.token_layout == "dp_tp" else dp_index
    if counts[index] > array_rows:
        raise ValueError(
            f"counts[{index}]={counts[index]}: allowed is at most {array_rows}, the rows of x on this rank"
        )
    return counts[index]


def check_agreement(
    rows: Sequence[int], counts: Sequence[Sequence[int]], parallel: ParallelConfig, ranks: Sequence[int]
) -> None:
    """Raises `ValueError`, the same on every rank, unless ranks report sizes that fit together.

    Args:
        rows: array rows of each reporting rank.
        counts: the counts each of them was given.
        parallel: the mesh.
        ranks: which ranks report, as dp_index * tp + tp_index.
    """
    if len({tuple(given) for given in counts}) > 1:
        raise ValueError(f"counts differ between ranks {list(ranks)}: {[list(given) for given in counts]}")
    if parallel.token_layout == "dp_tp":
        return
    by_dp: dict[int, set[int]] = {}
    for rank, size in zip(ranks, rows, strict=True):
        by_dp.setdefault(rank // parallel.tp, set()).add(size)
    if any(len(sizes) > 1 for sizes in by_dp.values()):
        raise ValueError(
            f"rows of x differ between the tp={parallel.tp} ranks of one DP rank, which hold the same tokens: "
            f"{list(rows)} on ranks {list(ranks)}"
        )


def real_by_rank(rows: Sequence[int], counts: Sequence[int] | None, parallel: ParallelConfig) -> tuple[int, ...]:
    """Real own rows of every rank that routes tokens of its own, in rank order.

    Under sequence parallelism these are all ranks; otherwise tp ranks route the same tokens and there is one entry per
    DP rank.

    Args:
        rows: array rows of all ranks, as dp_index * tp + tp_index.
        counts: real rows per DP rank (native layout: per rank); None: every array row is real.
        parallel: the mesh.
    """
    if parallel.token_layout == "dp_tp":
        return tuple(rows if counts is None else counts)
    arrays = rows[:: parallel.tp]
    real = arrays if counts is None else counts
    if not parallel.sp:
        return tuple(real)
    chunks = [chunk_rows(array, parallel.tp) for array in arrays]
    return tuple(
        real_in_chunk(real[dp], chunks[dp], index) for dp in range(parallel.dp) for index in range(parallel.tp)
    )
