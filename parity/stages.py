"""The stages of the layer, in order: what is compared one by one, and how each result lies on the ranks.

T tokens, t' tokens a rank routes, R rows on a rank (token-expert pairs, sorted by expert), K choices of a token, W an
expert's width (D, or the latent's L), F intermediate size (a rank's part of it where TP splits it), M rows of the first
projection (2F gated, F not).

A rank's result of a stage is by routed token (t', ...), by row (R, ...) or, for the last, as `y` lies. A *lesson* is
the oracle's result of a stage for all tokens, dense: (T, ...), or (T * K, ...) where the stage is by row, that of token
i and slot k at i * K + k; rounded to the case's dtype where the layer rounds there too, so that it is exact on both
sides. Stages whose ranks hold partial sums over tp are given shares of the lesson that are powers of two (`share`), so
that their sum is exact.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the layer."""

    name: str
    """In results, lessons and traces."""
    title: str
    """In words."""
    by: str
    """"token", "row" or "output"."""


STAGES = (
    Stage(name="logits", title="router logits", by="token"),
    Stage(name="choice", title="ids and weights", by="token"),  # as arrays "topk_ids" and "topk_weights"
    Stage(name="latent_in", title="latent in", by="token"),
    Stage(name="dispatch", title="dispatch", by="row"),
    Stage(name="gate_up", title="gate/up", by="row"),
    Stage(name="activation", title="activation", by="row"),
    Stage(name="down", title="down", by="row"),
    Stage(name="combine", title="combine", by="token"),
    Stage(name="latent_out", title="latent out", by="token"),
    Stage(name="shared", title="shared expert", by="token"),
    Stage(name="reduce", title="reduce", by="output"),
)
NAMES = tuple(stage.name for stage in STAGES)


def share(tp_index: int, tp: int) -> float:
    """The part of a lesson that a tp rank holds of a partial sum: 1/2, 1/4, ..., the last two equal; they add up to 1.

    Unequal, so that a rank's part used in place of another's shows.
    """
    return 2.0 ** -min(tp_index + 1, tp - 1) if tp > 1 else 1.0
