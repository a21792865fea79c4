"""The verdict grid: cases by parallel mode, transport and format, for the terminal and for the page alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from parity.case import FORMATS, MODES, TRANSPORTS, Case, CaseError
from parity.records import VERDICTS, Outcome

NOT_RUN = "not run"
STATES = (*VERDICTS, NOT_RUN)
UNREADABLE = "unreadable id"
"""The mode of a case whose id this parity cannot parse: another parity, with other words, may have written it."""
WORST_FIRST = ("fail", "error", NOT_RUN, "skip", "pass")


@dataclass
class Cell:
    """The cases of one mode, transport and format."""

    cases: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATES, 0))
    margin: float | None = None
    """The largest error over its bound among them."""

    @property
    def total(self) -> int:
        return len(self.cases)

    @property
    def passed(self) -> int:
        return self.counts["pass"]

    @property
    def state(self) -> str:
        """The worst verdict in the cell; a parity failure outranks an error."""
        return next(name for name in WORST_FIRST if self.counts[name])

    @property
    def words(self) -> str:
        """What keeps it from having passed, in words: `1 fail, 2 not run`; empty if nothing does."""
        return ", ".join(f"{self.counts[name]} {name}" for name in WORST_FIRST[:-1] if self.counts[name])


@dataclass(frozen=True)
class Row:
    """The cells of one mode and transport, by format."""

    mode: str
    transport: str
    cells: Mapping[str, Cell]


def margin(outcome: Outcome) -> float | None:
    """A case's largest error over its bound, where it has one."""
    value = outcome.metrics.get("margin")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def worst_margins(outcomes: Iterable[Outcome], count: int = 10) -> list[dict]:
    """The cases that came nearest to their bounds or went over them, the worst first."""
    found = [(value, outcome) for outcome in outcomes if (value := margin(outcome)) is not None]
    found.sort(key=lambda pair: -pair[0])
    return [{"case": o.case, "verdict": o.verdict, "margin": value} for value, o in found[:count]]


def coordinates(text: str) -> tuple[str, str, str]:
    """Mode, transport and format of a case id."""
    try:
        case = Case.parse(text)
    except CaseError:
        return UNREADABLE, "?", "?"
    return case.mode, case.transport, case.format


def grid(ids: Iterable[str], outcomes: Mapping[str, Outcome]) -> tuple[list[str], list[Row]]:
    """Sort cases into cells.

    Args:
      ids: every case asked for.
      outcomes: of those that ran.

    Returns:
      The formats that occur, and a row for each mode and transport that occurs; both in the order of their tables.
    """
    cells: dict[tuple[str, str, str], Cell] = {}
    for text in ids:
        cell = cells.setdefault(coordinates(text), Cell())
        cell.cases.append(text)
        outcome = outcomes.get(text)
        cell.counts[outcome.verdict if outcome else NOT_RUN] += 1
        if outcome and (value := margin(outcome)) is not None:
            cell.margin = max(value, cell.margin or 0.0)
    formats = [fmt for fmt in (*FORMATS, "?") if any(key[2] == fmt for key in cells)]
    rows = []
    for mode in (*MODES, UNREADABLE):
        for transport in (*TRANSPORTS, "?"):
            here = {fmt: cells[mode, transport, fmt] for fmt in formats if (mode, transport, fmt) in cells}
            if here:
                rows.append(Row(mode, transport, here))
    return formats, rows
