"""Rank 0's side: wait for the agents of all ranks, start workers through them, and tell when one is gone."""

from __future__ import annotations

import contextlib
import errno
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from parity.arrays import ArrayRef
from parity.backends.base import Backend
from parity.case import Case
from parity.cluster import agent
from parity.cluster.files import Digests
from parity.cluster.place import Place
from parity.cluster.wire import RefusedError, Wire, WireError, refuse, versions, welcome
from parity.launch import InfrastructureError, Pool, RankError, Worker

GREETING_SECONDS = 10.0
PREPARE_SECONDS = 900.0
"""Making a large case's arrays, on a host whose ranks all do it."""
END_SECONDS = 10.0
LESSONS_KEPT = 2
LOST = 255
"""The exit status that stands for one that nobody knows."""


@dataclass
class Link:
    """The agent of one rank."""

    wire: Wire
    rank: int
    local_rank: int
    host: str
    pid: int
    lost: str | None = None
    """Why it is gone."""
    trouble: str | None = None
    """What it says is wrong on its host."""
    prepared: str | None = None
    """The case whose arrays it has."""
    lessons: list[int] = field(default_factory=list)
    replies: queue.Queue[dict | None] = field(default_factory=queue.Queue)
    workers: dict[int, tuple[ClusterPool, Worker]] = field(default_factory=dict)
    reader: threading.Thread | None = None

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    def send(self, kind: str, blob: bytes = b"", **values: object) -> None:
        """Send, unless it is gone; the reader says so when it is."""
        with contextlib.suppress(WireError):
            self.wire.send(kind, blob, **values)


class RemoteProcess:
    """A worker's process, wherever its agent runs it."""

    def __init__(self, link: Link, number: int) -> None:
        self.link, self.number, self.pid = link, number, 0
        self._code: int | None = None
        self._ended = threading.Event()

    def poll(self) -> int | None:
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"worker {self.number}", timeout or 0.0)
        assert self._code is not None
        return self._code

    def send_signal(self, sig: int) -> None:
        self.link.send("signal", child=self.number, number=sig)

    def ended(self, code: int) -> None:
        if self._code is None:
            self._code = code
            self._ended.set()


class ClusterPool(Pool):
    """The workers of one backend, each started by the agent of its rank."""

    def __init__(
        self, head: Head, backend: Backend, processes: int, environment: Mapping[str, str], log_dir: Path
    ) -> None:
        super().__init__(backend, processes, environment, log_dir)
        self.head = head
        self.out: Path | None = None
        self.inbox: queue.Queue[tuple[Worker, dict | None]] = queue.Queue()
        """What workers sent; None: one ended."""
        self._lessons: int | None = None

    def _spawn(self, index: int) -> Worker:
        log = self._log(index)
        log.touch()
        link = self.head.links[index]
        process = RemoteProcess(link, self.head.number())
        worker = Worker(index, process, -1, -1, log, log_start=log.stat().st_size)
        link.workers[process.number] = (self, worker)
        link.send(
            "start",
            child=process.number,
            backend=self.backend.name,
            index=index,
            processes=self.processes,
            options=asdict(self.backend.options),
            environment=self.environment,
            address=self.head.address,
        )
        return worker

    def spawn(self) -> None:
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self.workers = [self._spawn(index) for index in range(self.processes)]

    def close(self) -> None:
        workers, self.workers = self.workers, []
        for worker in workers:
            process = self._process(worker)
            process.link.send("kill", child=process.number)
        deadline = time.monotonic() + END_SECONDS
        for worker in workers:
            process = self._process(worker)
            if process.link.lost is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
            process.link.workers.pop(process.number, None)
        self._selector.close()

    @staticmethod
    def _process(worker: Worker) -> RemoteProcess:
        assert isinstance(worker.process, RemoteProcess)
        return worker.process

    def submit(
        self,
        case: Case,
        arrays: Mapping[str, ArrayRef],
        out: Path,
        mutation: str | None = None,
        lessons: Mapping[str, ArrayRef] | None = None,
    ) -> None:
        self.wait_ready()
        # before the case's time begins
        self._lessons = self.head.prepare(case, arrays, lessons, range(self.processes))
        self.out = out
        super().submit(case, arrays, out, mutation, lessons)

    def _send(self, worker: Worker, message: dict) -> None:
        if message["type"] == "run":  # its files lie elsewhere on each host
            message = {**message, "arrays": None, "out": None, "lessons": self._lessons}
        process = self._process(worker)
        process.link.send("request", child=process.number, message=message)

    def _pump(self, timeout: float) -> None:
        try:
            worker, message = self.inbox.get(timeout=timeout) if timeout else self.inbox.get_nowait()
            while True:
                if message is None:
                    worker.closed = True
                else:
                    self._handle(worker, message)
                worker, message = self.inbox.get_nowait()
        except queue.Empty:
            pass

    def keep_result(self, worker: Worker, request: int, rank: int, data: bytes) -> None:
        """Write a rank's result where a worker of this host would have; called from a link's thread."""
        if self.out is None or request != self._request or not 0 <= rank < self.world:
            return
        try:
            (self.out / f"rank{int(rank)}.npz").write_bytes(data)
        except OSError as error:
            failure = {"type": "failed", "id": request, "error": str(error), "answer": None, "storage": True}
            self.inbox.put((worker, failure))

    def _check(self, deadline: float, waiting: str, limit: float) -> None:
        self.head.check()
        super()._check(deadline, waiting, limit)

    def _blame_trouble(self) -> Exception:
        # a host that is gone takes its workers along, and their peers complain
        self.head.check()
        return super()._blame_trouble()

    def _error(self, kind: str, workers: Sequence[Worker], what: str) -> RankError:
        time.sleep(0.2)  # for the ends of their logs to arrive
        return super()._error(kind, workers, what)

    def _name(self, workers: Sequence[Worker]) -> str:
        hosts = dict.fromkeys(self._process(worker).link.host for worker in workers)
        return f"{super()._name(workers)} on {', '.join(hosts)}"


