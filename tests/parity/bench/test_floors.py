"""Operations, bytes and floors, by hand."""

import numpy as np
import pytest

from parity.bench import draws, floors
from parity.bench.floors import Rates
from parity.bench.shapes import SHAPES, WHATS, Shape

SMALL = Shape(name="small", tokens=3, hidden=10, intermediate=4, experts=2, top_k=2)


def test_the_work_of_a_layer_whose_tokens_choose_every_expert():
    # 6 rows: gate, up and down of 10 x 4 each, twice an operation; router 3 x 10 x 2
    done = floors.work("layer", SMALL)
    assert done.flops == 6 * (3 * 2 * 10 * 4) + 2 * 3 * 10 * 2
    assert done.bytes == 2 * (2 * 3 * 10 * 4 + 2 * 10 + 2 * 3 * 10)


@pytest.mark.parametrize(
    ("what", "flops", "numbers"),
    [
        ("gate_up", 6 * 2 * 10 * 8, 2 * 8 * 10 + 6 * 10 + 6 * 4),
        ("grouped_matmul", 6 * 2 * 10 * 8, 2 * 8 * 10 + 6 * 10 + 6 * 8),
        ("down", 6 * 2 * 10 * 4, 2 * 10 * 4 + 6 * 4 + 6 * 10),
        ("gather", 0, 3 * 10 + 6 * 10),
    ],
)
def test_the_work_of_single_operations(what, flops, numbers):
    assert floors.work(what, SMALL) == floors.Work(flops, 2 * numbers)


def test_the_floor_is_the_longer_of_multiplying_and_moving():
    work = floors.Work(flops=8e12, bytes=1e12)
    assert work.seconds(Rates(tflops=800, gbps=1000)) == pytest.approx(1.0)
    assert work.bound_by_memory(Rates(tflops=800, gbps=1000))
    assert work.seconds(Rates(tflops=2, gbps=1000)) == pytest.approx(4.0)
    assert not work.bound_by_memory(Rates(tflops=2, gbps=1000))


def test_floors_are_those_that_the_page_on_kernels_has():
    rates = Rates(tflops=795, gbps=3020)
    expected = {"prefill_120b": 8.30, "prefill_mixtral": 3.63, "decode16_qwen3_30b": 0.26, "decode64_deepseek_v3": 6.65}
    for name, milliseconds in expected.items():
        assert floors.work("layer", SHAPES[name]).seconds(rates) * 1e3 == pytest.approx(milliseconds, rel=0.04), name


def test_the_experts_that_are_read_are_as_many_as_random_tokens_choose():
    shape = Shape(name="s", tokens=16, hidden=8, intermediate=8, experts=128, top_k=8)
    counted = np.mean([np.count_nonzero(draws.Routing(shape, part).sizes) for part in range(200)])
    assert floors.active_experts(shape) == pytest.approx(counted, rel=0.01)


def test_every_kind_of_work_has_a_floor_and_no_other_has():
    for what in WHATS:
        assert floors.work(what, SMALL).bytes > 0
    with pytest.raises(ValueError, match="backward"):
        floors.work("backward", SMALL)


def test_weights_of_experts_that_nobody_chose_are_in_no_floor():
    shape = Shape(name="s", tokens=4, hidden=16, intermediate=8, experts=64, top_k=2)
    weights = 2 * 3 * 16 * 8
    assert floors.work("layer", shape, 5).bytes - floors.work("layer", shape, 4).bytes == weights
