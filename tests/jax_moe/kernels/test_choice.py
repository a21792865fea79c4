"""What runs where: policy, limits, and the reasons they give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import kernels
from jax_moe.kernels import choice, ops
from jax_moe.kernels.gradients import with_gradient_of
from tests.jax_moe.kernels.problems import SILU


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(choice, "runs_on_hopper", lambda: True)


def product(depth=64, columns=64, dtype=jnp.bfloat16):
    shape = jax.ShapeDtypeStruct
    return (shape((16, depth), dtype), shape((2, columns, depth), dtype), shape((2,), jnp.int32))


def test_without_a_hopper_gpu_the_reference_runs():
    for operation in kernels.OPERATIONS:
        assert kernels.chosen(operation, None) == "reference"


def test_on_hopper_each_operation_has_a_kernel_but_combine_where_xla_is_as_fast(on_hopper):
    picks = {operation: kernels.chosen(operation, None) for operation in kernels.OPERATIONS}
    assert picks == {
        "grouped_matmul": "mosaic_gpu",
        "gate_up": "mosaic_gpu",
        "gather_rows": "triton",
        "combine_rows": "reference",
        "choose_experts": "triton",
        "plan_rows": "triton",
    }


@pytest.mark.parametrize(
    ("operands", "reason"),
    [
        ((*product(dtype=jnp.float32), None, jnp.float32), "float32"),
        ((*product(), None, jnp.float32), "asked for in float32"),
        ((*product(dtype=jnp.float16), None, jnp.bfloat16), "asked for in bfloat16"),
        ((*product(depth=68), None, jnp.bfloat16), "multiples of 8"),
        ((*product(depth=40), None, jnp.bfloat16), "less than 64"),
    ],
)
def test_what_a_kernel_cannot_take_goes_to_the_reference_unless_it_was_named(on_hopper, operands, reason):
    assert kernels.chosen("grouped_matmul", None, *operands) == "reference"
    with pytest.raises(NotImplementedError, match=reason):
        kernels.chosen("grouped_matmul", "mosaic_gpu", *operands)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_products_of_both_narrow_dtypes_have_kernels(on_hopper, dtype):
    assert kernels.chosen("grouped_matmul", None, *product(dtype=dtype), None, dtype) == "mosaic_gpu"
    assert kernels.chosen("gate_up", None, *product(dtype=dtype), SILU, None) == "mosaic_gpu"


def test_a_gated_width_that_is_no_multiple_of_8_goes_to_the_reference(on_hopper):
    assert kernels.chosen("gate_up", None, *product(columns=72), SILU, None) == "reference"
    assert kernels.chosen("gate_up", None, *product(columns=80), SILU, None) == "mosaic_gpu"


def test_a_gpu_implementation_named_on_a_mesh_of_cpus_is_an_error():
    with pytest.raises(NotImplementedError, match="this mesh is of CPUs"):
        kernels.for_platform("mosaic_gpu", "cpu")


def test_tables_of_limits_and_preferences_name_what_exists():
    for operation, table in ops.OPERATIONS.items():
        assert set(ops.LIMITS[operation]) <= set(table)
        assert set(ops.PREFERENCE[operation]) <= set(table)


def test_a_kernel_takes_the_gradient_of_its_reference():
    run = with_gradient_of(lambda x, n, b: jnp.sin(x), lambda x, n, b: jnp.sin(x) + 1)
    value, gradient = jax.value_and_grad(lambda x: run(x, jnp.int32(3), None))(0.5)
    np.testing.assert_allclose([value, gradient], [np.sin(0.5) + 1, np.cos(0.5)], rtol=1e-6)
