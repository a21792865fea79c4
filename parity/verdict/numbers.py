"""Values against the oracle and against each other, within derived bounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parity.case import Case
from parity.oracle import Reference
from parity.results import RankResult
from parity.ties import most
from parity.tolerance import SENSITIVITY, SIGMAS, SLACK, ErrorModel, Errors, bound, element_bound
from parity.verdict.gate import Gate, graded
from parity.verdict.layout import assemble, expert_ranks, holdings, home, listed, place
from parity.verdict.structure import choices, exempt, shown
from parity.verdict.tally import INFINITE

ERROR_RATIO = 2.0
"""Frameworks whose errors differ by more than this factor are reported: one of them rounds more often."""
ULPS = (0.5, 1, 2, 4, 8)
WORST_ROWS = 10


def nontrivial(case: Case, reference: Reference) -> Gate:
    rms = float(np.sqrt(np.mean(reference.y**2)))
    hit = np.bincount(reference.ids.ravel(), minlength=case.experts) > 0
    plenty = case.total_tokens * case.top_k >= 4 * case.experts
    # of experts that always tie, the last may never get a token
    plenty &= not (case.flags.hot or case.flags.ties)
    if not 1e-3 < rms < 1e3:
        return Gate("sane", "oracle", False, f"the reference is trivial: output RMS {rms:.3g}, allowed 1e-3 to 1e3")
    if plenty and not hit.all():
        idle = ", ".join(map(str, np.flatnonzero(~hit)[:8]))
        return Gate("sane", "oracle", False, f"no token reaches experts {idle}: choose another seed")
    return Gate("sane", "oracle", True, f"output RMS {rms:.3g}, {hit.sum()} of {case.experts} experts in use")


def sensitive(case: Case, reference: Reference, model: ErrorModel) -> Gate:
    limits = bound(Errors.of(variance(case, reference), freedom(case)), model)
    # a dropped choice adds nothing, nor does relu2 with every unit off: they have nothing to lose
    counts = reference.kept & (reference.slot_norm > 0)
    smallest = np.where(counts, reference.slot_norm, np.inf).min(axis=1)
    share = limits / smallest
    token = int(np.argmax(share))
    detail = (
        f"token {token}: its bound is {share[token]:.2g} of its smallest expert's part, allowed {SENSITIVITY:.2g}; "
        "losing that expert could hide in it"
    )
    passed = bool(share[token] < SENSITIVITY)
    return Gate("sensitive", "oracle", passed, detail, float(share[token] / SENSITIVITY))


@dataclass(frozen=True)
class Side:
    """One framework's answer laid out by dense token, beside the reference it is held to."""

    y: np.ndarray
    ids: np.ndarray
    """(T, K) the framework's choice; the oracle's where it shows none."""
    weights: np.ndarray | None
    logits: np.ndarray | None
    reference: Reference
    """The oracle's answer, replayed with this framework's choice where tokens are exempt."""
    exempt: np.ndarray
    """(T,) tokens whose experts differ from the oracle's."""
    error: np.ndarray
    variance: np.ndarray
    errors: Errors
    """(T,) of each token."""

    @classmethod
    def of(cls, case: Case, reference: Reference, ranks: Sequence[RankResult], model: ErrorModel) -> Side:
        y = np.concatenate(
            [ranks[r].y[:count] for r, (_, count) in enumerate(holdings(case)) if case.native or r % case.tp == 0]
        ).astype(np.float64)
        ids, weights, logits = reference.ids, None, None
        if (decisions := shown(ranks)) is not None:
            ids, weights = assemble(case, decisions, "topk_ids"), assemble(case, decisions, "topk_weights")
            if all(d.router_logits is not None for d in decisions):
                logits = assemble(case, decisions, "router_logits")
        differ = (np.sort(ids, axis=1) != np.sort(reference.ids, axis=1)).any(axis=1)
        legal = (ids >= 0) & (ids < case.experts)
        if (
            differ.any()
            and legal.all()
            and all(exempt(case, reference, ids[t], t) for t in np.flatnonzero(differ).tolist())
        ):
            reference = reference.replay(ids.astype(np.int64))
        expected = variance(case, reference)
        errors = Errors.of(expected, freedom(case))
        return cls(y, ids, weights, logits, reference, differ, y - reference.y, expected, errors)


