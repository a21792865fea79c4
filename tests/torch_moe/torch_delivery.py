"""Who gets which token over one hop or two, copy by copy in plain Python: what the transports must do, in one screen.

A copy is (rank, token, slots): whose token it is, and which of its slots are still wanted where the copy lies.
"""

import math


def deliver(ids, experts, levels, *, array_rows=None, capacity_factor=None, max_rows=None):
    """What each rank's plan sees.

    Args:
        ids: (n, K) nested lists for each rank.
        experts: E, in contiguous blocks over the ranks.
        levels: ranks of each hop; their product is the number of ranks.
        array_rows: None: exact sizes. Else rows of every rank's array, and slots in place of sizes.
        capacity_factor: fewer slots.
        max_rows: copies a rank accepts.

    Returns:
        for each rank: copies in order, None for an empty slot; the number it dropped; and the copies it sent to other
        ranks.
    """
    world = math.prod(levels)
    top_k = max(len(token) for rank in ids for token in rank) if any(map(len, ids)) else 1
    held = [[(rank, token, range(top_k)) for token in range(len(ids[rank]))] for rank in range(world)]
    dropped, sent = [0] * world, [0] * world
    for depth, size in enumerate(levels):
        inner = math.prod(levels[depth + 1 :])
        block = experts // world * inner
        outer = math.prod(levels[:depth])
        arrived = [[] for _ in range(world)]
        slots = None
        if array_rows is not None:
            slots = array_rows
            if capacity_factor is not None:
                slots = min(slots, max(1, math.ceil(capacity_factor * array_rows * top_k / size)))
            array_rows = size * slots
        for source in range(world):
            for place in range(size):
                stride = world // outer
                target = source // stride * stride + place * inner + source % inner
                copies = []
                for copy in held[source]:
                    if copy is None:
                        continue
                    rank, token, live = copy
                    chosen = ids[rank][token]
                    wanted = [s for s in live if 0 <= chosen[s] < experts and chosen[s] // block % size == place]
                    if wanted:
                        copies.append((rank, token, wanted))
                if slots is not None:
                    dropped[source] += max(0, len(copies) - slots)
                    copies = copies[:slots] + [None] * (slots - len(copies))
                room = None if max_rows is None else max(0, max_rows - len(arrived[target]))
                accepted = copies if room is None else copies[:room]
                dropped[target] += len(copies) - len(accepted)
                arrived[target] += accepted
                sent[source] += len(accepted) * (target != source)
        held = arrived
    return held, dropped, sent


def rows_of(copies, ids, first_expert, local_experts):
    """(expert, copy, slot) of each row on a rank, in order."""
    found = [
        (ids[copy[0]][copy[1]][slot], index, slot)
        for index, copy in enumerate(copies)
        if copy is not None
        for slot in copy[2]
        if first_expert <= ids[copy[0]][copy[1]][slot] < first_expert + local_experts
    ]
    return sorted(found)
