"""Laying out what the ranks gave of a stage so that it can be compared: rows by token and slot, columns whole.

n rows of a block, R rows of a rank's experts, t' tokens that a rank routes, C columns, F intermediate size
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parity.arrays import bits_of_float32, float32_of_bits
from parity.case import Case
from parity.verdict.layout import holdings

BY_ROW = ("dispatch", "gate_up", "activation", "down")
SUMMED = ("combine", "shared")
"""Stages by token whose ranks hold partial sums where tp ranks share their tokens."""
BFLOAT16_REST = 0xFFFF
"""The bits of a float32 that a bfloat16 has not."""


class Misshapen(ValueError):
    """A rank's result of a stage cannot be laid out; the message says why."""


@dataclass(frozen=True)
class Block:
    """Rows of a stage's result."""

    got: np.ndarray
    """(n, C)."""
    token: np.ndarray
    """(n,) dense index."""
    slot: np.ndarray | None
    """(n,) for stages by row."""
    rank: int
    """The rank it comes from; the first of them where several hold parts."""


@dataclass(frozen=True)
class Places:
    """Which tokens and rows a rank's arrays are about; the rows may be those of a taught choice."""

    token: np.ndarray
    """(t',) dense index, -1 for padding."""
    row_token: np.ndarray | None
    """(R,), -1 past the last row; None when the framework does not show it."""
    row_slot: np.ndarray | None


def shares_tokens(case: Case) -> bool:
    """Whether the tp ranks of a DP rank hold the same tokens."""
    return case.tp > 1 and not case.sequence_parallel


def splits_width(case: Case) -> bool:
    """Whether tp ranks hold parts of F."""
    return case.tp > 1 and not case.ep


def on_grid(values: np.ndarray) -> bool:
    """Whether every value is a bfloat16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return not (bits & BFLOAT16_REST).any()


def added_on_grid(values: np.ndarray, bias: np.ndarray) -> bool:
    """Whether every value is a bfloat16 with a bias added to it in float32."""
    product = float32_of_bits(bits_of_float32(values.astype(np.float64) - bias))
    return bool(np.array_equal(product + bias.astype(np.float32), values.astype(np.float32)))


BiasOf = Callable[[np.ndarray, np.ndarray], np.ndarray]


def blocks(
    case: Case,
    stage: str,
    found: Sequence[Mapping[str, np.ndarray]],
    places: Sequence[Places],
    columns: int,
    bias_of: BiasOf | None = None,
) -> tuple[list[Block], bool]:
    """Every rank's rows of a stage, sums and slices over tp put together.

    Args:
      case: the mesh.
      stage: one of `parity.stages`, but for the choice.
      found: each rank's arrays by stage; "y" for the last.
      places: what they are about.
      columns: C, of the whole result.
      bias_of: (n, C) the biases in rows of these tokens and slots, for a stage that adds some.

    Returns:
      The blocks, and whether each rank's own values were all bfloat16 before ranks' parts were added up; with biases,
      whether they were before those were added, or after.

    Raises:
      Misshapen: a rank's array is missing or has another shape than its rows and the stage ask for.
    """
    if stage == "reduce":
        return _output(case, found, columns)
    together = (stage in SUMMED and shares_tokens(case)) or (stage in BY_ROW[1:] and splits_width(case))
    sliced = together and stage in ("gate_up", "activation")
    parts = [_rows(rank, stage, found[rank], places[rank], columns // case.tp if sliced else columns)
             for rank in range(case.world)]  # fmt: skip

    def rounded(block: Block) -> bool:
        if on_grid(block.got):
            return True
        if bias_of is None or block.slot is None:
            return False
        return added_on_grid(block.got, bias_of(block.token, block.slot))

    if not together:
        return parts, all(map(rounded, parts))
    grid = True if sliced else all(map(rounded, parts))
    out = []
    for first in range(0, case.world, case.tp):
        group = parts[first : first + case.tp]
        for part in group[1:]:
            if not _same(part.token, group[0].token) or not _same(part.slot, group[0].slot):
                raise Misshapen(f"rank {part.rank}: {stage} has other rows than its tp peer, rank {first}")
        values = [part.got.astype(np.float64) for part in group]
        got = _joined(case, stage, values) if sliced else np.sum(values, axis=0)
        out.append(Block(got, group[0].token, group[0].slot, first))
    return out, all(map(rounded, out)) if sliced else grid


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


def _rows(rank: int, stage: str, found: Mapping[str, np.ndarray], places: Places, columns: int) -> Block:
    """One rank's real rows."""
    values = found.get(stage)
    if values is None:
        raise Misshapen(f"rank {rank} shows no {stage}")
    token = places.row_token if stage in BY_ROW else places.token
    if token is None:
        raise Misshapen(f"rank {rank} does not show which rows its {stage} has")
    if values.shape != (len(token), columns):
        raise Misshapen(f"rank {rank}: {stage} has shape {values.shape}, expected {(len(token), columns)}")
    slot = places.row_slot if stage in BY_ROW else None
    real = token >= 0
    return Block(values[real], token[real], None if slot is None else slot[real], rank)


def _joined(case: Case, stage: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Slices of F put side by side. Each has a part of gate and a part of up, in the checkpoint's layout."""
    if stage == "activation" or not case.gated or case.flags.interleaved:
        return np.concatenate(parts, axis=1)
    half = parts[0].shape[1] // 2
    return np.concatenate([*(part[:, :half] for part in parts), *(part[:, half:] for part in parts)], axis=1)


def _output(case: Case, found: Sequence[Mapping[str, np.ndarray]], columns: int) -> tuple[list[Block], bool]:
    """The tokens of y, of every rank: copies that should be equal are not assumed to be."""
    out = []
    for rank, (first, count) in enumerate(holdings(case)):
        y = found[rank].get("y")
        if y is None:
            raise Misshapen(f"rank {rank} shows no y")
        if y.ndim != 2 or y.shape[1] != columns or len(y) < count:
            raise Misshapen(f"rank {rank}: y has shape {y.shape}, expected ({count} or more, {columns})")
        out.append(Block(y[:count], np.arange(first, first + count), None, rank))
    return out, all(on_grid(block.got) for block in out)


def places(found: Sequence[Mapping[str, np.ndarray]], otherwise: Sequence[Places]) -> Iterator[Places]:
    """What taught results are about: the rows that they say, else those of the free run."""
    for own, free in zip(found, otherwise, strict=True):
        if "row_token" in own and "row_slot" in own:
            yield Places(free.token, own["row_token"], own["row_slot"])
        else:
            yield free
