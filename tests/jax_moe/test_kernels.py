"""Operations on sorted rows: the reference against formulas in float64, gradients included, and the choice among
implementations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import kernels
from jax_moe.activation import Activation, apply
from jax_moe.kernels import choice, reference

SIZES = {
    "one group": [7],
    "empty groups": [8, 0, 8, 0],
    "none at all": [0, 0, 0],
    "fewer rows than the buffer": [3, 2, 0],
    "first empty": [0, 9, 1],
    "one large": [1, 60, 2, 1],
}


def problem(sizes, spare=3, depth=6, width=5, dtype=np.float32, seed=0):
    """x with NaN past the last row, weights, sizes, biases."""
    rng = np.random.default_rng(seed)
    rows = sum(sizes)
    x = rng.standard_normal((rows + spare, depth))
    x[rows:] = np.nan
    w, bias = rng.standard_normal((len(sizes), width, depth)), rng.standard_normal((len(sizes), width))
    x, w, bias = (jnp.asarray(a, dtype) for a in (x, w, bias))
    return x, w, jnp.asarray(sizes, jnp.int32), bias


def expected(x, w, sizes, bias=None):
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    y, start = np.zeros((len(x), w.shape[1])), 0
    for group, size in enumerate(np.asarray(sizes)):
        y[start : start + size] = x[start : start + size] @ w[group].T
        if bias is not None:
            y[start : start + size] += np.asarray(bias, np.float64)[group]
        start += size
    return y


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_grouped_matmul_multiplies_each_row_by_its_group_and_zeroes_the_rest(sizes, with_bias):
    x, w, group_sizes, bias = problem(sizes)
    bias = bias if with_bias else None
    y = kernels.grouped_matmul(x, w, group_sizes, bias_eN=bias)
    np.testing.assert_allclose(y, expected(x, w, group_sizes, bias), rtol=1e-5, atol=1e-5)
    assert not np.asarray(y)[sum(sizes) :].any()


def test_grouped_matmul_accumulates_bfloat16_in_float32_and_rounds_once():
    x, w, group_sizes, bias = problem([5, 0, 9], depth=64, dtype=jnp.bfloat16)
    y = kernels.grouped_matmul(x, w, group_sizes, bias_eN=bias, out_dtype=jnp.float32)
    exact = expected(x, w, group_sizes, bias)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    rounded = kernels.grouped_matmul(x, w, group_sizes, bias_eN=bias)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, y.astype(jnp.bfloat16))


def test_grouped_matmul_of_no_rows_and_of_a_full_buffer():
    x, w, group_sizes, _ = problem([0, 0], spare=0)
    assert kernels.grouped_matmul(x, w, group_sizes).shape == (0, 5)
    x, w, group_sizes, _ = problem([4, 3], spare=0)
    np.testing.assert_allclose(kernels.grouped_matmul(x, w, group_sizes), expected(x, w, group_sizes), atol=1e-5)


@pytest.mark.parametrize("rows_in_group", [1, 7, 8, 9, 64, 65])
def test_group_ends_may_lie_anywhere_in_a_block(rows_in_group):
    x, w, group_sizes, _ = problem([3, rows_in_group, 2])
    np.testing.assert_allclose(kernels.grouped_matmul(x, w, group_sizes), expected(x, w, group_sizes), atol=2e-5)


def test_gradients_of_grouped_matmul_are_those_of_the_dense_formula():
    sizes = [4, 0, 5]
    x, w, group_sizes, bias = problem(sizes)
    group_of_row = np.repeat(np.arange(3), sizes)
    rows = len(group_of_row)
    weigh = jnp.asarray(np.random.default_rng(1).standard_normal((len(x), 5)), jnp.float32)

    def ours(x, w, bias):
        return jnp.sum(kernels.grouped_matmul(x, w, group_sizes, bias_eN=bias) ** 2 * weigh)

    def formula(x, w, bias):
        y = jnp.einsum("rd,rnd->rn", x[:rows], w[group_of_row]) + bias[group_of_row]
        return jnp.sum(y**2 * weigh[:rows])

    for actual, wanted in zip(
        jax.grad(ours, (0, 1, 2))(x, w, bias), jax.grad(formula, (0, 1, 2))(x, w, bias), strict=True
    ):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_gate_up_is_the_product_then_the_activation_rounded_to_the_rows(layout):
    x, w, group_sizes, bias = problem([4, 0, 5], width=8, dtype=jnp.bfloat16)
    activation = Activation(name="swigluoai", layout=layout)
    h = kernels.gate_up(x, w, group_sizes, activation=activation, bias_eM=bias)
    assert (h.shape, h.dtype) == ((12, 4), jnp.bfloat16)
    pre = kernels.grouped_matmul(x, w, group_sizes, bias_eN=bias, out_dtype=jnp.float32)
    np.testing.assert_array_equal(h, apply(pre, activation).astype(jnp.bfloat16))
    assert not np.asarray(h, np.float32)[9:].any()


def test_gather_rows_copies_exactly_and_fills_with_zeros():
    x = jnp.arange(12.0).reshape(4, 3).at[1].set(jnp.nan)
    rows = kernels.gather_rows(x, jnp.array([3, -1, 0, 4, 3]))
    np.testing.assert_array_equal(rows, [[9, 10, 11], [0, 0, 0], [0, 1, 2], [0, 0, 0], [9, 10, 11]])


def test_combine_rows_sums_in_float32_and_skips_what_is_not_here():
    y = jnp.asarray([[1.0, 2.0], [4.0, 8.0], [jnp.nan, jnp.nan]], jnp.bfloat16)
    position = jnp.array([[0, 1], [1, -1], [-1, -1]])
    weights = jnp.array([[0.5, 0.25], [2.0, jnp.nan], [jnp.inf, 1.0]])
    combined = kernels.combine_rows(y, position, weights)
    assert combined.dtype == jnp.float32
    np.testing.assert_array_equal(combined, [[1.5, 3.0], [8.0, 16.0], [0.0, 0.0]])


def test_blocks_grow_with_groups_within_bounds():
    assert reference._block_rows(0, 4) == 0
    assert reference._block_rows(6, 64) == 6
    assert reference._block_rows(100, 64) == 8
    assert reference._block_rows(5328, 64) == 64
    assert reference._block_rows(65536, 8) == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((9, 7))}, r"x \(9, 7\)"),
        ({"x": jnp.zeros((9, 6), jnp.bfloat16)}, "expected one dtype"),
        ({"sizes": jnp.zeros((2,), jnp.int32)}, r"group_sizes \(2,\)"),
        ({"bias": jnp.zeros((3, 4))}, r"bias \(3, 4\)"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    x, w, sizes, bias = problem([3, 3, 3], spare=0)
    given = {"x": x, "sizes": sizes, "bias": bias, **change}
    with pytest.raises(ValueError, match=message):
        kernels.grouped_matmul(given["x"], w, given["sizes"], bias_eN=given["bias"])


@pytest.mark.parametrize(
    ("sizes", "rows", "kept", "clipped"),
    [
        ([3, 0, 2], 5, [3, 0, 2], 0),
        ([3, 0, 2], 9, [3, 0, 2], 0),
        ([3, 4, 2], 5, [3, 2, 0], 4),
        ([3, -1, 2], 5, [3, 0, 2], 1),
        ([-5, 9, -(2**31)], 4, [0, 4, 0], 5 + 5 + (2**31 - 1) // 3),
        ([2**31 - 1] * 4, 7, [7, 0, 0, 0], (2**31 - 1) // 4 * 4),
        ([1, 1], 0, [0, 0], 2),
    ],
)
def test_group_sizes_are_clipped_to_the_rows_and_counted(sizes, rows, kept, clipped):
    got, count = kernels.clip_sizes(jnp.asarray(sizes, jnp.int32), rows)
    assert (got.tolist(), int(count)) == (kept, clipped)


def test_in_debug_mode_products_run_on_clipped_sizes_and_say_how_many_rows_those_had_too_many():
    x, w, sizes, bias = problem([4, 5, 2], spare=0)
    wrong, kept = jnp.array([4, -3, 99]), jnp.array([4, 0, 7])
    for run in (
        functools.partial(kernels.grouped_matmul, bias_eN=bias),
        functools.partial(kernels.gate_up, bias_eM=bias, activation=Activation(name="silu", gated=False)),
    ):
        y, clipped = jax.jit(functools.partial(run, debug=True))(x, w, wrong)
        np.testing.assert_array_equal(y, run(x, w, kept))
        assert int(clipped) == 3 + 92
        y, clipped = run(x, w, sizes, debug=True)
        np.testing.assert_array_equal(y, run(x, w, sizes))
        assert int(clipped) == 0


def test_a_gated_projection_needs_an_even_number_of_rows():
    x, w, sizes, _ = problem([3], width=5)
    with pytest.raises(ValueError, match="even number"):
        kernels.gate_up(x, w, sizes, activation=Activation(name="silu"))


def test_rows_of_wrong_rank_are_refused():
    with pytest.raises(ValueError, match="gather_rows"):
        kernels.gather_rows(jnp.zeros((3,)), jnp.zeros((2,), jnp.int32))
    with pytest.raises(ValueError, match="combine_rows"):
        kernels.combine_rows(jnp.zeros((3, 2)), jnp.zeros((2, 1), jnp.int32), jnp.zeros((2, 2)))


def test_a_named_implementation_is_taken_at_its_word():
    table = {"reference": min}
    assert choice.choose("op", table, None) == "reference"
    assert choice.choose("op", table, "reference") == "reference"
    with pytest.raises(NotImplementedError, match="'triton' does not exist yet; there is 'reference'"):
        choice.choose("op", table, "triton")
    with pytest.raises(ValueError, match=r"'cuda'.*'reference', 'mosaic_gpu', 'triton'"):
        choice.choose("op", table, "cuda")


def test_every_operation_has_a_reference():
    for operation, table in kernels.OPERATIONS.items():
        assert table["reference"] is getattr(reference, operation)
