"""The inputs, by formula: every framework makes the same bits on its own device, and none has to be sent.

Element i of an array with seed s is the sum of the four bytes of a 32-bit mix of (i, s), less its mean of 510: an
integer, near to normally distributed, with a deviation of 147.8. Times a float32 factor, rounded to bfloat16. Stacked
weights take the number of the expert into the seed, so that an index stays below 2^32. The formulas in
`candidates/jax_lab.py` and `candidates/torch_lab.py` are this one; a test holds them to it bit by bit.
"""

from __future__ import annotations

import math

import numpy as np

from parity.arrays import bits_of_float32, float32_of_bits
from parity.bench.shapes import Shape

GOLDEN, FIRST, SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
MEAN, DEVIATION = 510, math.sqrt((2**16 - 1) / 3)
SEEDS = {"x": 1, "gate": 2, "gate_up": 3, "down": 4, "rows": 5, "h": 6, "y": 7, "weights": 8, "ids": 9}
SEEDS |= {"shared_gate_up": 10, "shared_down": 11}
MASK = 0xFFFFFFFF


def mix(value: int) -> int:
    """The 32-bit finalizer of MurmurHash3."""
    value = (value ^ (value >> 16)) * FIRST & MASK
    value = (value ^ (value >> 13)) * SECOND & MASK
    return value ^ (value >> 16)


def seed(name: str, part: int = 0) -> int:
    """The seed of array `name`; `part` is the input set, or the expert of stacked weights."""
    return mix((SEEDS[name] * GOLDEN + part * FIRST + 1) & MASK)


def factor(deviation: float) -> np.float32:
    return np.float32(deviation / DEVIATION)


def deviations(shape: Shape) -> dict[str, float]:
    """Of every array: weights keep the scale of what they multiply, everything else has 1."""
    unit = dict.fromkeys(("x", "rows", "h", "y"), 1.0)
    return unit | {"gate": shape.hidden**-0.5, "gate_up": shape.hidden**-0.5, "down": shape.intermediate**-0.5}


def integers(seed: int, count: int) -> np.ndarray:
    """The mixes of indices 0 to count - 1, (count,) uint32."""
    value = np.arange(count, dtype=np.uint32) * np.uint32(GOLDEN) + np.uint32(seed)
    value = (value ^ (value >> np.uint32(16))) * np.uint32(FIRST)
    value = (value ^ (value >> np.uint32(13))) * np.uint32(SECOND)
    return value ^ (value >> np.uint32(16))


def normal(seed: int, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """An array as the formula above has it, bfloat16 values in float32."""
    value = integers(seed, math.prod(shape))
    parts = [((value >> np.uint32(8 * byte)) & np.uint32(255)).astype(np.int32) for byte in range(4)]
    total = parts[0] + parts[1] + parts[2] + parts[3] - MEAN
    return float32_of_bits(bits_of_float32(total.astype(np.float32) * factor(deviation))).reshape(shape)


def stacked(name: str, experts: int, shape: tuple[int, int], deviation: float) -> np.ndarray:
    return np.stack([normal(seed(name, expert), shape, deviation) for expert in range(experts)])


def checksum(values: np.ndarray) -> int:
    """Sum of the bfloat16 bit patterns, signed, modulo 2^32: whatever the order of the elements."""
    return int(bits_of_float32(values).view(np.int16).sum(dtype=np.int64)) & MASK


class Routing:
    """An even random choice of K distinct experts by each token, and the sort of its rows by expert.

    Attributes:
      ids: (T, K) int32.
      weights: (T, K) float32, positive, with sum 1.
      sizes: (E,) int32 rows of each expert.
      position: (T, K) int32, the row of each slot.
      row_token, row_slot: (R,) int32, the inverse.
    """

    def __init__(self, shape: Shape, part: int = 0) -> None:
        T, E, K = shape.tokens, shape.experts, shape.top_k
        score = integers(seed("ids", part), T * E).reshape(T, E)
        chosen = np.argpartition(score, K - 1, axis=1)[:, :K]
        order = np.argsort(np.take_along_axis(score, chosen, 1), axis=1, kind="stable")
        self.ids = np.take_along_axis(chosen, order, 1).astype(np.int32)
        raw = (integers(seed("weights", part), T * K).reshape(T, K) >> np.uint32(8)).astype(np.float32) + 2.0**22
        self.weights = (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)
        self.sizes = np.bincount(self.ids.reshape(-1), minlength=E).astype(np.int32)
        pair = np.argsort(self.ids.reshape(-1), kind="stable").astype(np.int32)
        self.row_token, self.row_slot = (pair // K).astype(np.int32), (pair % K).astype(np.int32)
        position = np.empty(T * K, np.int32)
        position[pair] = np.arange(T * K, dtype=np.int32)
        self.position = position.reshape(T, K)
