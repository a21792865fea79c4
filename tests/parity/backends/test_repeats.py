"""Each framework runs its layer as often as it is asked to, and says when a run gives other bits."""

import itertools

import jax
import numpy as np
import pytest

import jax_moe
import torch_moe
from parity import fixtures
from parity.backends.base import Options
from parity.case import Case
from tests.parity.backends.alone import alone

CASE = Case.parse("dp1.tp1/local/f32/t3.d16.f8/e4.k2")
ODD_RUN = 4
"""The run, counted from 1, that gives other bits than the others."""


@pytest.fixture
def odd_jax(monkeypatch):
    moe, runs = jax_moe.moe, itertools.count(1)

    def disturbed(params, x, **options):
        y, trace = moe(params, x, **options)
        noise = jax.pure_callback(lambda: np.float32(next(runs) == ODD_RUN), jax.ShapeDtypeStruct((), np.float32))
        return y + noise.astype(y.dtype), trace

    monkeypatch.setattr(jax_moe, "moe", disturbed)


@pytest.fixture
def odd_torch(monkeypatch):
    forward, runs = torch_moe.MoE.forward, itertools.count(1)

    def disturbed(self, x, **options):
        out = forward(self, x, **options)
        off = float(next(runs) == ODD_RUN)
        return (out[0] + off, *out[1:]) if isinstance(out, tuple) else out + off

    monkeypatch.setattr(torch_moe.MoE, "forward", disturbed)


@pytest.mark.parametrize("name", ["jax", "torch"])
@pytest.mark.parametrize("repeat", [ODD_RUN - 1, ODD_RUN])
def test_the_last_of_the_runs_is_compared_too(name, repeat, cache, request):
    request.getfixturevalue(f"odd_{name}")
    with alone(name, Options(repeat=repeat)) as backend:
        result = backend.run(CASE, fixtures.build(CASE, cache))[0]
    assert result.repeat_equal is (repeat < ODD_RUN)
