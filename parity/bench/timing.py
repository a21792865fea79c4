"""How often a thing is called to be timed, on how many sets of inputs, and what comes out. Knows no framework."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

CACHE_BYTES = 256 << 20
"""What must pass through memory before an input is used again: five times the largest L2 cache of a Hopper GPU."""
LEAST_SETS, MOST_SETS = 2, 8
WALL_SECONDS = 0.05
REST_SECONDS = 3e-4
"""Between calls of which a profile is taken: more than a device rests inside of a call."""
PLAIN = 2
"""So many times longer than every other rest are those between calls."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Kernels that move data between devices, on the device where they took longest.

    Attributes:
      ms: of a call, in which any of them ran; waiting for other devices is in it.
      hidden: part of that in which another kernel ran on the same device.
      kernels: their names.
    """

    ms: float
    hidden: float
    kernels: tuple[str, ...]


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
      exchange: what passed between devices; None where the clock did not see it, or there was nothing.
    """

    device_ms: float
    spread: float
    wall_ms: float
    clock: str
    compile_s: float
    peak_bytes: int | None
    temporary_bytes: int | None
    result: Any
    exchange: Exchange | None = None


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


def spans(events: Sequence[tuple[int, int]], calls: int) -> list[tuple[int, int]] | None:
    """(Start, end) of each call from (start, duration) of its kernels, in nanoseconds.

    The host waits and rests between calls, so calls are parted where the device rests longest, if that is plain to
    see; else an equal number of kernels belongs to each, since every call runs the same program. None when neither
    comes out. Example: kernels at 0 (for 10 ns), 15 (for 5), 100 (for 10) and 115 (for 5) of two calls: 0 to 20 and
    100 to 120.
    """
    if len(events) < calls:
        return None
    ordered = sorted(events)
    rests, end = [], ordered[0][0]
    for index, (start, length) in enumerate(ordered):
        rests.append((start - end, index))
        end = max(end, start + length)
    ranked = sorted(rests[1:], reverse=True)
    between = ranked[calls - 2][0] if calls > 1 else 1
    within = max(ranked[calls - 1][0], 0) if len(ranked) >= calls else 0
    if between > PLAIN * within:
        cuts = [0, *sorted(index for _, index in ranked[: calls - 1]), len(ordered)]
    elif len(ordered) % calls == 0:
        cuts = list(range(0, len(ordered) + 1, len(ordered) // calls))
    else:
        return None
    parts = [ordered[first:last] for first, last in pairwise(cuts)]
    return [(part[0][0], max(start + length for start, length in part)) for part in parts]


def of_devices(devices: Sequence[Sequence[tuple[int, int]]], *, meeting: bool) -> list[float]:
    """Milliseconds of each call that ran on several devices, from its (start, end) on each.

    Args:
      devices: for each, its calls in order.
      meeting: the devices wait for each other inside of a call. Then a call lasts from when the last of them has begun
        to when all have ended: that the host starts one device after the other is not in it. Otherwise it lasts as
        long as the slowest device needs.

    Example: a call on two devices, 0 to 50 and 30 to 50 ns: 20 ns if they meet, 50 ns if not.
    """
    found = []
    for call in zip(*devices, strict=True):
        if meeting:
            nanoseconds = max(end for _, end in call) - max(start for start, _ in call)
        else:
            nanoseconds = max(end - start for start, end in call)
        found.append(nanoseconds / 1e6)
    return found


EXCHANGES = ("nccl", "all_to_all", "alltoall", "all_reduce", "allreduce", "all_gather", "one_shot", "p2p", "put_blocks")
"""Of which a kernel's name has one, in small letters, if it moves data between devices."""


def exchange(devices: Sequence[Sequence[tuple[int, int, str]]], calls: int) -> Exchange | None:
    """What passed between devices, from (start, duration, name) of all kernels on each; None if nothing did.

    Example: one call, "ncclDevKernel" at 0 for 100 ns and "gemm" at 40 for 80: 100 ns, of which 0.6 are hidden.
    """
    found = []
    for kernels in devices:
        moves, others = [], []
        for kernel in kernels:
            (moves if any(word in kernel[2].lower() for word in EXCHANGES) else others).append(kernel)
        if not moves:
            continue
        inside, beside = _union(moves), _union(others)
        total = sum(end - start for start, end in inside)
        both = sum(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a in inside for b in beside)
        names = tuple(sorted({name for _, _, name in moves}))
        found.append(Exchange(ms=total / 1e6 / calls, hidden=both / total if total else 0.0, kernels=names))
    return max(found, key=lambda each: each.ms, default=None)


def _union(kernels: Sequence[tuple[int, int, str]]) -> list[tuple[int, int]]:
    """(start, end) of the times in which any of these ran."""
    out: list[tuple[int, int]] = []
    for start, length, _ in sorted(kernels):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], start + length))
        else:
            out.append((start, start + length))
    return out
