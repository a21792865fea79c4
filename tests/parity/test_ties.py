"""Close choices: which others are correct, how often they are made, and tokens that are made close."""

import math

import numpy as np
import pytest

from parity import fixtures, tied_tokens, ties
from parity.arrays import values
from parity.case import Case, Flags
from parity.oracle import route
from parity.ties import Choices
from parity.tolerance import FALSE_ALARM, SIGMAS, SLACK, ErrorModel, exact_products
from parity.verdict import judge
from parity.verdict.structure import choices, exempt
from tests.parity.simulated import simulate

ULP = 2.0**-24
TIED = [
    "dp1.tp1/local/bf16/t24.d32.f16/e8.k3/ties",
    "dp1.tp1/local/f32/t24.d32.f16/e8.k2/gate+ties",
    "dp1.tp1/local/bf16/t24.d32.f16/e8.k2/gate+sigmoid+bias+ties",
    "dp1.tp1/local/bf16/t24.d32.f16/e16.k3/sigmoid+groups4-2+bias+ties",
    "dp1.tp1/local/bf16/t24.d32.f16/e16.k3/gate+groups8-3+ties",
    "dp1.tp1/local/bf16/t24.d64.f48/e67.k5/ties",
]
NEAR = [text.replace("ties", "nearties") for text in TIED] + [
    "dp1.tp1/local/f32/t24.d32.f16/e8.k2/sigmoid+nearties",
    "dp1.tp1/local/f32/t24.d32.f16/e8.k4/sigmoid+groups4-2+nearties",
]


def choices_of(logits, flags=None, bias=None, top_k=2, variance=0.0, fmt="f32"):
    logits, flags = np.array(logits, np.float64), flags or Flags(sigmoid=True)
    routing = route(logits, bias, top_k=top_k, flags=flags)
    return Choices.of(routing, np.full((len(logits), 1), variance), flags, ErrorModel(fmt))


def test_an_exact_tie_has_one_right_choice():
    found = choices_of([[0.5, 1.0, 0.5, 0.5]])
    assert found.ids.tolist() == [[1, 0]]
    assert found.allowed(0, np.array([0, 1]))
    assert not found.allowed(0, np.array([1, 2]))
    assert not found.open().any()
    assert found.chance().tolist() == [0.0]


def test_equal_logits_that_carry_errors_do_not_tie_exactly():
    found = choices_of([[0.5, 1.0, 0.5, -1.0]], variance=1.0)
    assert found.allowed(0, np.array([1, 2]))
    assert not found.allowed(0, np.array([1, 3]))
    assert found.open().all()
    assert found.chance()[0] == pytest.approx(0.5)


def test_a_bias_makes_a_tie_that_is_not_exact_and_breaks_one_that_was():
    score = 1 / (1 + math.exp(-1.0))
    made = choices_of([[1.0, 0.0]], Flags(sigmoid=True, bias=True), np.array([0.0, score - 0.5]), top_k=1)
    assert made.allowed(0, np.array([0]))
    assert made.allowed(0, np.array([1]))
    broken = choices_of([[0.5, 0.5, 0.5]], Flags(sigmoid=True, bias=True), np.array([0.0, 0.0, 1e-3]), top_k=2)
    assert broken.ids.tolist() == [[2, 0]]
    assert not broken.allowed(0, np.array([1, 2]))
    assert not broken.allowed(0, np.array([0, 1]))


def test_scores_that_round_to_one_value_may_be_chosen_either_way():
    saturated = choices_of([[30.0, 40.0]], top_k=1)
    near_zero = choices_of([[0.0, 1e-9]], Flags(), top_k=1)
    for found in (saturated, near_zero):
        assert found.ids.tolist() == [[1]]
        assert found.allowed(0, np.array([0]))
        assert found.open().all()


def test_equal_groups_go_to_the_lower_one_and_close_ones_to_either():
    flags = Flags(sigmoid=True, groups=(3, 1))
    tied = choices_of([[0.1, 1.0, 1.0, 0.1, -1.0, 0.9]], flags, top_k=1)
    assert tied.ids.tolist() == [[1]]
    assert not tied.allowed(0, np.array([2]))
    close = choices_of([[0.1, 1.0, 1.0 + 1e-7, 0.1, -1.0, 0.9]], flags, top_k=1)
    assert close.ids.tolist() == [[2]]
    assert close.allowed(0, np.array([1]))
    assert not close.allowed(0, np.array([0]))  # inside its group another is far ahead
    assert not close.allowed(0, np.array([5]))


