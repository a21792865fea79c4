"""Which transport serves what: data, and nothing else.

What a table allows works and is tested; anything else is refused when a `ParallelConfig` is made, or by `check`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

MODES = ("single", "DP", "TP", "DP+TP", "DP+EP", "EP+SP", "EP+SP native", "EP, SP off")
"""Every parallel mode, as `ParallelConfig.mode` says it. Experts on one rank count as "DP+EP"."""

CAPABILITIES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "local": frozenset({"single", "DP", "TP", "DP+TP"}),
        "allgather": frozenset({"DP+EP", "EP+SP", "EP+SP native", "EP, SP off"}),
        "ragged": frozenset({"DP+EP", "EP+SP", "EP+SP native"}),
        "padded": frozenset({"DP+EP", "EP+SP", "EP+SP native"}),
        "one_sided": frozenset({"DP+EP", "EP+SP", "EP+SP native"}),
    }
)
"""The parallel modes each transport serves. With experts on one rank, where nothing moves, "local" will do too."""

SLOTTED = ("padded", "one_sided")
"""Transports with fixed slots for each pair of ranks, which `capacity_factor` caps."""
ACROSS_NODES: frozenset[str] = frozenset({"ragged", "padded"})
"""Transports that can enter a node once and fan out inside (`ParallelConfig.nodes` > 1)."""

TRANSPORT_DTYPES: Mapping[str, frozenset[str]] = MappingProxyType(
    {name: frozenset({"bfloat16", "float16", "float32"}) for name in CAPABILITIES}
)
"""The dtypes of `MoEConfig.dtype` each transport moves."""


def serving(mode: str) -> tuple[str, ...]:
    """The transports that serve a mode."""
    return tuple(name for name, modes in CAPABILITIES.items() if mode in modes)
