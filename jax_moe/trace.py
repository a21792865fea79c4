"""What one forward decided and what its stages gave, for tests and for comparison with other implementations.

Shape suffixes: n ranks that route different tokens, c rows routed by a rank, E experts, e experts held by a rank, K
experts per token, R rows on a rank.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_moe import stages, tokens, transport
from jax_moe._typing import Array, Float32, Int32
from jax_moe.config import MoEConfig, ParallelConfig
from jax_moe.kernels.schedule import rows_bound

_STAGE_FIELDS = dataclasses.fields(stages.Stages)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Decisions of one rank (`moe_local`), or of all ranks in rank order, one after the other along axis 0 (`moe`).

    With lessons the router's are still its own, while rows, group sizes and drops are those of the taught choice.

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
      dropped: (1,) int32 copies of tokens for which there was no room: of those this rank sent ("padded",
        "one_sided"), or of those sent to it ("ragged"). They are in no other count but `expert_load`.
      stages: what the other stages gave; see `Stages`.
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
    stages: stages.Stages


def empty(config: MoEConfig, parallel: ParallelConfig) -> Trace:
    """The trace of a rank when there are no rows at all."""
    experts, top_k = config.num_experts, config.top_k
    local_experts = experts // parallel.ep
    no_rows = jnp.zeros((rows_bound(0, top_k, local_experts),), jnp.int32)
    given = {}
    for name, width in stages.widths(config).items():
        wide = name in ("gate_up", "combine", "latent_out", "shared")
        split = parallel.expert_tp if name in stages.SPLIT else 1
        given[name] = jnp.zeros((0, width // split), jnp.float32 if wide else config.dtype)
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
        stages=stages.Stages(**{field.name: given.get(field.name) for field in _STAGE_FIELDS}),
    )


class Recorder(stages.Tap):
    """Keeps what every stage gave on this rank, and with lessons hands those on in its place."""

    def __init__(
        self,
        rows: int,
        chunk: int,
        counts: Array | None,
        config: MoEConfig,
        parallel: ParallelConfig,
        lessons: stages.Lessons | None,
    ) -> None:
        """A recorder for one forward.

        Args:
          rows: t, of this shard of x.
          chunk: c, of them, that this rank routes.
          counts: as given to the layer.
          config, parallel: the layer.
          lessons: what to hand on, or None.
        """
        self._config, self._parallel, self._lessons = config, parallel, lessons
        self._token_nc = tokens.dense_index(tokens.real_counts(rows, counts, parallel), chunk)
        self._token_c = self._token_nc[tokens.routing_rank(parallel)]
        self._results: dict[str, Array] = {}

    def __call__(self, name: str, value: Array) -> Array:
        self._results[name] = value
        lesson = getattr(self._lessons, name, None)
        if self._lessons is None or lesson is None:
            return value
        index = self._token_c
        if name in stages.BY_ROW:
            index = jnp.where(self._row_token_R < 0, -1, self._row_token_R * self._config.top_k + self._row_slot_R)
        instead = stages.taught(name, lesson, index, self._config, self._parallel)
        return jnp.where(self._lessons.on, instead.astype(value.dtype), value)

    def arrived(self, handle: transport.Handle | transport.HopsHandle) -> None:
        if isinstance(handle, transport.HopsHandle):
            # 0 is what lies in an empty slot.
            planned = transport.hops.carry(self._token_c[:, None] + 1, handle)[:, 0] - 1
            dropped = handle.dropped
        else:
            planned = self._token_nc.reshape(-1) if self._parallel.expert_parallel else self._token_c
            dropped = jnp.zeros((), jnp.int32)
        plan = handle.plan
        self._group_sizes_e, self._dropped = plan.group_sizes_e, dropped
        self._row_token_R = jnp.where(plan.row_token_R < 0, -1, planned[plan.row_token_R])
        self._row_slot_R = plan.row_slot_R

    def trace(self, axes: tuple[str, ...]) -> Trace:
        """The trace, after the last stage.

        Args:
          axes: mesh axes of more than one rank over which tokens differ: the load is summed over them.
        """
        ids_cK = self._results["topk_ids"]
        chosen_E = jnp.zeros((self._config.num_experts,), jnp.int32).at[ids_cK.reshape(-1)].add(1, mode="drop")
        return Trace(
            token_index=self._token_c,
            router_logits=self._results.get("logits"),
            topk_ids=ids_cK,
            topk_weights=self._results["topk_weights"],
            group_sizes=self._group_sizes_e,
            row_token=self._row_token_R,
            row_slot=self._row_slot_R,
            expert_load=jax.lax.psum(chosen_E, axes) if axes else chosen_E,
            dropped=self._dropped[None],
            stages=stages.Stages(**{field.name: self._results.get(field.name) for field in _STAGE_FIELDS}),
        )
