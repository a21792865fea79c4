"""The routed experts' arithmetic on this rank's rows: gate/up, activation, down.

Shapes: `R` rows sorted by expert, `e` experts here, `W` an expert's input and output width, `F` its intermediate size
(this rank's part of it under tensor parallelism), `M` = 2F when gated and F otherwise.
"""

from collections.abc import Callable

from torch_moe import activation as activations
from torch_moe import matmul
from torch_moe._typing import Float, Float32, Int32, Tensor
from torch_moe.activation import Activation


def activate(gate_up_RM: Float32[Tensor, "R M"], *, activation: Activation) -> Float32[Tensor, "R F"]:
    """The activation between the two products, (R, M) to (R, F), in float32."""
    return activations.apply(gate_up_RM, activation)


def gate_up(
    rows_RW: Float[Tensor, "R W"],
    gate_up_eMW: Float[Tensor, "e M W"],
    group_sizes_e: Int32[Tensor, " e"],
    *,
    activation: Activation,
    bias_eM: Float[Tensor, "e M"] | None = None,
    num_rows: int | None = None,
    between: Callable[[Tensor], Tensor] = lambda value: value,
) -> Float[Tensor, "R F"]:
    """First product and activation: act(rows @ gate_up[expert].T + bias[expert]).

    Args:
        rows_RW: (R, W), sorted by expert.
        gate_up_eMW: (e, M, W).
        group_sizes_e: (e,) int32.
        activation: which, and the layout of gate_up's rows.
        bias_eM: (e, M), added in float32.
        num_rows: the sum of the group sizes, where the host knows it.
        between: applied to the product, (R, M) float32, before the activation.

    Returns:
        (R, F) in the dtype of the rows, rounded once. Rows past the last group are zeros.
    """
    product_RM = matmul.grouped_linear(rows_RW, gate_up_eMW, group_sizes_e, bias_eN=bias_eM, num_rows=num_rows)
    return activate(between(product_RM), activation=activation).to(rows_RW.dtype)


def down(
    h_RF: Float[Tensor, "R F"],
    down_eWF: Float[Tensor, "e W F"],
    group_sizes_e: Int32[Tensor, " e"],
    *,
    bias_eW: Float[Tensor, "e W"] | None = None,
    num_rows: int | None = None,
) -> Float32[Tensor, "R W"]:
    """Second product: h @ down[expert].T + bias[expert].

    Args:
        h_RF: (R, F), sorted by expert.
        down_eWF: (e, W, F).
        group_sizes_e: (e,) int32.
        bias_eW: (e, W), added in float32.
        num_rows: the sum of the group sizes, where the host knows it.

    Returns:
        (R, W) float32, not yet weighted. Rows past the last group are zeros.
    """
    return matmul.grouped_linear(h_RF, down_eWF, group_sizes_e, bias_eN=bias_eW, num_rows=num_rows)
