"""The dense product every stage outside of the experts uses, and the arithmetic all products here share.

Shape suffixes: t tokens on this shard, D depth of the product, N outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_moe._typing import Array, Float, Float32


def operand(x: Array) -> Array:
    """Prepares one operand of a product that accumulates in float32.

    On CPU bfloat16 and float16 are widened first: the product of two such values is exact in float32, so nothing but
    the order of the sum depends on it. Elsewhere the matrix units take them as they are.
    """
    return x.astype(jnp.float32) if jax.default_backend() == "cpu" else x


def tf32_asked() -> bool:
    """Whether float32 may be multiplied as TF32: inside of `jax.default_matmul_precision("tensorfloat32")`.

    Nothing else turns it on: with JAX's default, products of float32 are float32.
    """
    return jax.config.jax_default_matmul_precision in ("tensorfloat32", "TF32_TF32_F32")  # pyright: ignore[reportAttributeAccessIssue]


def contract(a: Array, b: Array, axes: tuple[int, int], *, exact: bool = False) -> Float32[Array, "M N"]:
    """Product of two matrices over one axis of each, in float32, from operands made by `operand`.

    `exact`: in float32 even where TF32 is asked for.
    """
    if a.dtype != b.dtype:
        # A float32 gradient meets narrow operands.
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    # HIGHEST keeps float32 products float32 on GPUs, where the default would be TF32. Narrow operands are exact anyway.
    wide = jax.lax.Precision.HIGH if tf32_asked() and not exact else jax.lax.Precision.HIGHEST
    precision = wide if jnp.float32 in (a.dtype, b.dtype) else None
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def linear(x_tD: Float[Array, "t D"], w_ND: Float[Array, "N D"], *, exact: bool = False) -> Float32[Array, "t N"]:
    """x @ w.T with float32 accumulation and a float32 result.

    Args:
      x_tD: (t, D) float32, bfloat16 or float16.
      w_ND: (N, D) weights as checkpoints store them, same dtype.
      exact: as in `contract`.

    Returns:
      (t, N) float32, not rounded.
    """
    return contract(operand(x_tD), operand(w_ND), (1, 1), exact=exact)
