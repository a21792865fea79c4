"""The places where JAX versions differ, or where code must work with and without varying-axes types.

Inside `jax.shard_map` with `check_vma=True` each value's type lists the mesh axes it varies over, loops want their
carry to start with the type it ends with, and a replicated output must be seen to be one. With `check_vma=False` the
list is empty and everything here does nothing. `moe_local` runs in shard_maps of either kind.
"""

from __future__ import annotations

from typing import Any

import jax

AxisNames = tuple[str, ...]


def varying_axes(x: Any) -> frozenset[str]:
    """Mesh axes the type of `x` says it varies over; empty outside of shard_map or without `check_vma`."""
    aval = jax.typeof(x)
    # 0.11 moved the set into a `ManualAxisType`; both spellings are read.
    return frozenset(getattr(aval, "vma", None) or getattr(getattr(aval, "mat", None), "varying", None) or ())


def match_varying(*arrays: Any) -> tuple[Any, ...]:
    """Gives all arrays the union of their varying axes, so that they can meet in a loop or a custom_vjp."""
    union = frozenset().union(*(varying_axes(x) for x in arrays if x is not None))

    def cast(x: Any) -> Any:
        missing = union - varying_axes(x) if x is not None else ()
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return tuple(cast(x) for x in arrays)


def all_gather_replicated(x: jax.Array, axis: str) -> jax.Array:
    """All-gather along rows whose result is typed as equal on all ranks of `axis`, where types say so at all."""
    if axis not in varying_axes(x):
        return jax.lax.all_gather(x, axis, tiled=True)
    return jax.lax.all_gather(x, axis, tiled=True, to="invarying")


def settle(x: jax.Array, axes: AxisNames) -> jax.Array:
    """Makes the type of `x` say that it is equal along those of `axes` that have one rank, which it trivially is."""
    trivial = tuple(axis for axis in axes if axis in varying_axes(x) and jax.lax.axis_size(axis) == 1)
    return jax.lax.psum(x, trivial) if trivial else x


def ragged_all_to_all_works() -> bool:
    """Whether XLA's `ragged_all_to_all` on GPUs can be relied on: in one process. Between processes it is not used.

    With JAX 0.11.2 both its own kernel and its way through NCCL hang there in some programs, and what its decomposer
    makes of it loses rows of one token (docs/gpu.md has what was run).
    """
    return jax.process_count() == 1
