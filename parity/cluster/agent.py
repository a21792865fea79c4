"""The launched process of a rank: it starts the rank's workers, one a framework, and relays what they say to rank 0.

    from rank 0   start, kill, signal (a worker); lesson, forget; prepare (a case's arrays); request (to a worker); bye
    to rank 0     spawned, message, log, result, exited (a worker); prepared (digests); trouble (what this host lacks)

It ends when rank 0 says so or is gone, and its workers end with it, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from parity import fixtures
from parity.arrays import ArrayRef
from parity.backends import gpu
from parity.case import Case
from parity.cluster.files import Digests, Lessons
from parity.cluster.place import TOKEN, Place
from parity.cluster.wire import RefusedError, Wire, WireError, greet, versions
from parity.launch import InfrastructureError, start
from parity.runner import scratch_folder
from parity.signals import handled

CONNECT_SECONDS = 10.0
LOG_BYTES = 1 << 20
"""Of a worker's log that rank 0 hears of at a time; of more, the end."""
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class _EndedError(Exception):
    """A signal asked this process to end."""


@dataclass
class _Child:
    """A worker of this rank."""

    number: int
    process: subprocess.Popen
    read_fd: int
    write_fd: int
    log: Path
    out: Path
    thread: threading.Thread | None = None
    log_sent: int = 0


