"""Every operation in plain JAX: the definition of what kernels compute, and the implementation for CPU.

The grouped product steps over the groups that have rows and, inside a group, over blocks of its rows, so the work grows
with the rows that exist; `jax.lax.ragged_dot` on CPU multiplies every row by every expert. Trip counts depend on data,
which reverse-mode differentiation cannot follow, so the product brings its own gradient.

Shape suffixes: R rows sorted by group, e groups (local experts), D depth, N outputs, M rows of the first projection
(2F gated, F not), F expert intermediate size, t tokens, K experts per token, B rows of a block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_moe import activation as activations
from jax_moe._compat import match_varying
from jax_moe._typing import Array, Float, Float32, Int, Int32
from jax_moe.kernels.schedule import rows_bound
from jax_moe.linear import contract, operand


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How scores become a choice and weights; see `router.route`.

    Attributes:
      top_k: K.
      scoring: "softmax" or "sigmoid".
      renormalize: divide each token's weights by their sum.
      scaling: factor of the weights, last.
      num_groups, groups_kept: the best groups of experts are chosen first; 1: there are no groups.
    """

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = False
    scaling: float = 1.0
    num_groups: int = 1
    groups_kept: int = 1


def grouped_matmul(
    x_RD: Float[Array, "R D"],
    w_eND: Float[Array, "e N D"],
    group_sizes_e: Int[Array, " e"],
    bias_eN: Float[Array, "e N"] | None,
    out_dtype: jnp.dtype,
) -> Float[Array, "R N"]:
    """See `ops.grouped_matmul`."""
    return _product(*match_varying(x_RD, w_eND, group_sizes_e, bias_eN), jnp.dtype(out_dtype))


def gate_up(
    x_RD: Float[Array, "R D"],
    w_eMD: Float[Array, "e M D"],
    group_sizes_e: Int[Array, " e"],
    activation: activations.Activation,
    bias_eM: Float[Array, "e M"] | None,
) -> Float[Array, "R F"]:
    """See `ops.gate_up`."""
    gate_up_RM = grouped_matmul(x_RD, w_eMD, group_sizes_e, bias_eM, jnp.dtype(jnp.float32))
    return activations.apply(gate_up_RM, activation).astype(x_RD.dtype)


def gather_rows(
    x_tD: Float[Array, "t D"],
    index_R: Int[Array, " R"],
    position_tK: Int[Array, "t K"] | None = None,
    group_sizes_e: Int[Array, " e"] | None = None,
) -> Float[Array, "R D"]:
    """See `ops.gather_rows`; the index alone says it all."""
    del position_tK, group_sizes_e
    # An index below zero would count from the end; out of range at the top, it is filled.
    index_R = jnp.where(index_R < 0, x_tD.shape[0], index_R)
    return x_tD.at[index_R].get(mode="fill", fill_value=0)


def gather_gate_up(
    x_tD: Float[Array, "t D"],
    index_R: Int[Array, " R"],
    w_eMD: Float[Array, "e M D"],
    group_sizes_e: Int[Array, " e"],
    activation: activations.Activation,
    bias_eM: Float[Array, "e M"] | None,
) -> Float[Array, "R F"]:
    """See `ops.gather_gate_up`."""
    return gate_up(gather_rows(x_tD, index_R), w_eMD, group_sizes_e, activation, bias_eM)


def combine_rows(
    y_RD: Float[Array, "R D"], position_tK: Int[Array, "t K"], weights_tK: Float[Array, "t K"]
) -> Float32[Array, "t D"]:
    """See `ops.combine_rows`."""
    # One gather a slot: XLA fuses the chain into one pass. A (t, K, D) gather, or a loop over slots, is ten times
    # slower.
    total_tD = jnp.zeros((position_tK.shape[0], y_RD.shape[1]), jnp.float32)
    for slot in range(position_tK.shape[1]):
        position_t = position_tK[:, slot]
        weight_t = jnp.where(position_t >= 0, weights_tK[:, slot].astype(jnp.float32), 0.0)
        total_tD = total_tD + gather_rows(y_RD, position_t).astype(jnp.float32) * weight_t[:, None]
    return total_tD


