"""What a transport sends and holds, computed without running it: exact for what the code sends, from sizes alone.

`n` tokens a rank routes, `K` experts per token, `W` the routed experts' width, `N` ranks of the exchange. A copy is a
token on its way to one rank: its values, K ids and K weights, W * itemsize + 8 K bytes. It comes back as W float32.

    transport   copies a rank sends to each other rank     each way
    allgather   n                                          one all-gather; back one exchange of partial sums
    ragged      n * P                                      sizes first: 8 bytes to each rank (16 with max_rows)
    padded      slots: n, or less with a capacity factor   empty slots travel too

P is the chance that a token chose any expert of the rank: with each token's K experts drawn evenly,
P = 1 - C(E - e, K) / C(E, K). Grouped top-k draws the groups first, then K experts within them.
Across nodes a token takes two hops: to nodes with chance P of a whole node, then inside, from all the nodes' tokens.
"""

import dataclasses
import functools
from fractions import Fraction
from math import comb

from torch_moe.capabilities import SLOTTED
from torch_moe.config import MoEConfig, ParallelConfig, check
from torch_moe.params import DTYPES
from torch_moe.transport import bounds

ID_BYTES = WEIGHT_BYTES = SUM_BYTES = 4
SIZE_BYTES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """One forward's exchange, for each rank on average. What stays on the rank is not sent, but held.

    Attributes:
        dispatch_bytes: sent to other ranks on the way to the experts.
        combine_bytes: sent to other ranks on the way back.
        dispatch_messages: messages to other ranks; a collective over N ranks is N - 1 of them.
        combine_messages: on the way back.
        across_nodes_bytes: of both ways' bytes, those of the hop between nodes; 0 with one node.
        buffer_bytes: what the collectives read from and write to, both ways, rows that stay included.
        received_copies: tokens a rank's plan sees, empty slots included.
        received_copies_bound: the most it can be, as `transport.bounds` has it.
    """

    dispatch_bytes: float
    combine_bytes: float
    dispatch_messages: int
    combine_messages: int
    across_nodes_bytes: float
    buffer_bytes: float
    received_copies: float
    received_copies_bound: int


