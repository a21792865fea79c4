"""The error model: how far from the exact result correct arithmetic may land, derived, never tuned per case.

Every error is a variance in units of (RMS * u)^2, where `u` is the unit roundoff of the case's dtype and RMS * u the
root-mean-square relative error of one rounding to nearest. The oracle carries these variances through the layer
beside its values (parity/oracle/layer.py), element by element; this module says what each operation adds and how far
their sum may stray (`Errors.most`). docs/numerics.md derives each line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

UNIT_ROUNDOFF = {"bf16": 2.0**-8, "f32": 2.0**-24}
RMS = 0.42
"""RMS relative error of one rounding to nearest over its maximum u, for values spread over a binade: the spacing
2 u / m over sqrt(12), averaged over mantissas m with density 1 / (m ln 2)."""
SLACK = 1.25
"""What the model may be off by, as a factor on the error: correlated roundings, values not spread over binades."""
FALSE_ALARM = 1e-9
"""Chance that one correct token, expert or rank is called wrong because its errors happened to add up."""
SIGMAS = 6.5
"""The same for one element: its errors are sums of many, so Gaussian, with 8e-11 beyond this."""
SENSITIVITY = 1 / 3
"""A token's bound over its smallest expert's contribution must stay below this, or losing that expert could hide."""
TENSOR_CORE_DEPTH = 8
"""The fewest terms that a tensor core adds at once: 8 of TF32, 16 of bfloat16."""
RANKS = 8
"""Parts that a sum over tp ranks may have: the oracle's answer is one for every mesh."""


@dataclass(frozen=True, kw_only=True)
class StageError:
    """What one stage adds to the error of its inputs. docs/numerics.md derives each line."""

    rounds: str
    """Whether its result is rounded to the case's dtype: "yes"; "no", it stays float32; "may", it is for the
    implementation to choose. One that chose float32 shows it, and is held to float32's error."""
    arithmetic: str
    """What it adds in float32 before that, in words."""


STAGE_ERRORS = {
    "logits": StageError(rounds="no", arithmetic="product of depth D"),
    "choice": StageError(rounds="no", arithmetic="weight: exponential of the logit"),
    "latent_in": StageError(rounds="yes", arithmetic="product of depth D"),
    "dispatch": StageError(rounds="yes", arithmetic="nothing: a copy; with the weight on the input, its product"),
    "gate_up": StageError(rounds="may", arithmetic="product of depth W"),
    "activation": StageError(rounds="yes", arithmetic="activation in float32"),
    "down": StageError(rounds="may", arithmetic="product of depth F; under TP its parts may round"),
    "combine": StageError(rounds="no", arithmetic="sum of K terms"),
    "latent_out": StageError(rounds="no", arithmetic="its input rounds; product of depth L"),
    "shared": StageError(rounds="no", arithmetic="an expert: gate and up may round, the activation rounds"),
    "reduce": StageError(rounds="yes", arithmetic="routed plus shared"),
}
"""By stage (`parity.stages`). A quantized format will add lines, not loosen these."""


@dataclass(frozen=True)
class Errors:
    """Independent errors taken together, of one row or of several: what the bound on their norm depends on.

    Attributes:
      total: (...) the sum of their variances, in the model's units.
      squares: (...) the sum of the variances' squares.
      largest: (...) the largest variance.
    """

    total: np.ndarray
    squares: np.ndarray
    largest: np.ndarray

    @classmethod
    def of(cls, variance: np.ndarray, freedom: float) -> Errors:
        """Those of each row of (n, C) variances; of the C errors of a row `freedom` are independent, C at most."""
        total = variance.sum(axis=1)
        # so few independent errors are this large at least
        least = total / max(freedom, 1.0)
        squares = np.maximum((variance**2).sum(axis=1), total * least)
        return cls(total, squares, np.maximum(variance.max(axis=1, initial=0.0), least))

    def __getitem__(self, rows: np.ndarray) -> Errors:
        return Errors(self.total[rows], self.squares[rows], self.largest[rows])

    def together(self) -> Errors:
        """Those of all rows as one."""
        return Errors(self.total.sum(), self.squares.sum(), np.asarray(self.largest.max(initial=0.0)))

    def joined(self, other: Errors) -> Errors:
        """These and others as one."""
        return Errors(self.total + other.total, self.squares + other.squares, np.maximum(self.largest, other.largest))

    def most(self) -> np.ndarray:
        """What the sum of the squared errors may come to by chance (one in 1 / FALSE_ALARM), in the model's units.

        The upper tail of a sum of squared Gaussians of unequal variances (Laurent and Massart 2000, lemma 1).
        """
        t = -math.log(FALSE_ALARM)
        return self.total + 2 * np.sqrt(t * self.squares) + 2 * t * self.largest


