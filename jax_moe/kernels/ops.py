"""The public operations on rows: each checks its arguments, picks an implementation and calls it.

Rows are sorted by group; group g is the rows from sum(group_sizes[:g]) on. Example: group_sizes [2, 0, 1] over R = 5
rows: rows 0 and 1 are group 0's, row 2 is group 2's, rows 3 and 4 are past the end.

Shape suffixes: R rows, e groups (local experts), D depth, N outputs, M rows of the first projection (2F gated, F not),
F expert intermediate size, t tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_moe._typing import Array, Float, Float32, Int, Int32
from jax_moe.activation import Activation
from jax_moe.kernels import choice, hopper, reference

# The one table of what exists: operation, implementation, function.
OPERATIONS: dict[str, dict[str, Callable]] = {
    "grouped_matmul": {
        "reference": reference.grouped_matmul,
        "mosaic_gpu": hopper.grouped_matmul,
        "triton": hopper.triton_grouped_matmul,
    },
    "gate_up": {
        "reference": reference.gate_up,
        "mosaic_gpu": hopper.gate_up,
        "triton": hopper.triton_gate_up,
    },
    "gather_gate_up": {"reference": reference.gather_gate_up, "mosaic_gpu": hopper.gather_gate_up},
    "gather_rows": {"reference": reference.gather_rows, "triton": hopper.gather_rows},
    "combine_rows": {"reference": reference.combine_rows, "triton": hopper.combine_rows},
    "choose_experts": {"reference": reference.choose_experts, "triton": hopper.choose_experts},
    "plan_rows": {"reference": reference.plan_rows, "triton": hopper.plan_rows},
    "few_tokens": {"reference": reference.few_tokens, "mosaic_gpu": hopper.few_tokens},
}

# Those that are several of the others in one: None may take them, a name is for the others.
FUSED = ("gather_gate_up", "few_tokens")

# What an implementation cannot do.
LIMITS: dict[str, dict[str, Callable[..., str | None]]] = {
    "grouped_matmul": {"mosaic_gpu": hopper.no_grouped_matmul, "triton": hopper.no_triton_grouped_matmul},
    "gate_up": {"mosaic_gpu": hopper.no_gate_up, "triton": hopper.no_triton_gate_up},
    "gather_gate_up": {"mosaic_gpu": hopper.no_gather_gate_up},
    "gather_rows": {"triton": hopper.no_rows},
    "combine_rows": {"triton": hopper.no_rows},
    "choose_experts": {"triton": hopper.no_routing},
    "plan_rows": {"triton": hopper.no_routing},
    "few_tokens": {"mosaic_gpu": hopper.no_few_tokens},
}

_ROWS = {
    "gather_rows": ("triton",),
    # XLA's own combine is as fast as memory, and fuses with what follows it.
    "combine_rows": (),
    "choose_experts": ("triton",),
    "plan_rows": ("triton",),
}
# What None tries on a card (`choice.card`), in order, before the reference.
PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "hopper": {
        "grouped_matmul": ("mosaic_gpu",),
        "gate_up": ("mosaic_gpu",),
        "gather_gate_up": ("mosaic_gpu",),
        "few_tokens": ("mosaic_gpu",),
        **_ROWS,
    },
    "ampere": {"grouped_matmul": ("triton",), "gate_up": ("triton",), "gather_gate_up": (), "few_tokens": (), **_ROWS},
}


def chosen(operation: str, implementation: str | None, *operands: Any) -> str:
    """Name of the implementation that `operation` will run; raises as the operation itself would.

    Args:
      operation: a key of `OPERATIONS`.
      implementation: as given to the operation.
      operands: the arguments of its functions in `OPERATIONS`, or their shapes and dtypes; none: those that fit.
    """
    return choice.choose(
        operation,
        OPERATIONS[operation],
        implementation,
        limits=LIMITS[operation],
        preference=PREFERENCE.get(choice.card() or "", {}).get(operation, ()),
        operands=operands,
    )


def for_rows(implementation: str | None) -> str | None:
    """What a layer's `implementation` means for its rows and routing.

    A layer's name is that of its products. Rows and routing go by it where they have an implementation of that name,
    else they are picked as for None: with "mosaic_gpu", whose kernels only multiply.
    """
    choice.check_name(implementation)
    return implementation if implementation in OPERATIONS["gather_rows"] else None


def tile_of(implementation: str, rows: int, experts: int, gated: bool) -> str | None:
    """The tile a product takes for a buffer of `rows` rows over `experts` experts, in words; None: it has none.

    `gated` says that it multiplies gate and up.
    """
    tiles = {"mosaic_gpu": hopper.hopper_tile, "triton": hopper.triton_tile}
    return tiles[implementation](rows, experts, gated) if implementation in tiles else None


def _run(operation: str, implementation: str | None, *operands: Any) -> Any:
    return OPERATIONS[operation][chosen(operation, implementation, *operands)](*operands)


def grouped_matmul(
    x_RD: Float[Array, "R D"],
    w_eND: Float[Array, "e N D"],
    group_sizes_e: Int[Array, " e"],
    *,
    bias_eN: Float[Array, "e N"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
    debug: bool = False,
) -> Any:
    """Multiplies each row by its group's matrix: x[r] @ w[g].T + bias[g], accumulated in float32.

    Args:
      x_RD: (R, D) float32, bfloat16 or float16, sorted by group.
      w_eND: (e, N, D), same dtype: matrices as checkpoints store them.
      group_sizes_e: (e,) int32, none below zero, with a sum of at most R. It is not looked at: sizes that break this
        give wrong rows, and kernels may write outside of the result.
      bias_eN: (e, N), added in float32.
      out_dtype: dtype of the result; None: that of x.
      implementation: None, "reference", "mosaic_gpu" or "triton".
      debug: clip group sizes, and count what was clipped; see `clip_sizes`.

    Returns:
      (R, N); rows past the sum of group_sizes are zeros, whatever x holds there. With debug, it and the count.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation does not exist, or cannot take these operands.

    Example:
      >>> import jax.numpy as jnp
      >>> x, w = jnp.ones((4, 3)), jnp.stack([jnp.ones((2, 3)), 2 * jnp.ones((2, 3))])
      >>> grouped_matmul(x, w, jnp.array([1, 2]))[:, 0].tolist()
      [3.0, 6.0, 6.0, 0.0]
    """
    _check_product("grouped_matmul", x_RD, w_eND, group_sizes_e, bias_eN)
    out_dtype = jnp.dtype(out_dtype or x_RD.dtype)
    group_sizes_e, clipped = clip_sizes(group_sizes_e, x_RD.shape[0]) if debug else (group_sizes_e, None)
    y_RN = _run("grouped_matmul", implementation, x_RD, w_eND, group_sizes_e, bias_eN, out_dtype)
    return (y_RN, clipped) if debug else y_RN


def gate_up(
    x_RD: Float[Array, "R D"],
    w_eMD: Float[Array, "e M D"],
    group_sizes_e: Int[Array, " e"],
    *,
    activation: Activation,
    bias_eM: Float[Array, "e M"] | None = None,
    implementation: str | None = None,
    debug: bool = False,
) -> Any:
    """First projection of the experts and the activation, in one: act(x[r] @ w[g].T + bias[g]).

    Args:
      x_RD: (R, D) float32, bfloat16 or float16, sorted by group.
      w_eMD: (e, M, D), same dtype; M = 2F gated, F not.
      group_sizes_e: (e,) int32, none below zero, with a sum of at most R. It is not looked at: sizes that break this
        give wrong rows, and kernels may write outside of the result.
      activation: applied in float32.
      bias_eM: (e, M), added in float32.
      implementation: None, "reference", "mosaic_gpu" or "triton".
      debug: as for `grouped_matmul`.

    Returns:
      (R, F) in the dtype of x; rows past the sum of group_sizes are zeros. With debug, it and the count.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation does not exist, or cannot take these operands.
    """
    _check_product("gate_up", x_RD, w_eMD, group_sizes_e, bias_eM)
    if activation.gated and w_eMD.shape[1] % 2:
        raise ValueError(f"gate_up: w has {w_eMD.shape[1]} rows a group: expected an even number, gate and up")
    group_sizes_e, clipped = clip_sizes(group_sizes_e, x_RD.shape[0]) if debug else (group_sizes_e, None)
    h_RF = _run("gate_up", implementation, x_RD, w_eMD, group_sizes_e, activation, bias_eM)
    return (h_RF, clipped) if debug else h_RF


def gather_gate_up(
    x_tD: Float[Array, "t D"],
    index_R: Int32[Array, " R"],
    w_eMD: Float[Array, "e M D"],
    group_sizes_e: Int[Array, " e"],
    *,
    activation: Activation,
    bias_eM: Float[Array, "e M"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "R F"]:
    """`gate_up` of rows that are gathered for it: act(x[index[r]] @ w[g].T + bias[g]).

    Args:
      x_tD: (t, D) float32, bfloat16 or float16.
      index_R: (R,) int32, a row of x for each row, sorted by group; zeros where it is out of range.
      w_eMD, group_sizes_e, activation, bias_eM: as for `gate_up`.
      implementation: None, "reference" or "mosaic_gpu", which gathers rows while it multiplies those before them; from
        512 rows a group and 1536 rows of weights on, where it was measured to pay.

    Returns:
      (R, F) in the dtype of x; rows past the sum of group_sizes are zeros.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation does not exist, or cannot take these operands.

    Example:
      >>> import jax.numpy as jnp
      >>> relu2 = Activation(name="relu2", gated=False)
      >>> x, w = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((1, 1, 2))
      >>> gather_gate_up(x, jnp.array([1, 0, 1]), w, jnp.array([2]), activation=relu2)[:, 0].tolist()
      [49.0, 9.0, 0.0]
    """
    if index_R.ndim != 1:
        raise ValueError(f"gather_gate_up: index {index_R.shape}: expected (R,)")
    _check_product("gather_gate_up", x_tD, w_eMD, group_sizes_e, bias_eM)
    if activation.gated and w_eMD.shape[1] % 2:
        raise ValueError(f"gather_gate_up: w has {w_eMD.shape[1]} rows a group: expected an even number, gate and up")
    return _run("gather_gate_up", implementation, x_tD, index_R, w_eMD, group_sizes_e, activation, bias_eM)


def clip_sizes(group_sizes_e: Int[Array, " e"], rows: int) -> tuple[Int32[Array, " e"], Int32[Array, ""]]:
    """Group sizes that a buffer of `rows` rows can have: none below zero, and groups cut off where the buffer ends.

    Args:
      group_sizes_e: (e,) integers, any.
      rows: R.

    Returns:
      (e,) int32 with a sum of at most R, and by how many rows they differ from what was given, () int32: 0 when that
      was right, and never 0 otherwise. It saturates at about 2^31.

    Example:
      >>> import jax.numpy as jnp
      >>> sizes, clipped = clip_sizes(jnp.array([3, -1, 4, 2]), 5)
      >>> sizes.tolist(), int(clipped)
      ([3, 0, 2, 0], 5)
    """
    sizes_e = group_sizes_e.astype(jnp.int32)
    # Sums that stop at R: those of garbage would pass 2^31.
    least_e = jnp.clip(sizes_e, 0, rows)
    end_e = jax.lax.associative_scan(lambda a, b: jnp.minimum(a + b, rows), least_e)
    clipped_e = jnp.diff(end_e, prepend=jnp.zeros((1,), jnp.int32))
    most = (2**31 - 1) // max(sizes_e.shape[0], 1)
    # Of the least int32 the distance overflows; it is below the rest of them.
    difference_e = jnp.where(sizes_e < -most, most, jnp.minimum(jnp.abs(sizes_e - clipped_e), most))
    return clipped_e, jnp.sum(difference_e, dtype=jnp.int32)


def gather_rows(
    x_tD: Float[Array, "t D"],
    index_R: Int[Array, " R"],
    *,
    position_tK: Int[Array, "t K"] | None = None,
    group_sizes_e: Int[Array, " e"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "R D"]:
    """Copies rows: out[r] = x[index[r]], zeros where the index is out of range (-1, for one).

    Args:
      x_tD: (t, D).
      index_R: (R,) int32.
      position_tK, group_sizes_e: the same map from the other side, both or none: (t, K) int32 rows that each token goes
        to, -1 for none, which fill the first sum(group_sizes) rows. Knowing it, a kernel reads each token once.
      implementation: None, "reference" or "triton".

    Returns:
      (R, D) in the dtype of x.

    Raises:
      ValueError: ranks that do not fit.
      NotImplementedError: the named implementation does not exist.
    """
    if x_tD.ndim != 2 or index_R.ndim != 1:
        raise ValueError(f"gather_rows: x {x_tD.shape} and index {index_R.shape}: expected (t, D) and (R,)")
    return _run("gather_rows", implementation, x_tD, index_R, position_tK, group_sizes_e)


def combine_rows(
    y_RD: Float[Array, "R D"],
    position_tK: Int[Array, "t K"],
    weights_tK: Float[Array, "t K"],
    *,
    implementation: str | None = None,
) -> Float32[Array, "t D"]:
    """Weighted sum of each token's rows, in float32: out[i] = sum over k of weights[i, k] * y[position[i, k]].

    Args:
      y_RD: (R, D) float32, bfloat16 or float16.
      position_tK: (t, K) int32; -1: this slot has no row here and adds nothing, whatever its weight is.
      weights_tK: (t, K) float32.
      implementation: None, "reference" or "triton".

    Returns:
      (t, D) float32.

    Raises:
      ValueError: shapes that do not fit.
      NotImplementedError: the named implementation does not exist.
    """
    if y_RD.ndim != 2 or position_tK.ndim != 2 or position_tK.shape != weights_tK.shape:
        shapes = f"y {y_RD.shape}, position {position_tK.shape}, weights {weights_tK.shape}"
        raise ValueError(f"combine_rows: {shapes}: expected (R, D), (t, K) and (t, K)")
    return _run("combine_rows", implementation, y_RD, position_tK, weights_tK)


def choose_experts(
    logits_tE: Float[Array, "t E"],
    bias_E: Float32[Array, " E"] | None,
    *,
    top_k: int,
    scoring: str,
    renormalize: bool,
    scaling: float,
    num_groups: int = 1,
    groups_kept: int = 1,
    implementation: str | None = None,
) -> tuple[Int32[Array, "t K"], Float32[Array, "t K"]]:
    """Top-k of the scores plus bias, of the best groups where there are groups, and weights: see `router.route`.

    Args:
      logits_tE: (t, E) float32.
      bias_E: (E,) float32 or None; selects, never weighs.
      top_k: K.
      scoring: "softmax" or "sigmoid".
      renormalize: divide each token's weights by their sum.
      scaling: factor of the weights, last.
      num_groups, groups_kept: equal groups that the experts are in, 1 for none, and how many of them are chosen from.
      implementation: None, "reference" or "triton".

    Returns:
      ids (t, K) int32, best first, equal scores to the lower index, and weights (t, K) float32.

    Raises:
      NotImplementedError: the named implementation does not exist.
    """
    operands = (logits_tE, bias_E, top_k, scoring, renormalize, scaling, num_groups, groups_kept)
    return _run("choose_experts", implementation, *operands)


def plan_rows(
    topk_ids_tK: Int[Array, "t K"],
    first_expert: Int32[Array, ""] | int,
    *,
    num_local_experts: int,
    implementation: str | None = None,
) -> tuple[Int32[Array, "t K"], Int32[Array, " e"], Int32[Array, " R"]]:
    """The row of each pair when those of this rank's experts are sorted by expert, then token, then slot.

    Args:
      topk_ids_tK: (t, K) global expert ids, distinct within a token.
      first_expert: first of this rank's experts; may be traced.
      num_local_experts: e.
      implementation: None, "reference" or "triton".

    Returns:
      position (t, K) int32, -1 for pairs of other ranks; group sizes (e,) int32; and the same map from the side of the
      rows, pair (R,) int32, R = t * min(K, e): token * K + slot of each row, -1 past the last.

    Raises:
      NotImplementedError: the named implementation does not exist.
    """
    return _run("plan_rows", implementation, topk_ids_tK, first_expert, num_local_experts)


def few_tokens(
    x_tW: Float[Array, "t W"],
    logits_tE: Float[Array, "t E"],
    bias_E: Float32[Array, " E"] | None,
    w_EMW: Float[Array, "E M W"],
    w_EWF: Float[Array, "E W F"],
    *,
    activation: Activation,
    rule: reference.Rule,
    bias_EM: Float[Array, "E M"] | None = None,
    bias_EW: Float[Array, "E W"] | None = None,
    implementation: str | None = None,
) -> Float32[Array, "t W"]:
    """All of the routed experts in one, for tokens so few that launches count: from logits to weighted sums.

    Args:
      x_tW: (t, W) float32, bfloat16 or float16.
      logits_tE: (t, E) float32.
      bias_E: (E,) float32 or None; selects, never weighs.
      w_EMW: (E, M, W), same dtype as x: first projection of all experts; M = 2F gated, F not.
      w_EWF: (E, W, F), second projection.
      activation: applied in float32.
      rule: how experts are chosen.
      bias_EM, bias_EW: of the projections, added in float32.
      implementation: None, "reference" or "mosaic_gpu", which takes up to 8 tokens.

    Returns:
      (t, W) float32: the sum over a token's experts, best first, each rounded to the dtype of x and then weighted.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named implementation does not exist, or cannot take so many.
    """
    tokens, experts, width = x_tW.shape[0], w_EMW.shape[0], x_tW.shape[1]
    if logits_tE.shape != (tokens, experts):
        raise ValueError(f"few_tokens: logits {logits_tE.shape}: expected {(tokens, experts)}")
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    _check_product("few_tokens", x_tW, w_EMW, sizes, bias_EM)
    h_tF = jax.ShapeDtypeStruct((tokens, w_EMW.shape[1] // (2 if activation.gated else 1)), x_tW.dtype)
    _check_product("few_tokens", h_tF, w_EWF, sizes, bias_EW)
    if w_EWF.shape[1] != width:
        raise ValueError(f"few_tokens: w of {w_EWF.shape[1]} outputs for x {x_tW.shape}: expected {width}")
    operands = (x_tW, logits_tE, bias_E, w_EMW, bias_EM, w_EWF, bias_EW, activation, rule)
    return _run("few_tokens", implementation, *operands)


def _check_product(name: str, x: Any, w: Array, group_sizes: Any, bias: Array | None) -> None:
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2]:
        raise ValueError(f"{name}: x {x.shape} and w {w.shape}: expected (R, D) and (groups, N, D)")
    if x.dtype != w.dtype:
        raise ValueError(f"{name}: x is {x.dtype} and w is {w.dtype}: expected one dtype")
    if group_sizes.shape != w.shape[:1]:
        raise ValueError(f"{name}: group_sizes {group_sizes.shape}: expected {w.shape[:1]}, one for each group of w")
    if bias is not None and bias.shape != w.shape[:2]:
        raise ValueError(f"{name}: bias {bias.shape}: expected {w.shape[:2]}")
