"""`parity worker` as launchers start it: ranks on two "hosts" on loopback, and what can go wrong with one."""

import json
import os
import signal
import socket
import sys
import threading
from collections import Counter

import pytest

from parity.cluster import wire
from parity.cluster.wire import RefusedError, Wire, WireError, greet, versions
from tests.parity import plugin as trouble
from tests.parity.cluster.launches import launch as launch
from tests.parity.plugin import case_id
from tests.parity.plugin import plugin as plugin

FINE = case_id(1)
JAX_AND_TORCH = ("dp2.tp2.ep/allgather/bf16/t5-2.d16.f16/e8.k2", "dp2.tp1.ep/ragged/f32/t3.d16.f16/e4.k2")


@pytest.fixture
def pair(launch, plugin):
    """Starts ranks 0 and 1 of the backend that needs no framework."""

    def run(*arguments, zero=None, one=None):
        arguments = ["--frameworks", "fake", *arguments]
        launch.rank(0, 2, *arguments, **(zero or {}))
        launch.rank(1, 2, *arguments, **(one or {}))
        return launch

    return run


@pytest.fixture
def played(launch, plugin):
    """Starts rank 0, and connects as rank 1 by hand."""
    connections = []

    def run(*arguments, **about):
        launch.rank(0, 2, "--frameworks", "fake", *arguments, PARITY_TOKEN="t")
        sock = launch.until(lambda: _try_to_connect(launch.port))
        connections.append(Wire(sock))
        facts = {"rank": 1, "ranks": 2, "local_rank": 0, "host": "elsewhere", "pid": 5, "versions": versions()}
        greet(connections[-1], "t", {**facts, **about})
        return launch, connections[-1]

    yield run
    for each in connections:
        each.close()


def _try_to_connect(port):
    try:
        return socket.create_connection(("127.0.0.1", port), timeout=30)
    except OSError:
        return None


def verdicts(launch):
    lines = (launch.out / "results.jsonl").read_text().splitlines()[1:]
    return {outcome["case"]: outcome["verdict"] for outcome in map(json.loads, lines)}


def summary(launch):
    return json.loads((launch.out / "summary.json").read_text())


# What passes.
# The one test of the whole: two launchers, four agents, eight workers. Most of its time is imports.
def test_two_launchers_of_torchrun_with_two_ranks_each_run_both_frameworks(launch):
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)]
        command += ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(launch.port)]
        command += ["--no-python", sys.executable, "-m", "parity", "worker", *JAX_AND_TORCH, "--out", str(launch.out)]
        launch.start(f"host{node}", command)
    assert launch.end(300) == [0, 0], launch.said(0) + launch.said(1)
    assert verdicts(launch) == dict.fromkeys(JAX_AND_TORCH, "pass")
    assert summary(launch)["platform"]["launched"] == {
        "ranks": 4, "by": "RANK", "hosts": {socket.gethostname(): [0, 1, 2, 3]},
    }  # fmt: skip
    assert {"jax", "torch"} <= set(summary(launch)["versions"])
    # every rank has its process of each framework
    logs = Counter(path.name.split("-")[0] for path in (launch.out / "logs").glob("*-4-rank*.log"))
    assert logs == {"jax": 4, "torch": 4}
    assert launch.left_behind() == []


