"""What each transport brings to each rank, simulated copy by copy: who gets which tokens, in which order, what is lost.

The two packages must deliver exactly this. The rules:

- `allgather` brings every token to every rank.
- `ragged`, `padded` and `one_sided` bring a token once to each rank that holds any of its experts. Copies arrive by
  source rank, then in the source's order.
- `padded` and `one_sided` have slots for each pair of ranks: as many as the source has rows, or with a capacity factor
  c ceil(c * rows * K / ranks) of them. The first copies in the source's order take the slots; the others are dropped
  and the source counts them.
- `max_rows` caps what a rank accepts of `ragged` copies: the first ones as they arrive; the receiver counts the rest.
- With nodes there are two such hops: to the rank with the same place on each node that holds any of the token's
  experts, and from there within the node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from parity.case import SLOTTED, Case


@dataclass(frozen=True)
class Delivery:
    """What one rank's experts work on."""

    tokens: np.ndarray
    """(n,) dense index of each copy, in the order they lie in the rank's buffer."""
    live: np.ndarray
    """(n, K) which of the copy's choices are this rank's experts."""
    dropped: int
    """Copies this rank dropped: those it could not send (slots), or did not accept (ragged)."""


@dataclass
class _Buffer:
    """Rows of one rank before or after a hop; token -1 is an empty slot."""

    tokens: np.ndarray
    live: np.ndarray


def deliver(case: Case, ids: np.ndarray) -> list[Delivery]:
    """Each rank's rows, for a choice of experts.

    Args:
      case: mesh and transport.
      ids: (T, K) experts of every real token, by dense index.
    """
    starts = np.cumsum([0, *(case.rank_counts if case.sequence_parallel else case.tokens)])
    local = case.experts // case.ep_size
    if case.transport in ("local", "allgather"):
        out = []
        for rank in range(case.world):
            dp = rank // case.tp
            tokens = np.arange(case.total_tokens) if case.ep else np.arange(starts[dp], starts[dp + 1])
            first = rank * local if case.ep else 0
            out.append(Delivery(tokens, (ids[tokens] >= first) & (ids[tokens] < first + local), 0))
        return out

    rows = case.rows_per_rank
    buffers = []
    for rank in range(case.world):
        tokens = np.full(rows, -1)
        own = np.arange(starts[rank], starts[rank + 1])
        tokens[: len(own)] = own
        buffers.append(_Buffer(tokens, np.repeat(tokens[:, None] >= 0, case.top_k, axis=1)))
    dropped = np.zeros(case.world, int)
    per_node = case.world // case.nodes
    if case.nodes > 1:
        rails = [[node * per_node + place for node in range(case.nodes)] for place in range(per_node)]
        buffers = _hop(case, buffers, rails, ids, ids // (local * per_node), dropped)
    inside = [list(range(node * per_node, (node + 1) * per_node)) for node in range(case.nodes)]
    buffers = _hop(case, buffers, inside, ids, ids // local % per_node, dropped)
    return [
        Delivery(buffer.tokens[buffer.tokens >= 0], buffer.live[buffer.tokens >= 0], int(dropped[rank]))
        for rank, buffer in enumerate(buffers)
    ]


def kept(case: Case, ids: np.ndarray) -> np.ndarray:
    """(T, K) which choices of every token reach their expert."""
    reached = np.zeros(ids.shape, bool)
    for delivery in deliver(case, ids):
        np.logical_or.at(reached, delivery.tokens, delivery.live)
    return reached


def _hop(
    case: Case, buffers: list[_Buffer], groups: list[list[int]], ids: np.ndarray, owner: np.ndarray, dropped: np.ndarray
) -> list[_Buffer]:
    """One exchange inside each group: a copy of a row to each member that owns any of its live choices."""
    out: list[_Buffer] = list(buffers)
    for group in groups:
        rows = max(len(buffers[rank].tokens) for rank in group)
        slots = rows
        if case.flags.capacity:
            slots = min(rows, max(1, math.ceil(case.flags.capacity * rows * case.top_k / len(group))))
        for place, receiver in enumerate(group):
            tokens, live = [], []
            for source in group:
                buffer = buffers[source]
                wanted = buffer.live & (owner[buffer.tokens] == place) & (buffer.tokens[:, None] >= 0)
                copies = np.flatnonzero(wanted.any(axis=1))
                if case.transport in SLOTTED:
                    dropped[source] += max(0, len(copies) - slots)
                    copies = copies[:slots]
                    empty = slots - len(copies)
                else:
                    empty = 0
                tokens.append(np.concatenate([buffer.tokens[copies], np.full(empty, -1)]))
                live.append(np.concatenate([wanted[copies], np.zeros((empty, case.top_k), bool)]))
            all_tokens, all_live = np.concatenate(tokens), np.concatenate(live)
            if case.transport == "ragged" and case.flags.maxrows:
                dropped[receiver] += max(0, len(all_tokens) - case.flags.maxrows)
                all_tokens, all_live = all_tokens[: case.flags.maxrows], all_live[: case.flags.maxrows]
            out[receiver] = _Buffer(all_tokens, all_live)
    return out
