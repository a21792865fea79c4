"""Which implementation of an operation runs: policy, apart from the kernels themselves.

To add one, write its file in this package and put its functions into the table in `ops.py`, under the name listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

IMPLEMENTATIONS = ("reference", "mosaic_gpu", "triton")

Table = Mapping[str, Callable]
# For each implementation, why it cannot take these operands, or None when it can.
Limits = Mapping[str, Callable[..., str | None]]


def check_name(implementation: str | None) -> None:
    """Raises ValueError for a name that is not an implementation at all."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        allowed = ", ".join(repr(name) for name in IMPLEMENTATIONS)
        raise ValueError(f"implementation = {implementation!r}: expected None or one of {allowed}")


def choose(
    operation: str,
    table: Table,
    implementation: str | None,
    *,
    limits: Limits = MappingProxyType({}),
    preference: tuple[str, ...] = (),
    operands: tuple[Any, ...] = (),
) -> str:
    """Resolves the `implementation` argument of an operation.

    Args:
      operation: name of the operation, for the message.
      table: the implementations this operation has.
      implementation: None picks; a name is taken at its word and never replaced by another.
      limits: what each of them cannot do; one that is not named can do everything.
      preference: order in which None tries them; after the last comes the reference.
      operands: arguments of the call, or values with their shapes and dtypes; empty when there is no call yet.

    Returns:
      A key of `table`.

    Raises:
      ValueError: no such implementation anywhere.
      NotImplementedError: this operation does not have it, or it cannot take these operands.
    """
    check_name(implementation)
    if implementation is None:
        return next((name for name in preference if why_not(limits, name, operands) is None), "reference")
    if implementation not in table:
        exists = ", ".join(repr(name) for name in table)
        raise NotImplementedError(
            f"{operation}: implementation {implementation!r} does not exist yet; there is {exists} (or None)"
        )
    reason = why_not(limits, implementation, operands)
    if reason is not None:
        raise NotImplementedError(f"{operation}: implementation {implementation!r} cannot run this: {reason}")
    return implementation


def why_not(limits: Limits, name: str, operands: tuple[Any, ...]) -> str | None:
    """Why implementation `name` cannot take `operands`; None when it can, or when nothing is known of them yet."""
    return limits[name](*operands) if operands and name in limits else None


def capability() -> str | None:
    """Compute capability of the default backend's GPUs, as "9.0"; None where there is no NVIDIA GPU."""
    device = jax.devices()[0]
    return getattr(device, "compute_capability", None) if device.platform == "gpu" else None


def runs_on_hopper() -> bool:
    """Whether the default backend's GPUs are Hopper's, which the Mosaic GPU kernels are written for."""
    return capability() == "9.0"


def runs_on_ampere() -> bool:
    """Whether they are Ampere's or Ada's: compute capability 8.0 to 8.9."""
    return (capability() or "").startswith("8.")


def card() -> str | None:
    """What implementations are picked for: "hopper", "ampere" (Ada too), or None, for which there is the reference."""
    if runs_on_hopper():
        return "hopper"
    return "ampere" if runs_on_ampere() else None


def for_platform(implementation: str | None, platform: str) -> str | None:
    """Narrows None for a mesh whose platform is known: on CPU there is only the reference.

    Raises:
      NotImplementedError: a GPU implementation named for a mesh of CPUs.
    """
    check_name(implementation)
    if platform == "cpu" and implementation not in (None, "reference"):
        raise NotImplementedError(f"implementation {implementation!r} runs on GPUs, and this mesh is of CPUs")
    return "reference" if implementation is None and platform == "cpu" else implementation