def test_a_group_that_may_be_kept_does_not_have_to_be_used():
    # two groups kept: group 0 for sure, then 1 or 2; the best two experts lie in group 0
    found = choices_of([[2.0, 1.5, 1.0, 0.0, 1.0 + 1e-7, 0.0]], Flags(sigmoid=True, groups=(3, 2)), top_k=2)
    assert found.allowed(0, np.array([0, 1]))
    assert not found.allowed(0, np.array([0, 2]))


@pytest.mark.parametrize("ids", [[1, 1], [1, 8], [-1, 0], [0, 1, 2]])
def test_what_is_no_choice_is_never_allowed(ids):
    assert not choices_of([[0.0, 1.0, 0.0]]).allowed(0, np.array(ids))


def naive_choice(selection, flags, top_k, best):
    size = len(selection) // flags.groups[0]
    worth = [sorted(selection[g * size : (g + 1) * size])[::-1][:best] for g in range(flags.groups[0])]
    kept = sorted(range(flags.groups[0]), key=lambda g: (-sum(worth[g]), g))[: flags.groups[1]]
    open_ = [e for g in kept for e in range(g * size, (g + 1) * size)]
    return sorted(open_, key=lambda e: (-selection[e], e))[:top_k]


@pytest.mark.parametrize("flags", [Flags(sigmoid=True), Flags(sigmoid=True, groups=(4, 2), bias=True)])
def test_every_choice_that_errors_within_the_bound_can_make_is_allowed_and_counted_as_open(flags):
    rng = np.random.default_rng(1)
    bias = np.zeros(8) if flags.bias else None
    logits = 0.5 + 3e-7 * rng.standard_normal((40, 8))
    logits[:, :2] += 1e-3  # some are far from the others
    found = choices_of(logits, flags, bias, top_k=3)
    open_, seen = found.open(), 0
    for token in range(len(logits)):
        for _ in range(20):
            off = rng.uniform(-1, 1, 8) * SIGMAS * found.deviation[token]
            ids = naive_choice(found.selection[token] + off, flags, 3, found.best)
            assert found.allowed(token, np.array(ids))
            differs = set(ids) != set(found.ids[token].tolist())
            assert open_[token] or not differs
            seen += differs
    assert seen > 40


def test_the_chance_is_not_exceeded_by_gaussian_errors_and_is_exact_for_one_pair():
    rng = np.random.default_rng(2)
    found = choices_of(np.column_stack([np.full(200, 3.0), 0.5 + np.linspace(1e-9, 4e-6, 200), np.full(200, 0.5)]))
    off = rng.standard_normal((2000, 200, 3)) * found.deviation
    swapped = ((found.selection + off)[:, :, 1] < (found.selection + off)[:, :, 2]).mean(axis=0)
    chance = found.chance()
    assert np.abs(swapped - chance).max() < 0.06
    assert swapped.sum() == pytest.approx(chance.sum(), rel=0.05)
    assert chance[0] > 0.4
    assert chance[-1] < 1e-9


def test_the_most_that_may_happen_is_the_tail_of_the_binomial():
    for count, chance in ((1, 0.5), (40, 0.03), (300, 0.5)):
        pmf = [math.comb(count, n) * chance**n * (1 - chance) ** (count - n) for n in range(count + 1)]
        least = next(n for n in range(count + 1) if math.fsum(pmf[n + 1 :]) <= FALSE_ALARM)
        assert ties.most(np.full(count, chance)) == least
    assert ties.most(np.array([1.0, 1.0, 0.0])) == 2
    assert ties.most(np.zeros(0)) == 0


def test_products_on_a_grid_are_exact_in_any_order_and_others_are_not():
    rng = np.random.default_rng(3)
    x, w = (tied_tokens.on_grid(rng.standard_normal((5, 96)).astype(np.float32)) for _ in range(2))
    assert exact_products(x, w).all()
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    for _ in range(5):
        order, total = rng.permutation(96), np.zeros((5, 5), np.float32)
        for column in order:
            total += x[:, column, None] * w[:, column]
        assert np.array_equal(total, exact)
    x[2, 7] += np.float32(2.0**-20)
    assert exact_products(x, w).tolist() == [True, True, False, True, True]
    assert exact_products(np.zeros((1, 4)), w[:, :4]).all()


