"""What a rank hands back survives its way through a file, whatever part of it there is."""

import dataclasses

import numpy as np

from parity.results import RankResult
from tests.parity.simulated import simulate


def same(one, other):
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return np.array_equal(one, other, equal_nan=True) if isinstance(one, np.ndarray) else one == other


def test_a_result_comes_back_as_it_was_saved(oracle, tmp_path):
    case, _, reference = oracle("dp2.tp1.ep/allgather/f32/t5-3.d16.f16/e4.k2/gate")
    full = simulate(case, reference)[1]
    full = dataclasses.replace(
        full, stages={"combine": np.ones((2, 3))}, taught={"y": np.zeros(4), "logits": np.ones(2)}
    )
    chosen = dataclasses.replace(full.decisions, rows=None, router_logits=None)
    for result in (
        full,
        dataclasses.replace(full, decisions=chosen, repeat_equal=False),
        RankResult(y=full.y, y_dtype="float32"),
    ):
        result.save(tmp_path, 1)
        again = RankResult.load(tmp_path, 1)
        assert same(result, again)
        assert not same(dataclasses.replace(result, y=result.y + 1), again)
