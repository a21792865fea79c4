"""The public operations on rows: each checks its arguments, picks an implementation and calls it.

Rows are sorted by group; group g is the rows from sum(group_sizes[:g]) on. Example: group_sizes [2, 0, 1] over R = 5 rows:
rows 0 and 1 are group 0's, row 2 is group 2's, rows 3 and 4 are past the end.

Shape suffixes: R rows, e groups (local experts), D depth, N outputs, M rows of the first projection (2F gated, F not),
F expert intermediate size, t tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import jax.numpy as jnp

from jax_moe._typing import Array, Float, Float32, Int
from jax_moe.activation import Activation
from jax_moe.kernels import reference
from jax_moe.kernels.choice import choose

# The one table of what exists: operation, implementation, function.
OPERATIONS: dict[str, dict[str, Callable]] = {
    "grouped_matmul": {"reference": reference.grouped_matmul},
    "gate_up": {"reference": reference.gate_up},
    "gather_rows": {"reference": reference.gather_rows},
    "combine_rows": {"reference": reference.combine_rows},
}


def chosen(operation: str, implementation: str | None) -> str:
    """Name of the implementation that `operation` will run; raises as the operation itself would."""
    return choose(operation, MappingProxyType(OPERATIONS[operation]), implementation)


def grouped_matmul(
    x_RD: Float[Array, "R D"],
    w_eND: Float[Array, "e N D"],
    group_sizes_e: Int[Array, " e"],
    *,
    bias_eN: Float[Array, "e N"] | None = None,
    out_dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> Float[Array, "R N"]:
    """Multiplies each row by its group's matrix: x[r] @ w[g].T + bias[g], accumulated in float32.

    Args:
      x_RD: (R, D) float32 or bfloat16, sorted by group.
      w_eND: (e, N, D), same dtype: matrices as checkpoints store them.
      group_sizes_e: (e,) int32, with a sum of at most R.
      bias_eN: (e, N), added in float32.
      out_dtype: dtype of the result; None: that of x.
      implementation: None, "reference", "mosaic_gpu" or "triton".

    Returns:
      (R, N); rows past the sum of group_sizes are zeros, whatever x holds there.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation does not exist.

    Example:
      >>> import jax.numpy as jnp
      >>> x, w = jnp.ones((4, 3)), jnp.stack([jnp.ones((2, 3)), 2 * jnp.ones((2, 3))])
      >>> grouped_matmul(x, w, jnp.array([1, 2]))[:, 0].tolist()
      [3.0, 6.0, 6.0, 0.0]
    """
    run = OPERATIONS["grouped_matmul"][chosen("grouped_matmul", implementation)]
    _check_product("grouped_matmul", x_RD, w_eND, group_sizes_e, bias_eN)
    return run(x_RD, w_eND, group_sizes_e, bias_eN, jnp.dtype(out_dtype or x_RD.dtype))


def gate_up(
    x_RD: Float[Array, "R D"],
    w_eMD: Float[Array, "e M D"],
    group_sizes_e: Int[Array, " e"],
    *,
    activation: Activation,
    bias_eM: Float[Array, "e M"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "R F"]:
    """First projection of the experts and the activation, in one: act(x[r] @ w[g].T + bias[g]).

    Args:
      x_RD: (R, D) float32 or bfloat16, sorted by group.
      w_eMD: (e, M, D), same dtype; M = 2F gated, F not.
      group_sizes_e: (e,) int32, with a sum of at most R.
      activation: applied in float32.
      bias_eM: (e, M), added in float32.
      implementation: None, "reference", "mosaic_gpu" or "triton".

    Returns:
      (R, F) in the dtype of x; rows past the sum of group_sizes are zeros.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation does not exist.
    """
    run = OPERATIONS["gate_up"][chosen("gate_up", implementation)]
    _check_product("gate_up", x_RD, w_eMD, group_sizes_e, bias_eM)
    if activation.gated and w_eMD.shape[1] % 2:
        raise ValueError(f"gate_up: w has {w_eMD.shape[1]} rows a group: expected an even number, gate and up")
    return run(x_RD, w_eMD, group_sizes_e, activation, bias_eM)


def gather_rows(
    x_tD: Float[Array, "t D"], index_R: Int[Array, " R"], *, implementation: str | None = None
) -> Float[Array, "R D"]:
    """Copies rows: out[r] = x[index[r]], zeros where the index is out of range (-1, for one).

    Args:
      x_tD: (t, D).
      index_R: (R,) int32.
      implementation: None, "reference", "mosaic_gpu" or "triton".

    Returns:
      (R, D) in the dtype of x.

    Raises:
      ValueError: ranks that do not fit.
      NotImplementedError: the named implementation does not exist.
    """
    run = OPERATIONS["gather_rows"][chosen("gather_rows", implementation)]
    if x_tD.ndim != 2 or index_R.ndim != 1:
        raise ValueError(f"gather_rows: x {x_tD.shape} and index {index_R.shape}: expected (t, D) and (R,)")
    return run(x_tD, index_R)


def combine_rows(
    y_RD: Float[Array, "R D"],
    position_tK: Int[Array, "t K"],
    weights_tK: Float[Array, "t K"],
    *,
    implementation: str | None = None,
) -> Float32[Array, "t D"]:
    """Weighted sum of each token's rows, in float32: out[i] = sum over k of weights[i, k] * y[position[i, k]].

    Args:
      y_RD: (R, D) float32 or bfloat16.
      position_tK: (t, K) int32; -1: this slot has no row here and adds nothing, whatever its weight is.
      weights_tK: (t, K) float32.
      implementation: None, "reference", "mosaic_gpu" or "triton".

    Returns:
      (t, D) float32.

    Raises:
      ValueError: shapes that do not fit.
      NotImplementedError: the named implementation does not exist.
    """
    run = OPERATIONS["combine_rows"][chosen("combine_rows", implementation)]
    if y_RD.ndim != 2 or position_tK.ndim != 2 or position_tK.shape != weights_tK.shape:
        shapes = f"y {y_RD.shape}, position {position_tK.shape}, weights {weights_tK.shape}"
        raise ValueError(f"combine_rows: {shapes}: expected (R, D), (t, K) and (t, K)")
    return run(y_RD, position_tK, weights_tK)


def _check_product(name: str, x: Array, w: Array, group_sizes: Array, bias: Array | None) -> None:
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2]:
        raise ValueError(f"{name}: x {x.shape} and w {w.shape}: expected (R, D) and (groups, N, D)")
    if x.dtype != w.dtype:
        raise ValueError(f"{name}: x is {x.dtype} and w is {w.dtype}: expected one dtype")
    if group_sizes.shape != w.shape[:1]:
        raise ValueError(f"{name}: group_sizes {group_sizes.shape}: expected {w.shape[:1]}, one for each group of w")
    if bias is not None and bias.shape != w.shape[:2]:
        raise ValueError(f"{name}: bias {bias.shape}: expected {w.shape[:2]}")
