"""Print the page of benchmarks for docs/results/: date, card, versions, command, and the tables of each run.

    python docs/bench_page.py "Two H100s, timed" bench.json [FILE ...] > docs/results/NAME.md

Each FILE is what `parity bench --json` wrote.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.table import Table

from parity.bench import mesh, report
from parity.bench.driver import Run
from parity.bench.floors import Rates

FILES = ("--json", "--plot", "--log", "--peers")
"""Options whose values are paths of the machine."""


def command(words: Sequence[str]) -> str:
    """A command as typed, files by their names alone."""
    kept: list[str] = []
    for word in words:
        kept.append(Path(word).name if kept and kept[-1] in FILES else word)
    return shlex.join(kept)


def markdown(table: Table) -> str:
    """A table of the command as one of Markdown."""
    columns = [(str(column.header), column.justify, list(column.cells)) for column in table.columns]
    columns = [(name, side, cells) for name, side, cells in columns if name or any(cells)]
    lines = [
        "| " + " | ".join(name for name, _, _ in columns) + " |",
        "|" + "".join("---:|" if side == "right" else "---|" for _, side, _ in columns),
    ]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in zip(*(cells for *_, cells in columns), strict=True)]
    return "\n".join(lines)


def section(path: Path) -> str:
    """One run as Markdown."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rates = {name: Rates(**values) for name, values in found["rates_by_candidate"].items()}
    run = Run(rows=found["rows"], rates=rates, versions=found["versions"])
    cards = sorted({versions.get("device", "") for versions in run.versions.values()})
    versions = {name: value for each in run.versions.values() for name, value in each.items() if name != "device"}
    versions["parity"] = found["parity"]
    lines = [
        f"## {path.stem}",
        "",
        "| | |",
        "|---|---|",
        f"| date | {datetime.fromisoformat(found['began']).date()} |",
        f"| card | {', '.join(cards)} |",
        f"| versions | {', '.join(f'{name} {value}' for name, value in versions.items())} |",
        f"| calls | median of {found['repeat']} |",
    ]
    if run.best is not None:
        lines.append(f"| floors from | {run.best.tflops:.4g} TFLOP/s, {run.best.gbps:.4g} GB/s |")
    if found.get("command"):
        lines += ["", "```console", f"$ {command(found['command'])}", "```"]
    over_a_mesh = any(row.get("parallel") for row in run.rows)
    for table in mesh.tables(run) if over_a_mesh else [report.table(run)]:
        lines += ["", markdown(table)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("title")
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args(argv)
    page = f"python docs/bench_page.py {shlex.quote(args.title)} {' '.join(path.name for path in args.files)}"
    print(f"# {args.title}\n\nMade by `{page}`.\n")
    print("\n\n".join(section(path) for path in args.files))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
