"""Tables and lines that a person reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from parity.case import ACROSS_NODES, CAPABILITIES, CARRIES, FLAGS, FORMATS, MODES, TRANSPORTS
from parity.records import Outcome, counts
from parity.report.grid import NOT_RUN, grid, margin

COLOURS = {"pass": "green", "fail": "red", "error": "magenta", "skip": "yellow", NOT_RUN: "dim"}


def duration(seconds: float) -> str:
    """Seconds in the two largest units."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"


def progress_line(outcome: Outcome, done: int, total: int, left_seconds: float) -> str:
    """One line a case, with the time left."""
    colour = COLOURS[outcome.verdict]
    left = f", {duration(left_seconds)} left" if done < total else ""
    width = len(str(total))
    return (
        f"[{colour}]{outcome.verdict:5}[/] {done:{width}}/{total} {escape(outcome.case)} "
        f"[dim]({outcome.seconds:.1f} s{left})[/]"
    )


def explain(outcome: Outcome) -> str:
    """Why a case did not pass, and the end of the log of the rank to blame."""
    text = f"      {escape(outcome.reason)}"
    if tail := outcome.metrics.get("log_tail"):
        text += f"\n      end of the log {escape(outcome.metrics['log'])}:\n"
        text += "\n".join(f"      | {escape(line)}" for line in tail.splitlines())
    return text


def notes(outcomes: Iterable[Outcome]) -> list[str]:
    """What the verdicts do not say: cases that a framework did not take, and what it does not show of the others."""
    outcomes = [outcome for outcome in outcomes if outcome.verdict in ("pass", "fail", "skip")]
    skipped: dict[str, Counter[str]] = {}
    unseen: dict[str, dict[str, None]] = {}
    for outcome in outcomes:
        for name, reason in _mapping(outcome.metrics.get("skipped")).items():
            skipped.setdefault(name, Counter())[reason] += 1
        for name, side in _mapping(outcome.metrics.get("frameworks")).items():
            unseen.setdefault(name, {}).update(dict.fromkeys(_mapping(side).get("not_checked") or ()))
    lines = []
    for name, reasons in skipped.items():
        (reason, count), others = reasons.most_common(1)[0], len(reasons) - 1
        more = f" ({count} of them; {others} other reason{'s' * (others > 1)})" if others else ""
        lines.append(f"{name} skipped {reasons.total()} of {len(outcomes)} cases: {reason}{more}")
    return lines + [f"{name} was not checked for: {'; '.join(parts)}" for name, parts in unseen.items() if parts]


def _mapping(value: object) -> Mapping:
    """What a results file holds may come from elsewhere."""
    return value if isinstance(value, Mapping) else {}


def final_table(console: Console, ids: Sequence[str], outcomes: Mapping[str, Outcome], verbose: bool) -> None:
    """Cases that did not pass in full (all with `verbose`), then the grid, then the counts.

    Args:
      console: where to.
      ids: every case asked for.
      outcomes: by case id, of those that ran.
      verbose: whether to list cases that passed.
    """
    shown = [outcomes[text] for text in ids if text in outcomes]
    if not verbose:
        shown = [outcome for outcome in shown if outcome.verdict != "pass"]
    if shown:
        table = Table(title="cases" if verbose else "cases that did not pass", title_justify="left", show_lines=True)
        table.add_column("case", overflow="fold")
        table.add_column("verdict")
        table.add_column("margin", justify="right")
        table.add_column("reason", overflow="fold")
        for outcome in shown:
            verdict = f"[{COLOURS[outcome.verdict]}]{outcome.verdict}[/]"
            table.add_row(escape(outcome.case), verdict, _number(margin(outcome)), escape(outcome.reason))
        console.print(table)
    # not the table's title, which would wrap at the table's width
    console.print("passed of total, and the largest error over its bound", style="italic")
    console.print(grid_table(ids, outcomes))
    tally = counts(outcomes[text] for text in ids if text in outcomes)
    words = [f"[{COLOURS[name]}]{count} {name}[/]" for name, count in tally.items() if count]
    missing = len(ids) - sum(tally.values())
    console.print(", ".join(words + ([f"{missing} not run"] if missing else [])) or "nothing ran")
    for note in notes(outcomes[text] for text in ids if text in outcomes):
        console.print(escape(note), style="yellow", highlight=False, soft_wrap=True)


def grid_table(ids: Sequence[str], outcomes: Mapping[str, Outcome]) -> Table:
    """Mode and transport × format: passed of total, and the worst margin (error over bound)."""
    formats, rows = grid(ids, outcomes)
    table = Table()
    table.add_column("parallel mode")
    table.add_column("transport")
    for fmt in formats:
        table.add_column(fmt, justify="right")
        table.add_column("margin", justify="right")
    above = None
    for row in rows:
        line = [row.mode if row.mode != above else "", row.transport]
        for fmt in formats:
            if cell := row.cells.get(fmt):
                line += [f"[{COLOURS[cell.state]}]{cell.passed}/{cell.total}[/]", _number(cell.margin)]
            else:
                line += ["", ""]
        table.add_row(*line)
        above = row.mode
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.1e}"


def capabilities() -> dict[str, dict[str, bool]]:
    """Which parallel modes each transport serves, which formats it carries, and whether it crosses nodes first.

    What is true here must pass, the rest is refused.
    """
    return {
        name: {mode: mode in CAPABILITIES[name] for mode in MODES}
        | {fmt: fmt in CARRIES[name] for fmt in FORMATS}
        | {"nodes": name in ACROSS_NODES}
        for name in TRANSPORTS
    }


def capability_table() -> Table:
    table = Table(title="transports: parallel modes, formats, nodes", title_justify="left")
    table.add_column("transport")
    for column in (*MODES, *FORMATS, "nodes"):
        table.add_column(column, justify="center")
    for name, modes in capabilities().items():
        table.add_row(name, *("yes" if allowed else "-" for allowed in modes.values()))
    return table


def flag_lines() -> Iterable[str]:
    """Every flag of a case id, with what it means."""
    width = max(map(len, FLAGS))
    return (f"{name:{width}}  {meaning}" for name, meaning in FLAGS.items())
