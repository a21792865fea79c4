"""Everything that must agree exactly: shapes, dtypes, who routes what, rows and their order, replicas, repeats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from parity.case import Case
from parity.delivery import Delivery, deliver
from parity.fixtures import DTYPE
from parity.oracle import Reference
from parity.results import RankResult
from parity.tolerance import SIGMAS, SLACK, ErrorModel
from parity.verdict.gate import Gate
from parity.verdict.layout import assemble, holdings, listed, place


def structure(case: Case, reference: Reference, name: str, ranks: Sequence[RankResult]) -> list[Gate]:
    """Shapes first; exact comparisons only where shapes hold."""
    wrong = _first(_shape_faults(case, ranks))
    if wrong:
        return [Gate("sane", name, False, wrong)]
    gates = [Gate("sane", name, True, "shapes, dtypes, finite values, zero padding")]
    exact = _first(_exact_faults(case, reference, ranks))
    gates.append(Gate("exact", name, not exact, exact or "tokens, experts, rows, loads, replicas and repeats agree"))
    return gates


def _shape_faults(case: Case, ranks: Sequence[RankResult]) -> Iterator[str]:
    if len(ranks) != case.world:
        yield f"{len(ranks)} ranks answered, expected {case.world}"
        return
    held = holdings(case)
    for rank, result in enumerate(ranks):
        count = held[rank][1]
        if result.y.ndim != 2 or result.y.shape[1] != case.hidden or len(result.y) < count:
            yield f"rank {rank}: y has shape {result.y.shape}, expected ({count} or more, {case.hidden})"
            continue
        if result.y_dtype != DTYPE[case.format]:
            yield f"rank {rank}: y is {result.y_dtype}, expected {DTYPE[case.format]}"
        finite = np.isfinite(result.y)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            what = "padding row" if row >= count else "row"
            yield f"rank {rank}: y is {result.y[row, column]} at {what} {row}, column {column} ({(~finite).sum()} such)"
        elif result.y[count:].any():
            row = count + int(np.flatnonzero(result.y[count:].any(axis=1))[0])
            yield f"rank {rank}: padding row {row} is not zero (the rank has {count} tokens)"
        routed = case.rank_counts[rank]
        if result.topk_ids.shape[1:] != (case.top_k,) or result.topk_weights.shape != result.topk_ids.shape:
            yield f"rank {rank}: top-k ids {result.topk_ids.shape}, weights {result.topk_weights.shape}"
        elif (result.token_index >= 0).sum() != routed:
            yield f"rank {rank}: routed {(result.token_index >= 0).sum()} tokens, expected {routed}"


def _exact_faults(case: Case, reference: Reference, ranks: Sequence[RankResult]) -> Iterator[str]:
    held = holdings(case)
    local = case.experts // case.ep_size
    for rank, result in enumerate(ranks):
        start = sum(case.rank_counts[:rank]) if case.sequence_parallel else held[rank][0]
        tokens = result.token_index[result.token_index >= 0]
        expected = np.arange(start, start + case.rank_counts[rank])
        if not np.array_equal(tokens, expected):
            at = int(np.flatnonzero(tokens != expected)[0])
            yield f"rank {rank}: routes token {tokens[at]} at position {at}, expected {expected[at]}"
            return
        if not result.repeat_equal:
            yield f"rank {rank}: a repeated run gave other bits"
        twin = ranks[rank - rank % case.tp]
        count = held[rank][1]
        if not case.native and not np.array_equal(result.y[:count], twin.y[:count]):
            row, column = np.argwhere(result.y[:count] != twin.y[:count])[0]
            yield f"rank {rank}: y differs from its tp replica's at row {row}, column {column}"
    ids = assemble(case, ranks, "topk_ids")
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= case.experts:
        yield f"top-k ids reach from {ids.min()} to {ids.max()}, allowed 0 to {case.experts - 1}"
        return
    for token in np.flatnonzero((np.sort(ids, axis=1) != np.sort(reference.ids, axis=1)).any(axis=1)).tolist():
        if not exempt(case, reference, ids[token], token):
            yield (
                f"token {token} ({place(case, token)}) goes to experts {listed(ids[token])}, the oracle's are "
                f"{listed(reference.ids[token])} (gap {reference.routing.gap[token] if reference.routing else 0:.2g})"
            )
            break
    load = np.bincount(ids.ravel(), minlength=case.experts)
    for rank, (result, delivery) in enumerate(zip(ranks, deliver(case, ids), strict=True)):
        first = rank * local if case.ep else 0
        yield from _row_faults(result, rank, ids, delivery, first, local)
        if result.dropped != delivery.dropped:
            yield f"rank {rank}: dropped {result.dropped} copies of tokens, expected {delivery.dropped}"
        if not np.array_equal(result.expert_load, load):
            expert = int(np.flatnonzero(result.expert_load != load)[0])
            yield f"rank {rank}: counts {result.expert_load[expert]} rows for expert {expert}, expected {load[expert]}"


def _row_faults(
    result: RankResult, rank: int, ids: np.ndarray, delivery: Delivery, first: int, local: int
) -> Iterator[str]:
    """Rows must lie by expert, then in the order their tokens came, then by slot, and none past the last."""
    copy, slot = np.nonzero(delivery.live)
    expert = ids[delivery.tokens[copy], slot] - first
    order = np.lexsort((slot, copy, expert))
    sizes = np.bincount(expert, minlength=local)
    if not np.array_equal(result.group_sizes, sizes):
        at = int(np.flatnonzero(result.group_sizes != sizes)[0])
        yield f"rank {rank}: {result.group_sizes[at]} rows for expert {first + at}, expected {sizes[at]}"
        return
    rows = len(order)
    if (result.row_token[rows:] >= 0).any():
        yield f"rank {rank}: a row past the last of {rows} is in use"
        return
    for what, got, expected in (
        ("token", result.row_token[:rows], delivery.tokens[copy[order]]),
        ("slot", result.row_slot[:rows], slot[order]),
    ):
        if not np.array_equal(got, expected):
            at = int(np.flatnonzero(got != expected)[0])
            yield f"rank {rank}: row {at} holds {what} {got[at]}, expected {expected[at]}"
            return


def exempt(case: Case, reference: Reference, ids: np.ndarray, token: int) -> bool:
    """Whether the oracle's choice for a token is within rounding of the framework's."""
    if reference.routing is None:
        return False
    limit = selection_bound(case, reference)[token]
    selection, own = reference.routing.selection[token], set(reference.ids[token])
    last = selection[reference.ids[token][-1]]
    swapped = own.symmetric_difference(int(i) for i in ids)
    return len(set(map(int, ids))) == case.top_k and all(abs(selection[e] - last) <= 2 * limit for e in swapped)


def selection_bound(case: Case, reference: Reference) -> np.ndarray:
    """(T,) bound on the error of a selection score: of a score times its relative error."""
    model = ErrorModel(case.format)
    assert reference.routing is not None
    largest = np.abs(reference.routing.scores).max(axis=1)
    return SLACK * SIGMAS * model.unit * largest * np.sqrt(reference.weight_variance.max(axis=1))


def _first(faults) -> str:
    return next(iter(faults), "")
