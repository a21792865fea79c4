"""Routing against a loop over tokens, with ties, groups, biases and every option."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch_dense as dense

from torch_moe import RouterConfig
from torch_moe.router import compute_logits, route

settings = hypothesis.settings(max_examples=60, deadline=None)


@st.composite
def routings(draw):
    groups = draw(st.sampled_from([1, 2, 4]))
    per_group = draw(st.integers(1, 4))
    experts = groups * per_group
    kept = draw(st.integers(1, groups))
    router = RouterConfig(
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        renormalize=draw(st.booleans()),
        num_groups=groups,
        groups_kept=kept,
        score_correction_bias=draw(st.booleans()),
        scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )
    top_k = draw(st.integers(1, kept * per_group))
    tokens = draw(st.integers(0, 6))
    # Few distinct values, far apart: ties are common, near-ties impossible.
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.integers(-2, 3, (tokens, experts)).astype(np.float32)
    bias = rng.integers(-1, 2, experts).astype(np.float32) / 4 if router.score_correction_bias else None
    return router, top_k, logits, bias


@settings
@hypothesis.given(routings())
def test_routing_is_the_loop_over_tokens_ties_included(routing):
    router, top_k, logits, bias = routing
    # The same float32 scores on both sides, so that equal scores are equal to both.
    scores = torch.from_numpy(logits)
    scores = torch.softmax(scores, -1) if router.scoring == "softmax" else torch.sigmoid(scores)
    ids, weights = route(
        torch.from_numpy(logits), None if bias is None else torch.from_numpy(bias), router=router, top_k=top_k
    )
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    size = logits.shape[1] // router.num_groups
    for token, scores_E in enumerate(scores.numpy()):
        selection = scores_E if bias is None else scores_E + bias
        worth = [
            np.sort(selection[group * size : (group + 1) * size])[::-1][: 1 if bias is None else 2].sum(
                dtype=np.float32
            )
            for group in range(router.num_groups)
        ]
        kept = sorted(range(router.num_groups), key=lambda group: (-worth[group], group))[: router.groups_kept]
        choosable = [expert for expert in range(len(selection)) if expert // size in kept]
        expected = sorted(choosable, key=lambda expert: (-selection[expert], expert))[:top_k]
        assert ids[token].tolist() == expected
        expected_weights = scores_E[expected].astype(np.float64)
        if router.renormalize:
            expected_weights = expected_weights / (expected_weights.sum() + 1e-20)
        np.testing.assert_allclose(weights[token], expected_weights * router.scaling_factor, rtol=1e-6)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_routing_agrees_with_float64(scoring):
    router = RouterConfig(scoring=scoring, renormalize=True, scaling_factor=2.5)
    logits = np.random.default_rng(3).standard_normal((50, 16)).astype(np.float32)
    ids, weights = route(torch.from_numpy(logits), None, router=router, top_k=4)
    expected_ids, expected_weights = dense.route(logits.astype(np.float64), None, router, 4)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)


def test_equal_logits_go_to_the_lowest_indices():
    ids, _ = route(torch.zeros(2, 300), None, router=RouterConfig(), top_k=5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_equal_groups_go_to_the_lowest_groups():
    router = RouterConfig(num_groups=4, groups_kept=2)
    ids, _ = route(torch.zeros(1, 8), None, router=router, top_k=4)
    assert ids.tolist() == [[0, 1, 2, 3]]


def test_with_a_bias_a_group_is_worth_its_best_two():
    router = RouterConfig(scoring="sigmoid", num_groups=2, groups_kept=1, score_correction_bias=True)
    logits = torch.tensor([[3.0, -9.0, -9.0, 1.0, 1.0, -9.0]])
    ids, _ = route(logits, torch.zeros(6), router=router, top_k=2)
    assert ids.tolist() == [[3, 4]]
    ids, _ = route(logits, None, router=RouterConfig(scoring="sigmoid", num_groups=2, groups_kept=1), top_k=2)
    assert ids.tolist() == [[0, 1]]


def test_a_masked_group_is_never_chosen_even_against_negative_selection():
    router = RouterConfig(scoring="sigmoid", num_groups=2, groups_kept=1, score_correction_bias=True)
    bias = torch.tensor([-5.0, -5.0, -9.0, -9.0])
    ids, _ = route(torch.zeros(1, 4), bias, router=router, top_k=2)
    assert ids.tolist() == [[0, 1]]


def test_the_bias_selects_and_never_weighs():
    router = RouterConfig(scoring="sigmoid", score_correction_bias=True)
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    ids, weights = route(logits, torch.tensor([0.0, 0.0, 9.0]), router=router, top_k=1)
    assert ids.tolist() == [[2]]
    assert weights.tolist() == [[0.5]]


@pytest.mark.parametrize("wanted", [True, False])
def test_a_bias_that_is_missing_or_unasked_for_is_an_error(wanted):
    with pytest.raises(ValueError, match=f"allowed with score_correction_bias={wanted}"):
        route(
            torch.zeros(1, 4),
            None if wanted else torch.zeros(4),
            router=RouterConfig(score_correction_bias=wanted),
            top_k=1,
        )


def test_logits_are_float32_products_of_bfloat16_values():
    x, gate = torch.randn(7, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    found = compute_logits(x, gate)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double() @ gate.double().T, rtol=1e-5, atol=1e-5)


def test_gradients_reach_logits_through_the_weights_alone():
    router = RouterConfig(renormalize=True, score_correction_bias=True, num_groups=2, groups_kept=1)
    logits, bias, seed = torch.randn(3, 8).requires_grad_(), torch.randn(8), torch.randn(3, 2)
    ids, weights = route(logits, bias, router=router, top_k=2)
    # Among the chosen, softmax renormalized is the softmax of their logits.
    expected = torch.softmax(logits.gather(1, ids.long()), dim=-1)
    torch.testing.assert_close(weights, expected)
    (found,), (wanted,) = (torch.autograd.grad(value, logits, seed) for value in (weights, expected))
    torch.testing.assert_close(found, wanted)
