"""`parity selftest`: plant each known bug in each framework, and show which gate catches it."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from parity import mutations, report
from parity.backends.base import Backend
from parity.case import Case
from parity.grids import GridError
from parity.launch import RankError
from parity.mutations import Mutation
from parity.records import make_folder, plain, write_selftest
from parity.runner import Session, session
from parity.verdict import GATES, Judgement
from parity.verdict.tally import INFINITE

PASSED, FAILED = 0, 1
SHARP = 5.0
"""How far over its bound a planted bug must be: one that is barely seen here would not be seen elsewhere."""


@dataclass(frozen=True)
class Finding:
    """What became of one bug planted in one framework (or of a case without a bug)."""

    mutation: str
    """Empty for a case without a bug, which must pass."""
    framework: str
    case: str
    outcome: str
    """"caught", "survived", "crashed", "vague" (it fails, but not as the catalogue says); without a bug "passed" or
    "failed"."""
    gates: tuple[str, ...]
    """The gates that failed, first the one a verdict names."""
    stage: str
    """The first stage that a failed gate names."""
    margin: float | None
    """How far off that stage is, over its bound; None without a bug."""
    reason: str
    seconds: float

    @property
    def good(self) -> bool:
        return self.outcome in ("caught", "passed")


def run(live: Session, catalog: Sequence[Mutation]) -> Iterator[Finding]:
    """Run every bug; cases that share their correct runs are neighbours.

    Yields:
      A finding for each case without a bug, then one for each bug and framework.
    """
    by_case = sorted(catalog, key=lambda mutation: mutation.case)
    for text, group in itertools.groupby(by_case, key=lambda mutation: mutation.case):
        case, began = Case.parse(text), time.monotonic()
        try:
            clean, reference = live.execute(case, live.backends)
        except RankError as error:
            yield Finding("", "", text, "failed", (), "", None, error.reason, time.monotonic() - began)
            continue
        judgement = live.harness.judge(case, reference, clean)
        outcome = "passed" if judgement.verdict == "pass" else "failed"
        yield Finding("", "", text, outcome, (), "", None, judgement.reason, time.monotonic() - began)
        for mutation in group:
            for backend in live.backends:
                began = time.monotonic()
                try:
                    results, _ = live.execute(case, [backend], mutation.name)
                except RankError as error:
                    found = ("crashed", (), "", None, error.reason)
                else:
                    found = _found(mutation, backend.name, live.harness.judge(case, reference, {**clean, **results}))
                yield Finding(mutation.name, backend.name, text, *found, time.monotonic() - began)


def _found(mutation: Mutation, framework: str, judgement: Judgement) -> tuple[str, tuple[str, ...], str, float, str]:
    """What a verdict makes of a planted bug: outcome, gates, stage, margin, reason."""
    failed = sorted((gate for gate in judgement.gates if not gate.passed), key=lambda gate: GATES.index(gate.gate))
    gates = tuple(dict.fromkeys(gate.gate for gate in failed))
    stage, margin = judgement.blamed(framework)
    outcome, reason = "caught", judgement.reason
    if not failed:
        outcome = "survived"
    elif missing := [gate for gate in mutation.gates if gate not in gates]:
        outcome, reason = "vague", f"{', '.join(missing)} passed: {reason}"
    elif stage != mutation.stage:
        outcome, reason = "vague", f"{stage or 'no stage'} is named, it sits in {mutation.stage}: {reason}"
    elif margin < SHARP:
        outcome, reason = "vague", f"only {margin:.3g} times the bound, wanted {SHARP}: {reason}"
    return outcome, gates, stage, margin, reason


def main(
    chosen: Sequence[Backend],
    timeout: float,
    match: str | None,
    as_json: bool,
    console: Console,
    say: Callable[[str], None] = print,
    out: Path | None = None,
) -> int:
    """Run the selftest and print its table, or JSON. With `out`, a folder, also leave `selftest.json` there.

    Returns:
      The exit status: 0 if every bug was caught and every case passes without one, else 1.

    Raises:
      GridError: `match` names no bug.
    """
    words = (match or "").lower().split()
    catalog = [m for m in mutations.CATALOG if all(word in f"{m.name} {m.what}".lower() for word in words)]
    if not catalog:
        names = ", ".join(m.name for m in mutations.CATALOG)
        raise GridError(f"-k {match!r} matches none of the bugs; allowed: {names}")
    if out:
        make_folder(out)
    began, findings = time.monotonic(), []
    with session(chosen, timeout) as live:
        for finding in run(live, catalog):
            findings.append(finding)
            name = f"{finding.mutation} in {finding.framework}" if finding.mutation else f"no bug, {finding.case}"
            console.print(f"{finding.outcome:8} {name} [dim]({finding.seconds:.1f} s)[/]", highlight=False)
    status = PASSED if all(finding.good for finding in findings) else FAILED
    seconds = time.monotonic() - began
    what = {mutation.name: mutation.what for mutation in catalog}
    rows = [asdict(finding) | {"what": what.get(finding.mutation, "")} for finding in findings]
    data = {"passed": status == PASSED, "seconds": round(seconds, 3), "findings": rows}
    if out:
        write_selftest(out, data)
    if as_json:
        say(json.dumps(plain(data), indent=2))
    else:
        console.print(table(catalog, findings))
        bugs = [finding for finding in findings if finding.mutation]
        caught = sum(finding.good for finding in bugs)
        console.print(f"{caught} of {len(bugs)} planted bugs caught in {report.duration(seconds)}")
        for finding in findings:
            if not finding.good:
                console.print(f"[red]{finding.outcome}[/] {finding.mutation or finding.case} {finding.framework}: "
                              f"{finding.reason}", soft_wrap=True)  # fmt: skip
    return status


def _margin(margin: float | None) -> str:
    return "" if margin is None else "exact" if margin >= INFINITE else f"{margin:.3g}x"


def table(catalog: Sequence[Mutation], findings: Sequence[Finding]) -> Table:
    """Bug by framework: the stage that was named, how far off it was, and which gates failed."""
    frameworks = list(dict.fromkeys(finding.framework for finding in findings if finding.mutation))
    out = Table(title="planted bugs: stage named, error over bound, failed gates", title_justify="left")
    out.add_column("bug")
    out.add_column("what it does")
    for framework in frameworks:
        out.add_column(f"in {framework}")
    by_key = {(finding.mutation, finding.framework): finding for finding in findings}
    for mutation in catalog:
        row = [mutation.name, mutation.what]
        for framework in frameworks:
            finding = by_key.get((mutation.name, framework))
            good = finding is not None and finding.good
            text = "not run" if finding is None else finding.outcome.upper()
            if finding is not None and good:
                text = f"{finding.stage} {_margin(finding.margin)}, by {', '.join(finding.gates)}"
            row.append(f"[{'green' if good else 'red'}]{text}[/]")
        out.add_row(*row)
    return out
