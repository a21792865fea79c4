"""Arguments of the layer, checked before anything is launched; values only where they are at hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_moe import kernels, stages
from jax_moe.config import MoEConfig, ParallelConfig


def routing(
    config: MoEConfig, x: Any, router_logits: Any, topk_ids: Any, topk_weights: Any, *, shards: int
) -> dict[str, Any]:
    """Checks x and what was given for the router.

    Args:
      config: the layer.
      x, router_logits, topk_ids, topk_weights: as given to the layer.
      shards: the parts of equal size that their rows are split into.

    Returns:
      Those of the last three that the config uses, by name.

    Raises:
      ValueError: names the argument, what it is and what was expected.
    """
    _matrix("x", x, None, config.hidden_size)
    if x.dtype != jnp.dtype(config.dtype):
        raise ValueError(f"x is {x.dtype}: expected config.dtype = {config.dtype}")
    rows = x.shape[0]
    if rows % shards:
        raise ValueError(f"x has {rows} rows: expected a multiple of the {shards} parts they are split into")
    source = config.router.source
    needed = {"gate": (), "logits": ("router_logits",), "ids": ("topk_ids", "topk_weights")}[source]
    given = {"router_logits": router_logits, "topk_ids": topk_ids, "topk_weights": topk_weights}
    widths = {"router_logits": config.num_experts, "topk_ids": config.top_k, "topk_weights": config.top_k}
    for name, array in given.items():
        if (array is not None) != (name in needed):
            state = "missing" if array is None else "given"
            wanted = " and ".join(needed) or "none of router_logits, topk_ids, topk_weights"
            raise ValueError(f"{name} is {state}: with router source {source!r} expected {wanted}")
        if array is None:
            continue
        _matrix(name, array, rows, widths[name])
        kind = jnp.integer if name == "topk_ids" else jnp.floating
        if not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{name} is {array.dtype}: expected {kind.__name__}")
    return {name: given[name] for name in needed}


def _matrix(name: str, array: Any, rows: int | None, width: int) -> None:
    if array.ndim != 2 or array.shape[1] != width or (rows is not None and array.shape[0] != rows):
        expected = f"({'rows' if rows is None else rows}, {width})"
        raise ValueError(f"{name} has shape {tuple(array.shape)}: expected {expected}")


def counts(counts: Any, shards: int, rows: int) -> None:
    """Checks counts: one integer for each shard of x, and none past its rows where their values can be read."""
    if counts is None:
        return
    if isinstance(counts, (list, tuple)):
        counts = np.asarray(counts)
    if counts.shape != (shards,) or not jnp.issubdtype(counts.dtype, jnp.integer):
        actual = f"shape {tuple(counts.shape)} and dtype {counts.dtype}"
        raise ValueError(f"counts has {actual}: expected ({shards},) integers, one for each shard of x")
    if isinstance(counts, Tracer) or (isinstance(counts, jax.Array) and not counts.is_fully_addressable):
        return
    values = np.asarray(counts)
    if ((values < 0) | (values > rows)).any():
        raise ValueError(f"counts = {values.tolist()}: expected each in [0, {rows}], the rows of a shard of x")


def lessons(lessons: stages.Lessons | None, config: MoEConfig, *, trace: bool) -> None:
    """Checks the shapes of lessons: of one number of tokens, and as wide as the layer's stages."""
    if lessons is None:
        return
    if not trace:
        raise ValueError("lessons are given without trace: expected trace=True, which returns what stages made of them")
    rows, first = None, ""
    for name, width in stages.widths(config).items():
        array = getattr(lessons, name)
        if array is None:
            continue
        each = config.top_k if name in stages.BY_ROW else 1
        if rows is None:
            rows, first = array.shape[0] // each, name
        if tuple(array.shape) != (rows * each, width):
            expected = f"({rows * each}, {width}), as lessons.{first} is of {rows} tokens"
            raise ValueError(f"lessons.{name} has shape {tuple(array.shape)}: expected {expected}")


def axes(parallel: ParallelConfig) -> None:
    """Checks that the mesh axes of `parallel`, of the right sizes, surround the call."""
    for axis, size in parallel.axis_sizes.items():
        try:
            actual = jax.lax.axis_size(axis)
        except NameError as error:
            raise ValueError(f"moe_local: no mesh axis {axis!r} here: expected to be inside of a shard_map") from error
        if actual != size:
            source = {"node": "nodes", "local": "dp / parallel.nodes"}.get(axis, axis)
            raise ValueError(f"moe_local: mesh axis {axis!r} has size {actual}: expected parallel.{source} = {size}")


def implementation(implementation: str | None) -> None:
    """Checks that products have the named implementation, and all else what `kernels.for_rows` makes of it."""
    for operation in (each for each in kernels.OPERATIONS if each not in kernels.FUSED):
        product = operation in ("grouped_matmul", "gate_up")
        kernels.chosen(operation, implementation if product else kernels.for_rows(implementation))