def weigh_experts(
    logits_tE: Float[Array, "t E"], ids_tK: Int[Array, "t K"], scoring: str, renormalize: bool, scaling: float
) -> Float32[Array, "t K"]:
    """Weights of chosen experts: their scores without the bias, renormalized if asked, then scaled."""
    weights_tK = jnp.take_along_axis(_scores(logits_tE, scoring), ids_tK, axis=-1)
    if renormalize:
        weights_tK = weights_tK / (jnp.sum(weights_tK, axis=-1, keepdims=True) + 1e-20)
    return weights_tK * scaling


def choose_experts(
    logits_tE: Float[Array, "t E"],
    bias_E: Float32[Array, " E"] | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    scaling: float,
    num_groups: int = 1,
    groups_kept: int = 1,
) -> tuple[Int32[Array, "t K"], Float32[Array, "t K"]]:
    """See `ops.choose_experts`."""
    selection_tE = jax.lax.stop_gradient(_scores(logits_tE, scoring))
    if bias_E is not None:
        selection_tE = selection_tE + jax.lax.stop_gradient(bias_E.astype(jnp.float32))
    if num_groups > 1:
        selection_tE = keep_groups(selection_tE, num_groups, groups_kept, top_two=bias_E is not None)
    ids_tK = jax.lax.top_k(selection_tE, top_k)[1].astype(jnp.int32)
    return ids_tK, weigh_experts(logits_tE, ids_tK, scoring, renormalize, scaling)


def keep_groups(
    selection_tE: Float32[Array, "t E"], num_groups: int, groups_kept: int, *, top_two: bool
) -> Float32[Array, "t E"]:
    """Sets the selection scores of all but the best groups to -inf.

    Args:
      selection_tE: (t, E) float32.
      num_groups: G, a divisor of E; groups are contiguous.
      groups_kept: how many stay.
      top_two: a group's score is the sum of its best two, else its best one. A group of one expert has only that one.

    Returns:
      (t, E) float32.
    """
    t, num_experts = selection_tE.shape
    size = num_experts // num_groups
    grouped = selection_tE.reshape(t, num_groups, size)
    score_tG = jnp.sum(jax.lax.top_k(grouped, min(2, size) if top_two else 1)[0], axis=-1)
    kept = jax.lax.top_k(score_tG, groups_kept)[1]
    keep_tG = jnp.any(kept[:, :, None] == jnp.arange(num_groups), axis=1)
    return jnp.where(keep_tG[:, :, None], grouped, -jnp.inf).reshape(t, num_experts)


def few_tokens(
    x_tW: Float[Array, "t W"],
    logits_tE: Float[Array, "t E"],
    bias_E: Float32[Array, " E"] | None,
    w_EMW: Float[Array, "E M W"],
    bias_EM: Float[Array, "E M"] | None,
    w_EWF: Float[Array, "E W F"],
    bias_EW: Float[Array, "E W"] | None,
    activation: activations.Activation,
    rule: Rule,
) -> Float32[Array, "t W"]:
    """See `ops.few_tokens`."""
    ids_tK, weights_tK = choose_experts(logits_tE, bias_E, **dataclasses.asdict(rule))
    return chosen_experts(x_tW, ids_tK, weights_tK, w_EMW, bias_EM, w_EWF, bias_EW, activation)