def test_tasks_of_a_slurm_step_run_what_they_are_enough_for_and_a_stranger_at_the_door_harms_nothing(launch, plugin):
    cases = [FINE, case_id(2, dp=1), case_id(3, dp=3), case_id(trouble.WRONG)]
    for task in range(2):
        variables = {"SLURM_PROCID": str(task), "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
        variables |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_NODELIST": "elsewhere[1-2]"}
        command = [sys.executable, "-m", "parity", "worker", *cases, "--port", str(launch.port), "--frameworks", "fake"]
        launch.start(f"host{task}", [*command, "--out", str(launch.out)], **variables)
        if task == 0:
            with launch.until(lambda: _try_to_connect(launch.port)) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: rank0\r\n\r\n")
    # a failure of the layer is every rank's exit status
    assert launch.end() == [1, 1], launch.said(0) + launch.said(1)
    assert list(verdicts(launch).values()).count("pass") == 2
    assert verdicts(launch)[case_id(3, dp=3)] == "skip"
    assert verdicts(launch)[case_id(trouble.WRONG)] == "fail"
    assert "3 ranks are needed; 2 were launched" in launch.said(0)
    assert summary(launch)["platform"]["launched"]["by"] == "SLURM_PROCID"
    assert launch.left_behind() == []


@pytest.mark.slow  # frameworks are imported once more; that they run at all the test of torchrun shows
def test_tasks_of_a_slurm_step_run_both_frameworks(launch):
    for task in range(2):
        variables = {"SLURM_PROCID": str(task), "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
        command = [sys.executable, "-m", "parity", "worker", *JAX_AND_TORCH, "--port", str(launch.port)]
        launch.start(f"host{task}", [*command, "--out", str(launch.out)], **variables, SLURM_JOB_NODELIST="localhost")
    assert launch.end(300) == [0, 0], launch.said(0) + launch.said(1)
    assert verdicts(launch) == {JAX_AND_TORCH[0]: "skip", JAX_AND_TORCH[1]: "pass"}
    assert launch.left_behind() == []


# Ranks in trouble.
def test_a_killed_worker_is_its_cases_error_with_rank_host_and_log_and_the_run_goes_on(pair):
    launch = pair(case_id(trouble.KILLED), FINE, case_id(trouble.HANGS), "--timeout", "6")
    assert launch.end() == [3, 3], launch.said(0)
    assert verdicts(launch)[FINE] == "pass"
    said = launch.said(0)
    assert f"fake rank 1 of 2 on {socket.gethostname()} (pid " in said
    assert "was killed by SIGKILL" in said
    assert "last words" in said  # the end of a log that another host has
    assert "did not finish within 6 s" in said
    assert "in trouble" in said  # the stack of the function that sleeps, asked for by a signal
    assert launch.left_behind() == []


@pytest.mark.parametrize(
    ("number", "cause"),
    [(signal.SIGKILL, "is gone: the connection was closed"), (signal.SIGTERM, "was told to end (SIGTERM)")],
    ids=["killed", "told to end"],
)
def test_a_rank_whose_launched_process_ends_ends_the_run(pair, number, cause):
    launch = pair(case_id(trouble.HANGS))
    launch.until(lambda: "case dp2" in _read(launch.out / "logs" / "fake-2-rank1.log"))
    os.kill(launch.processes[1].pid, number)
    assert launch.end()[0] == 3
    assert f"error: rank 1 on {socket.gethostname()} (pid {launch.processes[1].pid})" in launch.said(0)
    assert cause in launch.said(0)
    if number == signal.SIGTERM:
        assert launch.left_behind() == []
    assert not launch.living()


def test_when_rank_zero_is_killed_the_others_end(pair):
    launch = pair(case_id(trouble.HANGS))
    launch.until(lambda: "case dp2" in _read(launch.out / "logs" / "fake-2-rank1.log"))
    launch.processes[0].kill()
    assert launch.end()[1] == 3
    assert f"rank 0 at 127.0.0.1:{launch.port} is gone before the run's end" in launch.said(1)
    launch.until(lambda: not launch.living(), 10)


def _read(path):
    return path.read_text() if path.exists() else ""


# Ranks that do not fit together.
def test_a_rank_with_another_token_is_refused_and_the_run_ends_for_want_of_it(pair):
    launch = pair(FINE, "--wait", "8", zero={"PARITY_TOKEN": "one"}, one={"PARITY_TOKEN": "two"})
    assert launch.end() == [3, 3]
    assert "rank 1: rank 0 at 127.0.0.1" in launch.said(1)
    assert "refused this rank: the tokens differ" in launch.said(1)
    said = launch.said(0)
    assert f"rank 1 of 2 did not connect to 127.0.0.1:{launch.port} within 8 s; a connection from 127.0.0.1" in said
    assert not launch.out.exists()
    assert launch.left_behind() == []


def test_two_processes_with_one_rank_end_the_run(launch, plugin):
    for _ in range(2):
        launch.rank(1, 3, FINE)
    launch.rank(0, 3, FINE)
    assert launch.end() == [3, 3, 3]
    assert "two processes say that they are rank 1" in launch.said(2)
    assert any("rank 0 ended the run" in launch.said(i) for i in range(2))
    assert launch.left_behind() == []


def test_a_rank_that_finds_nobody_says_where_it_looked(launch):
    launch.rank(1, 2, FINE, "--wait", "1")
    assert launch.end() == [3]
    assert f"rank 0 did not answer at 127.0.0.1:{launch.port} within 1 s: Connection refused" in launch.said(0)


def test_a_busy_port_is_named_with_what_to_do(launch, plugin):
    with socket.socket() as other:
        other.bind(("127.0.0.1", launch.port))
        other.listen()
        launch.rank(0, 1, FINE)
        assert launch.end() == [3]
    assert f"rank 0 cannot listen at 127.0.0.1:{launch.port}: the port is taken by another program" in launch.said(0)


def test_an_address_of_another_host_is_named_with_what_to_do(launch, plugin):
    launch.rank(0, 1, FINE, MASTER_ADDR="192.0.2.1", PARITY_TOKEN="t")
    assert launch.end() == [3]
    assert "that is no address of this host; give one with --bind" in launch.said(0)


@pytest.mark.parametrize(
    ("about", "cause"),
    [
        ({"versions": {**versions(), "numpy": "1.0"}}, "versions differ: numpy is 1.0 there and "),
        ({"ranks": 4}, "it was started as one of 4 ranks, rank 0 as one of 2"),
    ],
    ids=["versions", "ranks"],
)
def test_a_rank_that_would_compute_something_else_is_refused(played, launch, about, cause):
    with pytest.raises(RefusedError, match=cause):
        played(FINE, **about)
    assert launch.end() == [3]
    assert f"error: rank 1 on elsewhere: {cause}" in launch.said(0)


def test_a_host_that_makes_other_arrays_is_named(played):
    launch, rank_one = played(FINE)
    rank_one.keep_alive()
    finished = threading.Thread(target=_answer, args=(rank_one, {"x": "00"}))
    finished.start()
    assert launch.end() == [3]
    finished.join()
    assert "error: rank 1 on elsewhere (pid 5) made another array 'experts.gate_up' of case dp2" in launch.said(0)


def _answer(rank_one, digests):
    """What an agent says of a worker that starts, and of arrays that it makes."""
    try:
        while True:
            message, _ = rank_one.receive()
            if message["type"] == "start":
                rank_one.send("spawned", child=message["child"], pid=6)
                ready = {"type": "ready", "versions": {}}
                rank_one.send("message", child=message["child"], message=ready)
            elif message["type"] == "prepare":
                rank_one.send("prepared", case=message["case"], digests=digests)
            elif message["type"] == "kill":
                rank_one.send("exited", child=message["child"], code=-9)
            elif message["type"] == "bye":
                return
    except WireError:
        return


def test_the_beat_is_much_faster_than_silence_is_taken_for_the_end():
    assert 5 * wire.BEAT_SECONDS < wire.SILENT_SECONDS


def test_outside_of_a_launch_the_command_says_how_to_start_it(launch):
    launch.start("host0", [sys.executable, "-m", "parity", "worker", FINE])
    assert launch.end() == [2]
    assert "RANK is not set: start this command under torchrun, srun or with RANK" in launch.said(0)
