"""Moves nothing between ranks: every expert (or a part of every one) is here, for this rank's own tokens."""

from __future__ import annotations

from jax_moe import plan as plans
from jax_moe._typing import Array, Float, Float32, Int32
from jax_moe.transport import base


def keep(
    topk_ids_tK: Int32[Array, "t K"],
    topk_weights_tK: Float32[Array, "t K"],
    *,
    first_expert: Int32[Array, ""] | int = 0,
    num_local_experts: int,
    implementation: str | None = None,
) -> base.Handle:
    """The handle of `dispatch`, for who gathers the rows itself, by the plan's `row_token_R`."""
    plan = plans.make_plan(
        topk_ids_tK, first_expert=first_expert, num_local_experts=num_local_experts, implementation=implementation
    )
    return base.Handle(plan=plan, weights_nK=topk_weights_tK, axes=(), implementation=implementation)


def dispatch(
    x_tW: Float[Array, "t W"],
    topk_ids_tK: Int32[Array, "t K"],
    topk_weights_tK: Float32[Array, "t K"],
    *,
    axes: tuple[str, ...] = (),
    first_expert: Int32[Array, ""] | int = 0,
    num_local_experts: int,
    weight_on_input: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "R W"], base.Handle]:
    """See `base.Transport.dispatch`; `axes` is empty."""
    assert not axes, "the local transport moves nothing"
    options = {"first_expert": first_expert, "num_local_experts": num_local_experts, "implementation": implementation}
    plan = keep(topk_ids_tK, topk_weights_tK, **options).plan
    return base.take_rows(
        x_tW, topk_weights_tK, plan, axes=(), weight_on_input=weight_on_input, implementation=implementation
    )


def combine(y_RW: Float[Array, "R W"], handle: base.Handle) -> Float32[Array, "t W"]:
    """See `base.Transport.combine`."""
    return base.sum_rows(y_RW, handle)
