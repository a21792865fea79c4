"""The Hopper kernels without a GPU: they lower for CUDA, and the GPU interpreter computes the float64 formula."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_moe.kernels import mosaic_gpu_any_height as any_height
from jax_moe.kernels import mosaic_gpu_grouped_matmul as wide
from jax_moe.kernels import mosaic_gpu_small_groups as small
from jax_moe.kernels.schedule import make_schedule
from tests.jax_moe.kernels.problems import ACTIVATIONS, assert_right, expected, operands

needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="the GPU interpreter of this JAX cannot transpose references; that of 0.11 can",
)


SEVERAL = any_height.Tile(rows=40, lower=2, step=8, stages=2)
THAT_GATHER = {
    "128 rows": (wide, wide.Tile()),
    "136 rows": (any_height, any_height.Tile(rows=136)),
    "112, 128 and 144 rows": (any_height, any_height.Tile(rows=144, lower=2)),
    "144 rows, by two stages": (any_height, any_height.Tile(rows=144, together=2)),
}
TILES = THAT_GATHER | {"small groups": (small, small.Tile(rows=16))}


def multiply(kernel, tile, x, w, sizes, bias, index=None, *, activation=None, interpret=None):
    schedule = make_schedule(sizes, rows=len(x if index is None else index), tile=tile.rows)
    more = {} if index is None else {"index_R": index}
    options = {"activation": activation, "bias": bias, "tile": tile, "interpret": interpret}
    return kernel.grouped_matmul(x, w, schedule, **options, **more)


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [*((name, jnp.bfloat16) for name in (None, "silu", "interleaved", "relu2")), ("silu", jnp.float16)],
)
@pytest.mark.parametrize(("kernel", "tile"), TILES.values(), ids=TILES)
def test_kernels_lower_for_cuda(kernel, tile, activation, dtype):
    # 8 times odd: edges of every kind, in rows, columns and depth.
    x, w, sizes, bias = operands([150, 0, 3], 200, 272, spare=8, bias=True, dtype=dtype)
    run = functools.partial(multiply, kernel, tile, activation=activation and ACTIVATIONS[activation])
    program = jax.jit(run).trace(x, w, sizes, bias).lower(lowering_platforms=("cuda",)).as_text()
    suffix = {small: "_small", any_height: "_any_height"}.get(kernel, "")
    name = ("moe_grouped_matmul" if activation is None else "moe_gate_up") + suffix
    assert set(re.findall(r"moe_(?:gate_up|grouped_matmul)(?:_small|_any_height|_ahead)*", program)) == {name}
    assert "mosaic_gpu" in program


@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize(("kernel", "tile"), THAT_GATHER.values(), ids=THAT_GATHER)
def test_kernels_that_gather_ahead_lower_for_cuda(kernel, tile, activation):
    x, w, sizes, bias = operands([150, 0, 3], 200, 272, spare=8, bias=True)
    run = functools.partial(multiply, kernel, tile, activation=ACTIVATIONS[activation])
    traced = jax.jit(run).trace(x, w, sizes, bias, jnp.zeros((161,), jnp.int32))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Copied by the warps that do not load, and at first by those that multiply; awaited by the one that loads.
    assert program.count("red.release.gpu.global.add.u32") == 2
    assert program.count("ld.acquire.gpu.global.b32") == 1


@needs_interpreter
@pytest.mark.parametrize(
    ("kernel", "tile", "sizes", "activation"),
    [
        (wide, wide.Tile(stages=2), [130, 0, 40], "silu"),
        (any_height, any_height.Tile(rows=24, stages=2), [25, 0, 10], "swigluoai"),
        (any_height, SEVERAL, [1, 41, 0, 49], "relu2"),
        (any_height, any_height.Tile(rows=24, together=2), [25, 0, 10], "relu2"),
    ],
    ids=["128 rows", "24 rows", "24, 32 and 40 rows", "24 rows, by two stages"],
)
def test_gathering_ahead_is_the_product_of_the_gathered_rows(kernel, tile, sizes, activation):
    x, w, sizes, bias = operands(sizes, 72, 272, spare=6, bias=True)
    total, x = int(sizes.sum()), jnp.nan_to_num(x[:20])
    order = np.random.default_rng(0).integers(0, 20, total + 6)
    order[3], order[8] = -1, 20  # no tokens: zeros
    gathered = jnp.where((order[:, None] >= 0) & (order[:, None] < 20), x[np.clip(order, 0, 19)], 0)
    index = jnp.asarray(np.where(np.arange(total + 6) < total, order, -1), jnp.int32)
    activation = ACTIVATIONS[activation]
    got = multiply(kernel, tile, x, w, sizes, bias, index, activation=activation, interpret=plgpu.InterpretGPUParams())
    assert_right(got, expected(gathered, w, sizes, activation=activation, bias=bias), total)


@needs_interpreter
@pytest.mark.parametrize(
    ("kernel", "tile", "sizes", "depth", "weight_rows", "activation", "bias", "dtype"),
    [
        (wide, wide.Tile(stages=2), [130, 0, 40], 72, 264, None, False, jnp.float16),
        (wide, wide.Tile(stages=2), [129, 5], 72, 272, "interleaved", True, jnp.bfloat16),
        (wide, wide.Tile(stages=2), [129, 1], 72, 272, "swigluoai", False, jnp.bfloat16),
        (any_height, any_height.Tile(rows=24, stages=2), [25, 0, 10], 72, 272, "swigluoai", True, jnp.bfloat16),
        (any_height, any_height.Tile(rows=16, stages=2), [3, 17], 136, 264, None, True, jnp.float16),
        (any_height, any_height.Tile(rows=40), [83, 1], 584, 144, "silu", False, jnp.bfloat16),
        (any_height, any_height.Tile(rows=16, together=2), [3, 17], 584, 144, "silu", True, jnp.bfloat16),
        (any_height, any_height.Tile(rows=16, together=2), [3, 0, 17], 136, 264, None, True, jnp.bfloat16),
        (any_height, SEVERAL, [1, 23, 24, 25, 0, 40, 41, 47, 49, 60, 100], 72, 272, "silu", True, jnp.bfloat16),
        (any_height, SEVERAL, [7, 9, 39, 80], 72, 264, None, False, jnp.bfloat16),
        (small, small.Tile(rows=8), [9, 0, 1], 136, 144, "silu", True, jnp.float16),
    ],
    ids=[
        "128 rows",
        "128 rows, gated",
        "128 rows, with limits",
        "24 rows",
        "16 rows",
        "40 rows",
        "16 rows, by two stages",
        "16 rows, by two stages, and one",
        *["24, 32 and 40 rows"] * 2,
        "small groups",
    ],
)
def test_the_interpreter_computes_the_formula(kernel, tile, sizes, depth, weight_rows, activation, bias, dtype):
    x, w, sizes, bias = operands(sizes, depth, weight_rows, spare=6, bias=bias, dtype=dtype)
    total = int(sizes.sum())
    if x.shape[0] < tile.rows:
        x = jnp.pad(x, ((0, tile.rows - x.shape[0]), (0, 0)))
    activation = activation and ACTIVATIONS[activation]
    got = multiply(kernel, tile, x, w, sizes, bias, activation=activation, interpret=plgpu.InterpretGPUParams())
    assert got.dtype == dtype
    assert_right(got, expected(x, w, sizes, activation=activation, bias=bias), total)
