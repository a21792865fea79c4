"""What leaves a token's result equal bit for bit: what each framework promises, where, and why not more.

Data, printed by `parity list --determinism`. `parity determinism` holds the layers to it; a test on a card holds the
kernels to theirs. docs/numerics.md has the reasons at length, and what was measured beside.
"""

from __future__ import annotations

from dataclasses import dataclass

from parity.case import TRANSPORTS, Case

PROPERTIES = {
    "repeat": "the same call again",
    "padding": "padding rows hold other numbers",
    "values": "the other tokens hold other numbers, and go to the same experts",
    "elsewhere": "the tokens of the other DP ranks are others",
    "others": "the other tokens are others, and go to other experts",
    "moved": "the tokens lie in another order",
    "fewer": "there are fewer tokens",
}
"""What is changed about a batch. A token's result is *batch invariant* if it survives all but the first two."""
BATCH = ("values", "elsewhere", "others", "moved", "fewer")


@dataclass(frozen=True)
class Promise:
    """What one framework's layer on one transport, or one implementation of a kernel, keeps."""

    framework: str
    platform: str
    what: str
    """A transport, or an implementation and its operations."""
    keeps: frozenset[str]
    """Of `PROPERTIES`."""
    why: str


_SAME_STEPS = frozenset({"repeat", "padding", "values"})
_BLOCKED = {
    ("jax", "cpu"): "XLA's products on CPU add in an order that may depend on a row's place in its block",
    ("torch", "cpu"): "the CPU's matrix library picks its kernel by the rows an expert has",
    ("jax", "gpu"): "cuBLAS picks its kernel for the router and the shared expert by the number of tokens",
    ("torch", "gpu"): "cuBLAS and grouped_mm pick kernels and tiles by the number of rows",
}
LAYERS = tuple(
    Promise(
        framework,
        platform,
        transport,
        _SAME_STEPS | ({"elsewhere"} if transport == "local" else set()),
        why if transport == "local" else f"{why}; tokens of other ranks move a token's rows",
    )
    for (framework, platform), why in _BLOCKED.items()
    for transport in TRANSPORTS
)
"""By framework, platform and transport, for whatever implementation is picked there."""

_BY_TOKEN = frozenset(PROPERTIES) - {"padding", "elsewhere"}
KERNELS = (
    Promise("jax", "cpu", "reference: products", frozenset({"repeat", "values"}),
            "blocks of rows, whose size goes by the rows of the buffer, and what XLA makes of them"),
    Promise("jax", "cpu", "reference: gather, combine", _BY_TOKEN,
            "copies; a float32 sum over a token's slots in their order"),
    Promise("jax", "gpu", "mosaic_gpu: grouped_matmul, gate_up", frozenset({"repeat", "values", "others", "moved"}),
            "each element is one chain of wgmma over the depth, ascending and never split, wherever its tile lies; but "
            "the tile goes by the rows of the buffer, and with few of them the operands change sides"),
    Promise("jax", "gpu", "triton: gather, combine, routing", _BY_TOKEN,
            "a program a token, which sees no other; slots are added in their order"),
    Promise("torch", "cpu", "mm, expert by expert", frozenset({"repeat", "values"}), _BLOCKED["torch", "cpu"]),
    Promise("torch", "gpu", "grouped_mm", frozenset({"repeat", "values"}), _BLOCKED["torch", "gpu"]),
)  # fmt: skip
"""By implementation: what its operations keep equal of a row, or of a token."""


def promised(framework: str, platform: str, case: Case) -> frozenset[str]:
    """What a framework's layer keeps for a case; nothing is known of frameworks that are not in the table."""
    key = (framework, platform, case.transport)
    return next((p.keeps for p in LAYERS if (p.framework, p.platform, p.what) == key), frozenset())
