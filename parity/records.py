"""What a run leaves in its folder: `results.jsonl`, a header and one object a case as they come, and `summary.json`.

The header names the format and its version. It changes whenever an older reader would misread a line, or a newer one
an older line; a file of another version is refused, never guessed at. Files without a header are of version 1.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from parity.launch import InfrastructureError

VERDICTS = ("pass", "fail", "error", "skip")
RESULTS = "results.jsonl"
SUMMARY = "summary.json"
SELFTEST = "selftest.json"
FORMAT, VERSION = "parity-results", 2
SELFTEST_FORMAT, SELFTEST_VERSION = "parity-selftest", 1
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class OutError(ValueError):
    """A folder or file cannot be used as it is; the message says why."""


def package_version() -> str:
    try:
        return version_of("moe-parity")
    except PackageNotFoundError:
        return "0.1.0 (not installed)"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A case's line in `results.jsonl`."""

    case: str
    verdict: str
    """"pass", "fail", "error" or "skip"."""
    reason: str = ""
    metrics: dict = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict:
        return {
            "case": self.case,
            "verdict": self.verdict,
            "reason": self.reason,
            "metrics": plain(self.metrics),
            "seconds": round(self.seconds, 3),
        }


def plain(value: Any) -> Any:
    """A value as JSON has it: NumPy scalars as numbers, and null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> dict[str, Outcome]:
    """The outcomes in a results file by case, the last of each; a torn line (an interrupted write) is skipped.

    Raises:
      OutError: the file is of another version.
    """
    out: dict[str, Outcome] = {}
    headed = False
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                data = json.loads(line)
            except ValueError:
                continue
            if not isinstance(data, dict):
                continue
            if "format" in data:
                check_version(data, FORMAT, VERSION, path)
                headed = True
                continue
            try:
                outcome = Outcome(**{name: data[name] for name in ("case", "verdict", "reason", "metrics", "seconds")})
            except (KeyError, TypeError):
                continue
            if not headed:
                check_version({"format": FORMAT, "version": 1}, FORMAT, VERSION, path)
            if outcome.verdict in VERDICTS:
                out[outcome.case] = outcome
    return out


def check_version(header: Mapping[str, Any], expected: str, version: int, path: Path) -> None:
    """Refuse what another parity wrote.

    Raises:
      OutError: `header` names another format or version.
    """
    if header.get("format") != expected:
        raise OutError(f"{str(path)!r} is of format {header.get('format')!r}, not {expected!r}")
    if header.get("version") != version:
        raise OutError(
            f"{str(path)!r} is of version {header.get('version')!r} of the format {expected!r}; this parity "
            f"({package_version()}) reads and writes version {version}. Use the parity that wrote it, or run the cases "
            "again into another --out"
        )


class Folder:
    """The `--out` folder of one run, locked against another. A context manager.

    Raises:
      OutError: the folder cannot be made or written, another run is writing to it, or what it has cannot be resumed.
      InfrastructureError: no space is left.
    """

    def __init__(self, path: Path, resume: bool, cases: Collection[str]) -> None:
        self.path = path
        self.done: dict[str, Outcome] = {}
        """Outcomes of the cases asked for: those of earlier runs that stand, and those added since."""
        with _reporting(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "w")  # noqa: SIM115 - held until close
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise OutError(f"another run is writing to {str(path)!r}; wait for it or give another --out") from None
            results = path / RESULTS
            if resume:
                try:
                    earlier = read(results)
                except OutError:
                    self._lock.close()
                    raise
                # Errors are tried again. The file is written anew, so that it keeps one whole line a case.
                again = {name for name, outcome in earlier.items() if outcome.verdict == "error" and name in cases}
                kept = [outcome for name, outcome in earlier.items() if name not in again]
                self.done = {outcome.case: outcome for outcome in kept if outcome.case in cases}
                _replace(results, "".join([_header(), *map(_line, kept)]))
            else:
                if _holds_results(results):
                    os.replace(results, results.with_suffix(".previous.jsonl"))
                (path / SUMMARY).unlink(missing_ok=True)
            self._file = open(results, "a" if resume else "w", encoding="utf-8")  # noqa: SIM115 - held until close
            if not resume:
                self._file.write(_header())
                self._file.flush()

    def add(self, outcome: Outcome) -> None:
        """Append an outcome; it is on its way to the disk when this returns."""
        with _reporting(self.path):
            self._file.write(_line(outcome))
            self._file.flush()
        self.done[outcome.case] = outcome

    def summarize(self, summary: dict) -> None:
        """Write `summary.json`."""
        with _reporting(self.path):
            _replace(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._lock.close()


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in STORAGE_ERRORS:
            raise InfrastructureError(
                f"cannot write to {str(path)!r}: {error.strerror}; free some space or give another --out, "
                "then go on with --resume"
            ) from error
        raise OutError(f"--out {str(path)!r} cannot be written: {error.strerror}; give a folder") from error


def _replace(path: Path, text: str) -> None:
    """Write a file so that an interruption leaves the old one whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> None:
    """Make a folder for results, early enough to complain before a long run.

    Raises:
      OutError: it cannot be made.
      InfrastructureError: no space is left.
    """
    with _reporting(path):
        path.mkdir(parents=True, exist_ok=True)


def write_selftest(path: Path, data: Mapping[str, Any]) -> None:
    """Write `selftest.json` into a folder: what became of the planted bugs.

    Raises:
      OutError: it cannot be written.
      InfrastructureError: no space is left.
    """
    header = {"format": SELFTEST_FORMAT, "version": SELFTEST_VERSION, "parity": package_version()}
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    with _reporting(path):
        _replace(path / SELFTEST, json.dumps(plain({**header, "finished": finished, **data}), indent=1) + "\n")


def _holds_results(path: Path) -> bool:
    """Whether a results file, of whatever version, has more than a header."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        return any(line.strip() and not line.startswith('{"format"') for line in file)
    return False


def _header() -> str:
    return json.dumps({"format": FORMAT, "version": VERSION, "parity": package_version()}) + "\n"


def _line(outcome: Outcome) -> str:
    return json.dumps(outcome.to_json()) + "\n"


def counts(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many cases have each verdict."""
    out: dict[str, int] = {name: 0 for name in VERDICTS}  # noqa: C420 - the checker infers literals as keys
    for outcome in outcomes:
        out[outcome.verdict] += 1
    return out


def exit_code(outcomes: Collection[Outcome]) -> int:
    """0 all passed, 1 a parity failure, 3 an error, or nothing could be compared at all."""
    tally = counts(outcomes)
    if tally["fail"]:
        return 1
    return 3 if tally["error"] or not tally["pass"] else 0
