"""The whole layer as one formula in NumPy float64: no sort, no mesh, every token through each of its experts in turn.

Takes parameters by name in checkpoint layout. Written from the definition of the layer, not from its code.
"""

from __future__ import annotations

import math

import numpy as np

from jax_moe import MoEConfig


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def activate(z: np.ndarray, config: MoEConfig) -> np.ndarray:
    functions = {
        "silu": lambda a: a * sigmoid(a),
        "gelu": lambda a: a * (1 + erf(a / np.sqrt(2))) / 2,
        "gelu_tanh": lambda a: a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))) / 2,
        "relu2": lambda a: np.maximum(a, 0) ** 2,
    }
    if not config.gated:
        return functions[config.activation](z)
    half = z.shape[-1] // 2
    gate, up = (z[..., ::2], z[..., 1::2]) if config.gate_up_layout == "interleaved" else (z[..., :half], z[..., half:])
    if config.activation == "swigluoai":
        gate, up = np.minimum(gate, config.swiglu_limit), np.clip(up, -config.swiglu_limit, config.swiglu_limit)
        return gate * sigmoid(config.swiglu_alpha * gate) * (up + 1)
    return functions[config.activation](gate) * up


def route_token(logits: np.ndarray, bias: np.ndarray | None, config: MoEConfig) -> tuple[list[int], list[float]]:
    router = config.router
    if router.scoring == "softmax":
        scores = np.exp(logits - logits.max())
        scores = scores / scores.sum()
    else:
        scores = sigmoid(logits)
    selection = scores if bias is None else scores + bias
    size = len(scores) // router.num_groups
    if router.num_groups > 1:
        groups = [sorted(selection[g * size : (g + 1) * size])[::-1] for g in range(router.num_groups)]
        value = [sum(group[: 1 if bias is None else 2]) for group in groups]
        kept = sorted(range(router.num_groups), key=lambda g: (-value[g], g))[: router.groups_kept]
    else:
        kept = [0]
    eligible = [e for e in range(len(scores)) if e // size in kept]
    ids = sorted(eligible, key=lambda e: (-selection[e], e))[: config.top_k]
    weights = [scores[e] for e in ids]
    total = sum(weights) + 1e-20 if router.renormalize else 1.0
    return ids, [w / total * router.scaling_factor for w in weights]


def layer(
    params: dict[str, np.ndarray],
    x: np.ndarray,
    config: MoEConfig,
    *,
    router_logits: np.ndarray | None = None,
    topk_ids: np.ndarray | None = None,
    topk_weights: np.ndarray | None = None,
) -> np.ndarray:
    """(T, D) tokens in, (T, D) out, float64."""
    p = {name: np.asarray(array, np.float64) for name, array in params.items()}
    y = np.zeros((len(x), config.hidden_size))
    for i, token in enumerate(np.asarray(x, np.float64)):
        if topk_ids is not None:
            ids, weights = topk_ids[i], topk_weights[i]
        else:
            logits = p["router.gate"] @ token if router_logits is None else router_logits[i]
            ids, weights = route_token(np.asarray(logits, np.float64), p.get("router.bias"), config)
        inside = p["latent.down"] @ token if config.latent_size else token
        routed = np.zeros(config.expert_width)
        for e, w in zip(ids, weights, strict=True):
            row, outer = (inside * w, 1.0) if config.router.weight_on_input else (inside, w)
            z = p["experts.gate_up"][e] @ row + (p["experts.gate_up_bias"][e] if config.expert_bias else 0)
            out = p["experts.down"][e] @ activate(z, config) + (p["experts.down_bias"][e] if config.expert_bias else 0)
            routed += outer * out
        y[i] = p["latent.up"] @ routed if config.latent_size else routed
        if config.shared_width:
            shared = p["shared.down"] @ activate(p["shared.gate_up"] @ token, config)
            y[i] += shared * (sigmoid(p["shared.gate"] @ token) if config.shared_gate else 1.0)
    return y
