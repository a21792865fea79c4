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
LATENT = "dp2.tp2.ep/allgather/bf16/t13.d64.f48/e8.k2/gate+latent"
EXPERT_BIAS = "dp1.tp2/local/bf16/t13.d64.f48/e8.k2/shared+expertbias"


@dataclass(frozen=True)
class Mutation:
    """One planted bug."""

    name: str
    what: str
    """What it does wrong, as someone would find it in a bug report."""
    case: str
    """A case that must show it."""
    stage: str
    """The stage (`parity.stages`) it sits in, which must be named."""
    gates: tuple[str, ...]
    """Gates of the verdict that must catch it, every one of them."""


_SHOWS = ("stages", "oracle", "frameworks")
CATALOG = (
    Mutation("zero_output", "the output is all zeros", EP_SP, "reduce", _SHOWS),
    Mutation("zeroed_rows", "every 20th token's output is zeros", EP_SP, "reduce", _SHOWS),
    Mutation("dropped_slot", "a token's last expert is left out of the sum", EP_SP, "combine", _SHOWS),
    Mutation("dropped_expert", "one expert's rows come back as zeros", EP_SP, "down", _SHOWS),
    Mutation("lost_rank", "the routed output of one rank's tokens is lost", EP_SP, "combine", _SHOWS),
    Mutation("swapped_experts", "two experts of one rank have each other's weights", EP_SP, "gate_up", _SHOWS),
    Mutation("rows_shifted", "each row of an expert holds the token of the row before", EP_SP, "dispatch", _SHOWS),
    Mutation("double_reduction", "a partial sum is reduced twice over tp", TP, "reduce", _SHOWS),
    Mutation("reduction_skipped", "a partial sum is not reduced over tp", TP, "reduce", ("exact", *_SHOWS)),
    Mutation("renorm_skipped", "top-k weights are not renormalized", EP_SP, "choice", ("router", *_SHOWS)),
    Mutation("gate_up_swapped", "the activation is applied to up, not to gate", EP_SP, "activation", _SHOWS),
    Mutation("bias_skipped", "the bias of gate and up is left out", EXPERT_BIAS, "gate_up", _SHOWS),
    Mutation("latent_in_short", "the latent's last column is lost on the way in", LATENT, "latent_in", _SHOWS),
    Mutation("latent_out_short", "the latent's last column is lost on the way out", LATENT, "latent_out", _SHOWS),
    Mutation("sp_trimmed", "after the sequence gather only one rank's chunk is kept", EP_SP, "reduce", ("sane",)),
    Mutation("shared_times_n", "the shared expert is added once by each rank", EP_SP, "shared", _SHOWS),
    Mutation("nan_padding", "NaN in padding rows reaches the output", UNEVEN, "reduce", ("sane",)),
    Mutation("stale_padding", "padding rows of the output are not zeroed", UNEVEN, "reduce", ("sane",)),
    Mutation("padding_routed", "padding rows are routed and counted like tokens", UNEVEN, "choice", ("sane",)),
    Mutation("bf16_accumulation", "the down projection accumulates in bfloat16", DEEP, "down", ("stages",)),
    Mutation("floor_for_round", "the activation is cut to bfloat16, not rounded", DEEP, "activation", ("stages",)),
    Mutation("router_in_bf16", "router logits are rounded to bfloat16", EP_SP, "logits", ("router", "stages")),
    Mutation("bias_weighs", "the score-correction bias enters the weights", BIASED, "choice", ("router", *_SHOWS)),
    Mutation("group_by_best", "with a bias a group counts by its best expert, not its best two", BIASED, "choice",
             ("exact", "stages")),
    Mutation("tie_rule_swapped", "among equals the higher expert or group wins", TIED, "choice", ("exact", "stages")),
)  # fmt: skip


def planter(backend: str) -> Callable[[str], AbstractContextManager[None]]:
    """What plants bugs in a backend: call it with a name, and the bug is there inside the `with`.

    Raises:
      LookupError: bugs cannot be planted in that backend.
    """
    if backend not in ("jax", "torch"):
        raise LookupError(f"no bugs are known for backend {backend!r}; allowed: jax, torch")
    return importlib.import_module(f"parity.mutations.{backend}").plant
