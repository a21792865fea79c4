"""Worker processes: start them, keep them, ask them, and say which one is to blame when something goes wrong.

A `Pool` is the processes of one backend that serve a case together. They live on between cases; after any error the
whole pool is killed, since a rank that failed leaves the others inside a collective, and started anew when needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from parity.arrays import ArrayRef
from parity.backends.base import Backend
from parity.backends.contract import ranks_fault
from parity.case import Case
from parity.causes import cause

START_SECONDS = 180.0
"""Importing a framework on a cold, busy machine."""
START_VARIABLE = "PARITY_START_SECONDS"
"""Says how long instead: a file system that many hosts share may need longer."""
GRACE_SECONDS = 1.0
"""After the first sign of trouble, how long to listen for the others: a killed rank's peers may complain first."""
SILENT_SECONDS = 5.0
"""Without a heartbeat for this long, a process is stopped or wedged."""
TAIL_LINES = 30


class RankError(Exception):
    """A rank died, hung, raised or gave no answer: the case is an error, and the run goes on."""

    def __init__(self, kind: str, reason: str, ranks: str, log: Path, tail: str) -> None:
        super().__init__(reason)
        self.kind = kind
        """"died", "hung", "raised", or "answered": with something that cannot be judged."""
        self.reason = reason
        self.ranks = ranks
        self.log = log
        self.tail = tail


class InfrastructureError(Exception):
    """Nothing can run: workers cannot start, or there is no room to write. The message says how to mend it."""


class Process(Protocol):
    """What is asked of a worker's process, on this host or another."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...


@dataclass
class Worker:
    """One process, as the command sees it."""

    index: int
    process: Process
    read_fd: int
    write_fd: int
    log: Path
    state: str = "starting"
    """"starting", "ready", "busy", "finished" or "failed"."""
    heard: float = field(default_factory=time.monotonic)
    ranks: list[int] = field(default_factory=list)
    """The ranks it answered for."""
    failure: dict | None = None
    failed_at: float = 0.0
    closed: bool = False
    buffer: bytes = b""
    log_start: int = 0
    """Where in the log the present case begins."""
    spent: bool = False
    """Whether it holds so much of a device's memory that it had better end."""

    @property
    def dead(self) -> bool:
        return self.process.poll() is not None


