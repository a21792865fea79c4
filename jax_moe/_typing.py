"""Array types of the public signatures: jaxtyping's when it is installed, else stand-ins that mean nothing.

Importing `jax_moe` needs only JAX and NumPy; with jaxtyping installed the shapes can be checked at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Int, Int32, PRNGKeyArray
else:
    try:
        from jaxtyping import Bool, Float, Float32, Int, Int32, PRNGKeyArray
    except ImportError:

        class _Inert:
            """Takes any subscript and stands for any type."""

            def __class_getitem__(cls, _item):
                return Any

        Bool = Float = Float32 = Int = Int32 = _Inert
        PRNGKeyArray = Array

__all__ = ["Array", "Bool", "Float", "Float32", "Int", "Int32", "PRNGKeyArray"]
