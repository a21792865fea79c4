"""Join what several runs left into one folder: parts of a grid run side by side, or on several machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console

from parity import records, report
from parity.records import Folder, Outcome, OutError, counts, exit_code

SAME = ("versions", "platform")
"""Parts of a summary that should be equal in all runs; where they are not, the joined one says so."""


def main(folders: Sequence[Path], out: Path, console: Console) -> int:
    """Write the joined results and summary to `out`.

    Returns:
      The exit status that one run of everything would have had.

    Raises:
      OutError: a folder holds no results, or two hold different outcomes of one case.
    """
    outcomes: dict[str, Outcome] = {}
    summaries = []
    for folder in folders:
        if out.resolve() == folder.resolve():
            raise OutError(f"--out {str(out)!r} is one of the folders to join; give another")
        found = records.read(folder / records.RESULTS)
        if not found:
            raise OutError(f"{str(folder)!r} holds no results ({records.RESULTS})")
        for name, outcome in found.items():
            other = outcomes.setdefault(name, outcome)
            if other.verdict != outcome.verdict:
                raise OutError(f"case {name}: {other.verdict} in one folder, {outcome.verdict} in {str(folder)!r}")
        summaries.append(_read(folder / records.SUMMARY))
    with Folder(out, False, set(outcomes)) as joined:
        for outcome in outcomes.values():
            joined.add(outcome)
        joined.summarize(summary(outcomes, [known for known in summaries if known], folders))
    report.final_table(console, list(outcomes), outcomes, False)
    return exit_code(outcomes.values())


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def summary(outcomes: dict[str, Outcome], parts: Sequence[dict], folders: Sequence[Path]) -> dict:
    """One summary of several: counts anew, time from the first start to the last end, the commands of all."""
    timed = [(datetime.fromisoformat(part["finished"]), part["seconds"]) for part in parts if "finished" in part]
    ends, begins = [end for end, _ in timed], [end - timedelta(seconds=seconds) for end, seconds in timed]
    out = {
        "counts": counts(outcomes.values()),
        "cases": sum(part.get("cases", 0) for part in parts) or len(outcomes),
        "not_run": sum(part.get("not_run", 0) for part in parts),
        "cases_not_run": [text for part in parts for text in part.get("cases_not_run", []) if text not in outcomes],
        "exit_status": exit_code(outcomes.values()),
        "interrupted": any(part.get("interrupted") for part in parts),
        "trouble": "; ".join(part["trouble"] for part in parts if part.get("trouble")),
        "seconds": round((max(ends) - min(begins)).total_seconds(), 3) if ends else 0.0,
        "finished": (max(ends) if ends else datetime.now(UTC)).isoformat(timespec="seconds"),
        "parts": [
            {"folder": str(folder), **{key: part.get(key) for key in ("seconds", "cases", "command")}}
            for folder, part in zip(folders, parts, strict=False)
        ],
        "command": next((part["command"] for part in parts if "command" in part), []),
        "worst_margins": report.worst_margins(outcomes.values()),
    }
    for key in SAME:
        values = [part[key] for part in parts if key in part]
        out[key] = values[0] if values else {}
        if any(value != values[0] for value in values):
            out[f"{key}_differ"] = values
    return out
