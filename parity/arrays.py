"""Arrays on disk, shared between processes by memory map.

NumPy alone has no bfloat16, and PyTorch knows none of NumPy's extension types: bfloat16 travels as its uint16 bits
with the dtype's name beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

DTYPE = {"bf16": "bfloat16", "f32": "float32"}
"""The dtype of a format's tokens, weights and rows."""
STORED_AS = {"bfloat16": np.uint16, "float32": np.float32, "int32": np.int32}


@dataclass(frozen=True)
class ArrayRef:
    """Where an array lies: a raw C-ordered file, its dtype by name, its shape."""

    path: str
    dtype: str
    shape: tuple[int, ...]

    def open(self) -> np.ndarray:
        """The array, memory-mapped and read-only; bfloat16 as its uint16 bits."""
        stored = STORED_AS[self.dtype]
        if 0 in self.shape:
            return np.zeros(self.shape, stored)
        return np.memmap(self.path, stored, mode="r", shape=self.shape)

    def to_json(self) -> dict:
        return {"path": self.path, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: Mapping) -> ArrayRef:
        return cls(data["path"], data["dtype"], tuple(data["shape"]))


def float32_of_bits(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32 values; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bits_of_float32(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to bfloat16 bits, to nearest, ties to even."""
    return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def values(ref: ArrayRef) -> np.ndarray:
    """The array's values in float32 (or as stored, for integers), read into memory."""
    stored = ref.open()
    return float32_of_bits(stored) if ref.dtype == "bfloat16" else np.asarray(stored)
