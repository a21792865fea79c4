"""The registry of backends: ours, and those that installed packages add through entry point group `parity.backends`."""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points

from parity.backends.base import Backend, Options

GROUP = "parity.backends"
BUILT_IN = {"jax": "parity.backends.jax:JaxBackend", "torch": "parity.backends.torch:TorchBackend"}
DEFAULT = ("jax", "torch")


class BackendError(ValueError):
    """An unknown backend, or one whose module cannot be imported."""


def available() -> dict[str, str]:
    """Where each backend's class lies, as `module:Class`, by name. Ours need no installed package metadata."""
    found = {point.name: point.value for point in entry_points(group=GROUP)}
    return {**found, **BUILT_IN}


def load(name: str, options: Options) -> Backend:
    """Construct a backend by name.

    Raises:
      BackendError: there is no such backend, or it cannot be imported.
    """
    known = available()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise BackendError(f"unknown backend {name!r}{hint}; allowed: {', '.join(sorted(known))}")
    module, _, attribute = known[name].partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BackendError(f"backend {name!r} at {known[name]!r} cannot be imported: {error}") from error
    return cls(options)
