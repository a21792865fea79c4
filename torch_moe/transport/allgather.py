"""All tokens go to all ranks; each runs the experts it holds; results are reduce-scattered to the tokens' owners.

Only real tokens travel, so sizes are whatever they are on each rank, zero included. Sums across ranks are in float32
and in rank order.
"""

from torch_moe import collectives
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
    """Gathers the tokens of all ranks and sorts those that chose an expert here.

    Args:
        payload: (n, ...) tensors by name, of this rank's real tokens, n being its entry of `exchange.sizes`.
        topk_ids_nK: (n, K).
        topk_weights_nK: (n, K) float32.
        placement: this rank's experts.
        exchange: the ranks, and how many tokens each has.
        weight_on_input: the weights belong to the experts' input; see `base.weigh`.

    Returns:
        the payload's rows (R, ...), sorted by expert, then by token in rank order, then by slot; and the handle for
        `combine`.
    """

    def gather(part: Tensor) -> Tensor:
        return collectives.all_gather_rows(part, exchange.sizes, exchange.group)

    return make_rows(
        {name: gather(values) for name, values in payload.items()},
        gather(topk_ids_nK),
        gather(topk_weights_nK),
        placement=placement,
        exchange=exchange,
        weight_on_input=weight_on_input,
        expected_rows=None,
    )


def combine(y_RW: Float[Tensor, "R W"], handle: Handle) -> Float32[Tensor, "n W"]:
    """Sums each token's results here and over the ranks: (R, W) to this rank's (n, W) float32."""
    return collectives.reduce_scatter_rows(sum_rows(y_RW, handle), handle.exchange.sizes, handle.exchange.group)


def carry(values_n: Tensor, handle: Handle) -> Tensor:
    """Moves one value per token, (n, ...), as `dispatch` moved the tokens: (t, ...)."""
    return collectives.all_gather_rows(values_n, handle.exchange.sizes, handle.exchange.group)
