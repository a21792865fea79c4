"""The routed experts on the rows of this rank: first projection and activation, then the second projection.

Shape suffixes: R rows on this rank, sorted by expert, e experts held by this rank, W expert width, F expert
intermediate size (its part on this rank), M rows of the first projection (2F gated, F not).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_moe import activation as activations
from jax_moe import kernels, stages
from jax_moe._typing import Array, Float, Float32, Int32
from jax_moe.activation import Activation
from jax_moe.params import ExpertParams


def activate(gate_up_RM: Float32[Array, "R M"], activation: Activation) -> Float32[Array, "R F"]:
    """Applies the activation to the first projection's float32 result, biases included: (R, M) to (R, F)."""
    return activations.apply(gate_up_RM, activation)


def gate_up(
    rows_RW: Float[Array, "R W"],
    params: ExpertParams,
    group_sizes_e: Int32[Array, " e"],
    *,
    activation: Activation,
    tap: stages.Tap = stages.OFF,
    implementation: str | None = None,
) -> Float[Array, "R F"]:
    """First projection and activation.

    Args:
      rows_RW: (R, W), sorted by expert.
      params: this rank's experts.
      group_sizes_e: (e,) rows of each.
      activation: see `Activation`.
      tap: shown the first projection's float32 result, unless a kernel fuses it with the activation.
      implementation: of the kernels.

    Returns:
      h (R, F) in the dtype of the rows; zeros past the last row.
    """
    operands = (rows_RW, params.gate_up, group_sizes_e, activation, params.gate_up_bias)
    if kernels.chosen("gate_up", implementation, *operands) == "reference":
        # In two steps, so that the activation stays a stage of its own where no kernel fuses it.
        gate_up_RM = kernels.grouped_matmul(
            rows_RW,
            params.gate_up,
            group_sizes_e,
            bias_eN=params.gate_up_bias,
            out_dtype=jnp.float32,
            implementation="reference",
        )
        return activate(tap("gate_up", gate_up_RM), activation).astype(rows_RW.dtype)
    return kernels.gate_up(
        rows_RW,
        params.gate_up,
        group_sizes_e,
        activation=activation,
        bias_eM=params.gate_up_bias,
        implementation=implementation,
    )


def gathers_ahead(
    x_nW: Float[Array, "n W"], rows: int, params: ExpertParams, activation: Activation, implementation: str | None
) -> bool:
    """Whether a kernel gathers as many rows of `x_nW` and does `gate_up` at once. A name is for the two one by one."""
    index, sizes = (jax.ShapeDtypeStruct((size,), jnp.int32) for size in (rows, params.gate_up.shape[0]))
    operands = (x_nW, index, params.gate_up, sizes, activation, params.gate_up_bias)
    return implementation is None and kernels.chosen("gather_gate_up", None, *operands) != "reference"


def down(
    h_RF: Float[Array, "R F"],
    params: ExpertParams,
    group_sizes_e: Int32[Array, " e"],
    *,
    adds_bias: Array | bool = True,
    implementation: str | None = None,
) -> Float[Array, "R W"]:
    """Second projection.

    Args:
      h_RF: (R, F), sorted by expert.
      params: this rank's experts.
      group_sizes_e: (e,) rows of each.
      adds_bias: whether this rank is the one that adds the bias; may be traced. When F is split over ranks their
        results are summed, and one of them brings the bias.
      implementation: of the kernels.

    Returns:
      (R, W) in the dtype of h, partial when F is split; zeros past the last row.
    """
    bias_eW = down_bias(params, adds_bias)
    return kernels.grouped_matmul(h_RF, params.down, group_sizes_e, bias_eN=bias_eW, implementation=implementation)


def down_bias(params: ExpertParams, adds_bias: Array | bool) -> Array | None:
    """The second projection's bias, zeros on a rank that does not add it; None where there is none."""
    bias_eW = params.down_bias
    return None if bias_eW is None else jnp.where(adds_bias, bias_eW, jnp.zeros_like(bias_eW))
