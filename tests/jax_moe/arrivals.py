"""What must arrive where, copy by copy in plain Python, and what must come of it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class Copy:
    """A token on some rank: its number over all ranks, and the slots whose experts lie beyond that rank."""

    token: int
    slots: list[int]


@dataclasses.dataclass
class Arrivals:
    """By rank: the copies in order, and how many were dropped; and how many copies crossed to another rank, by hop."""

    copies: list[list[Copy | None]]
    dropped: list[int]
    crossed: list[int]


def arrive(
    ids: np.ndarray,
    local: int,
    hops: tuple[int, ...],
    transport: str,
    *,
    capacity: float | None = None,
    max_rows: int | None = None,
) -> Arrivals:
    """Sends every token on its way.

    Args:
      ids: (ranks, rows, K); an id past the last expert is none.
      local: experts on each rank.
      hops: ranks of each hop; ranks are numbered by them, row-major.
      transport: "ragged" or "padded".
      capacity, max_rows: limits, or None.
    """
    ranks, rows, top_k = ids.shape
    assert ranks == math.prod(hops)
    held: list[list[Copy | None]] = [
        [Copy(r * rows + i, [k for k in range(top_k) if ids[r, i, k] < local * ranks]) for i in range(rows)]
        for r in range(ranks)
    ]
    flat = ids.reshape(-1, top_k)
    dropped, crossed, stride = [0] * ranks, [], ranks
    for size in hops:
        stride //= size
        slots = rows if capacity is None else min(rows, max(1, math.ceil(capacity * rows * top_k / size)))
        came: list[list[Copy | None]] = [[] for _ in range(ranks)]
        moved = 0
        for to in range(ranks):
            for place in range(size):
                source = to + (place - to // stride % size) * stride
                segment: list[Copy | None] = []
                for copy in held[source]:
                    if copy is None:
                        continue
                    wanted = [
                        k for k in copy.slots if flat[copy.token, k] // (local * stride) % size == to // stride % size
                    ]
                    if wanted:
                        segment.append(Copy(copy.token, wanted))
                if transport == "padded":
                    dropped[source] += max(0, len(segment) - slots)
                    segment = segment[:slots]
                    segment += [None] * (slots - len(segment))
                elif max_rows is not None:
                    room = max_rows - len(came[to])
                    dropped[to] += max(0, len(segment) - room)
                    segment = segment[:room]
                moved += sum(copy is not None for copy in segment) * (source != to)
                came[to] += segment
        held, rows = came, size * slots if transport == "padded" else size * rows
        if max_rows is not None:
            rows = min(rows, max_rows)
        crossed.append(moved)

    return Arrivals(held, dropped, crossed)


def sums(
    ids: np.ndarray, weights: np.ndarray, y: np.ndarray, local: int, hops: tuple[int, ...], came: Arrivals
) -> np.ndarray:
    """(ranks * rows, W) float32, each addition in the order that was promised: slots, then ranks, innermost hop first.

    Args:
      ids, weights: (tokens, K).
      y: (tokens, K, W) what each token's experts made of it.
    """
    reached = {(rank, c.token): c.slots for rank, copies in enumerate(came.copies) for c in copies if c is not None}

    def total(token: int, first: int, count: int, left: tuple[int, ...]) -> np.ndarray:
        out = np.zeros(y.shape[-1], np.float32)
        if not left:
            for k in reached.get((first, token), []):
                out = out + weights[token, k] * y[token, k]
            return out
        step = count // left[0]
        for place in range(left[0]):
            out = out + total(token, first + place * step, step, left[1:])
        return out

    ranks = math.prod(hops)
    return np.stack([total(token, 0, ranks, hops) for token in range(len(ids))])
