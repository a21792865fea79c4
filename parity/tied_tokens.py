"""Tokens and router weights whose choice of experts is close: exact ties (`ties`), and ties but for a rounding
(`nearties`).

    P tokens of the pool that a case's tokens are picked from   D hidden   E experts   G groups   K experts per token

`ties`. Experts fall into classes, and those of one class always get equal logits: given ones are copied, computed ones
come from equal rows of the gate and tokens on a coarse grid, so that every product is exact in float32 and no order
of the sum can tell the rows apart. Equal groups are made of equal classes. Every fourth token has all logits equal. A
bias is the same within a class, but for the last member of a class of three, which it lifts out of its tie.

`nearties`. The last chosen expert (or the last group kept) and the next one are moved to within the bound of each
other, by a gap drawn evenly from 0 to the bound: by the next one's logit where logits are given, else by a token's
small coordinates. With a bias it is score plus bias that meet. Other tokens, without a bias, have logits that differ
but whose float32 scores are the same: all near zero, or so large that every sigmoid is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from parity.case import Case, Flags
from parity.oracle.router import route, score
from parity.ties import Choices
from parity.tolerance import SIGMAS, ErrorModel, exact_products

MARGIN = 1e-3
"""Relative gap between the last chosen expert and the next one: 10,000 times float32's rounding."""

GRID_BITS = 3
"""Tokens and gate rows on a grid have so many bits after the point, in units of their RMS."""
GRID_REACH = 4.0
"""And no value beyond this."""
TINY = 1e-9
"""Logits of this size differ, and their scores do not."""
SATURATED = 24.0
"""The sigmoid of this rounds to 1."""
SECANT_STEPS, SECANT_START, SECANT_LONGEST = 10, 1e-3, 2.0
COORDINATES = 2
"""A token's coordinates that are set last: each takes up what rounding left of the gap, 2^-9 of it in bfloat16."""

LEVEL = 1
"""Kind of a token whose logits are all equal (`ties`)."""
EXPERTS, GROUPS, NEAR_ZERO, SATURATING = range(4)
"""Kinds of tokens of `nearties`: what is close."""


def classes(case: Case, rng: np.random.Generator) -> np.ndarray:
    """(E,) the class of each expert: 2, 1 and 3 members in turn, so that the K-th choice can fall inside some of them.

    With groups it is groups that come in such classes; those of one class hold the same experts in another order.

    Example: 4 groups of 2 in group classes of 2, 1 and 1, groups 0 and 3 alike, may give [0 1, 2 3, 5 4, 1 0].
    """
    groups = case.flags.groups[0]
    if groups == 1:
        return _spread(case.experts, rng)
    size = case.experts // groups
    inside = _spread(size, rng) if size > 2 else np.arange(size)
    return np.concatenate([kind * size + rng.permutation(inside) for kind in _spread(groups, rng)])


def _spread(count: int, rng: np.random.Generator) -> np.ndarray:
    sizes: list[int] = []
    while sum(sizes) < count:
        sizes.append((2, 1, 3)[len(sizes) % 3])
    return rng.permutation(np.repeat(np.arange(len(sizes)), sizes)[:count])


def tied_bias(bias: np.ndarray, kinds: np.ndarray, spread: float, *, grouped: bool) -> np.ndarray:
    """(E,) the bias of one expert of each class for all of it; without groups the last of three has `spread` more."""
    out = bias[_first(kinds)]
    for kind in np.unique(kinds) if not grouped else ():
        members = np.flatnonzero(kinds == kind)
        if len(members) == 3:
            out[members[-1]] += np.float32(spread)
    return out


