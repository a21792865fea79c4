"""The sort by expert: from top-k ids to rows, group sizes and positions. Pure index arithmetic, on any device.

Shapes: `t` tokens, `K` slots, `E` experts, `e` experts on this rank, `R` rows, a bound that holds whatever the ids are.

Worked example, t=3, K=2, E=4, this rank holds experts 2 and 3, topk_ids = [[2, 0], [1, 3], [3, 2]]:

    rows         expert 2: token 0 slot 0, token 2 slot 1;   expert 3: token 1 slot 1, token 2 slot 0
    row_token    0 2 1 2 -1 -1        (R = 3 * min(K, e) = 6)
    row_slot     0 1 1 0 -1 -1
    group_sizes  2 2
    position     [[0, -1], [-1, 2], [3, 1]]
    num_rows     4
"""

import dataclasses

import torch

from torch_moe._typing import Int, Int32, Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Where each row comes from and where it goes back to.

    Attributes:
        row_token: (R,) int32, the token of each row, -1 past the last row. Sorted by expert, then token, then slot.
        row_slot: (R,) int32, which of the token's slots, -1 past the last row.
        group_sizes: (e,) int32, rows of each expert on this rank.
        position: (t, K) int32, the row of each token's slot, -1 where its expert is not on this rank.
    """

    row_token: Int32[Tensor, " R"]
    row_slot: Int32[Tensor, " R"]
    group_sizes: Int32[Tensor, " e"]
    position: Int32[Tensor, "t K"]

    def trimmed(self, num_rows: int) -> "Plan":
        """The same plan with a row array of exactly `num_rows`, which must be the sum of the group sizes."""
        return dataclasses.replace(self, row_token=self.row_token[:num_rows], row_slot=self.row_slot[:num_rows])


def make_plan(topk_ids_tK: Int[Tensor, "t K"], *, num_experts: int, first_expert: int, local_experts: int) -> Plan:
    """Sorts the token-expert pairs whose expert is on this rank.

    Args:
        topk_ids_tK: (t, K) expert ids. An id outside [0, num_experts), such as the sentinel num_experts of padding
            tokens, is routed nowhere.
        num_experts: E.
        first_expert: the first expert on this rank; it holds a contiguous block.
        local_experts: e, how many it holds.

    Returns:
        The plan, with R = t * min(K, e) rows: enough as long as a token names no expert twice.
    """
    tokens, slots = topk_ids_tK.shape
    device = topk_ids_tK.device
    local_tK = topk_ids_tK.to(torch.int32) - first_expert
    here_tK = (local_tK >= 0) & (local_tK < min(local_experts, num_experts - first_expert))
    # Pairs that are not ours sort behind every expert; stability keeps tokens, and a token's slots, in order.
    key = torch.where(here_tK, local_tK, local_experts).flatten()
    sorted_key, order = torch.sort(key, stable=True)
    edges = torch.searchsorted(
        sorted_key, torch.arange(local_experts + 1, device=device, dtype=torch.int32), out_int32=True
    )

    bound = tokens * min(slots, local_experts)
    row = torch.arange(bound, device=device, dtype=torch.int32)
    pair = order[:bound].to(torch.int32)
    real = row < edges[-1]
    position = torch.empty_like(order, dtype=torch.int32)
    position[order] = torch.arange(tokens * slots, device=device, dtype=torch.int32)
    return Plan(
        row_token=torch.where(real, pair // slots, -1),
        row_slot=torch.where(real, pair % slots, -1),
        group_sizes=edges.diff(),
        position=torch.where(here_tK, position.view(tokens, slots), -1),
    )
