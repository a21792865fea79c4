"""What runs on a CPU computes what it is timed for, and a mistake does not pass."""

import functools

import numpy as np
import pytest

from parity.bench import catalog, draws, reference
from parity.bench.candidates import jax_lab, jax_moe, ragged_dot, torch_lab, torch_moe
from parity.bench.candidates.base import Inputs
from parity.bench.shapes import WHATS, Shape
from parity.bench.worker import Bench
from tests.parity.bench import fake

SHAPE = Shape(name="s", tokens=11, hidden=32, intermediate=24, experts=6, top_k=3)


@pytest.fixture(scope="module")
def timed():
    """(candidate, what) -> its row, timed once."""
    jax, torch = jax_lab.Lab("cpu"), torch_lab.Lab("cpu")
    each = {
        "jax_moe": Bench(jax_moe.CANDIDATE(), jax),
        "torch_moe": Bench(torch_moe.CANDIDATE(), torch),
        "lax.ragged_dot": Bench(ragged_dot.CANDIDATE(), jax),
    }
    return functools.cache(lambda name, what: each[name].run(what, SHAPE, 1))


WORK = [
    (entry.name, what) for entry in catalog.CATALOG if "cpu" in entry.platforms for what in WHATS if what in entry.whats
]


@pytest.mark.parametrize(("name", "what"), WORK)
def test_every_candidate_computes_what_it_is_timed_for(timed, name, what):
    row = timed(name, what)
    assert row["status"] == "ok"
    assert row["error"] <= reference.bound(what)
    assert row["device_ms"] > 0
    assert row["sets"] == 2


@pytest.mark.parametrize("what", ["layer", "down"])
def test_candidates_of_both_frameworks_are_given_the_same_bits(timed, what):
    assert len({timed(name, what)["checksum"] for name in ("jax_moe", "torch_moe", "lax.ragged_dot")}) == 1


@pytest.mark.parametrize("what", WHATS)
def test_a_result_that_is_off_by_more_than_rounding_is_seen(what):
    lab = torch_lab.Lab("cpu")
    candidate = torch_moe.CANDIDATE()
    routing = draws.Routing(SHAPE)
    arguments = Inputs(lab, SHAPE, "stored").arguments(what, 0, routing)
    result = candidate.operation(what, SHAPE)(*arguments)
    error = reference.error(what, SHAPE, lab, "stored", arguments, result, routing)
    assert error <= reference.bound(what)
    shifted = tuple(part.roll(1, 0) for part in result) if what == "routing" else result.roll(1, 0)
    assert reference.error(what, SHAPE, lab, "stored", arguments, shifted, routing) > reference.bound(what)
    if what != "routing":
        result[0, 0] = float("nan")
        assert reference.error(what, SHAPE, lab, "stored", arguments, result, routing) == float("inf")


def test_the_reference_of_a_layer_is_the_plain_formula():
    rng = np.random.default_rng(1)
    x, gate = rng.standard_normal((5, 8)).astype(np.float32), rng.standard_normal((4, 8)).astype(np.float32)
    up, down = rng.standard_normal((4, 6, 8)).astype(np.float32), rng.standard_normal((4, 8, 3)).astype(np.float32)
    ids, weights, gap = reference.route(x, gate, 2)
    found = reference.layer(x, ids, weights, lambda name, e, rows: rows @ {"gate_up": up, "down": down}[name][e].T)
    for token in range(5):
        scores = np.exp(x[token] @ gate.T)
        scores /= scores.sum()
        best = np.argsort(-scores)[:2]
        total = sum(scores[e] for e in best)
        expected = np.zeros(8)
        for e in best:
            inner = up[e] @ x[token]
            h = inner[:3] / (1 + np.exp(-inner[:3])) * inner[3:]
            expected += scores[e] / total * (down[e] @ h)
        np.testing.assert_allclose(found[token], expected, rtol=1e-4)
    assert (gap > 0).all()


def test_a_lab_in_plain_numpy_serves_as_well():
    row = Bench(fake.CANDIDATE(), fake.Lab()).run("layer", SHAPE, 1)
    assert (row["status"], row["sets"]) == ("ok", 2)


def test_a_row_counts_the_experts_that_its_tokens_chose():
    few = Shape(name="s", tokens=1, hidden=16, intermediate=8, experts=64, top_k=3)
    bench = Bench(fake.CANDIDATE(), fake.Lab())
    assert bench.run("layer", few, 1)["active"] == 3
    routings = [draws.Routing(few, part) for part in range(2)]
    assert bench._active("down", few, [(), ()], routings) == 3
