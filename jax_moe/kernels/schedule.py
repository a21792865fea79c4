"""Which tile of rows belongs to which expert: the work list of the grouped kernels.

Shape suffixes: R rows (a static bound), e experts on this rank, S tiles of the schedule (a static bound).

A group of rows is cut into tiles of its own, so no tile holds rows of two experts. Rows past the last group form one
more group, number e, that the kernels fill with zeros. Example: sizes [5, 0, 3], 12 rows, tiles of 4 rows:

    expert   rows        tiles
    0        [0, 5)      [0, 4), [1, 5)    the last tile of a group that has a whole tile is moved back to end with it
    1        none        none
    2        [5, 8)      [5, 8)            a group smaller than a tile: one partial tile
    3 (= e)  [8, 12)     [8, 12)           zeros

Moving a tile back recomputes a few rows, with the same operands in the same order: both tiles write the same bits.
"""

import jax
import jax.numpy as jnp
from jax import lax

# A record of the schedule, one per tile: expert, number of the first tile of its group, tiles of its group, first row
# of its group, rows of its group, tiles in the whole schedule, its tokens as bits (few_tokens alone), and an unused
# word (32 bytes, one memory sector).
FIELDS = 8


def rows_bound(num_tokens: int, top_k: int, num_local_experts: int) -> int:
    """R: the most rows these tokens can have here, their experts being distinct."""
    return num_tokens * min(top_k, num_local_experts)


def tile_bound(rows: int, experts: int, tile: int) -> int:
    """The most tiles a schedule can have: every group, and the zeros at the end, may end in a partial tile."""
    return rows // tile + min(experts + 1, rows)


def make_schedule(group_sizes_e: jax.Array, *, rows: int, tile: int) -> jax.Array:
    """The work list for `group_sizes_e`.

    Args:
      group_sizes_e: (e,) int32, rows of each expert, in order; their sum is at most `rows`.
      rows: length of the row buffer.
      tile: rows of a tile.

    Returns:
      (S * FIELDS,) int32 records, S = tile_bound(rows, e, tile). Records past the last tile repeat the last group.
    """
    (experts,) = group_sizes_e.shape
    bound = tile_bound(rows, experts, tile)
    sizes = group_sizes_e.astype(jnp.int32)
    sizes = jnp.concatenate([sizes, (rows - jnp.sum(sizes, dtype=jnp.int32))[None]])
    tiles = (sizes + (tile - 1)) // tile
    # Sums over a triangle instead of cumsum: XLA fuses them with what follows, a scan is a launch of its own.
    index = lax.iota(jnp.int32, experts + 1)
    before = index[None, :] < index[:, None]
    start = jnp.sum(jnp.where(before, sizes[None, :], 0), axis=1, dtype=jnp.int32)
    first = jnp.sum(jnp.where(before, tiles[None, :], 0), axis=1, dtype=jnp.int32)
    total = jnp.sum(tiles, dtype=jnp.int32)
    tile_index = lax.iota(jnp.int32, bound)
    group = jnp.sum((first + tiles)[None, :] <= tile_index[:, None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, experts)
    fields = jnp.stack([index, first, tiles, start, sizes, jnp.broadcast_to(total, index.shape)], axis=1)
    return jnp.pad(fields[group], ((0, 0), (0, FIELDS - fields.shape[1]))).reshape(-1)