def estimate(config: MoEConfig, parallel: ParallelConfig, tokens_per_rank: int) -> Estimate:
    """Bytes, messages and buffers of one forward's exchange of rows.

    Sums over tp outside the transport (SP off), sequence scatter and gather, and the ranks' telling each other their
    array sizes are not part of it.

    Args:
        config: the layer.
        parallel: how it is spread; its transport is what is estimated.
        tokens_per_rank: rows each rank routes, the same on all: its chunk under sequence parallelism.

    Returns:
        an `Estimate`: exact for all but ragged, the expectation under uniform routing for that. With `max_rows`
        the expectation is cut off there, which is an upper bound.

    Raises:
        ValueError: sizes that do not divide, or a negative number of tokens.

    Example:
        >>> config = MoEConfig(num_experts=8, top_k=2, hidden_size=4, intermediate_size=4, dtype="float32")
        >>> parallel = ParallelConfig(dp=4, expert_parallel=True)
        >>> estimate(config, parallel, 10).dispatch_bytes  # 3 ranks * 10 tokens * (4 * 4 + 2 * 8) bytes
        960.0
    """
    check(config, parallel)
    if tokens_per_rank < 0:
        raise ValueError(f"tokens_per_rank={tokens_per_rank}: allowed is a whole number of at least 0")
    row = config.expert_width * DTYPES[config.dtype].itemsize + config.top_k * (ID_BYTES + WEIGHT_BYTES)
    back = config.expert_width * SUM_BYTES
    hops = _hops(config, parallel, tokens_per_rank)
    dispatch = combine = across = buffers = 0.0
    there_messages = back_messages = 0
    for level, hop in enumerate(hops):
        others = hop.ranks - 1
        dispatch += others * (hop.copies * row + hop.sizes * SIZE_BYTES)
        combine += others * hop.copies * back
        there_messages += others * (hop.sizes + 3 * hop.moves)
        back_messages += others * hop.moves
        if others:
            buffers += (hop.sent + hop.received) * row + (hop.summed + hop.received) * back
        if level == 0:
            across = dispatch + combine if parallel.nodes > 1 else 0.0
    return Estimate(
        dispatch_bytes=dispatch,
        combine_bytes=combine,
        dispatch_messages=there_messages,
        combine_messages=back_messages,
        across_nodes_bytes=across,
        buffer_bytes=buffers,
        received_copies=hops[-1].received,
        received_copies_bound=bounds.received_copies(
            tokens_per_rank,
            top_k=config.top_k,
            hops=[hop.ranks for hop in hops],
            capacity_factor=parallel.capacity_factor,
            max_rows=parallel.max_rows,
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Hop:
    """One exchange: ranks in it; copies from a rank to each, to all (sent), from all (received), summed on return."""

    ranks: int
    copies: float
    sent: float
    received: float
    summed: float
    sizes: int
    moves: bool


def _hops(config: MoEConfig, parallel: ParallelConfig, tokens: int) -> list[_Hop]:
    if parallel.ep == 1 and parallel.transport in ("local", "allgather"):
        return [_Hop(ranks=1, copies=0.0, sent=0.0, received=tokens, summed=0.0, sizes=0, moves=False)]
    if parallel.transport == "allgather":
        ranks = parallel.ep if parallel.sp else parallel.dp
        total = ranks * tokens
        # An all-gather reads each rank's rows once; the way back reads and writes rows for all ranks.
        return [_Hop(ranks=ranks, copies=tokens, sent=tokens, received=total, summed=total, sizes=0, moves=tokens > 0)]
    per_node = parallel.ep // parallel.nodes
    local = config.num_experts // parallel.ep
    levels = [(per_node, local)]
    if parallel.nodes > 1:
        levels.insert(0, (parallel.nodes, local * per_node))
    hops, held, arriving, accepted = [], tokens, float(tokens), 1.0
    for ranks, block in levels:
        if parallel.transport in SLOTTED:
            copies = bounds.slots(held, top_k=config.top_k, ranks=ranks, capacity_factor=parallel.capacity_factor)
            held = ranks * copies
            hops.append(_even(ranks, copies, sizes=0, moves=copies > 0))
            continue
        copies = arriving * accepted * float(_mean_chance(config, block))
        if parallel.max_rows is not None and ranks * copies > parallel.max_rows:
            accepted *= parallel.max_rows / (ranks * copies)
            copies = parallel.max_rows / ranks
        # A token that some rank of a node wants has reached the node: the next hop starts from all of them.
        arriving *= ranks
        hops.append(_even(ranks, copies, sizes=1 if parallel.max_rows is None else 2, moves=True))
    return hops


def _even(ranks: int, copies: float, *, sizes: int, moves: bool) -> _Hop:
    total = ranks * copies
    return _Hop(ranks=ranks, copies=copies, sent=total, received=total, summed=total, sizes=sizes, moves=moves)


def _mean_chance(config: MoEConfig, block: int) -> Fraction:
    """The chance that a token chose any expert of a block, on average over all blocks of that many experts."""
    grouped = config.router.source != "ids"
    groups, kept = (config.router.num_groups, config.router.groups_kept) if grouped else (1, 1)
    size = config.num_experts // groups
    total = Fraction(0)
    for first in range(0, config.num_experts, block):
        # How many of the block's experts lie in each group that it touches.
        touched = range(first // size, -(-(first + block) // size))
        overlaps = (min(first + block, (g + 1) * size) - max(first, g * size) for g in touched)
        total += _chance(tuple(sorted(overlaps)), groups, kept, size, config.top_k)
    return total / (config.num_experts // block)


@functools.cache
def _chance(overlaps: tuple[int, ...], groups: int, kept: int, size: int, top_k: int) -> Fraction:
    """The chance for one block, given its share of the groups it touches: over all choices of `kept` groups."""
    ways = {(0, 0): 1}  # (touched groups kept, experts of the block in them): number of choices
    for overlap in overlaps:
        for (count, experts), number in list(ways.items()):
            key = (count + 1, experts + overlap)
            ways[key] = ways.get(key, 0) + number
    missed = sum(
        number * comb(groups - len(overlaps), kept - count) * comb(kept * size - experts, top_k)
        for (count, experts), number in ways.items()
        if count <= kept
    )
    return 1 - Fraction(missed, comb(groups, kept) * comb(kept * size, top_k))
