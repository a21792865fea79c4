"""The work list of the grouped kernels, against a walk over the groups."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe.kernels import tiles
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


@pytest.mark.parametrize(
    ("rows", "experts", "with_gate", "without"),
    [(8, 128, 8, 8), (512, 128, 16, 16), (2048, 128, 32, 32), (32768, 256, 144, 144), (65536, 128, 136, 128)],
)
def test_the_mean_rows_of_an_expert_and_the_product_decide_the_tile(rows, experts, with_gate, without):
    assert tiles.choose_tile(rows, experts, gated=True).tile.rows == with_gate
    assert tiles.choose_tile(rows, experts, gated=False).tile.rows == without


def test_every_tile_says_what_measurement_it_came_from():
    said = [str(tiles.choose_tile(65536, 128, gated=gated)) for gated in (True, False)]
    assert said == [
        "256 rows of weights by 136 tokens; from H200, 2026-11-28: 512 rows an expert",
        "tiles of 128 rows; from H200, 2026-11-28: 512 rows an expert",
    ]
    for _, *choices in tiles.TABLE:
        for choice in choices:
            assert re.fullmatch(r"H\d00, 2\d{3}-\d\d-\d\d: .*\d", choice.measured), choice
