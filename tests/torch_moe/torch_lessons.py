"""Lessons out of traces: the results that ranks showed, put together for all tokens."""

import numpy as np
from torch_modes import arrays_of, build, inputs_of, to_numpy

from torch_moe import Lessons, MoEConfig, ParallelConfig
from torch_moe.stages import share

BY_ROW = ("dispatch", "gate_up", "activation", "down")


def run_on_rank(rank, config, parallel, arrays, counts, given, lessons):
    """y and the trace of one rank, freely first, and then once for each of `lessons` (mappings of dense arrays)."""
    import torch

    moe = build(config, parallel)
    x, given = inputs_of(rank, config, parallel, arrays, given)
    found = []
    with torch.no_grad():
        for lesson in [None, *lessons]:
            taught = None if lesson is None else Lessons(on=True, **{k: torch.from_numpy(v) for k, v in lesson.items()})
            y, trace = moe(x, counts=counts, trace=True, lessons=taught, **given)
            found.append((to_numpy(y), arrays_of(trace)))
    return found


def stages_of(trace):
    """The results of one rank by the names of lessons, without those that the layer does not have."""
    named = {"logits": trace["router_logits"], "topk_ids": trace["topk_ids"], "topk_weights": trace["topk_weights"]}
    return {name: value for name, value in {**named, **trace["stages"]}.items() if value is not None}


def dense_results(traces, config: MoEConfig, parallel: ParallelConfig, tokens: int):
    """Each stage's result for all tokens. Ranks that have the same must agree; what nobody has is NaN (ids: -1)."""
    ranks = [stages_of(trace) for trace in traces]
    dense = {}
    summed = dict.fromkeys(("combine", "shared"), parallel.splits_shared) | {"down": parallel.splits_intermediate}
    for name in ranks[0]:
        both = zip(ranks, traces, strict=True)
        pieces = [_spread(name, stages[name], trace, config, tokens) for stages, trace in both]
        over_tp = [pieces[first : first + parallel.tp] for first in range(0, parallel.world, parallel.tp)]
        if parallel.splits_intermediate and name in ("gate_up", "activation"):
            pieces = [_join(row, halves=2 if _has_halves(name, config) else 1) for row in over_tp]
        elif summed.get(name, False):
            pieces = [np.sum(row, axis=0) for row in over_tp]
        dense[name] = _merge(name, pieces)
    return dense


def _has_halves(name, config):
    return name == "gate_up" and config.gated and config.gate_up_layout == "concatenated"


def _spread(name, values, trace, config, tokens):
    line, lines = trace["token_index"], tokens
    if name in BY_ROW:
        line = np.where(trace["row_token"] >= 0, trace["row_token"] * config.top_k + trace["row_slot"], -1)
        lines = tokens * config.top_k
    assert values.shape[0] == line.shape[0], f"{name}: {values.shape} for {line.shape}"
    padding = values[line < 0]
    assert (padding == (config.num_experts if name == "topk_ids" else 0)).all(), f"{name}: not zeros in padding"
    out = np.full((lines, *values.shape[1:]), -1 if name == "topk_ids" else np.nan, values.dtype)
    out[line[line >= 0]] = values[line >= 0]
    return out


def _join(row, halves):
    lines, width = row[0].shape
    parts = [piece.reshape(lines, halves, width // halves) for piece in row]
    return np.concatenate(parts, axis=2).reshape(lines, width * len(row))


def _merge(name, pieces):
    merged = pieces[0].copy()
    for piece in pieces[1:]:
        known, here = (part >= 0 if name == "topk_ids" else ~np.isnan(part) for part in (merged, piece))
        np.testing.assert_array_equal(merged[known & here], piece[known & here], err_msg=name)
        merged[here] = piece[here]
    return merged


def as_lessons(dense):
    """Dense results as lessons, with numbers that nobody may read where there are none."""
    return {
        name: np.where(value < 0, 0, value) if name == "topk_ids" else np.nan_to_num(value, nan=1e6)
        for name, value in dense.items()
    }


def shares(tp):
    return [share(index, tp) for index in range(tp)]
