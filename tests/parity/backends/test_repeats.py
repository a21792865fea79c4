"""Each framework runs its layer as often as it is asked to, and says when a run gives other bits."""

import itertools

import jax
import numpy as np
import pytest

import jax_moe
from parity import backends, fixtures
from parity.backends.base import Options
from parity.case import Case

CASE = Case.parse("dp1.tp1/local/f32/t3.d16.f8/e4.k2")
ODD_RUN = 4
"""The run, counted from 1, that gives other bits than the others."""


@pytest.fixture
def jax_backend(monkeypatch):
    moe, runs = jax_moe.moe, itertools.count(1)

    def disturbed(params, x, **options):
        y, trace = moe(params, x, **options)
        noise = jax.pure_callback(lambda: np.float32(next(runs) == ODD_RUN), jax.ShapeDtypeStruct((), np.float32))
        return y + noise.astype(y.dtype), trace

    monkeypatch.setattr(jax_moe, "moe", disturbed)

    def make(options):
        backend = backends.load("jax", options)
        backend.house = jax_moe
        return backend

    return make


@pytest.fixture
def torch_backend(monkeypatch):
    import torch

    import torch_moe

    forward, runs = torch_moe.MoE.forward, itertools.count(1)

    def disturbed(self, x, **options):
        out = forward(self, x, **options)
        off = float(next(runs) == ODD_RUN)
        return (out[0] + off, *out[1:]) if isinstance(out, tuple) else out + off

    monkeypatch.setattr(torch_moe.MoE, "forward", disturbed)

    def make(options):
        backend = backends.load("torch", options)
        backend.house, backend.meshes, backend.rank, backend.gpu = torch_moe, {}, 0, False
        backend.device = torch.device("cpu")
        return backend

    return make


@pytest.mark.parametrize("name", ["jax", "torch"])
@pytest.mark.parametrize("repeat", [ODD_RUN - 1, ODD_RUN])
def test_the_last_of_the_runs_is_compared_too(name, repeat, cache, request):
    backend = request.getfixturevalue(f"{name}_backend")(Options(repeat=repeat))
    result = backend.run(CASE, fixtures.build(CASE, cache))[0]
    assert result.repeat_equal is (repeat < ODD_RUN)