@pytest.mark.parametrize("text", TIED)
def test_planted_ties_are_exact_and_cross_the_boundary(oracle, text):
    case, arrays, reference = oracle(text)
    found = choices(case, reference)
    assert found.exact.all()
    assert not found.open().any()
    tied = found.gap == 0
    level = (reference.logits == reference.logits[:, :1]).all(axis=1)
    assert tied[~level].all()
    assert 0.1 < level.mean() < 0.5
    assert tied[level].all() or case.flags.bias
    assert judge(case, reference, {"right": simulate(case, reference)}).verdict == "pass"
    other = reference.ids.copy()  # the highest of those that tie with the last, in its place
    swapped = 0
    for token in np.flatnonzero(tied).tolist():
        last = other[token, -1]
        alike = np.flatnonzero(found._tied(token)[last])
        if (higher := [e for e in alike if e not in other[token]]) and case.flags.groups[0] == 1:
            other[token, -1] = higher[-1]
            assert not exempt(case, reference, other[token], token)
            swapped += 1
    assert swapped or case.flags.groups[0] > 1
    if case.flags.gate:
        gate = values(arrays["router.gate"])
        assert len(np.unique(gate, axis=0)) < case.experts


@pytest.mark.parametrize("text", [text for text in TIED if "groups" in text])
def test_planted_ties_of_groups_decide_which_is_kept(oracle, text):
    case, _, reference = oracle(text)
    found = choices(case, reference)
    kept, size, decided = case.flags.groups[1], case.experts // case.flags.groups[0], 0
    for token in range(case.total_tokens):
        worth, _, tied = found._groups(token)
        ranked = np.lexsort((np.arange(len(worth)), -worth))
        decided += tied[ranked[kept - 1], ranked[kept]]
        assert (reference.ids[token] // size != ranked[kept]).all()
    assert decided > 3


@pytest.mark.parametrize("text", NEAR)
def test_planted_near_ties_lie_within_the_bound_and_are_seldom_swapped(oracle, text):
    case, _, reference = oracle(text)
    found = choices(case, reference)
    assert found.open().all()
    chance = found.chance()
    assert 0 < chance.sum() < 0.6 * len(chance)
    assert ties.most(chance) < len(chance)
    judgement = judge(case, reference, {"right": simulate(case, reference)})
    assert judgement.verdict == "pass", judgement.reason
    numbers = judgement.metrics["frameworks"]["right"]
    assert numbers["exemptions"] == 0
    assert numbers["exemptions_possible"] == case.total_tokens
    assert numbers["exemptions_expected"] == pytest.approx(chance.sum())
    assert numbers["exemptions_allowed"] == ties.most(chance)


def swap_all(case, reference):
    """The oracle's answer for the other choice of every token whose last expert and next one are close."""
    found, ids = choices(case, reference), reference.ids.copy()
    for token in range(len(ids)):
        rest = found.selection[token].copy()
        rest[ids[token]] = -np.inf
        ids[token, -1] = rest.argmax()
    return reference.replay(ids)


def test_more_exempt_tokens_than_rounding_makes_fail_though_each_is_within_rounding(oracle):
    case, _, reference = oracle("dp1.tp1/local/f32/t24.d32.f16/e8.k2/sigmoid+bias+nearties")
    wrong = swap_all(case, reference)
    assert all(exempt(case, reference, wrong.ids[token], token) for token in range(24))
    judgement = judge(case, reference, {"bad": simulate(case, wrong)})
    assert judgement.reason.startswith("exact: bad: 24 tokens go to other experts than the oracle's, each within")
    assert judgement.metrics["frameworks"]["bad"]["exemptions"] == 24
    assert [gate.gate for gate in judgement.gates if not gate.passed] == ["exact"]


def test_tokens_of_usual_cases_are_expected_to_be_chosen_alike(oracle):
    case, _, reference = oracle("dp1.tp1/local/bf16/t24.d32.f16/e8.k2/gate")
    chance = choices(case, reference).chance()
    assert chance.sum() < 1e-12
    assert ties.most(chance) == 0


def test_the_deviation_of_a_score_is_that_of_its_weight():
    found = choices_of([[0.0, 1.0]], Flags(), top_k=1)
    score = 1 / (1 + math.e)
    assert found.deviation[0, 0] == pytest.approx(SLACK * 0.42 * ULP * score * math.sqrt(9 + 1), rel=1e-6)


def test_one_token_can_be_tied(tmp_path):
    for flags in ("ties", "gate+ties", "nearties", "gate+nearties"):
        case = Case.parse(f"dp1.tp1/local/bf16/t1.d8.f8/e2.k1/{flags}")
        assert fixtures.build(case, tmp_path)["x"].shape == (1, 8)
