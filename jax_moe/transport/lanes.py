"""How the rows of a send buffer reach the other ranks of a hop, and how answers come back the same way.

Shape suffixes: N ranks of the hop, S rows of the send buffer, R rows of the receive buffer.

A lane is a pair of maps over the ranks, `there` (S, ...) to (R, ...) and `back` (R, ...) to (S, ...), each the
transpose of the other, so that each is the other's gradient. `Slots` exchanges equal blocks, `Segments` exactly as many
rows as there are, `Puts` the equal blocks of `Slots` by a kernel of this package. All take trees of arrays. Without
axes the hop is within one rank: the same code, and nothing crosses.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_moe._compat import match_varying, ragged_all_to_all_works
from jax_moe._typing import Array, Int32

Axes = tuple[str, ...]

PIECES = 256
"""In how many a segment is cut for XLA's `ragged_all_to_all`, whose kernel has one block of 128 threads for each."""
KERNEL_RANKS = 8
"""The most ranks that XLA has that kernel for; among more it sends each piece by NCCL."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Slots:
    """S = R = N * C: rows [d * C, (d + 1) * C) go to rank d, and those of rank s land at [s * C, (s + 1) * C)."""

    axes: Axes

    def there(self, tree: Any) -> Any:
        """(N * C, ...) to (N * C, ...)."""
        if not self.axes:
            return tree
        return jax.tree.map(lambda rows: jax.lax.all_to_all(rows, self.axes, 0, 0, tiled=True), tree)

    # Blocks go back where they came from.
    back = there


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Puts:
    """As `Slots`, moved by ranks that store into each other's memory: one kernel for all arrays of a tree."""

    axes: Axes

    def there(self, tree: Any) -> Any:
        """(N * C, ...) to (N * C, ...)."""
        leaves, treedef = jax.tree.flatten(tree)
        return jax.tree.unflatten(treedef, _put(self.axes, tuple(leaves)) if self.axes else leaves)

    back = there


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _put(axes: Axes, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """Equal blocks to all ranks. Each came from where it would go, so the exchange is its own gradient."""

    @jax.custom_batching.custom_vmap
    def run(*arrays: Array) -> tuple[Array, ...]:
        from jax_moe.kernels import mosaic_gpu_put

        moving = [x for x in arrays if x.size]
        moved = iter(mosaic_gpu_put.put_blocks(tuple(moving), axes=axes) if moving else ())
        return tuple(next(moved) if x.size else x for x in arrays)

    @run.def_vmap
    def batched(size: int, is_batched: list[bool], *arrays: Array) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        # A batch is one more dimension of each row.
        pairs = zip(arrays, is_batched, strict=True)
        rows = [jnp.moveaxis(x, 0, 1) if many else jnp.stack([x] * size, 1) for x, many in pairs]
        return tuple(jnp.moveaxis(y, 1, 0) for y in run(*rows)), (True,) * len(arrays)

    return tuple(run(*arrays))


def _put_forward(axes: Axes, arrays: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
    return _put(axes, arrays), None


def _put_backward(axes: Axes, _: None, gradients: tuple[Array, ...]) -> tuple[tuple[Array, ...]]:
    moving = [i for i, g in enumerate(gradients) if g.dtype != jax.dtypes.float0]
    back = list(gradients)
    for i, g in zip(moving, _put(axes, tuple(gradients[i] for i in moving)), strict=True):
        back[i] = g
    return (tuple(back),)


_put.defvjp(_put_forward, _put_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """The segments of this rank's buffer at one end of a lane, one for each peer. All int32.

    Attributes:
      first_N: (N,) where the segment shared with each peer begins here.
      size_N: (N,) its rows.
      peer_first_N: (N,) where it begins in the peer's buffer. The sender must know: `ragged_all_to_all` writes there.
    """

    first_N: Int32[Array, " N"]
    size_N: Int32[Array, " N"]
    peer_first_N: Int32[Array, " N"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sending", "receiving"],
    meta_fields=["axes", "send", "receive", "pair"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Segments:
    """Exact sizes. Both ends are derived from the sizes of all ranks, so nothing is asked twice.

    Worked example: N = 2, and sizes_NN = [[2, 1], [3, 0]]: rank 0 sends 2 rows to itself and 1 to rank 1, rank 1 sends
    3 rows to rank 0. Rank 0's receive buffer has its own 2 rows and then the 3. On rank 1:

      sending     first [0, 3]  size [3, 0]  peer_first [2, 1]    to rank 0 at row 2; to itself nothing, at row 1
      receiving   first [0, 1]  size [1, 0]  peer_first [2, 3]    from rank 0 one row, which lies in row 2 over there

    Attributes:
      sending, receiving: the two ends.
      axes: mesh axes of the hop.
      send, receive: S and R.
      pair: the most rows from one rank to another.
    """

    sending: End
    receiving: End
    axes: Axes
    send: int
    receive: int
    pair: int

    def there(self, tree: Any) -> Any:
        """(S, ...) to (R, ...), zeros past the last."""
        return jax.tree.map(lambda rows: self._move(rows, self.sending, self.receiving, self.receive), tree)

    def back(self, tree: Any) -> Any:
        """(R, ...) to (S, ...), zeros in places that were not sent."""
        return jax.tree.map(lambda rows: self._move(rows, self.receiving, self.sending, self.send), tree)

    def _move(self, rows: Array, out: End, into: End, num_rows: int) -> Array:
        if not jnp.issubdtype(rows.dtype, jnp.floating):
            return _exchange(rows, out, into, num_rows, self.axes, self.pair)
        before = rows.shape[0]

        # JAX's own gradient would ask the peers for offsets that are known here.
        @jax.custom_vjp
        def run(rows: Array, out: End, into: End) -> Array:
            return _exchange(rows, out, into, num_rows, self.axes, self.pair)

        def backward(ends: tuple[End, End], g: Array) -> tuple[Array, None, None]:
            return _exchange(g, ends[1], ends[0], before, self.axes, self.pair), None, None

        run.defvjp(lambda rows, out, into: (run(rows, out, into), (out, into)), backward)
        rows, *ends = match_varying(rows, *jax.tree.leaves((out, into)))
        out, into = jax.tree.unflatten(jax.tree.structure((out, into)), ends)
        return run(rows, out, into)


def segments(
    sizes_N: Int32[Array, " N"], axes: Axes, *, send: int, receive: int, pair: int
) -> tuple[Segments, Int32[Array, ""]]:
    """The lane for these sizes: one all-gather of N numbers, and arithmetic.

    Args:
      sizes_N: (N,) rows this rank has for each rank, in order of rank in its send buffer.
      axes: mesh axes of the hop; none: this rank alone.
      send, receive, pair: see `Segments`. A rank accepts the first `receive` rows in order of source; of the others
        nothing is sent.

    Returns:
      The lane, and the number of rows that were not accepted here.
    """
    if axes:
        sizes_NN = jax.lax.all_gather(sizes_N, axes)
        me = jax.lax.axis_index(axes)
    else:
        sizes_NN, me = sizes_N[None], 0
    # [s, d]: where the segment from s to d begins at s, where at d, and how much of it is accepted.
    first_NN = jnp.cumsum(sizes_NN, axis=1) - sizes_NN
    lands_NN = jnp.minimum(jnp.cumsum(sizes_NN, axis=0) - sizes_NN, receive)
    accepted_NN = jnp.minimum(sizes_NN, receive - lands_NN)
    lane = Segments(
        sending=End(first_N=first_NN[me], size_N=accepted_NN[me], peer_first_N=lands_NN[me]),
        receiving=End(first_N=lands_NN[:, me], size_N=accepted_NN[:, me], peer_first_N=first_NN[:, me]),
        axes=axes,
        send=send,
        receive=receive,
        pair=pair,
    )
    return lane, jnp.sum(sizes_NN[:, me] - accepted_NN[:, me])


def _exchange(rows: Array, out: End, into: End, num_rows: int, axes: Axes, pair: int) -> Array:
    """Sends segment d of `rows` to rank d, and returns (num_rows, ...) with what came, zeros elsewhere."""
    if rows.shape[0] == 0 or num_rows == 0:
        return jnp.zeros((num_rows, *rows.shape[1:]), rows.dtype)
    zeros = jnp.zeros((num_rows, *rows.shape[1:]), rows.dtype)
    rows, zeros, *ends = match_varying(rows, zeros, *jax.tree.leaves((out, into)))
    if not axes or not ragged_all_to_all_works():
        return _by_blocks(rows, zeros, *ends, axes=axes, pair=pair)
    xlas = functools.partial(_ragged_all_to_all, axes=axes)
    return jax.lax.platform_dependent(
        rows,
        zeros,
        *ends,
        cpu=functools.partial(_by_blocks, axes=axes, pair=pair),
        cuda=functools.partial(xlas, pieces=min(pair, PIECES) if out.size_N.shape[0] <= KERNEL_RANKS else 1),
        default=functools.partial(xlas, pieces=1),
    )


def _ragged_all_to_all(
    rows: Array,
    zeros: Array,
    first: Array,
    size: Array,
    peer_first: Array,
    into_first: Array,
    into_size: Array,
    into_peer_first: Array,
    *,
    axes: Axes,
    pieces: int,
) -> Array:
    """XLA's own. Its offsets are the sender's: where a segment begins here, and where in the receiver's buffer."""
    cut = functools.partial(_cut, pieces=pieces)
    starts, sizes = cut(size)
    ends = [(end[:, None] + starts).reshape(-1) for end in (first, peer_first)]
    sizes, into_sizes = sizes.reshape(-1), cut(into_size)[1].reshape(-1)
    return jax.lax.ragged_all_to_all(rows, zeros, ends[0], sizes, ends[1], into_sizes, axis_name=axes)


def _cut(size_N: Array, pieces: int) -> tuple[Array, Array]:
    """Segments in equal pieces but for the last: where in its segment each begins, and its rows, (N, pieces)."""
    length_N = -(-size_N // pieces)
    starts = jnp.minimum(length_N[:, None] * jnp.arange(pieces, dtype=size_N.dtype), size_N[:, None])
    return starts, jnp.minimum(length_N[:, None], size_N[:, None] - starts)


def _by_blocks(
    rows: Array,
    zeros: Array,
    first: Array,
    size: Array,
    peer_first: Array,
    into_first: Array,
    into_size: Array,
    into_peer_first: Array,
    *,
    axes: Axes,
    pair: int,
) -> Array:
    """The same without XLA's (on CPU, between processes): segments travel in equal blocks of `pair` rows."""
    ranks = first.shape[0]
    step = jnp.arange(pair, dtype=jnp.int32)
    source = jnp.where(step < size[:, None], first[:, None] + step, rows.shape[0]).reshape(-1)
    blocks: Any = rows.at[source].get(mode="fill", fill_value=0)
    if axes:
        blocks = jax.lax.all_to_all(blocks, axes, 0, 0, tiled=True)
    target = jnp.where(step < into_size[:, None], into_first[:, None] + step, zeros.shape[0]).reshape(ranks * pair)
    return zeros.at[target].set(blocks, mode="drop", unique_indices=False)
