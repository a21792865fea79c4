"""A result in float64 with the error that correct arithmetic makes on the way to it.

Any shape; (rows, columns) mostly. Variances are in the units of parity/tolerance.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parity.tolerance import ErrorModel


@dataclass(frozen=True)
class Value:
    """An exact result, and the variance of everything that happens before it is rounded itself."""

    exact: np.ndarray
    variance: np.ndarray | None = None
    """Of the shape of `exact`; None where nothing was off."""
    tp: np.ndarray | None = None
    """What is added when the result is a sum of parts, one of each tp rank, that are rounded each."""
    bias: np.ndarray | None = None
    """The part of `exact` that is added in float32, perhaps after the product was rounded; None where there is none."""

    def __getitem__(self, index: np.ndarray) -> Value:
        rest = (None if part is None else part[index] for part in (self.variance, self.tp, self.bias))
        return Value(self.exact[index], *rest)

    @property
    def before(self) -> np.ndarray:
        """The variance, zeros where nothing was off."""
        return np.zeros_like(self.exact) if self.variance is None else self.variance

    @property
    def largest(self) -> np.ndarray:
        """Of what may be rounded, the larger: the result, or the product that its bias is added to."""
        return self.exact if self.bias is None else np.maximum(np.abs(self.exact), np.abs(self.exact - self.bias))

    def rounded(self, model: ErrorModel) -> Value:
        """The same result rounded to the case's dtype: one error more."""
        return Value(self.exact, self.before + model.rounding(self.largest), self.tp)


def load(array: np.ndarray) -> Value:
    return Value(array.astype(np.float64))


def norm2(rows: np.ndarray) -> np.ndarray:
    """(rows, 1) squared norms."""
    return (rows**2).sum(axis=1, keepdims=True)


def product(rows: Value, weights: np.ndarray, model: ErrorModel, bias: np.ndarray | None = None) -> Value:
    """rows @ weights.T + bias, accumulated in float32.

    Args:
      rows: (rows, depth).
      weights: (outputs, depth) float32.
      bias: (outputs,), or None.
    """
    exact = rows.exact @ weights.T.astype(np.float64)
    squared = weights**2
    variance = model.matmul(norm2(rows.exact), squared.sum(1), exact, weights.shape[1])
    if rows.variance is not None:
        variance = variance + rows.variance.astype(np.float32) @ squared.T
    tp = None if rows.tp is None else rows.tp @ squared.T
    if bias is None:
        return Value(exact, variance, tp)
    return Value(exact + bias.astype(np.float64), variance, tp, np.broadcast_to(bias, exact.shape))
