"""Choices of experts that are close: which other choice is a correct one, and how often correct routers make it.

    T tokens   E experts   K experts per token   G groups of experts

Two experts *tie exactly* for a token when everything they are chosen by has equal bits in every correct router: logits
that carry no error (given ones, or products that are exact in float32) and are equal, with equal biases. Equal bits go
through the same functions to equal scores, so the lower index must win; so must the lower of two groups whose scores
are made of such experts. Every other pair is ordered by float32 scores that carry errors, and where the scores lie
closer than these, either order is correct.

The error of a score is a variance like all others (parity/tolerance.py); what may be called wrong at `SIGMAS` of it
gives the choices that are allowed, and the chance that Gaussian errors of that size swap a pair gives how many tokens
are expected to differ from the oracle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from parity.case import Flags
from parity.oracle.router import Routing
from parity.tolerance import FALSE_ALARM, SIGMAS, SLACK, ErrorModel

NEGLIGIBLE = 1e-15
"""Chances below this are not counted."""

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What every token's experts are chosen by, and how far off a correct router may be."""

    ids: np.ndarray
    """(T, K) the oracle's choice."""
    gap: np.ndarray
    """(T,) `Routing.gap`."""
    logits: np.ndarray
    """(T, E)."""
    selection: np.ndarray
    """(T, E) scores plus bias; no group is masked."""
    deviation: np.ndarray
    """(T, E) RMS error of a selection score, with the model's slack."""
    exact: np.ndarray
    """(T,) whether the token's logits carry no error."""
    groups: int
    groups_kept: int
    best: int
    """How many of a group's experts its score adds up."""
    rounding: float
    """RMS relative error of one float32 addition, with the slack."""

    @classmethod
    def of(cls, routing: Routing, logit_variance: np.ndarray, flags: Flags, model: ErrorModel) -> Choices:
        """The choices of a routing.

        Args:
          routing: the oracle's.
          logit_variance: (T, 1) of the logits' errors, in the model's units; 0 where they are exact.
          flags: of the case.
          model: of the case's format.
        """
        logits = routing.logits
        below = logits.max(axis=1, keepdims=True, initial=-np.inf) - logits
        variance = routing.scores**2 * model.weights(logit_variance, below)
        if flags.bias:
            variance = variance + model.f32 * routing.unmasked**2
        size = logits.shape[1] // flags.groups[0]
        return cls(
            ids=routing.ids,
            gap=routing.gap,
            logits=logits,
            selection=routing.unmasked,
            deviation=SLACK * model.unit * np.sqrt(variance),
            exact=np.broadcast_to(logit_variance, (len(logits), 1))[:, 0] == 0,
            groups=flags.groups[0],
            groups_kept=flags.groups[1],
            best=min(2, size) if flags.bias else 1,
            rounding=SLACK * model.unit * math.sqrt(model.f32),
        )

    def allowed(self, token: int, ids: np.ndarray) -> bool:
        """Whether a correct router may choose the experts `ids` (K,) for a token, in whatever order."""
        chosen = np.zeros(self.selection.shape[1], bool)
        legal = ids[(ids >= 0) & (ids < len(chosen))]
        chosen[legal] = True
        if chosen.sum() != self.ids.shape[1]:
            return False
        worth, deviation, tied = self._groups(token)
        beaten = _beaten(worth, deviation, tied)
        group = np.arange(len(chosen)) // (len(chosen) // self.groups)
        may_be_kept = beaten.sum(axis=0) < self.groups_kept
        # kept for sure: those that hold a chosen expert, and those that too few others can come before
        kept = (~beaten).sum(axis=1) - 1 < self.groups_kept
        kept[group[chosen]] = True
        if not may_be_kept[group[chosen]].all() or kept.sum() > self.groups_kept:
            return False
        surely = _beaten(self.selection[token], self.deviation[token], self._tied(token))
        return not surely[np.ix_(~chosen & kept[group], chosen)].any()

    def pairs(self, token: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a token's choice hangs on: every chosen expert over every other of the groups kept, groups likewise.

        Exact ties are left out: they have one right order.

        Returns:
          (n,) gaps, none below zero; (n,) the deviation of each gap; (n,) the bound that a gap must exceed to be safe.
        """
        worth, group_deviation, group_tied = self._groups(token)
        kept = np.zeros(self.groups, bool)
        kept[np.lexsort((np.arange(self.groups), -worth))[: self.groups_kept]] = True
        chosen = np.zeros(self.selection.shape[1], bool)
        chosen[self.ids[token]] = True
        others = np.repeat(kept, len(chosen) // self.groups) & ~chosen
        out = []
        for values, deviation, tied, inside, outside in (
            (self.selection[token], self.deviation[token], self._tied(token), chosen, others),
            (worth, group_deviation, group_tied, kept, ~kept),
        ):
            here = np.ix_(inside, outside)
            open_ = ~tied[here]
            gaps = np.subtract.outer(values, values)[here][open_]
            spread = np.hypot.outer(deviation, deviation)[here][open_]
            reach = SIGMAS * np.add.outer(deviation, deviation)[here][open_]
            out.append((gaps, spread, reach))
        gaps, spread, reach = (np.concatenate(part) for part in zip(*out, strict=True))
        return gaps, spread, reach

    def close(self) -> np.ndarray:
        """Tokens whose choice may be worth a look: the others are far from any other choice."""
        return np.flatnonzero(self.gap <= 8 * SIGMAS * self.deviation.max(axis=1, initial=0.0))

    def open(self) -> np.ndarray:
        """(T,) whether a correct router may choose otherwise than the oracle."""
        out = np.zeros(len(self.ids), bool)
        for token in self.close().tolist():
            gaps, _, reach = self.pairs(token)
            out[token] = (gaps <= reach).any()
        return out

    def chance(self) -> np.ndarray:
        """(T,) at most how likely it is that a correct router chooses otherwise: the sum over pairs that may swap."""
        out = np.zeros(len(self.ids))
        for token in self.close().tolist():
            gaps, spread, _ = self.pairs(token)
            out[token] = min(1.0, float((_erfc(gaps / (spread * math.sqrt(2))) / 2).sum())) if len(gaps) else 0.0
        return out

    def _tied(self, token: int) -> np.ndarray:
        """(E, E) which experts tie exactly."""
        return self.exact[token] & _equal(self.logits[token]) & _equal(self.selection[token])

    def _groups(self, token: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(G,) group scores, (G,) their deviations, (G, G) which groups tie exactly."""
        values, deviation, logits = (
            part[token].reshape(self.groups, -1) for part in (self.selection, self.deviation, self.logits)
        )
        first = np.argsort(-values, axis=1, kind="stable")[:, : self.best]
        top, top_logits = np.take_along_axis(values, first, 1), np.take_along_axis(logits, first, 1)
        worth = top.sum(axis=1)
        # errors inside a group may be alike, so they are added; one more for the addition itself
        off = np.take_along_axis(deviation, first, 1).sum(axis=1) + (self.best - 1) * self.rounding * np.abs(worth)
        tied = self.exact[token] & np.logical_and.reduce(
            [_equal(top[:, n]) & _equal(top_logits[:, n]) for n in range(self.best)]
        )
        return worth, off, tied


def most(chances: np.ndarray) -> int:
    """The count of events that is exceeded with a chance of `FALSE_ALARM` at most, if each has the chance given.

    The exact distribution of a sum of independent events, one factor at a time.
    """
    distribution = np.ones(1)
    for chance in chances[chances > NEGLIGIBLE]:
        distribution = np.convolve(distribution, (1 - chance, chance))
    at_least = np.cumsum(distribution[::-1])[::-1]
    return int(np.flatnonzero(np.append(at_least[1:], 0.0) <= FALSE_ALARM)[0])


def _equal(values: np.ndarray) -> np.ndarray:
    return values[:, None] == values[None, :]


def _beaten(values: np.ndarray, deviation: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """(n, n) whether the first is sure to come before the second: by more than both bounds, or as the lower tied."""
    apart = np.subtract.outer(values, values) > SIGMAS * np.add.outer(deviation, deviation)
    lower = np.less.outer(np.arange(len(values)), np.arange(len(values)))
    return np.where(tied, lower, apart)