class Pool:
    """The processes of one backend that serve cases together."""

    def __init__(self, backend: Backend, processes: int, environment: Mapping[str, str], log_dir: Path) -> None:
        self.backend = backend
        self.processes = processes
        self.environment = dict(environment)
        self.log_dir = log_dir
        self.workers: list[Worker] = []
        self.versions: dict[str, str] = {}
        self.world = processes
        """Ranks of the present case; more than processes where one process holds several."""
        self._selector = selectors.DefaultSelector()
        self._request = 0
        self._case: Case | None = None
        self._submitted = 0.0

    # Life.
    def spawn(self) -> None:
        """Start the processes, without waiting for them."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        for index in range(self.processes):
            self.workers.append(self._spawn(index))
            self._selector.register(self.workers[-1].read_fd, selectors.EVENT_READ, self.workers[-1])

    def _spawn(self, index: int) -> Worker:
        log = self._log(index)
        process, read_fd, write_fd = start(
            self.backend.name, index, self.processes, asdict(self.backend.options), self.environment, log
        )
        os.set_blocking(read_fd, False)
        return Worker(index, process, read_fd, write_fd, log, log_start=log.stat().st_size)

    def _log(self, index: int) -> Path:
        return self.log_dir / f"{self.backend.name}-{self.processes}-rank{index}.log"

    def close(self) -> None:
        """Kill every process and wait until it is gone."""
        workers, self.workers = self.workers, []
        for worker in workers:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.process.pid, signal.SIGKILL)
        for worker in workers:
            worker.process.wait()
            with contextlib.suppress(KeyError):
                self._selector.unregister(worker.read_fd)
            for fd in (worker.read_fd, worker.write_fd):
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._selector.close()

    def wait_ready(self) -> None:
        """Wait until every process has set up its framework and found the others.

        Raises:
          InfrastructureError: a process cannot set up.
          RankError: a process died or hung on the way.
        """
        limit = start_seconds()
        deadline = time.monotonic() + limit
        while any(worker.state == "starting" for worker in self.workers):
            self._pump(0.1)
            self._check(deadline, "starting", limit)

    def idle_dead(self) -> list[Worker]:
        """Processes that died between cases."""
        return [worker for worker in self.workers if worker.dead]

    @property
    def spent(self) -> bool:
        """Whether an idle process has said that it holds too much memory to be kept."""
        if self.busy or not self.ready:
            return False
        self._pump(0)
        return any(worker.spent for worker in self.workers)

    @property
    def ready(self) -> bool:
        """Whether every process has set up."""
        return bool(self.workers) and all(worker.state != "starting" for worker in self.workers)

    @property
    def busy(self) -> bool:
        """Whether a submitted case is not finished."""
        return any(worker.state == "busy" for worker in self.workers)

    @property
    def troubled(self) -> bool:
        """Whether a process is dead or has failed."""
        return any(worker.failure or worker.closed or worker.dead for worker in self.workers)

    # A case.
    def submit(
        self,
        case: Case,
        arrays: Mapping[str, ArrayRef],
        out: Path,
        mutation: str | None = None,
        lessons: Mapping[str, ArrayRef] | None = None,
    ) -> None:
        """Ask every process for a case; `collect` waits for it."""
        self.wait_ready()
        self._request += 1
        self.world, self._case = case.world, case
        request = {
            "type": "run",
            "id": self._request,
            "case": str(case),
            "arrays": {name: ref.to_json() for name, ref in arrays.items()},
            "out": str(out),
            "mutation": mutation,
            "lessons": None if lessons is None else {name: ref.to_json() for name, ref in lessons.items()},
        }
        self._submitted = time.monotonic()
        for worker in self.workers:
            worker.state, worker.log_start, worker.heard = "busy", worker.log.stat().st_size, time.monotonic()
        for worker in self.workers:
            self._send(worker, request)

    def collect(self, timeout: float) -> float:
        """Wait for the submitted case.

        Args:
          timeout: seconds the case may take, counted from `submit`.

        Returns:
          Seconds the slowest process took.

        Raises:
          RankError: a rank died, hung, raised or gave no answer.
          InfrastructureError: a rank found no room to write its results.
        """
        deadline = self._submitted + timeout
        while self.busy:
            self._pump(0.1)
            self._check(deadline, "busy", timeout)
        assert self._case is not None
        if fault := ranks_fault(self._case, [rank for worker in self.workers for rank in worker.ranks]):
            raise self._no_answer(self.workers[0], fault)
        return self.seconds

    seconds: float = 0.0

    def _send(self, worker: Worker, message: dict) -> None:
        data = (json.dumps(message) + "\n").encode()
        with contextlib.suppress(BrokenPipeError):  # a dead process is found, and named, by _check
            while data:
                data = data[os.write(worker.write_fd, data) :]

    def _pump(self, timeout: float) -> None:
        """Read whatever the processes have sent, waiting up to `timeout` for something."""
        for key, _ in self._selector.select(timeout):
            worker: Worker = key.data
            try:
                chunk = os.read(worker.read_fd, 1 << 16)
            except BlockingIOError:
                continue
            if not chunk:
                worker.closed = True
                self._selector.unregister(worker.read_fd)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(GRACE_SECONDS)
                continue
            worker.heard = time.monotonic()
            *lines, worker.buffer = (worker.buffer + chunk).split(b"\n")
            for line in lines:
                self._handle(worker, json.loads(line))

    def _handle(self, worker: Worker, message: dict) -> None:
        kind = message["type"]
        if kind == "ready":
            worker.state = "ready"
            self.versions.update(message["versions"])
        elif kind == "rendezvous":
            for other in self.workers:
                if other is not worker:
                    self._send(other, message)
        elif kind == "finished" and message["id"] == self._request:
            worker.state, worker.ranks = "finished", message["ranks"]
            self.seconds = message["seconds"]
        elif kind == "spent":
            worker.spent = True
        elif kind == "failed":
            worker.state, worker.failure, worker.failed_at = "failed", message, time.monotonic()

    # Blame.
    def _check(self, deadline: float, waiting: str, limit: float) -> None:
        """Raise if a process is dead or failed, or time is up."""
        troubled = [w for w in self.workers if w.failure or w.dead or w.closed]
        if troubled:
            grace = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < grace and not all(w.closed or w.failure for w in self.workers):
                self._pump(0.05)
                if any(w.dead for w in self.workers):
                    break
            raise self._blame_trouble()
        late = [w for w in self.workers if w.state == waiting]
        # all may have finished in time, while it was another pool that was waited for
        if late and time.monotonic() > deadline:
            raise self._blame_hang(late, limit)

    def _blame_trouble(self) -> Exception:
        """A killed process first: the complaints of its peers are its doing. Else the first that reported."""
        failed = sorted((w for w in self.workers if w.failure), key=lambda w: w.failed_at)
        dead = [w for w in self.workers if (w.dead or w.closed) and not w.failure]
        if dead:
            worker = dead[0]
            code = worker.process.poll()
            # a framework may crash rather than raise, and its log then has the reason
            why = cause(self.tail(worker)) if worker.state == "starting" else None
            if worker.state == "starting" and code is not None and (code > 0 or why):
                return self._cannot_start(worker, f"{why} ({_ending(code)})" if why else _ending(code))
            phase = " while starting" if worker.state == "starting" else ""
            return self._error("died", dead, f"{_ending(code)}{phase}")
        worker = failed[0]
        assert worker.failure is not None
        if worker.failure["storage"]:
            return InfrastructureError(f"no room for the results of {self._name([worker])}: {worker.failure['error']}")
        if worker.failure["id"] == 0:
            return self._cannot_start(worker, worker.failure["error"])
        if worker.failure["answer"]:
            return self._no_answer(worker, worker.failure["answer"])
        return self._error("raised", [worker], f"raised {worker.failure['error']}")

    def _no_answer(self, worker: Worker, fault: str) -> RankError:
        reason = f"backend {self.backend.name!r} gave no answer that can be judged: {fault}"
        return RankError("answered", reason, self._name([worker]), worker.log, self.tail(worker))

    def _cannot_start(self, worker: Worker, why: str) -> InfrastructureError:
        return InfrastructureError(
            f"{self._name([worker])} cannot start: {why}\nend of its log {worker.log}:\n{self.tail(worker)}"
        )

    def _blame_hang(self, late: Sequence[Worker], limit: float) -> RankError:
        """A silent process first, then one that is not inside a collective, then all that have not finished."""
        now = time.monotonic()
        silent = [w for w in late if now - w.heard > min(SILENT_SECONDS, max(1.5, limit / 2))]
        for worker in late:
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)  # for the stacks to reach the logs
        if silent:
            return self._error("hung", silent, f"stopped responding; the limit is {limit:g} s")
        marks = self.backend.collective_frames
        outside = [w for w in late if not any(mark in _main_stack(self.tail(w, 400)) for mark in marks)]
        guilty = outside if outside and len(outside) < len(late) else late
        others = f" ({self._name([w for w in late if w not in guilty])} waited in a collective)" if outside and len(
            outside
        ) < len(late) else ""  # fmt: skip
        if guilty[0].state == "starting":
            others += f" ({START_VARIABLE} gives it longer)"
            return self._error("hung", guilty, f"did not start within {limit:g} s{others}")
        return self._error("hung", guilty, f"did not finish within {limit:g} s{others}")

    def _error(self, kind: str, workers: Sequence[Worker], what: str) -> RankError:
        name = self._name(workers)
        pid = f" (pid {workers[0].process.pid})" if len(workers) == 1 else ""
        return RankError(kind, f"{name}{pid} {what}", name, workers[0].log, self.tail(workers[0]))

    def _name(self, workers: Sequence[Worker]) -> str:
        """Which ranks, in words."""
        if self.processes == 1 and self.world > 1:
            return f"{self.backend.name} ranks 0-{self.world - 1} (one process)"
        ranks = ", ".join(str(w.index) for w in workers)
        return f"{self.backend.name} rank{'s' * (len(workers) > 1)} {ranks} of {self.processes}"

    def tail(self, worker: Worker, lines: int = TAIL_LINES) -> str:
        """The end of a worker's log, of the present case only."""
        try:
            with open(worker.log, "rb") as file:
                file.seek(worker.log_start)
                text = file.read().decode(errors="replace")
        except OSError as error:
            return f"(its log cannot be read: {error})"
        return "\n".join(text.splitlines()[-lines:]) or "(nothing was logged)"


