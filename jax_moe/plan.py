"""The sort of token-expert pairs by expert: index arithmetic, no data.

Shape suffixes: t tokens considered (all that were gathered here), K experts per token, e experts held by this rank,
R rows on this rank (a static bound).

Worked example: t = 3 tokens, K = 2, this rank holds experts 4 and 5 (first_expert = 4, e = 2), R = 6:

  topk_ids_tK    [[5, 0], [4, 5], [8, 8]]     8 is the sentinel of E = 8 experts: token 2 is padding
  group_sizes_e  [1, 2]                       one row for expert 4, two for expert 5
  row_token_R    [1, 0, 1, -1, -1, -1]        by expert, then token, then slot; -1 past the last row
  row_slot_R     [0, 0, 1, -1, -1, -1]
  position_tK    [[1, -1], [0, 2], [-1, -1]]  the row of each pair, -1 where it has none on this rank
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_moe import kernels
from jax_moe._typing import Array, Int, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Which row holds which pair; see the example on top of the module. All int32.

    Attributes:
      group_sizes_e: (e,) rows of each local expert.
      row_token_R: (R,) token of each row, -1 past the last.
      row_slot_R: (R,) slot of each row, -1 past the last.
      position_tK: (t, K) row of each pair, -1 for none.
    """

    group_sizes_e: Int32[Array, " e"]
    row_token_R: Int32[Array, " R"]
    row_slot_R: Int32[Array, " R"]
    position_tK: Int32[Array, "t K"]


def make_plan(
    topk_ids_tK: Int[Array, "t K"],
    *,
    first_expert: Int32[Array, ""] | int,
    num_local_experts: int,
    implementation: str | None = None,
) -> Plan:
    """Sorts the pairs whose expert is here by expert, then token, then slot.

    Args:
      topk_ids_tK: (t, K) global expert ids, distinct within a token. Ids outside of this rank's experts (other ranks',
        the sentinel E, -1) have no row.
      first_expert: first of this rank's experts; may be traced.
      num_local_experts: e.
      implementation: of the kernels.

    Returns:
      A `Plan` with R = kernels.schedule.rows_bound(t, K, e).
    """
    top_k = topk_ids_tK.shape[1]
    position_tK, group_sizes_e, pair_R = kernels.plan_rows(
        topk_ids_tK, first_expert, num_local_experts=num_local_experts, implementation=implementation
    )
    return Plan(
        group_sizes_e=group_sizes_e,
        row_token_R=jnp.where(pair_R >= 0, pair_R // top_k, -1),
        row_slot_R=jnp.where(pair_R >= 0, pair_R % top_k, -1),
        position_tK=position_tK,
    )
