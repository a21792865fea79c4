"""The layer as one formula over all tokens in NumPy float64: no ranks, no sorting, every expert on every token.

Shapes: `T` tokens, `D` hidden size, `W` experts' width, `F` intermediate size, `E` experts, `K` experts per token.
"""

import math

import numpy as np

from torch_moe import MoEConfig, RouterConfig

_erf = np.vectorize(math.erf, otypes=[float])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def activate(x, config: MoEConfig):
    pointwise = {
        "silu": lambda v: v * sigmoid(v),
        "gelu": lambda v: v * (1 + _erf(v / math.sqrt(2))) / 2,
        "gelu_tanh": lambda v: v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
        "relu2": lambda v: np.maximum(v, 0) ** 2,
    }
    if not config.gated:
        return pointwise[config.activation](x)
    half = x.shape[-1] // 2
    if config.gate_up_layout == "interleaved":
        gate, up = x[..., ::2], x[..., 1::2]
    else:
        gate, up = x[..., :half], x[..., half:]
    if config.activation == "swigluoai":
        gate = np.minimum(gate, config.swiglu_limit)
        up = np.clip(up, -config.swiglu_limit, config.swiglu_limit)
        return gate * sigmoid(config.swiglu_alpha * gate) * (up + 1)
    return pointwise[config.activation](gate) * up


def route(logits_TE, bias_E, router: RouterConfig, top_k: int):
    """Ids (T, K), best first, and weights (T, K)."""
    if router.scoring == "softmax":
        scores_TE = np.exp(logits_TE - logits_TE.max(-1, keepdims=True))
        scores_TE = scores_TE / scores_TE.sum(-1, keepdims=True)
    else:
        scores_TE = sigmoid(logits_TE)
    ids_TK = np.zeros((len(logits_TE), top_k), int)
    weights_TK = np.zeros((len(logits_TE), top_k))
    for token, scores_E in enumerate(scores_TE):
        selection_E = scores_E if bias_E is None else scores_E + bias_E
        size = len(selection_E) // router.num_groups
        worth = []
        for group in range(router.num_groups):
            best_first = sorted(selection_E[group * size : (group + 1) * size], reverse=True)
            worth.append(best_first[0] if bias_E is None else sum(best_first[:2]))
        kept = sorted(range(router.num_groups), key=lambda group: (-worth[group], group))[: router.groups_kept]
        choosable = [expert for expert in range(len(selection_E)) if expert // size in kept]
        chosen = sorted(choosable, key=lambda expert: (-selection_E[expert], expert))[:top_k]
        weights_K = scores_E[chosen]
        if router.renormalize:
            weights_K = weights_K / (weights_K.sum() + 1e-20)
        ids_TK[token], weights_TK[token] = chosen, weights_K * router.scaling_factor
    return ids_TK, weights_TK


def ffn(x, gate_up, down, config, gate_up_bias=0.0, down_bias=0.0):
    return activate(x @ gate_up.T + gate_up_bias, config) @ down.T + down_bias


def moe(params, x_TD, config: MoEConfig, *, router_logits=None, topk_ids=None, topk_weights=None):
    """The whole layer. `params` and inputs are arrays of any dtype; returns (T, D) float64."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x_TD = np.asarray(x_TD, np.float64)
    if topk_ids is None:
        logits = x_TD @ params["router.gate"].T if router_logits is None else np.asarray(router_logits, np.float64)
        topk_ids, topk_weights = route(logits, params.get("router.bias"), config.router, config.top_k)
    x_TW = x_TD @ params["latent.down"].T if config.latent_size else x_TD
    y_TW = np.zeros_like(x_TW)
    for expert in range(config.num_experts):
        weight_T = (np.asarray(topk_weights, np.float64) * (topk_ids == expert)).sum(-1)[:, None]
        chosen_T = (topk_ids == expert).any(-1)[:, None]
        before, after = (weight_T, chosen_T) if config.router.weight_on_input else (1.0, weight_T)
        y_TW += after * ffn(
            before * x_TW,
            params["experts.gate_up"][expert],
            params["experts.down"][expert],
            config,
            params["experts.gate_up_bias"][expert] if config.expert_bias else 0.0,
            params["experts.down_bias"][expert] if config.expert_bias else 0.0,
        )
    y_TD = y_TW @ params["latent.up"].T if config.latent_size else y_TW
    if config.shared_width:
        shared_TD = ffn(x_TD, params["shared.gate_up"], params["shared.down"], config)
        if config.shared_gate:
            shared_TD = shared_TD * sigmoid(x_TD @ params["shared.gate"].T)
        y_TD = y_TD + shared_TD
    return y_TD


def random_params(config: MoEConfig, seed: int = 0):
    """Checkpoint-layout parameters as torch tensors, with biases that matter."""
    import torch

    from torch_moe import init
    from torch_moe.params import specs

    generator = torch.Generator().manual_seed(seed)
    params = init(config, generator)
    for name, spec in specs(config).items():
        if name.endswith("bias"):
            scale = 0.1 if name == "router.bias" else 0.5
            params[name] = (scale * torch.randn(spec.shape, generator=generator)).to(spec.dtype)
    return params


def to_numpy(tensors):
    return {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}
