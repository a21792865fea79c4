"""What runs where: policy, limits, and the reasons they give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import kernels
from jax_moe.kernels import choice, ops
from jax_moe.kernels.gradients import one_by_one, with_gradient_of
from tests.jax_moe.kernels.problems import SILU


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(choice, "capability", lambda: "9.0")


def product(depth=64, columns=64, dtype=jnp.bfloat16, rows=16):
    shape = jax.ShapeDtypeStruct
    return (shape((rows, depth), dtype), shape((2, columns, depth), dtype), shape((2,), jnp.int32))


def test_without_a_gpu_the_reference_runs():
    for operation in kernels.OPERATIONS:
        assert kernels.chosen(operation, None) == "reference"


@pytest.mark.parametrize(
    ("capability", "products", "rows"),
    [
        ("9.0", "mosaic_gpu", "triton"),
        ("8.0", "triton", "triton"),
        ("8.9", "triton", "triton"),
        ("7.5", "reference", "reference"),
        ("10.0", "reference", "reference"),
    ],
)
def test_each_card_has_its_kernels_but_for_combine_where_xla_is_as_fast(monkeypatch, capability, products, rows):
    monkeypatch.setattr(choice, "capability", lambda: capability)
    picks = {operation: kernels.chosen(operation, None) for operation in kernels.OPERATIONS}
    assert picks == {
        "grouped_matmul": products,
        "gate_up": products,
        "gather_rows": rows,
        "combine_rows": "reference",
        "choose_experts": rows,
        "plan_rows": rows,
        "gather_gate_up": "mosaic_gpu" if capability == "9.0" else "reference",
        "few_tokens": "mosaic_gpu" if capability == "9.0" else "reference",
    }


@pytest.mark.parametrize(
    ("operands", "reason"),
    [
        ((*product(dtype=jnp.float32), None, jnp.float32), "float32 and float32: expected both bfloat16"),
        ((*product(), None, jnp.float32), "asked for in float32: expected .* bfloat16"),
        ((*product(dtype=jnp.float16), None, jnp.bfloat16), "asked for in bfloat16"),
        ((*product(depth=68), None, jnp.bfloat16), "depth 68: expected a multiple of 8"),
        ((*product(depth=40), None, jnp.bfloat16), "depth 40: expected a multiple of 8, 64 or more"),
        ((*product(columns=68), None, jnp.bfloat16), "68 outputs: expected a multiple of 8"),
        ((*product(rows=0), None, jnp.bfloat16), "no rows"),
    ],
)
def test_what_a_kernel_cannot_take_goes_to_the_reference_unless_it_was_named(on_hopper, operands, reason):
    assert kernels.chosen("grouped_matmul", None, *operands) == "reference"
    with pytest.raises(NotImplementedError, match=f"'mosaic_gpu' cannot run this: .*{reason}"):
        kernels.chosen("grouped_matmul", "mosaic_gpu", *operands)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_products_of_both_narrow_dtypes_have_kernels(on_hopper, dtype):
    assert kernels.chosen("grouped_matmul", None, *product(dtype=dtype), None, dtype) == "mosaic_gpu"
    assert kernels.chosen("gate_up", None, *product(dtype=dtype), SILU, None) == "mosaic_gpu"


def test_a_gated_width_that_is_no_multiple_of_8_is_not_for_the_hopper_kernels(on_hopper):
    assert kernels.chosen("gate_up", None, *product(columns=80), SILU, None) == "mosaic_gpu"
    assert kernels.chosen("gate_up", None, *product(columns=72), SILU, None) == "reference"
    assert kernels.chosen("gate_up", "triton", *product(columns=72), SILU, None) == "triton"
    with pytest.raises(NotImplementedError, match="an intermediate size of 36: expected a multiple of 8"):
        kernels.chosen("gate_up", "mosaic_gpu", *product(columns=72), SILU, None)


@pytest.mark.parametrize(
    ("capability", "name", "message"),
    [
        ("8.0", "mosaic_gpu", "this GPU has compute capability 8.0: expected 9.0"),
        ("10.0", "mosaic_gpu", "this GPU has compute capability 10.0: expected 9.0"),
        ("7.5", "triton", "this GPU has compute capability 7.5: expected 8.0 or more"),
    ],
)
def test_a_name_on_a_card_it_is_not_for_is_an_error(monkeypatch, capability, name, message):
    monkeypatch.setattr(choice, "capability", lambda: capability)
    with pytest.raises(NotImplementedError, match=message):
        kernels.chosen("grouped_matmul", name, *product(), None, jnp.bfloat16)


def test_float32_is_multiplied_in_triton_where_tf32_is_asked_for_alone(monkeypatch):
    monkeypatch.setattr(choice, "capability", lambda: "8.0")
    wide = (*product(dtype=jnp.float32), None, jnp.float32)
    assert kernels.chosen("grouped_matmul", None, *wide) == "reference"
    with pytest.raises(NotImplementedError, match=r"float32: expected jax.default_matmul_precision\('tensorfloat32'\)"):
        kernels.chosen("grouped_matmul", "triton", *wide)
    with jax.default_matmul_precision("tensorfloat32"):
        assert kernels.chosen("grouped_matmul", None, *wide) == "triton"
        assert kernels.chosen("gate_up", None, *product(dtype=jnp.float32), SILU, None) == "triton"


def test_the_name_of_a_layer_is_that_of_its_products():
    assert {name: kernels.for_rows(name) for name in (None, *kernels.IMPLEMENTATIONS)} == {
        None: None,
        "reference": "reference",
        "mosaic_gpu": None,
        "triton": "triton",
    }
    with pytest.raises(ValueError, match="implementation = 'cuda'"):
        kernels.for_rows("cuda")
    with pytest.raises(NotImplementedError, match="gather_rows: implementation 'mosaic_gpu' does not exist"):
        kernels.chosen("gather_rows", "mosaic_gpu")


def test_a_gpu_implementation_named_on_a_mesh_of_cpus_is_an_error():
    with pytest.raises(NotImplementedError, match="this mesh is of CPUs"):
        kernels.for_platform("mosaic_gpu", "cpu")


def test_tables_of_limits_and_preferences_name_what_exists():
    for operation, table in ops.OPERATIONS.items():
        assert set(ops.LIMITS[operation]) <= set(table)
        for preference in ops.PREFERENCE.values():
            assert set(preference[operation]) <= set(table)


def test_a_kernel_takes_the_gradient_of_its_reference():
    run = with_gradient_of(lambda x, n, b: jnp.sin(x), lambda x, n, b: jnp.sin(x) + 1)
    value, gradient = jax.value_and_grad(lambda x: run(x, jnp.int32(3), None))(0.5)
    np.testing.assert_allclose([value, gradient], [np.sin(0.5) + 1, np.cos(0.5)], rtol=1e-6)


def test_under_vmap_a_kernel_is_called_once_for_each_of_the_batch():
    def kernel(x, n, bias):
        assert x.shape == (4,), "the kernel saw a batch"
        return jnp.sin(x) * n

    run = with_gradient_of(lambda x, n, b: jnp.sin(x) * n, kernel)
    x, n = jnp.arange(12.0).reshape(3, 4), jnp.arange(3)
    np.testing.assert_allclose(jax.vmap(run, (0, 0, None))(x, n, None), jnp.sin(x) * n[:, None], rtol=1e-6)

    def total(x):
        return jax.vmap(run, (0, None, None))(x, n[2], None).sum()

    np.testing.assert_allclose(jax.grad(total)(x), 2 * jnp.cos(x), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(lambda x: run(x, n[2], None).sum()))(x), 2 * jnp.cos(x), rtol=1e-6)


def test_under_vmap_a_kernel_of_integers_may_stand_in_what_is_differentiated():
    order = one_by_one(lambda ids, first: jnp.argsort(ids + first))

    @jax.custom_vjp
    def choose(x):
        return jnp.argmax(x, axis=-1), jnp.max(x, axis=-1)

    choose.defvjp(
        lambda x: (choose(x), x),
        lambda x, ct: (jnp.where(x == x.max(-1, keepdims=True), ct[1][..., None], 0.0),),
    )

    def loss(x):
        ids, best = choose(x)
        return (best[order(ids, jnp.int32(1))] * jnp.arange(1.0, 5.0)).sum()

    x = jax.random.normal(jax.random.key(0), (3, 4, 5))
    got = jax.jit(jax.vmap(jax.grad(loss)))(x)
    np.testing.assert_array_equal(got, jnp.stack([jax.grad(loss)(own) for own in x]))
    assert np.unique(got).size == 5  # 0 and the four weights, so the order was used
