"""What goes wrong in the real frameworks' processes: each fault has its cause in words, and leaves no process."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest

from parity import backends
from parity.backends.base import Options
from parity.case import Case
from parity.records import exit_code
from parity.runner import Harness, session
from tests.parity.faults import FAULT

ROOT = Path(__file__).resolve().parents[2]
EP = Case.parse("dp2.tp1.ep/allgather/f32/t5-2.d16.f16/e4.k2")
MARK = "PARITY_TEST_FAULTS"
COLLECTIVE = {"torch": "torch/distributed/distributed_c10d.py", "jax": "block_until_ready"}
"""What is in the stack of a rank that waits for another."""


class Command:
    """The command, with a fault in its way."""

    def __init__(self, tmp_path):
        self.folder, self.mark = tmp_path, uuid.uuid4().hex
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text("from tests.parity.faults import plant\n\nplant()\n")

    def run(self, *arguments, **environment):
        path = [str(self.folder / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.run(
            [sys.executable, "-m", "parity", "run", *arguments, "--out", str(self.folder / "out")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), MARK: self.mark, **environment},
            cwd=self.folder, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def living(self):
        return [p for p in psutil.process_iter() if _environment(p).get(MARK) == self.mark]


def _environment(process):
    try:
        return process.environ()
    except psutil.Error:
        return {}


@pytest.fixture
def command(tmp_path):
    return Command(tmp_path)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_rank_killed_inside_of_a_collective_is_to_blame(name, tmp_path):
    backend = backends.load(name, Options(jax_processes=True))
    with session([backend], 120.0, tmp_path / "logs", Harness.default(stages=False)) as live:
        pool = live.pools.get(backend, EP)
        pool.wait_ready()
        late, victim = (worker.process for worker in pool.workers)
        pids = [late.pid, victim.pid]
        log = pool.workers[1].log
        late.send_signal(signal.SIGSTOP)  # so that the other waits for it in a collective

        def kill():
            deadline = time.monotonic() + 100
            while COLLECTIVE[name] not in log.read_text() and time.monotonic() < deadline:
                if "--- case" in log.read_text():
                    victim.send_signal(signal.SIGUSR1)  # its stack goes to its log
                time.sleep(0.3)
            inside.append(COLLECTIVE[name] in log.read_text())
            time.sleep(0.5)
            victim.send_signal(signal.SIGKILL)
            late.send_signal(signal.SIGCONT)

        inside = []
        killer = threading.Thread(target=kill)
        killer.start()
        outcome = live.outcome(EP)
        killer.join()
    assert inside == [True]
    assert outcome.verdict == "error"
    assert outcome.reason == f"{name} rank 1 of 2 (pid {victim.pid}) was killed by SIGKILL"
    assert exit_code([outcome]) == 3
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_rank_whose_import_never_ends_did_not_start_in_time(command, name):
    done = command.run(
        str(EP), "--frameworks", name, "--jax-processes",
        **{FAULT: f"hangs:{name}", "PARITY_START_SECONDS": "15"},
    )  # fmt: skip
    assert done.returncode == 3
    outcome = json.loads((command.folder / "out" / "results.jsonl").read_text().splitlines()[1])
    assert outcome["verdict"] == "error"
    assert f"{name} rank 1 of 2 (pid " in outcome["reason"]
    assert f"did not start within 15 s ({name} rank 0 of 2 waited in a collective)" in outcome["reason"]
    assert "PARITY_START_SECONDS gives it longer" in outcome["reason"]
    assert "find_spec" in outcome["metrics"]["log_tail"]  # where it hangs
    assert command.living() == []


def test_a_busy_port_is_the_cause_though_jax_crashes_on_it(command):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = command.run(str(EP), "--frameworks", "jax", "--jax-processes", **{FAULT: f"port:{port}"})
    assert done.returncode == 3
    assert "error: jax rank 0 of 2 cannot start: a port is taken by another program" in done.stderr
    assert str(port) in done.stderr
    assert command.living() == []


def test_a_library_that_is_not_there_ends_the_command_before_any_rank_is_started(command):
    # a GPU as far as the command can see
    tool = command.folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 9.0, 580.1'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    (command.folder / "site" / "jax_cuda12_plugin").mkdir()
    done = command.run(
        "--platform", "gpu", "--ranks-per-gpu", "4", "--nccl-library", "/nowhere/libnccl.so.2",
        PATH=f"{command.folder}{os.pathsep}{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="0",
    )  # fmt: skip
    assert done.returncode == 3
    assert "error: --nccl-library '/nowhere/libnccl.so.2' cannot be used: there is no such file" in done.stderr
    assert "pip install" in done.stderr
    assert not (command.folder / "out").exists()
    assert command.living() == []


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf"])
def test_a_time_to_start_that_is_none_is_refused(command, text):
    done = command.run("dp1.tp1/local/f32/t3.d8.f8/e4.k2", PARITY_START_SECONDS=text)
    assert done.returncode == 3
    assert f"PARITY_START_SECONDS={text!r}: it must be seconds, more than 0" in done.stderr
    assert command.living() == []
