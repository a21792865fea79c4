"""What a transport costs, by formula: bytes and messages a rank sends, and bytes of the buffers it holds.

Needs no devices: it is as quick for 1,024 ranks as for two. Shape suffixes: n rows a rank brings to a hop, N ranks of
the hop, K experts per token, E experts, W expert width, S and R rows of the send and receive buffers, C slots for each
pair of ranks.

A row of dispatch is W values and its routing (K ids and K weights, 4 bytes each); a row of combine is W float32. What a
rank sends to itself costs nothing. Copies sent by one rank in one hop:

  allgather   n (N - 1)
  padded      C (N - 1)           slots, filled or not; C and the buffers: see `transport.bounds`
  ragged      n (N - 1) p         p: the chance that a token needs any of the experts beyond one rank of the hop

p is 1 - binomial(E - b, K) / binomial(E, K) for b experts beyond a rank, if all sets of K experts are as likely. With
grouped top-k all choices of `groups_kept` groups are, and then all sets of K experts within them. In the second of two
hops a rank passes on what its peers in all nodes sent it: n (N - 1) p times the nodes, N and p those of the second hop.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from jax_moe import layer
from jax_moe.capabilities import SLOTTED
from jax_moe.config import MoEConfig, ParallelConfig, check
from jax_moe.transport import bounds

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopEstimate:
    """Costs of one rank in one hop, there and back.

    Attributes:
      ranks: N.
      copies: rows sent to other ranks.
      dispatch_bytes, combine_bytes: sent to other ranks; sizes of a ragged hop are in those of dispatch.
      dispatch_messages, combine_messages: other ranks times arrays.
      buffer_bytes: what the collectives of both directions read and write on this rank. Static, and exact for all.
    """

    ranks: int
    copies: float
    dispatch_bytes: float
    combine_bytes: float
    dispatch_messages: int
    combine_messages: int
    buffer_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Costs of one rank for one forward of the layer, apart from what the layer moves itself.

    Attributes:
      hops: in the order of dispatch; with nodes, the first crosses them and the second stays inside.
      expert_rows: most rows the rank's experts can have, for which memory is held.
      exact: False when copies and bytes are expectations ("ragged").
    """

    hops: tuple[HopEstimate, ...]
    expert_rows: int
    exact: bool

    @property
    def dispatch_bytes(self) -> float:
        """Sent by dispatch, all hops."""
        return sum(hop.dispatch_bytes for hop in self.hops)

    @property
    def combine_bytes(self) -> float:
        """Sent by combine, all hops."""
        return sum(hop.combine_bytes for hop in self.hops)

    @property
    def messages(self) -> int:
        """Sent by both, all hops."""
        return sum(hop.dispatch_messages + hop.combine_messages for hop in self.hops)

    @property
    def buffer_bytes(self) -> int:
        """Held for both, all hops."""
        return sum(hop.buffer_bytes for hop in self.hops)


def estimate(config: MoEConfig, parallel: ParallelConfig, tokens_per_rank: int) -> Estimate:
    """Bytes, messages and buffers of one rank.

    Args:
      config, parallel: the layer and its spread.
      tokens_per_rank: rows each rank routes: of its DP rank's array, or of its own chunk under sequence parallelism.

    Returns:
      An `Estimate`: exact for "padded", "one_sided" and "allgather", for "ragged" the expectation under uniform
      routing, before `max_rows` drops anything.

    Raises:
      ValueError: a layer that cannot be spread so, or a negative number of tokens.

    Example:
      >>> import jax_moe as jm
      >>> config = jm.MoEConfig(num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048)
      >>> wide = jm.ParallelConfig(dp=128, expert_parallel=True, transport="padded")
      >>> jm.estimate(config, wide, 128).hops[0].copies
      16256
    """
    check(config, parallel)
    if tokens_per_rank < 0:
        raise ValueError(f"tokens_per_rank = {tokens_per_rank}: expected 0 or more")
    sizes = [math.prod(parallel.axis_sizes[axis] for axis in axes) for axes in layer.hop_axes(parallel)]
    if parallel.transport in ("ragged", *SLOTTED):
        limits = bounds.hops(
            parallel.transport,
            tokens_per_rank,
            config.top_k,
            sizes,
            capacity_factor=parallel.capacity_factor,
            max_rows=parallel.max_rows,
        )
        received = limits[-1].receive
    else:
        rows = tokens_per_rank
        limits = [bounds.HopBounds(rows=rows, ranks=sizes[0], pair=rows, send=rows, receive=sizes[0] * rows)]
        received = limits[0].receive
    row = config.expert_width * _DTYPE_BYTES[config.dtype] + 2 * config.top_k * 4
    back = config.expert_width * 4
    out, blocks = [], 1
    for number, limit in enumerate(limits):
        others, blocks = limit.ranks - 1, blocks * limit.ranks
        if parallel.transport == "ragged":
            # All nodes' tokens have come to this one by the second hop, as many to each place in it.
            sources = tokens_per_rank * (parallel.nodes if number else 1)
            copies: float = sources * others * hit_probability(config, blocks)
            # N sizes to each other rank.
            told, held = others * limit.ranks * 4, (limit.ranks + limit.ranks**2) * 4
            arrays = 3
        else:
            copies, told, held, arrays = limit.pair * others, 0, 0, 2
        hop = HopEstimate(
            ranks=limit.ranks,
            copies=copies,
            dispatch_bytes=copies * row + told,
            combine_bytes=copies * back,
            dispatch_messages=others * arrays,
            combine_messages=others,
            buffer_bytes=(limit.send + limit.receive) * (row + back) + held if others else 0,
        )
        out.append(hop)
    local_experts = config.num_experts // parallel.ep
    return Estimate(
        hops=tuple(out),
        expert_rows=received * min(config.top_k, local_experts),
        exact=parallel.transport != "ragged",
    )


@functools.lru_cache(maxsize=1024)
def hit_probability(config: MoEConfig, blocks: int) -> float:
    """Mean over equal blocks of the experts of the chance that a token needs any of the block's, by uniform routing.

    Args:
      config: of which experts, top-k and groups count.
      blocks: how many blocks the experts are split into.
    """
    groups = kept = 1
    if config.router.source != "ids":
        groups, kept = config.router.num_groups, config.router.groups_kept
    size, group = config.num_experts // blocks, config.num_experts // groups
    chances: dict[tuple[int, ...], float] = {}
    total = 0.0
    for block in range(blocks):
        first, last = block * size, (block + 1) * size
        shared = [min(last, (g + 1) * group) - max(first, g * group) for g in range(first // group, -(-last // group))]
        key = tuple(sorted(shared))
        if key not in chances:
            chances[key] = _hit(key, groups, kept, kept * group, config.top_k)
        total += chances[key]
    return total / blocks


def _hit(shared: tuple[int, ...], groups: int, kept: int, eligible: int, top_k: int) -> float:
    """Chance that K of the `eligible` experts in `kept` groups meet a block with `shared` experts in some groups."""
    # ways[j, x]: choices of j of those groups that put x of the block's experts among the eligible.
    ways = {(0, 0): 1}
    for experts in shared:
        without = ways.copy()
        for (j, x), count in without.items():
            ways[j + 1, x + experts] = ways.get((j + 1, x + experts), 0) + count
    hits = 0
    for (j, x), count in ways.items():
        if j <= kept and kept - j <= groups - len(shared):
            missed = math.comb(eligible - x, top_k)
            hits += count * math.comb(groups - len(shared), kept - j) * (math.comb(eligible, top_k) - missed)
    return hits / (math.comb(groups, kept) * math.comb(eligible, top_k))
