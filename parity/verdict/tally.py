"""A stage's errors over their bounds: by row, expert, rank and element, and the drift of all of them together.

n rows of a block, C columns
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from parity.tolerance import SIGMAS, SLACK, ErrorModel, Errors, bound, over
from parity.verdict.blocks import Block

INFINITE = 1e9
"""What a margin reads where nothing may be off and something is: JSON has no infinity."""
ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Expected:
    """What a block is held to."""

    exact: np.ndarray
    """(n, C) float64."""
    before: np.ndarray
    """(n, C) variance of all that happens before the result's own rounding."""
    own: np.ndarray
    """(n, C) variance of that; zeros where it stays float32."""
    sharp: bool
    """Whether that is one rounding, which never exceeds its u, and not a sum of several."""


@dataclass(frozen=True)
class Worst:
    """Where a stage is furthest off."""

    margin: float
    token: int
    slot: int | None
    expert: int | None
    rank: int
    column: int
    value: float
    expected: float


@dataclass(frozen=True)
class Sums:
    """Of one row or of several together: squared errors, what is expected of them, and squared results."""

    error2: np.ndarray
    expected: Errors
    exact2: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> Sums:
        return Sums(self.error2[rows], self.expected[rows], self.exact2[rows])

    def together(self) -> Sums:
        return Sums(self.error2.sum(), self.expected.together(), self.exact2.sum())

    def joined(self, other: Sums | None) -> Sums:
        if other is None:
            return self
        return Sums(self.error2 + other.error2, self.expected.joined(other.expected), self.exact2 + other.exact2)


@dataclass
class Tally:
    """Adds up blocks of one stage.

    `freedom`: independent errors in a row; `drifts`: whether errors have no business to lean one way, because each
    element has its own; `truncation`: how far sums may lean all the same, relative to their result, and be off together
    (`ErrorModel.truncation`); `tail`: how much wider than a Gaussian's an element's is.
    """

    model: ErrorModel
    freedom: int
    drifts: bool
    truncation: float = 0.0
    tail: float = 1.0
    worst: Worst | None = None
    lost: str = ""
    """Why some rows have nothing to be held to."""
    _experts: dict[int, Sums] = field(default_factory=dict)
    _ranks: dict[int, Sums] = field(default_factory=dict)
    _drift: float = 0.0
    _size: float = 0.0

    def add(self, block: Block, expected: Expected, expert: np.ndarray | None, users: np.ndarray | None) -> None:
        """Take a block in.

        Args:
          block: what a rank gave.
          expected: for the same rows.
          expert: (n,) of each row, for stages by row.
          users: (n, K) experts of each token, for stages by token.
        """
        error = block.got - expected.exact
        error[np.isnan(error)] = np.inf
        variance = expected.before + expected.own
        rows = Sums((error**2).sum(axis=1), Errors.of(variance, self.freedom), (expected.exact**2).sum(axis=1))
        by_row = self._over(rows)
        limit = self._element_limit(expected)
        element = over(np.abs(error), limit)
        column = element.argmax(axis=1) if element.size else np.zeros(0, int)
        margin = np.maximum(by_row, np.take_along_axis(element, column[:, None], axis=1)[:, 0])
        margin = np.minimum(margin, INFINITE)
        if len(margin) and (self.worst is None or margin.max() > self.worst.margin):
            row = int(margin.argmax())
            at = int(column[row])
            self.worst = Worst(
                margin=float(margin[row]),
                token=int(block.token[row]),
                slot=None if block.slot is None else int(block.slot[row]),
                expert=None if expert is None else int(expert[row]),
                rank=block.rank,
                column=at,
                value=float(block.got[row, at]),
                expected=float(expected.exact[row, at]),
            )
        for members, who in _groups(expert, users):
            self._experts[who] = rows[members].together().joined(self._experts.get(who))
        self._ranks[block.rank] = rows.together().joined(self._ranks.get(block.rank))
        with np.errstate(invalid="ignore"):
            self._drift += float((np.sign(expected.exact) * error).sum())
        self._size += float(np.abs(expected.exact).sum())

    def _element_limit(self, expected: Expected) -> np.ndarray:
        statistical = expected.before if expected.sharp else expected.before + expected.own
        limit = SLACK * SIGMAS * self.tail * self.model.unit * np.sqrt(statistical)
        if expected.sharp:
            # the one rounding's size, in case a product was rounded before its bias
            limit = limit + self.model.u * np.sqrt(expected.own) * (expected.own > 0)
        return limit

    def _over(self, sums: Sums) -> np.ndarray:
        """Norms of errors over what chance allows, and leaning."""
        limit = bound(sums.expected, self.model) + self.truncation * np.sqrt(sums.exact2)
        return over(np.sqrt(sums.error2), limit)

    @property
    def _all(self) -> Sums:
        nothing = np.zeros(())
        start = Sums(nothing, Errors(nothing, nothing, nothing), nothing)
        return functools.reduce(lambda a, b: a.joined(b), self._ranks.values(), start)

    @property
    def observed_over_model(self) -> float | None:
        """RMS error over its expectation; None where nothing is expected to be off."""
        error2, expect2 = self._all.error2, self._all.expected.total
        return float(np.sqrt(error2 / expect2) / self.model.unit) if expect2 > 0 and np.isfinite(error2) else None

    @property
    def predicted(self) -> float | None:
        """The RMS error that is expected, over the RMS value; None where nothing is expected to be off."""
        expect2, exact2 = self._all.expected.total, self._all.exact2
        return float(self.model.unit * np.sqrt(expect2 / exact2)) if expect2 > 0 and exact2 > 0 else None

    def findings(self) -> list[tuple[float, str]]:
        """Every margin with what it is of, the worst first."""
        out = []
        if self.lost:
            out.append((INFINITE, self.lost))
        if self.worst is not None:
            out.append((self.worst.margin, ""))
        for what, groups in (("of expert", self._experts), ("on rank", self._ranks)):
            for who, sums in groups.items():
                ratio = min(float(self._over(sums)), INFINITE)
                out.append((ratio, f"rows {what} {who} together are off by {ratio:.3g} times their bound"))
        expect2 = self._all.expected.total
        if self.drifts and expect2 > 0:
            limit = SLACK * SIGMAS * self.model.unit * np.sqrt(expect2) + self.truncation * self._size
            drift = abs(self._drift) / limit
            ratio = min(float(drift), INFINITE) if np.isfinite(drift) else INFINITE
            way = "towards zero" if self._drift < 0 else "away from zero"
            out.append((ratio, f"its results lean {way}, by {ratio:.3g} times what chance allows"))
        return sorted(out, key=lambda finding: -finding[0])


def _groups(expert: np.ndarray | None, users: np.ndarray | None) -> Iterable[tuple[np.ndarray, int]]:
    if expert is not None:
        return ((expert == who, int(who)) for who in np.unique(expert))
    if users is not None:
        return (((users == who).any(axis=1), int(who)) for who in np.unique(users))
    return ()
