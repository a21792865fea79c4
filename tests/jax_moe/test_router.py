"""The router against a router of loops and sorts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_moe as jm
from jax_moe import router
from jax_moe.kernels import reference

from . import dense

EXPERTS, TOKENS = 8, 5


def config_of(top_k, **fields):
    return jm.MoEConfig(
        num_experts=EXPERTS, top_k=top_k, hidden_size=4, intermediate_size=4, router=jm.RouterConfig(**fields)
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    groups=st.sampled_from([(1, 1), (4, 2), (2, 1), (8, 4)]),
    biased=st.booleans(),
    renormalize=st.booleans(),
    coarse=st.booleans(),
)
def test_ids_and_weights_are_those_of_loops_and_sorts(seed, scoring, groups, biased, renormalize, coarse):
    rng = np.random.default_rng(seed)
    config = config_of(
        3,
        scoring=scoring,
        renormalize=renormalize,
        num_groups=groups[0],
        groups_kept=groups[1],
        score_correction_bias=biased,
        scaling_factor=1.5,
    )
    logits = rng.standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    bias = rng.normal(0, 0.5, EXPERTS).astype(np.float32) if biased else None
    if coarse:
        # Many exact ties, of experts and of groups: multiples of a quarter add up exactly in any order.
        logits, bias = np.round(logits), None if bias is None else np.zeros(EXPERTS, np.float32)
    ids, weights = router.route(jnp.asarray(logits), bias, router=config.router, top_k=3)
    assert ids.dtype == jnp.int32
    assert weights.dtype == jnp.float32
    for i in range(TOKENS):
        expected_ids, expected_weights = dense.route_token(logits[i].astype(np.float64), bias, config)
        assert ids[i].tolist() == expected_ids
        np.testing.assert_allclose(weights[i], expected_weights, rtol=3e-6)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_equal_scores_go_to_the_lower_index(scoring):
    ids, _ = router.route(jnp.zeros((2, EXPERTS)), None, router=jm.RouterConfig(scoring=scoring), top_k=4)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2


def test_equal_groups_go_to_the_lower_index():
    kept = reference.keep_groups(jnp.zeros((1, EXPERTS)), 4, 2, top_two=True)
    assert np.isneginf(kept[0]).tolist() == [False] * 4 + [True] * 4


def test_with_a_bias_a_group_counts_its_best_two_and_without_its_best_one():
    selection = jnp.array([[9.0, 0.0, 6.0, 6.0, 1.0, 1.0, 0.0, 0.0]])
    two = reference.keep_groups(selection, 4, 1, top_two=True)
    one = reference.keep_groups(selection, 4, 1, top_two=False)
    assert np.flatnonzero(np.isfinite(two[0])).tolist() == [2, 3]
    assert np.flatnonzero(np.isfinite(one[0])).tolist() == [0, 1]


def test_groups_of_one_expert_count_that_one():
    kept = reference.keep_groups(jnp.arange(8.0)[None], 8, 3, top_two=True)
    assert np.flatnonzero(np.isfinite(kept[0])).tolist() == [5, 6, 7]


def test_a_masked_group_loses_even_to_negative_scores():
    bias = jnp.full((EXPERTS,), -5.0).at[0].set(-1.0)
    grouped = jm.RouterConfig(scoring="sigmoid", num_groups=4, groups_kept=1, score_correction_bias=True)
    ids, _ = router.route(jnp.zeros((1, EXPERTS)), bias, router=grouped, top_k=2)
    assert ids.tolist() == [[0, 1]]


def test_the_bias_chooses_and_never_weighs():
    logits = jnp.linspace(-1, 1, EXPERTS)[None]
    bias = jnp.zeros(EXPERTS).at[0].set(100.0)
    biased = jm.RouterConfig(scoring="sigmoid", score_correction_bias=True)
    ids, weights = router.route(logits, bias, router=biased, top_k=2)
    assert ids.tolist() == [[0, 7]]
    np.testing.assert_allclose(weights[0], jax.nn.sigmoid(logits[0, jnp.array([0, 7])]), rtol=1e-6)


def test_selection_is_in_float32_for_bfloat16_tokens():
    x = jnp.array([[1.0, 1.0]], jnp.bfloat16)
    gate = jnp.array([[1.0, 0.0], [1.0, 2.0**-9]], jnp.bfloat16)
    logits = router.compute_logits(x, gate)
    assert logits.dtype == jnp.float32
    assert logits.tolist() == [[1.0, 1.0 + 2.0**-9]]
    assert router.route(logits, None, router=jm.RouterConfig(), top_k=1)[0].tolist() == [[1]]


def test_no_tokens_route_nowhere():
    ids, weights = router.route(jnp.zeros((0, EXPERTS)), None, router=jm.RouterConfig(), top_k=2)
    assert ids.shape == weights.shape == (0, 2)


def test_gradients_reach_logits_through_weights_alone():
    renormalized = jm.RouterConfig(renormalize=True)
    logits = jnp.array([[0.5, -1.0, 2.0, 0.1]])
    coefficients = jnp.array([[1.0, 3.0]])

    def loss(logits):
        return jnp.sum(router.route(logits, None, router=renormalized, top_k=2)[1] * coefficients)

    gradient = jax.grad(loss)(logits)[0]
    a, b = np.exp(2.0), np.exp(0.5)
    slope = a * b / (a + b) ** 2
    np.testing.assert_allclose(gradient, [2 * slope, 0, -2 * slope, 0], atol=1e-6)