def tie(
    x: np.ndarray, gate: np.ndarray, logits: np.ndarray, kinds: np.ndarray, *, computed: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (P, D), gate (E, D), logits (P, E) in which experts of a class tie, and each token's kind (P,)."""
    of = np.where(np.arange(len(x)) % 4 == 3, LEVEL, 0)
    logits = logits[:, _first(kinds)]
    logits[of == LEVEL] = logits[of == LEVEL][:, :1]
    if computed:
        x, gate = on_grid(x), on_grid(gate[_first(kinds)])
        # level tokens lie in columns where the gate is zero
        blind = _blind(x.shape[1])
        gate[:, blind] = 0
        x[of == LEVEL] = np.where(blind, 2 * x[of == LEVEL], 0)
        assert exact_products(x, gate).all()
        logits = (x.astype(np.float64) @ gate.astype(np.float64).T).astype(np.float32)
    return x, gate, logits, of


def on_grid(values: np.ndarray) -> np.ndarray:
    """Values rounded to a grid of 2^-GRID_BITS of their RMS, a power of two, and cut at GRID_REACH of it."""
    rms = np.float32(2.0 ** math.floor(math.log2(max(np.sqrt(np.mean(values**2)), 1e-30))))
    steps = np.round(values / rms * 2**GRID_BITS)
    return np.clip(steps, -GRID_REACH * 2**GRID_BITS, GRID_REACH * 2**GRID_BITS) * (rms / np.float32(2**GRID_BITS))


def _blind(hidden: int) -> np.ndarray:
    """(D,) columns that the gate does not see: the last quarter."""
    return np.arange(hidden) >= hidden - hidden // 4


def _first(kinds: np.ndarray) -> np.ndarray:
    """(E,) the lowest expert of each expert's class."""
    return np.array([int(np.argmax(kinds == kind)) for kind in kinds])


def near(
    case: Case,
    rng: np.random.Generator,
    x: np.ndarray,
    gate: np.ndarray,
    logits: np.ndarray,
    bias: np.ndarray | None,
    rounded: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (P, D), gate (E, D), logits (P, E) with choices within the bound of another, and each token's kind (P,).

    `rounded` rounds to the case's dtype. What does not work out (another expert got in between) is for the caller to
    leave out: see `settled`.
    """
    of = _near_kinds(case, len(x), bias)
    if case.flags.gate:
        x, gate = _near_zero(x, gate, of == NEAR_ZERO, rounded)
        logits = products(x, gate)
    else:
        factor, shift = np.where(of == NEAR_ZERO, TINY, 1), np.where(of == SATURATING, SATURATED, 0)
        logits = (logits * factor[:, None] + shift[:, None]).astype(np.float32)
    close = _Close.of(case, choices(case, x, gate, logits, bias), of, bias, rng.uniform(0, 1, len(x)))
    meeting = (of == EXPERTS) | (of == GROUPS)
    if not case.flags.gate:
        wide = logits.astype(np.float64)
        alone = np.arange(case.experts) == close.other[:, None]
        found = _secant(lambda value: close.excess(np.where(alone, value[:, None], wide)), _at(wide, close.one))
        return x, gate, np.where(meeting[:, None] & alone, found[:, None], wide).astype(np.float32), of
    x = np.where(meeting[:, None], _brought_together(x, gate, close, rounded), x).astype(np.float32)
    return x, gate, products(x, gate), of


def settled(choices: Choices, of: np.ndarray, *, exact: bool) -> np.ndarray:
    """(P,) tokens that are what they should be: tied, or close to one other choice and far from all others.

    Args:
      choices: of the tokens as they came out.
      of: (P,) their kinds.
      exact: whether they are those of `ties`, or those of `nearties`.
    """
    out = np.zeros(len(of), bool)
    for token in range(len(of)):
        gaps, _, reach = choices.pairs(token)
        last = choices.selection[token, choices.ids[token, -1]]
        far = gaps > MARGIN * abs(last)
        if exact:
            out[token] = far.all() and (choices.gap[token] == 0 or of[token] == LEVEL)
        elif of[token] in (EXPERTS, GROUPS):
            out[token] = (~far).sum() == 1 and (gaps <= reach).sum() == 1
        else:
            out[token] = (gaps <= reach).any()
    return out


def in_turn(of: np.ndarray, unfit: np.ndarray) -> np.ndarray:
    """(P,) an order in which kinds take turns, those that came first first and the unfit last; `LEVEL` every fourth."""
    turn = np.zeros(len(of))
    for kind in np.unique(of):
        here = of == kind
        turn[here] = np.arange(here.sum()) * (here.sum() ** -1.0)
    return np.lexsort((np.arange(len(of)), turn, unfit))


def products(x: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """(P, E) logits in float64."""
    return x.astype(np.float64) @ gate.astype(np.float64).T


def choices(case: Case, x: np.ndarray, gate: np.ndarray, logits: np.ndarray, bias: np.ndarray | None) -> Choices:
    """The oracle's choices for tokens that are not a case's arrays yet."""
    model, variance = ErrorModel(case.format), np.zeros((len(x), 1))
    if case.flags.gate:
        rows, weights = x.astype(np.float64), gate.astype(np.float64)
        each = model.matmul((rows**2).sum(1, keepdims=True), (weights**2).sum(1), logits, x.shape[1])
        variance = np.where(exact_products(rows, weights)[:, None], 0.0, each.max(axis=1, keepdims=True))
    routing = route(logits, bias, top_k=case.top_k, flags=case.flags)
    return Choices.of(routing, variance, case.flags, model)


@dataclass(frozen=True)
class _Close:
    """Two experts of each token that are to be chosen by nearly equal values, or that lead two such groups."""

    flags: Flags
    bias: np.ndarray | None
    one: np.ndarray
    """(P,) the last chosen expert; or the best of the last group kept."""
    other: np.ndarray
    """(P,) the next one; or the best of the next group."""
    kind: np.ndarray
    """(P,) kinds."""
    gap: np.ndarray
    """(P,) by how much the first is to be ahead."""
    best: int

    @classmethod
    def of(cls, case: Case, found: Choices, of: np.ndarray, bias: np.ndarray | None, share: np.ndarray) -> _Close:
        tokens, groups = len(of), case.flags.groups[0]
        by_group = found.selection.reshape(tokens, groups, -1)
        leader = by_group.argmax(axis=2) + np.arange(groups) * by_group.shape[2]
        worth = np.sort(by_group, axis=2)[:, :, ::-1][:, :, : found.best].sum(axis=2)
        ranked = np.argsort(-worth, axis=1, kind="stable")
        kept = case.flags.groups[1]
        dropped = np.ones((tokens, groups), bool)
        np.put_along_axis(dropped, ranked[:, :kept], False, axis=1)
        rest = np.where(np.repeat(dropped, by_group.shape[2], axis=1), -np.inf, found.selection)
        np.put_along_axis(rest, found.ids, -np.inf, axis=1)
        one, other = found.ids[:, -1], rest.argmax(axis=1)
        if kept < groups:
            one = np.where(of == GROUPS, _at(leader, ranked[:, kept - 1]), one)
            other = np.where(of == GROUPS, _at(leader, ranked[:, kept]), other)
        gap = share * SIGMAS * (_at(found.deviation, one) + _at(found.deviation, other))
        return cls(case.flags, bias, one, other, of, gap, found.best)

    def excess(self, logits: np.ndarray) -> np.ndarray:
        """(P,) how much further apart than wanted the two are for these logits (P, E)."""
        values = score(logits, self.flags)
        if self.bias is not None:
            values = values + self.bias
        apart = _at(values, self.one) - _at(values, self.other)
        groups = self.flags.groups[0]
        by_group = values.reshape(len(values), groups, -1)
        worth = np.sort(by_group, axis=2)[:, :, ::-1][:, :, : self.best].sum(axis=2)
        size = by_group.shape[2]
        groups_apart = _at(worth, self.one // size) - _at(worth, self.other // size)
        return np.where(self.kind == GROUPS, groups_apart, apart) - self.gap


def _near_kinds(case: Case, count: int, bias: np.ndarray | None) -> np.ndarray:
    groups, kept = case.flags.groups
    kinds = 3 * ([EXPERTS] * (kept * (case.experts // groups) > case.top_k) + [GROUPS] * (kept < groups))
    if bias is None:  # which would decide
        kinds += [NEAR_ZERO] + [SATURATING] * (case.flags.sigmoid and not case.flags.gate)
    return np.array(kinds)[np.arange(count) % len(kinds)]


def _near_zero(
    x: np.ndarray, gate: np.ndarray, tiny: np.ndarray, rounded: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of which the `tiny` ones lie, but for a trace, in columns that the gate no longer sees."""
    blind = _blind(x.shape[1])
    if not tiny.any():
        return x, gate
    return rounded(np.where(tiny[:, None], np.where(blind, 2 * x, TINY * x), x).astype(np.float32)), gate * ~blind


def _brought_together(
    x: np.ndarray, gate: np.ndarray, close: _Close, rounded: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """(P, D) tokens moved along the difference of two experts' gate rows until they are as close as wanted.

    Rounding the token spoils it again, so the coordinates that tell the two apart best are kept out at first, and
    then take up what is left, one after the other: each is small, and so is its rounding.
    """
    difference = (gate[close.one] - gate[close.other]).astype(np.float64)
    last = np.argsort(-np.abs(difference), axis=1)[:, :COORDINATES]
    moved, along, columns = x.astype(np.float64), difference, np.arange(x.shape[1])
    kept_out = (columns == last[:, :, None]).any(axis=1)
    moved, along = np.where(kept_out, 0, moved), np.where(kept_out, 0, along)
    for step in range(COORDINATES + 1):
        if step:
            along = (columns == last[:, step - 1, None]).astype(np.float64)
        base, slope = products(moved, gate), products(along, gate)
        found = _secant(lambda s, base=base, slope=slope: close.excess(base + s[:, None] * slope), np.zeros(len(x)))
        moved = rounded((moved + found[:, None] * along).astype(np.float32)).astype(np.float64)
    return moved


def _secant(function: Callable[[np.ndarray], np.ndarray], start: np.ndarray) -> np.ndarray:
    """Zeros of many functions at once; where there is none, anything finite."""
    before, now = start - SECANT_START, start
    value_before, value = function(before), function(now)
    for _ in range(SECANT_STEPS):
        change = value - value_before
        step = np.divide(value * (now - before), change, out=np.zeros_like(now), where=np.abs(change) > 1e-300)
        before, value_before = now, value
        now = now - np.clip(step, -SECANT_LONGEST, SECANT_LONGEST)
        value = function(now)
    return now


def _at(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """(P,) one value of each row."""
    return np.take_along_axis(values, index[:, None], axis=1)[:, 0]
