"""On a Hopper GPU: a row's product, and a token's part in the other kernels, whatever else is in the batch.

Run with JAX_PLATFORMS=cuda and -m gpu. What holds here is what `parity list --determinism` promises of the kernels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import kernels
from jax_moe.kernels import choice
from jax_moe.kernels.triton_routing import make_schedule
from tests.jax_moe.kernels.problems import SILU
from tests.jax_moe.kernels.test_gpu import TILES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not choice.runs_on_hopper(), reason="needs a GPU of compute capability 9.0"),
]

DEPTH, WEIGHT_ROWS, EXPERTS, WATCHED = 200, 272, 3, 4
ACTIVATIONS = {"plain": None, "gated": SILU}


def batch(sizes, places, rows, seed):
    """(rows, DEPTH) in which row `places[e][i]` of expert e's group is always the same; others depend on `seed`.

    Returns:
      The rows, and (EXPERTS * WATCHED,) where the watched ones lie.
    """
    same = np.random.default_rng(0).standard_normal((EXPERTS * WATCHED, DEPTH))
    x = np.random.default_rng(seed).standard_normal((rows, DEPTH))
    starts = np.cumsum([0, *sizes[:-1]])
    at = np.concatenate([start + np.array(own) for start, own in zip(starts, places, strict=True)])
    x[at] = same
    return jnp.asarray(x, jnp.bfloat16), at


def batches(tile):
    """Sizes and places of the watched rows: in the middle and at the ends of tiles, first alone, then in company."""
    one, two = [tile + 5, 9, 3 * tile], [WATCHED, 2 * tile + 3, tile + 1]
    return {
        "as they were": (one, [[0, 3, tile - 1, tile + 4], [0, 2, 5, 8], [1, tile, tile + 1, 3 * tile - 1]], 1),
        "other numbers": (one, [[0, 3, tile - 1, tile + 4], [0, 2, 5, 8], [1, tile, tile + 1, 3 * tile - 1]], 2),
        "moved": (two, [[3, 1, 2, 0], [tile, 7, 2 * tile + 2, 1], [tile, 0, 4, 2]], 3),
    }


def product(name, activation, x, sizes):
    """The compiled product of one tile, as bits."""
    kernel, tile = TILES[name]
    w = jnp.asarray(np.random.default_rng(9).standard_normal((EXPERTS, WEIGHT_ROWS, DEPTH)) / 14, jnp.bfloat16)

    @functools.partial(jax.jit, static_argnames="rows")
    def run(x, w, sizes, rows):
        schedule = make_schedule(sizes, rows=rows, tile=tile.rows)
        return kernel.grouped_matmul(x, w, schedule, activation=activation, tile=tile)

    return np.asarray(run(x, w, jnp.asarray(sizes, jnp.int32), rows=x.shape[0])).view(np.uint16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", TILES)
def test_a_row_s_product_is_its_own(name, activation):
    tile, results = TILES[name][1].rows, {}
    for what, (sizes, places, seed) in batches(tile).items():
        for rows in (8 * tile, 9 * tile + 8):  # another buffer, the same tile
            x, at = batch(sizes, places, rows, seed)
            results[what, rows] = product(name, ACTIVATIONS[activation], x, sizes)[at]
    first = next(iter(results.values()))
    differ = {key: int((bits != first).any(axis=1).sum()) for key, bits in results.items()}
    assert not any(differ.values()), differ


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tiles_agree_to_a_rounding_and_it_is_shown_where_bit_for_bit(activation, record_property):
    """Not promised: with few rows the operands change sides. What the card does is recorded beside."""
    sizes, places, seed = batches(16)["as they were"]
    x, at = batch(sizes, places, 256, seed)
    results = {name: product(name, ACTIVATIONS[activation], x, sizes)[at] for name in TILES}
    first = results["128 rows"]
    for name, bits in results.items():
        share = float((bits == first).mean())
        record_property(f"{name}: elements equal to those of 128 rows", share)
        print(f"{activation}: {name}: {share:.4f} of elements have the bits of tiles of 128 rows")
        mine, theirs = (v.view(jnp.bfloat16).astype(np.float32) for v in (bits, first))
        np.testing.assert_allclose(mine, theirs, rtol=2.0**-6, atol=2.0**-9)


def test_a_token_is_routed_gathered_and_combined_alone():
    rng = np.random.default_rng(0)
    tokens, experts, top_k, width = 70, 40, 4, 328
    logits = jnp.asarray(rng.standard_normal((tokens, experts)), jnp.float32)
    y = jnp.asarray(rng.standard_normal((tokens * top_k, width)), jnp.bfloat16)
    choose = functools.partial(
        kernels.choose_experts, top_k=top_k, scoring="softmax", renormalize=True, scaling=1.0, implementation="triton"
    )
    ids, weights = choose(logits, None)
    position = jnp.asarray(rng.permutation(tokens * top_k).reshape(tokens, top_k), jnp.int32)
    combined = kernels.combine_rows(y, position, weights, implementation="triton")
    for kept in (np.arange(3), rng.permutation(tokens)):
        some_ids, some_weights = choose(logits[kept], None)
        np.testing.assert_array_equal(some_ids, ids[kept])
        np.testing.assert_array_equal(
            np.asarray(some_weights).view(np.uint32), np.asarray(weights[kept]).view(np.uint32)
        )
        order = rng.permutation(tokens * top_k)  # the rows lie elsewhere
        places = jnp.asarray(np.argsort(order), jnp.int32)[position[kept]]
        some = kernels.combine_rows(y[order], places, weights[kept], implementation="triton")
        np.testing.assert_array_equal(np.asarray(some).view(np.uint32), np.asarray(combined[kept]).view(np.uint32))
