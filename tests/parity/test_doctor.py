"""What the machine can run, found without trusting any framework."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity import doctor, grids

ROOT = Path(__file__).resolve().parents[2]
CRASHES, HANGS, RAISES = "import os; os.abort()", "import time; time.sleep(600)", "raise ImportError('no libcudart')"


def _doctor(*arguments, path=None):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*([path] if path else []), ROOT]))}
    command = [sys.executable, "-m", "parity", "doctor", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=path or ROOT, timeout=200, check=False
    )


def test_one_screen_names_versions_modes_and_what_is_missing():
    done = _doctor()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 40
    smoke = len(grids.load("smoke"))
    for text in ("Python", "jax ", "jaxlib", "torch ", "--ranks-per-gpu 4", f"smoke {smoke}/{smoke}", "GPU ",
                 "parity worker (docs/cluster.md)"):  # fmt: skip
        assert text in done.stdout
    assert any(line.startswith("yes") and "CPU devices" in line for line in lines)


def test_as_json_every_mode_has_its_grids_and_reasons():
    facts = json.loads(_doctor("--json").stdout)
    assert facts["frameworks"]["jax"]["version"]
    assert facts["frameworks"]["torch"]["devices"]
    assert len(facts["modes"]) == 4
    for mode in facts["modes"]:
        assert set(mode["grids"]) == set(grids.BUILT_IN)
        assert mode["possible"] or mode["missing"]


@pytest.mark.parametrize(
    ("body", "words"),
    [(CRASHES, "importing it crashed: killed by signal 6"), (HANGS, "did not end within 5 s"),
     (RAISES, "importing it failed: ImportError: no libcudart")],
    ids=["crashes", "hangs", "raises"],
)  # fmt: skip
def test_a_framework_that_cannot_be_imported_is_a_finding_and_not_the_end(tmp_path, body, words):
    (tmp_path / "torch.py").write_text(body)
    done = _doctor("--json", "--timeout", "5" if body == HANGS else "120", path=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert words in facts["frameworks"]["torch"]["trouble"]
    assert all(not mode["possible"] for mode in facts["modes"])
    assert any("torch: " in text for text in facts["modes"][0]["missing"])


def test_a_framework_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.probe("torch", 1)["trouble"] == "not installed; pip install 'moe-parity[torch]'"
