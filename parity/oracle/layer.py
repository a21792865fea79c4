"""The whole layer, naive, in float64, on one rank, from the same arrays as the frameworks get.

    T tokens   D hidden   W width of an expert's input and output (D, or the latent's)   E experts   K experts per token

It knows no mesh, but for what a transport drops: a correct layer gives this result on every one of them. Beside each
value goes the variance of the error that correct arithmetic in the case's dtype makes on the way to it (see
parity/tolerance.py). What a stage hands to the next is up to `hands` (parity/oracle/hands.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from parity.arrays import ArrayRef, values
from parity.case import Case
from parity.delivery import kept
from parity.oracle.hands import Hands
from parity.oracle.network import Weights, activation, down, gate_up, shared_expert
from parity.oracle.router import Routing, route, weigh
from parity.oracle.value import Value, load, product
from parity.tolerance import exact_products


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
    choice_variance: np.ndarray
    """(T, 1) of the logits that the choice was made from: the same, or 0 where they are a lesson."""
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
    stages: Mapping[str, Value]
    """Each stage's result as `Hands.kept` has it; empty unless asked for."""
    taught: Callable[[frozenset[str]], Reference] | None = None
    """The same layer taught by the lessons, but for some stages; None unless `parity.oracle.lessons.teach` made it."""

    @property
    def nbytes(self) -> int:
        values = self.stages.values()
        arrays = [part for value in values for part in (value.exact, value.variance, value.tp, value.bias)]
        return sum(array.nbytes for array in arrays if array is not None)


def reference(
    case: Case, arrays: Mapping[str, ArrayRef], *, ids: np.ndarray | None = None, hands: Hands | None = None
) -> Reference:
    """The layer's exact result for the case's arrays.

    Args:
      case: what to compute.
      arrays: every array of the case by name.
      ids: (T, K) experts to use in place of the oracle's own choice: the replay of a framework's choice.
      hands: between the stages; None: free, and nothing is kept.
    """
    hands = Hands(case, keeps=False) if hands is None else hands
    model, x = hands.model, load(values(arrays["x"]))
    logits, (logit_variance, choice_variance), routing, own, own_weights = _choose(case, arrays, x, ids, hands)
    chosen, weights = hands.choice(own, own_weights)
    reached = kept(case, chosen)

    inputs = x
    if case.flags.latent:
        inputs = hands.on("latent_in", product(x, values(arrays["latent.down"]), model))
    hands.keep("inputs", inputs)
    combined, squares, slot_norm = _experts(case, arrays, inputs, chosen, weights, reached, hands)
    routed = hands.on("combine", combined)
    # parts of a lesson are of one sign, and smaller than it
    parts = model.across(routed.exact**2 if hands.teaches else squares)
    routed = Value(routed.exact, routed.variance, parts if routed.tp is None else routed.tp + parts)
    if case.flags.latent:
        # rounded only here, where the sum over ranks is complete
        routed = product(routed.rounded(model), values(arrays["latent.up"]), model)
        routed = hands.on("latent_out", routed)
    total = routed
    if case.flags.shared:
        shared = hands.on("shared", shared_expert(x, arrays, case, model))
        exact = routed.exact + shared.exact
        parts = model.across(shared.exact**2 + (routed.exact**2 if hands.teaches else 0))
        tp = parts if routed.tp is None else routed.tp + parts
        total = Value(exact, routed.before + shared.before + model.f32 * exact**2, tp)
    hands.keep("reduce", total)
    y = total.rounded(model)
    return Reference(
        y=y.exact,
        variance=y.before,
        tp_variance=np.zeros_like(y.exact) if y.tp is None else y.tp,
        logits=logits,
        logit_variance=logit_variance,
        choice_variance=choice_variance,
        routing=routing,
        ids=own,
        weights=own_weights.exact,
        weight_variance=own_weights.before,
        slot_norm=slot_norm,
        kept=reached,
        replay=lambda ids: reference(case, arrays, ids=ids, hands=Hands(case, keeps=hands.keeps)),
        stages=hands.kept,
    )


