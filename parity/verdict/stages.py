"""Stage by stage: what each rank gave, free-running and taught, against the oracle's value and its bound.

    T tokens   K choices of a token   E experts   n rows of a block   C columns

An error is *born* in a stage that is off although it was taught the oracle's inputs; it *came in* where the stage
computes rightly from those, and is off only when it runs on what the stages before it made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parity.case import Case
from parity.oracle import Reference
from parity.results import Decisions, RankResult
from parity.stages import STAGES, Stage
from parity.tolerance import SIGMAS, SLACK, STAGE_ERRORS, ErrorModel, over
from parity.verdict.blocks import Block, Misshapen, Places, blocks, places, shares_tokens, splits_width
from parity.verdict.gate import Gate, graded
from parity.verdict.layout import expert_ranks, listed, place
from parity.verdict.numbers import freedom
from parity.verdict.structure import exempt, shown
from parity.verdict.tally import INFINITE, ROWS_AT_A_TIME, Expected, Tally, Worst

MIXING = ("latent_out", "shared")
"""Stages whose columns share the errors of roundings inside: they are not independent, and may lean together."""


@dataclass(frozen=True)
class Found:
    """One way (free or taught) of one stage."""

    margin: float
    words: str
    """What the margin is of, where it is of more than one row."""
    worst: Worst | None
    observed_over_model: float | None
    predicted: float | None
    """RMS error that the model expects, over the RMS value."""


def stages(
    case: Case, own: Reference, free: Reference, ids: np.ndarray, name: str, ranks: Sequence[RankResult]
) -> tuple[list[Gate], list]:
    """Judge a framework's stages.

    Args:
      case: what was run.
      own: the oracle's answer for its own choice, which it taught.
      free: its answer for the framework's choice, where that is within rounding; else its own again.
      ids: (T, K) the framework's choice.
      name: the framework's.
      ranks: its results.

    Returns:
      A gate for each stage that was taught, and the table: for each stage that the case has a mapping with "stage",
      "title", "free" and "taught" (margins, or None where the framework shows no such thing), "observed_over_model" and
      "predicted" (RMS error over RMS value, of the model), "state" ("ok", "born" or "came in") and "worst".
    """
    model, decisions = ErrorModel(case.format), shown(ranks)
    if decisions is None or not own.stages or not any(result.stages or result.taught for result in ranks):
        return [], []
    here = [_places(decision) for decision in decisions]
    shows = [
        {**_decided(decision), "y": result.y, **result.stages}
        for decision, result in zip(decisions, ranks, strict=True)
    ]
    taught = [result.taught for result in ranks]
    teaches = own.taught is not None and all(taught)
    there = list(places(taught, here))
    gates, table, earlier = [], [], False
    for stage in STAGES:
        if not _has(case, stage.name):
            continue
        one = _judged(case, stage, free, shows, here, model, ids, False)
        two = None
        if teaches and own.taught is not None:
            skips = frozenset({"gate_up"} if stage.name == "activation" and "gate_up" not in taught[0] else ())
            two = _judged(case, stage, own.taught(skips), taught, there, model, own.ids, True)
        if two is not None:
            gates.append(graded("stages", name, two.margin, _detail(case, ids, stage, two), stage.name))
        state = "ok"
        if two is not None and two.margin > 1:
            state = "born"
        elif one is not None and one.margin > 1:
            state = "came in" if two is not None or earlier else "born"
        earlier |= state != "ok"
        telling = two if two is not None and (state != "came in" or one is None) else one
        table.append({
            "stage": stage.name,
            "title": stage.title,
            "free": None if one is None else one.margin,
            "taught": None if two is None else two.margin,
            "observed_over_model": None if telling is None else telling.observed_over_model,
            "predicted": None if telling is None else telling.predicted,
            "state": state,
            "worst": None if telling is None or telling.worst is None else _worst(ids, telling.worst),
        })  # fmt: skip
    return gates, table


def _has(case: Case, stage: str) -> bool:
    flags = case.flags
    absent = {"logits": flags.ids, "latent_in": not flags.latent, "latent_out": not flags.latent,
              "shared": not flags.shared}  # fmt: skip
    return not absent.get(stage, False)


def _places(decision: Decisions) -> Places:
    rows = decision.rows
    if rows is None:
        return Places(decision.token_index, None, None)
    return Places(decision.token_index, rows.row_token, rows.row_slot)


def _decided(decision: Decisions) -> dict[str, np.ndarray]:
    """A rank's routing under the names that taught results have."""
    out = {"topk_ids": decision.topk_ids, "topk_weights": decision.topk_weights}
    return out if decision.router_logits is None else {**out, "logits": decision.router_logits}


