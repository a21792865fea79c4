"""Activations against their formulas in float64, and what is easily got wrong about swigluoai."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe import activation, experts

from . import dense
from .layers import PLAIN

ALL = [(name, True) for name in ("silu", "gelu", "gelu_tanh", "swigluoai")]
ALL += [(name, False) for name in ("silu", "gelu", "relu2")]


@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize(("name", "gated"), ALL)
def test_every_activation_is_its_formula(name, gated, layout):
    config = dataclasses.replace(PLAIN, activation=name, gated=gated, gate_up_layout=layout)
    z = np.random.default_rng(0).normal(0.3, 4, (50, 12)).astype(np.float32)
    actual = experts.activate(jnp.asarray(z), activation.from_config(config))
    assert actual.shape == (50, 6 if gated else 12)
    np.testing.assert_allclose(actual, dense.activate(z.astype(np.float64), config), rtol=2e-6, atol=1e-5)


def test_swigluoai_clamps_the_gate_above_only_and_up_on_both_sides_and_adds_one():
    oai = activation.Activation(name="swigluoai", alpha=1.0, limit=2.0)
    gate_up = jnp.array([[5.0, -5.0, 1.0, 1.0, 0.0, 0.0, 5.0, -5.0]])
    gate, up = np.array([2.0, -5.0, 1.0, 1.0]), np.array([0.0, 0.0, 2.0, -2.0])
    expected = gate / (1 + np.exp(-gate)) * (up + 1)
    np.testing.assert_allclose(activation.apply(gate_up, oai)[0], expected, rtol=1e-6)


def test_layouts_are_the_same_numbers_in_another_order():
    rows = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    interleaved = rows.reshape(3, 2, 4).swapaxes(1, 2).reshape(3, 8)
    one = activation.apply(jnp.asarray(rows), activation.Activation(name="silu"))
    other = activation.apply(jnp.asarray(interleaved), activation.Activation(name="silu", layout="interleaved"))
    np.testing.assert_array_equal(one, other)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="'mish'"):
        activation.apply(jnp.zeros((1, 2)), activation.Activation(name="mish"))