def _choose(
    case: Case, arrays: Mapping[str, ArrayRef], x: Value, ids: np.ndarray | None, hands: Hands
) -> tuple[np.ndarray | None, tuple[np.ndarray, np.ndarray], Routing | None, np.ndarray, Value]:
    """Logits, their variance and that of the logits handed on, the routing, ids (T, K), weights (T, K) and theirs."""
    model, none = hands.model, np.zeros((len(x.exact), 1))
    if case.flags.ids:
        weights = values(arrays["topk_weights"]).astype(np.float64)
        own = np.asarray(arrays["topk_ids"].open(), np.int64)
        return None, (none, none), None, own if ids is None else ids, Value(weights, np.full(weights.shape, model.f32))
    if case.flags.gate:
        gate = values(arrays["router.gate"])
        logits = product(x, gate, model)
        inexact = ~exact_products(x.exact, gate)[:, None]
        logits = Value(logits.exact, logits.before * inexact)
    else:
        logits = load(values(arrays["router_logits"]))
    handed = hands.on("logits", logits)
    bias = values(arrays["router.bias"]) if case.flags.bias else None
    routing = route(handed.exact, bias, top_k=case.top_k, flags=case.flags)
    own = routing.ids if ids is None else ids
    weights = routing.weights if ids is None else weigh(routing.scores, ids, case.flags)
    below = handed.exact.max(axis=1, keepdims=True, initial=-np.inf) - np.take_along_axis(handed.exact, own, axis=1)
    variances = tuple(value.before.max(axis=1, keepdims=True, initial=0.0) for value in (logits, handed))
    relative = model.weights(variances[1], below)
    return logits.exact, variances, routing, own, Value(weights, relative)


def _experts(
    case: Case,
    arrays: Mapping[str, ArrayRef],
    inputs: Value,
    ids: np.ndarray,
    weights: Value,
    reached: np.ndarray,
    hands: Hands,
) -> tuple[Value, np.ndarray, np.ndarray]:
    """Dispatch to combine, expert by expert.

    Returns:
      The routed sum (T, W), the sum of its terms' squares (T, W), and the norm of each expert's part (T, K).
    """
    model, shape = hands.model, (len(ids), case.expert_width)
    latent_up = values(arrays["latent.up"]).astype(np.float64) if case.flags.latent else None
    total, variance, tp, squares, sums = (np.zeros(shape) for _ in range(5))
    slot_norm = np.zeros(ids.shape)
    for expert in range(case.experts):
        token, slot = np.nonzero((ids == expert) & reached)
        if not len(token):
            continue
        at, own = token * case.top_k + slot, Weights.of(arrays, "experts", expert)
        rows, w, w_variance = inputs[token], weights.exact[token, slot][:, None], weights.before[token, slot][:, None]
        if case.flags.weightin:
            exact = rows.exact * w
            rows = Value(exact, rows.before * w**2 + exact**2 * (w_variance + model.f32))
            rows = hands.on("dispatch", rows, at)
            w, w_variance = np.ones_like(w), np.zeros_like(w)
        pre = hands.on("gate_up", gate_up(rows, own, model), at)
        h = hands.on("activation", activation(pre, case, model), at)
        y = hands.on("down", down(h, own, model), at)
        part = w * y.exact
        np.add.at(total, token, part)
        np.add.at(squares, token, part**2)
        np.add.at(sums, token, part**2 * model.partial_sums(slot, case.top_k)[:, None])
        np.add.at(variance, token, w**2 * (y.before + y.exact**2 * w_variance))
        if y.tp is not None:
            np.add.at(tp, token, w**2 * y.tp)
        if not hands.teaches:
            slot_norm[token, slot] = np.linalg.norm(part if latent_up is None else part @ latent_up.T, axis=1)
    whole = total**2 if case.top_k > 1 else 0.0
    return Value(total, variance + model.combine(squares, sums + whole), tp), squares, slot_norm
