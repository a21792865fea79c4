"""The stages inside of an expert, and the shared expert, which is one stage of them all.

W width of an expert's input and output (D, or the latent's)   F intermediate   M 2F gated, F not
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from parity.arrays import ArrayRef, float32_of_bits, values
from parity.case import Case
from parity.oracle.activation import activate, sigmoid, split
from parity.oracle.value import Value, product
from parity.tolerance import ErrorModel

STEP = 1e-6
"""Step of the one-sided differences that measure an activation's slope."""


@dataclass(frozen=True)
class Weights:
    """One expert's (or the shared expert's) weights, float32 as stored."""

    gate_up: np.ndarray
    """(M, W)."""
    down: np.ndarray
    """(W, F)."""
    gate_up_bias: np.ndarray | None
    down_bias: np.ndarray | None

    @classmethod
    def of(cls, arrays: Mapping[str, ArrayRef], owner: str, expert: int | None) -> Weights:
        def part(name: str) -> np.ndarray | None:
            ref = arrays.get(f"{owner}.{name}")
            if ref is None:
                return None
            return values(ref) if expert is None else _one(ref, expert)

        gate_up, down = part("gate_up"), part("down")
        assert gate_up is not None
        assert down is not None
        return cls(gate_up, down, part("gate_up_bias"), part("down_bias"))


def gate_up(rows: Value, weights: Weights, model: ErrorModel) -> Value:
    """The first projection: (rows, W) to (rows, M)."""
    return product(rows, weights.gate_up, model, weights.gate_up_bias)


def activation(pre: Value, case: Case, model: ErrorModel) -> Value:
    """(rows, M) to (rows, F); errors pass by the slopes."""
    layout = {"gated": case.gated, "interleaved": case.flags.interleaved}
    gate, up = split(pre.exact, **layout)
    h = activate(gate, up, case.flags)
    # 1 + erf and 1 + tanh cancel where the gate is negative
    # how far erf and tanh may be off, as a variance in roundings of 1: polynomials for erf are used that are off by 7
    off = {"gelu": 49, "gelu_tanh": 9}.get(case.flags.activation, 0)
    terms2 = off / 9 * (gate / 2 * (1 if up is None else up)) ** 2
    variance = model.activation(h, terms2, 1 if case.flags.activation == "relu2" else 9)
    if pre.variance is not None:
        gate_variance, up_variance = split(pre.variance, **layout)
        variance = variance + gate_variance * ((activate(gate + STEP, up, case.flags) - h) / STEP) ** 2
        if up is not None and up_variance is not None:
            variance = variance + up_variance * ((activate(gate, up + STEP, case.flags) - h) / STEP) ** 2
    return Value(h, variance)


def down(h: Value, weights: Weights, model: ErrorModel) -> Value:
    """The second projection: (rows, F) to (rows, W). Its tp ranks' parts are parts of F."""
    y = product(h, weights.down, model)
    # Squares of independent parts add up to those of the terms, not to the square of the sum.
    exact, parts2, bias = y.exact, (h.exact**2).astype(np.float32) @ (weights.down**2).T, weights.down_bias
    if bias is not None:  # one of the parts has it, before that is rounded
        exact, parts2 = exact + bias.astype(np.float64), parts2 + bias**2
        bias = np.broadcast_to(bias, exact.shape)
    return Value(exact, y.variance, model.narrow * np.maximum(parts2 - exact**2, 0), bias)


def shared_expert(x: Value, arrays: Mapping[str, ArrayRef], case: Case, model: ErrorModel) -> Value:
    """The shared expert on every token: (T, D) to (T, D). Its result is not rounded."""
    weights = Weights.of(arrays, "shared", None)
    pre = gate_up(x, weights, model).rounded(model)
    h = activation(pre, case, model).rounded(model)
    out = product(h, weights.down, model)
    if "shared.gate" not in arrays:
        return out
    logit = product(x, values(arrays["shared.gate"]), model)
    relative = model.weights(logit.before, np.zeros_like(logit.exact))
    scale = sigmoid(logit.exact)
    exact = scale * out.exact
    return Value(exact, scale**2 * out.before + exact**2 * relative)


def _one(ref: ArrayRef, index: int) -> np.ndarray:
    """One expert's slice of a stacked array, without reading the others."""
    stored = ref.open()[index]
    return float32_of_bits(stored) if ref.dtype == "bfloat16" else np.asarray(stored)
