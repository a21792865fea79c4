"""The command, as a person types it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest

from parity import report
from parity.case import Case, CaseError
from tests.parity import plugin as trouble
from tests.parity.plugin import case_id
from tests.parity.plugin import plugin as plugin

ROOT = Path(__file__).resolve().parents[2]


def _environment():
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": str(ROOT) + (os.pathsep + path if path else "")}


def parity(*arguments, cwd=ROOT, **options):
    """Run the command; returns the finished process with its text."""
    command = [sys.executable, "-m", "parity", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=_environment(), check=False, timeout=300, **options
    )


def fake(*arguments, **options):
    return parity("run", "--frameworks", "fake", *arguments, **options)


def test_the_commands_process_imports_no_framework(tmp_path):
    code = f"""
import sys
from typer.testing import CliRunner
from parity.cli import app
result = CliRunner().invoke(app, ["run", "{case_id(1)}", "--frameworks", "torch", "--out", {str(tmp_path)!r}])
assert result.exit_code == 0, result.output
found = {{"jax", "jaxlib", "torch", "jax_moe", "torch_moe"}} & set(sys.modules)
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_version_and_help():
    assert parity("--version").stdout.startswith("parity 0.1.0")
    helped = parity("--help")
    assert helped.returncode == 0
    assert all(name in helped.stdout for name in ("list", "run", "selftest", "Exit status"))


def test_list_prints_ids_that_parse():
    for arguments in ((), ("--grid", "vllm", "-k", "e64.k6 latent")):
        done = parity("list", *arguments)
        assert done.returncode == 0
        assert done.stdout.splitlines() == [str(Case.parse(line)) for line in done.stdout.splitlines()]


def test_list_as_json():
    listed = json.loads(parity("list", "-k", "native", "--json").stdout)
    assert {entry["mode"] for entry in listed} == {"EP+SP native"}
    assert {"case", "world", "format", "tokens"} <= set(listed[0])


