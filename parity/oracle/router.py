"""The router, token by token, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parity.case import Flags
from parity.oracle.activation import sigmoid


@dataclass(frozen=True)
class Routing:
    """What the router decided, and by how much."""

    logits: np.ndarray
    """(T, E) float64, what it was made from."""
    scores: np.ndarray
    """(T, E) what weights are taken from."""
    selection: np.ndarray
    """(T, E) what experts are chosen by: scores plus bias, -inf in groups that were not kept."""
    unmasked: np.ndarray
    """(T, E) the same in all groups."""
    ids: np.ndarray
    """(T, K) best first."""
    weights: np.ndarray
    """(T, K)."""
    gap: np.ndarray
    """(T,) how far the choice is from another one: the smaller of the gap between the last chosen expert and the
    first not chosen, and the same for groups. Infinite where there is no other choice."""


def score(logits: np.ndarray, flags: Flags) -> np.ndarray:
    """(T, E) scores: the sigmoid of each logit (T, E), or the softmax over all of a token's."""
    if flags.sigmoid:
        return sigmoid(logits)
    scores = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    return scores / scores.sum(axis=1, keepdims=True)


def weigh(scores: np.ndarray, ids: np.ndarray, flags: Flags) -> np.ndarray:
    """Weights (T, K) of the chosen experts: their scores, renormalized and scaled as the flags say."""
    weights = np.take_along_axis(scores, ids, axis=1)
    if flags.renorm:
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    return weights * flags.scale


def route(logits: np.ndarray, bias: np.ndarray | None, *, top_k: int, flags: Flags) -> Routing:
    """Choose `top_k` of E experts for each of T tokens.

    Args:
      logits: (T, E).
      bias: (E,) added to the scores for the choice alone, or None.
    """
    logits = logits.astype(np.float64)
    tokens, experts = logits.shape
    scores = score(logits, flags)
    selection = scores + (0 if bias is None else bias.astype(np.float64))
    unmasked = selection.copy()
    ids = np.zeros((tokens, top_k), np.int64)
    gap = np.full(tokens, np.inf)
    groups, kept = flags.groups
    size = experts // groups
    for t in range(tokens):
        choice = selection[t]
        if groups > 1:
            best = 1 if bias is None else min(2, size)
            group_score = [np.sort(choice[g * size : (g + 1) * size])[::-1][:best].sum() for g in range(groups)]
            order = sorted(range(groups), key=lambda g: (-group_score[g], g))
            for g in order[kept:]:
                choice[g * size : (g + 1) * size] = -np.inf
            if kept < groups:
                gap[t] = group_score[order[kept - 1]] - group_score[order[kept]]
        order = np.lexsort((np.arange(experts), -choice))  # equal ones: the lower id first
        ids[t] = order[:top_k]
        if top_k < experts and np.isfinite(choice[order[top_k]]):
            gap[t] = min(gap[t], choice[order[top_k - 1]] - choice[order[top_k]])
    return Routing(logits, scores, selection, unmasked, ids, weigh(scores, ids, flags), gap)
