"""Planted bugs: does the harness notice?

Each is planted in one framework at a time, by replacing a stage function in that framework's worker for one case. The
harness must then fail the case. What each does is written once here, and how, once for each framework, in
`parity.mutations.jax` and `parity.mutations.torch`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

EP_SP = "dp2.tp2.ep/allgather/bf16/t13.d64.f48/e8.k2/shared+gate+renorm"
TP = "dp1.tp2/local/bf16/t13.d64.f48/e8.k2/shared+gate"
UNEVEN = "dp2.tp1.ep/allgather/bf16/t7-3.d64.f48/e8.k2/shared"
BIASED = "dp1.tp2/local/bf16/t32.d64.f48/e32.k4/gate+groups8-2+bias"
TIED = "dp2.tp2.ep/allgather/bf16/t13.d64.f48/e8.k3/gate+ties"
DEEP = "dp1.tp1/local/bf16/t13.d64.f512/e4.k2"


@dataclass(frozen=True)
class Mutation:
    """One planted bug."""

    name: str
    what: str
    """What it does wrong, as someone would find it in a bug report."""
    case: str
    """A case that must show it."""
    gates: tuple[str, ...]
    """Gates of the verdict that must catch it, every one of them."""


CATALOG = (
    Mutation("zero_output", "the output is all zeros", EP_SP, ("oracle", "frameworks")),
    Mutation("zeroed_rows", "every 20th token's output is zeros", EP_SP, ("oracle", "frameworks")),
    Mutation("dropped_slot", "a token's last expert is left out of the sum", EP_SP, ("oracle", "frameworks")),
    Mutation("dropped_expert", "one expert's rows come back as zeros", EP_SP, ("oracle", "frameworks")),
    Mutation("lost_rank", "the routed output of one rank's tokens is lost", EP_SP, ("oracle", "frameworks")),
    Mutation("swapped_experts", "two experts of one rank have each other's weights", EP_SP, ("oracle", "frameworks")),
    Mutation("double_reduction", "a partial sum is reduced twice over tp", TP, ("oracle", "frameworks")),
    Mutation("reduction_skipped", "a partial sum is not reduced over tp", TP, ("exact", "oracle")),
    Mutation("renorm_skipped", "top-k weights are not renormalized", EP_SP, ("router", "oracle")),
    Mutation("gate_up_swapped", "the activation is applied to up, not to gate", EP_SP, ("oracle", "frameworks")),
    Mutation("sp_trimmed", "after the sequence gather only one rank's chunk is kept", EP_SP, ("sane",)),
    Mutation("shared_times_n", "the shared expert is added once by each rank", EP_SP, ("oracle", "frameworks")),
    Mutation("nan_padding", "NaN in padding rows reaches the output", UNEVEN, ("sane",)),
    Mutation("stale_padding", "padding rows of the output are not zeroed", UNEVEN, ("sane",)),
    Mutation("padding_routed", "padding rows are routed and counted like tokens", UNEVEN, ("sane",)),
    Mutation("bf16_accumulation", "the down projection accumulates in bfloat16", DEEP, ("oracle",)),
    Mutation("router_in_bf16", "router logits are rounded to bfloat16", EP_SP, ("router",)),
    Mutation("bias_weighs", "the score-correction bias enters the weights", BIASED, ("router", "oracle")),
    Mutation("group_by_best", "with a bias a group counts by its best expert, not its best two", BIASED, ("exact",)),
    Mutation("tie_rule_swapped", "among equals the higher expert or group wins", TIED, ("exact",)),
)


def planter(backend: str) -> Callable[[str], AbstractContextManager[None]]:
    """What plants bugs in a backend: call it with a name, and the bug is there inside the `with`.

    Raises:
      LookupError: bugs cannot be planted in that backend.
    """
    if backend not in ("jax", "torch"):
        raise LookupError(f"no bugs are known for backend {backend!r}; allowed: jax, torch")
    return importlib.import_module(f"parity.mutations.{backend}").plant