def exact_products(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(T,) rows whose products with all weights are exact in float32, whatever the order of the sum.

    Every term is a whole multiple of one unit, and no sum of terms can need more than 24 bits of it.

    Args:
      rows: (T, depth).
      weights: (M, depth).
    """
    unit = _unit(rows).min(axis=1, initial=np.inf) * _unit(weights).min(initial=np.inf)
    largest = (np.abs(rows) @ np.abs(weights).T).max(axis=1, initial=0.0)
    return largest <= unit / UNIT_ROUNDOFF["f32"]


def _unit(values: np.ndarray) -> np.ndarray:
    """The largest power of two that divides each value; infinite for zero."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    whole = (mantissa * 2.0**53).astype(np.int64)
    return np.where(whole == 0, np.inf, np.ldexp((whole & -whole).astype(np.float64), exponent - 53))


@dataclass(frozen=True)
class ErrorModel:
    """What each operation of the layer adds, for one format."""

    format: str

    @property
    def u(self) -> float:
        return UNIT_ROUNDOFF[self.format]

    @property
    def unit(self) -> float:
        """RMS error of one rounding of 1.0: variances are in units of its square."""
        return RMS * self.u

    @property
    def f32(self) -> float:
        """A float32 rounding's variance in these units."""
        return (UNIT_ROUNDOFF["f32"] / self.u) ** 2

    @property
    def narrow(self) -> float:
        """1 where the dtype is narrower than float32, else 0: there the arithmetic's own rounding is the only one."""
        return 1.0 if self.f32 < 1 else 0.0

    def rounding(self, value: np.ndarray) -> np.ndarray:
        """A float32 `value` rounded to the case's dtype once."""
        return self.narrow * value**2

    def matmul(self, inputs2: np.ndarray, weights2: np.ndarray, out: np.ndarray, depth: int) -> np.ndarray:
        """Float32 accumulation of a product of the given depth.

        Partial sums of zero-mean terms grow like sqrt(i) and sum to depth * |a|^2 |b|^2 / (2 depth); a drift (a
        non-zero mean) makes them grow like i and adds out^2 * depth / 3. One running sum is the worst order: blocked
        and tree sums stay below. Of narrow operands' terms only a share can make a sum round (`_rounding_share`).

        Args:
          inputs2: (rows, 1) squared norms of the input rows.
          weights2: (M,) squared norms of the weight rows.
          out: (rows, M) the exact products.
        """
        variance = self.f32 * (inputs2 * weights2 / 2 + out**2 * (depth / 3 + 1))
        return variance * self._rounding_share(inputs2 * weights2, out, depth) if self.narrow else variance

    def truncation(self, depth: int) -> float:
        """How far a product's float32 sums may lean towards zero on average, relative to the result.

        Tensor cores cut off what a partial sum has no place for instead of rounding it: half a last place, u32 of the
        sum, each time they add. They add 8 terms or more at once, so depth / 8 times, and once more at the end. Partial
        sums are on average no larger than the result.
        """
        return UNIT_ROUNDOFF["f32"] * (depth / TENSOR_CORE_DEPTH + 1) if depth else 0.0

    def tail(self, depth: int) -> float:
        """How much wider than a Gaussian's the tail of one element of a product is taught: its roundings are few.

        The variance counts the terms that make a sum round on average; a single sum may round at any of them, so its
        tail is taken from the variance of roundings at every term.
        """
        if not (self.narrow and depth):
            return 1.0
        return float(1 / np.sqrt(self._rounding_share(np.ones(1), np.zeros(1), depth)[0]))

    def _rounding_share(self, product2: np.ndarray, out: np.ndarray, depth: int) -> np.ndarray:
        """Which share of the terms can make a float32 sum round: a bfloat16 product is exact, and too short to.

        Such a product p has 16 bits, the lowest above |p| 2^-16; the last place of a float32 sum s is at most
        |s| 2^-23. So only |p| < 2^-7 |s| rounds. Terms of RMS t are products of two Gaussians, with density K0 / pi,
        and |p| < e t has probability (2 / pi) e (1 - gamma + ln(2 / e)). The sum is taken at its end, where
        s^2 / t^2 = depth + depth^2 out^2 / product2 at most.
        """
        drift = np.divide(out**2, product2, out=np.zeros_like(out), where=product2 > 0)
        below = np.minimum(np.sqrt(depth + depth**2 * drift) / 128, 1.0)
        return np.minimum(2 / math.pi * below * (1 - np.euler_gamma + np.log(2 / below)), 1.0)

    def activation(self, h: np.ndarray, terms2: np.ndarray | float = 0.0, roundings: int = 9) -> np.ndarray:
        """An activation evaluated in float32: an exponential or erf of a few float32 roundings, and two products.

        Args:
          h: (rows, F) its exact result.
          terms2: square of what `h` is the difference of, where it is one: those roundings are of its size.
          roundings: variance of all roundings in units of one; relu2 has one, its square.
        """
        return roundings * self.f32 * (h**2 + terms2)

    def weights(self, logit_variance: np.ndarray, below_max: np.ndarray) -> np.ndarray:
        """Relative variance of a router weight: the logit's error enters the exponent, whose argument is rounded too.

        Args:
          logit_variance: (T, 1) or (T, K) absolute variance of a logit.
          below_max: (T, K) how far the chosen logits lie below the largest.
        """
        return self.f32 * (9 + below_max**2) + 2 * logit_variance

    def combine(self, products2: np.ndarray, sums2: np.ndarray) -> np.ndarray:
        """A float32 sum of weighted terms: each product is rounded, and each partial sum from the second on.

        Zeros that other ranks add cost nothing.

        Args:
          products2: the sum of the terms' squares.
          sums2: the sum of the partial sums' squares.
        """
        return self.f32 * (products2 + sums2)

    @staticmethod
    def partial_sums(slot: np.ndarray, count: int) -> np.ndarray:
        """In how many partial sums of two terms and more, but for the whole, the term of a slot is.

        Slots are added in order, best first: the worst one, since the largest terms are in most sums. For four terms
        a, b, c, d there are a + b and a + b + c: counts 2, 2, 1, 0.
        """
        return np.maximum(count - 1 - np.maximum(slot, 1), 0)

    def across(self, terms2: np.ndarray) -> np.ndarray:
        """The float32 sum over tp ranks of parts whose squares add up to about `terms2`."""
        return self.f32 * terms2 * RANKS / 2


def bound(errors: Errors, model: ErrorModel) -> np.ndarray:
    """The bound on the norm of these errors together."""
    return SLACK * model.unit * np.sqrt(errors.most())


def element_bound(variance: np.ndarray, value: np.ndarray, model: ErrorModel) -> np.ndarray:
    """The bound on single elements: the output's own rounding at its worst, everything before it at SIGMAS.

    Args:
      variance: (T, D) of everything, the output rounding `value**2` included.
      value: (T, D) exact results.
    """
    before = np.maximum(variance - model.rounding(value), 0)
    return model.u * np.abs(value) + SLACK * SIGMAS * model.unit * np.sqrt(before)


def over(error: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Error over bound; where nothing may be off (a token that lost every expert is exactly zero), 0 or infinity."""
    exact = np.where(error > 0, np.inf, 0.0)
    return np.divide(error, limit, out=exact, where=limit > 0)
