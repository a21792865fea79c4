"""Prints the tables of docs/transports.md: what a rank sends and holds, by `jax_moe.estimate`.

    python docs/estimate_table.py

The layer is E=256 experts (as many as ranks, if those are more), top-k 8, D=7168, bfloat16; 128 tokens on each rank.
"""

from __future__ import annotations

import jax_moe as jm

EXPERTS, TOP_K, WIDTH, TOKENS, RANKS, NODE = 256, 8, 7168, 128, 32, 8
FLAT = {
    "allgather": {"transport": "allgather"},
    "ragged": {"transport": "ragged"},
    "padded": {"transport": "padded"},
    "padded, 1.25": {"transport": "padded", "capacity_factor": 1.25},
}


def cost(
    *, tokens: int = TOKENS, top_k: int = TOP_K, ranks: int = RANKS, groups: tuple[int, int] = (1, 1), **parallel
) -> jm.Estimate:
    """The estimate for one rank."""
    config = jm.MoEConfig(
        num_experts=max(EXPERTS, ranks),
        top_k=top_k,
        hidden_size=WIDTH,
        intermediate_size=2048,
        router=jm.RouterConfig(num_groups=groups[0], groups_kept=groups[1]),
    )
    return jm.estimate(config, jm.ParallelConfig(dp=ranks, expert_parallel=True, **parallel), tokens)


def megabytes(count: float) -> str:
    """Bytes in units of a million."""
    return f"{count / 1e6:,.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, numbers to the right."""
    first, *rest = ["| " + " | ".join(line) + " |" for line in (head, *rows)]
    return "\n".join([first, "|" + "---:|" * len(head), *rest])


def growing(name: str, argument: str, values: list[int]) -> str:
    """Bytes sent there and back, then bytes of buffers, as one quantity grows."""
    rows = []
    for value in values:
        costs = [cost(**{argument: value}, **fields) for fields in FLAT.values()]
        sent = [megabytes(c.dispatch_bytes + c.combine_bytes) for c in costs]
        rows.append([f"{value:,}", *sent, *(megabytes(c.buffer_bytes) for c in costs)])
    return table([name, *FLAT, *(f"held: {transport}" for transport in FLAT)], rows)


def messages(values: list[int]) -> str:
    """Messages of a rank, both ways, flat and over nodes."""
    rows = []
    for ranks in values:
        flat = [cost(ranks=ranks, transport=name).messages for name in ("allgather", "ragged", "padded")]
        nodes = [cost(ranks=ranks, transport=name, nodes=ranks // NODE).messages for name in ("ragged", "padded")]
        rows.append([f"{count:,}" for count in (ranks, *flat, *nodes)])
    return table(["messages at N ranks", "allgather", "ragged", "padded", "ragged, nodes", "padded, nodes"], rows)


def across(values: list[int]) -> str:
    """Bytes between nodes and inside of one: flat, over nodes, and over nodes with node-limited routing."""
    rows = []
    for ranks in values:
        nodes = ranks // NODE
        for over, groups in ((1, (1, 1)), (nodes, (1, 1)), (nodes, (nodes, 4))):
            cells = []
            for transport in ("ragged", "padded"):
                hops = cost(ranks=ranks, nodes=over, groups=groups, transport=transport).hops
                sent = [hop.dispatch_bytes + hop.combine_bytes for hop in hops]
                if over == 1:  # of its N - 1 peers, N - 8 are on other nodes
                    out = sent[0] * (ranks - NODE) / (ranks - 1)
                    sent = [out, sent[0] - out]
                cells += [megabytes(count) for count in sent]
            limited = f"4 of {nodes}" if groups[0] > 1 else "all"
            rows.append([f"{ranks:,}", "one" if over == 1 else "two", limited, *cells])
    head = ["ranks, 8 on a node", "hops", "nodes a token may use"]
    return table([*head, *(f"{name} {way}" for name in ("ragged", "padded") for way in ("across", "inside"))], rows)


def tables() -> list[str]:
    """All of them, in the order of the page."""
    return [
        growing("tokens on a rank", "tokens", [1, 16, 128, 1024, 8192]),
        growing("top-k", "top_k", [1, 2, 4, 8, 16]),
        growing("ranks", "ranks", [8, 32, 64, 256, 1024]),
        messages([64, 256, 1024]),
        across([64, 256, 1024]),
    ]


if __name__ == "__main__":
    print("\n\n".join(tables()))
