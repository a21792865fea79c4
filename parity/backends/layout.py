"""How a case's tokens lie on its ranks.

The arrays of a case hold real tokens only, densely, in rank order. Here they are cut into one block a token-holding
rank (a DP rank, or each rank where tokens come split over dp and tp), every block padded to the largest. Padding is
poison: NaN in values (or the number in the array "padding", if there is one), the sentinel id E in ids. A layer that
lets it through shows it.

    tokens (3, 1), T = 4:   dense rows [0 1 2 3]   ->   block 0 = [0 1 2], block 1 = [3 nan nan],   counts (3, 1)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from parity.arrays import ArrayRef, bits_of_float32
from parity.case import Case
from parity.results import Decisions, RankResult, Rows
from parity.stages import NAMES

NAN_BFLOAT16 = np.uint16(0x7FC0)
PADDING = "padding"
"""Name of an array of one float32: what padding holds in place of NaN."""
INPUTS = ("x", "router_logits", "topk_ids", "topk_weights")
ROUTING_FIELDS = ("token_index", "router_logits", "topk_ids", "topk_weights")
ROW_FIELDS = ("group_sizes", "row_token", "row_slot", "expert_load")
TRACE_FIELDS = (*ROUTING_FIELDS, *ROW_FIELDS)
"""What both houses' traces call as `Decisions` and `Rows` do."""
STAGE_FIELDS = tuple(name for name in NAMES if name not in ("logits", "choice", "reduce"))
"""Results of stages that both houses' traces hold under `stages`."""
TAUGHT_FIELDS = {
    "router_logits": "logits",
    "topk_ids": "topk_ids",
    "topk_weights": "topk_weights",
    "row_token": "row_token",
    "row_slot": "row_slot",
}
"""What else of the trace of a taught run goes to `RankResult.taught`, and its name there."""


@dataclass(frozen=True)
class TokenBlocks:
    """A case's per-token inputs in blocks of equal size."""

    blocks: dict[str, np.ndarray]
    """(blocks, rows, width) by input name; bfloat16 as its bits."""
    dtypes: dict[str, str]
    counts: tuple[int, ...] | None
    """Real tokens in each block; None when every row of every block is real."""


def block_counts(case: Case) -> tuple[int, ...]:
    """Real tokens in each block: one block a DP rank, or a rank when tokens come split over dp and tp."""
    return case.rank_counts if case.native else case.tokens


def block_of_rank(case: Case, rank: int) -> int:
    """Which block lies on a rank."""
    return rank if case.native else rank // case.tp


def token_blocks(case: Case, arrays: Mapping[str, ArrayRef]) -> TokenBlocks:
    """Cut the dense inputs into padded blocks."""
    counts = block_counts(case)
    rows = max(counts)
    poison = {"bfloat16": NAN_BFLOAT16, "float32": np.float32(np.nan), "int32": np.int32(case.experts)}
    if PADDING in arrays:
        number = np.array(arrays[PADDING].open())
        poison |= {"bfloat16": bits_of_float32(number)[0], "float32": number[0]}
    blocks, dtypes = {}, {}
    for name in INPUTS:
        if name not in arrays:
            continue
        ref = arrays[name]
        dense = ref.open()
        if dense.shape[0] != case.total_tokens:
            raise ValueError(f"{name} has {dense.shape[0]} rows for {case.total_tokens} tokens")
        out = np.full((len(counts), rows, *dense.shape[1:]), poison[ref.dtype])
        start = 0
        for index, count in enumerate(counts):
            out[index, :count] = dense[start : start + count]
            start += count
        blocks[name], dtypes[name] = out, ref.dtype
    return TokenBlocks(blocks, dtypes, None if len(set(counts)) == 1 else counts)


def parameters(arrays: Mapping[str, ArrayRef]) -> dict[str, ArrayRef]:
    """The arrays that are parameters of the layer, by their names in the checkpoint."""
    return {name: ref for name, ref in arrays.items() if name not in (*INPUTS, PADDING)}


