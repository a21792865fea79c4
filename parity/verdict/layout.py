"""Which tokens lie on which rank, and how to put the ranks' answers back together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from parity.case import Case
from parity.results import Decisions


def holdings(case: Case) -> list[tuple[int, int]]:
    """For each rank, the dense index of its first token and how many lie on it, as its input lies."""
    if case.native:
        starts = np.cumsum([0, *case.rank_counts])
        return [(int(starts[r]), case.rank_counts[r]) for r in range(case.world)]
    starts = np.cumsum([0, *case.tokens])
    return [(int(starts[r // case.tp]), case.tokens[r // case.tp]) for r in range(case.world)]


def assemble(case: Case, ranks: Sequence[Decisions], name: str) -> np.ndarray:
    """A routing result of every token, in dense order; replicas over tp are taken once."""
    once = [r for r in range(case.world) if case.sequence_parallel or r % case.tp == 0]
    return np.concatenate([getattr(ranks[r], name)[ranks[r].token_index >= 0] for r in once])


def home(case: Case, token: int) -> tuple[int, int]:
    """The DP rank that a token lies on, and its row there."""
    ends = np.cumsum(case.tokens)
    rank = int(np.searchsorted(ends, token, side="right"))
    return rank, int(token - (ends[rank] - case.tokens[rank]))


def place(case: Case, token: int) -> str:
    rank, row = home(case, token)
    return f"DP rank {rank}, row {row}"


def expert_ranks(case: Case, ids: np.ndarray) -> list[int]:
    return sorted({int(i) // (case.experts // case.ep_size) for i in ids}) if case.ep else []


def listed(items) -> str:
    return ", ".join(str(int(i)) for i in items)
