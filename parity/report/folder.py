"""What a report is made from: the files of one results folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parity.records import (
    RESULTS,
    SELFTEST,
    SELFTEST_FORMAT,
    SELFTEST_VERSION,
    SUMMARY,
    Outcome,
    OutError,
    check_version,
    read,
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One results folder, read."""

    path: Path
    outcomes: Mapping[str, Outcome]
    """By case id, in the order they ran."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """`summary.json`; empty while a run goes on, or if it was killed."""
    selftest: Mapping[str, Any] | None = None
    """`selftest.json`, where `parity selftest --out` left one."""

    @property
    def ids(self) -> list[str]:
        """Every case: those with an outcome, then those that the last run left out."""
        left = self.summary.get("cases_not_run")
        left = [text for text in left if isinstance(text, str)] if isinstance(left, list) else []
        return [*self.outcomes, *(text for text in left if text not in self.outcomes)]


def load(path: Path) -> Run:
    """Read a results folder.

    Raises:
      OutError: it is none, has no results, or they are of another version.
    """
    results = path / RESULTS
    hint = "'parity run --out DIR' makes one"
    if not path.is_dir():
        raise OutError(f"{str(path)!r} is {'no folder' if path.exists() else 'not there'}; {hint}")
    if not results.is_file():
        raise OutError(f"{str(path)!r} has no {RESULTS}: it is no folder of results; {hint}")
    try:
        outcomes = read(results)
    except OSError as error:
        raise OutError(f"{str(results)!r} cannot be read: {error.strerror}") from error
    if not outcomes:
        raise OutError(f"{str(results)!r} has no result yet: no case has ended")
    selftest = _json(path / SELFTEST)
    if selftest is not None:
        check_version(selftest, SELFTEST_FORMAT, SELFTEST_VERSION, path / SELFTEST)
    return Run(path=path, outcomes=outcomes, summary=_json(path / SUMMARY) or {}, selftest=selftest)


def _json(path: Path) -> dict | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutError(f"{str(path)!r} cannot be read: {error}; remove it, or make it again") from error
    if not isinstance(data, dict):
        raise OutError(f"{str(path)!r} cannot be read: it holds no object; remove it, or make it again")
    return data
