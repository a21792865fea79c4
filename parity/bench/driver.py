"""Runs the candidates, one process at a time, and makes a row of whatever becomes of each job."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from parity.bench.catalog import Entry
from parity.bench.floors import Rates
from parity.bench.shapes import Shape

START_SECONDS = 180.0
"""Importing a framework and measuring two rates, on a cold machine."""
STUCK_SECONDS = 600
"""XLA ends a process whose host devices wait longer than 40 s for each other; a busy machine may be that slow."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What holds for all jobs."""

    platform: str = "cpu"
    repeat: int = 10
    limit: float = 120.0
    """Seconds a job may take, compiling and all."""
    budget: float = float("inf")
    """Seconds after which no further job is begun."""
    peers: tuple[Path, ...] = ()
    devices: int = 1
    """Host devices of JAX on a CPU."""
    rated: bool = True
    """Whether the device's own rates are measured first; floors are made of them."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row to be."""

    entry: Entry
    what: str
    shape: Shape
    parallel: str = ""
    """Of a mesh: its part of a case id."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """Goes into the row as it is."""


@dataclass
class Run:
    """Everything that came out."""

    rows: list[dict] = field(default_factory=list)
    rates: dict[str, Rates] = field(default_factory=dict)
    """By candidate, as its process saw them before its first job: a card slows down as it gets hot."""
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def best(self) -> Rates | None:
        """What floors are made from: the best of any process."""
        rates = list(self.rates.values())
        best = rates[0] if rates else None
        for other in rates[1:]:
            best = other.better(best) if best else other
        return best


class Broken(Exception):
    """A candidate's process is gone, or was ended: the message says why."""


class Process:
    """A candidate's process."""

    def __init__(self, entry: Entry, options: Options, log: IO[bytes]) -> None:
        command = [sys.executable, "-m", "parity.bench.worker", "--module", entry.module]
        command += ["--lab", entry.lab, "--platform", options.platform]
        command += ["--unrated"] * (not options.rated)
        for folder in options.peers:
            command += ["--peers", str(folder)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment(entry.framework, options),
            start_new_session=True,  # whatever it starts goes with it
        )
        self._buffer = b""

    def ask(self, job: dict, seconds: float) -> dict:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(job) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Broken(self._end()) from None
        return self.listen(seconds)

    def listen(self, seconds: float) -> dict:
        """The next answer.

        Raises:
          Broken: the process died, or said nothing for this long; it is gone then.
        """
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                self.close()
                raise Broken(f"stopped after {seconds:.0f} s")
            if select.select([self._process.stdout], [], [], min(left, 0.5))[0]:
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    raise Broken(self._end())
                self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def _end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self.close()
        code = self._process.returncode
        if code is not None and code < 0:
            return f"its process died of {signal.Signals(-code).name}"
        return f"its process ended with status {code}"

    def close(self) -> None:
        """End it and everything that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def environment(framework: str, options: Options) -> dict[str, str]:
    """The worker's: this one's, with the device chosen and this parity found first."""
    root = str(Path(__file__).resolve().parents[2])
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [root, found.get("PYTHONPATH")]))
    if framework == "torch":
        return found
    if options.platform == "gpu":
        return found | {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    flags = f"{found.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={options.devices}"
    if options.devices > 1:
        flags += f" --xla_cpu_collective_call_terminate_timeout_seconds={STUCK_SECONDS}"
    return found | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}


def run(jobs: Sequence[Job], options: Options, log_path: Path, watch: Callable[[dict], None], out: Run) -> None:
    """Do all jobs, candidate by candidate; never raises for what a candidate does.

    Args:
      jobs: those of a candidate together, those of a model together.
      options: for all of them.
      log_path: what the processes print.
      watch: called with each new row.
      out: gets one row a job as they come, so that it is of use when the run is interrupted. A row's "status" is "ok",
        "wrong" (the reference says otherwise), "memory", "failed", "stopped", "absent" or "not run"; all but the first
        two have a "reason".
    """
    began = time.monotonic()

    def add(job: Job, **values: object) -> None:
        row = {"candidate": job.entry.name, "what": job.what, "name": job.shape.name, "shape": asdict(job.shape)}
        row |= {"parallel": job.parallel} if job.parallel else {}
        row |= {**job.extra, **values}
        out.rows.append(row)
        watch(row)

    with open(log_path, "ab") as log:
        for entry, mine in _by_entry(jobs):
            if reason := entry.missing(options.platform, options.peers):
                for job in mine:
                    add(job, status="absent", reason=reason)
                continue
            process: Process | None = None
            dead = ""
            try:
                for job in mine:
                    if time.monotonic() - began > options.budget:
                        add(job, status="not run", reason="no time was left")
                        continue
                    if not dead and process is None:
                        process, dead = _start(entry, options, log, out)
                    if process is None:
                        add(job, status="failed", reason=dead)
                        continue
                    request = {"what": job.what, "shape": asdict(job.shape), "repeat": options.repeat}
                    if job.parallel:
                        request |= {"parallel": job.parallel}
                    started = time.monotonic()
                    try:
                        answer = process.ask(request, options.limit)
                        add(job, **answer, seconds=round(time.monotonic() - started, 2))
                    except Broken as error:
                        process = None
                        stopped = str(error).startswith("stopped")
                        add(job, status="stopped" if stopped else "failed", reason=str(error))
            finally:
                if process is not None:
                    process.close()


def _start(entry: Entry, options: Options, log: IO[bytes], out: Run) -> tuple[Process | None, str]:
    """A process that is ready, or why there is none."""
    process = Process(entry, options, log)
    try:
        first = process.listen(START_SECONDS)
    except Broken as error:
        return None, f"could not start: {error}"
    except BaseException:
        process.close()
        raise
    if "failed" in first:
        process.close()
        return None, f"could not start: {first['failed']}"
    out.versions[entry.name] = first["ready"]["versions"]
    if first["ready"]["rates"]:
        out.rates.setdefault(entry.name, Rates(**first["ready"]["rates"]))
    return process, ""


def _by_entry(jobs: Sequence[Job]) -> Iterator[tuple[Entry, list[Job]]]:
    for entry in dict.fromkeys(job.entry for job in jobs):
        yield entry, [job for job in jobs if job.entry == entry]
