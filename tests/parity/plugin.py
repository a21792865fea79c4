"""A backend that needs no framework, installed as others would install theirs: right by construction, or in trouble.

The case's seed says which trouble rank 1 is in; other seeds are right.
"""

import dataclasses
import errno
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from parity.backends.base import Backend
from parity.oracle import reference, teach
from tests.parity.simulated import simulate

RAISES, HANGS, KILLED, STOPPED, NO_SPACE, EXITS, PEER_COMPLAINS, WRONG, WAITS, HOLDS = range(901, 911)
SHOWS_STAGES = 911
NOTHING, SHORT, NOT_FINITE, NO_RANK, EVERY_RANK = range(921, 926)
NO_ANSWER = {
    NOTHING: "run returned None, expected a mapping of rank to RankResult",
    SHORT: "rank 1: y has shape (4, 16), expected (5 or more, 16)",
    NOT_FINITE: "rank 1: y is nan at row 3, column 2 (1 of 5 rows), expected finite values",
    NO_RANK: "no result for rank 1 of 2",
    EVERY_RANK: "more than one process answered for rank 0",
}
"""What rank 1 returns in place of an answer, and what is said of it."""


class FakeBackend(Backend):
    """Answers as the oracle does, rounded to the case's dtype."""

    name = "fake"
    collective_frames = ("plugin_collective",)
    seed = 0

    def setup(self, member):
        self.member = member
        if os.environ.get("FAKE_SETUP") == "raise":
            raise RuntimeError("no such device")
        if os.environ.get("FAKE_SETUP") == "die" and member.index == member.processes - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if member.index == 0:
            member.publish("here")
        else:
            assert member.receive() == "here"
        return {"fake": "1.0", "pid": str(os.getpid())}

    def release(self):
        return self.seed == HOLDS and self.member.index == 1

    def run(self, case, arrays, lessons=None):
        self.seed = case.flags.seed
        trouble(case.flags.seed, self.member.index)
        if lessons is not None and case.flags.seed == SHOWS_STAGES:
            with tempfile.TemporaryDirectory() as folder:
                results = simulate(case, teach(case, arrays, Path(folder))[0])
        else:
            results = simulate(case, reference(case, arrays))
        if case.flags.seed == WRONG:
            results[0].y[0] *= 1.1
        if self.member.index == 1 and case.flags.seed in NO_ANSWER:
            return no_answer(case.flags.seed, results)
        return {self.member.index: results[self.member.index]}


def no_answer(seed, results):
    result = results[1]
    poisoned = np.where((np.arange(7)[:, None] == 3) & (np.arange(16) == 2), np.nan, result.y)
    return {
        NOTHING: None,
        SHORT: {1: dataclasses.replace(result, y=result.y[:4])},
        NOT_FINITE: {1: dataclasses.replace(result, y=poisoned)},
        NO_RANK: {},
        EVERY_RANK: dict(enumerate(results)),
    }[seed]


def trouble(seed, rank):
    if seed == PEER_COMPLAINS and rank == 0:
        time.sleep(0.3)
        raise RuntimeError("connection closed by peer")
    if seed == WAITS and rank != 1:
        exec(compile("import time\ntime.sleep(600)", "plugin_collective.py", "exec"))
    if rank != 1:
        return
    if seed == RAISES:
        print("about to raise", flush=True)
        raise ValueError("bad shard\nsecond line")
    if seed in (HANGS, WAITS):
        time.sleep(600)
    if seed == KILLED:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == PEER_COMPLAINS:
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == STOPPED:
        os.kill(os.getpid(), signal.SIGSTOP)
    if seed == NO_SPACE:
        raise OSError(errno.ENOSPC, "No space left on device")
    if seed == EXITS:
        os._exit(5)


def case_id(seed, dp=2):
    return f"dp{dp}.tp1/local/f32/t5.d16.f16/e4.k2/seed{seed}"


@pytest.fixture
def plugin(tmp_path_factory, monkeypatch):
    """Installs the backend: a distribution on the path, of this process and of those it starts."""
    site = tmp_path_factory.mktemp("site")
    info = site / "fake_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[parity.backends]\nfake = tests.parity.plugin:FakeBackend\n")
    monkeypatch.syspath_prepend(str(site))
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", str(site) + (os.pathsep + before if before else ""))
    return site
