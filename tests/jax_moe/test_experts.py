"""The two projections of the routed experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe as jm
from jax_moe import activation, experts

from . import dense
from .layers import SHARED, arrays


@pytest.fixture
def rows():
    return jnp.asarray(np.random.default_rng(0).standard_normal((12, 16)), jnp.float32)


SIZES = jnp.array([2, 0, 3, 1, 0, 0, 4, 0], jnp.int32)
GROUP = np.repeat(np.arange(8), SIZES)


def test_gate_up_and_down_are_the_expert_of_each_row(rows):
    params = jax.tree.map(jnp.asarray, jm.from_mapping(arrays(SHARED)).experts)
    h = experts.gate_up(rows, params, SIZES, activation=activation.from_config(SHARED))
    y = experts.down(h, params, SIZES)
    weights = {name: np.asarray(array, np.float64) for name, array in arrays(SHARED).items()}
    for r, e in enumerate(GROUP):
        z = weights["experts.gate_up"][e] @ np.asarray(rows[r], np.float64) + weights["experts.gate_up_bias"][e]
        wanted_h = dense.activate(z, SHARED)
        np.testing.assert_allclose(h[r], wanted_h, rtol=1e-5, atol=1e-5)
        wanted_y = weights["experts.down"][e] @ wanted_h + weights["experts.down_bias"][e]
        np.testing.assert_allclose(y[r], wanted_y, rtol=1e-5, atol=1e-5)
    assert not np.asarray(y)[len(GROUP) :].any()


def test_a_rank_that_does_not_add_the_bias_leaves_it_out(rows):
    params = jax.tree.map(jnp.asarray, jm.from_mapping(arrays(SHARED)).experts)
    h = experts.gate_up(rows, params, SIZES, activation=activation.from_config(SHARED))
    difference = experts.down(h, params, SIZES) - experts.down(h, params, SIZES, adds_bias=jnp.array(False))
    np.testing.assert_allclose(difference[: len(GROUP)], params.down_bias[GROUP], atol=1e-5)


def test_a_kernel_that_fuses_the_activation_is_used_when_named(rows, monkeypatch):
    seen = []
    monkeypatch.setattr(experts.kernels, "chosen", lambda *call: "mosaic_gpu")
    monkeypatch.setattr(experts.kernels, "gate_up", lambda *a, **k: seen.append(k["implementation"]) or "h")
    params = jax.tree.map(jnp.asarray, jm.from_mapping(arrays(SHARED)).experts)
    activate = activation.from_config(SHARED)
    assert experts.gate_up(rows, params, SIZES, activation=activate, implementation="mosaic_gpu") == "h"
    assert seen == ["mosaic_gpu"]
