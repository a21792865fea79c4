"""Blocks stored into peers' memory, between the GPUs of one process. Run with JAX_PLATFORMS=cuda and -m gpu."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe.kernels import choice
from jax_moe.kernels import mosaic_gpu_put as put
from tests.jax_moe.test_one_sided import mesh_of, routings, spmd, there_and_back

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not choice.runs_on_hopper() or len(jax.devices()) < 2, reason="needs two Hopper GPUs"),
]
SHAPES = [(64, 2048, jnp.bfloat16), (64, 16, jnp.float32), (1, 1, jnp.bfloat16), (7, 3, jnp.int32), (13, 1, jnp.uint8)]


def ours(*arrays):
    return put.put_blocks(arrays, axes=("dp",))


def xlas(*arrays):
    return tuple(jax.lax.all_to_all(x, "dp", 0, 0, tiled=True) for x in arrays)


def test_blocks_go_where_all_to_all_takes_them():
    mesh, rng = mesh_of((2,)), np.random.default_rng(0)
    arrays = [jnp.asarray(rng.integers(0, 250, (4 * rows, width)), dtype) for rows, width, dtype in SHAPES]
    for group in (arrays[:2], arrays[2:]):
        got, want = (jax.jit(spmd(move, mesh))(*group) for move in (ours, xlas))
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_calls_in_a_loop_do_not_race_with_ranks_out_of_step():
    mesh = mesh_of((2,))

    def run(move, x):
        me = jax.lax.axis_index("dp")

        def step(i, x):
            spin = jnp.where((i + me) % 3 == 0, (i * 37 + me * 11) % 40, 0)
            x = jax.lax.fori_loop(0, spin, lambda _, v: v * 3 + 1, x)
            return move(x)[0] * 5 + i

        return jax.lax.fori_loop(0, 300, step, x)

    for rows in (2, 256):
        x = jnp.arange(2 * rows * 512, dtype=jnp.int32).reshape(2 * rows, 512)
        got, want = (jax.jit(spmd(functools.partial(run, move), mesh))(x) for move in (ours, xlas))
        np.testing.assert_array_equal(got, want)


def test_outputs_and_gradients_are_those_of_padded():
    mesh, rows, top_k, local = mesh_of((2,)), 5, 3, 4
    runs = [jax.jit(spmd(there_and_back(name, ("dp",), local), mesh)) for name in ("one_sided", "padded")]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * rows, 40)).astype(np.float32)
    weights = rng.random((2 * rows, top_k)).astype(np.float32)
    for ids in routings(2, rows, top_k, local).values():
        (made, (dx, dweights)), (want_made, (want_dx, want_dweights)) = (
            run(x, ids.astype(np.int32), weights) for run in runs
        )
        jax.tree.map(np.testing.assert_array_equal, (made, dweights), (want_made, want_dweights))
        # A sum of three products: XLA fuses other ones into a multiply-add, beside a kernel and beside a collective.
        assert np.abs(dx - want_dx).max() <= 3 * 2.0**-23 * np.abs(want_dx).max()