def test_the_capability_table_is_what_cases_may_be():
    printed = json.loads(parity("list", "--capabilities", "--json").stdout)
    assert printed == report.capabilities()
    parallel = {
        "single": "dp1.tp1", "DP": "dp2.tp1", "TP": "dp1.tp2", "DP+TP": "dp2.tp2", "DP+EP": "dp2.tp1.ep",
        "EP+SP": "dp2.tp2.ep", "EP+SP native": "dp2.tp2.ep.native", "EP, SP off": "dp2.tp2.ep.nosp",
    }  # fmt: skip
    for transport, modes in printed.items():
        assert list(modes) == [*parallel, "bf16", "f32", "nodes"]
        for mode in parallel:
            allowed = modes[mode]
            text = f"{parallel[mode]}/{transport}/bf16/t4.d8.f8/e4.k2"
            if allowed:
                assert Case.parse(text).mode == mode
            else:
                with pytest.raises(CaseError, match="transport"):
                    Case.parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "dp1/local"], "case 'dp1/local' has 2 parts; an id is parallel/"),
        (["run", "dp1.tp1/locl/bf16/t3.d8.f8/e4.k2"], "unknown transport 'locl' (did you mean 'local'?)"),
        (["run", "--grid", "smoek"], "unknown grid 'smoek' (did you mean 'smoke'?); allowed: smoke, vllm"),
        (["run", "-k", "nosuch"], "-k 'nosuch' matches none of"),
        (["list", "-k", "nosuch"], "-k 'nosuch' matches none of"),
        (["list", "--grid", "nosuch.toml"], "'nosuch.toml' cannot be read"),
        (["run", "--frameworks", "jax,trch"], "unknown framework 'trch' (did you mean 'torch'?); allowed: hf-"),
        (["run", "--frameworks", ""], "unknown framework ''; allowed: hf-"),
        (["run", "--backend", "torch"], "No such option: --backend"),
        (["run", "--platform", "tpu"], "'tpu' is not one of 'cpu', 'gpu'"),
        (["run", "--timeout", "0"], "'--timeout': 0 seconds; it must be more than 0"),
        (["run", "--out", "pyproject.toml"], "--out 'pyproject.toml' cannot be written"),
        (["run", "--junit", "."], "--junit '.' cannot be written: Is a directory; give a file"),
        (["report", "tests"], "'tests' has no results.jsonl: it is no folder of results"),
        (["report", "nowhere"], "'nowhere' is not there"),
        (["rum"], "No such command 'rum'"),
        (["selftest", "-k", "nosuch"], "matches none of the bugs; allowed: zero_output"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_2(arguments, message):
    done = parity(*arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_gpu_without_a_gpu_says_what_is_missing_and_exits_3():
    from parity.backends import gpu

    if gpu.count():
        pytest.skip("this machine has an NVIDIA GPU")
    done = parity("run", "--platform", "gpu")
    assert done.returncode == 3
    assert "needs an NVIDIA GPU" in done.stderr


def test_a_missing_framework_is_named_with_how_to_install_it():
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
sys.argv = ["parity", "run"]
from parity.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 3
    assert "needs the package 'torch', which is not installed; install it with: pip install" in done.stderr


def test_a_plugged_in_backend_runs_and_leaves_results(plugin, tmp_path):
    done = fake(case_id(1), case_id(2), "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 pass" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[1:]]
    assert [line["verdict"] for line in lines] == ["pass", "pass"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["counts"]["pass"] == 2
    assert summary["exit_status"] == 0
    assert summary["versions"]["fake"] == "1.0"
    assert {entry["case"] for entry in summary["worst_margins"]} == {case_id(1), case_id(2)}


def test_progress_says_how_long_is_left_and_verbose_lists_every_case(plugin, tmp_path):
    done = fake(case_id(1), case_id(2), "--out", tmp_path, "--verbose")
    first = done.stdout.splitlines()[0]
    assert first.startswith("pass  1/2 ")
    assert first.endswith("left)")
    assert done.stdout.count(case_id(2)) == 2


def test_a_parity_failure_exits_1_and_shows_the_case(plugin, tmp_path):
    done = fake(case_id(trouble.WRONG), case_id(1), "--out", tmp_path)
    assert done.returncode == 1
    assert "cases that did not pass" in done.stdout
    assert "oracle: fake" in done.stdout


def test_a_rank_in_trouble_exits_3_shows_its_log_and_the_run_goes_on(plugin, tmp_path):
    done = fake(case_id(trouble.KILLED), case_id(999), "--out", tmp_path)
    assert done.returncode == 3
    assert "fake rank 1 of 2" in done.stdout
    assert "| last words" in done.stdout
    assert "1 pass, 1 error" in done.stdout


def test_resume_skips_what_is_done(plugin, tmp_path):
    fake(case_id(1), "--out", tmp_path)
    done = fake(case_id(1), case_id(2), "--out", tmp_path, "--resume")
    assert done.returncode == 0
    assert "1 of 2 cases are in" in done.stdout
    assert "2 pass" in done.stdout
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3


def test_resuming_results_of_another_version_is_refused_with_exit_2(plugin, tmp_path):
    (tmp_path / "results.jsonl").write_text('{"format": "parity-results", "version": 99}\n')
    done = fake(case_id(1), "--out", tmp_path, "--resume")
    assert done.returncode == 2
    assert "is of version 99 of the format 'parity-results'; this parity" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_can_be_reported(plugin, tmp_path):
    fake(case_id(1), case_id(trouble.WRONG), "--out", tmp_path)
    done = parity("report", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"2 cases in {tmp_path / 'report.html'}\n"
    assert "1</span> of" in (tmp_path / "report.html").read_text()
    done = parity("report", tmp_path, "--text")
    assert [cell.strip() for cell in done.stdout.splitlines()[-3].split("│")][1:4] == ["DP", "local", "1/2"]


def test_junit_xml_has_every_case(plugin, tmp_path):
    done = fake(case_id(1), case_id(trouble.WRONG), "--out", tmp_path, "--junit", tmp_path / "ci" / "junit.xml")
    assert done.returncode == 1
    cases = ElementTree.parse(tmp_path / "ci" / "junit.xml").getroot().iter("testcase")
    assert {case.get("name"): case.find("failure") is None for case in cases} == {
        case_id(1): True,
        case_id(trouble.WRONG): False,
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process_and_a_usable_folder(plugin, tmp_path, number):
    # SIGINT as a terminal leaves it, whatever started the tests
    program = "import signal; signal.signal(2, signal.default_int_handler); import parity.cli; parity.cli.main()"
    command = [sys.executable, "-c", program, "run", "--frameworks", "fake", "--out", str(tmp_path)]
    running = subprocess.Popen(
        [*command, case_id(1), case_id(trouble.HANGS)],
        env=_environment(),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    results = tmp_path / "results.jsonl"
    deadline = time.monotonic() + 60
    while not (results.exists() and results.read_text().count("\n") == 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    workers = psutil.Process(running.pid).children(recursive=True)
    assert len(workers) == 2
    running.send_signal(number)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "go on with --resume" in errors
    assert not psutil.wait_procs(workers, timeout=5)[1]
    assert json.loads((tmp_path / "summary.json").read_text())["interrupted"] is True
    done = fake(case_id(1), case_id(2), "--out", tmp_path, "--resume")
    assert done.returncode == 0


MIXED = "dp2.tp2.ep/allgather/bf16/t6-5.d32.f16/e8.k2/shared+gate+latent"


@pytest.mark.parametrize("extra", [(), ("--jax-processes",)])
def test_both_frameworks_agree_however_jax_is_spread(tmp_path, extra):
    done = parity("run", MIXED, "--out", tmp_path, *extra)
    assert done.returncode == 0, done.stdout + done.stderr
    frameworks = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[1])["metrics"]["frameworks"]
    assert set(frameworks) == {"jax", "torch"}
