"""Which copies of its rows a rank sends where: index arithmetic, and moving rows by it within the rank.

Shape suffixes: n rows on this rank, K experts per token, N ranks of the hop, m = min(K, N) the most ranks a row goes
to, S places in the send buffer.

A row goes once to each rank that owns any of its experts. Worked example: n = 3, K = 3, N = 2, owner N = 2 for none:

  owner_nK    [[1, 1, 0], [1, 2, 1], [0, 0, 0]]
  target_nm   [[0, 1], [1, 2], [0, 2]]           ranks of each row, ascending; N past the last
  rank_nm     [[0, 0], [1, .], [1, .]]           row 0 is the first to both ranks, rows 1 and 2 are the second
  sizes_N     [2, 2]
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_moe import kernels
from jax_moe._compat import match_varying
from jax_moe._typing import Array, Float32, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """See the example on top of the module. All int32.

    Attributes:
      target_nm: (n, m) ranks each row goes to, ascending, N past the last.
      rank_nm: (n, m) how many earlier rows go to the same rank.
      sizes_N: (N,) copies for each rank.
    """

    target_nm: Int32[Array, "n m"]
    rank_nm: Int32[Array, "n m"]
    sizes_N: Int32[Array, " N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Copies:
    """Where the copies lie in the send buffer; two views of one relation. All int32.

    Attributes:
      row_S: (S,) the row in each place, -1 for an empty one.
      place_nm: (n, m) places of each row's copies, by ascending rank, -1 for none.
    """

    row_S: Int32[Array, " S"]
    place_nm: Int32[Array, "n m"]


def find_targets(owner_nK: Int32[Array, "n K"], ranks: int) -> Targets:
    """The ranks each row goes to.

    Args:
      owner_nK: (n, K) rank of each expert, `ranks` for none.
      ranks: N.
    """
    owner_nK = jnp.sort(owner_nK, axis=1)
    again_nK = jnp.pad(owner_nK[:, 1:] == owner_nK[:, :-1], ((0, 0), (1, 0)))
    target_nm = jnp.sort(jnp.where(again_nK, ranks, owner_nK), axis=1)[:, : min(owner_nK.shape[1], ranks)]
    goes_nN = (target_nm[:, :, None] == jnp.arange(ranks, dtype=jnp.int32)).any(1).astype(jnp.int32)
    before_nN = jnp.cumsum(goes_nN, axis=0) - goes_nN
    rank_nm = jnp.take_along_axis(before_nN, jnp.minimum(target_nm, ranks - 1), axis=1)
    return Targets(target_nm=target_nm, rank_nm=rank_nm, sizes_N=jnp.sum(goes_nN, axis=0, dtype=jnp.int32))


def lay_out(targets: Targets, first_N: Int32[Array, " N"], room_N: Int32[Array, " N"], places: int) -> Copies:
    """Gives copies their places: those to rank d lie one after the other from first_N[d] on, room_N[d] of them at most.

    Args:
      targets: from `find_targets`.
      first_N, room_N: (N,).
      places: S.
    """
    n, m = targets.target_nm.shape
    target_nm = jnp.minimum(targets.target_nm, first_N.shape[0] - 1)
    has_place_nm = (targets.target_nm < first_N.shape[0]) & (targets.rank_nm < room_N[target_nm])
    place_nm = jnp.where(has_place_nm, first_N[target_nm] + targets.rank_nm, -1)
    row_nm = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[:, None], (n, m))
    # Out of range is dropped; -1 would be the last place.
    row_S = jnp.full((places,), -1, jnp.int32).at[jnp.where(has_place_nm, place_nm, places)].set(row_nm, mode="drop")
    return Copies(row_S=row_S, place_nm=place_nm)


def spread(tree: Any, copies: Copies, implementation: str | None = None) -> Any:
    """The send buffer of each array (n, ...) of a pytree: (S, ...), zeros in empty places.

    The gradient sums a row's copies in order of rank, in float32: the same bits each time.
    """
    return jax.tree.map(lambda x: _spread(x, copies, implementation), tree)


def collect(tree: Any, copies: Copies, implementation: str | None = None) -> Any:
    """Sums what came back for each row, in order of rank and in float32: (S, W) to (n, W), each array of a pytree."""
    return jax.tree.map(lambda y: _collect(y, copies, implementation), tree)


def _gather(x: Array, row_S: Array, implementation: str | None) -> Array:
    if x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.floating):
        return kernels.gather_rows(x, row_S, implementation=implementation)
    return x.at[jnp.where(row_S < 0, x.shape[0], row_S)].get(mode="fill", fill_value=0)


def _sum(y_SW: Array, place_nm: Array, implementation: str | None) -> Float32[Array, "n W"]:
    ones_nm = jnp.ones(place_nm.shape, jnp.float32)
    return kernels.combine_rows(y_SW, place_nm, ones_nm, implementation=implementation)


def _spread(x: Array, copies: Copies, implementation: str | None) -> Array:
    x, row_S, place_nm = match_varying(x, copies.row_S, copies.place_nm)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return _gather(x, row_S, implementation)
    shape, dtype = x.shape, x.dtype

    @jax.custom_vjp
    def run(x: Array, row_S: Array, place_nm: Array) -> Array:
        return _gather(x, row_S, implementation)

    def backward(indices: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
        flat = g.reshape(g.shape[0], -1)
        return _sum(flat, indices[1], implementation).reshape(shape).astype(dtype), None, None

    run.defvjp(lambda x, row_S, place_nm: (run(x, row_S, place_nm), (row_S, place_nm)), backward)
    return run(x, row_S, place_nm)


def _collect(y_SW: Array, copies: Copies, implementation: str | None) -> Float32[Array, "n W"]:
    y_SW, row_S, place_nm = match_varying(y_SW, copies.row_S, copies.place_nm)
    dtype = y_SW.dtype

    @jax.custom_vjp
    def run(y_SW: Array, row_S: Array, place_nm: Array) -> Array:
        return _sum(y_SW, place_nm, implementation)

    def backward(row_S: Array, g_nW: Array) -> tuple[Array, None, None]:
        return _gather(g_nW, row_S, implementation).astype(dtype), None, None

    run.defvjp(lambda y_SW, row_S, place_nm: (run(y_SW, row_S, place_nm), row_S), backward)
    return run(y_SW, row_S, place_nm)
