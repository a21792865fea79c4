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
    """An unknown backend, or one whose class cannot be had."""


def available() -> dict[str, str]:
    """Where each backend's class lies, as `module:Class`, by name. Ours need no installed package metadata."""
    found = {point.name: point.value for point in entry_points(group=GROUP)}
    return {**found, **BUILT_IN}


def chosen(text: str | None) -> tuple[str, ...]:
    """The names in a list with commas, each once; without one, the default.

    Raises:
      BackendError: there is no such backend.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(","))) if text is not None else DEFAULT
    known = available()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise BackendError(f"unknown framework {name!r}{hint}; allowed: {', '.join(sorted(known))}")
    return names


def load(name: str, options: Options) -> Backend:
    """Construct a backend by name.

    Raises:
      BackendError: there is no such backend, it cannot be imported, or its class is not one.
    """
    (name,) = chosen(name)
    place = available()[name]
    module, _, attribute = place.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BackendError(f"backend {name!r} at {place!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise BackendError(f"backend {name!r} at {place!r} is no subclass of parity.backends.base.Backend")
    try:
        backend = cls(options)
    except TypeError as error:  # an abstract method is missing, or the constructor takes something else
        raise BackendError(f"backend {name!r} at {place!r} cannot be constructed: {error}") from error
    backend.name = name
    return backend
