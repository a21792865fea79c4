"""How often a thing is called to be timed, on how many sets of inputs, and what comes out. Knows no framework."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CACHE_BYTES = 256 << 20
"""What must pass through memory before an input is used again: five times the largest L2 cache of a Hopper GPU."""
LEAST_SETS, MOST_SETS = 2, 8
WALL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One candidate at one kind of work.

    Attributes:
      device_ms: median milliseconds of a call on the device; on a CPU, of a call.
      spread: (largest - smallest) / median of the same.
      wall_ms: of back-to-back calls from Python, waited for at the end.
      clock: how device_ms was taken.
      compile_s: compiling, or the first call where compiling is not apart.
      peak_bytes: inputs, weights, result and temporary memory; None where it is not known.
      temporary_bytes: the last of these alone.
      result: of the first set of inputs.
    """

    device_ms: float
    spread: float
    wall_ms: float
    clock: str
    compile_s: float
    peak_bytes: int | None
    temporary_bytes: int | None
    result: object


def sets_of(work_bytes: float, cached: bool) -> int:
    """How many sets of inputs to rotate, so that what one call read is out of the cache when its turn comes again.

    A call on one token reads 8 experts of 9.4 MB; four sets of other tokens, and so of other experts, are 300 MB.

    Args:
      work_bytes: fewest bytes of one call.
      cached: whether there is a cache to get around: on a CPU, at sizes for tests, two sets do.
    """
    if not cached:
        return LEAST_SETS
    return min(MOST_SETS, max(LEAST_SETS, math.ceil(CACHE_BYTES / max(work_bytes, 1.0))))


def summary(milliseconds: Sequence[float]) -> tuple[float, float]:
    """Median, and spread over it."""
    middle = statistics.median(milliseconds)
    return middle, (max(milliseconds) - min(milliseconds)) / middle if middle else 0.0


def calls_for(milliseconds: float, least: int) -> int:
    """Back-to-back calls for the wall clock: enough to fill WALL_SECONDS."""
    return max(least, min(200, math.ceil(WALL_SECONDS * 1e3 / max(milliseconds, 1e-3))))


def spans(events: Sequence[tuple[int, int]], calls: int) -> list[float] | None:
    """Milliseconds of each call from (start, duration) of its kernels in nanoseconds, first start to last end.

    Every call runs the same program, so an equal number of kernels belongs to each; None when that does not come out.
    Example: kernels at 0 (for 10 ns), 15 (for 5), 100 (for 10) and 115 (for 5) of two calls: 20 ns each.
    """
    if not events or len(events) % calls:
        return None
    ordered, each = sorted(events), len(events) // calls
    parts = [ordered[index * each : (index + 1) * each] for index in range(calls)]
    return [(max(start + length for start, length in part) - part[0][0]) / 1e6 for part in parts]
