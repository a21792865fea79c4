"""Each token goes once to each rank that holds any of its experts, in exact sizes; each copy brings one row back.

Ranks first tell each other how many copies to expect, which on CUDA costs the host one look per hop. With nodes a token
crosses once to each node that holds any of its experts, to the rank with the sender's place there, and fans out inside;
results are summed on a node before they cross back.

Rows of an expert lie in the order copies came. With one hop that is by source rank and then by token, the dense order;
with nodes it is by place on the source's node, then source node, then token.
"""

from torch_moe._typing import Float, Float32, Int, Tensor
from torch_moe.transport import base
from torch_moe.transport import hop as hops
from torch_moe.transport.base import Exchange, Handle, Placement
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
    """Sends the tokens to their experts' ranks, and sorts what arrived by expert.

    Args:
        payload: (n, ...) tensors by name, of this rank's real tokens.
        topk_ids_nK: (n, K).
        topk_weights_nK: (n, K) float32.
        placement: this rank's experts.
        exchange: the levels of ranks, and `max_rows`, the copies a rank accepts in each hop.
        weight_on_input: the weights belong to the experts' input; see `base.weigh`.

    Returns:
        the payload's rows (R, ...), sorted by expert, then as they came, then by slot; and the handle for `combine`.
    """
    received, ids_tK, weights_tK = dict(payload), topk_ids_nK, topk_weights_nK
    done = []
    for axis, block in base.levels(placement, exchange):
        received, ids_tK, weights_tK, hop = hops.send(
            received,
            ids_tK,
            weights_tK,
            axis=axis,
            num_experts=placement.num_experts,
            block=block,
            max_rows=exchange.max_rows,
        )
        done.append(hop)
    return base.make_rows(
        received,
        ids_tK,
        weights_tK,
        placement=placement,
        exchange=exchange,
        weight_on_input=weight_on_input,
        expected_rows=None,
        hops=done,
    )


def combine(y_RW: Float[Tensor, "R W"], handle: Handle) -> Float32[Tensor, "n W"]:
    """Sums each copy's rows here, sends the sums back and adds them up: (R, W) to this rank's (n, W) float32."""
    return base.return_sums(base.sum_rows(y_RW, handle), handle)


def carry(values_n: Tensor, handle: Handle) -> Tensor:
    """Moves one value per token, (n, ...), as `dispatch` moved the tokens: (t, ...)."""
    for hop in handle.hops:
        values_n = hops.carry(values_n, hop)
    return values_n