class Agent:
    """One rank's agent, once it is connected."""

    def __init__(self, wire: Wire, place: Place, scratch: Path) -> None:
        self.wire, self.place, self.scratch = wire, place, scratch
        self.lessons, self.digests = Lessons(scratch / "lessons"), Digests()
        self._children: dict[int, _Child] = {}
        self._case: str = ""
        self._arrays: dict[str, ArrayRef] = {}

    def serve(self) -> int:
        """Do what rank 0 asks until it says goodbye.

        Returns:
          The exit status of the run.

        Raises:
          WireError: rank 0 is gone.
        """
        while True:
            message, blob = self.wire.receive()
            kind = message.pop("type")
            if kind == "bye":
                if message["reason"]:
                    _say(f"rank {self.place.rank}: rank 0 ended the run: {message['reason']}")
                return message["status"]
            try:
                self._do(kind, message, blob)
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.wire.send("trouble", reason=f"cannot {kind}: {type(error).__name__}: {error}")

    def _do(self, kind: str, message: dict, blob: bytes) -> None:
        if kind == "start":
            self._start(**message)
        elif kind in ("kill", "signal"):
            self._signal(self._children[message["child"]], message.get("number", signal.SIGKILL))
        elif kind == "lesson":
            self.lessons.keep(message["key"], message["name"], message["dtype"], tuple(message["shape"]), blob)
        elif kind == "forget":
            self.lessons.forget(message["key"])
        elif kind == "prepare":
            self._case = message["case"]
            self._arrays = fixtures.build(Case.parse(self._case), self.scratch / "arrays")
            self.wire.send("prepared", case=self._case, digests=self.digests.of(self._arrays))
        elif kind == "request":
            self._request(self._children[message["child"]], message["message"])

    def _start(self, child: int, backend: str, index: int, processes: int, options: dict, environment: dict,
               address: str) -> None:  # fmt: skip
        """Start a worker. What differs from host to host is found out here."""
        library = options.get("nccl_library")
        if library and not Path(library).exists():
            raise OSError(f"there is no {library!r} here; --nccl-library must lead to it on every host")
        log, out = self.scratch / f"{backend}-{child}.log", self.scratch / f"results-{child}"
        place = {"address": address, "local_index": self._local_index(options)}
        process, read_fd, write_fd = start(
            backend, index, processes, options, {**self._interfaces(), **environment}, log, place
        )
        made = self._children[child] = _Child(child, process, read_fd, write_fd, log, out)
        self.wire.send("spawned", child=child, pid=process.pid)
        made.thread = threading.Thread(target=self._relay, args=(made,), name=f"relay {backend}", daemon=True)
        made.thread.start()

    def _local_index(self, options: dict) -> int:
        # some launchers show each of their processes its own GPU alone
        alone = options.get("platform") == "gpu" and gpu.count() == 1 and options.get("ranks_per_gpu") == 1
        return 0 if alone else self.place.local_rank

    def _interfaces(self) -> dict[str, str]:
        """The network interface by which rank 0 is reached; collectives would else guess one."""
        own = self.wire.socket.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(each.address.partition("%")[0] == own for each in addresses):
                return {variable: os.environ.get(variable, name) for variable in INTERFACES}
        return {}

    def _signal(self, child: _Child, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if number == signal.SIGKILL:
                os.killpg(child.process.pid, number)
            else:
                child.process.send_signal(number)

    def _request(self, child: _Child, message: dict) -> None:
        if message["type"] == "run":
            if message["case"] != self._case:
                raise ValueError(f"case {message['case']} was not prepared")
            shutil.rmtree(child.out, ignore_errors=True)
            child.out.mkdir()
            lessons = self.lessons.refs(message["lessons"])
            message |= {
                "arrays": {name: ref.to_json() for name, ref in self._arrays.items()},
                "lessons": None if lessons is None else {name: ref.to_json() for name, ref in lessons.items()},
                "out": str(child.out),
            }
        data = (json.dumps(message) + "\n").encode()
        with contextlib.suppress(BrokenPipeError):  # that it is dead its relay tells
            while data:
                data = data[os.write(child.write_fd, data) :]

    # One thread a worker.
    def _relay(self, child: _Child) -> None:
        """Send on what a worker says and logs, until it ends."""
        buffer = b""
        with contextlib.suppress(WireError):  # rank 0 is gone: the main thread ends it all
            while True:
                ready, _, _ = select.select([child.read_fd], [], [], 0.2)
                chunk = os.read(child.read_fd, 1 << 16) if ready else None
                self._send_log(child)  # first, so that what is said of it finds it there
                if chunk == b"":
                    break
                *lines, buffer = (buffer + (chunk or b"")).split(b"\n")
                for line in lines:
                    self._forward(child, json.loads(line))
            try:
                code = child.process.wait(1.0)
            except subprocess.TimeoutExpired:
                self._signal(child, signal.SIGKILL)
                code = child.process.wait()
            self._send_log(child)
            self.wire.send("exited", child=child.number, code=code)

    def _forward(self, child: _Child, message: dict) -> None:
        if message["type"] == "finished":
            for rank in message["ranks"]:
                path = child.out / f"rank{rank}.npz"
                try:
                    data = path.read_bytes()
                    path.unlink()
                except OSError as error:
                    self.wire.send("trouble", reason=f"the result of rank {rank} cannot be read: {error}")
                    return
                self.wire.send("result", data, child=child.number, id=message["id"], rank=rank)
        self.wire.send("message", child=child.number, message=message)

    def _send_log(self, child: _Child) -> None:
        with contextlib.suppress(OSError), open(child.log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == child.log_sent:
                return
            file.seek(max(child.log_sent, size - LOG_BYTES))
            data = file.read(LOG_BYTES)
            child.log_sent = file.tell()
            self.wire.send("log", data, child=child.number)

    def close(self) -> None:
        """Kill the workers and wait until they are gone."""
        for child in self._children.values():
            self._signal(child, signal.SIGKILL)
        for child in self._children.values():
            child.process.wait()
            if child.thread is not None:
                child.thread.join(5.0)
            for fd in (child.read_fd, child.write_fd):
                with contextlib.suppress(OSError):
                    os.close(fd)


def connect(place: Place, seconds: float) -> Wire:
    """Connect to rank 0, which may be started later than this rank.

    Raises:
      InfrastructureError: it does not answer in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return Wire(socket.create_connection((place.host, place.port), timeout=CONNECT_SECONDS))
        except OSError as error:  # refused, or a name that is not known yet
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"rank {place.rank}: rank 0 did not answer at {place.where} within {seconds:g} s: "
                    f"{error.strerror or error}"
                ) from error
            time.sleep(0.2)


def main(place: Place, seconds: float) -> int:
    """Be the agent of a rank until the run ends.

    Args:
      place: which rank, and where rank 0 is.
      seconds: how long rank 0 may take to answer.

    Returns:
      The exit status of the run.

    Raises:
      InfrastructureError: rank 0 does not answer, refuses this rank, or is gone before the run's end.
    """
    wire = connect(place, seconds)
    try:
        # in this order: a signal that comes between would leave the folder behind
        with _signals(), scratch_folder() as scratch:
            return _serve(wire, place, scratch)
    except RefusedError as error:
        raise InfrastructureError(f"rank {place.rank}: rank 0 at {place.where} refused this rank: {error}") from None
    except WireError as error:
        raise InfrastructureError(
            f"rank {place.rank}: rank 0 at {place.where} is gone before the run's end: {error}"
        ) from None
    except _EndedError as error:
        with contextlib.suppress(WireError):
            wire.send("trouble", reason=f"was told to end ({error})")
        raise InfrastructureError(f"rank {place.rank}: {error}") from None
    finally:
        wire.close()


def _serve(wire: Wire, place: Place, scratch: Path) -> int:
    greet(
        wire,
        place.token,
        {
            "rank": place.rank,
            "ranks": place.ranks,
            "local_rank": place.local_rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "versions": versions(),
        },
    )
    wire.keep_alive()
    agent = Agent(wire, place, scratch)
    try:
        return agent.serve()
    finally:
        agent.close()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let the signals by which launchers end a process end this one in order: workers killed, scratch removed."""

    def end(number: int, _: object) -> None:
        raise _EndedError(signal.Signals(number).name)

    with handled((signal.SIGTERM, signal.SIGHUP, signal.SIGINT), end):
        yield


def own(place: Place, seconds: float) -> subprocess.Popen:
    """Start the agent of rank 0, beside the command."""
    said = {name: value for name, value in asdict(place).items() if name != "token"}
    return subprocess.Popen(
        [sys.executable, "-m", "parity.cluster.agent", json.dumps({**said, "seconds": seconds})],
        env={**os.environ, TOKEN: place.token, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    from parity.worker import die_with_parent

    die_with_parent()
    values = json.loads(sys.argv[1])
    limit = values.pop("seconds")
    try:
        sys.exit(main(Place(**values, token=os.environ[TOKEN]), limit))
    except InfrastructureError as fault:
        # the command, which started this, tells what there is to tell
        sys.exit(3 if "gone before" in str(fault) else str(fault))
