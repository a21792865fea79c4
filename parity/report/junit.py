"""Verdicts as JUnit XML, which every CI shows: one test case a case."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from parity.launch import InfrastructureError
from parity.records import Outcome, OutError, counts
from parity.report.grid import coordinates, margin

FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, escaped or not: control characters (a log may have colours) and lone surrogates."""


def check_junit(path: Path) -> None:
    """Find out before a long run whether the file can be written.

    Raises:
      OutError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a"):
            pass
    except OSError as error:
        raise OutError(f"--junit {str(path)!r} cannot be written: {error.strerror}; give a file") from error


def write_junit(path: Path, ids: Sequence[str], outcomes: Mapping[str, Outcome], summary: Mapping) -> None:
    """Write the verdicts of a run.

    Args:
      path: the file.
      ids: every case asked for; one without an outcome counts as skipped, "not run".
      outcomes: by case id.
      summary: what `summary.json` holds: seconds, finish and versions are taken from it.

    Raises:
      InfrastructureError: the file cannot be written any more.
    """
    tree = ElementTree.ElementTree(document(ids, outcomes, summary))
    ElementTree.indent(tree)
    try:
        tree.write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise InfrastructureError(f"--junit {str(path)!r} cannot be written: {error.strerror}") from error


def document(ids: Sequence[str], outcomes: Mapping[str, Outcome], summary: Mapping) -> ElementTree.Element:
    """The document's root, `testsuites`."""
    tally = counts(outcomes[text] for text in ids if text in outcomes)
    ran = sum(tally.values())
    totals = {
        "tests": str(len(ids)),
        "failures": str(tally["fail"]),
        "errors": str(tally["error"]),
        "skipped": str(tally["skip"] + len(ids) - ran),
        "time": _seconds(sum(outcomes[text].seconds for text in ids if text in outcomes)),
    }
    root = ElementTree.Element("testsuites", {"name": "parity", **totals})
    finished = {"timestamp": _text(summary["finished"])[:19]} if summary.get("finished") else {}
    suite = ElementTree.SubElement(root, "testsuite", {"name": "parity", **totals, **finished})
    _properties(suite, {f"version.{name}": value for name, value in dict(summary.get("versions") or {}).items()})
    for text in ids:
        _case(suite, text, outcomes.get(text))
    return root


def _case(suite: ElementTree.Element, text: str, outcome: Outcome | None) -> None:
    mode, transport, _ = coordinates(text)
    attributes = {
        "classname": _text(f"parity.{mode}.{transport}"),
        "name": _text(text),
        "time": _seconds(outcome.seconds if outcome else 0.0),
    }
    element = ElementTree.SubElement(suite, "testcase", attributes)
    if outcome is None:
        ElementTree.SubElement(element, "skipped", {"message": "not run"})
        return
    metrics = outcome.metrics
    numbers = {"margin": margin(outcome), "sensitivity": metrics.get("sensitivity")}
    for name, found in _mapping(metrics.get("frameworks")).items():
        numbers[f"{name}.observed_over_model"] = _mapping(found).get("observed_over_model")
    _properties(element, {name: f"{x:.4g}" for name, x in numbers.items() if isinstance(x, int | float)})
    if outcome.verdict == "fail":
        failed = [gate for gate in metrics.get("failed_gates") or [] if isinstance(gate, Mapping)]
        kind = str(failed[0].get("gate")) if failed else outcome.reason.partition(":")[0]
        detail = "\n".join(f"{g.get('gate')}: {g.get('framework')}: {g.get('detail')}" for g in failed)
        _outcome(element, "failure", outcome.reason, kind, detail or outcome.reason)
    elif outcome.verdict == "error":
        _outcome(
            element, "error", outcome.reason, str(metrics.get("kind", "harness")), str(metrics.get("log_tail", ""))
        )
    elif outcome.verdict == "skip":
        ElementTree.SubElement(element, "skipped", {"message": _text(outcome.reason)})


def _outcome(parent: ElementTree.Element, tag: str, message: str, kind: str, text: str) -> None:
    element = ElementTree.SubElement(parent, tag, {"message": _text(message), "type": _text(kind)})
    element.text = _text(text)


def _properties(parent: ElementTree.Element, values: Mapping[str, object]) -> None:
    if values:
        properties = ElementTree.SubElement(parent, "properties")
        for name, value in values.items():
            ElementTree.SubElement(properties, "property", {"name": _text(name), "value": _text(value)})


def _mapping(value: object) -> Mapping:
    return value if isinstance(value, Mapping) else {}


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _text(value: object) -> str:
    return FORBIDDEN.sub("", str(value))