def _judged(
    case: Case,
    stage: Stage,
    reference: Reference,
    found: Sequence[Mapping[str, np.ndarray]],
    where: Sequence[Places],
    model: ErrorModel,
    ids: np.ndarray,
    taught: bool,
) -> Found | None:
    """One stage of one run; None where the framework does not show it.

    Args:
      ids: (T, K) the choice that the run's rows stand for: their slots are in the order of it.
    """
    key = {"choice": "topk_ids", "reduce": "y"}.get(stage.name, stage.name)
    if not any(key in each for each in found):
        return None
    try:
        if stage.name == "choice":
            return _choice(case, reference, found, where, model)
        tally = _tallied(case, stage, reference, found, where, model, ids, taught)
    except Misshapen as fault:
        return Found(INFINITE, str(fault), None, None, None)
    margin, words = next(iter(tally.findings()), (0.0, ""))
    return Found(margin, words, tally.worst, tally.observed_over_model, tally.predicted)


def _tallied(
    case: Case,
    stage: Stage,
    reference: Reference,
    found: Sequence[Mapping[str, np.ndarray]],
    where: Sequence[Places],
    model: ErrorModel,
    ids: np.ndarray,
    taught: bool,
) -> Tally:
    copies = stage.name == "dispatch" and not case.flags.weightin
    value = reference.stages["inputs" if copies else stage.name]
    columns = value.exact.shape[1]
    slot_of, seen = _slots(ids, reference.ids), np.zeros(reference.ids.shape, bool)

    def bias_of(token: np.ndarray, slot: np.ndarray) -> np.ndarray:
        assert value.bias is not None
        return value.bias[token * case.top_k + slot_of[token, slot]]

    laid, grid = blocks(case, stage.name, found, where, columns, None if value.bias is None else bias_of)
    tally = Tally(
        model,
        columns if taught and stage.name not in MIXING else min(columns, freedom(case)),
        drifts=taught and stage.name not in MIXING,
        truncation=model.truncation(_depth(case, stage.name)),
        tail=model.tail(_depth(case, stage.name)) if taught else 1.0,
    )
    # taught, nothing but a sum over tp is left of what its parts add
    parts = shares_tokens(case) if taught and stage.name in ("latent_out", "reduce") else splits_width(case)
    rounds = STAGE_ERRORS[stage.name].rounds != "no" and not copies and grid
    for whole in laid:
        for start in range(0, len(whole.token), ROWS_AT_A_TIME):
            block = _cut(whole, slice(start, start + ROWS_AT_A_TIME))
            expert = users = None
            index = block.token
            if block.slot is None:
                users = reference.ids[block.token]
            else:
                slot = slot_of[block.token, block.slot]
                if (slot < 0).any():
                    tally.lost = f"rank {block.rank} has rows for experts that the oracle's choice does not have"
                    block, slot = _cut(block, slot >= 0), slot[slot >= 0]
                expert = reference.ids[block.token, slot]
                seen[block.token, slot] = True
                index = block.token if copies else block.token * case.top_k + slot
            picked = value[index]
            before, own = picked.before, np.zeros_like(picked.exact)
            if rounds:
                own = own + model.rounding(picked.largest)
            if parts and picked.tp is not None and (rounds or stage.name != "down"):
                before = before + picked.tp
            sharp = not (parts and stage.name == "down" and picked.tp is not None)
            tally.add(block, Expected(picked.exact, before, own, sharp), expert, users)
    missing = reference.kept & ~seen
    if stage.by == "row" and missing.any():
        token, slot = np.argwhere(missing)[0]
        tally.lost = f"no rank has a row of token {token} for expert {reference.ids[token, slot]}"
    return tally


def _depth(case: Case, stage: str) -> int:
    """Terms of a stage's sums; 0 where it is no product."""
    return {"logits": case.hidden, "latent_in": case.hidden, "gate_up": case.expert_width,
            "down": case.intermediate}.get(stage, 0)  # fmt: skip


