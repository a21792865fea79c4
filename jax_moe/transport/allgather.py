"""All tokens go to all ranks; each rank sums what its experts make of them, and the sums are reduce-scattered.

Moves more than it must, in two collectives whose shapes are known beforehand: simple, and good for few tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_moe import plan as plans
from jax_moe._typing import Array, Float, Float32, Int32
from jax_moe.transport import base


def dispatch(
    x_tW: Float[Array, "t W"],
    topk_ids_tK: Int32[Array, "t K"],
    topk_weights_tK: Float32[Array, "t K"],
    *,
    axes: tuple[str, ...],
    first_expert: Int32[Array, ""] | int,
    num_local_experts: int,
    weight_on_input: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "R W"], base.Handle]:
    """See `base.Transport.dispatch`. Gathered tokens lie in rank order."""
    x_nW, ids_nK, weights_nK = x_tW, topk_ids_tK, topk_weights_tK
    if axes:
        x_nW = jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), x_tW)
        # Ids ride along with the weights, so that there is one small collective; float32 holds them exactly to 2^24.
        routing_t2K = jnp.concatenate([topk_ids_tK.astype(jnp.float32), topk_weights_tK], axis=1)
        routing_n2K = jax.lax.all_gather(routing_t2K, axes, tiled=True)
        ids_nK, weights_nK = jnp.split(routing_n2K, 2, axis=1)
        ids_nK = ids_nK.astype(jnp.int32)
    plan = plans.make_plan(
        ids_nK, first_expert=first_expert, num_local_experts=num_local_experts, implementation=implementation
    )
    return base.take_rows(
        x_nW, weights_nK, plan, axes=axes, weight_on_input=weight_on_input, implementation=implementation
    )


def combine(y_RW: Float[Array, "R W"], handle: base.Handle) -> Float32[Array, "t W"]:
    """See `base.Transport.combine`. Sums across ranks are carried in float32."""
    y_nW = base.sum_rows(y_RW, handle)
    if not handle.axes:
        return y_nW
    return jax.tree.map(lambda y: jax.lax.psum_scatter(y, handle.axes, scatter_dimension=0, tiled=True), y_nW)
