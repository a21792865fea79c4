"""The Triton products without a GPU: lowered for Ampere, Ada and Hopper they verify; they compute the formula,
interpreted by Pallas before they are lowered, and by NumPy after."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jax_moe.kernels import triton_grouped_matmul as triton
from jax_moe.kernels.schedule import make_schedule
from tests.jax_moe.kernels import triton_module
from tests.jax_moe.kernels.problems import ACTIVATIONS, CARDS, assert_right, card, expected, group_sizes, operands

SMALL = triton.Tile(rows=16, columns=32)


def multiply(x, w, sizes, bias, *, tile, **options):
    schedule = make_schedule(sizes, rows=x.shape[0], tile=tile.rows)
    return triton.grouped_matmul(x, w, schedule, bias=bias, tile=tile, **options)


@pytest.fixture
def interpreted(monkeypatch):
    call = pl.pallas_call

    def interpret(*args, compiler_params=None, **options):
        return call(*args, interpret=True, **options)

    monkeypatch.setattr(pl, "pallas_call", interpret)


@pytest.mark.parametrize(
    ("kind", "dtype", "activation"),
    [
        ("A100", jnp.bfloat16, None),
        ("A100", jnp.float16, "gelu"),
        ("L4", jnp.bfloat16, "interleaved"),
        ("H100", jnp.bfloat16, "swigluoai"),
        ("A100", jnp.float32, "silu"),
    ],
)
def test_products_lower_for_a_card(kind, dtype, activation):
    x, w, sizes, bias = operands([150, 0, 3], 200, 272, spare=8, bias=True, dtype=dtype)
    precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32 if dtype == jnp.float32 else None
    for _, tile in triton.TABLE:
        run = functools.partial(multiply, tile=tile, activation=ACTIVATIONS.get(activation), precision=precision)
        with card(CARDS[kind]):
            program = jax.jit(run).trace(x, w, sizes, bias).lower(lowering_platforms=("cuda",)).as_text()
        assert "moe_triton_grouped_matmul" in program if activation is None else "moe_triton_gate_up" in program


@pytest.mark.parametrize(
    ("kind", "dtype", "activation", "depth", "columns"),
    [
        ("one row", jnp.bfloat16, None, 72, 40),
        ("edges", jnp.bfloat16, "interleaved", 72, 24),
        ("edges", jnp.float16, "silu", 64, 40),
        ("edges", jnp.bfloat16, "relu2", 5, 7),  # any width will do
        ("everything in one", jnp.float32, "swigluoai", 40, 33),
        ("none", jnp.float16, "silu", 72, 40),
    ],
)
def test_the_interpreter_computes_the_formula(interpreted, kind, dtype, activation, depth, columns):
    activation = ACTIVATIONS.get(activation)
    weight_rows = columns * (2 if activation is not None and activation.gated else 1)
    x, w, sizes, bias = operands(group_sizes(kind, 16), depth, weight_rows, spare=21, bias=True, dtype=dtype)
    got = multiply(x, w, sizes, bias, tile=SMALL, activation=activation)
    assert got.dtype == dtype
    want = expected(x, w, sizes, activation=activation, bias=bias)
    if dtype == jnp.float32:  # not one rounding, but a sum of them
        got = np.asarray(got, np.float64)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        assert (got[int(sizes.sum()) :] == 0).all()
    else:
        assert_right(got, want, int(sizes.sum()))


def module_on_numpy(triton_modules, x, w, sizes, bias, activation):
    """What the programs of the module that a card would get compute."""
    tile = triton.TABLE[0][1]
    schedule = make_schedule(sizes, rows=x.shape[0], tile=tile.rows)
    run = functools.partial(triton.grouped_matmul, tile=tile, activation=activation)
    with card(CARDS["A100"]):
        out = jax.jit(run).trace(x, w, schedule, bias=bias)
        out.lower(lowering_platforms=("cuda",))
    (out,) = triton_module.run(triton_modules[-1], [schedule, x, w, bias], [out.out_info])
    return out


@pytest.mark.parametrize(
    ("sizes", "dtype", "activation", "depth", "columns"),
    [
        ([3, 0, 34, 1], jnp.bfloat16, None, 72, 136),
        ([3, 0, 34, 1], jnp.float16, "interleaved", 72, 72),
        ([17], jnp.bfloat16, "gelu", 5, 7),
        ([0, 0, 0], jnp.bfloat16, "swigluoai", 72, 40),
        ([1, 20], jnp.float32, "silu", 40, 24),
    ],
)
def test_the_module_a_card_would_get_computes_the_formula(triton_modules, sizes, dtype, activation, depth, columns):
    activation = ACTIVATIONS.get(activation)
    weight_rows = columns * (2 if activation is not None and activation.gated else 1)
    x, w, sizes, bias = operands(sizes, depth, weight_rows, spare=21, bias=True, dtype=dtype)
    got = module_on_numpy(triton_modules, x, w, sizes, bias, activation)
    want = expected(x, w, sizes, activation=activation, bias=bias)
    if dtype == jnp.float32:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    else:
        assert_right(got, want, int(sizes.sum()))


@pytest.mark.parametrize("name", ["swigluoai", "relu2"])
def test_a_row_of_nan_stays_one_where_a_card_s_minimum_would_drop_it(triton_modules, name):
    x, w, sizes, bias = operands([5], 40, 48, bias=True)
    got = module_on_numpy(triton_modules, x.at[2, 3].set(jnp.nan), w, sizes, bias, ACTIVATIONS[name])
    assert np.isnan(got.astype(np.float32)).all(axis=1).tolist() == [False, False, True, False, False]


def test_a_result_may_be_asked_for_in_float32(interpreted):
    x, w, sizes, _ = operands([20, 1], 40, 24, spare=3)
    got = multiply(x, w, sizes, None, tile=SMALL, out_dtype=jnp.float32)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected(x, w, sizes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "experts", "tile_rows"), [(8, 128, 16), (4096, 128, 32), (8192, 128, 64), (1, 1, 16)])
def test_the_mean_rows_of_an_expert_decide_the_tile(rows, experts, tile_rows):
    assert triton.choose_tile(rows, experts).rows == tile_rows
