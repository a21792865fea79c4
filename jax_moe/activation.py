"""The nonlinearity between an expert's two projections.

Shape suffixes: R rows (any leading shape), F expert intermediate size, M rows of the first projection: 2F gated, F not.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_moe._typing import Array, Float
from jax_moe.config import MoEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation:
    """Which nonlinearity, and how gate and up lie in what it reads. Hashable: kernels take it as static.

    Attributes:
      name: "silu", "gelu" (erf), "gelu_tanh", "swigluoai" or "relu2" (the square of relu).
      gated: the input holds gate and up (2F), else up alone (F).
      layout: "concatenated" (gate, then up) or "interleaved" (g0, u0, g1, u1...); of no effect when not gated.
      alpha, limit: of "swigluoai": `min(g, limit) * sigmoid(alpha * g) * (clip(u, -limit, limit) + 1)`.
    """

    name: str
    gated: bool = True
    layout: str = "concatenated"
    alpha: float = 1.702
    limit: float = 7.0


def from_config(config: MoEConfig) -> Activation:
    """The activation a layer's experts and shared expert use."""
    return Activation(
        name=config.activation,
        gated=config.gated,
        layout=config.gate_up_layout,
        alpha=config.swiglu_alpha,
        limit=config.swiglu_limit,
    )


def split_gate_up(gate_up_RM: Float[Array, "*R M"], layout: str) -> tuple[Float[Array, "*R F"], Float[Array, "*R F"]]:
    """Takes gate and up apart."""
    half = gate_up_RM.shape[-1] // 2
    if layout == "interleaved":
        pairs = gate_up_RM.reshape(*gate_up_RM.shape[:-1], half, 2)
        return pairs[..., 0], pairs[..., 1]
    return gate_up_RM[..., :half], gate_up_RM[..., half:]


def apply(gate_up_RM: Float[Array, "*R M"], activation: Activation) -> Float[Array, "*R F"]:
    """Applies the activation in the dtype it is given (float32 everywhere in this package).

    Args:
      gate_up_RM: result of the first projection, bias included; M = 2F gated, F not.
      activation: see `Activation`.

    Returns:
      (..., F) in the dtype of the input.
    """
    if not activation.gated:
        return _nonlinear(gate_up_RM, activation.name)
    gate_RF, up_RF = split_gate_up(gate_up_RM, activation.layout)
    if activation.name == "swigluoai":
        gate_RF = jnp.minimum(gate_RF, activation.limit)
        up_RF = jnp.clip(up_RF, -activation.limit, activation.limit)
        return gate_RF * jax.nn.sigmoid(activation.alpha * gate_RF) * (up_RF + 1.0)
    return _nonlinear(gate_RF, activation.name) * up_RF


def _nonlinear(x: Float[Array, "*R F"], name: str) -> Float[Array, "*R F"]:
    if name == "silu":
        return x * jax.nn.sigmoid(x)
    if name == "gelu":
        return jax.nn.gelu(x, approximate=False)
    if name == "gelu_tanh":
        return jax.nn.gelu(x, approximate=True)
    if name == "relu2":
        return jnp.square(jax.nn.relu(x))
    raise ValueError(f"activation {name!r}: expected 'silu', 'gelu', 'gelu_tanh', 'swigluoai' (gated) or 'relu2'")
