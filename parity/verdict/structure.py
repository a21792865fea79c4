"""Everything that must agree exactly: shapes, dtypes, who routes what, rows and their order, replicas, repeats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from parity.case import Case
from parity.delivery import Delivery, deliver
from parity.fixtures import DTYPE
from parity.oracle import Reference
from parity.results import Decisions, RankResult, Rows
from parity.ties import Choices, most
from parity.tolerance import ErrorModel
from parity.verdict.gate import Gate
from parity.verdict.layout import assemble, holdings, listed, place

Faults = Iterator[tuple[str, str]]
"""Stages (`parity.stages`, or "" where it is of none) and what is wrong there."""


def structure(case: Case, reference: Reference, name: str, ranks: Sequence[RankResult]) -> list[Gate]:
    """Shapes first; exact comparisons only where shapes hold, and of what the framework shows."""
    stage, wrong = _first(_shape_faults(case, ranks))
    if wrong:
        return [Gate("sane", name, False, wrong, stage=stage)]
    gates = [Gate("sane", name, True, "shapes, dtypes, finite values, zero padding")]
    stage, exact = _first(_exact_faults(case, reference, ranks))
    gates.append(Gate("exact", name, not exact, exact or "all that the framework shows agrees", stage=stage))
    return gates


def shown(ranks: Sequence[RankResult]) -> list[Decisions] | None:
    """Every rank's decisions, or None where a rank does not show its own."""
    found = [result.decisions for result in ranks if result.decisions is not None]
    return found if len(found) == len(ranks) else None


def whole(case: Case, ranks: Sequence[RankResult]) -> list[Decisions] | None:
    """Every rank's decisions, if they are about the tokens they should be about."""
    decisions = shown(ranks)
    if decisions is None or len(ranks) != case.world:
        return None
    for count, chosen in zip(case.rank_counts, decisions, strict=True):
        shapes = {chosen.topk_ids.shape, chosen.topk_weights.shape}
        if (chosen.token_index >= 0).sum() != count or shapes != {(len(chosen.token_index), case.top_k)}:
            return None
    return decisions


def shown_rows(ranks: Sequence[RankResult]) -> list[Rows] | None:
    """Every rank's rows, or None where a rank does not show its own."""
    found = [decisions.rows for decisions in shown(ranks) or () if decisions.rows is not None]
    return found if len(found) == len(ranks) else None


def not_checked(reference: Reference, ranks: Sequence[RankResult]) -> list[str]:
    """What the verdict has to leave out because the framework does not show it."""
    decisions, out = shown(ranks), []
    if decisions is None:
        out.append("experts and weights")
    if reference.logits is not None and (decisions is None or any(d.router_logits is None for d in decisions)):
        out.append("router logits")
    if shown_rows(ranks) is None:
        out.append("rows, loads and drops")
    if any(result.repeat_equal is None for result in ranks):
        out.append("repeated run")
    return out


def _shape_faults(case: Case, ranks: Sequence[RankResult]) -> Faults:
    if len(ranks) != case.world:
        yield "", f"{len(ranks)} ranks answered, expected {case.world}"
        return
    for rank, (result, routed) in enumerate(zip(ranks, case.rank_counts, strict=True)):
        if (chosen := result.decisions) is None:
            continue
        ids, tokens = chosen.topk_ids, int((chosen.token_index >= 0).sum())
        if ids.shape[1:] != (case.top_k,) or chosen.topk_weights.shape != ids.shape:
            yield "choice", f"rank {rank}: top-k ids {ids.shape}, weights {chosen.topk_weights.shape}"
        elif tokens != routed:
            yield "choice", f"rank {rank}: routed {tokens} tokens, expected {routed}"
    for rank, (result, (_, count)) in enumerate(zip(ranks, holdings(case), strict=True)):
        if result.y.ndim != 2 or result.y.shape[1] != case.hidden or len(result.y) < count:
            yield "reduce", f"rank {rank}: y has shape {result.y.shape}, expected ({count} or more, {case.hidden})"
            continue
        if result.y_dtype != DTYPE[case.format]:
            yield "reduce", f"rank {rank}: y is {result.y_dtype}, expected {DTYPE[case.format]}"
        finite = np.isfinite(result.y)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            what = "padding row" if row >= count else "row"
            where = f"at {what} {row}, column {column} ({(~finite).sum()} such)"
            yield "reduce", f"rank {rank}: y is {result.y[row, column]} {where}"
        elif result.y[count:].any():
            row = count + int(np.flatnonzero(result.y[count:].any(axis=1))[0])
            yield "reduce", f"rank {rank}: padding row {row} is not zero (the rank has {count} tokens)"


