"""A float32 reference for some rows of every result, in NumPy; only products with experts' weights run on the device.

Sizes: S sampled rows, D hidden, F intermediate, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from parity.bench import draws
from parity.bench.shapes import Shape

SAMPLES, POOL = 4, 64
BOUND = {"gather": 0.0}
"""Largest error that a result may have, over the norm of the row."""
ROUNDINGS, UNIT = 6, 2.0**-8
"""bfloat16 is rounded to at most this often on the way (gate/up, activation, product, weight, sum, output), by at most
half a unit each; their sum in one direction is the bound of everything that multiplies."""

Product = Callable[[str, int, np.ndarray], np.ndarray]
"""(name of the weights, expert, (S, columns) float32) -> (S, rows) float32, gate rows before up rows."""


def bound(what: str) -> float:
    return BOUND.get(what, ROUNDINGS * UNIT / 2)


def silu_pair(inner: np.ndarray) -> np.ndarray:
    gate, up = np.split(inner, 2, axis=-1)
    with np.errstate(over="ignore"):  # exp of a very negative gate: the quotient is 0, as it should be
        return gate / (1 + np.exp(-gate)) * up


def route(x: np.ndarray, gate: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids (S, K), renormalized softmax weights (S, K), and the gap of logits behind the last chosen expert (S,)."""
    logits = x.astype(np.float64) @ gate.astype(np.float64).T
    order = np.argsort(-logits, axis=1, kind="stable")
    ranked = np.take_along_axis(logits, order, 1)
    weights = np.exp(ranked[:, :top_k] - ranked[:, :1])
    gap = ranked[:, top_k - 1] - ranked[:, top_k] if top_k < logits.shape[1] else np.full(len(x), np.inf)
    return order[:, :top_k], (weights / weights.sum(1, keepdims=True)).astype(np.float32), gap


def layer(x: np.ndarray, ids: np.ndarray, weights: np.ndarray, product: Product) -> np.ndarray:
    """The layer on S tokens that are routed already: (S, D) float32."""
    out = np.zeros_like(x, dtype=np.float32)
    for expert in np.unique(ids):
        token, slot = np.nonzero(ids == expert)
        y = product("down", int(expert), silu_pair(product("gate_up", int(expert), x[token])))
        out[token] += weights[token, slot][:, None] * y
    return out


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest error of a row over its norm."""
    if found.shape != expected.shape:
        raise ValueError(f"the result has rows of shape {found.shape}, expected {expected.shape}")
    error = np.linalg.norm(found.astype(np.float64) - expected, axis=1)
    norm = np.linalg.norm(expected.astype(np.float64), axis=1)
    return float(np.max(error / np.maximum(norm, 1e-30)))


def spread(count: int, size: int) -> np.ndarray:
    """Up to `count` indices over a range of `size`, first and last among them."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).round().astype(np.int64))


def error(
    what: str, shape: Shape, lab: Any, layout: str, arguments: tuple, result: Any, routing: draws.Routing
) -> float:
    """How far some rows of a timed result are off.

    Args:
      what: the work, with `arguments` as in `candidates/base.py` and what came out.
      lab: reads rows (`rows`), multiplies in float32 (`product`), and looks for NaN (`finite`).
      layout: of the experts' weights.
      routing: of these arguments.

    Returns:
      The largest error of a sampled row over its norm; infinity where any row holds NaN or infinity, or an id differs.
    """
    if not all(lab.finite(array) for array in (result[:2] if what == "routing" else [result])):
        return float("inf")
    weights_at = {"layer": {"gate_up": 2, "down": 3}}.get(what, {"gate_up": 1, "down": 1})

    def product(name: str, expert: int, x: np.ndarray) -> np.ndarray:
        return lab.product(
            arguments[weights_at[name]], expert, x, layout if name == "gate_up" or layout == "transposed" else "stored"
        )

    if what in ("layer", "routing"):
        token = spread(POOL, shape.tokens)
        x, gate = lab.rows(arguments[0], token), lab.rows(arguments[1], np.arange(shape.experts))
        ids, weights, gap = route(x, gate, shape.top_k)
        # a choice that rounding could swap would say nothing
        safe = np.sort(np.argsort(-gap, kind="stable")[:SAMPLES])
        token, x, ids, weights = token[safe], x[safe], ids[safe], weights[safe]
        if what == "layer":
            return worst(lab.rows(result, token), layer(x, ids, weights, product))
        found = lab.rows(result[0], token).astype(np.int64)
        return worst(lab.rows(result[1], token), weights) if np.array_equal(found, ids) else float("inf")
    if what == "gather":
        row = spread(POOL, shape.rows)
        return worst(lab.rows(result, row), lab.rows(arguments[0], routing.row_token[row]))
    if what == "combine":
        token = spread(SAMPLES, shape.tokens)
        parts = lab.rows(arguments[0], routing.position[token].reshape(-1)).reshape(len(token), shape.top_k, -1)
        return worst(lab.rows(result, token), (parts * routing.weights[token][:, :, None]).sum(1))
    row = spread(SAMPLES, shape.rows)
    expert = np.searchsorted(np.cumsum(routing.sizes), row, side="right")
    x, name = lab.rows(arguments[0], row), "down" if what == "down" else "gate_up"
    expected = np.concatenate([product(name, int(e), x[i : i + 1]) for i, e in enumerate(expert)])
    return worst(lab.rows(result, row), silu_pair(expected) if what == "gate_up" else expected)