def layer_options(case: Case) -> tuple[dict, dict, dict]:
    """Keyword arguments of a house's MoEConfig, RouterConfig and ParallelConfig that a case stands for.

    Both houses take the same names; each builds its own objects from them.
    """
    f = case.flags
    router = {
        "source": "ids" if f.ids else "gate" if f.gate else "logits",
        "scoring": "sigmoid" if f.sigmoid else "softmax",
        "renormalize": f.renorm,
        "num_groups": f.groups[0],
        "groups_kept": f.groups[1],
        "score_correction_bias": f.bias,
        "scaling_factor": f.scale,
        "weight_on_input": f.weightin,
    }
    moe = {
        "num_experts": case.experts,
        "top_k": case.top_k,
        "hidden_size": case.hidden,
        "intermediate_size": case.intermediate,
        "activation": f.activation,
        "gated": case.gated,
        "gate_up_layout": "interleaved" if f.interleaved else "concatenated",
        "swiglu_alpha": f.alpha,
        "swiglu_limit": f.limit,
        "expert_bias": f.expertbias,
        "num_shared_experts": f.shared,
        "shared_gate": f.sharedgate,
        "latent_size": f.latent or None,
        "dtype": {"bf16": "bfloat16", "f32": "float32"}[case.format],
    }
    parallel = {
        "dp": case.dp,
        "tp": case.tp,
        "expert_parallel": case.ep,
        "sequence_parallel": None if case.sp is None else case.sequence_parallel,
        "token_layout": "dp_tp" if case.native else "dp",
        "transport": case.transport,
        "nodes": case.nodes,
        "capacity_factor": f.capacity or None,
        "max_rows": f.maxrows or None,
    }
    return moe, router, parallel


def decisions(traced: Mapping[str, np.ndarray], dropped: int) -> Decisions:
    """A rank's decisions from what its trace holds of TRACE_FIELDS."""
    rows = Rows(**{name: traced[name] for name in ROW_FIELDS}, dropped=dropped)
    return Decisions(**{name: traced[name] for name in ROUTING_FIELDS if name in traced}, rows=rows)


def hand_out(
    case: Case,
    y: np.ndarray,
    y_dtype: str,
    *,
    topk_ids: np.ndarray | None = None,
    topk_weights: np.ndarray | None = None,
    router_logits: np.ndarray | None = None,
    repeat_equal: bool | None = None,
) -> dict[int, RankResult]:
    """Every rank's result, from an answer for all tokens that one process computed.

    What the layer computes does not depend on the mesh, so a layer without one can be held against any mesh: each rank
    gets the rows of its tokens. That says nothing about a mesh of the layer's own.

    Args:
      case: what was run.
      y: (T, D) output of the real tokens, in the order of the case's `x`.
      y_dtype: the dtype the layer returned, by name.
      topk_ids: (T, K) the layer's choice, if it shows it; then with its weights.
      topk_weights: (T, K) their weights.
      router_logits: (T, E) if it shows them.
      repeat_equal: whether a second run gave the same bits, if there was one.
    """
    starts = np.cumsum([0, *block_counts(case)])
    routed = np.cumsum([0, *(case.rank_counts if case.sequence_parallel else case.tokens)])
    out = {}
    for rank in range(case.world):
        block = block_of_rank(case, rank)
        decisions = None
        if topk_ids is not None and topk_weights is not None:
            chunk = rank if case.sequence_parallel else rank // case.tp
            own = slice(routed[chunk], routed[chunk + 1])
            decisions = Decisions(
                token_index=np.arange(own.start, own.stop, dtype=np.int32),
                topk_ids=topk_ids[own],
                topk_weights=topk_weights[own],
                router_logits=None if router_logits is None else router_logits[own],
            )
        rows = y[starts[block] : starts[block + 1]]
        out[rank] = RankResult(y=rows, y_dtype=y_dtype, decisions=decisions, repeat_equal=repeat_equal)
    return out
