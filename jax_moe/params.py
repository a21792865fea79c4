"""Parameters as pytrees of arrays, in the layout checkpoints use.

Shape suffixes: E experts, D hidden size, W expert width (hidden size or latent), F expert intermediate size,
M rows of the first projection (2F gated, F not), S shared intermediate size, L latent size.

Expert-local state is one pytree, so that whatever moves experts moves all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jax_moe._typing import Array, Float, Float32, PRNGKeyArray
from jax_moe.config import MoEConfig

_Class = TypeVar("_Class", bound=type)


def _pytree(*, static: tuple[str, ...] = ()) -> Callable[[_Class], _Class]:
    def register(cls: _Class) -> _Class:
        fields = [field.name for field in dataclasses.fields(cls)]
        data = [name for name in fields if name not in static]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(static))

    return register


@_pytree(static=("tp_blocks",))
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertParams:
    """Weights of the routed experts.

    Attributes:
      gate_up: (E, M, W) first projection.
      down: (E, W, F) second projection.
      gate_up_bias: (E, M), or None.
      down_bias: (E, W), or None.
      tp_blocks: order of the M rows. 1: as checkpoints have them. n: so that an even split into n parts gives each its
        own gate and up. With F = 4, concatenated, the rows g0 g1 g2 g3 u0 u1 u2 u3 become g0 g1 u0 u1 g2 g3 u2 u3 for
        n = 2. Static: part of the pytree's structure, not a leaf.
    """

    gate_up: Float[Array, "E M W"]
    down: Float[Array, "E W F"]
    gate_up_bias: Float[Array, "E M"] | None = None
    down_bias: Float[Array, "E W"] | None = None
    tp_blocks: int = 1


@_pytree()
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterParams:
    """Weights of the router.

    Attributes:
      gate: (E, D), or None when logits or ids are given.
      bias: (E,) float32 score correction, or None.
    """

    gate: Float[Array, "E D"] | None = None
    bias: Float32[Array, " E"] | None = None


@_pytree(static=("tp_blocks",))
@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedParams:
    """Weights of the shared expert.

    Attributes:
      gate_up: (2S, D) gated, (S, D) not.
      down: (D, S).
      gate: (1, D) sigmoid gate, or None.
      tp_blocks: as `ExpertParams.tp_blocks`.
    """

    gate_up: Float[Array, "M D"]
    down: Float[Array, "D S"]
    gate: Float[Array, "1 D"] | None = None
    tp_blocks: int = 1


@_pytree()
@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentParams:
    """Projections around the routed experts.

    Attributes:
      down: (L, D) into the latent.
      up: (D, L) out of it.
    """

    down: Float[Array, "L D"]
    up: Float[Array, "D L"]


@_pytree()
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEParams:
    """Weights of one layer. The router and the shared expert read the token (D), the experts W."""

    experts: ExpertParams
    router: RouterParams = RouterParams()
    shared: SharedParams | None = None
    latent: LatentParams | None = None


def shapes(config: MoEConfig) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
    """Name, global shape and dtype of every parameter of a layer, as checkpoints have them."""
    dtype = jnp.dtype(config.dtype)
    e, d, w, f = config.num_experts, config.hidden_size, config.expert_width, config.intermediate_size
    s, halves = config.shared_width, 2 if config.gated else 1
    table: dict[str, tuple[tuple[int, ...], jnp.dtype]] = {
        "experts.gate_up": ((e, halves * f, w), dtype),
        "experts.down": ((e, w, f), dtype),
    }
    if config.expert_bias:
        table["experts.gate_up_bias"] = ((e, halves * f), dtype)
        table["experts.down_bias"] = ((e, w), dtype)
    if config.router.source == "gate":
        table["router.gate"] = ((e, d), dtype)
    if config.router.score_correction_bias and config.router.source != "ids":
        table["router.bias"] = ((e,), jnp.dtype(jnp.float32))
    if s:
        table["shared.gate_up"] = ((halves * s, d), dtype)
        table["shared.down"] = ((d, s), dtype)
    if config.shared_gate:
        table["shared.gate"] = ((1, d), dtype)
    if config.latent_size:
        table["latent.down"] = ((config.latent_size, d), dtype)
        table["latent.up"] = ((d, config.latent_size), dtype)
    return table


def from_mapping(arrays: Mapping[str, Any]) -> MoEParams:
    """Puts arrays named as in `shapes` ("experts.gate_up", "router.gate", ...) into the pytree, uncopied.

    Args:
      arrays: in checkpoint layout; NumPy or JAX arrays (or anything else to be put in their place).

    Raises:
      ValueError: a name that is not a parameter's, or a part of the layer that is named in part.
    """
    parts: dict[str, dict[str, Any]] = {"experts": {}, "router": {}, "shared": {}, "latent": {}}
    classes = {"experts": ExpertParams, "router": RouterParams, "shared": SharedParams, "latent": LatentParams}
    for name, array in arrays.items():
        part, _, field = name.partition(".")
        known = [f.name for f in dataclasses.fields(classes[part])] if part in classes else []
        if field not in known or field == "tp_blocks":
            raise ValueError(f"parameter {name!r}: expected a name such as 'experts.gate_up' or 'router.gate'")
        parts[part][field] = array
    for part, required in (("experts", True), ("shared", bool(parts["shared"])), ("latent", bool(parts["latent"]))):
        fields = [f.name for f in dataclasses.fields(classes[part]) if f.default is dataclasses.MISSING]
        missing = [f"{part}.{name}" for name in fields if name not in parts[part]]
        if required and missing:
            raise ValueError(f"parameters: {', '.join(missing)} missing; given: {', '.join(sorted(arrays))}")
    return MoEParams(
        experts=ExpertParams(**parts["experts"]),
        router=RouterParams(**parts["router"]),
        shared=SharedParams(**parts["shared"]) if parts["shared"] else None,
        latent=LatentParams(**parts["latent"]) if parts["latent"] else None,
    )


def to_mapping(params: MoEParams) -> dict[str, Any]:
    """The arrays of the pytree by name, uncopied and in the order they have there (see `tp_blocks`)."""
    found = {}
    for part in dataclasses.fields(params):
        holder = getattr(params, part.name)
        for field in dataclasses.fields(holder) if holder is not None else ():
            value = getattr(holder, field.name)
            if field.name != "tp_blocks" and value is not None:
                found[f"{part.name}.{field.name}"] = value
    return found


def init(key: PRNGKeyArray, config: MoEConfig) -> MoEParams:
    """Draws parameters: normal, with the variance of one over a projection's input width; biases zero.

    Args:
      key: a JAX random key.
      config: the layer.

    Returns:
      The whole layer on the default device, in checkpoint layout. `shard` spreads it.

    Example:
      >>> import jax, jax_moe as jm
      >>> config = jm.MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=16)
      >>> jm.init(jax.random.key(0), config).experts.gate_up.shape
      (4, 32, 8)
    """
    table = shapes(config)
    keys = dict(zip(table, jax.random.split(key, len(table)), strict=True))
    arrays = {}
    for name, (shape, dtype) in table.items():
        if name.endswith("bias"):
            arrays[name] = jnp.zeros(shape, dtype)
        else:
            # Drawn in the final dtype: a float32 copy of the experts would be the largest array of a program's life.
            arrays[name] = jax.random.normal(keys[name], shape, dtype) * jnp.asarray(shape[-1] ** -0.5, dtype)
    return from_mapping(arrays)
