"""What each stage of the layer gave, and lessons: what it should have given, to go on with in its place.

Fed with the lessons of the stages before it, a stage is judged by itself: an error made earlier does not reach it.

Shape suffixes: T real tokens of all ranks, c rows a rank routes, E experts, K experts per token, D hidden size, L
latent size, W expert width (D, or L), R rows on a rank, F expert intermediate size, f its part on a rank, M and m rows
of the first projection (2F and 2f gated, F and f not).

Worked example, K = 2: a rank's row of token 3 and slot 1 is taught row 3 * 2 + 1 = 7 of a lesson by row. Split over
tp = 2, with F = 4 and gate and up concatenated, g0 g1 g2 g3 u0 u1 u2 u3, rank 1 takes g2 g3 u2 u3 of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_moe._typing import Array, Bool, Float, Float32, Int32
from jax_moe.config import MoEConfig, ParallelConfig

BY_ROW = ("dispatch", "gate_up", "activation", "down")
"""Stages with a result for each row; the others have one for each token."""
SPLIT = ("gate_up", "activation")
"""Those whose columns are split over tp where F is."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
    """Results of the stages on one rank, None where the layer has no such stage. Padding and rows past the last are
    zeros. The router's are in `Trace`, and the last stage's is y.

    Attributes:
      latent_in: (c, L) tokens in the latent, as sent on.
      dispatch: (R, W) the experts' input, weighted where the weight goes there.
      gate_up: (R, m) float32, biases included; None also where a kernel fuses it with the activation.
      activation: (R, f).
      down: (R, W); partial over tp where F is split.
      combine: (c, W) float32; partial over tp where tp ranks route the same tokens.
      latent_out: (c, D) float32.
      shared: (c, D) float32; partial over tp where tp ranks route the same tokens.
    """

    latent_in: Float[Array, "c L"] | None = None
    dispatch: Float[Array, "R W"] | None = None
    gate_up: Float32[Array, "R m"] | None = None
    activation: Float[Array, "R f"] | None = None
    down: Float[Array, "R W"] | None = None
    combine: Float32[Array, "c W"] | None = None
    latent_out: Float32[Array, "c D"] | None = None
    shared: Float32[Array, "c D"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lessons:
    """What stages are to hand on in place of their own results, for all tokens, the same on every rank.

    A stage with a lesson still computes its own result, from what it was handed, and the trace still has that one.
    Tokens are in the order of their dense index (see `Trace`). Values are cast to the stage's dtype. Where ranks hold
    partial sums over tp, each takes the lesson times `share`. A lesson of a stage that does not occur is not used.

    Attributes:
      on: whether to hand them on at all; traced, so that one program serves both.
      logits: (T, E).
      topk_ids: (T, K), in [0, E).
      topk_weights: (T, K).
      latent_in: (T, L).
      dispatch: (T * K, W).
      gate_up: (T * K, M), in checkpoint layout.
      activation: (T * K, F).
      down: (T * K, W).
      combine: (T, W).
      latent_out: (T, D).
      shared: (T, D).
    """

    on: Bool[Array, ""] | bool
    logits: Float[Array, "T E"] | None = None
    topk_ids: Int32[Array, "T K"] | None = None
    topk_weights: Float[Array, "T K"] | None = None
    latent_in: Float[Array, "T L"] | None = None
    dispatch: Float[Array, "T*K W"] | None = None
    gate_up: Float[Array, "T*K M"] | None = None
    activation: Float[Array, "T*K F"] | None = None
    down: Float[Array, "T*K W"] | None = None
    combine: Float[Array, "T W"] | None = None
    latent_out: Float[Array, "T D"] | None = None
    shared: Float[Array, "T D"] | None = None


class Tap:
    """Where the layer shows the result of each stage and is handed what to go on with: that very result.

    `trace.Recorder` is the one that keeps results and hands on lessons. This one adds nothing to a program.
    """

    def __call__(self, name: str, value: Array) -> Array:
        """The result of stage `name` (a field of `Lessons`); returns what the next stage is to work on."""
        del name
        return value

    def arrived(self, handle: Any) -> None:
        """Tells which tokens' rows lie on this rank, once dispatch has brought them."""


OFF = Tap()


def share(tp_index: int, tp: int) -> float:
    """The part of a lesson that a tp rank takes of a sum over tp: 1/2, 1/4, ..., the last two equal.

    Powers of two, which add up to one, lose nothing; unequal, so that one rank's part in place of another's shows.
    """
    return 2.0 ** -min(tp_index + 1, tp - 1) if tp > 1 else 1.0


def widths(config: MoEConfig) -> dict[str, int]:
    """Columns of every lesson this layer has a use for, by name."""
    width, inner = config.expert_width, config.intermediate_size
    out = {"topk_ids": config.top_k, "topk_weights": config.top_k}
    if config.router.source != "ids":
        out["logits"] = config.num_experts
    out |= {"dispatch": width, "gate_up": (2 if config.gated else 1) * inner, "activation": inner}
    out |= {"down": width, "combine": width}
    if config.latent_size:
        out |= {"latent_in": config.latent_size, "latent_out": config.hidden_size}
    if config.shared_width:
        out["shared"] = config.hidden_size
    return out


def summands(parallel: ParallelConfig, name: str) -> int:
    """How many tp ranks hold summands of a stage's result."""
    return {"down": parallel.expert_tp, "combine": parallel.shared_tp, "shared": parallel.shared_tp}.get(name, 1)


def taught(
    name: str, lesson: Array, index: Int32[Array, " rows"], config: MoEConfig, parallel: ParallelConfig
) -> Array:
    """This rank's part of a lesson.

    Args:
      name: of the stage.
      lesson: the whole.
      index: (rows,) which of its rows this rank has, -1 for none: zeros, or for ids the id E.
      config, parallel: the layer.
    """
    none = config.num_experts if name == "topk_ids" else 0
    if lesson.shape[0] == 0:
        return jnp.full((index.shape[0], lesson.shape[1]), none, lesson.dtype)
    # -1 would be the last row.
    rows = lesson.at[jnp.where(index < 0, lesson.shape[0], index)].get(mode="fill", fill_value=none)
    if (split := parallel.expert_tp) > 1 and name in SPLIT:
        halves = 2 if name == "gate_up" and config.gated and config.gate_up_layout == "concatenated" else 1
        blocks = rows.reshape(rows.shape[0], halves, split, -1)
        rows = blocks[:, :, jax.lax.axis_index("tp")].reshape(rows.shape[0], -1)
    if (tp := summands(parallel, name)) > 1:
        shares = jnp.array([share(rank, tp) for rank in range(tp)], jnp.float32)
        rows = rows.astype(jnp.float32) * shares[jax.lax.axis_index("tp")]
    return rows
