"""Print the page of a run for docs/results/: date, machine, versions, counts, worst margins, seconds, command.

    python docs/results_page.py "vLLM grid, one H100, four ranks" parity-out [DIR ...] > docs/results/NAME.md

Each DIR is the `--out` folder of a `parity run`, or of a `parity merge`; several are sections of one page.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from parity import records
from parity.records import Outcome
from parity.report.grid import grid, margin

VERSIONS = ("python", "jax", "jaxlib", "torch", "cuda", "nccl", "numpy", "parity")
WORST = 10


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def command(words: Sequence[str]) -> str:
    """A command as typed, without the machine's own paths."""
    kept: list[str] = []
    for word in words:
        before = kept[-1] if kept else ""
        if before == "--nccl-library":
            word = "PATH"
        elif before == "--out":
            word = Path(word).name
        kept.append(word)
    return shlex.join(kept)


def machine(summary: Mapping) -> list[str]:
    """Lines about where it ran."""
    platform, versions = summary.get("platform", {}), summary.get("versions", {})
    devices = ", ".join(platform.get("gpus", [])) or "CPU"
    if platform.get("gpus"):
        devices += f", driver {platform.get('driver')}, {platform.get('ranks_per_gpu')} ranks a GPU"
    return [
        f"| date | {datetime.fromisoformat(summary['finished']).date()} |",
        f"| devices | {devices} |",
        f"| machine | {platform.get('machine', '')}, {platform.get('cores', '?')} cores |",
        f"| versions | {', '.join(f'{name} {versions[name]}' for name in VERSIONS if name in versions)} |",
    ]


def section(folder: Path) -> str:
    """One run as Markdown."""
    outcomes = records.read(folder / records.RESULTS)
    summary = json.loads((folder / records.SUMMARY).read_text(encoding="utf-8"))
    counts = summary["counts"]
    tally = ", ".join(f"{counts[verdict]} {verdict}" for verdict in records.VERDICTS if counts[verdict])
    parts = summary.get("parts") or [summary]
    commands = [command(part["command"]) for part in parts if part.get("command")]
    if summary.get("parts"):
        commands.append(f"parity merge {' '.join(Path(part['folder']).name for part in parts)} --out {folder.name}")
    lines = [f"## {folder.name}", "", "| | |", "|---|---|", *machine(summary)]
    lines += [
        f"| cases | {tally}{f', {n} not run' if (n := summary.get('not_run')) else ''} |",
        f"| seconds | {summary['seconds']:.0f}" + (f", {len(parts)} parts side by side |" if len(parts) > 1 else " |"),
        "",
        "```console",
        *(f"$ {text}" for text in commands),
        "```",
        "",
        "Passed of all, and the largest error over its bound:",
        "",
        *_grid(outcomes),
        "",
        "| worst margins | |",
        "|---|---|",
        *(f"| {number(margin(outcome))} | `{outcome.case}` |" for outcome in _worst(outcomes)),
    ]
    wrong = [outcome for outcome in outcomes.values() if outcome.verdict in ("fail", "error")]
    if wrong:
        lines += ["", "| did not pass | |", "|---|---|"]
        lines += [f"| `{o.case}` | {o.verdict}: {o.reason.splitlines()[0] if o.reason else ''} |" for o in wrong]
    return "\n".join(lines)


def _worst(outcomes: Mapping[str, Outcome]) -> list[Outcome]:
    return sorted(outcomes.values(), key=lambda outcome: -(margin(outcome) or 0.0))[:WORST]


def _grid(outcomes: Mapping[str, Outcome]) -> list[str]:
    formats, rows = grid(outcomes, outcomes)
    head = ["mode", "transport", *(name for fmt in formats for name in (fmt, "margin"))]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row.mode, row.transport]
        for fmt in formats:
            cell = row.cells.get(fmt)
            cells += [f"{cell.counts['pass']}/{len(cell.cases)}", number(cell.margin)] if cell else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("title")
    parser.add_argument("folders", nargs="+", type=Path)
    args = parser.parse_args(argv)
    page = f"python docs/results_page.py {shlex.quote(args.title)} {' '.join(folder.name for folder in args.folders)}"
    print(f"# {args.title}\n\nMade by `{page}`.\n")
    print("\n\n".join(section(folder) for folder in args.folders))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
