"""A run as a table, and as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

from rich.table import Table

from parity.bench import floors
from parity.bench.driver import Run
from parity.bench.floors import Rates
from parity.bench.shapes import Shape

FORMAT, VERSION = "parity-bench", 1
MEASURED = ("ok", "wrong")


def judged(row: dict, rates: Rates) -> dict:
    """The row with what follows from its time: floor, fraction of it, speed."""
    if row["status"] not in MEASURED or row.get("parallel"):
        return row
    work = floors.work(row["what"], Shape(**row["shape"]), row.get("active"))
    seconds = row["device_ms"] / 1e3
    return row | {
        "floor_ms": work.seconds(rates) * 1e3,
        "of_floor": work.seconds(rates) / seconds,
        "tflops": work.flops / seconds / 1e12,
        "gbps": work.bytes / seconds / 1e9,
        "bound": "memory" if work.bound_by_memory(rates) else "arithmetic",
    }


def rows(run: Run) -> list[dict]:
    """All rows, judged; one whose inputs were not those of the others says so."""
    found = [judged(row, run.best) if run.best else row for row in run.rows]
    sums: dict[tuple, int] = {}
    for row in found:
        if row["status"] in MEASURED and "checksum" in row:
            key = (row["what"], json.dumps(row["shape"], sort_keys=True))
            if sums.setdefault(key, row["checksum"]) != row["checksum"]:
                row["status"], row["reason"] = "wrong", "its inputs are other bits than those of the first candidate"
    return found


def document(run: Run, header: dict) -> dict:
    best = run.best
    return {
        "format": FORMAT,
        "version": VERSION,
        **header,
        "rates": None if best is None else vars(best),
        "rates_by_candidate": {name: vars(rates) for name, rates in run.rates.items()},
        "versions": run.versions,
        "rows": [_finite(row) for row in rows(run)],
    }


def _finite(row: dict) -> dict:
    """JSON has no infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


def write(path: Path, value: dict) -> None:
    """Whole or not at all, so that what an ended run leaves can be read."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def table(run: Run) -> Table:
    """One line a row, shapes together."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("shape", "what", "candidate"):
        out.add_column(name, no_wrap=True)
    for name in ("ms", "wall", "floor", "of it", "speed", "peak GB", "temp GB", "compile s", "error"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("")
    ordered = rows(run)
    groups = list(dict.fromkeys((row["name"], row["what"]) for row in ordered))
    for group in groups:
        shown = [row for row in ordered if (row["name"], row["what"]) == group]
        shown.sort(key=lambda row: row.get("device_ms", math.inf) if row["status"] in MEASURED else math.inf)
        for row in shown:
            out.add_row(row["name"], row["what"], row["candidate"], *_cells(row))
        out.add_section()
    return out


def _cells(row: dict) -> list[str]:
    if row["status"] not in MEASURED:
        return [*("-",) * 9, f"{row['status']}: {row['reason']}"]
    multiplies = row.get("bound") == "arithmetic" and row["what"] in floors.MATRIX_BOUND
    speed = f"{row['tflops']:.3g} TFLOP/s" if multiplies else f"{row['gbps']:.4g} GB/s"
    notes = [row.get("note", ""), "" if row["clock"] != "wall" else "host clock"]
    if row["status"] == "wrong":
        notes.insert(0, "WRONG" + (f": {row['reason']}" if "reason" in row else ""))
    return [
        _ms(row["device_ms"]),
        _ms(row["wall_ms"]),
        _ms(row["floor_ms"]),
        f"{row['of_floor']:.2f}",
        speed,
        _gb(row["peak_bytes"]),
        _gb(row["temporary_bytes"]),
        f"{row['compile_s']:.1f}",
        f"{row['error']:.1e}",
        ", ".join(filter(None, notes)),
    ]


def _ms(value: float) -> str:
    return f"{value:.4g}" if value < 100 else f"{value:.0f}"


def _gb(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e9:.3g}"


def line(row: dict) -> str:
    """A row as it comes in."""
    place = row["name"] + (f" {row['parallel']}" if row.get("parallel") else "")
    head = f"{row['candidate']:14s} {row['what']:14s} {place:26s}"
    if row["status"] not in MEASURED:
        return f"{head} {row['status']}: {row['reason']}"
    if "collectives" in row:
        return f"{head} {', '.join(row['collectives'])}"
    milliseconds = row["whole_ms" if row.get("parallel") else "device_ms"]
    return f"{head} {_ms(milliseconds)} ms" + ("" if row["status"] == "ok" else "  WRONG")
