"""The candidates by name, known without importing any of them: where each lives, what it needs, what it is."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from parity.bench.shapes import WHATS

LABS = {"jax": "parity.bench.candidates.jax_lab", "torch": "parity.bench.candidates.torch_lab"}
PRODUCTS = ("layer", "gate_up", "down", "grouped_matmul")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One candidate."""

    name: str
    module: str
    """Where its class is, under the name CANDIDATE."""
    framework: str
    """"jax" or "torch": whose arrays it takes, and whose clock times it. Or a module with a class `Lab` of its own."""
    needs: tuple[str, ...]
    """Modules of which one must be importable."""
    whats: tuple[str, ...]
    platforms: tuple[str, ...] = ("cpu", "gpu")
    note: str = ""
    """What a reader of its numbers must know."""

    @property
    def lab(self) -> str:
        """The module of its lab."""
        return LABS.get(self.framework, self.framework)

    def missing(self, platform: str, peers: Sequence[Path]) -> str | None:
        """Why it cannot run here, or None."""
        if platform not in self.platforms:
            return f"runs on {' and '.join(self.platforms)} alone"
        if not any(_importable(need, peers) for need in self.needs):
            return f"{' or '.join(self.needs)} cannot be imported"
        return None


def _importable(module: str, peers: Sequence[Path]) -> bool:
    """Whether a top-level module would be found, also in the folders `peers`, without importing it."""
    before = list(sys.path)
    try:
        sys.path[:0] = map(str, peers)
        return importlib.util.find_spec(module) is not None
    finally:
        sys.path[:] = before


CATALOG = (
    Entry(name="jax_moe", module="parity.bench.candidates.jax_moe", framework="jax", needs=("jax_moe",), whats=WHATS),
    Entry(
        name="torch_moe",
        module="parity.bench.candidates.torch_moe",
        framework="torch",
        needs=("torch_moe",),
        whats=WHATS,
    ),
    Entry(
        name="vllm",
        module="parity.bench.candidates.vllm",
        framework="torch",
        needs=("vllm", "vllm_kernel"),
        whats=PRODUCTS,
        platforms=("gpu",),
        note="its Triton kernel at the best of several tiles; routing and token alignment are not in its time",
    ),
    Entry(
        name="sonic",
        module="parity.bench.candidates.sonic",
        framework="torch",
        needs=("sonicmoe",),
        whats=("layer",),
        platforms=("gpu",),
        note="its own softmax over the chosen experts",
    ),
    Entry(
        name="tokamax",
        module="parity.bench.candidates.tokamax",
        framework="jax",
        needs=("tokamax",),
        whats=PRODUCTS,
        platforms=("gpu",),
        note="plain JAX around its ragged_dot, weights as it wants them",
    ),
    Entry(
        name="lax.ragged_dot",
        module="parity.bench.candidates.ragged_dot",
        framework="jax",
        needs=("jax",),
        whats=PRODUCTS,
        note="plain JAX around JAX's own ragged_dot, weights as it wants them",
    ),
)
NAMES = tuple(entry.name for entry in CATALOG)


def named(names: Iterable[str]) -> list[Entry]:
    """The entries of these names.

    Raises:
      ValueError: a name is not in the catalog.
    """
    entries = {entry.name: entry for entry in CATALOG}
    for name in names:
        if name not in entries:
            raise ValueError(f"unknown candidate {name!r}; allowed: {', '.join(NAMES)}")
    return [entries[name] for name in dict.fromkeys(names)]