def routing(case: Case, side: Side, name: str, model: ErrorModel) -> list[Gate]:
    """Logits, and weights gathered by expert id, within their bounds."""
    reference, gates = side.reference, []
    scale = SLACK * SIGMAS * model.unit
    if reference.logits is not None and side.logits is not None:
        limit = scale * np.sqrt(reference.logit_variance) + 1e-30
        margin = np.abs(side.logits - reference.logits) / limit
        if not case.flags.gate:  # given logits must arrive unchanged
            margin = np.where(side.logits == reference.logits.astype(np.float32), 0.0, np.inf)
        token, expert = np.unravel_index(np.argmax(margin), margin.shape)
        detail = f"logit of token {token} for expert {expert} is {side.logits[token, expert]:.7g}, expected {reference.logits[token, expert]:.7g}"  # noqa: E501
        gates.append(graded("router", name, float(margin[token, expert]), detail, "logits"))
    if side.weights is None:
        return gates
    mine, theirs = np.argsort(side.ids, axis=1), np.argsort(reference.ids, axis=1)
    expected = np.take_along_axis(reference.weights, theirs, axis=1)
    limit = scale * np.abs(expected) * np.sqrt(np.take_along_axis(reference.weight_variance, theirs, axis=1))
    margin = np.abs(np.take_along_axis(side.weights, mine, axis=1) - expected) / (limit + 1e-30)
    margin[(np.take_along_axis(side.ids, mine, 1) != np.take_along_axis(reference.ids, theirs, 1)).any(axis=1)] = 0
    token, slot = np.unravel_index(np.argmax(margin), margin.shape)
    expert = reference.ids[token][theirs[token][slot]]
    got = side.weights[token][mine[token][slot]]
    detail = f"weight of token {token} for expert {expert} is {got:.7g}, expected {expected[token, slot]:.7g}"
    gates.append(graded("router", name, float(margin[token, slot]), detail, "choice"))
    return gates


def output(case: Case, side: Side, name: str, model: ErrorModel) -> list[Gate]:
    """The output per token, expert, rank and element."""
    per_token = _over(np.linalg.norm(side.error, axis=1), bound(side.errors, model))
    token = int(np.argmax(per_token))
    off = per_token > 1
    detail = f"{_token(case, side, token)} is off by {per_token[token]:.3g} times its bound{_pattern(case, side, off)}"
    gates = [graded("oracle", name, float(per_token[token]), detail)]

    for what, members in (("expert", _users(case, side)), ("DP rank", _residents(case))):
        ratio = _together(side, members, model)
        worst = int(np.nanargmax(ratio))
        detail = f"tokens of {what} {worst} together are off by {ratio[worst]:.3g} times their bound"
        gates.append(graded("oracle", name, float(ratio[worst]), detail))

    limits = element_bound(side.variance, side.reference.y, model)
    per_element = _over(np.abs(side.error), limits)
    at, column = np.unravel_index(np.argmax(per_element), per_element.shape)
    detail = (
        f"{_token(case, side, int(at))}, column {column}: {side.y[at, column]:.6g}, expected "
        f"{side.reference.y[at, column]:.6g} within {limits[at, column]:.2g}"
    )
    gates.append(graded("oracle", name, float(per_element[at, column]), detail))
    return gates


def _users(case: Case, side: Side) -> np.ndarray:
    """(T, E) which tokens use which expert."""
    chosen = np.zeros((case.total_tokens, case.experts), bool)
    np.put_along_axis(chosen, np.clip(side.ids, 0, case.experts - 1), True, axis=1)
    return chosen


def _residents(case: Case) -> np.ndarray:
    """(T, dp) which tokens lie on which DP rank."""
    return np.repeat(np.arange(case.dp), case.tokens)[:, None] == np.arange(case.dp)


def _together(side: Side, members: np.ndarray, model: ErrorModel) -> np.ndarray:
    """(n,) the error over its bound of the tokens of each of n groups (T, n) together; NaN where a group has none."""
    error2 = (side.error**2).sum(axis=1)
    out = np.full(members.shape[1], np.nan)
    for i in np.flatnonzero(members.any(axis=0)):
        these = members[:, i]
        out[i] = _over(np.sqrt(error2[these].sum()), bound(side.errors[these].together(), model))
    return out


def between(case: Case, one: tuple[str, Side], other: tuple[str, Side], model: ErrorModel) -> Gate:
    (name, a), (second, b) = one, other
    same = ~(a.exempt | b.exempt)
    limit = math.sqrt(2) * bound(a.errors, model)
    margin = np.where(same, _over(np.linalg.norm(a.y - b.y, axis=1), limit), 0.0)
    token = int(np.argmax(margin))
    detail = f"{_token(case, a, token)}: they differ by {margin[token]:.3g} times sqrt(2) of the bound"
    return graded("frameworks", f"{name} vs {second}", float(margin[token]), detail)


def compare(a: Side, b: Side) -> dict:
    first, second = float(np.linalg.norm(a.error)), float(np.linalg.norm(b.error))
    ratio = first / second if second else (1.0 if not first else math.inf)
    return {"error_ratio": ratio, "error_ratio_usual": 1 / ERROR_RATIO <= ratio <= ERROR_RATIO,
            "bitwise_equal": float(np.mean(a.y == b.y))}  # fmt: skip


