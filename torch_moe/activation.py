"""Activations between an expert's two products.

Shapes: `R` rows, `F` intermediate size; a gated input has 2F columns. Everything here is float32 in and out.
"""

import dataclasses

import torch
import torch.nn.functional as F

from torch_moe._typing import Float32, Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation:
    """Which function, and how its input's columns are laid out.

    Attributes:
        name: silu, gelu (exact, with erf), gelu_tanh, swigluoai, relu2.
        gated: the input holds a gate half and an up half.
        layout: "concatenated": g0 .. gF-1 u0 .. uF-1; "interleaved": g0 u0 g1 u1 ...
        alpha: swigluoai's slope inside the sigmoid.
        limit: swigluoai's clamp: the gate from above, up on both sides.
    """

    name: str
    gated: bool = True
    layout: str = "concatenated"
    alpha: float = 1.702
    limit: float = 7.0


def split(gate_up: Float32[Tensor, "R M"], layout: str) -> tuple[Tensor, Tensor]:
    """The gate columns and the up columns, (R, F) each."""
    if layout == "interleaved":
        return gate_up[..., 0::2], gate_up[..., 1::2]
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up


def apply(gate_up: Float32[Tensor, "R M"], activation: Activation) -> Float32[Tensor, "R F"]:
    """Applies the activation.

    Args:
        gate_up: (R, 2F) float32 when gated, (R, F) otherwise.
        activation: which, and the layout of the columns.

    Returns:
        (R, F) float32.

    Example:
        >>> apply(torch.tensor([[0.0, 3.0]]), Activation(name="silu"))
        tensor([[0.]])
    """
    if not activation.gated:
        return _pointwise(gate_up, activation.name)
    gate, up = split(gate_up, activation.layout)
    if activation.name == "swigluoai":
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(min=-activation.limit, max=activation.limit)
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    return _pointwise(gate, activation.name) * up


def _pointwise(x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return F.silu(x)
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "relu2":
        return torch.relu(x).square()
    raise ValueError(f"activation={name!r}: allowed are 'silu', 'gelu', 'gelu_tanh', 'swigluoai', 'relu2'")