class Pools:
    """Every living pool, by what its processes can be shared for. A context manager: leaving it kills them all."""

    def __init__(self, log_dir: Path, make: Callable[[Backend, int, Mapping[str, str], Path], Pool] = Pool) -> None:
        self.log_dir = log_dir
        self.versions: dict[str, str] = {}
        self._make = make
        self._pools: dict[tuple, Pool] = {}

    def get(self, backend: Backend, case: Case) -> Pool:
        """A pool for the case: a living one, or one just spawned and not waited for."""
        environment = backend.environment(case)
        key = (backend.name, backend.processes(case), tuple(sorted(environment.items())))
        for other in list(self._pools.values()):
            if other.spent:
                self.drop(other)
        pool = self._pools.get(key)
        if pool is not None and pool.idle_dead():
            self.drop(pool)
            pool = None
        if pool is None:
            pool = self._pools[key] = self._make(backend, key[1], environment, self.log_dir)
            try:
                pool.spawn()
            except OSError as error:
                self.drop(pool)
                raise InfrastructureError(f"cannot start {backend.name} workers: {error}") from error
        return pool

    def drop(self, pool: Pool) -> None:
        """Kill a pool; the next case that needs it starts another."""
        self.versions.update(pool.versions)
        pool.close()
        self._pools = {key: other for key, other in self._pools.items() if other is not pool}

    def close(self) -> None:
        for pool in list(self._pools.values()):
            self.drop(pool)

    def all_versions(self) -> dict[str, str]:
        """Package versions, as the workers reported them."""
        out = dict(self.versions)
        for pool in self._pools.values():
            out.update(pool.versions)
        return out

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start(
    backend: str,
    index: int,
    processes: int,
    options: Mapping[str, object],
    environment: Mapping[str, str],
    log: Path,
    place: Mapping[str, object] | None = None,
) -> tuple[subprocess.Popen, int, int]:
    """Start one worker.

    Args:
      backend: its name.
      index: of this process among `processes`.
      options: the fields of `Options`.
      environment: the backend's variables.
      log: where its output goes, at the end of what is there.
      place: fields of `Member` that say where it and process 0 are, if they may be on different hosts.

    Returns:
      The process, and the pipes to read its messages from and to write requests to.
    """
    child_read, parent_write = os.pipe()
    parent_read, child_write = os.pipe()
    command = [sys.executable, "-m", "parity.worker", "--backend", backend, "--index", str(index)]
    command += ["--processes", str(processes), "--options", json.dumps(options)]
    command += ["--read", str(child_read), "--write", str(child_write)]
    command += ["--place", json.dumps(place)] if place else []
    try:
        with open(log, "ab") as log_file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                pass_fds=(child_read, child_write),
                env=worker_environment(environment),
                start_new_session=True,  # Ctrl-C in the terminal is for the command alone
            )
    except BaseException:
        os.close(parent_read)
        os.close(parent_write)
        raise
    finally:
        os.close(child_read)
        os.close(child_write)
    return process, parent_read, parent_write


def start_seconds() -> float:
    """How long a process may take to import its framework and to find the others.

    Raises:
      InfrastructureError: the environment variable holds no positive number.
    """
    text = os.environ.get(START_VARIABLE, "")
    try:
        seconds = float(text) if text else START_SECONDS
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InfrastructureError(f"{START_VARIABLE}={text!r}: it must be seconds, more than 0")
    return seconds


def worker_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The command's environment, with `parity` importable and the backend's variables on top."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": root + (os.pathsep + path if path else ""),
        "PYTHONUNBUFFERED": "1",  # a log must not lose its end when a process is killed
        "PYTHONFAULTHANDLER": "1",
        **extra,
    }


def _ending(code: int | None) -> str:
    if code is None:
        return "closed its pipe without a word"
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"exited with status {code}"


def _main_stack(text: str) -> str:
    """The main thread's part of the last stack dump in a log: faulthandler prints the current thread last."""
    return text.rpartition("Current thread")[2] or text.rpartition("Thread 0x")[2]
