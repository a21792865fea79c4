"""`parity explain CASE`: a case stage by stage, and where its error is born."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from parity import mutations, report
from parity.backends.base import Backend
from parity.case import Case
from parity.grids import GridError
from parity.records import Outcome, exit_code
from parity.runner import session
from parity.stages import NAMES
from parity.verdict.layout import expert_ranks, listed, place
from parity.verdict.tally import INFINITE

COLOURS = {"ok": "green", "born": "red", "came in": "yellow"}


def main(
    case: Case,
    chosen: Sequence[Backend],
    timeout: float,
    planted: tuple[str, str] | None,
    as_json: bool,
    console: Console,
    say: Callable[[str], None] = print,
) -> int:
    """Run a case and print its stages, framework by framework, or JSON.

    Args:
      case: which.
      chosen: the frameworks.
      timeout: seconds they may take.
      planted: a bug, and the framework to plant it in, to see how it shows.

    Returns:
      The exit status, as that of `parity run`.
    """
    with session(chosen, timeout) as live:
        outcome = live.outcome(case, planted=planted)
    if as_json:
        bug = {"bug": planted[0], "framework": planted[1]} if planted else None
        named = {name: named_stage(outcome, name) for name in _frameworks(outcome)}
        say(json.dumps({**outcome.to_json(), "planted": bug, "named": named}, indent=2))
        return exit_code([outcome])
    console.print(f"{escape(str(case))}: {outcome.verdict}", highlight=False)
    if planted:
        console.print(f"planted in {planted[1]}: {planted[0]}, {_what(planted[0])}", highlight=False)
    if outcome.verdict in ("error", "skip"):
        console.print(report.explain(outcome), highlight=False, soft_wrap=True)
    for name in _frameworks(outcome):
        stages = _stages(outcome, name)
        console.print()
        if stages:
            console.print(table(name, stages))
        for line in words(case, outcome, name):
            console.print(line, highlight=False, soft_wrap=True)
    return exit_code([outcome])


def check(planted: tuple[str | None, str | None], chosen: Sequence[Backend]) -> tuple[str, str] | None:
    """The bug to plant and where, from what was typed.

    Raises:
      GridError: there is no such bug, or it cannot be planted there; or one of the two is missing.
    """
    bug, framework = planted
    if bug is None and framework is None:
        return None
    if bug is None or framework is None:
        raise GridError("--plant BUG and --in FRAMEWORK go together: which bug, and which framework gets it")
    names = [mutation.name for mutation in mutations.CATALOG]
    if bug not in names:
        raise GridError(f"unknown bug {bug!r}; allowed: {', '.join(names)}")
    if framework not in [backend.name for backend in chosen]:
        raise GridError(f"--in {framework!r} does not run; allowed: {', '.join(backend.name for backend in chosen)}")
    try:
        mutations.planter(framework)
    except LookupError as error:
        raise GridError(str(error)) from None
    return bug, framework


def _what(bug: str) -> str:
    return next(mutation.what for mutation in mutations.CATALOG if mutation.name == bug)


def _frameworks(outcome: Outcome) -> list[str]:
    """Those with results, in the order they were named, then those that a gate alone speaks of."""
    gates = [gate["framework"] for gate in outcome.metrics.get("failed_gates", ()) if gate["stage"]]
    return list(dict.fromkeys([*outcome.metrics.get("frameworks", {}), *gates]))


def _stages(outcome: Outcome, name: str) -> Sequence[Mapping]:
    return outcome.metrics.get("frameworks", {}).get(name, {}).get("stages", ())


def blame(outcome: Outcome, name: str) -> dict | None:
    """The first stage of a framework that is off: its line of the table; None if none is, or none is shown."""
    return next((dict(line) for line in _stages(outcome, name) if line["state"] != "ok"), None)


def named_stage(outcome: Outcome, name: str) -> str | None:
    """The stage a framework's error is found in: the first that is off, or that a failed gate is about."""
    first = blame(outcome, name)
    gates = [gate["stage"] for gate in outcome.metrics.get("failed_gates", ()) if gate["framework"] == name]
    found = [stage for stage in [*gates, first and first["stage"]] if stage]
    return min(found, key=NAMES.index, default=None)


def words(case: Case, outcome: Outcome, name: str) -> list[str]:
    """What the table comes to, in sentences."""
    lines, first, stages = [], blame(outcome, name), _stages(outcome, name)
    gates = [gate for gate in outcome.metrics.get("failed_gates", ()) if gate["framework"] == name]
    if first is not None:
        born = first["state"] == "born"
        taught = first["taught"] is not None
        how = "is born" if born else "comes in"
        why = "" if born or not taught else ", though the stage computes rightly from the oracle's inputs"
        lines.append(f"[bold]{name}: the error {how} in {first['title']}[/]{why}.")
        if first["worst"] is not None:
            lines.append("  " + escape(_where(case, first)))
        after = [line["title"] for line in stages if line["state"] == "came in" and line is not first]
        more = [line["title"] for line in stages if line["state"] == "born"][1:]
        if more:
            lines.append(f"  Errors are born too in: {', '.join(more)}.")
        if after:
            lines.append(f"  Off only because of what came in: {', '.join(after)}.")
    elif stages:
        lines.append(f"{name}: every stage is within its bound.")
    else:
        lines.append(f"{name}: shows no stages.")
    for gate in gates:
        if first is None or gate["gate"] in ("sane", "exact"):
            lines.append(f"  {gate['gate']}: {escape(gate['detail'])}")
    return lines


def _where(case: Case, line: Mapping) -> str:
    """The worst place of a stage."""
    worst = line["worst"]
    token, experts = worst["token"], worst["experts"]
    held = f", on ranks {listed(expert_ranks(case, experts))}" if case.ep else ""
    row = f", slot {worst['slot']}" if "slot" in worst else ""
    row += f" (expert {worst['expert']})" if "expert" in worst else ""
    margin = line["taught"] if line["state"] == "born" and line["taught"] is not None else line["free"]
    far = "nothing may be off there" if margin is not None and margin >= INFINITE else f"{margin:.3g} times its bound"
    return (
        f"Worst: token {token} ({place(case, token)}; experts {listed(experts)}{held}){row}, on rank {worst['rank']}, "
        f"column {worst['column']}: {worst['value']:.6g}, expected {worst['expected']:.6g}; {far}."
    )


def table(name: str, stages: Sequence[Mapping]) -> Table:
    """Stage by stage: error over bound when free and when taught, and the RMS error over the model's."""
    out = Table(title=f"{name}: error over bound", title_justify="left")
    out.add_column("stage")
    for column in ("free", "taught", "observed / model"):
        out.add_column(column, justify="right")
    out.add_column("")
    for line in stages:
        ratio = "" if line["observed_over_model"] is None else f"{line['observed_over_model']:.2g}"
        state = f"[{COLOURS[line['state']]}]{line['state']}[/]"
        out.add_row(line["title"], _number(line["free"]), _number(line["taught"]), ratio, state)
    return out


def _number(margin: float | None) -> str:
    if margin is None:
        return "not shown"
    return (
        "not exact"
        if margin >= INFINITE
        else "exact"
        if margin == 0
        else f"{margin:.2f}"
        if margin < 100
        else f"{margin:.1e}"
    )
