"""Several devices: which spreads are timed, and that what is timed is the layer."""

import io
from dataclasses import replace

import jax
import numpy as np
import pytest
from rich.console import Console

from parity.bench import draws, mesh, mesh_jax, plot_mesh
from parity.bench.candidates import jax_lab
from parity.bench.driver import Run
from parity.bench.shapes import TINY, Shape
from parity.case import CAPABILITIES, CaseError


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


def test_one_rank_is_the_base_of_both_kinds_of_scaling():
    found = mesh.jobs([TINY], ["dp1.tp1/local", "dp4.tp1.ep/padded"], [4])
    listed = [(job.parallel.split("/")[0], job.extra.get("scaling"), job.shape.tokens) for job in found]
    # as many tokens as four ranks have, and as many as one of the four has
    assert listed == [("dp1.tp1", "strong", 24), ("dp1.tp1", "weak", 6), ("dp4.tp1.ep", None, 24)]


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


def test_all_is_every_transport_with_equal_tokens_and_different_ones_sp_off_and_on():
    assert mesh.every(1) == ["dp1.tp1/local"]
    found = mesh.every(2)
    for mode, form in mesh.FORMS.items():
        serving = {text.split("/")[1] for text in found if text.startswith(form.format(n=2) + "/")}
        assert serving == {name for name, modes in CAPABILITIES.items() if mode in modes}
    on_cpu = mesh.every(2, on_gpu=False)
    assert [text for text in found if text not in on_cpu] == ["dp2.tp1.ep/one_sided", "dp1.tp2.ep.sp/one_sided"]
    assert [job.parallel for job in mesh.jobs([TINY], ["all"], [2], on_gpu=False)] == on_cpu
    jobs = mesh.jobs([TINY], ["collectives", "all", "dp2.tp1.ep/padded+shared"], [2])
    kinds = [job.what for job in jobs]
    assert kinds == ["collectives", *["mesh"] * len(found), "shared"]
    with pytest.raises(CaseError, match="--ranks 2,4"):
        mesh.jobs([TINY], ["all"], [])


@pytest.mark.parametrize("parallel", mesh.every(2, on_gpu=False))
def test_the_stages_one_after_the_other_are_the_layer(parallel):
    shape = Shape(name="s", tokens=7, hidden=32, intermediate=24, experts=4, top_k=2)
    case = mesh_jax.case_of(parallel, shape)
    shape = replace(shape, tokens=case.total_tokens)
    bench = mesh_jax._Mesh(case)
    params, (x,) = bench.params(shape), bench.tokens(shape, 1)

    @jax.jit
    def staged(params, x):
        rows, handle = bench.dispatch(*bench.routed(params.router.gate, x))
        return bench.combine(bench.experts(params.experts, rows, handle), handle)

    found, expected = (np.asarray(each).astype(np.float32) for each in (staged(params, x), bench.whole(params, x)))
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("parallel", ["dp2.tp1.ep/padded", "dp1.tp2/local", "dp1.tp2.ep.sp/allgather"])
def test_whole_and_stages_are_timed_and_the_whole_is_right(parallel):
    shape = Shape(name="s", tokens=6, hidden=32, intermediate=24, experts=4, top_k=2)
    row = mesh_jax.run(jax_lab.Lab("cpu"), "mesh", shape, parallel, 1)
    assert row["status"] == "ok"
    assert row["ranks"] == 2
    assert all(row[f"{name}_ms"] > 0 for name in ("whole", *mesh.STAGES))


def test_bytes_are_those_that_a_rank_sends_to_others():
    shape = Shape(name="s", tokens=6, hidden=32, intermediate=24, experts=4, top_k=2)

    def moved(parallel):
        case = mesh_jax.case_of(parallel, shape)
        return mesh_jax.moved(mesh_jax._Mesh(case), case)

    there, back = 2 * 32 + 2 * 2 * 4, 4 * 32
    # three tokens a rank, each with a slot at the other: 32 bf16, ids and weights of 2; back 32 float32
    assert moved("dp2.tp1.ep/padded") == {"dispatch": 3 * there, "combine": 3 * back}
    # with SP the result's halves, in bf16, go to the other rank on top
    assert moved("dp1.tp2.ep.sp/allgather") == {"dispatch": 3 * there, "combine": 3 * back + 3 * 2 * 32}
    # six float32 rows are summed over two ranks: half of them there, half of the sums back
    assert moved("dp1.tp2/local") == moved("dp1.tp2.ep/allgather") == {"combine": 6 * back}
    assert moved("dp1.tp1/local") == {}


