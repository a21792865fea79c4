"""Each token goes once to each rank that holds any of its experts, in a fixed number of slots for each pair of ranks.

The shapes follow from the arrays and the mesh alone, so neither the exchange nor the rows need a size on the host.
Slots for every row lose nothing, since a token goes at most once to a rank; with a capacity factor there are fewer, and
the copies of the last tokens, which find none, are dropped: their experts on that rank contribute nothing. Hops and the
order of rows are those of `ragged`.
"""

from torch_moe._typing import Float, Float32, Int, Tensor
from torch_moe.transport import base, bounds
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
        exchange: the levels of ranks, `rows`, the most any rank has, and `capacity_factor`.
        weight_on_input: the weights belong to the experts' input; see `base.weigh`.

    Returns:
        the payload's rows (R, ...), sorted by expert, then as they came, then by slot, with zeros up to the bound on
        rows; and the handle for `combine`.
    """
    received, ids_tK, weights_tK = dict(payload), topk_ids_nK, topk_weights_nK
    done, rows = [], exchange.rows
    for axis, block in base.levels(placement, exchange):
        slots = bounds.slots(
            rows, top_k=topk_ids_nK.shape[1], ranks=axis.ranks, capacity_factor=exchange.capacity_factor
        )
        assert len(ids_tK) <= rows, f"{len(ids_tK)} tokens on rank {axis.index}, at most {rows} on any rank"
        received, ids_tK, weights_tK, hop = hops.send(
            received, ids_tK, weights_tK, axis=axis, num_experts=placement.num_experts, block=block, slots=slots
        )
        done.append(hop)
        rows = axis.ranks * slots
    return base.make_rows(
        received,
        ids_tK,
        weights_tK,
        placement=placement,
        exchange=exchange,
        weight_on_input=weight_on_input,
        expected_rows=None,
        to_bound=True,
        hops=done,
    )


def combine(y_RW: Float[Tensor, "R W"], handle: Handle) -> Float32[Tensor, "n W"]:
    """Sums each copy's rows here, sends the sums back and adds them up: (R, W) to this rank's (n, W) float32."""
    return base.return_sums(base.sum_rows(y_RW, handle), handle)


def carry(values_n: Tensor, handle: Handle) -> Tensor:
    """Moves one value per token, (n, ...), as `dispatch` moved the tokens: (t, ...), zeros in empty slots."""
    for hop in handle.hops:
        values_n = hops.carry(values_n, hop)
    return values_n
