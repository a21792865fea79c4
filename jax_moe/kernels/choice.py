"""Which implementation of an operation runs: policy, apart from the kernels themselves.

To add one, write its file in this package and put its functions into the table in `ops.py`, under the name listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

IMPLEMENTATIONS = ("reference", "mosaic_gpu", "triton")

Table = Mapping[str, Callable]


def check_name(implementation: str | None) -> None:
    """Raises ValueError for a name that is not an implementation at all."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        allowed = ", ".join(repr(name) for name in IMPLEMENTATIONS)
        raise ValueError(f"implementation = {implementation!r}: expected None or one of {allowed}")


def choose(operation: str, table: Table, implementation: str | None) -> str:
    """Resolves the `implementation` argument of an operation.

    Args:
      operation: name of the operation, for the message.
      table: the implementations this operation has.
      implementation: None picks; a name is taken at its word and never replaced by another.

    Returns:
      A key of `table`.

    Raises:
      ValueError: no such implementation anywhere.
      NotImplementedError: this operation does not have it.
    """
    check_name(implementation)
    if implementation is None:
        return "reference"
    if implementation not in table:
        exists = ", ".join(repr(name) for name in table)
        raise NotImplementedError(
            f"{operation}: implementation {implementation!r} does not exist yet; there is {exists} (or None)"
        )
    return implementation


def for_platform(implementation: str | None, platform: str) -> str | None:
    """Narrows None for a mesh whose platform is known: on CPU there is only the reference."""
    check_name(implementation)
    return "reference" if implementation is None and platform == "cpu" else implementation
