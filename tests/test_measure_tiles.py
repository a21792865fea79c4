"""The script that times tiles, without a GPU: rehearsed from end to end, and its programs lowered for one."""

import json
import os
import subprocess
import sys

import pytest

from tests.test_docs import DOCS, load_script

SCRIPT = DOCS / "measure_tiles.py"


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


def test_a_rehearsal_times_every_candidate_and_suggests_a_row(script, tmp_path):
    out = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--rehearse", "--only", "qwen3, few", "--json", out],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(DOCS.parent), "JAX_PLATFORMS": "cpu"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(out.read_text())["qwen3, few"]
    assert (found["left_out"], found["ended"], len(found["rounds"])) == ({}, None, 2)
    timed = {f"{name}|{product}" for name, _, product in script.jobs("qwen3, few")} | {f"{script.CUBLAS}|"}
    assert set(found["times"]) == timed
    for product in ("gate_up", "down"):
        assert f"tiles.py, {product}: " in done.stdout
        assert found["today"][product] in done.stdout
    assert "(today)" in done.stdout


def test_a_candidate_that_kills_its_process_is_left_out_and_the_others_are_timed(script, monkeypatch, tmp_path, capsys):
    worker = tmp_path / "worker.py"
    # A worker that dies at one candidate until it is told to leave it out, and one that says nothing.
    worker.write_text(
        "import json, os, sys, time\n"
        "if 'gpt_oss' in sys.argv: time.sleep(60)\n"
        "say = lambda **e: print(json.dumps(e), flush=True)\n"
        "say(event='ready'); sys.stdin.readline(); say(event='card', card='none', jax='0')\n"
        "bad = 'any_height.Tile(rows=64)|down'\n"
        "say(event='trying', key=bad)\n"
        "if bad not in sys.argv: os.abort()\n"
        f"say(event='round', times={{'{script.CUBLAS}|': 1.0, 'small.Tile(rows=8)|down': 2.0}})\n"
        "say(event='done')\n"
    )
    monkeypatch.setattr(script, "__file__", str(worker))
    found = script.measure(["gpt_oss", "qwen3, few"], True, 20.0, 3.0)
    assert found["gpt_oss"]["ended"] == "did not end within 3 s"
    other = found["qwen3, few"]
    assert other["ended"] is None
    assert "status -6" in other["left_out"]["any_height.Tile(rows=64)|down"]
    assert other["times"]["small.Tile(rows=8)|down"]["ms"] == 2.0
    assert "| `small.Tile(rows=8)` |  |  | 2.000 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3, few"])
def test_what_is_timed_lowers_for_cuda_with_the_operands_that_it_gets(script, name):
    shape = script.CLASSES[name][0]
    jobs = {(type(candidate.tile), product): candidate for _, candidate, product in script.jobs(name)}
    for (_, product), candidate in jobs.items():
        traced = script.traced(shape, candidate, product, False)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "custom_call" in program
    given = script.inputs(script.shape_of(name, True))
    expected = script.abstract(script.shape_of(name, True))
    assert {key: (value.shape, value.dtype) for key, value in given.items()} == {
        key: (value.shape, value.dtype) for key, value in expected.items()
    }


def test_the_operands_of_the_run_that_failed_are_refused_before_anything_is_timed(script, monkeypatch):
    plain = script.abstract

    def wrong(shape):
        given = plain(shape)
        given["w_down"] = given["w_down"].update(dtype="float32")
        return given

    monkeypatch.setattr(script, "abstract", wrong)
    candidate = script.CLASSES["gpt_oss"][1][0]
    with pytest.raises(AssertionError, match="expected both bfloat16"):
        script.traced(script.CLASSES["gpt_oss"][0], candidate, script.DOWN, True)
