"""What is an answer and what is not, and whose fault an output is that cannot be compared."""

import dataclasses

import numpy as np
import pytest

from parity.backends.contract import AnswerError, check, ranks_fault
from parity.case import Case
from parity.results import RankResult
from tests.parity.simulated import simulate, spoiled

TEXT = "dp2.tp1.ep/allgather/f32/t5-3.d16.f16/e4.k2/gate"


@pytest.fixture
def answer(oracle):
    """The case, and a right answer of both ranks."""
    case, _, reference = oracle(TEXT)
    return case, dict(enumerate(simulate(case, reference)))


def test_a_right_answer_stands_whatever_it_shows(answer):
    case, ranks = answer
    for blame_layer in (False, True):
        assert check(case, ranks, blame_layer) == ranks
        bare = {rank: RankResult(y=result.y, y_dtype="float32") for rank, result in ranks.items()}
        assert check(case, bare, blame_layer) == bare
        assert check(case, {np.int64(1): ranks[1]}, blame_layer) == {1: ranks[1]}


def test_padding_rows_are_for_the_verdict_to_judge(answer):
    case, ranks = answer
    leaky = np.where(np.arange(5)[:, None] >= 3, np.nan, ranks[1].y)
    check(case, {1: spoiled(ranks[1], y=lambda _: leaky)}, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": lambda y: y[:2]}, r"rank 1: y has shape \(2, 16\), expected \(3 or more, 16\)"),
        ({"y": lambda y: y[:, :8]}, r"rank 1: y has shape \(5, 8\), expected \(3 or more, 16\)"),
        ({"y": lambda y: np.full_like(y, np.nan)}, r"y is nan at row 0, column 0 \(3 of 3 rows\), expected finite"),
        ({"y": lambda y: y / np.float32(0)}, r"rank 1: y is -?inf at row 0"),
    ],
)
def test_rows_and_values_of_an_output_are_the_backends_fault_unless_the_layer_is_to_blame(answer, change, message):
    case, ranks = answer
    with np.errstate(all="ignore"):
        bad = {1: spoiled(ranks[1], **change)}
    with pytest.raises(AnswerError, match=message):
        check(case, bad, False)
    assert check(case, bad, True) == bad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": lambda y: None}, "rank 1: y is None, expected a NumPy array, floating-point"),
        ({"y": lambda y: y.tolist()}, "rank 1: y is a value of type list, expected a NumPy array"),
        ({"y": lambda y: y.astype(int)}, "rank 1: y has dtype int64, expected floating-point"),
        ({"y": lambda y: y[None]}, r"rank 1: y has shape \(1, 5, 16\), expected 2 axes"),
        ({"y_dtype": lambda _: np.float32}, "rank 1: y_dtype is a value of type type, expected the name of a dtype"),
        ({"stages": lambda _: [1]}, "rank 1: stages is a value of type list, expected a mapping"),
        ({"taught": lambda _: {"y": 1.0}}, r"rank 1: taught\['y'\] is a value of type float, expected a NumPy array"),
        ({"topk_ids": lambda ids: ids[:, :1]}, r"rank 1: topk_ids has shape \(5, 1\), expected \(5, 2\)"),
        ({"topk_ids": lambda ids: ids * 1.0}, "rank 1: topk_ids has dtype float64, expected integer"),
        ({"topk_weights": lambda w: w[1:]}, r"rank 1: topk_weights has shape \(4, 2\), expected \(5, 2\)"),
        ({"router_logits": lambda v: v[:, 1:]}, r"rank 1: router_logits has shape \(5, 3\), expected \(5, 4\)"),
        ({"token_index": lambda v: v[:, None]}, r"rank 1: token_index has shape \(5, 1\), expected 1 axis"),
        ({"group_sizes": lambda v: v[:1]}, r"rank 1: group_sizes has shape \(1,\), expected \(2,\)"),
        ({"row_slot": lambda v: v[:-1]}, "rank 1: row_slot has shape"),
        ({"expert_load": lambda v: v[:1]}, r"rank 1: expert_load has shape \(1,\), expected \(4,\)"),
        ({"row_token": lambda v: None}, "rank 1: row_token is None, expected a NumPy array, integer"),
    ],
)
def test_what_has_the_wrong_form_is_no_answer_of_any_backend(answer, change, message):
    case, ranks = answer
    bad = {1: spoiled(ranks[1], **change)}
    for blame_layer in (False, True):
        with pytest.raises(AnswerError, match=message):
            check(case, bad, blame_layer)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (lambda r: None, "run returned None, expected a mapping of rank to RankResult"),
        (lambda r: list(r.values()), "run returned a value of type list"),
        (lambda r: {1: r[1].y}, "rank 1: a value of type ndarray, expected a RankResult"),
        (lambda r: {"1": r[1]}, "run answered for rank '1', expected ranks 0 to 1"),
        (lambda r: {**r, 2: r[1]}, "run answered for rank 2, expected ranks 0 to 1"),
        (lambda r: {1: dataclasses.replace(r[1], decisions=3)}, "decisions are a value of type int"),
    ],
)
def test_what_is_no_result_of_a_rank_is_named(answer, results, message):
    case, ranks = answer
    with pytest.raises(AnswerError, match=message):
        check(case, results(ranks), True)


def test_each_rank_must_be_answered_for_once():
    case = Case.parse("dp4.tp1.ep/allgather/f32/t5.d16.f16/e4.k2")
    assert ranks_fault(case, [3, 0, 2, 1]) is None
    assert ranks_fault(case, [3, 0]) == "no result for ranks 1, 2 of 4"
    assert ranks_fault(case, [0, 1, 2, 3, 2]) == "more than one process answered for rank 2"
