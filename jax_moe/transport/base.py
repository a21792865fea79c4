"""What a transport is: a pair of functions, `dispatch` and `combine`, and the handle between them.

Shape suffixes: t tokens on this rank, n tokens after gathering (t when nothing is gathered), W expert width, K experts
per token, R rows on this rank.

`dispatch` brings the rows of this rank's experts here, sorted by expert; `combine` returns each token's weighted sum to
the rank the token came from. A handle is all that combine knows of dispatch.

Wherever an array of tokens or rows is taken here, so is a pytree of them, all moved alike: a format sends values and
their scales, and one that quantizes after dispatch sends no scales.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from jax_moe import kernels
from jax_moe._typing import Array, Float, Float32, Int32
from jax_moe.plan import Plan


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["plan", "weights_nK"],
    meta_fields=["axes", "implementation"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Handle:
    """What combine needs to undo a dispatch.

    Attributes:
      plan: the rows of this rank, over the n gathered tokens.
      weights_nK: (n, K) float32 what each row counts at combine.
      axes: mesh axes of more than one rank that tokens were gathered over.
      implementation: of the kernels.
    """

    plan: Plan
    weights_nK: Float32[Array, "n K"]
    axes: tuple[str, ...]
    implementation: str | None


class Transport(Protocol):
    """The functions of a transport module."""

    def dispatch(
        self,
        x_tW: Float[Array, "t W"],
        topk_ids_tK: Int32[Array, "t K"],
        topk_weights_tK: Float32[Array, "t K"],
        *,
        axes: tuple[str, ...],
        first_expert: Int32[Array, ""] | int,
        num_local_experts: int,
        weight_on_input: bool = False,
        implementation: str | None = None,
    ) -> tuple[Float[Array, "R W"], Handle]:
        """Rows of this rank's experts, and the handle.

        Args:
          x_tW: (t, W) this rank's tokens; padding rows are finite.
          topk_ids_tK: (t, K) int32, global; out of range (the sentinel) goes nowhere.
          topk_weights_tK: (t, K) float32, zero for padding.
          axes: mesh axes of more than one rank over which tokens differ and experts are split.
          first_expert: first of this rank's experts.
          num_local_experts: how many it has.
          weight_on_input: weigh rows here, and not at combine.
          implementation: of the kernels.
        """
        ...

    def combine(self, y_RW: Float[Array, "R W"], handle: Handle) -> Float32[Array, "t W"]:
        """Each token's weighted sum over the rows of all ranks of `axes`, (t, W) float32."""
        ...


def take_rows(
    x_nW: Float[Array, "n W"],
    weights_nK: Float32[Array, "n K"],
    plan: Plan,
    *,
    axes: tuple[str, ...],
    weight_on_input: bool,
    implementation: str | None,
) -> tuple[Float[Array, "R W"], Handle]:
    """The part of dispatch that moves nothing between ranks: rows by the plan, weighed if asked, and the handle."""
    rows_RW = jax.tree.map(
        lambda x: kernels.gather_rows(
            x,
            plan.row_token_R,
            position_tK=plan.position_tK,
            group_sizes_e=plan.group_sizes_e,
            implementation=implementation,
        ),
        x_nW,
    )
    if weight_on_input:
        if not isinstance(rows_RW, jax.Array):
            raise ValueError("weight_on_input: expected one array of rows; a format of several weighs them itself")
        weight_R = weights_nK.at[plan.row_token_R, plan.row_slot_R].get()
        # Past the last row both indices are -1, which reads some weight; the rows are zeros already.
        rows_RW = (rows_RW.astype(jnp.float32) * weight_R[:, None]).astype(rows_RW.dtype)
        weights_nK = jnp.ones_like(weights_nK)
    return rows_RW, Handle(plan=plan, weights_nK=weights_nK, axes=axes, implementation=implementation)


def sum_rows(y_RW: Float[Array, "R W"], handle: Handle) -> Float32[Array, "n W"]:
    """The part of combine that moves nothing between ranks: weighted sums over the rows here, in float32."""
    plan, implementation = handle.plan, handle.implementation
    return jax.tree.map(
        lambda y: kernels.combine_rows(y, plan.position_tK, handle.weights_nK, implementation=implementation), y_RW
    )
