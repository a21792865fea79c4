"""JAX's own `jax.lax.ragged_dot`, and the layer that a JAX user writes around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from parity.bench.candidates.base import Candidate
from parity.bench.shapes import Shape

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def silu_pair(inner: jax.Array) -> jax.Array:
    gate, up = jnp.split(inner, 2, axis=-1)
    return jax.nn.silu(gate) * up


def layer_around(product: Product, top_k: int) -> Callable[..., jax.Array]:
    """Softmax, top-k, sort, gather, two grouped products, weighted sum: plain JAX but for the products."""

    def layer(x: jax.Array, gate: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        logits = jax.lax.dot_general(x, gate, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        weights, ids = jax.lax.top_k(jax.nn.softmax(logits), top_k)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        flat = ids.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        sizes = jnp.bincount(flat, length=gate.shape[0]).astype(jnp.int32)
        y = product(silu_pair(product(x[order // top_k], gate_up, sizes)), down, sizes)
        slots = y[jnp.argsort(order)].reshape(x.shape[0], top_k, -1).astype(jnp.float32)
        return jnp.sum(slots * weights[:, :, None], axis=1).astype(x.dtype)

    return layer


class RaggedDot(Candidate):
    layout = "transposed"

    def product(self, rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
        """(R, K) by (E, K, N), rows sorted by expert."""
        return jax.lax.ragged_dot(rows, weights, sizes)

    def operation(self, what: str, shape: Shape) -> Callable[..., Any]:
        if what == "layer":
            return layer_around(self.product, shape.top_k)
        if what == "gate_up":
            return lambda rows, weights, sizes: silu_pair(self.product(rows, weights, sizes))
        return self.product


CANDIDATE = RaggedDot
