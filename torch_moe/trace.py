"""What a forward pass decided, for comparison stage by stage.

Shapes: `t` rows this rank routes, padding included (its chunk under sequence parallelism), `n` of them real; `E`
experts, `e` on this rank, `K` slots, `R` the bound on rows.
"""

import dataclasses

import torch
import torch.nn.functional as F

from torch_moe._typing import Float32, Int32, Tensor
from torch_moe.layout import TokenLayout
from torch_moe.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """The routing and the sort of one rank.

    Attributes:
        token_index: (t,) int32, each row's number among all real tokens in rank order, -1 for padding.
        router_logits: (t, E) float32, zeros for padding; None where ids were given.
        topk_ids: (t, K) int32, E for padding.
        topk_weights: (t, K) float32, 0 for padding.
        group_sizes: (e,) int32, rows of each expert on this rank.
        row_token: (R,) int32, the token number of each row, sorted by expert, then in the order the tokens came (by
            number, except over two hops), then by slot; -1 past the last row.
        row_slot: (R,) int32, which slot of the token, -1 past the last row.
        expert_load: (E,) int32, rows of each expert over the real tokens of all ranks, as the router chose.
        dropped: () int32, token copies this rank dropped: those it found no slot for (padded), or did not accept
            (ragged). They have no rows.
    """

    token_index: Int32[Tensor, " t"]
    router_logits: Float32[Tensor, "t E"] | None
    topk_ids: Int32[Tensor, "t K"]
    topk_weights: Float32[Tensor, "t K"]
    group_sizes: Int32[Tensor, " e"]
    row_token: Int32[Tensor, " R"]
    row_slot: Int32[Tensor, " R"]
    expert_load: Int32[Tensor, " E"]
    dropped: Int32[Tensor, ""]


def _pad(x: Tensor, rows: int, value: int) -> Tensor:
    return F.pad(x.detach(), (0, 0, 0, rows - x.shape[0]), value=value)


def count_ids(topk_ids_nK: Int32[Tensor, "n K"], num_experts: int) -> Int32[Tensor, " E"]:
    """(E,) int32: how often each expert was chosen."""
    ordered = topk_ids_nK.flatten().sort().values
    edges = torch.searchsorted(
        ordered, torch.arange(num_experts + 1, device=ordered.device, dtype=ordered.dtype), out_int32=True
    )
    return edges.diff()


def collect(
    layout: TokenLayout,
    logits_nE: Float32[Tensor, "n E"] | None,
    topk_ids_nK: Int32[Tensor, "n K"],
    topk_weights_nK: Float32[Tensor, "n K"],
    plan: Plan,
    *,
    token_number_t: Int32[Tensor, " s"],
    dropped: Int32[Tensor, ""],
    expert_load_E: Int32[Tensor, " E"],
) -> Trace:
    """Puts a trace together.

    Args:
        layout: this rank's rows; `n` of them are real.
        logits_nE: router logits, or None where ids were given.
        topk_ids_nK: chosen experts.
        topk_weights_nK: their weights.
        plan: over the tokens that reached this rank.
        token_number_t: the number of each token that the plan saw.
        dropped: copies this rank dropped.
        expert_load_E: over all ranks.
    """
    rows = layout.own_rows
    row_token_R = torch.full_like(plan.row_token, -1)
    if len(token_number_t):
        number_R = token_number_t.index_select(0, plan.row_token.clamp(min=0))
        row_token_R = torch.where(plan.row_token >= 0, number_R, row_token_R)
    num_experts = expert_load_E.shape[0]
    return Trace(
        token_index=layout.dense_index(topk_ids_nK.device),
        router_logits=None if logits_nE is None else _pad(logits_nE, rows, 0),
        topk_ids=_pad(topk_ids_nK, rows, num_experts),
        topk_weights=_pad(topk_weights_nK, rows, 0),
        group_sizes=plan.group_sizes,
        row_token=row_token_R,
        row_slot=plan.row_slot,
        expert_load=expert_load_E,
        dropped=dropped,
    )
