"""Which rows are tokens, on every rank, from the counts alone."""

import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe as jm
from jax_moe import tokens

from .layers import MODES, num_shards


def test_the_documented_example_holds():
    counts = tokens.real_counts(3, jnp.array([3, 1]), MODES["dp2.tp2.ep"])
    assert counts.tolist() == [2, 1, 1, 0]
    assert tokens.dense_index(counts, 2).tolist() == [[0, 1], [2, -1], [3, -1], [-1, -1]]


@pytest.mark.parametrize("parallel", MODES.values(), ids=MODES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_every_real_row_has_one_number_in_rank_order(parallel, rows):
    rng = np.random.default_rng(rows)
    counts = rng.integers(0, rows + 1, num_shards(parallel))
    chunk = tokens.chunk_rows(rows, parallel)
    index = np.asarray(tokens.dense_index(tokens.real_counts(rows, jnp.asarray(counts), parallel), chunk))
    assert index.shape == (parallel.world if parallel.sp else parallel.dp, chunk)
    assert index[index >= 0].tolist() == list(range(counts.sum()))


def test_counts_are_clipped_to_the_rows_there_are():
    assert tokens.real_counts(4, jnp.array([9, -3]), MODES["dp2"]).tolist() == [4, 0]


def test_without_counts_only_the_cut_of_sequence_parallelism_pads():
    cut, native, plain = MODES["dp2.tp2.ep"], MODES["dp2.tp2.ep.native"], jm.ParallelConfig(dp=2)
    assert tokens.has_padding(3, None, cut)
    assert not tokens.has_padding(4, None, cut)
    assert not tokens.has_padding(3, None, native)
    assert not tokens.has_padding(3, None, plain)
    assert tokens.has_padding(3, jnp.array([3, 3]), plain)