class Head:
    """Every agent of a launch. A context manager: leaving it ends them all.

    Args:
      place: of rank 0.
      bind: the address to listen on, if it is not that of `place.host`.
      seconds: how long the agents may take to come.
      say: called with words on what is waited for.
    """

    def __init__(self, place: Place, bind: str | None, seconds: float, say: Callable[[str], None]) -> None:
        self.place, self.bind, self.seconds, self.say = place, bind or place.host, seconds, say
        self.links: list[Link] = []
        self.status, self.reason = 3, ""
        self._own: subprocess.Popen | None = None
        self._numbers = 0
        self._digests = Digests()
        self._lesson_keys: dict[str, int] = {}

    def number(self) -> int:
        """A worker's number, never used before."""
        self._numbers += 1
        return self._numbers

    def pool(self, backend: Backend, processes: int, environment: Mapping[str, str], log_dir: Path) -> Pool:
        return ClusterPool(self, backend, processes, environment, log_dir)

    @property
    def address(self) -> str:
        """An address of this host that the last rank has reached it at."""
        return self.links[-1].wire.socket.getsockname()[0]

    def hosts(self) -> dict[str, list[int]]:
        """The ranks on each host."""
        out: dict[str, list[int]] = {}
        for link in self.links:
            out.setdefault(link.host, []).append(link.rank)
        return out

    # Coming together.
    def __enter__(self) -> Head:
        try:
            with self._listen() as server:
                self._own = agent.own(self.place, self.seconds)
                self._gather(server)
        except BaseException as error:
            self.reason = str(error)
            self.close()
            raise
        for link in self.links:
            link.reader = threading.Thread(target=self._read, args=(link,), name=f"rank {link.rank}", daemon=True)
            link.reader.start()
        return self

    def _listen(self) -> socket.socket:
        try:
            found = socket.getaddrinfo(self.bind, self.place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            return socket.create_server(found[0][4][:2], family=found[0][0], backlog=self.place.ranks)  # type: ignore
        except OSError as error:
            where, what = f"{self.bind}:{self.place.port}", error.strerror or str(error)
            if error.errno == errno.EADDRINUSE:
                what = "the port is taken by another program; give all ranks another with --port"
            elif error.errno == errno.EADDRNOTAVAIL:
                what = "that is no address of this host; give one with --bind (0.0.0.0 for all of them)"
            raise InfrastructureError(f"rank 0 cannot listen at {where}: {what}") from error

    def _gather(self, server: socket.socket) -> None:
        server.settimeout(0.1)
        come: queue.Queue[Link | InfrastructureError | str] = queue.Queue()
        refused: list[str] = []
        found: dict[int, Link] = {}
        deadline, told = time.monotonic() + self.seconds, time.monotonic() + 10
        assert self._own is not None
        while len(found) < self.place.ranks:
            with contextlib.suppress(TimeoutError):
                sock, peer = server.accept()
                threading.Thread(target=self._greet, args=(sock, peer[0], come), daemon=True).start()
            while not come.empty():
                each = come.get()
                if isinstance(each, Link) and each.rank in found:
                    other = found[each.rank]
                    each.send("bye", status=3, reason=f"{other.name} is there already")
                    each = InfrastructureError(f"two processes say that they are rank {each.rank}: {other.name} and "
                                               f"{each.name}; ranks must differ")  # fmt: skip
                if isinstance(each, InfrastructureError):
                    self.links = list(found.values())
                    raise each
                if isinstance(each, str):
                    refused.append(each)
                else:
                    found[each.rank] = each
            self.links = [found[rank] for rank in sorted(found)]
            missing = [rank for rank in range(self.place.ranks) if rank not in found]
            words = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {self.place.ranks}"
            if 0 in missing and self._own.poll() is not None:
                raise InfrastructureError(f"rank 0's own agent ended with status {self._own.returncode}")
            if missing and time.monotonic() > deadline:
                raise InfrastructureError(
                    f"{words} did not connect to {self.bind}:{self.place.port} within {self.seconds:g} s"
                    + "".join(f"; {text}" for text in dict.fromkeys(refused))
                )
            if missing and time.monotonic() > told:
                told = float("inf")
                self.say(f"waiting for {words} at {self.bind}:{self.place.port}")

    def _greet(self, sock: socket.socket, peer: str, come: queue.Queue) -> None:
        """Find out who has connected: one of the launch, one that spoils it, or a stranger."""
        sock.settimeout(GREETING_SECONDS)
        wire = Wire(sock)
        try:
            hello = welcome(wire, self.place.token)
        except (RefusedError, WireError) as error:
            wire.close()
            come.put(f"a connection from {peer} was refused: {error}")
            return
        try:
            name = f"rank {int(hello['rank'])} on {hello['host']}"
            self._agree(wire, name, hello)
            link = Link(wire, hello["rank"], hello["local_rank"], str(hello["host"]), hello["pid"])
            wire.send("welcome", proof=hello["answer"])
            wire.keep_alive()
            come.put(link)
        except RefusedError as error:
            come.put(InfrastructureError(f"{name}: {error}"))
        except (KeyError, TypeError, ValueError, WireError) as error:
            come.put(f"a connection from {peer} made no sense: {type(error).__name__}: {error}")

    def _agree(self, wire: Wire, name: str, hello: dict) -> None:
        """Refuse a rank that is none of this launch, or that would compute something else."""
        ranks, rank = hello["ranks"], hello["rank"]
        if ranks != self.place.ranks or not 0 <= rank < ranks:
            refuse(wire, f"it was started as one of {ranks} ranks, rank 0 as one of {self.place.ranks}")
        ours = versions()
        for package in sorted({*ours, *hello["versions"]}):
            here, there = ours.get(package), hello["versions"].get(package)
            if here != there:
                refuse(wire, f"versions differ: {package} is {there} there and {here} on rank 0's host")

    # Working.
    def _read(self, link: Link) -> None:
        """A link's thread: hand on what its agent sends, until it is gone."""
        try:
            while True:
                message, blob = link.wire.receive()
                self._receive(link, message, blob)
        except WireError as error:
            link.lost = str(error)
        except (KeyError, TypeError, ValueError) as error:
            link.lost = f"it sent what makes no sense: {type(error).__name__}: {error}"
        for pool, worker in list(link.workers.values()):
            assert isinstance(worker.process, RemoteProcess)
            worker.process.ended(LOST)
            pool.inbox.put((worker, None))
        link.replies.put(None)

    def _receive(self, link: Link, message: dict, blob: bytes) -> None:
        kind = message["type"]
        if kind == "prepared":
            link.replies.put(message)
        elif kind == "trouble":
            link.trouble = str(message["reason"])
            link.replies.put(None)
        if "child" not in message or message["child"] not in link.workers:
            return
        pool, worker = link.workers[message["child"]]
        assert isinstance(worker.process, RemoteProcess)
        worker.heard = time.monotonic()
        if kind == "spawned":
            worker.process.pid = message["pid"]
        elif kind == "message":
            if message["message"]["type"] != "heartbeat":
                pool.inbox.put((worker, message["message"]))
        elif kind == "log":
            with contextlib.suppress(OSError), open(worker.log, "ab") as file:
                file.write(blob)
        elif kind == "result":
            pool.keep_result(worker, message["id"], message["rank"], blob)
        elif kind == "exited":
            worker.process.ended(message["code"])
            pool.inbox.put((worker, None))

    def check(self) -> None:
        """Raise if an agent is gone or in trouble.

        Raises:
          InfrastructureError: naming the rank, its host and the cause.
        """
        for link in self.links:
            if link.trouble is not None:
                raise InfrastructureError(f"{link.name}: {link.trouble}")
        for link in self.links:
            if link.lost is not None:
                raise InfrastructureError(f"{link.name} is gone: {link.lost}")

    def prepare(
        self, case: Case, arrays: Mapping[str, ArrayRef], lessons: Mapping[str, ArrayRef] | None, ranks: Sequence[int]
    ) -> int | None:
        """Have agents make a case's arrays, hold them against this host's, and send the lessons.

        Returns:
          What the agents know the lessons by.

        Raises:
          InfrastructureError: an agent is gone, is in trouble, or has made other arrays.
        """
        links = [self.links[rank] for rank in ranks]
        new = [link for link in links if link.prepared != str(case)]
        for link in new:
            link.send("prepare", case=str(case))
        key = None if lessons is None else self._lesson_key(lessons)
        if key is not None:
            for link in links:
                self._teach(link, key, lessons or {})
        ours = self._digests.of(arrays) if new else {}
        deadline = time.monotonic() + PREPARE_SECONDS
        for link in new:
            try:
                reply = link.replies.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise InfrastructureError(
                    f"{link.name} did not make the arrays of case {case} within {PREPARE_SECONDS:g} s"
                ) from None
            self.check()
            assert reply is not None
            for name, digest in ours.items():
                if reply["digests"].get(name) != digest:
                    raise InfrastructureError(
                        f"{link.name} made another array {name!r} of case {case} than rank 0's host: the hosts' NumPy "
                        "or their processors' arithmetic differ"
                    )
            link.prepared = str(case)
        return key

    def _lesson_key(self, lessons: Mapping[str, ArrayRef]) -> int:
        folder = str(Path(next(iter(lessons.values())).path).parent) if lessons else ""
        return self._lesson_keys.setdefault(folder, len(self._lesson_keys) + 1)

    @staticmethod
    def _teach(link: Link, key: int, lessons: Mapping[str, ArrayRef]) -> None:
        if key in link.lessons:
            return
        for name, ref in lessons.items():
            data = Path(ref.path).read_bytes()
            link.send("lesson", data, key=key, name=name, dtype=ref.dtype, shape=list(ref.shape))
        link.lessons.append(key)
        while len(link.lessons) > LESSONS_KEPT:
            link.send("forget", key=link.lessons.pop(0))

    # The end.
    def close(self) -> None:
        """Send every agent home with the run's status, and wait until they are gone."""
        for link in self.links:
            link.send("bye", status=self.status, reason=self.reason)
        deadline = time.monotonic() + END_SECONDS
        for link in self.links:
            if link.reader is not None:
                link.reader.join(max(0.1, deadline - time.monotonic()))
            link.wire.close()
        if self._own is not None:
            if not any(link.rank == 0 for link in self.links):  # it has not come so far as to be told
                self._own.send_signal(signal.SIGTERM)
            try:
                self._own.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._own.send_signal(signal.SIGKILL)
                self._own.wait()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.reason = self.reason or str(error) or type(error).__name__
        self.close()