def numbers(case: Case, side: Side, model: ErrorModel) -> dict:
    """What a report shows of one framework."""
    y = side.reference.y
    exponent = np.floor(np.log2(np.maximum(np.abs(y), np.finfo(np.float32).tiny)))
    ulps = np.abs(side.error) / (2 * model.u * 2.0**exponent)
    edges = [0, *ULPS, np.inf]
    histogram = {f"<={high:g}": int(((ulps > low) | (low == 0)).sum() - (ulps > high).sum())
                 for low, high in itertools.pairwise(edges)}  # fmt: skip
    spread = np.sqrt((side.error**2).sum(axis=1) / np.maximum((y**2).sum(axis=1), 1e-300))
    token = int(np.argmax(_over(np.linalg.norm(side.error, axis=1), np.sqrt(side.variance.sum(axis=1)))))
    column = int(np.argmax(np.abs(side.error[token])))
    per_token = _over(np.linalg.norm(side.error, axis=1), bound(side.errors, model))
    found = choices(case, side.reference)
    chance = np.zeros(1) if found is None else found.chance()
    return {
        "max_abs": float(np.abs(side.error).max()),
        "relative_frobenius": float(np.linalg.norm(side.error) / np.linalg.norm(y)),
        "worst_token_relative": float(spread.max()),
        "signed_bias": float(np.mean(np.sign(y) * side.error) / (model.unit * np.sqrt(np.mean(y**2)))),
        "observed_over_model": float(np.sqrt((side.error**2).sum() / side.variance.sum()) / model.unit),
        "ulps": histogram,
        "exemptions": int(side.exempt.sum()),
        "exemptions_expected": float(chance.sum()),
        "exemptions_allowed": most(chance),
        "exemptions_possible": 0 if found is None else int(found.open().sum()),
        "worst": {"token": token, "column": column, "place": place(case, token), "experts": side.ids[token].tolist(),
                  "ranks": expert_ranks(case, side.ids[token]), "value": float(side.y[token, column]),
                  "expected": float(y[token, column])},
        "worst_rows": [_row(case, side, int(t), float(per_token[t]), float(spread[t]))
                       for t in np.argsort(-per_token, kind="stable")[:WORST_ROWS]],
        **_margins(case, side, model),
    }  # fmt: skip


def _row(case: Case, side: Side, token: int, margin: float, relative: float) -> dict:
    rank, row = home(case, token)
    return {"token": token, "rank": rank, "row": row, "experts": side.ids[token].tolist(),
            "margin": min(margin, INFINITE), "relative": relative}  # fmt: skip


def _margins(case: Case, side: Side, model: ErrorModel) -> dict:
    """Error over bound of the tokens of each DP rank, of each expert, and of each expert's tokens on each DP rank."""
    users, residents = _users(case, side), _residents(case)
    out: dict[str, list] = {
        "by_rank": _plain(_together(side, residents, model)),
        "by_expert": _plain(_together(side, users, model)),
    }
    if case.dp > 1:
        both = (_together(side, users & residents[:, rank, None], model) for rank in range(case.dp))
        out["by_rank_and_expert"] = [_plain(row) for row in both]
    return out


def _plain(margins: np.ndarray) -> list[float | None]:
    return [None if math.isnan(m) else min(m, INFINITE) for m in margins.tolist()]


def _over(error: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Error over bound; where nothing may be off (a token that lost every expert is exactly zero), 0 or infinity."""
    exact = np.where(error > 0, np.inf, 0.0)
    return np.divide(error, limit, out=exact, where=limit > 0)


def variance(case: Case, reference: Reference) -> np.ndarray:
    split = case.tp > 1 and not case.ep
    return reference.variance + reference.tp_variance if split else reference.variance


def freedom(case: Case) -> int:
    """Independent errors behind one token's output: no more than its narrowest layer has elements."""
    return min(case.hidden, case.intermediate, case.expert_width)


def _token(case: Case, side: Side, token: int) -> str:
    where = f", on ranks {listed(expert_ranks(case, side.ids[token]))}" if case.ep else ""
    return f"token {token} ({place(case, token)}; experts {listed(side.ids[token])}{where})"


def _pattern(case: Case, side: Side, off: np.ndarray) -> str:
    """What the tokens that are off have in common, in words."""
    count = int(off.sum())
    if not count:
        return ""
    text = f"; {count} of {len(off)} tokens are off"
    if off.all():
        return text
    shared = [e for e in range(case.experts) if (side.ids[off] == e).any(axis=1).all()]
    if shared and count > 1:
        text += f", all of them use expert {listed(shared)}"
    owner = np.repeat(np.arange(case.world), case.rank_counts) if case.sequence_parallel else np.repeat(
        np.arange(case.dp), case.tokens)  # fmt: skip
    owners = sorted(set(owner[off].tolist()))
    if len(owners) < len(set(owner.tolist())):
        text += f", all on {'rank' if case.sequence_parallel else 'DP rank'} {listed(owners)}"
    return text
