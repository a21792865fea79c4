"""Inputs: the same bits in NumPy, JAX and PyTorch, in every layout."""

import numpy as np
import pytest

from parity.bench import draws
from parity.bench.candidates import jax_lab, torch_lab
from parity.bench.shapes import Shape

SHAPE = Shape(name="s", tokens=9, hidden=8, intermediate=6, experts=5, top_k=3)


@pytest.fixture(scope="module")
def labs():
    return jax_lab.Lab("cpu"), torch_lab.Lab("cpu")


def as_numpy(lab, array):
    return lab.rows(array, np.arange(array.shape[0]))


def test_plain_arrays_have_the_same_bits_everywhere(labs):
    expected = draws.normal(draws.seed("x", 3), (70, 33), 1.7)
    for lab in labs:
        made = lab.normal(draws.seed("x", 3), (70, 33), 1.7)
        np.testing.assert_array_equal(as_numpy(lab, made), expected)
        assert lab.checksum(made) == draws.checksum(expected)


@pytest.mark.parametrize("layout", ["stored", "transposed", "interleaved"])
def test_weights_have_the_same_bits_everywhere_and_in_every_layout(labs, layout):
    expected = draws.stacked("gate_up", 3, (6, 10), 0.3)
    laid_out = {
        "stored": expected,
        "transposed": expected.transpose(0, 2, 1),
        "interleaved": expected[:, [0, 3, 1, 4, 2, 5]],
    }[layout]
    seeds = [draws.seed("gate_up", expert) for expert in range(3)]
    for lab in labs:
        made = lab.stacked(seeds, (6, 10), 0.3, layout)
        np.testing.assert_array_equal(as_numpy(lab, made), laid_out)
        assert lab.checksum(made) == draws.checksum(expected)


@pytest.mark.parametrize("layout", ["stored", "transposed", "interleaved"])
def test_products_for_the_reference_put_gate_before_up_in_every_layout(labs, layout):
    weights = draws.stacked("gate_up", 3, (6, 10), 0.3)
    x = np.random.default_rng(0).standard_normal((2, 10)).astype(np.float32)
    seeds = [draws.seed("gate_up", expert) for expert in range(3)]
    for lab in labs:
        found = lab.product(lab.stacked(seeds, (6, 10), 0.3, layout), 2, x, layout)
        np.testing.assert_allclose(found, x @ weights[2].T, rtol=1e-5, atol=1e-6)


def test_values_are_spread_as_they_should_be():
    values = draws.normal(draws.seed("gate"), (400, 500), 0.25)
    assert abs(values.mean()) < 0.002
    assert values.std() == pytest.approx(0.25, rel=0.01)
    assert np.abs(values).max() > 3 * 0.25


def test_arrays_sets_and_experts_differ():
    seeds = [draws.seed(name, part) for name in draws.SEEDS for part in range(256)]
    assert len(set(seeds)) == len(seeds)
    first, second = (draws.normal(draws.seed("down", expert), (2000,), 1.0) for expert in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_a_routing_is_a_choice_of_distinct_experts_and_its_sort():
    routing = draws.Routing(SHAPE)
    assert all(len(set(ids)) == SHAPE.top_k for ids in routing.ids.tolist())
    np.testing.assert_allclose(routing.weights.sum(1), 1, rtol=1e-6)
    expert = routing.ids[routing.row_token, routing.row_slot]
    assert (np.diff(expert) >= 0).all()
    np.testing.assert_array_equal(np.bincount(expert, minlength=SHAPE.experts), routing.sizes)
    np.testing.assert_array_equal(routing.position[routing.row_token, routing.row_slot], np.arange(SHAPE.rows))
    assert (draws.Routing(SHAPE, 1).ids != routing.ids).any()
