"""The process of one rank (or of several, where a framework drives all its devices from one process).

Started by `parity.launch`, it reads requests and writes messages as JSON lines on two inherited pipes; its standard
output and error go to a log. It dies with the process that started it, however that one dies.

    request   {"type": "run", "id": 3, "case": ID, "arrays": {name: ArrayRef}, "out": folder, "mutation": name or null,
               "lessons": {name: ArrayRef} or null}
              {"type": "rendezvous", "value": text}
    message   {"type": "rendezvous" | "ready" | "started" | "finished" | "failed" | "spent" | "heartbeat", ...}
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import faulthandler
import gc
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from parity import backends
from parity.arrays import ArrayRef
from parity.backends import contract
from parity.backends.base import Backend, Member, Options
from parity.case import Case
from parity.causes import cause

HEARTBEAT_SECONDS = 0.5
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
PR_SET_PDEATHSIG = 1


class Channel:
    """Both pipes: a thread reads requests into a queue, and any thread may send."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._in = os.fdopen(read_fd, "r", encoding="utf-8")
        self._out = write_fd
        self._lock = threading.Lock()
        self._requests: queue.Queue[dict] = queue.Queue()
        threading.Thread(target=self._read, name="requests", daemon=True).start()

    def _read(self) -> None:
        for line in self._in:
            self._requests.put(json.loads(line))
        # The other end is gone, so nobody waits for this process any more, whatever it is doing.
        os._exit(0)

    def send(self, kind: str, **values: object) -> None:
        data = (json.dumps({"type": kind, **values}) + "\n").encode()
        with self._lock:
            while data:
                data = data[os.write(self._out, data) :]

    def next(self) -> dict:
        return self._requests.get()

    def rendezvous(self) -> str:
        request = self.next()
        if request["type"] != "rendezvous":
            raise RuntimeError(f"expected the rendezvous of process 0, got a request of type {request['type']!r}")
        return request["value"]

    def keep_alive(self) -> None:
        """Send a heartbeat for as long as the process runs: one that is stopped or wedged falls silent."""

        def beat() -> None:
            while True:
                with contextlib.suppress(BrokenPipeError):
                    self.send("heartbeat")
                time.sleep(HEARTBEAT_SECONDS)

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()


def die_with_parent() -> None:
    """Ask the kernel for a SIGKILL when the parent dies. Elsewhere than on Linux the closed pipe does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def log(text: str) -> None:
    """Write to the log; a disk without room for it must not be the end of a rank."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def release_memory() -> None:
    """Give freed memory back to the system, so that workers of other cases have room."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def planted(backend: Backend, mutation: str | None) -> Iterator[None]:
    """Hold a planted bug in place for one case."""
    if mutation is None:
        yield
        return
    from parity.mutations import planter

    with planter(backend.name)(mutation):
        yield


def serve(backend: Backend, request: dict, channel: Channel) -> None:
    """Run one case and save its results; report what happened either way."""
    number, began = request["id"], time.monotonic()
    log(f"--- case {request['case']}" + (f" with {request['mutation']} planted" if request["mutation"] else ""))
    channel.send("started", id=number)
    try:
        case = Case.parse(request["case"])
        arrays = {name: ArrayRef.from_json(ref) for name, ref in request["arrays"].items()}
        with planted(backend, request["mutation"]):
            if request.get("lessons") is None:
                answer = backend.run(case, arrays)
            else:
                lessons = {name: ArrayRef.from_json(ref) for name, ref in request["lessons"].items()}
                answer = backend.run(case, arrays, lessons)
        results = contract.check(case, answer, backend.blame_layer)
        for rank, result in results.items():
            result.save(Path(request["out"]), rank)
        channel.send("finished", id=number, ranks=sorted(results), seconds=time.monotonic() - began)
    except Exception as error:
        report_failure(channel, number, error)
    results = answer = arrays = None
    release_memory()
    if backend.release():
        channel.send("spent", id=number)


def report_failure(channel: Channel, number: int, error: BaseException) -> None:
    """Send an exception to the command, and its traceback to the log too."""
    text = "".join(traceback.format_exception(error))
    log(text)
    lines = traceback.format_exception_only(error)[-1].strip().splitlines()
    if lines and (why := cause(" ".join(lines))):
        lines[0] = f"{why} ({lines[0]})"
    storage = isinstance(error, OSError) and error.errno in STORAGE_ERRORS
    channel.send(
        "failed",
        id=number,
        error=lines[0] if lines else repr(error),
        answer=str(error) if isinstance(error, contract.AnswerError) else None,
        traceback=text,
        storage=storage,
    )


def main(argv: list[str] | None = None) -> int:
    """Serve cases until the pipe closes."""
    parser = argparse.ArgumentParser(prog="parity.worker", description="a rank; started by parity, not by hand")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--options", type=json.loads, required=True)
    parser.add_argument("--read", type=int, required=True)
    parser.add_argument("--write", type=int, required=True)
    parser.add_argument("--place", type=json.loads, default={}, help="fields of Member, if hosts differ")
    args = parser.parse_args(argv)

    die_with_parent()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(args.read, args.write)
    channel.keep_alive()
    try:
        options = Options(**args.options)
        backend = backends.load(args.backend, options)
        versions = backend.setup(
            Member(
                index=args.index,
                processes=args.processes,
                options=options,
                publish=lambda value: channel.send("rendezvous", value=value),
                receive=channel.rendezvous,
                **args.place,
            )
        )
    except Exception as error:
        report_failure(channel, 0, error)
        return 3
    channel.send("ready", versions=versions)
    while True:
        request = channel.next()
        if request["type"] == "run":
            serve(backend, request, channel)


if __name__ == "__main__":
    sys.exit(main())