def _cut(block: Block, rows) -> Block:
    slot = None if block.slot is None else block.slot[rows]
    return Block(block.got[rows].astype(np.float64), block.token[rows], slot, block.rank)


def _slots(ids: np.ndarray, own: np.ndarray) -> np.ndarray:
    """(T, K) which of the oracle's slots has the expert in each of the framework's; -1 where none has."""
    same = ids[:, :, None] == own[:, None, :]
    return np.where(same.any(axis=2), same.argmax(axis=2), -1)


def _choice(
    case: Case,
    reference: Reference,
    found: Sequence[Mapping[str, np.ndarray]],
    where: Sequence[Places],
    model: ErrorModel,
) -> Found:
    """Experts as sets, but for those within rounding; weights by expert."""
    scale, best, error2, expect2, size2 = SLACK * SIGMAS * model.unit, None, 0.0, 0.0, 0.0
    for rank, (each, place_) in enumerate(zip(found, where, strict=True)):
        real = place_.token >= 0
        token, ids, weights = place_.token[real], each["topk_ids"][real], each["topk_weights"][real].astype(np.float64)
        theirs = reference.ids[token]
        mine_at, theirs_at = np.argsort(ids, axis=1), np.argsort(theirs, axis=1)
        ids, theirs = np.take_along_axis(ids, mine_at, axis=1), np.take_along_axis(theirs, theirs_at, axis=1)
        got = np.take_along_axis(weights, mine_at, axis=1)
        expected = np.take_along_axis(reference.weights[token], theirs_at, axis=1)
        variance = expected**2 * np.take_along_axis(reference.weight_variance[token], theirs_at, axis=1)
        margin = np.minimum(over(np.abs(got - expected), scale * np.sqrt(variance)), INFINITE)
        margin[np.isnan(got)] = INFINITE
        for row in np.flatnonzero((ids != theirs).any(axis=1)):
            within = exempt(case, reference, ids[row], int(token[row]))
            margin[row] = 0.0 if within else np.where(np.isin(ids[row], theirs[row]), 0.0, INFINITE)
            got[row], expected[row] = (expected[row], expected[row]) if within else (got[row], 0.0)
        error2, expect2 = error2 + float(((got - expected) ** 2).sum()), expect2 + float(variance.sum())
        size2 += float((expected**2).sum())
        if margin.size and (best is None or margin.max() > best.margin):
            row, slot = np.unravel_index(int(margin.argmax()), margin.shape)
            best = Worst(float(margin[row, slot]), int(token[row]), int(slot), int(ids[row, slot]), rank, 0,
                         float(got[row, slot]), float(expected[row, slot]))  # fmt: skip
    ratio = float(np.sqrt(error2 / expect2) / model.unit) if expect2 > 0 and np.isfinite(error2) else None
    # no size at all: not one token's experts are the right ones
    predicted = model.unit * float(np.sqrt(expect2 / size2)) if expect2 > 0 and size2 > 0 else None
    return Found(0.0 if best is None else best.margin, "", best, ratio, predicted)


def _worst(ids: np.ndarray, worst: Worst) -> dict:
    out = {"token": worst.token, "experts": ids[worst.token].tolist(), "rank": worst.rank,
           "column": worst.column, "value": worst.value, "expected": worst.expected}  # fmt: skip
    if worst.slot is not None:
        out["slot"] = worst.slot
    if worst.expert is not None:
        out["expert"] = worst.expert
    return out


def _detail(case: Case, ids: np.ndarray, stage: Stage, found: Found) -> str:
    """What a gate says of a stage."""
    if found.words or found.worst is None:
        return f"{stage.title}, taught: {found.words or 'nothing to compare'}"
    worst = found.worst
    experts = ids[worst.token]
    held = f", on ranks {listed(expert_ranks(case, experts))}" if case.ep else ""
    row = "" if worst.expert is None else f" for expert {worst.expert}"
    column = "" if stage.name == "choice" else f", column {worst.column}"
    return (
        f"{stage.title}, taught: token {worst.token}{row} on rank {worst.rank} ({place(case, worst.token)}; experts "
        f"{listed(experts)}{held}){column}: {worst.value:.6g}, expected {worst.expected:.6g}; off by "
        f"{worst.margin:.3g} times its bound"
    )
