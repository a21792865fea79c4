"""The activations, in float64, straight from their definitions."""

from __future__ import annotations

import math

import numpy as np

from parity.case import Flags

# NumPy has no erf; the C library's is exact to float64, element by element.
_erf = np.vectorize(math.erf, otypes=[np.float64])


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)), without overflow for large negative z."""
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1 / (1 + e), e / (1 + e))


def _gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + _erf(z / math.sqrt(2)))


def _gelu_tanh(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


_POINTWISE = {
    "silu": lambda z: z * sigmoid(z),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu2": lambda z: np.maximum(z, 0) ** 2,
}


def split(pre: np.ndarray, *, gated: bool, interleaved: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """The gate half and the up half of a (rows, 2F) pre-activation; ungated: all of it, and None."""
    if not gated:
        return pre, None
    if interleaved:
        return pre[:, 0::2], pre[:, 1::2]
    half = pre.shape[1] // 2
    return pre[:, :half], pre[:, half:]


def activate(gate: np.ndarray, up: np.ndarray | None, flags: Flags) -> np.ndarray:
    """h (rows, F) from the gate and up pre-activations (rows, F); `up` is None for an ungated expert."""
    if flags.activation == "swigluoai":
        assert up is not None
        gate = np.minimum(gate, flags.limit)
        up = np.clip(up, -flags.limit, flags.limit)
        return gate * sigmoid(flags.alpha * gate) * (up + 1)
    h = _POINTWISE[flags.activation](gate)
    return h if up is None else h * up
