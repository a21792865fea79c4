"""How many token copies a rank can receive: the one place that says so. Buffers and estimates are sized by it.

A token goes at most once to a rank, whatever its K experts are. So a rank receives at most every row of every rank it
exchanges with; `capacity_factor` (padded) and `max_rows` (ragged) bound it lower, and drop what lies past the bound.

Worked example, 4 ranks of 10 rows, K = 2:

    dropless                 10 from each rank                        40 copies
    capacity_factor=1.2      ceil(1.2 * 10 * 2 / 4) = 6 from each     24 copies
    max_rows=15              whatever the source                      15 copies
    2 nodes of 2 ranks       hop 1: 2 * 10 = 20, hop 2: 2 * 20        40 copies
"""

import math
from collections.abc import Sequence


def slots(rows: int, *, top_k: int, ranks: int, capacity_factor: float | None) -> int:
    """Copies that one rank may send to one other rank of `ranks`.

    Args:
        rows: rows of the sender's array, padding included.
        top_k: K.
        ranks: over how many ranks the rows spread.
        capacity_factor: None: a slot for every row. Else so many times the slots that K copies of every row take when
            they spread evenly, rounded up; at least one slot, and at most one for every row.
    """
    if capacity_factor is None:
        return rows
    return min(rows, max(1, math.ceil(capacity_factor * rows * top_k / ranks)))


def received_copies(
    rows: int, *, top_k: int, hops: Sequence[int], capacity_factor: float | None = None, max_rows: int | None = None
) -> int:
    """The most token copies that a rank holds after its last hop.

    Args:
        rows: rows of every rank's array, padding included.
        top_k: K.
        hops: ranks of each hop, from the outermost.
        capacity_factor: of the padded transport.
        max_rows: of the ragged transport.
    """
    for ranks in hops:
        rows = ranks * slots(rows, top_k=top_k, ranks=ranks, capacity_factor=capacity_factor)
        if max_rows is not None:
            rows = min(rows, max_rows)
    return rows
