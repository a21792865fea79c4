"""What an agent finds out on its own host, and what it keeps of what rank 0 sends."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import asdict

import numpy as np
import pytest

from parity import runner, signals
from parity.arrays import ArrayRef
from parity.backends import gpu
from parity.backends.base import Member, Options
from parity.backends.jax import JaxBackend
from parity.backends.torch import TorchBackend
from parity.case import Case
from parity.cluster import agent as agents
from parity.cluster.agent import Agent
from parity.cluster.files import Digests, Lessons
from parity.cluster.place import Place
from parity.cluster.wire import Wire
from parity.launch import InfrastructureError

PLACE = Place(rank=5, ranks=8, local_rank=1, host="127.0.0.1", port=1, token="t")
FOUR = Case.parse("dp2.tp2.ep/allgather/bf16/t7.d64.f48/e8.k2")


@pytest.fixture
def agent(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        wire = Wire(socket.create_connection(server.getsockname()))
        yield Agent(wire, PLACE, tmp_path)
        wire.close()


def test_collectives_take_the_interface_by_which_rank_zero_is_reached(agent, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert agent._interfaces() == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib0"}


def test_backends_leave_the_interface_to_the_agent_and_refuse_what_too_few_were_launched_for(monkeypatch):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    for cls in (JaxBackend, TorchBackend):
        for platform in ("cpu", "gpu"):
            backend = cls(Options(platform=platform, launched=4, jax_processes=True))
            assert not [name for name in backend.environment(FOUR) if "SOCKET_IFNAME" in name]
            # the GPUs of rank 0's host say nothing of the others'
            assert backend.unsupported(FOUR) is None
            few = cls(Options(platform=platform, launched=3, jax_processes=True))
            assert few.unsupported(FOUR) == "4 ranks are needed; 3 were launched"


@pytest.mark.parametrize(("gpus", "sharing", "device"), [(4, 1, 1), (1, 1, 0), (1, 4, 0), (2, 1, 1)])
def test_a_rank_works_on_its_hosts_gpu_or_on_the_only_one_it_is_shown(agent, monkeypatch, gpus, sharing, device):
    monkeypatch.setattr(gpu, "count", lambda: gpus)
    options = Options(platform="gpu", ranks_per_gpu=sharing)
    local = agent._local_index(asdict(options))
    member = Member(index=5, processes=8, options=options, publish=print, receive=str, local_index=local)
    assert member.device_index == device


def test_a_library_that_this_host_lacks_is_refused_by_its_path(agent):
    options = asdict(Options(nccl_library="/nowhere/libnccl.so.2"))
    with pytest.raises(OSError, match=r"there is no '/nowhere/libnccl.so.2' here; --nccl-library must lead to it"):
        agent._start(1, "torch", 5, 8, options, {}, "127.0.0.1")


def test_closing_an_agent_kills_its_workers(agent):
    environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    agent._start(1, "torch", 5, 8, asdict(Options()), environment, "127.0.0.1")
    process = agent._children[1].process
    assert isinstance(process, subprocess.Popen)
    assert process.poll() is None
    agent.close()
    assert process.poll() == -9


def test_lessons_are_arrays_again_and_a_name_cannot_lead_out_of_their_folder(tmp_path):
    lessons, values = Lessons(tmp_path), np.arange(6, dtype=np.float32).reshape(2, 3)
    lessons.keep(1, "logits", "float32", (2, 3), values.tobytes())
    assert np.array_equal(lessons.refs(1)["logits"].open(), values)
    for name in ("../logits", "/tmp/logits", ""):
        with pytest.raises(ValueError, match="is no name of a lesson"):
            lessons.keep(1, name, "float32", (2, 3), values.tobytes())
    lessons.forget(1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert lessons.refs(None) is None


def test_a_digest_changes_with_a_bit_with_the_shape_and_with_the_dtype(tmp_path):
    values = np.arange(6, dtype=np.float32)
    found = set()
    for number, (stored, dtype, shape) in enumerate(
        [(values, "float32", (2, 3)), (values, "float32", (3, 2)), (values, "int32", (2, 3)),
         (np.nextafter(values, 9), "float32", (2, 3))]
    ):  # fmt: skip
        path = tmp_path / str(number)
        stored.astype(np.float32).tofile(path)
        found.add(Digests().of({"x": ArrayRef(str(path), dtype, shape)})["x"])
    assert len(found) == 4


def test_a_signal_that_comes_while_the_scratch_folder_is_made_leaves_nothing(monkeypatch, tmp_path):
    class Silent:
        def send(self, *_, **__):
            pass

        close = send

    @contextlib.contextmanager
    def interrupted():
        with runner.scratch_folder() as path:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # the signal is handled before this ends
            yield path

    def unhandled(*_):
        raise AssertionError("nobody handled the signal")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(agents, "connect", lambda *_: Silent())
    monkeypatch.setattr(agents, "scratch_folder", interrupted)
    with signals.handled((signal.SIGTERM,), unhandled), pytest.raises(InfrastructureError, match="rank 0: SIGTERM"):
        agents.main(Place(rank=0, ranks=1, local_rank=0, host="127.0.0.1", port=1, token=""), 1.0)
    assert list(tmp_path.iterdir()) == []
