"""How many rows a hop sends and receives at most: static sizes of buffers, in this one place.

Shape suffixes: n rows a rank brings to a hop, K experts per token, N ranks of the hop, C slots for each pair of ranks,
S rows of the send buffer, R rows of the receive buffer.

A hop sends a token at most once to a rank, so one rank receives at most all n rows of each of N ranks: N * n, and no
routing can exceed it. "ragged" sends exactly what there is, and S and R only bound it:

  S = n * min(K, N)     a token has K experts, on at most min(K, N) ranks
  R = N * n             or `max_rows`, if that is less

"padded" and "one_sided" send all of C slots to each rank, filled or not:

  C = n                 dropless; or min(n, ceil(capacity_factor * n * K / N)), at least 1
  S = R = N * C

`capacity_factor` = 1 has room for n * K / N copies from each rank to each: an even spread of all n * K choices if no
two choices of a token met on a rank.

Two hops are bounded in turn: hop 2 brings what hop 1 received, n = R of hop 1. Worked example: 4 rows a rank, K = 2,
2 nodes of 4 ranks. ragged: hop 1 has S = 8, R = 8; hop 2 has n = 8, S = 16, R = 32 = all tokens there are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopBounds:
    """Static sizes of one hop, all in rows.

    Attributes:
      rows: n.
      ranks: N.
      pair: most rows from one rank to another; C of padded.
      send: S.
      receive: R.
    """

    rows: int
    ranks: int
    pair: int
    send: int
    receive: int


def ragged(rows: int, top_k: int, ranks: int, max_rows: int | None = None) -> HopBounds:
    """Bounds of a ragged hop; see the top of the module."""
    receive = ranks * rows if max_rows is None else min(ranks * rows, max_rows)
    return HopBounds(rows=rows, ranks=ranks, pair=rows, send=rows * min(top_k, ranks), receive=receive)


def padded(rows: int, top_k: int, ranks: int, capacity_factor: float | None = None) -> HopBounds:
    """Sizes of a padded hop; see the top of the module."""
    slots = rows
    if capacity_factor is not None:
        slots = min(rows, max(1, math.ceil(capacity_factor * rows * top_k / ranks)))
    return HopBounds(rows=rows, ranks=ranks, pair=slots, send=ranks * slots, receive=ranks * slots)


def hops(
    transport: str,
    rows: int,
    top_k: int,
    ranks: Sequence[int],
    *,
    capacity_factor: float | None = None,
    max_rows: int | None = None,
) -> list[HopBounds]:
    """Bounds of every hop of a "ragged", "padded" or "one_sided" dispatch, in order.

    Args:
      transport: "ragged", "padded" or "one_sided".
      rows: n of the first hop.
      top_k: K.
      ranks: N of each hop.
      capacity_factor, max_rows: of `ParallelConfig`; they hold for each hop.
    """
    out = []
    for size in ranks:
        if transport == "ragged":
            hop = ragged(rows, top_k, size, max_rows)
        else:
            hop = padded(rows, top_k, size, capacity_factor)
        out.append(hop)
        rows = hop.receive
    return out
