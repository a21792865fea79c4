"""The whole layer, naive, in float64, on one rank, from the same arrays as the frameworks get.

    T tokens   D hidden   W width of an expert's input and output (D, or the latent's)   F intermediate
    E experts  K experts per token   R rows of one expert

It knows no mesh, but for what a transport drops: a correct layer gives this result on every one of them. Beside each
value goes the variance of the
error that correct arithmetic in the case's dtype makes on the way to it (see parity/tolerance.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from parity.arrays import ArrayRef, float32_of_bits, values
from parity.case import Case
from parity.delivery import kept
from parity.oracle.activation import activate, sigmoid, split
from parity.oracle.router import Routing, route, weigh
from parity.tolerance import ErrorModel

STEP = 1e-6
"""Step of the one-sided differences that measure an activation's slope."""
RANKS = 8
"""Partial sums that a reduction may add, for the float32 model: the reference is one for every mesh."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The exact answer, and how far from it a correct framework may be."""

    y: np.ndarray
    """(T, D)."""
    variance: np.ndarray
    """(T, D) of the error, in the model's units."""
    tp_variance: np.ndarray
    """(T, D) what is added when each tp rank rounds its own partial sum."""
    logits: np.ndarray | None
    """(T, E), None when ids were given."""
    logit_variance: np.ndarray
    """(T, 1) of the logits, absolute."""
    routing: Routing | None
    ids: np.ndarray
    """(T, K) chosen experts, best first."""
    weights: np.ndarray
    """(T, K)."""
    weight_variance: np.ndarray
    """(T, K) relative variance of the weights."""
    slot_norm: np.ndarray
    """(T, K) norm of each chosen expert's part of the output."""
    kept: np.ndarray
    """(T, K) which choices reach their expert; others are dropped by the transport and add nothing."""
    replay: Callable[[np.ndarray], Reference]
    """The reference for another choice of experts (T, K): a framework's own, where the oracle's was within rounding."""


@dataclass(frozen=True)
class _Product:
    """Rows that went through a two-layer network: exact, the error's variance, and the sum of squared terms."""

    y: np.ndarray
    variance: np.ndarray
    terms2: np.ndarray


def reference(case: Case, arrays: Mapping[str, ArrayRef], *, ids: np.ndarray | None = None) -> Reference:
    """The layer's exact result for the case's arrays.

    Args:
      case: what to compute.
      arrays: every array of the case by name.
      ids: (T, K) experts to use in place of the oracle's own choice: the replay of a framework's choice.
    """
    model = ErrorModel(case.format)
    x = _load(arrays["x"])
    tokens, hidden = x.shape

    logits, logit_variance, routing = None, np.zeros((tokens, 1)), None
    if case.flags.ids:
        own = np.asarray(arrays["topk_ids"].open(), np.int64)
        weights = _load(arrays["topk_weights"])
        weight_variance = np.full(weights.shape, model.f32)
    else:
        logits = _load(arrays["router_logits"]) if "router_logits" in arrays else None
        if logits is None:
            gate = _load(arrays["router.gate"])
            logits = x @ gate.T
            each = model.matmul(_norm2(x), (gate**2).sum(1), logits, hidden)
            logit_variance = each.max(axis=1, keepdims=True, initial=0.0)
        bias = _load(arrays["router.bias"]) if "router.bias" in arrays else None
        routing = route(logits, bias, top_k=case.top_k, flags=case.flags)
        own, weights = routing.ids, routing.weights
        if ids is not None:
            weights = weigh(routing.scores, ids, case.flags)
        below = logits.max(axis=1, keepdims=True, initial=-np.inf) - np.take_along_axis(
            logits, own if ids is None else ids, axis=1
        )
        weight_variance = model.weights(logit_variance, below)
    ids = own if ids is None else ids

    reached = kept(case, ids)
    inputs, input_variance = x, None
    if case.flags.latent:
        inputs, input_variance = _project(x, None, _load(arrays["latent.down"]), model)
        input_variance = input_variance + model.rounding(inputs)

    latent_up = _load(arrays["latent.up"]) if case.flags.latent else None
    routed = np.zeros((tokens, case.expert_width))
    variance = np.zeros_like(routed)
    tp_variance = np.zeros_like(routed)
    squares = np.zeros_like(routed)
    slot_norm = np.zeros(ids.shape)
    for expert in range(case.experts):
        token, slot = np.nonzero((ids == expert) & reached)
        if not len(token):
            continue
        w = weights[token, slot][:, None]
        w_variance = weight_variance[token, slot][:, None]
        rows, rows_variance = inputs[token], None if input_variance is None else input_variance[token]
        if case.flags.weightin:
            rows = rows * w
            rows_variance = (0 if rows_variance is None else rows_variance * w**2) + rows**2 * (1 + w_variance)
            w, w_variance = np.ones_like(w), np.zeros_like(w)
        out = _network(
            rows,
            rows_variance,
            _Weights.of(arrays, "experts", expert),
            case,
            model,
        )
        part = w * out.y
        np.add.at(routed, token, part)
        np.add.at(squares, token, part**2)
        np.add.at(variance, token, w**2 * (out.variance + out.y**2 * (1 + w_variance)))
        np.add.at(tp_variance, token, w**2 * np.maximum(out.terms2 - out.y**2, 0))
        slot_norm[token, slot] = np.linalg.norm(part if latent_up is None else part @ latent_up.T, axis=1)
    variance += model.sum_f32(squares, case.top_k + RANKS)

    if latent_up is not None:
        variance, tp_variance = variance + model.rounding(routed), tp_variance @ (latent_up**2).T
        routed, variance = _project(routed, variance, latent_up, model)
    y = routed
    if case.flags.shared:
        out = _network(x, None, _Weights.of(arrays, "shared", None), case, model)
        part, part_variance = out.y, out.variance
        if case.flags.sharedgate:
            gate = _load(arrays["shared.gate"])
            logit = x @ gate.T
            scale = sigmoid(logit)
            relative = model.weights(model.matmul(_norm2(x), (gate**2).sum(1), logit, hidden), np.zeros_like(logit))
            part, part_variance = scale * part, scale**2 * (part_variance + part**2 * relative)
        y, variance = y + part, variance + part_variance
    return Reference(
        y=y,
        variance=variance + model.rounding(y),
        tp_variance=tp_variance,
        logits=logits,
        logit_variance=logit_variance,
        routing=routing,
        ids=ids,
        weights=weights,
        weight_variance=weight_variance,
        slot_norm=slot_norm,
        kept=reached,
        replay=lambda ids: reference(case, arrays, ids=ids),
    )


