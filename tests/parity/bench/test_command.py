"""`parity bench`, as a person types it."""

import json
import subprocess
import sys

import pytest

from parity.bench import command
from parity.case import CaseError
from tests.parity.test_cli import ROOT, parity


def test_a_quick_run_times_the_layer_of_every_candidate_here(tmp_path):
    files = ["--json", tmp_path / "b.json", "--plot", tmp_path / "b.svg", "--log", tmp_path / "log"]
    done = parity("bench", "t6.d32.f16/e4.k2", "--quick", "--candidates", "jax_moe,torch_moe,vllm", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "numbers say nothing of a GPU" in done.stdout
    found = json.loads((tmp_path / "b.json").read_text())
    rows = {row["candidate"]: row for row in found["rows"]}
    assert [rows[name]["status"] for name in ("jax_moe", "torch_moe", "vllm")] == ["ok", "ok", "absent"]
    assert rows["jax_moe"]["checksum"] == rows["torch_moe"]["checksum"]
    assert all(rows[name]["of_floor"] > 0 for name in ("jax_moe", "torch_moe"))
    assert (found["repeat"], found["finished"]) == (3, True)
    assert set(found["rates_by_candidate"]) == {"jax_moe", "torch_moe"}
    assert "floor" in (tmp_path / "b.svg").read_text()


def test_planning_a_benchmark_imports_no_framework():
    code = """
import sys
from pathlib import Path
from parity.bench import command, driver, mesh, plot, report
request = command.Request(names=(), tokens=(), whats=(), candidates=(), parallel=(), ranks=(), quick=True,
                          options=driver.Options(), json=None, plot=None, log=Path("log"))
assert len(command.jobs(request)) == 6
for job in command.jobs(request):
    job.entry.missing("gpu", [])
found = {"jax", "jaxlib", "torch", "jax_moe", "torch_moe", "triton", "matplotlib"} & set(sys.modules)
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["prefill_mixtal"], "unknown shape"),
        (["--what", "layer,backward"], "backward"),
        (["--candidates", "jax_moo"], "jax_moo"),
        (["--tokens", "1,x"], "whole numbers"),
        (["--what", "gather", "--candidates", "vllm"], "no candidate does any of this"),
        (["--parallel", "dp2.tp1/local"], "add '.ep'"),
    ],
)
def test_wrong_usage_is_told_in_words(arguments, word):
    done = parity("bench", *arguments)
    assert done.returncode == 2
    assert word in done.stderr


def test_lists_of_words_and_numbers_are_split_at_commas():
    assert command.words("layer, gather", ("layer", "gather"), "--what") == ("layer", "gather")
    assert command.numbers("1,16", "--tokens") == (1, 16)
    assert command.numbers(None, "--tokens") == ()
    with pytest.raises(CaseError, match="at least 1"):
        command.numbers("0", "--tokens")
