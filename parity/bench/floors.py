"""The least that must be done: operations and bytes of each thing that is timed, and the time they take at best.

Letters as everywhere: T tokens, D hidden, F intermediate, E experts, K experts a token, R = T K rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from parity.bench.shapes import Shape

BF16, F32, I32 = 2, 4, 4
MATRIX_BOUND = ("layer", "gate_up", "down", "grouped_matmul")
"""Whose speed is given in TFLOP/s when multiplying is the longer part; the others move bytes."""


@dataclass(frozen=True)
class Rates:
    """What the device does at best, measured in this run: a large bf16 product, and a copy, read plus write."""

    tflops: float
    gbps: float

    def better(self, other: Rates) -> Rates:
        return Rates(max(self.tflops, other.tflops), max(self.gbps, other.gbps))


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and the fewest bytes: every input read once, every output written once."""

    flops: float
    bytes: float

    def seconds(self, rates: Rates) -> float:
        """The floor: the longer of multiplying and moving."""
        return max(self.flops / (rates.tflops * 1e12), self.bytes / (rates.gbps * 1e9))

    def bound_by_memory(self, rates: Rates) -> bool:
        return self.bytes / (rates.gbps * 1e9) >= self.flops / (rates.tflops * 1e12)


def active_experts(shape: Shape) -> float:
    """Experts that some token chose, expected for independent tokens that choose evenly.

    Sixteen tokens that choose 8 of 128 reach 128 (1 - (120 / 128)^16) = 82.4 of them.
    """
    return shape.experts * (1 - (1 - shape.top_k / shape.experts) ** shape.tokens)


def work(what: str, shape: Shape, active: float | None = None) -> Work:
    """What must be done for `what`; the weights of experts that nobody chose need not be read.

    The small arrays of a single operation (ids, positions, sizes, weights of slots) are left out: a thousandth.

    Args:
      what: see `shapes.WHATS`.
      shape: its sizes.
      active: experts that were chosen, where that is known; else as many as an even choice would reach.
    """
    T, D, F, E, R = shape.tokens, shape.hidden, shape.intermediate, shape.experts, shape.rows
    active = active_experts(shape) if active is None else active
    if what == "layer":
        weights = active * 3 * D * F + E * D
        return Work(6 * R * D * F + 2 * T * D * E, BF16 * (weights + 2 * T * D))
    if what == "gate_up":
        return Work(4 * R * D * F, BF16 * (active * 2 * D * F + R * D + R * F))
    if what == "grouped_matmul":
        return Work(4 * R * D * F, BF16 * (active * 2 * D * F + R * D + 2 * R * F))
    if what == "down":
        return Work(2 * R * D * F, BF16 * (active * D * F + R * F + R * D))
    if what == "gather":
        return Work(0, BF16 * (T * D + R * D))
    if what == "combine":
        return Work(2 * R * D, BF16 * (R * D + T * D))
    if what == "routing":
        return Work(2 * T * D * E, BF16 * (T * D + E * D) + R * (2 * I32 + F32))
    raise ValueError(f"nothing is known of {what!r}")
