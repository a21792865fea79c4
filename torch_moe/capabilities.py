"""Which transport serves which parallel mode, in which dtype, and over how many levels of ranks. Data, and public.

What the tables allow works; anything else is a `ValueError` when a configuration is made or checked, before anything is
launched. Modes carry the names of `ParallelConfig.mode`.
"""

from collections.abc import Mapping

_RANKS_DIFFER = frozenset({"DP+EP", "EP+SP", "EP+SP native"})

CAPABILITIES: Mapping[str, frozenset[str]] = {
    "local": frozenset({"single", "DP", "TP", "DP+TP"}),
    "allgather": _RANKS_DIFFER | {"EP, SP off"},
    "ragged": _RANKS_DIFFER,
    "padded": _RANKS_DIFFER,
    "one_sided": _RANKS_DIFFER,
}
"""The parallel modes each transport serves. All but the first two send every rank's tokens as its own, so tp ranks that
hold the same tokens (SP off) would send them tp times. On one rank `local` also serves expert parallelism."""

SLOTTED = ("padded", "one_sided")
"""Transports with fixed slots for each pair of ranks, which `capacity_factor` caps."""
ACROSS_NODES = frozenset({"ragged", "padded"})
"""Transports that can cross nodes first and fan out inside (nodes > 1)."""

TRANSPORT_DTYPES: Mapping[str, frozenset[str]] = {name: frozenset({"bfloat16", "float32"}) for name in CAPABILITIES}
"""The layer's dtypes each transport carries."""


def serving(mode: str) -> tuple[str, ...]:
    """The transports that serve a parallel mode."""
    return tuple(name for name, modes in CAPABILITIES.items() if mode in modes)
