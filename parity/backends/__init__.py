"""The registry of backends: ours, and those that installed packages add through entry point group `parity.backends`."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
from importlib.metadata import entry_points

from parity.backends.base import Backend, Options

GROUP = "parity.backends"
BUILT_IN = {
    "jax": "parity.backends.jax:JaxBackend",
    "torch": "parity.backends.torch:TorchBackend",
    "hf-mixtral": "parity.backends.huggingface:Mixtral",
    "hf-qwen3": "parity.backends.huggingface:Qwen3",
    "hf-deepseek-v3": "parity.backends.huggingface:DeepseekV3",
    "hf-gpt-oss": "parity.backends.huggingface:GptOss",
}
DEFAULT = ("jax", "torch")


class BackendError(ValueError):
    """An unknown backend, or one whose class cannot be had."""


def available() -> dict[str, str]:
    """Where each backend's class lies, as `module:Class`, by name. Ours need no installed package metadata."""
    found = {point.name: point.value for point in entry_points(group=GROUP)}
    return {**found, **BUILT_IN}


def chosen(text: str | None) -> tuple[str, ...]:
    """The names in a list with commas, each once; `hf-*` stands for all that begin so. Without a list, the default.

    Raises:
      BackendError: there is no such backend.
    """
    if text is None:
        return DEFAULT
    known, names = available(), []
    for word in map(str.strip, text.split(",")):
        found = sorted(fnmatch.filter(known, word)) if "*" in word else [word] * (word in known)
        if not found:
            close = difflib.get_close_matches(word, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise BackendError(f"unknown framework {word!r}{hint}; allowed: {', '.join(sorted(known))}")
        names += found
    return tuple(dict.fromkeys(names))


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
