"""A framework that is right by construction: the oracle's answer, rounded, laid out on ranks as a framework would."""

import dataclasses

import numpy as np

from parity.arrays import bits_of_float32, float32_of_bits
from parity.fixtures import DTYPE
from parity.results import Decisions, RankResult, Rows
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
    return out
