"""Moves nothing between ranks: every expert this rank's tokens can ask for is here (one rank, TP, DP)."""

from torch_moe._typing import Float, Float32, Int, Tensor
from torch_moe.transport.base import Exchange, Handle, Placement, make_rows, sum_rows
from torch_moe.transport.hop import Payload


def dispatch(
    payload: Payload,
    topk_ids_nK: Int[Tensor, "n K"],
    topk_weights_nK: Float32[Tensor, "n K"],
    *,
    placement: Placement,
    exchange: Exchange,
    weight_on_input: bool = False,
) -> tuple[dict[str, Tensor], Handle]:
    """Sorts this rank's tokens by expert.

    Args:
        payload: (n, ...) tensors by name, of this rank's real tokens.
        topk_ids_nK: (n, K).
        topk_weights_nK: (n, K) float32.
        placement: all experts, here.
        exchange: this rank alone.
        weight_on_input: the weights belong to the experts' input; see `base.weigh`.

    Returns:
        the payload's rows (R, ...), sorted by expert, and the handle for `combine`.
    """
    return make_rows(
        payload,
        topk_ids_nK,
        topk_weights_nK,
        placement=placement,
        exchange=exchange,
        weight_on_input=weight_on_input,
        # Every id of a real token names an expert, and every expert is here.
        expected_rows=topk_ids_nK.numel(),
    )


def combine(y_RW: Float[Tensor, "R W"], handle: Handle) -> Float32[Tensor, "n W"]:
    """Sums each token's results: (R, W) to (n, W) float32. Complete, but for what tensor parallelism leaves partial."""
    return sum_rows(y_RW, handle)


def carry(values_n: Tensor, handle: Handle) -> Tensor:
    """Moves one value per token, (n, ...), as `dispatch` moved the tokens: not at all."""
    return values_n
