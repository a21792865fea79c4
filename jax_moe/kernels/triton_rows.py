"""Moving rows at the speed of memory: gather into expert order, by row or by token.

Shape suffixes: t tokens on this shard, D width, K slots a token, R rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

CHUNK = 1024  # columns of a program: 16 bytes of bfloat16 for each of 128 lanes


def _columns(width: int, chunk: int):
    column = pl.program_id(1) * chunk + lax.iota(jnp.int32, chunk)
    return column, (column < width if width % chunk else None)


def _gather_kernel(index_ref, x_ref, out_ref, *, chunk: int):
    row = pl.program_id(0)
    tokens, width = x_ref.shape
    column, mask = _columns(width, chunk)
    source = index_ref[row]
    inside = (source >= 0) & (source < tokens)
    wanted = jnp.broadcast_to(inside, (chunk,)) if mask is None else mask & inside
    value = plt.load(x_ref.at[jnp.where(inside, source, 0), column], mask=wanted, other=0.0)
    plt.store(out_ref.at[row, column], value, mask=mask)


def gather_rows(x_tD: jax.Array, index_R: jax.Array, *, chunk: int = CHUNK, num_warps: int = 4) -> jax.Array:
    """Rows of `x_tD` by index; zeros where the index is out of range.

    Args:
      x_tD: (t, D), t at least 1.
      index_R: (R,) int32.

    Returns:
      (R, D) in x's dtype.
    """
    rows, width = index_R.shape[0], x_tD.shape[1]
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_gather_kernel, chunk=chunk),
        out_shape=jax.ShapeDtypeStruct((rows, width), x_tD.dtype),
        grid=(rows, pl.cdiv(width, chunk)),
        in_specs=[whole, whole],
        out_specs=whole,
        compiler_params=plt.CompilerParams(num_warps=num_warps),
        name="moe_gather_rows",
    )(index_R, x_tD)


def _spread_kernel(position_ref, sizes_ref, x_ref, out_ref, *, chunk: int):
    token = pl.program_id(0)
    tokens, slots = position_ref.shape
    rows, width = out_ref.shape
    column, mask = _columns(width, chunk)
    value = plt.load(x_ref.at[token, column], mask=mask, other=None if mask is None else 0.0)
    for k in range(slots):
        row = position_ref[token, k]
        wanted = jnp.broadcast_to(row >= 0, (chunk,)) if mask is None else mask & (row >= 0)
        plt.store(out_ref.at[jnp.maximum(row, 0), column], value, mask=wanted)

    # Rows that no token fills are zeros; every program clears its share of them.
    (experts,) = sizes_ref.shape
    index = lax.iota(jnp.int32, 1 << max(experts - 1, 0).bit_length())
    first = jnp.sum(plt.load(sizes_ref.at[index], mask=index < experts, other=0)) + token
    count = jnp.maximum(lax.div(rows - first + (tokens - 1), tokens), 0)

    def clear(i, carry):
        plt.store(out_ref.at[first + i * tokens, column], jnp.zeros((chunk,), out_ref.dtype), mask=mask)
        return carry

    lax.fori_loop(0, count, clear, None)


def spread_rows(
    x_tD: jax.Array,
    position_tK: jax.Array,
    group_sizes_e: jax.Array,
    *,
    rows: int,
    chunk: int = 2048,
    num_warps: int = 4,
) -> jax.Array:
    """Copies each token's row to the rows it was planned into: a gather seen from the other side.

    A gather by row reads every token K times, this reads it once: K + 1 rows of traffic a token in place of 2 K.

    Args:
      x_tD: (t, D), t at least 1.
      position_tK: (t, K) int32, rows to fill; -1 for none. No row is named twice.
      group_sizes_e: (e,) int32, whose sum says how many rows are filled; they are the first ones.
      rows: R.

    Returns:
      (R, D) in x's dtype, zeros past the filled rows.
    """
    tokens, width = x_tD.shape
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_spread_kernel, chunk=chunk),
        out_shape=jax.ShapeDtypeStruct((rows, width), x_tD.dtype),
        grid=(tokens, pl.cdiv(width, chunk)),
        in_specs=[whole, whole, whole],
        out_specs=whole,
        compiler_params=plt.CompilerParams(num_warps=num_warps),
        name="moe_spread_rows",
    )(position_tK, group_sizes_e, x_tD)


def _combine_kernel(position_ref, weight_ref, y_ref, out_ref, *, chunk: int):
    token = pl.program_id(0)
    slots = position_ref.shape[1]
    column, mask = _columns(out_ref.shape[1], chunk)
    total = jnp.zeros((chunk,), jnp.float32)
    for k in range(slots):
        row = position_ref[token, k]
        wanted = jnp.broadcast_to(row >= 0, (chunk,)) if mask is None else mask & (row >= 0)
        value = plt.load(y_ref.at[jnp.maximum(row, 0), column], mask=wanted, other=0.0)
        total += value.astype(jnp.float32) * jnp.where(row >= 0, weight_ref[token, k], 0.0)
    plt.store(out_ref.at[token, column], total.astype(out_ref.dtype), mask=mask)


def combine_rows(
    y_RD: jax.Array, position_tK: jax.Array, weights_tK: jax.Array, *, out_dtype=jnp.float32,
    chunk: int = CHUNK, num_warps: int = 4,
) -> jax.Array:  # fmt: skip
    """The weighted sum of each token's rows, in float32, slot by slot in order.

    Args:
      y_RD: (R, D).
      position_tK: (t, K) int32 rows; -1 adds nothing.
      weights_tK: (t, K) float32.
      out_dtype: dtype of the result; the sum is rounded to it once.

    Returns:
      (t, D) in `out_dtype`.
    """
    tokens, width = position_tK.shape[0], y_RD.shape[1]
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_combine_kernel, chunk=chunk),
        out_shape=jax.ShapeDtypeStruct((tokens, width), out_dtype),
        grid=(tokens, pl.cdiv(width, chunk)),
        in_specs=[whole, whole, whole],
        out_specs=whole,
        compiler_params=plt.CompilerParams(num_warps=num_warps),
        name="moe_combine_rows",
    )(position_tK, weights_tK, y_RD)
