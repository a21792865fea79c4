"""The command `parity bench`: from its options to jobs, and from rows to table, JSON and picture."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from parity.bench import catalog, driver, mesh, plot, plot_mesh, report, shapes
from parity.bench.driver import Job, Run
from parity.case import CaseError

QUICK_REPEAT = 3
PASSED, WRONG, NOTHING = 0, 1, 3


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was typed, parsed."""

    names: tuple[str, ...]
    tokens: tuple[int, ...]
    whats: tuple[str, ...]
    candidates: tuple[str, ...]
    parallel: tuple[str, ...]
    ranks: tuple[int, ...]
    quick: bool
    options: driver.Options
    json: Path | None
    plot: Path | None
    log: Path


def words(text: str | None, allowed: Sequence[str], option: str) -> tuple[str, ...]:
    """The words of a comma-separated option.

    Raises:
      CaseError: one of them is not allowed.
    """
    found = tuple(word.strip() for word in (text or "").split(",") if word.strip())
    for word in found:
        if word not in allowed:
            raise CaseError(f"{option} {word!r}: allowed are {', '.join(allowed)}")
    return found


def numbers(text: str | None, option: str) -> tuple[int, ...]:
    """The numbers of a comma-separated option.

    Raises:
      CaseError: one of them is no whole number of at least 1.
    """
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    for part in parts:
        if not part.isdigit() or int(part) < 1:
            raise CaseError(f"{option} {part!r}: expected whole numbers of at least 1, as in 1,16,256")
    return tuple(map(int, parts))


def jobs(request: Request) -> list[Job]:
    """What is to be timed, in the order in which it is.

    Raises:
      CaseError: a shape, spread or candidate that does not exist.
    """
    default = list(shapes.SHAPES.values())
    if request.quick or request.options.platform == "cpu":
        default = [shapes.TINY]
    chosen = shapes.choose(request.names, request.tokens, default)
    if request.parallel:
        return mesh.jobs(chosen, request.parallel, request.ranks, request.options.platform == "gpu")
    try:
        entries = catalog.named(request.candidates or catalog.NAMES)
    except ValueError as error:
        raise CaseError(str(error)) from None
    return [
        Job(entry=entry, what=what, shape=shape)
        for entry in entries
        for shape in chosen
        for what in request.whats or ("layer",)
        if what in entry.whats
    ]


def run(request: Request, console: Console, version: str, ending: Callable) -> int:
    """Time everything, print, and write what was asked for.

    Args:
      request: what to do.
      console: where lines and tables go.
      version: of parity, for the JSON.
      ending: a context manager under which SIGTERM ends the run as Ctrl-C does.

    Returns:
      The exit status: 0; 1 if a timed result was wrong; 3 if nothing could be timed.

    Raises:
      CaseError: nothing to do, or options that contradict each other.
    """
    if request.plot is not None and (reason := plot.why_not()):
        raise CaseError(f"--plot: {reason}")
    todo = jobs(request)
    if not todo:
        raise CaseError("no candidate does any of this work; see docs/bench.md for who does what")
    options = request.options
    if request.quick:
        options = replace(options, repeat=min(options.repeat, QUICK_REPEAT))
    if request.parallel:
        options = replace(options, devices=max(mesh.world(job.parallel) for job in todo), rated=False)
    for path in (request.json, request.plot, request.log):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    where = "a CPU: these numbers say nothing of a GPU" if options.platform == "cpu" else "one GPU"
    if request.parallel:
        where = where.replace("one GPU", "several GPUs")
    console.print(f"{len(todo)} measurements on {where}", highlight=False)
    began = datetime.now(UTC)
    out = Run()

    def header(finished: bool) -> dict:
        return {
            "parity": version,
            "platform": options.platform,
            "machine": platform.machine(),
            "began": began.isoformat(timespec="seconds"),
            "finished": finished,
            "repeat": options.repeat,
            "command": ["parity", *sys.argv[1:]],
        }

    def watch(row: dict) -> None:
        console.print(report.line(row), highlight=False, markup=False, soft_wrap=True)
        if request.json is not None:
            report.write(request.json, report.document(out, header(False)))

    try:
        with ending():
            driver.run(todo, options, request.log, watch, out)
    finally:
        _finish(request, console, out, header(len(out.rows) == len(todo)), began)
    measured = [row for row in report.rows(out) if row["status"] in report.MEASURED]
    if not measured:
        return NOTHING
    return WRONG if any(row["status"] == "wrong" for row in measured) else PASSED


def _finish(request: Request, console: Console, out: Run, header: dict, began: datetime) -> None:
    """The table, the JSON and the picture of what there is, whole run or not."""
    for table in mesh.tables(out) if request.parallel else [report.table(out)]:
        console.print(table, highlight=False)
    best = out.best
    if best is not None:
        console.print(
            f"floors: {best.tflops:.4g} TFLOP/s in a large bf16 product, {best.gbps:.4g} GB/s in a copy (the best of "
            f"this run's processes)",
            highlight=False,
        )
        for name, rates in out.rates.items():
            device = out.versions[name].get("device", "")
            seen = f"{rates.tflops:.4g} TFLOP/s, {rates.gbps:.4g} GB/s"
            console.print(f"  {name}: {seen} before its first job, {device}", highlight=False)
    if request.json is not None:
        report.write(request.json, report.document(out, header))
        console.print(f"JSON in {request.json}", highlight=False)
    if request.plot is not None:
        devices = {versions.get("device", "") for versions in out.versions.values()}
        subtitle = f"{', '.join(sorted(devices))}, {began:%Y-%m-%d}"
        drawn = plot_mesh.draw(out, request.plot, subtitle) if request.parallel else False
        if best is not None and plot.panels(out):
            drawn = True
            plot.draw(out, request.plot, subtitle)
        if drawn:
            console.print(f"picture in {request.plot}", highlight=False)
