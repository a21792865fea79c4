"""Checks of one rank's inputs, made before anything is communicated.

Shapes: `t` rows on this rank, `D` hidden size, `E` experts, `K` experts per token.
"""

from torch_moe._typing import Tensor
from torch_moe.config import MoEConfig
from torch_moe.params import DTYPES


def check_x(x: Tensor, config: MoEConfig) -> None:
    """Raises `ValueError` unless x is (t, D) in the configuration's dtype."""
    if x.dim() != 2 or x.shape[1] != config.hidden_size:
        raise ValueError(f"x of shape {tuple(x.shape)}: allowed is (t, {config.hidden_size})")
    if x.dtype != DTYPES[config.dtype]:
        raise ValueError(f"x of dtype {x.dtype}: allowed is {DTYPES[config.dtype]}")


def check_routing(
    router_logits: Tensor | None,
    topk_ids: Tensor | None,
    topk_weights: Tensor | None,
    *,
    config: MoEConfig,
    rows: int,
    real: int,
) -> None:
    """Raises `ValueError` unless exactly what the router's source asks for is given, and fits.

    Args:
        router_logits: (t, E) floating point with source "logits".
        topk_ids: (t, K) integers with source "ids"; those of real rows distinct within a token, from 0 to E - 1.
        topk_weights: (t, K) floating point with source "ids".
        config: the layer.
        rows: t.
        real: how many of the rows, from the first on, are real.
    """
    _check_given("router_logits", router_logits, "logits", config, (rows, config.num_experts), floating=True)
    _check_given("topk_ids", topk_ids, "ids", config, (rows, config.top_k), floating=False)
    _check_given("topk_weights", topk_weights, "ids", config, (rows, config.top_k), floating=True)
    if topk_ids is not None:
        _check_ids(topk_ids[:real], config.num_experts)


def _check_given(
    name: str, given: Tensor | None, source: str, config: MoEConfig, shape: tuple[int, int], *, floating: bool
) -> None:
    if (given is not None) != (config.router.source == source):
        found, allowed = ("None", "a tensor") if given is None else ("a tensor", "None")
        raise ValueError(f"{name}={found}: allowed with router source {config.router.source!r} is {allowed}")
    if given is None:
        return
    if tuple(given.shape) != shape:
        raise ValueError(f"{name} of shape {tuple(given.shape)}: allowed is {shape}")
    integer = not (given.dtype.is_floating_point or given.dtype.is_complex or str(given.dtype) == "torch.bool")
    if not (given.dtype.is_floating_point if floating else integer):
        raise ValueError(f"{name} of dtype {given.dtype}: allowed are {'floating point' if floating else 'integers'}")


def _check_ids(topk_ids: Tensor, num_experts: int) -> None:
    ordered = topk_ids.sort(dim=-1).values
    outside = (ordered < 0) | (ordered >= num_experts)
    wrong = outside.any(-1) | (ordered.diff(dim=-1) == 0).any(-1)
    if wrong.any():
        token = int(wrong.nonzero()[0])
        raise ValueError(
            f"topk_ids of token {token} are {topk_ids[token].tolist()}: allowed are distinct ids from 0 to "
            f"{num_experts - 1}"
        )
