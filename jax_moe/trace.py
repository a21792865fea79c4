"""What one forward decided, for tests and for comparison with other implementations.

Shape suffixes: c rows routed by a rank, E experts, e experts held by a rank, K experts per token, R rows on a rank.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_moe._typing import Array, Float32, Int32
from jax_moe.config import MoEConfig, ParallelConfig
from jax_moe.plan import rows_bound


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Decisions of one rank (`moe_local`), or of all ranks in rank order, one after the other along axis 0 (`moe`).

    Tokens are named by their dense index: the number among the real tokens of all ranks, in rank order.

    Attributes:
      token_index: (c,) dense index of each routed row, -1 for padding.
      router_logits: (c, E) float32, None when ids were given; zeros for padding.
      topk_ids: (c, K) int32; E for padding.
      topk_weights: (c, K) float32; zero for padding.
      group_sizes: (e,) int32 rows of each of the rank's experts.
      row_token: (R,) int32 dense index of each row, -1 past the last.
      row_slot: (R,) int32 slot of each row, -1 past the last.
      expert_load: (E,) int32 real tokens of all ranks that chose each expert; the same on every rank.
      dropped: (1,) int32 copies of tokens for which there was no room: of those this rank sent ("padded"), or of those
        sent to it ("ragged"). They are in no other count but `expert_load`.
    """

    token_index: Int32[Array, " c"]
    router_logits: Float32[Array, "c E"] | None
    topk_ids: Int32[Array, "c K"]
    topk_weights: Float32[Array, "c K"]
    group_sizes: Int32[Array, " e"]
    row_token: Int32[Array, " R"]
    row_slot: Int32[Array, " R"]
    expert_load: Int32[Array, " E"]
    dropped: Int32[Array, " 1"]


def empty(config: MoEConfig, parallel: ParallelConfig) -> Trace:
    """The trace of a rank when there are no rows at all."""
    experts, top_k = config.num_experts, config.top_k
    local_experts = experts // parallel.ep
    no_rows = jnp.zeros((rows_bound(0, top_k, local_experts),), jnp.int32)
    return Trace(
        token_index=no_rows,
        router_logits=None if config.router.source == "ids" else jnp.zeros((0, experts), jnp.float32),
        topk_ids=jnp.zeros((0, top_k), jnp.int32),
        topk_weights=jnp.zeros((0, top_k), jnp.float32),
        group_sizes=jnp.zeros((local_experts,), jnp.int32),
        row_token=no_rows,
        row_slot=no_rows,
        expert_load=jnp.zeros((experts,), jnp.int32),
        dropped=jnp.zeros((1,), jnp.int32),
    )
