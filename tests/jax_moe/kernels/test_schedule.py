"""The work list of the grouped kernels, against a walk over the groups."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe.kernels import mosaic_gpu_any_height as any_height
from jax_moe.kernels import tiles
from jax_moe.kernels.mosaic_gpu_pipeline import find_work
from jax_moe.kernels.schedule import FIELDS, make_schedule, tile_bound


def walked(sizes, rows, tile):
    sizes = [*sizes, rows - sum(sizes)]
    records, first, start = [], 0, 0
    for group, size in enumerate(sizes):
        count = -(-size // tile)
        records += [(group, first, count, start, size)] * count
        first, start = first + count, start + size
    return [(*record, first) for record in records]


@pytest.mark.parametrize(("tile", "spare"), [(8, 5), (64, 0), (64, 200), (128, 0), (128, 5)])
@pytest.mark.parametrize("sizes", [[5, 0, 3, 0, 300], [0, 0, 0], [1] * 40, [0, 256, 0], [128, 128], [7]])
def test_every_tile_has_its_record(sizes, tile, spare):
    rows = max(sum(sizes) + spare, 1)
    schedule = jax.jit(make_schedule, static_argnames=("rows", "tile"))
    got = np.asarray(schedule(jnp.asarray(sizes, jnp.int32), rows=rows, tile=tile)).reshape(-1, FIELDS)
    want = walked(sizes, rows, tile)
    assert len(want) <= len(got) == tile_bound(rows, len(sizes), tile)
    np.testing.assert_array_equal(got[: len(want), :6], want)


@pytest.mark.parametrize(("tile", "lower", "step"), [(144, 0, 8), (144, 2, 16), (144, 1, 24), (152, 6, 8), (64, 7, 8)])
@pytest.mark.parametrize("columns", [1, 3])
def test_the_tiles_of_a_group_share_out_its_rows_at_the_heights_there_are(tile, lower, step, columns):
    heights = [tile - step * k for k in range(lower, -1, -1)]
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(0, 700, 40), [0, 1, tile, tile + 1, 17 * tile - 3], np.asarray(heights) * 2])
    rows = int(sizes.sum()) + tile + 9
    schedule = make_schedule(jnp.asarray(sizes, jnp.int32), rows=rows, tile=tile)
    count = int(schedule[5])
    find = functools.partial(
        find_work, schedule, experts=len(sizes), tile=tile, column_tiles=columns, band=16, lower=lower, step=step
    )
    work = jax.vmap(lambda i: dataclasses.astuple(find(i)))(jnp.arange(count * columns))
    expert, row, own, column, zeros, _, kind = (np.asarray(field) for field in work)
    start = np.concatenate([[0], np.cumsum(sizes)])
    written = np.zeros((columns, rows), int)
    for e, r, n, c, z, k in zip(expert, row, own, column, zeros, kind, strict=True):
        height = heights[k]
        if z:
            assert r >= start[-1]
            assert n == min(height, rows - r)
        else:
            assert n == min(height, sizes[e])
            assert start[e] <= r
            assert r + n <= start[e + 1]
        written[c, r : r + n] += 1
    assert (written >= 1).all()
    # No more than a step of each group is multiplied twice, but where the lowest height is still too high.
    for e, size in enumerate(sizes):
        count = -(-size // tile)
        for c in range(columns):
            found = [heights[k] for k in kind[(expert == e) & ~zeros & (column == c)]]
            assert len(found) == count
            assert size <= sum(found) < max(size + (step if lower else tile), count * heights[0] + 1), (e, size)


@pytest.mark.parametrize(
    ("rows", "experts", "with_gate", "without"),
    [
        (8, 128, 8, 8),
        (512, 128, 16, 16),
        (2048, 128, 32, 32),
        (32768, 256, 144, 144),
        (32768, 128, 144, 144),
        (65536, 128, 136, 176),
        (8192, 8, 128, 176),
        (262144, 128, 128, 128),
    ],
)
def test_the_mean_rows_of_an_expert_and_the_product_decide_the_tile(rows, experts, with_gate, without):
    assert tiles.choose_tile(rows, experts, gated=True).tile.rows == with_gate
    assert tiles.choose_tile(rows, experts, gated=False).tile.rows == without


def test_groups_of_256_rows_get_several_heights():
    choice = tiles.choose_tile(32768, 128, gated=True)
    assert choice.words == "256 rows of weights by 112, 120, 128, 136 or 144 tokens"
    assert choice.run is any_height.grouped_matmul


def test_every_tile_says_what_measurement_it_came_from():
    said = [str(tiles.choose_tile(65536, 128, gated=gated)) for gated in (True, False)]
    assert said == [
        "256 rows of weights by 136 tokens; from H200, 2026-11-28: 512 rows an expert",
        "256 rows of weights by 128, 144, 160 or 176 tokens; from H100, 2026-11-28: 512 rows an expert",
    ]
    for _, *choices in tiles.TABLE:
        for choice in choices:
            assert re.fullmatch(r"H\d00, 2\d{3}-\d\d-\d\d: .*\d", choice.measured), choice
