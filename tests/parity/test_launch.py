"""Living pools, and who is to blame when one is in trouble."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from parity import backends, fixtures
from parity.backends.base import Options
from parity.case import Case
from parity.launch import InfrastructureError, Pools, RankError
from parity.results import RankResult
from tests.parity import plugin as trouble
from tests.parity.plugin import case_id
from tests.parity.plugin import plugin as plugin

FINE = 1


@pytest.fixture
def backend(plugin):
    return backends.load("fake", Options())


@pytest.fixture
def pools(tmp_path):
    with Pools(tmp_path / "logs") as living:
        yield living


@pytest.fixture
def ask(backend, pools, cache, tmp_path):
    """Submit a case with the given seed and collect it; returns the pool."""

    def run(seed, timeout=60.0, dp=2):
        case = Case.parse(case_id(seed, dp))
        out = tmp_path / "results"
        out.mkdir(exist_ok=True)
        pool = pools.get(backend, case)
        pool.submit(case, fixtures.build(case, cache), out)
        pool.collect(timeout)
        return pool

    return run


def test_workers_stay_alive_between_cases_and_write_one_result_a_rank(ask, tmp_path):
    first = ask(FINE)
    pids = [worker.process.pid for worker in first.workers]
    second = ask(FINE + 1)
    assert [worker.process.pid for worker in second.workers] == pids
    assert RankResult.load(tmp_path / "results", 1).y.shape[1] == 16
    assert first.versions["fake"] == "1.0"


def test_a_pool_of_another_size_is_another_pool(ask):
    assert ask(FINE).processes == 2
    assert ask(FINE, dp=3).processes == 3


def test_a_killed_rank_is_named_with_its_signal_and_the_end_of_its_log(ask):
    with pytest.raises(RankError, match=r"fake rank 1 of 2 \(pid \d+\) was killed by SIGKILL") as caught:
        ask(trouble.KILLED)
    assert caught.value.kind == "died"
    assert caught.value.tail.endswith("last words")


def test_a_rank_that_exits_is_named_with_its_status(ask):
    with pytest.raises(RankError, match=r"fake rank 1 of 2 .*exited with status 5"):
        ask(trouble.EXITS)


def test_a_rank_that_raises_is_named_with_the_last_line_and_its_traceback_is_in_the_log(ask):
    with pytest.raises(RankError, match=r"fake rank 1 of 2 .* raised ValueError: bad shard$") as caught:
        ask(trouble.RAISES)
    assert "Traceback" in caught.value.tail
    assert "about to raise" in caught.value.tail


def test_a_killed_rank_is_to_blame_and_not_the_peer_that_complained_first(ask):
    with pytest.raises(RankError, match=r"rank 1 of 2 .*SIGKILL"):
        ask(trouble.PEER_COMPLAINS)


def test_a_rank_that_hangs_is_named_and_its_stack_is_in_the_log(ask):
    with pytest.raises(RankError, match=r"fake rank 1 of 2 .*did not finish within 2 s") as caught:
        ask(trouble.HANGS, timeout=2.0)
    assert "in trouble" in caught.value.tail  # the function that sleeps


def test_ranks_that_wait_in_a_collective_are_not_blamed_for_a_hang(ask):
    with pytest.raises(RankError, match=r"rank 1 of 2 .*did not finish.*\(fake rank 0 of 2 waited in a collective\)"):
        ask(trouble.WAITS, timeout=2.0)


def test_a_stopped_rank_is_named(ask):
    with pytest.raises(RankError, match=r"fake rank 1 of 2 .*stopped responding"):
        ask(trouble.STOPPED, timeout=3.0)


def test_no_room_for_results_is_infrastructure(ask):
    with pytest.raises(InfrastructureError, match=r"no room for the results of fake rank 1 of 2: .*No space left"):
        ask(trouble.NO_SPACE)


def test_a_setup_that_raises_is_infrastructure_with_the_cause(ask, monkeypatch):
    monkeypatch.setenv("FAKE_SETUP", "raise")
    with pytest.raises(InfrastructureError, match=r"fake rank \d of 2 cannot start: RuntimeError: no such device"):
        ask(FINE)


def test_a_rank_killed_while_starting_is_named(ask, monkeypatch):
    monkeypatch.setenv("FAKE_SETUP", "die")
    with pytest.raises(RankError, match=r"fake rank 1 of 2 .*killed by SIGKILL while starting"):
        ask(FINE)


def test_a_pool_whose_rank_died_between_cases_is_started_anew(ask):
    victim = ask(FINE).workers[1].process
    victim.kill()
    victim.wait()
    assert ask(FINE + 1).workers[1].process.pid != victim.pid


def test_a_pool_that_holds_too_much_memory_is_started_anew(ask, pools, backend):
    spent = ask(trouble.HOLDS)
    pids = [worker.process.pid for worker in spent.workers]
    deadline = time.monotonic() + 10
    while not spent.spent and time.monotonic() < deadline:
        time.sleep(0.02)
    # any case's search for a pool finds it, also one that needs another
    pools.get(backend, Case.parse(case_id(FINE, dp=3)))
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert [worker.process.pid for worker in ask(FINE).workers] != pids


def test_a_pool_that_finished_while_another_was_waited_for_is_not_late(backend, pools, cache, tmp_path):
    case = Case.parse(case_id(FINE))
    pool = pools.get(backend, case)
    pool.submit(case, fixtures.build(case, cache), tmp_path)
    time.sleep(3)
    assert pool.collect(0.5) < 3


def test_closing_leaves_no_process(ask, pools):
    pids = [worker.process.pid for worker in ask(FINE).workers]
    pools.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


PARENT = """
import sys, time
from pathlib import Path
from parity import backends
from parity.backends.base import Options
from parity.case import Case
from parity.launch import Pools
from tests.parity.plugin import case_id
pools = Pools(Path(sys.argv[1]))
pool = pools.get(backends.load("fake", Options()), Case.parse(case_id(1)))
pool.wait_ready()
print(*(worker.process.pid for worker in pool.workers), flush=True)
time.sleep(600)
"""


def test_workers_die_with_a_parent_that_was_killed(plugin, tmp_path):
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ['PYTHONPATH']}"},
    )  # fmt: skip
    with parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
