import numpy as np
import pytest

from parity.case import Flags
from parity.oracle import route


def test_equal_scores_go_to_the_lower_id():
    routing = route(np.array([[1.0, 2.0, 2.0, 2.0]]), None, top_k=2, flags=Flags())
    assert routing.ids.tolist() == [[1, 2]]
    assert routing.gap[0] == 0


def test_a_bias_selects_and_never_weighs():
    logits, bias = np.array([[0.0, 1.0, 2.0]]), np.array([5.0, 0, 0])
    routing = route(logits, bias, top_k=1, flags=Flags(sigmoid=True))
    assert routing.ids.tolist() == [[0]]
    assert routing.weights[0, 0] == pytest.approx(0.5)


def test_a_group_counts_its_best_or_with_a_bias_its_best_two():
    logits = np.array([[0.9, -9.0, 0.5, 0.5]])
    flags = Flags(sigmoid=True, groups=(2, 1))
    assert route(logits, None, top_k=1, flags=flags).ids.tolist() == [[0]]
    assert route(logits, np.zeros(4), top_k=1, flags=flags).ids.tolist() == [[2]]


def test_weights_are_renormalized_then_scaled():
    routing = route(np.array([[0.0, 0.0, -50.0]]), None, top_k=2, flags=Flags(renorm=True, scale=2.5))
    assert routing.weights[0].tolist() == pytest.approx([1.25, 1.25])


def test_the_gap_is_infinite_where_every_expert_is_chosen():
    assert np.isinf(route(np.array([[0.0, 1.0]]), None, top_k=2, flags=Flags()).gap[0])


def test_large_logits_do_not_overflow():
    routing = route(np.array([[1e4, -1e4, 0.0]]), None, top_k=3, flags=Flags())
    assert np.isfinite(routing.weights).all()
    assert np.isfinite(route(np.array([[1e4, -1e4]]), None, top_k=2, flags=Flags(sigmoid=True)).weights).all()
