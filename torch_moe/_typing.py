"""Shape annotations: jaxtyping's names where it is installed, otherwise stand-ins that annotate nothing.

`torch_moe` imports with torch and numpy alone. With jaxtyping present, `Float[Tensor, "t D"]` is its annotation and its
import hook can check it; without, `Float[Tensor, "t D"]` is just `Tensor`.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float as Float
    from jaxtyping import Float32 as Float32
    from jaxtyping import Int as Int
    from jaxtyping import Int32 as Int32
else:
    try:
        from jaxtyping import Float, Float32, Int, Int32
    except ImportError:

        class _Unchecked:
            """Subscripting gives back the array type, so that an annotation keeps its meaning and loses its shape."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Float = Float32 = Int = Int32 = _Unchecked

__all__ = ["Float", "Float32", "Int", "Int32", "Tensor"]
