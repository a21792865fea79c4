"""Several devices: which spreads are timed, and that what is timed is the layer."""

import jax
import numpy as np
import pytest

from parity.bench import mesh, mesh_jax
from parity.bench.candidates import jax_lab
from parity.bench.shapes import TINY, Shape
from parity.case import Case, CaseError


def test_scaling_keeps_all_tokens_or_the_tokens_of_a_rank():
    found = mesh.jobs([TINY], ["dp4.tp1.ep/padded"], [2, 4, 8])
    listed = [(job.parallel.split("/")[0], job.extra["scaling"], job.shape.tokens) for job in found]
    assert listed == [
        ("dp2.tp1.ep", "both", 24),
        ("dp4.tp1.ep", "strong", 24),
        ("dp4.tp1.ep", "weak", 48),
        ("dp8.tp1.ep", "strong", 24),
        ("dp8.tp1.ep", "weak", 96),
    ]


def test_one_rank_is_the_layer_that_moves_nothing_and_tp_is_kept():
    assert mesh.spread("dp4.tp2.ep/ragged", 1) == "dp1.tp1/local"
    assert mesh.spread("dp4.tp2.ep.native/ragged", 4) == "dp2.tp2.ep.native/ragged"
    assert mesh.world("dp4.tp2.ep/ragged") == 8


@pytest.mark.parametrize(
    ("text", "ranks", "word"),
    [
        ("dp4.tp1.ep", (), "mode and transport"),
        ("dp2.tp1/local", (), "moves no tokens"),
        ("dp3.tp1.ep/padded", (), "8 experts"),
        ("dp2.tp2.ep/ragged", (3,), "does not divide"),
    ],
)
def test_a_spread_that_cannot_be_is_refused(text, ranks, word):
    with pytest.raises(CaseError, match=word):
        mesh.jobs([TINY], [text], ranks)


def test_the_stages_of_a_mesh_are_timed_and_the_whole_is_the_layer():
    shape = Shape(name="s", tokens=6, hidden=32, intermediate=24, experts=4, top_k=2)
    row = mesh_jax.run(jax_lab.Lab("cpu"), shape, "dp2.tp1.ep/padded", 1)
    assert row["status"] == "ok"
    assert row["ranks"] == 2
    assert all(row[f"{name}_ms"] > 0 for name in mesh.STAGES)
    assert all(row[f"{name}_gbps"] > 0 for name in mesh.SPEEDS)
    # three tokens a rank, each with a slot at the other: 32 bf16, ids and weights of 2; back 32 float32
    assert row["dispatch_bytes"] == 3 * (2 * 32 + 2 * 2 * 4)
    assert row["combine_bytes"] == 3 * 4 * 32


def test_the_stages_one_after_the_other_are_the_layer():
    case = Case.parse("dp1.tp2.ep.sp/ragged/bf16/t7.d32.f24/e4.k2/gate+renorm")
    shape = Shape(name="s", tokens=case.total_tokens, hidden=32, intermediate=24, experts=4, top_k=2)
    bench = mesh_jax._Mesh(case)
    params, x = bench.params(shape), bench.tokens(shape, 0)

    @jax.jit
    def staged(params, x):
        rows, handle = bench.dispatch(*bench.routed(params.router.gate, x))
        return bench.combine(bench.experts(params.experts, rows, handle), handle)

    found = np.asarray(staged(params, x)).reshape(-1, shape.hidden)[: shape.tokens]
    expected = np.asarray(bench.whole(params, x)).astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-6)
