"""What each stage of the layer gave, and lessons: what it should have given, to go on with in its place.

A stage that is fed lessons shows its own error alone, whatever went wrong before it.

Shapes: `T` real tokens of all ranks, `t` rows this rank routes, `E` experts, `K` slots, `D` hidden size, `L` latent
size, `W` an expert's width (D, or L), `R` the bound on rows, `F` intermediate size, `M` = 2F when gated and F
otherwise; `f` and `m` this rank's part of F and of M.

Worked example, K=2: the lesson of a row is line token * 2 + slot, so token 3's slot 1 is taught line 7. Over tp=2, with
F=4 and gate and up concatenated, a line is g0 g1 g2 g3 u0 u1 u2 u3, and tp rank 1 takes g2 g3 u2 u3.
"""

import dataclasses

from torch_moe._typing import Float, Float32, Int, Tensor
from torch_moe.config import MoEConfig, ParallelConfig
from torch_moe.params import split_gate_up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
    """One rank's result of each stage, None where the layer has no such stage; zeros in padding and past the last row.

    The router's stages are fields of `Trace`, and the last stage's result is y.

    Attributes:
        latent_in: (t, L) what was sent on, in the latent.
        dispatch: (R, W) the experts' input, weighted where the weight belongs to it.
        gate_up: (R, m) float32, with biases.
        activation: (R, f).
        down: (R, W) float32; a partial sum over tp where F is split.
        combine: (t, W) float32; a partial sum over tp where tp ranks route the same tokens.
        latent_out: (t, D) float32.
        shared: (t, D) float32; a partial sum over tp where tp ranks route the same tokens.
    """

    latent_in: Float[Tensor, "t L"] | None = None
    dispatch: Float[Tensor, "R W"] | None = None
    gate_up: Float32[Tensor, "R m"] | None = None
    activation: Float[Tensor, "R f"] | None = None
    down: Float32[Tensor, "R W"] | None = None
    combine: Float32[Tensor, "t W"] | None = None
    latent_out: Float32[Tensor, "t D"] | None = None
    shared: Float32[Tensor, "t D"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lessons:
    """What stages hand on in place of their own results: values for all tokens by dense index, the same on every rank.

    A stage with a lesson computes its own result all the same, and that is what the trace shows. Values are cast to
    the dtype of the stage. Of a sum over tp every rank takes `share`. A lesson that the layer has no stage for is left
    alone.

    Attributes:
        on: whether they are handed on at all.
        logits: (T, E).
        topk_ids: (T, K) integers from 0 to E - 1.
        topk_weights: (T, K).
        latent_in: (T, L).
        dispatch: (T * K, W), as all by row: slot k of token i is line i * K + k.
        gate_up: (T * K, M), in checkpoint layout.
        activation: (T * K, F).
        down: (T * K, W).
        combine: (T, W).
        latent_out: (T, D).
        shared: (T, D).
    """

    on: bool
    logits: Float[Tensor, "T E"] | None = None
    topk_ids: Int[Tensor, "T K"] | None = None
    topk_weights: Float[Tensor, "T K"] | None = None
    latent_in: Float[Tensor, "T L"] | None = None
    dispatch: Float[Tensor, "TK W"] | None = None
    gate_up: Float[Tensor, "TK M"] | None = None
    activation: Float[Tensor, "TK F"] | None = None
    down: Float[Tensor, "TK W"] | None = None
    combine: Float[Tensor, "T W"] | None = None
    latent_out: Float[Tensor, "T D"] | None = None
    shared: Float[Tensor, "T D"] | None = None


def share(tp_index: int, tp: int) -> float:
    """The factor of a tp rank's part of a sum: 1/2, 1/4, and so on, the last two equal, so that they add up to 1.

    Powers of two are exact, and unequal ones show when a rank's part is taken for another's.
    """
    return 1.0 if tp == 1 else 2.0 ** -min(tp_index + 1, tp - 1)


def own_columns(stage: str, lines: Tensor, config: MoEConfig, parallel: ParallelConfig, tp_index: int) -> Tensor:
    """This rank's part of lines of a lesson: of their columns, or where ranks hold partial sums its share of all."""
    if stage == "gate_up" and parallel.splits_intermediate:
        return split_gate_up(lines, config, parallel.tp, tp_index, dim=1)
    if stage == "activation" and parallel.splits_intermediate:
        return lines.chunk(parallel.tp, dim=1)[tp_index]
    summed = parallel.splits_intermediate if stage == "down" else parallel.splits_shared
    if stage in ("down", "combine", "shared") and summed:
        return lines.float() * share(tp_index, parallel.tp)
    return lines


def check_lessons(lessons: Lessons, config: MoEConfig) -> None:
    """Raises `ValueError` unless lessons are of one number of tokens, and as wide as the stages of the layer."""
    width, inner = config.expert_width, config.intermediate_size
    halves = 2 if config.gated else 1
    by_token = {"topk_ids": config.top_k, "topk_weights": config.top_k, "combine": width}
    if config.router.source != "ids":
        by_token["logits"] = config.num_experts
    if config.latent_size is not None:
        by_token |= {"latent_in": config.latent_size, "latent_out": config.hidden_size}
    if config.shared_width:
        by_token["shared"] = config.hidden_size
    by_row = {"dispatch": width, "gate_up": halves * inner, "activation": inner, "down": width}
    tokens = None
    for lines, columns_of in ((1, by_token), (config.top_k, by_row)):
        for name, columns in columns_of.items():
            lesson = getattr(lessons, name)
            if lesson is None:
                continue
            tokens = lesson.shape[0] // lines if tokens is None else tokens
            if tuple(lesson.shape) != (tokens * lines, columns):
                raise ValueError(
                    f"lessons.{name} of shape {tuple(lesson.shape)}: allowed is {(tokens * lines, columns)}, for "
                    f"{tokens} tokens"
                )


def take(lesson: Tensor, line: Tensor) -> Tensor:
    """The lines asked for, (n, ...), zeros where there is no line of that number."""
    lines = lesson.shape[0]
    if lines == 0:
        return lesson.new_zeros(line.shape[0], *lesson.shape[1:])
    absent = (line < 0) | (line >= lines)
    return lesson.index_select(0, line.clamp(0, lines - 1)).masked_fill_(absent[:, None], 0)
