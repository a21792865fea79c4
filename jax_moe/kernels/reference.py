"""Every operation in plain JAX: the definition of what kernels compute, and the implementation for CPU.

The grouped product steps over the groups that have rows and, inside a group, over blocks of its rows, so the work grows
with the rows that exist; `jax.lax.ragged_dot` on CPU multiplies every row by every expert. Trip counts depend on data,
which reverse-mode differentiation cannot follow, so the product brings its own gradient.

Shape suffixes: R rows sorted by group, e groups (local experts), D depth, N outputs, M rows of the first projection
(2F gated, F not), F expert intermediate size, t tokens, K experts per token, B rows of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_moe import activation as activations
from jax_moe._compat import match_varying
from jax_moe._typing import Array, Float, Float32, Int
from jax_moe.linear import contract, operand


def grouped_matmul(
    x_RD: Float[Array, "R D"],
    w_eND: Float[Array, "e N D"],
    group_sizes_e: Int[Array, " e"],
    bias_eN: Float[Array, "e N"] | None,
    out_dtype: jnp.dtype,
) -> Float[Array, "R N"]:
    """See `ops.grouped_matmul`."""
    x_RD, w_eND, group_sizes_e, bias_eN = match_varying(x_RD, w_eND, group_sizes_e, bias_eN)
    if bias_eN is None:
        return _product(x_RD, w_eND, group_sizes_e, jnp.dtype(out_dtype))
    y_RN = _product(x_RD, w_eND, group_sizes_e, jnp.dtype(jnp.float32))
    ends_e = jnp.cumsum(group_sizes_e)
    row_R = jnp.arange(x_RD.shape[0], dtype=jnp.int32)
    group_R = jnp.searchsorted(ends_e, row_R, side="right", method="compare_all")
    bias_RN = bias_eN.astype(jnp.float32).at[group_R].get(mode="fill", fill_value=0)
    return (y_RN + bias_RN).astype(out_dtype)


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


def gather_rows(x_tD: Float[Array, "t D"], index_R: Int[Array, " R"]) -> Float[Array, "R D"]:
    """See `ops.gather_rows`."""
    # An index below zero would count from the end; out of range at the top, it is filled.
    index_R = jnp.where(index_R < 0, x_tD.shape[0], index_R)
    return x_tD.at[index_R].get(mode="fill", fill_value=0)


def combine_rows(
    y_RD: Float[Array, "R D"], position_tK: Int[Array, "t K"], weights_tK: Float[Array, "t K"]
) -> Float32[Array, "t D"]:
    """See `ops.combine_rows`."""
    y_RD, position_tK, weights_tK = match_varying(y_RD, position_tK, weights_tK)

    def add_slot(total_tD: Array, slot: tuple[Array, Array]) -> tuple[Array, None]:
        position_t, weight_t = slot
        return total_tD + gather_rows(y_RD, position_t).astype(jnp.float32) * weight_t[:, None], None

    weights_tK = jnp.where(position_tK >= 0, weights_tK.astype(jnp.float32), 0.0)
    zeros_tD = jnp.zeros((position_tK.shape[0], y_RD.shape[1]), jnp.float32)
    zeros_tD, _ = match_varying(zeros_tD, y_RD)
    total_tD, _ = jax.lax.scan(add_slot, zeros_tD, (position_tK.T, weights_tK.T))
    return total_tD


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x_RD: Array, w_eND: Array, group_sizes_e: Array, out_dtype: jnp.dtype) -> Array:
    zeros_RN = jnp.zeros((x_RD.shape[0], w_eND.shape[1]), out_dtype)
    return _rows_times_groups(x_RD, w_eND, group_sizes_e, zeros_RN, depth_axis=1)


def _product_forward(x_RD: Array, w_eND: Array, group_sizes_e: Array, out_dtype: jnp.dtype) -> tuple[Array, Any]:
    return _product(x_RD, w_eND, group_sizes_e, out_dtype), (x_RD, w_eND, group_sizes_e)


def _product_backward(_out_dtype: jnp.dtype, saved: Any, dy_RN: Array) -> tuple[Array, Array, None]:
    x_RD, w_eND, group_sizes_e = saved
    dx_RD = _rows_times_groups(dy_RN, w_eND, group_sizes_e, jnp.zeros_like(x_RD), depth_axis=0)
    return dx_RD, _outer_products(dy_RN, x_RD, group_sizes_e, jnp.zeros_like(w_eND)), None


_product.defvjp(_product_forward, _product_backward)


def _rows_times_groups(
    x_RD: Array, w_eND: Array, group_sizes_e: Array, out_RN: Array, *, depth_axis: int
) -> Float[Array, "R N"]:
    """out[r] = x[r] times its group's matrix, contracting the matrix's `depth_axis`; other rows of `out` stay."""
    block = _block_rows(x_RD.shape[0], w_eND.shape[0])
    if not block:
        return out_RN
    out_RN, x_RD = match_varying(out_RN, x_RD)

    def one_group(group: Array, out_RN: Array, for_blocks: Callable) -> Array:
        w_ND = operand(w_eND[group])

        def one_block(base: Array, real_B: Array, out_RN: Array) -> Array:
            x_BD = operand(jax.lax.dynamic_slice_in_dim(x_RD, base, block))
            y_BN = contract(x_BD, w_ND, (1, depth_axis)).astype(out_RN.dtype)
            # A block may reach into its neighbours' rows: those keep what they have.
            old_BN = jax.lax.dynamic_slice_in_dim(out_RN, base, block)
            y_BN = jnp.where(real_B[:, None], y_BN, old_BN)
            return jax.lax.dynamic_update_slice_in_dim(out_RN, y_BN, base, 0)

        return for_blocks(one_block, out_RN)

    return _for_groups(one_group, group_sizes_e, x_RD.shape[0], block, out_RN)


def _outer_products(y_RN: Array, x_RD: Array, group_sizes_e: Array, out_eND: Array) -> Float[Array, "e N D"]:
    """out[g] = sum over the rows of group g of the outer product of y and x; empty groups of `out` stay."""
    block = _block_rows(x_RD.shape[0], out_eND.shape[0])
    if not block:
        return out_eND
    out_eND, y_RN, x_RD = match_varying(out_eND, y_RN, x_RD)

    def one_group(group: Array, out_eND: Array, for_blocks: Callable) -> Array:
        def one_block(base: Array, real_B: Array, total_ND: Array) -> Array:
            # Both sides are masked: a neighbour's row, or padding, may hold NaN, and 0 * NaN is NaN.
            y_BN = jnp.where(real_B[:, None], jax.lax.dynamic_slice_in_dim(y_RN, base, block), 0)
            x_BD = jnp.where(real_B[:, None], jax.lax.dynamic_slice_in_dim(x_RD, base, block), 0)
            return total_ND + contract(operand(y_BN), operand(x_BD), (0, 0))

        zeros_ND, _ = match_varying(jnp.zeros(out_eND.shape[1:], jnp.float32), out_eND)
        total_ND = for_blocks(one_block, zeros_ND)
        return jax.lax.dynamic_update_index_in_dim(out_eND, total_ND.astype(out_eND.dtype), group, 0)

    return _for_groups(one_group, group_sizes_e, x_RD.shape[0], block, out_eND)


def _for_groups(one_group: Callable, group_sizes_e: Array, num_rows: int, block: int, carry: Any) -> Any:
    """Calls `one_group(group, carry, for_blocks)` for each group that has rows.

    `for_blocks(one_block, inner)` calls `one_block(base, real_B, inner)` for each block of the group's rows: rows
    base..base+block of the buffer, of which `real_B` belong to this group and were not in an earlier block.
    Example, sizes [3, 0, 6], 9 rows, block 4: group 0 has base 0, real 1110; group 2 has base 3, real 1111, and base 5
    (7 would reach past the end), real 0011.
    """
    ends_e = jnp.cumsum(group_sizes_e)
    busy_first_e = jnp.argsort(group_sizes_e == 0, stable=True)
    num_busy = jnp.sum(group_sizes_e > 0)

    def group_step(i: Array, carry: Any) -> Any:
        group = busy_first_e[i]
        end = ends_e[group]
        start = end - group_sizes_e[group]

        def for_blocks(one_block: Callable, inner: Any) -> Any:
            def block_step(state: tuple[Array, Any]) -> tuple[Array, Any]:
                first, inner = state
                base = jnp.minimum(first, num_rows - block)
                row_B = base + jnp.arange(block, dtype=base.dtype)
                return first + block, one_block(base, (row_B >= first) & (row_B < end), inner)

            return jax.lax.while_loop(lambda state: state[0] < end, block_step, (start, inner))[1]

        return one_group(group, carry, for_blocks)

    return jax.lax.fori_loop(0, num_busy, group_step, carry)


def _block_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a block: about half of a mean group, a power of two; 0 when there is nothing to do.

    Small blocks waste fewer rows at a group's end, large ones make the better products: between 8 and 256.
    """
    if not num_rows or not num_groups:
        return 0
    mean = -(-num_rows // num_groups)
    return min(num_rows, max(8, min(256, 1 << (mean.bit_length() - 1))))
