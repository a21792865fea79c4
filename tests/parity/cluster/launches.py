"""Launches of `parity worker` for tests: each "host" has a folder of its own to work in and for temporary files."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "JOB_COMPLETION_INDEX", "PARITY_TOKEN")
MARK = "PARITY_TEST_LAUNCH"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Launch:
    """Processes of one launch; what they print goes to files."""

    def __init__(self, folder):
        self.folder, self.mark, self.port = folder, uuid.uuid4().hex, free_port()
        self.processes, self.logs = [], []
        self.out = folder / "out"

    def environment(self, host, **more):
        (self.folder / host / "tmp").mkdir(parents=True, exist_ok=True)
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        kept = {k: v for k, v in os.environ.items() if k not in LAUNCHERS and not k.startswith("SLURM_")}
        return {**kept, MARK: self.mark, "TMPDIR": str(self.folder / host / "tmp"), "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(path), **more}  # fmt: skip

    def start(self, host, command, **more):
        """Start a process on a "host"; returns its number."""
        self.logs.append(self.folder / f"{host}-{len(self.logs)}.log")
        with open(self.logs[-1], "w") as log:
            self.processes.append(
                subprocess.Popen(
                    command, cwd=self.folder / host if (self.folder / host).exists() else self._made(host),
                    env=self.environment(host, **more), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                )
            )  # fmt: skip
        return len(self.processes) - 1

    def _made(self, host):
        (self.folder / host).mkdir()
        return self.folder / host

    def rank(self, number, ranks, *arguments, **more):
        """Start one rank, each on a host of its own, with variables as anyone would set them."""
        variables = {"RANK": str(number), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "-m", "parity", "worker", *arguments, "--port", str(self.port)]
        return self.start(f"host{number}", [*command, "--out", str(self.out)], **{**variables, **more})

    def said(self, number):
        return self.logs[number].read_text()

    def end(self, seconds=60.0):
        """Wait for all; returns their exit statuses."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def until(self, what, seconds=60.0):
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline, [self.said(i) for i in range(len(self.logs))]
            time.sleep(0.05)
        return found

    def living(self):
        """Every process of the launch, also those that its processes have started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def left_behind(self):
        """Processes and temporary files that outlive the launch."""
        with contextlib.suppress(AssertionError):
            self.until(lambda: not self.living(), 5.0)
        return [p.cmdline() for p in self.living()] + [str(p) for p in self.folder.glob("host*/tmp/moe-parity-*")]

    def close(self):
        for process in [*self.living(), *self.processes]:
            with contextlib.suppress(psutil.Error, OSError):
                process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()


@pytest.fixture
def launch(tmp_path):
    one = Launch(tmp_path)
    yield one
    one.close()