@dataclass(frozen=True)
class _Weights:
    """One expert's (or the shared expert's) weights, float32 as stored."""

    gate_up: np.ndarray
    down: np.ndarray
    gate_up_bias: np.ndarray | None
    down_bias: np.ndarray | None

    @classmethod
    def of(cls, arrays: Mapping[str, ArrayRef], owner: str, expert: int | None) -> _Weights:
        def part(name: str) -> np.ndarray | None:
            ref = arrays.get(f"{owner}.{name}")
            if ref is None:
                return None
            return values(ref) if expert is None else _one(ref, expert)

        gate_up, down = part("gate_up"), part("down")
        assert gate_up is not None
        assert down is not None
        return cls(gate_up, down, part("gate_up_bias"), part("down_bias"))


def _network(
    rows: np.ndarray, rows_variance: np.ndarray | None, weights: _Weights, case: Case, model: ErrorModel
) -> _Product:
    """Gate/up, activation, down for some rows of one expert."""
    w1 = weights.gate_up.astype(np.float64)
    pre = rows @ w1.T
    w1_squared = weights.gate_up**2
    pre_variance = model.matmul(_norm2(rows), w1_squared.sum(1), pre, rows.shape[1])
    if rows_variance is not None:
        pre_variance = pre_variance + rows_variance.astype(np.float32) @ w1_squared.T
    if weights.gate_up_bias is not None:
        pre = pre + weights.gate_up_bias.astype(np.float64)
    # a framework may round gate and up to the dtype before the activation, or keep them in float32
    pre_variance = pre_variance + model.rounding(pre)

    layout = {"gated": case.gated, "interleaved": case.flags.interleaved}
    gate, up = split(pre, **layout)
    gate_variance, up_variance = split(pre_variance, **layout)
    h = activate(gate, up, case.flags)
    h_variance = gate_variance * ((activate(gate + STEP, up, case.flags) - h) / STEP) ** 2
    if up is not None and up_variance is not None:
        h_variance = h_variance + up_variance * ((activate(gate, up + STEP, case.flags) - h) / STEP) ** 2
    h_variance = h_variance + model.activation(h) + model.rounding(h)

    y = h @ weights.down.astype(np.float64).T
    w2_squared = weights.down**2
    variance = model.matmul(_norm2(h), w2_squared.sum(1), y, h.shape[1])
    variance = variance + h_variance.astype(np.float32) @ w2_squared.T
    terms2 = (h**2).astype(np.float32) @ w2_squared.T
    if weights.down_bias is not None:
        y = y + weights.down_bias.astype(np.float64)
    return _Product(y, variance, terms2)


def _project(
    rows: np.ndarray, rows_variance: np.ndarray | None, weights: np.ndarray, model: ErrorModel
) -> tuple[np.ndarray, np.ndarray]:
    """rows @ weights.T and the variance of its error."""
    out = rows @ weights.T
    variance = model.matmul(_norm2(rows), (weights**2).sum(1), out, rows.shape[1])
    if rows_variance is not None:
        variance = variance + rows_variance @ (weights**2).T
    return out, variance


def _norm2(rows: np.ndarray) -> np.ndarray:
    return (rows**2).sum(axis=1, keepdims=True)


def _load(ref: ArrayRef) -> np.ndarray:
    return values(ref).astype(np.float64)


def _one(ref: ArrayRef, index: int) -> np.ndarray:
    """One expert's slice of a stacked array, without reading the others."""
    stored = ref.open()[index]
    return float32_of_bits(stored) if ref.dtype == "bfloat16" else np.asarray(stored)