def _exact_faults(case: Case, reference: Reference, ranks: Sequence[RankResult]) -> Faults:
    held = holdings(case)
    for rank, result in enumerate(ranks):
        if result.decisions is not None:
            start = sum(case.rank_counts[:rank]) if case.sequence_parallel else held[rank][0]
            tokens = result.decisions.token_index[result.decisions.token_index >= 0]
            expected = np.arange(start, start + case.rank_counts[rank])
            if not np.array_equal(tokens, expected):
                at = int(np.flatnonzero(tokens != expected)[0])
                yield "choice", f"rank {rank}: routes token {tokens[at]} at position {at}, expected {expected[at]}"
                return
        if result.repeat_equal is False:
            yield "", f"rank {rank}: a repeated run gave other bits"
        twin = ranks[rank - rank % case.tp]
        count = held[rank][1]
        if not case.native and not np.array_equal(result.y[:count], twin.y[:count]):
            row, column = np.argwhere(result.y[:count] != twin.y[:count])[0]
            yield "reduce", f"rank {rank}: y differs from its tp replica's at row {row}, column {column}"
    decisions = shown(ranks)
    if decisions is None:
        return
    ids = assemble(case, decisions, "topk_ids")
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= case.experts:
        yield "choice", f"top-k ids reach from {ids.min()} to {ids.max()}, allowed 0 to {case.experts - 1}"
        return
    yield from _choice_faults(case, reference, ids)
    if (rows := shown_rows(ranks)) is not None:
        yield from _delivery_faults(case, ids, rows)


def _choice_faults(case: Case, reference: Reference, ids: np.ndarray) -> Faults:
    """Experts other than the oracle's, where they are not within rounding; or more such tokens than rounding makes."""
    differ = np.flatnonzero((np.sort(ids, axis=1) != np.sort(reference.ids, axis=1)).any(axis=1)).tolist()
    if not differ:
        return
    for token in differ:
        if not exempt(case, reference, ids[token], token):
            gap = reference.routing.gap[token] if reference.routing else 0
            theirs = f"the oracle's are {listed(reference.ids[token])} (gap {gap:.2g})"
            yield "choice", f"token {token} ({place(case, token)}) goes to experts {listed(ids[token])}, {theirs}"
            return
    found = choices(case, reference)
    assert found is not None
    chance = found.chance()
    if len(differ) > (allowed := most(chance)):
        text = (
            f"{len(differ)} tokens go to other experts than the oracle's, each within rounding (the first is token "
            f"{differ[0]}); expected are {chance.sum():.2g} such tokens at most, and {allowed} for any correct router"
        )
        yield "choice", text


def _delivery_faults(case: Case, ids: np.ndarray, ranks: Sequence[Rows]) -> Faults:
    """What each rank's experts got, for the experts that the framework chose."""
    local = case.experts // case.ep_size
    load = np.bincount(ids.ravel(), minlength=case.experts)
    for rank, (rows, delivery) in enumerate(zip(ranks, deliver(case, ids), strict=True)):
        first = rank * local if case.ep else 0
        yield from _row_faults(rows, rank, ids, delivery, first, local)
        if rows.dropped != delivery.dropped:
            yield "dispatch", f"rank {rank}: dropped {rows.dropped} copies of tokens, expected {delivery.dropped}"
        if not np.array_equal(rows.expert_load, load):
            expert = int(np.flatnonzero(rows.expert_load != load)[0])
            yield (
                "choice",
                f"rank {rank}: counts {rows.expert_load[expert]} rows for expert {expert}, expected {load[expert]}",
            )


def _row_faults(got: Rows, rank: int, ids: np.ndarray, delivery: Delivery, first: int, local: int) -> Faults:
    """Rows must lie by expert, then in the order their tokens came, then by slot, and none past the last."""
    copy, slot = np.nonzero(delivery.live)
    expert = ids[delivery.tokens[copy], slot] - first
    order = np.lexsort((slot, copy, expert))
    sizes = np.bincount(expert, minlength=local)
    if not np.array_equal(got.group_sizes, sizes):
        at = int(np.flatnonzero(got.group_sizes != sizes)[0])
        yield "dispatch", f"rank {rank}: {got.group_sizes[at]} rows for expert {first + at}, expected {sizes[at]}"
        return
    rows = len(order)
    if (got.row_token[rows:] >= 0).any():
        yield "dispatch", f"rank {rank}: a row past the last of {rows} is in use"
        return
    for what, values, expected in (
        ("token", got.row_token[:rows], delivery.tokens[copy[order]]),
        ("slot", got.row_slot[:rows], slot[order]),
    ):
        if not np.array_equal(values, expected):
            at = int(np.flatnonzero(values != expected)[0])
            yield "dispatch", f"rank {rank}: row {at} holds {what} {values[at]}, expected {expected[at]}"
            return


def exempt(case: Case, reference: Reference, ids: np.ndarray, token: int) -> bool:
    """Whether a correct router may choose the experts `ids` for a token."""
    found = choices(case, reference)
    return found is not None and found.allowed(token, ids)


def choices(case: Case, reference: Reference) -> Choices | None:
    """What the case's tokens are routed by; None where experts are given."""
    if reference.routing is None:
        return None
    return Choices.of(reference.routing, reference.choice_variance, case.flags, ErrorModel(case.format))


def _first(faults: Faults) -> tuple[str, str]:
    """The first fault, and the stage it shows in."""
    return next(faults, ("", ""))