def chosen_experts(
    x_tW: Float[Array, "t W"],
    ids_tK: Int32[Array, "t K"],
    weights_tK: Float32[Array, "t K"],
    w_EMW: Float[Array, "E M W"],
    bias_EM: Float[Array, "E M"] | None,
    w_EWF: Float[Array, "E W F"],
    bias_EW: Float[Array, "E W"] | None,
    activation: activations.Activation,
) -> Float32[Array, "t W"]:
    """`few_tokens` for a choice that has been made."""
    position_tK, group_sizes_E, pair_R = plan_rows(ids_tK, 0, w_EMW.shape[0])
    h_RF = gate_up(gather_rows(x_tW, pair_R // ids_tK.shape[1]), w_EMW, group_sizes_E, activation, bias_EM)
    return combine_rows(grouped_matmul(h_RF, w_EWF, group_sizes_E, bias_EW, x_tW.dtype), position_tK, weights_tK)


def _scores(logits_tE: Float[Array, "t E"], scoring: str) -> Float32[Array, "t E"]:
    logits_tE = logits_tE.astype(jnp.float32)
    return jax.nn.softmax(logits_tE, axis=-1) if scoring == "softmax" else jax.nn.sigmoid(logits_tE)


def plan_rows(
    topk_ids_tK: Int[Array, "t K"], first_expert: Int32[Array, ""] | int, num_local_experts: int
) -> tuple[Int32[Array, "t K"], Int32[Array, " e"], Int32[Array, " R"]]:
    """See `ops.plan_rows`."""
    (num_tokens, top_k), num_pairs = topk_ids_tK.shape, topk_ids_tK.size
    local_tK = topk_ids_tK.astype(jnp.int32) - first_expert
    here_tK = (local_tK >= 0) & (local_tK < num_local_experts)
    # Pairs that are not here share one key that sorts last and is in no group.
    key = jnp.where(here_tK, local_tK, num_local_experts).reshape(num_pairs)
    group_sizes_e = jnp.zeros((num_local_experts,), jnp.int32).at[key].add(1, mode="drop")
    # A stable sort by expert alone leaves pairs in order of token, then slot.
    pair = jnp.argsort(key, stable=True).astype(jnp.int32)
    row = jnp.arange(num_pairs, dtype=jnp.int32)
    is_row = row < jnp.sum(group_sizes_e)
    position = jnp.zeros_like(row).at[pair].set(jnp.where(is_row, row, -1), unique_indices=True)
    pair_R = jnp.where(is_row, pair, -1)[: rows_bound(num_tokens, top_k, num_local_experts)]
    return position.reshape(topk_ids_tK.shape), group_sizes_e, pair_R


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _product(x_RD: Array, w_eND: Array, group_sizes_e: Array, bias_eN: Array | None, out_dtype: jnp.dtype) -> Array:
    return _rows_times_groups(x_RD, w_eND, group_sizes_e, bias_eN, depth_axis=1).astype(out_dtype)


def _product_forward(x_RD: Array, w_eND: Array, group_sizes_e: Array, bias_eN: Array | None, out_dtype: jnp.dtype):
    y_RN = _product(x_RD, w_eND, group_sizes_e, bias_eN, out_dtype)
    return y_RN, (x_RD, w_eND, group_sizes_e, bias_eN)


def _product_backward(_out_dtype: jnp.dtype, saved: tuple, dy_RN: Array):
    x_RD, w_eND, group_sizes_e, bias_eN = saved
    dx_RD = _rows_times_groups(dy_RN, w_eND, group_sizes_e, None, depth_axis=0).astype(x_RD.dtype)
    dw_eND = _outer_products(dy_RN, x_RD, group_sizes_e).astype(w_eND.dtype)
    if bias_eN is None:
        return dx_RD, dw_eND, None, None
    ones_R1 = jnp.ones((x_RD.shape[0], 1), x_RD.dtype)
    dbias_eN = _outer_products(dy_RN, ones_R1, group_sizes_e)[:, :, 0].astype(bias_eN.dtype)
    return dx_RD, dw_eND, None, dbias_eN


_product.defvjp(_product_forward, _product_backward)


def _rows_times_groups(
    x_RD: Array, w_eND: Array, group_sizes_e: Array, bias_eN: Array | None, *, depth_axis: int
) -> Float32[Array, "R N"]:
    """Each row times its group's matrix over that one's `depth_axis`, plus the group's bias; zeros for other rows."""
    num_rows = x_RD.shape[0]
    block = _block_rows(num_rows, w_eND.shape[0])
    # Float32, and never read back: XLA then writes each block in place, where it would else copy the whole every time.
    out_RN = jnp.zeros((num_rows + block, w_eND.shape[2 - depth_axis]), jnp.float32)
    if not block:
        return out_RN
    x_RD, out_RN = match_varying(_pad_rows(x_RD, block), out_RN)

    def one_group(group: Array, out_RN: Array, for_blocks: Callable) -> Array:
        w_ND = operand(w_eND[group])
        bias_N = 0.0 if bias_eN is None else bias_eN[group].astype(jnp.float32)

        def one_block(first: Array, real_B: Array, out_RN: Array) -> Array:
            x_BD = operand(jax.lax.dynamic_slice_in_dim(x_RD, first, block))
            # Rows of the next group are zeros for now: that group comes later and overwrites them.
            y_BN = jnp.where(real_B[:, None], contract(x_BD, w_ND, (1, depth_axis)) + bias_N, 0.0)
            return jax.lax.dynamic_update_slice_in_dim(out_RN, y_BN, first, 0)

        return for_blocks(one_block, out_RN)

    return _for_groups(one_group, group_sizes_e, block, out_RN)[:num_rows]


def _outer_products(y_RN: Array, x_RD: Array, group_sizes_e: Array) -> Float32[Array, "e N D"]:
    """The sum over each group's rows of the outer product of y and x; zeros for empty groups."""
    num_groups = group_sizes_e.shape[0]
    block = _block_rows(x_RD.shape[0], num_groups)
    out_eND = jnp.zeros((num_groups, y_RN.shape[1], x_RD.shape[1]), jnp.float32)
    if not block:
        return out_eND
    out_eND, y_RN, x_RD = match_varying(out_eND, _pad_rows(y_RN, block), _pad_rows(x_RD, block))

    def one_group(group: Array, out_eND: Array, for_blocks: Callable) -> Array:
        def one_block(first: Array, real_B: Array, total_ND: Array) -> Array:
            # Both sides are masked: a neighbour's row, or padding, may hold NaN, and 0 * NaN is NaN.
            y_BN = jnp.where(real_B[:, None], jax.lax.dynamic_slice_in_dim(y_RN, first, block), 0)
            x_BD = jnp.where(real_B[:, None], jax.lax.dynamic_slice_in_dim(x_RD, first, block), 0)
            return total_ND + contract(operand(y_BN), operand(x_BD), (0, 0))

        zeros_ND, _ = match_varying(jnp.zeros(out_eND.shape[1:], jnp.float32), out_eND)
        return jax.lax.dynamic_update_index_in_dim(out_eND, for_blocks(one_block, zeros_ND), group, 0)

    return _for_groups(one_group, group_sizes_e, block, out_eND)


def _pad_rows(x_RD: Array, block: int) -> Array:
    """So many more rows that a block may start at any row."""
    return jnp.pad(x_RD, ((0, block), (0, 0)))


def _for_groups(one_group: Callable, group_sizes_e: Array, block: int, carry: Any) -> Any:
    """Calls `one_group(group, carry, for_blocks)` for each group that has rows, in order.

    `for_blocks(one_block, inner)` calls `one_block(first, real_B, inner)` for each block of the group's rows: rows
    first..first+block, of which `real_B` are the group's. Example, sizes [3, 0, 6], block 4: group 0 has first 0, real
    1110; group 2 has first 3, real 1111, and first 7, real 1100.
    """
    num_groups = group_sizes_e.shape[0]
    # Plain reductions over e rather than a sort and a cumulative sum: far less to compile, nothing to run.
    group_e = jnp.arange(num_groups, dtype=jnp.int32)

    def next_busy(after: Array | int) -> Array:
        return jnp.min(jnp.where((group_e > after) & (group_sizes_e > 0), group_e, num_groups))

    def group_step(state: tuple[Array, Any]) -> tuple[Array, Any]:
        group, carry = state
        start = jnp.sum(jnp.where(group_e < group, group_sizes_e, 0))
        end = start + group_sizes_e[group]

        def for_blocks(one_block: Callable, inner: Any) -> Any:
            def block_step(state: tuple[Array, Any]) -> tuple[Array, Any]:
                first, inner = state
                row_B = first + jnp.arange(block, dtype=first.dtype)
                return first + block, one_block(first, row_B < end, inner)

            return jax.lax.while_loop(lambda state: state[0] < end, block_step, (start, inner))[1]

        return next_busy(group), one_group(group, carry, for_blocks)

    return jax.lax.while_loop(lambda state: state[0] < num_groups, group_step, (next_busy(-1), carry))[1]


def _block_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a block: about half of a mean group, a power of two; 0 when there is nothing to do.

    Small blocks waste fewer rows at a group's end, large ones make the better products: between 8 and 256.
    """
    if not num_rows or not num_groups:
        return 0
    mean = -(-num_rows // num_groups)
    return min(num_rows, max(8, min(256, 1 << (mean.bit_length() - 1))))
