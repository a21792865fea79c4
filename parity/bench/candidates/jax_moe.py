"""The JAX layer, through its public function, and its operations, each with the kernel that it picks here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jax_moe as jm
from jax_moe import experts, kernels, plan, router
from parity.bench.candidates.base import Candidate
from parity.bench.shapes import Shape

ROUTER = jm.RouterConfig(source="gate", renormalize=True)


def config_of(shape: Shape) -> jm.MoEConfig:
    return jm.MoEConfig(
        num_experts=shape.experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        router=ROUTER,
    )


class JaxMoe(Candidate):
    def operation(self, what: str, shape: Shape) -> Callable[..., Any]:
        return getattr(self, f"_{what}")(shape)

    def _layer(self, shape: Shape) -> Callable[..., Any]:
        config, parallel = config_of(shape), jm.ParallelConfig()
        mesh = jm.make_mesh(parallel, jax.devices()[:1])

        def layer(x: jax.Array, gate: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
            params = jm.MoEParams(
                experts=jm.ExpertParams(gate_up=gate_up, down=down), router=jm.RouterParams(gate=gate)
            )
            return jm.moe(params, x, config=config, parallel=parallel, mesh=mesh)

        return layer

    def _gate_up(self, shape: Shape) -> Callable[..., Any]:
        activation = jm.Activation(name="silu", gated=True, layout="concatenated")

        def gate_up(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
            params = jm.ExpertParams(gate_up=weights, down=weights)
            return experts.gate_up(rows, params, sizes, activation=activation)

        return gate_up

    def _grouped_matmul(self, shape: Shape) -> Callable[..., Any]:
        return lambda rows, weights, sizes: kernels.grouped_matmul(rows, weights, sizes)

    _down = _grouped_matmul

    def _gather(self, shape: Shape) -> Callable[..., Any]:
        def gather(x: jax.Array, row_token: jax.Array, position: jax.Array, sizes: jax.Array) -> jax.Array:
            return kernels.gather_rows(x, row_token, position_tK=position, group_sizes_e=sizes)

        return gather

    def _combine(self, shape: Shape) -> Callable[..., Any]:
        def combine(y: jax.Array, weights: jax.Array, position: jax.Array, *_: jax.Array) -> jax.Array:
            return kernels.combine_rows(y, position, weights).astype(jnp.bfloat16)

        return combine

    def _routing(self, shape: Shape) -> Callable[..., Any]:
        def routing(x: jax.Array, gate: jax.Array) -> tuple[jax.Array, ...]:
            ids, weights = router.route(router.compute_logits(x, gate), None, router=ROUTER, top_k=shape.top_k)
            sort = plan.make_plan(ids, first_expert=0, num_local_experts=shape.experts)
            return ids, weights, sort.position_tK, sort.group_sizes_e, sort.row_token_R

        return routing


CANDIDATE = JaxMoe
