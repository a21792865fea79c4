"""The backend printed in the documentation, installed as a reader would install it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity.plugin import case_id
from tests.parity.plugin import plugin as plugin

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SOURCE = re.search(r"^<!-- backend -->\n```python\n(.*?)^```$", PAGE, re.M | re.S)[1]
WANTED = ["dp2.tp1/local/f32/t5-3.d16.f24/e4.k2/gate", "dp1.tp2/local/f32/t5.d16.f24/e8.k3/gate+renorm"]


@pytest.fixture
def site(plugin):
    """Beside the tests' own backend, the printed one, and the same with its weights forgotten."""
    (plugin / "my_backend.py").write_text(SOURCE)
    assert "y[token] += weight *" in SOURCE
    (plugin / "forgetful.py").write_text(SOURCE.replace("y[token] += weight *", "y[token] +="))
    for name in ("my_backend", "forgetful"):
        info = plugin / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[parity.backends]\n{name} = {name}:MyBackend\n")
    return plugin


def run(out, frameworks, *cases):
    command = [sys.executable, "-m", "parity", "run", "--frameworks", frameworks, "--out", str(out), *cases]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return done, {line["case"]: line for line in lines if "case" in line}


def test_the_printed_backend_is_short():
    assert len(SOURCE.splitlines()) <= 42


def test_the_printed_backend_passes_is_skipped_where_it_cannot_and_fails_when_it_is_wrong(site, tmp_path):
    refused = case_id(1)
    done, lines = run(tmp_path / "right", "fake,my_backend", *WANTED, refused)
    assert done.returncode == 0, done.stdout + done.stderr
    for case in WANTED:
        assert set(lines[case]["metrics"]["frameworks"]) == {"fake", "my_backend"}
    reason = "it always has 'gate', and the case does not"
    assert lines[refused]["reason"] == f"only fake took the case, held to the oracle alone; my_backend: {reason}"
    assert f"my_backend skipped 1 of 3 cases: {reason}" in done.stdout
    unseen = "experts and weights; router logits; rows, loads and drops; repeated run"
    assert f"my_backend was not checked for: {unseen}" in done.stdout
    notes = json.loads((tmp_path / "right" / "summary.json").read_text())["notes"]
    assert [note.split()[0] for note in notes] == ["my_backend", "my_backend"]

    done, lines = run(tmp_path / "wrong", "my_backend,forgetful", WANTED[0])
    assert done.returncode == 1
    assert lines[WANTED[0]]["reason"].startswith("oracle: forgetful: ")
    failed = lines[WANTED[0]]["metrics"]["failed_gates"]
    assert {gate["framework"] for gate in failed} == {"forgetful", "my_backend vs forgetful"}
