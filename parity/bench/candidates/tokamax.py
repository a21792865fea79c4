"""tokamax's ragged_dot on its Mosaic GPU kernel, in the same plain layer as JAX's own."""

from __future__ import annotations

import importlib.util
import logging
import sys
import types

import jax
import jax.numpy as jnp

from parity.bench.candidates.ragged_dot import RaggedDot


def _load() -> types.ModuleType:
    """tokamax, without the profiler that its benchmarks want and nothing here calls."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    if importlib.util.find_spec("xprof") is None:
        for name in ("xprof", "xprof.cli", "xprof.cli.tools", "xprof.cli.tools.get_kernel_stats_tool"):
            sys.modules[name] = _Anything(name)
    return importlib.import_module("tokamax")


class _Anything(types.ModuleType):
    """A module of which anything can be imported, and nothing used."""

    __path__: list[str] = []  # noqa: RUF012 - as packages have it

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return object()


class Tokamax(RaggedDot):
    def __init__(self) -> None:
        self.tokamax = _load()

    def product(self, rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
        return self.tokamax.ragged_dot(
            rows, weights, sizes, implementation="mosaic_gpu", preferred_element_type=jnp.bfloat16
        )


CANDIDATE = Tokamax
