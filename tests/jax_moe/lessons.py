"""What the stages of all ranks gave, put together: one dense array for each stage, as lessons have it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import jax_moe as jm
from jax_moe import stages


def by_rank(trace: Any, world: int) -> list[Any]:
    return [jax.tree.map(lambda a, r=r: np.split(np.asarray(a), world)[r], trace) for r in range(world)]


def together(trace: jm.Trace, config: jm.MoEConfig, parallel: jm.ParallelConfig, tokens: int) -> dict[str, np.ndarray]:
    """Every stage's result for all tokens; what no rank has is NaN, or -1 in ids.

    Where tp ranks have parts of columns they are joined, where they have summands they are added, and where they have
    the same they must agree.
    """
    top_k, dense = config.top_k, {}
    ranks = by_rank(trace, parallel.world)
    for name, width in stages.widths(config).items():
        pieces = []
        for rank in ranks:
            values, index = _result(rank, name), rank.token_index
            if name in stages.BY_ROW:
                index = np.where(rank.row_token < 0, -1, rank.row_token * top_k + rank.row_slot)
                assert len(set(index[index >= 0])) == (index >= 0).sum()
            assert values.shape[0] == index.shape[0], name
            assert (values[index < 0] == (config.num_experts if name == "topk_ids" else 0)).all(), name
            rows = tokens * top_k if name in stages.BY_ROW else tokens
            piece = np.full((rows, values.shape[1]), -1 if name == "topk_ids" else np.nan, values.dtype)
            piece[index[index >= 0]] = values[index >= 0]
            pieces.append(piece)
        dense[name] = _join(name, pieces, config, parallel)
        assert dense[name].shape[1] == width, name
    return dense


def _result(rank: Any, name: str) -> np.ndarray:
    decided = {"logits": rank.router_logits, "topk_ids": rank.topk_ids, "topk_weights": rank.topk_weights}
    return decided[name] if name in decided else getattr(rank.stages, name)


def _join(name: str, pieces: list[np.ndarray], config: jm.MoEConfig, parallel: jm.ParallelConfig) -> np.ndarray:
    over_tp = [pieces[first : first + parallel.tp] for first in range(0, parallel.world, parallel.tp)]
    if not parallel.expert_parallel and name in stages.SPLIT:
        halves = 2 if name == "gate_up" and config.gated and config.gate_up_layout == "concatenated" else 1
        blocks = [[piece.reshape(len(piece), halves, -1) for piece in row] for row in over_tp]
        pieces = [np.concatenate(row, axis=2).reshape(len(row[0]), -1) for row in blocks]
    elif stages.summands(parallel, name) > 1:
        pieces = [np.sum(row, axis=0) for row in over_tp]
    whole, missing = pieces[0].copy(), -1 if name == "topk_ids" else np.nan
    for piece in pieces[1:]:
        here = ~np.isnan(piece.astype(np.float64)) if missing != -1 else piece != -1
        known = ~np.isnan(whole.astype(np.float64)) if missing != -1 else whole != -1
        np.testing.assert_array_equal(whole[here & known], piece[here & known], err_msg=name)
        whole[here] = piece[here]
    return whole


def blank(config: jm.MoEConfig, tokens: int, on: bool) -> jm.Lessons:
    """Lessons for every stage, all of them sevens (which is an expert, too)."""
    lines = {name: tokens * (config.top_k if name in stages.BY_ROW else 1) for name in stages.widths(config)}
    arrays = {
        name: np.full((lines[name], width), 7, np.int32 if name == "topk_ids" else np.float32)
        for name, width in stages.widths(config).items()
    }
    return jm.Lessons(on=np.array(on), **arrays)


def lessons(dense: dict[str, np.ndarray], on: bool = True) -> jm.Lessons:
    """Dense results as lessons; for what nobody has, numbers that must not be read."""
    filled = {
        name: np.where(values == -1, 0, values)
        if name == "topk_ids"
        else np.nan_to_num(values.astype(np.float32), nan=1e6)
        for name, values in dense.items()
    }
    return jm.Lessons(on=np.array(on), **filled)
