"""From logits to top-k ids and weights. Knows nothing of ranks.

Shapes: `t` tokens, `D` hidden size, `E` experts, `K` experts per token, `G` groups. Everything is float32.
"""

import torch

from torch_moe import matmul
from torch_moe._typing import Float, Float32, Int32, Tensor
from torch_moe.config import RouterConfig

RENORMALIZE_EPS = 1e-20


def compute_logits(x_tD: Float[Tensor, "t D"], gate_ED: Float[Tensor, "E D"]) -> Float32[Tensor, "t E"]:
    """Router logits in true float32, whatever the dtype of x and the gate.

    Args:
        x_tD: (t, D).
        gate_ED: (E, D).

    Returns:
        (t, E) float32.
    """
    return matmul.linear(x_tD, gate_ED, tensor_cores=False)


def route(
    logits_tE: Float32[Tensor, "t E"], bias_E: Float32[Tensor, " E"] | None, *, router: RouterConfig, top_k: int
) -> tuple[Int32[Tensor, "t K"], Float32[Tensor, "t K"]]:
    """Chooses each token's experts and weighs them.

    Selection is by score plus `bias_E`, weights are the scores alone. With groups, a group is worth its best selection
    value, or the sum of its best two when there is a bias (DeepSeek-V3, section 2.1.2), and only the best groups take
    part. Among equals the lower index wins, for experts and for groups.

    Args:
        logits_tE: (t, E) float32.
        bias_E: (E,) float32 score correction, or None.
        router: scoring, groups, renormalization and scaling.
        top_k: K.

    Returns:
        ids (t, K) int32, best first, and weights (t, K) float32.

    Raises:
        ValueError: a bias is missing or was not asked for.

    Example:
        >>> ids, weights = route(torch.tensor([[0.0, 2.0, 2.0]]), None, router=RouterConfig(), top_k=2)
        >>> ids
        tensor([[1, 2]], dtype=torch.int32)
    """
    if (bias_E is not None) != router.score_correction_bias:
        found, allowed = ("None", "a tensor") if bias_E is None else ("a tensor", "None")
        bias = router.score_correction_bias
        raise ValueError(f"bias={found}: allowed with score_correction_bias={bias} is {allowed}")
    scores_tE = torch.softmax(logits_tE, dim=-1) if router.scoring == "softmax" else torch.sigmoid(logits_tE)
    # Choosing is not differentiable; the chosen weights are.
    selection_tE = scores_tE.detach()
    if bias_E is not None:
        selection_tE = selection_tE + bias_E
    if router.num_groups > 1:
        selection_tE = _mask_groups(selection_tE, router, best=1 if bias_E is None else 2)
    ids_tK = _first_of_sort(selection_tE, top_k)
    weights_tK = scores_tE.gather(-1, ids_tK)
    if router.renormalize:
        weights_tK = weights_tK / (weights_tK.sum(-1, keepdim=True) + RENORMALIZE_EPS)
    return ids_tK.to(torch.int32), weights_tK * router.scaling_factor


def _first_of_sort(values: Tensor, count: int) -> Tensor:
    """Indices of the largest, best first, ties to the lower index, which `torch.topk` leaves open."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :count]


def _mask_groups(selection_tE: Tensor, router: RouterConfig, *, best: int) -> Tensor:
    """-inf for every expert outside the token's best groups."""
    tokens, experts = selection_tE.shape
    by_group_tGE = selection_tE.view(tokens, router.num_groups, experts // router.num_groups)
    best = min(best, by_group_tGE.shape[-1])
    worth_tG = torch.sort(by_group_tGE, dim=-1, descending=True).values[..., :best].sum(-1)
    kept_tG = torch.zeros_like(worth_tG, dtype=torch.bool)
    kept_tG.scatter_(1, _first_of_sort(worth_tG, router.groups_kept), True)
    return by_group_tGE.masked_fill(~kept_tG[..., None], float("-inf")).view(tokens, experts)
