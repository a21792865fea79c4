"""A framework that is right by construction: the oracle's answer, rounded, laid out on ranks as a framework would."""

import dataclasses

import numpy as np

from parity.arrays import bits_of_float32, float32_of_bits
from parity.fixtures import DTYPE
from parity.results import Decisions, RankResult, Rows
from parity.stages import share
from parity.tolerance import STAGE_ERRORS
from parity.verdict.blocks import BY_ROW, SUMMED, shares_tokens, splits_width
from parity.verdict.layout import holdings


def rounded(values, case):
    return float32_of_bits(bits_of_float32(values)) if case.format == "bf16" else values.astype(np.float32)


def filled(values, rows, value):
    """`values` with padding rows of one value after them."""
    return np.concatenate([values, np.full((rows, *values.shape[1:]), value, values.dtype)])


def spoiled(result, **changes):
    """A RankResult with fields, of itself or of its decisions or rows, replaced by a function of what they were."""

    def replaced(part):
        own = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
        return dataclasses.replace(part, **{name: changes[name](own[name]) for name in own if name in changes})

    decisions = result.decisions
    if decisions is not None:
        decisions = replaced(dataclasses.replace(decisions, rows=decisions.rows and replaced(decisions.rows)))
    return replaced(dataclasses.replace(result, decisions=decisions))


def simulate(case, reference, *, padding=2):
    """RankResults of every rank. `padding` rows are added to each rank."""
    ids, weights = reference.ids, reference.weights.astype(np.float32)
    logits = None if reference.logits is None else reference.logits.astype(np.float32)
    load = np.bincount(ids.ravel(), minlength=case.experts)
    local = case.experts // case.ep_size
    y = rounded(reference.y, case)
    out = []
    for rank, (start, count) in enumerate(holdings(case)):
        first = sum(case.rank_counts[:rank]) if case.sequence_parallel else start
        routed = np.arange(first, first + case.rank_counts[rank])
        visible = np.arange(case.total_tokens) if case.ep else start + np.arange(count)
        low = rank * local if case.ep else 0
        token, slot = np.nonzero((ids[visible] >= low) & (ids[visible] < low + local))
        expert = ids[visible][token, slot] - low
        order = np.lexsort((slot, token, expert))
        rows = Rows(
            group_sizes=np.bincount(expert, minlength=local),
            row_token=filled(visible[token[order]], padding, -1),
            row_slot=filled(slot[order], padding, 0),
            expert_load=load,
        )
        decisions = Decisions(
            token_index=filled(routed, padding, -1),
            router_logits=None if logits is None else filled(logits[routed], padding, np.nan),
            topk_ids=filled(ids[routed], padding, case.experts),
            topk_weights=filled(weights[routed], padding, 0.0),
            rows=rows,
        )
        values = filled(y[start : start + count], padding, 0.0)
        out.append(RankResult(y=values, y_dtype=DTYPE[case.format], decisions=decisions, repeat_equal=True))
    if not reference.stages or reference.taught is None:
        return out
    own = reference.taught()
    return [
        dataclasses.replace(
            result,
            stages=staged(case, reference, result.decisions, rank),
            taught=staged(case, own, result.decisions, rank)
            | decided(own, result.decisions, case)
            | {"y": filled(rounded(own.y[start : start + count], case), padding, 0.0)},
        )
        for rank, (result, (start, count)) in enumerate(zip(out, holdings(case), strict=True))
    ]


def staged(case, reference, decisions, rank, *, keep=("gate_up",)):
    """What each stage gives on a rank; those in `keep`, and sums, stay float32."""
    out, tp_index = {}, rank % case.tp
    for name, value in reference.stages.items():
        if name in ("inputs", "reduce", "topk_weights", "logits"):
            continue
        index = decisions.token_index
        if name in BY_ROW:
            token, slot = decisions.rows.row_token, decisions.rows.row_slot
            index = np.where(token < 0, -1, token * case.top_k + slot)
        out[name] = laid(case, name, value.exact, index, tp_index, keep)
    if "dispatch" not in out:
        out["dispatch"] = laid(case, "dispatch", reference.stages["inputs"].exact, decisions.rows.row_token, 0, keep)
    return out


def laid(case, name, exact, index, tp_index, keep):
    """Rows of a stage's result as one rank has them: rounded, its slice of F or its part of a sum over tp."""
    part = np.where((index < 0)[:, None], 0, exact[np.clip(index, 0, None)])
    if name in ("gate_up", "activation") and splits_width(case):
        part = sliced(case, name, part, tp_index)
    if (name in SUMMED and shares_tokens(case)) or (name == "down" and splits_width(case)):
        part = part * share(tp_index, case.tp)
    return part.astype(np.float32) if name in keep or STAGE_ERRORS[name].rounds == "no" else rounded(part, case)


def sliced(case, name, values, tp_index):
    if name == "gate_up" and case.gated and not case.flags.interleaved:
        gate, up = np.split(values, 2, axis=1)
        return np.concatenate([np.split(half, case.tp, axis=1)[tp_index] for half in (gate, up)], axis=1)
    return np.split(values, case.tp, axis=1)[tp_index]


def decided(reference, decisions, case):
    """The router's part of taught results."""
    real = decisions.token_index >= 0
    index = np.clip(decisions.token_index, 0, None)
    out = {
        "topk_ids": np.where(real[:, None], reference.ids[index], case.experts),
        "topk_weights": np.where(real[:, None], reference.weights[index], 0).astype(np.float32),
    }
    if reference.logits is not None:
        out["logits"] = np.where(real[:, None], reference.logits[index], 0).astype(np.float32)
    return out
