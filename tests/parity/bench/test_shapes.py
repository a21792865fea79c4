"""Shapes by name and by numbers."""

import itertools

import pytest

from parity.bench import shapes
from parity.case import CaseError


def test_the_ten_shapes_are_those_that_the_page_lists():
    assert len(shapes.SHAPES) == 10
    assert shapes.SHAPES["decode64_deepseek_v3"].id == "t64.d7168.f2048/e256.k8"


@pytest.mark.parametrize("text", ["t64.d128.f96/e8.k2", "dp2.tp1.ep/padded/bf16/t32.d128.f96/e8.k2"])
def test_sizes_and_whole_case_ids_name_the_same_shape(text):
    (shape,) = shapes.parse(text)
    assert shape.id == "t64.d128.f96/e8.k2"
    assert shape.rows == 128


def test_a_model_is_swept_over_tokens():
    found = shapes.parse("mixtral")
    assert [shape.tokens for shape in found] == list(shapes.SWEEP)
    assert {shape.model for shape in found} == {"d4096.f14336/e8.k2"}


def test_given_tokens_take_the_place_of_a_shapes_own_and_no_shape_comes_twice():
    found = shapes.choose(["decode1_qwen3_30b", "prefill_qwen3_30b", "tiny"], [1, 7], [])
    assert [shape.name for shape in found] == ["qwen3_30b@1", "qwen3_30b@7", "d128.f64/e8.k2@1", "d128.f64/e8.k2@7"]
    assert [shape.tokens for shape in shapes.choose([], [], [shapes.TINY])] == [24]


def test_shapes_of_a_model_are_timed_together():
    found = shapes.choose([], [], list(shapes.SHAPES.values()))
    models = [shape.model for shape in found]
    assert len(found) == 10
    assert sum(a != b for a, b in itertools.pairwise(models)) == len(set(models)) - 1


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("prefill_mixtal", "unknown shape"),
        ("t0.d8.f8/e4.k2", "tokens is 0"),
        ("t4.d8.f8/e4.k5", "top-k is 5"),
        ("dp1.tp1/local/bf16/t4.d8.f8/e4.k2/shared", "without flags"),
        ("dp1.tp1/local/f32/t4.d8.f8/e4.k2", "bf16"),
    ],
)
def test_what_cannot_be_timed_is_refused_with_a_word(text, word):
    with pytest.raises(CaseError, match=word):
        shapes.parse(text)
