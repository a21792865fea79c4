"""What a forward pass decided and what its stages gave, for comparison stage by stage.

Shapes: `t` rows this rank routes, padding included (its chunk under sequence parallelism), `n` of them real; `E`
experts, `e` on this rank, `K` slots, `R` the bound on rows.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from torch_moe import stages
from torch_moe._typing import Float32, Int32, Tensor
from torch_moe.config import MoEConfig, ParallelConfig
from torch_moe.layout import TokenLayout
from torch_moe.stages import Lessons, Stages
from torch_moe.transport.base import Handle

Carry = Callable[[Tensor, Handle], Tensor]
"""A transport's `carry`."""
_STAGES = tuple(field.name for field in dataclasses.fields(Stages))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """The routing, the sort and the stages of one rank.

    With lessons the router's results are still its own; rows, their sizes and drops follow the choice it was taught.

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
        stages: what the other stages gave.
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
    stages: Stages


def _pad(x: Tensor, rows: int, value: int) -> Tensor:
    missing = rows - x.shape[0]
    return F.pad(x.detach(), (0, 0, 0, missing), value=value) if missing else x.detach()


def count_ids(topk_ids_nK: Int32[Tensor, "n K"], num_experts: int) -> Int32[Tensor, " E"]:
    """(E,) int32: how often each expert was chosen."""
    ordered = topk_ids_nK.flatten().sort().values
    edges = torch.searchsorted(
        ordered, torch.arange(num_experts + 1, device=ordered.device, dtype=ordered.dtype), out_int32=True
    )
    return edges.diff()


class Tap:
    """Hands every stage's result on as it is, at no cost. A `Recorder` keeps it, and may put a lesson in its place."""

    def arrived(self, carry: Carry, handle: Handle) -> None:
        """Learns which rows dispatch has brought to this rank, before the first stage by row."""

    def by_token(self, stage: str, value: Tensor) -> Tensor:
        """What to go on with after a stage with a result for each real token of this rank, (n, ...)."""
        del stage
        return value

    def by_row(self, stage: str, value: Tensor) -> Tensor:
        """What to go on with after a stage with a result for each row in use, or for each up to the bound."""
        del stage
        return value


class Recorder(Tap):
    """Keeps the results of one forward on one rank, and with lessons hands these on.

    Args:
        config: the layer.
        parallel: how it is spread.
        tp_index: of this rank.
        layout: this rank's rows.
        lessons: what to hand on, or None.
        device: of the layer.
    """

    def __init__(
        self,
        config: MoEConfig,
        parallel: ParallelConfig,
        tp_index: int,
        layout: TokenLayout,
        lessons: Lessons | None,
        device: torch.device,
    ) -> None:
        self._config, self._parallel, self._tp_index, self._layout = config, parallel, tp_index, layout
        self._lessons = lessons if lessons is not None and lessons.on else None
        self._index = layout.dense_index(device)
        self._results: dict[str, Tensor] = {}

    @torch.no_grad()
    def arrived(self, carry: Carry, handle: Handle) -> None:
        number_t = carry(self._index[: self._layout.own_real, None], handle)[:, 0]
        plan = handle.plan
        row_token_R = torch.full_like(plan.row_token, -1)
        if len(number_t):
            row_token_R = torch.where(
                plan.row_token >= 0, number_t.index_select(0, plan.row_token.clamp(min=0)), row_token_R
            )
        self._handle, self._row_token = handle, row_token_R
        self._line = torch.where(row_token_R >= 0, row_token_R * self._config.top_k + plan.row_slot, -1)

    def by_token(self, stage: str, value: Tensor) -> Tensor:
        absent = self._config.num_experts if stage == "topk_ids" else 0
        self._results[stage] = _pad(value, self._layout.own_rows, absent)
        return self._hand_on(stage, value, self._index[: len(value)])

    def by_row(self, stage: str, value: Tensor) -> Tensor:
        self._results[stage] = _pad(value, len(self._line), 0)
        return self._hand_on(stage, value, self._line[: len(value)])

    def _hand_on(self, stage: str, value: Tensor, line: Tensor) -> Tensor:
        lesson = getattr(self._lessons, stage, None)
        if lesson is None:
            return value
        lines = stages.take(lesson, line)
        return stages.own_columns(stage, lines, self._config, self._parallel, self._tp_index).to(value.dtype)

    def count_choices(self) -> Int32[Tensor, " E"]:
        """(E,) int32: how many of this rank's real tokens chose each expert."""
        return count_ids(self._results["topk_ids"][: self._layout.own_real], self._config.num_experts)

    def trace(self, expert_load_E: Int32[Tensor, " E"]) -> Trace:
        """The trace, after the last stage, given the load over all ranks."""
        plan, results = self._handle.plan, self._results
        return Trace(
            token_index=self._index,
            router_logits=results.get("logits"),
            topk_ids=results["topk_ids"],
            topk_weights=results["topk_weights"],
            group_sizes=plan.group_sizes,
            row_token=self._row_token,
            row_slot=plan.row_slot,
            expert_load=expert_load_E,
            dropped=self._handle.dropped,
            stages=Stages(**{name: results.get(name) for name in _STAGES}),
        )