def test_weights_that_lie_on_several_devices_are_read_as_checkpoints_have_them():
    shape = Shape(name="s", tokens=6, hidden=32, intermediate=24, experts=4, top_k=2)
    lab = jax_lab.Lab("cpu")
    x = {"gate_up": np.ones((3, 32), np.float32), "down": np.arange(72, dtype=np.float32).reshape(3, 24)}
    for parallel in ("dp1.tp2/local", "dp2.tp1.ep/padded"):
        params = mesh_jax._Mesh(mesh_jax.case_of(parallel, shape)).params(shape).experts
        reader = mesh_jax._Reader(lab, params.tp_blocks)
        for name, sizes in (("gate_up", (48, 32)), ("down", (32, 24))):
            plain = draws.stacked(name, 4, sizes, draws.deviations(shape)[name])
            found = reader.product(getattr(params, name), 3, x[name], "stored")
            np.testing.assert_allclose(found, x[name] @ plain[3].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parallel", ["dp2.tp1.ep/allgather", "dp1.tp2.ep/allgather"])
def test_a_shared_expert_is_timed_in_the_layer_and_alone(parallel):
    shape = Shape(name="s", tokens=6, hidden=32, intermediate=24, experts=4, top_k=2)
    row = mesh_jax.run(jax_lab.Lab("cpu"), "shared", shape, parallel, 1)
    assert row["status"] == "ok"
    hidden = row["without_ms"] + row["shared_ms"] - row["whole_ms"]
    assert row["overlap"] == pytest.approx(hidden / row["shared_ms"])


def test_plain_collectives_are_counted_as_nccl_does(monkeypatch):
    monkeypatch.setattr(jax_lab.Lab, "time", lambda *_: Timed)
    row = mesh_jax.run(jax_lab.Lab("cpu"), "collectives", TINY, "dp4.tp1", 1)
    size = mesh_jax.SIZES["cpu"][0]
    # in a millisecond; a sum goes there and back
    assert row["collectives"]["all_gather"][0]["busbw"] == pytest.approx(size * 3 / 4 / 1e6)
    assert row["collectives"]["all_reduce"][0]["busbw"] == pytest.approx(2 * size * 3 / 4 / 1e6)


class Timed:
    device_ms, wall_ms, clock, exchange = 1.0, 1.0, "wall", None


def row_of(**values):
    shape = {"tokens": 8}
    stages = dict.fromkeys((f"{name}_ms" for name in ("whole", *mesh.STAGES)), 1.0)
    common = {"name": "s", "status": "ok", "tokens_per_rank": 4, "error": 0.0, "clock": "profile"}
    return {"shape": shape, **stages, **common, **values}


def test_tables_hold_stages_against_the_plain_collective_of_the_same_bytes():
    points = [{"size": 200, "ms": 1e-4, "busbw": 1.0}, {"size": 20000, "ms": 1e-3, "busbw": 10.0}]
    plain = {"what": "collectives", "ranks": 2, "collectives": {"all_gather": points, "all_reduce": points}}
    sent = {"dispatch_bytes": 1000, "dispatch_gbps": 2.0}
    run = Run(
        rows=[
            row_of(**plain, parallel="dp2.tp1"),
            row_of(what="mesh", ranks=2, parallel="dp2.tp1.ep/allgather", scaling="strong", **sent),
            row_of(what="mesh", ranks=1, parallel="dp1.tp1/local", scaling="both"),
            {**row_of(what="mesh", parallel="dp2.tp1.ep/ragged"), "status": "stopped", "reason": "stopped after 9 s"},
        ]
    )
    # 100 and 10,000 bytes were sent to others: 1,000 lie in the middle of a logarithmic scale
    assert mesh.busbw(run, 2, "all_gather", 1000) == pytest.approx(5.5)
    assert mesh.busbw(run, 2, "all_gather", 1) == 1.0
    assert mesh.busbw(run, 4, "all_gather", 1000) is None
    console = Console(width=250, record=True, file=io.StringIO())
    for table in mesh.tables(run):
        console.print(table)
    text = console.export_text()
    assert "2 of 5.5" in text
    assert "mesh: stopped: stopped after 9 s" in text


def test_stages_are_held_against_collectives_that_move_alike():
    assert mesh.counterpart("dp2.tp1.ep/allgather", "dispatch") == "all_gather"
    assert mesh.counterpart("dp2.tp1.ep/allgather", "combine") == "reduce_scatter"
    assert mesh.counterpart("dp1.tp2.ep.sp/padded", "combine") == "all_to_all"
    assert mesh.counterpart("dp1.tp2.ep/allgather", "combine") == "all_reduce"
    assert mesh.counterpart("dp1.tp2/local", "combine") == "all_reduce"


def test_the_picture_has_stages_bandwidth_and_scaling(tmp_path):
    points, sent = [{"size": 200, "ms": 1e-4, "busbw": 1.0}], {"dispatch_bytes": 9, "dispatch_gbps": 1.0}
    run = Run(
        rows=[
            row_of(what="collectives", ranks=2, parallel="dp2.tp1", collectives={"all_gather": points}),
            row_of(what="mesh", ranks=1, parallel="dp1.tp1/local", scaling="both"),
            row_of(what="mesh", ranks=2, parallel="dp2.tp1.ep/padded", scaling="strong", **sent),
        ]
    )
    assert plot_mesh.draw(run, tmp_path / "p.svg", "here, now")
    text = (tmp_path / "p.svg").read_text()
    for words in ("whole layer", "bus bandwidth, 2 ranks", "padded: dispatch", "strong scaling", "s dp.ep/padded"):
        assert words in text, words
    assert not plot_mesh.draw(Run(), tmp_path / "none.svg", "")
