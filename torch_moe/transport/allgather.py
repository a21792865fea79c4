"""All tokens go to all ranks; each runs the experts it holds; results are reduce-scattered to the tokens' owners.

Only real tokens travel, so sizes are whatever they are on each rank, zero included. Sums across ranks are in float32
and in rank order.
"""

from torch_moe import collectives
from torch_moe._typing import Float, Float32, Int, Tensor
from torch_moe.transport.base import Exchange, Handle, Placement, make_rows, sum_rows


def dispatch(
    x_nW: Float[Tensor, "n W"],
    topk_ids_nK: Int[Tensor, "n K"],
    topk_weights_nK: Float32[Tensor, "n K"],
    *,
    placement: Placement,
    exchange: Exchange,
    weight_on_input: bool = False,
) -> tuple[Float[Tensor, "R W"], Handle]:
    """Gathers the tokens of all ranks and sorts those that chose an expert here.

    Args:
        x_nW: (n, W) this rank's real tokens, n being its entry of `exchange.sizes`.
        topk_ids_nK: (n, K).
        topk_weights_nK: (n, K) float32.
        placement: this rank's experts.
        exchange: the ranks, and how many tokens each has.
        weight_on_input: multiply rows by their weights here instead of summing with them in `combine`.

    Returns:
        rows (R, W) in the dtype of x, sorted by expert, then by token in rank order, then by slot; and the handle for
        `combine`.
    """
    x_tW, ids_tK, weights_tK = (
        collectives.all_gather_rows(part, exchange.sizes, exchange.group)
        for part in (x_nW, topk_ids_nK, topk_weights_nK)
    )
    return make_rows(
        x_tW,
        ids_tK,
        weights_tK,
        placement=placement,
        exchange=exchange,
        weight_on_input=weight_on_input,
        expected_rows=None,
    )


def combine(y_RW: Float[Tensor, "R W"], handle: Handle) -> Float32[Tensor, "n W"]:
    """Sums each token's results here and over the ranks: (R, W) to this rank's (n, W) float32."""
    return collectives.reduce_scatter_rows(sum_rows(y_RW, handle), handle.exchange.sizes, handle.exchange.group)
