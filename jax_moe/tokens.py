"""Which rows are real tokens, on every rank, from the counts alone.

Shape suffixes: t rows of x on this shard, c rows this rank routes (t, or its sequence-parallel chunk), n ranks that
route different tokens (dp, or dp * tp under sequence parallelism), in rank order.

Every rank derives the same numbers from the same counts, without asking another.

Worked example: dp = 2, tp = 2, sequence parallel, t = 3 rows per DP rank, counts [3, 1]; so c = 2, n = 4:

  real_counts   [2, 1, 1, 0]                   DP rank 0 has chunks of 2 and 1 tokens, DP rank 1 of 1 and 0
  dense_index   [[0, 1], [2, -1], [3, -1], [-1, -1]]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_moe._typing import Array, Int, Int32
from jax_moe.config import ParallelConfig


def chunk_rows(rows: int, parallel: ParallelConfig) -> int:
    """c: rows a rank routes of the t rows on its shard."""
    return -(-rows // parallel.tp) if parallel.sp and not parallel.native else rows


def num_counts(parallel: ParallelConfig) -> int:
    """Length of `counts`: one for each shard of x."""
    return parallel.world if parallel.native else parallel.dp


def has_padding(rows: int, counts: Int[Array, " n"] | None, parallel: ParallelConfig) -> bool:
    """Whether any rank may route rows that are no tokens. Static."""
    cut = parallel.sp and not parallel.native
    return counts is not None or (cut and chunk_rows(rows, parallel) * parallel.tp != rows)


def real_counts(rows: int, counts: Int[Array, " shards"] | None, parallel: ParallelConfig) -> Int32[Array, " n"]:
    """Real tokens of each rank that routes tokens of its own.

    Args:
      rows: t.
      counts: real rows of each shard of x, at its front; clipped to [0, t]. None: all.
      parallel: see `ParallelConfig`.

    Returns:
      (n,) int32; see the example on top of the module.
    """
    if counts is None:
        counts = jnp.full((num_counts(parallel),), rows, jnp.int32)
    counts = jnp.clip(counts.astype(jnp.int32), 0, rows)
    if parallel.native or not parallel.sp:
        return counts
    chunk = chunk_rows(rows, parallel)
    first = jnp.arange(parallel.tp, dtype=jnp.int32) * chunk
    return jnp.clip(counts[:, None] - first, 0, chunk).reshape(-1)


def routing_rank(parallel: ParallelConfig) -> Array | int:
    """Which of the n ranks this is; inside of the mesh."""
    return jax.lax.axis_index(parallel.mesh_axes if parallel.sp else parallel.dp_axes)


def dense_index(counts_n: Int32[Array, " n"], chunk: int) -> Int32[Array, "n c"]:
    """Number of each routed row among the real tokens of all ranks, in rank order; -1 for padding.

    Args:
      counts_n: (n,) int32, from `real_counts`.
      chunk: c.
    """
    row_c = jnp.arange(chunk, dtype=jnp.int32)
    before_n = jnp.cumsum(counts_n) - counts_n
    return jnp.where(row_c < counts_n[:, None], before_n[:, None] + row_c, -1)
