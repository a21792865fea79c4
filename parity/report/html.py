"""One HTML file that explains a run: no network, no files beside it.

What everyone wants to see first (counts, grid, planted bugs, environment) is markup, made here by a template that
escapes everything. What is opened on demand (a case) is data inside the page, and `template/report.js` builds it with
the DOM, never from strings of markup. The page's own policy forbids every other script, style and connection.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from statistics import median
from typing import Any
from urllib.parse import quote, urlencode

from parity.case import TRANSPORTS
from parity.launch import InfrastructureError
from parity.records import Outcome
from parity.report.folder import Run
from parity.report.grid import NOT_RUN, STATES, coordinates, grid, margin
from parity.report.terminal import duration, notes
from parity.report.words import words
from parity.stages import STAGES

INFINITE = 1e9
"""What a margin reads in results where nothing may be off and something is."""
BINS = 20
"""Of the histogram of margins, between 0 and the bound."""
SHOWN = 40
"""Cases that did not pass on the first view; the list has all."""
CLOSEST = 8
KEPT_OPTIONS = {"--platform", "--timeout", "--frameworks", "--ranks-per-gpu", "--nccl-library"}
KEPT_SWITCHES = {"--jax-processes"}
"""Options that decide how a case runs: they belong into the command that runs it again."""
ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
CONTROL = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]")


def render(run: Run) -> str:
    """The page of a run."""
    try:
        import jinja2
    except ImportError as error:
        raise InfrastructureError(
            "the HTML report needs the package 'jinja2': pip install 'moe-parity[parity]'"
        ) from error

    template = files("parity.report") / "template"
    read = lambda name: (template / name).read_text(encoding="utf-8").strip()  # noqa: E731
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # in the order given, and small
    environment.filters |= {"case_link": case_link, "number": number, "duration": duration, "clean": clean}
    style, script = read("report.css"), read("report.js")
    page = environment.from_string(read("report.html")).render(
        **overview(run), data=data(run), style=style, script=script, hashes=(_hash(style), _hash(script))
    )
    # a lone surrogate, which JSON can carry, has no UTF-8
    return page.encode("utf-8", "replace").decode("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# The first view.
def overview(run: Run) -> dict[str, Any]:
    """What the template shows without any script."""
    outcomes, ids, summary = run.outcomes, run.ids, run.summary
    counts: dict[str, int] = {name: 0 for name in STATES}  # noqa: C420 - the checker infers literals as keys
    for text in ids:
        counts[outcomes[text].verdict if text in outcomes else NOT_RUN] += 1
    formats, rows = grid(ids, outcomes)
    troubled = [outcome for outcome in outcomes.values() if outcome.verdict != "pass"]
    troubled.sort(key=lambda outcome: STATES.index(outcome.verdict))
    measured = [(value, text) for text in ids if text in outcomes and (value := margin(outcomes[text])) is not None]
    passed = sorted((entry for entry in measured if outcomes[entry[1]].verdict == "pass"), reverse=True)
    return {
        "counts": counts,
        "total": len(ids),
        "state": _state(counts),
        "formats": formats,
        "modes": _by_mode(rows),
        "cell_link": cell_link,
        "troubled": troubled[:SHOWN],
        "more_trouble": max(0, len(troubled) - SHOWN),
        "closest": passed[:CLOSEST],
        "margin": margin,
        "histogram": histogram([value for value, _ in measured]),
        "summary": summary,
        "finished": _time(summary.get("finished")),
        "seconds": _finite(summary.get("seconds")),
        "command": command_line(summary.get("command")),
        "notes": [clean(note) for note in notes(outcomes.values())],
        "environment": _environment(summary),
        "parts": _parts(summary),
        "kills": kill_matrix(run.selftest),
    }


def _state(counts: Mapping[str, int]) -> str:
    worst = next((name for name in ("fail", "error", NOT_RUN) if counts[name]), "pass")
    return worst if counts["pass"] or worst != "pass" else "skip"


def _by_mode(rows: Sequence) -> list[tuple[str, list]]:
    out: list[tuple[str, list]] = []
    for row in rows:
        if not out or out[-1][0] != row.mode:
            out.append((row.mode, []))
        out[-1][1].append(row)
    return out


def histogram(margins: Sequence[float]) -> dict[str, Any] | None:
    """Margins in bins between 0 and the bound, one more for those beyond, and what a reader wants of them in words."""
    if not margins:
        return None
    counts = [0] * (BINS + 1)
    for value in margins:
        counts[BINS if value > 1 else min(BINS - 1, int(max(value, 0) * BINS))] += 1
    ordered = sorted(margins)
    return {
        "bars": [(i, count, 100 * count / max(counts)) for i, count in enumerate(counts) if count],
        "most": max(counts),
        "count": len(margins),
        "median": median(ordered),
        "ninety": ordered[min(len(ordered) - 1, math.ceil(0.9 * len(ordered)) - 1)],
        "largest": ordered[-1],
        "beyond": counts[BINS],
    }


def _environment(summary: Mapping) -> list[tuple[str, str]]:
    """Versions, then the machine; where joined runs differ in them, all of what they say."""
    out: list[tuple[str, str]] = []
    for part in ("versions", "platform"):
        several = summary.get(f"{part}_differ")
        several = [_mapping(one) for one in (several if isinstance(several, list) else [summary.get(part)])]
        for name in dict.fromkeys(str(key) for one in several for key in one):
            values = dict.fromkeys(_plain(one[name]) for one in several if one.get(name) not in (None, "", []))
            out += [(name.replace("_", " "), "; ".join(values))] if values else []
    return out


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else clean(str(value))


def _parts(summary: Mapping) -> list[tuple[str, str]]:
    """The runs that were joined: folder, command."""
    parts = summary.get("parts")
    parts = [part for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
    return [(clean(str(part.get("folder"))), command_line(part.get("command"))) for part in parts]


def kill_matrix(selftest: Mapping | None) -> dict[str, Any] | None:
    """Planted bugs by framework, from `selftest.json`."""
    if selftest is None:
        return None
    findings = [entry for entry in selftest.get("findings") or [] if isinstance(entry, Mapping)]
    bugs = [entry for entry in findings if entry.get("mutation")]
    frameworks = list(dict.fromkeys(str(entry.get("framework")) for entry in bugs))
    rows: dict[str, dict[str, Any]] = {}
    for entry in bugs:
        row = rows.setdefault(str(entry["mutation"]), {"what": str(entry.get("what") or ""), "cases": [], "found": {}})
        if (text := str(entry.get("case"))) not in row["cases"]:
            row["cases"].append(text)
        row["found"][str(entry.get("framework"))] = {
            "outcome": str(entry.get("outcome")),
            "good": entry.get("outcome") == "caught",
            "gates": [str(gate) for gate in entry.get("gates") or []],
            "stage": str(entry.get("stage") or ""),
            "margin": _finite(entry.get("margin")),
            "reason": str(entry.get("reason") or ""),
        }
    clean = [entry for entry in findings if not entry.get("mutation")]
    return {
        "rows": rows,
        "frameworks": frameworks,
        "caught": sum(entry.get("outcome") == "caught" for entry in bugs),
        "planted": len(bugs),
        "broken": [entry for entry in clean if entry.get("outcome") != "passed"],
        "clean": len(clean),
        "finished": _time(selftest.get("finished")),
        "seconds": _finite(selftest.get("seconds")),
    }


# What opens on demand.
def data(run: Run) -> dict[str, Any]:
    """Every case, as small as it gets: texts that cases share once, numbers to the digits that are read."""
    texts: dict[str, int] = {}
    word = lambda text: texts.setdefault(text, len(texts))  # noqa: E731
    cases = []
    for text in run.ids:
        mode, transport, fmt = coordinates(text)
        entry: dict[str, Any] = {
            "id": text,
            "mode": mode,
            "transport": transport,
            "format": fmt,
            "words": [[word(what), word(said)] for what, said in words(text)],
        }
        outcome = run.outcomes.get(text)
        cases.append(entry | (_result(outcome) if outcome else {"verdict": NOT_RUN}))
    return {
        "cases": cases,
        "texts": list(texts),
        "stages": {stage.name: stage.title for stage in STAGES},
        "options": kept_options(run.summary.get("command")),
        "transports": [*TRANSPORTS],
    }


def _result(outcome: Outcome) -> dict[str, Any]:
    metrics = dict(outcome.metrics)
    frameworks = _mapping(metrics.pop("frameworks", None))
    failed = metrics.pop("failed_gates", None)
    out = {
        "verdict": outcome.verdict,
        "reason": clean(outcome.reason),
        "seconds": _short(outcome.seconds),
        "margin": _short(metrics.pop("margin", None)),
        "failed": [_short(entry) for entry in failed or [] if isinstance(entry, Mapping)],
        "frameworks": {
            str(name): _framework(found) for name, found in frameworks.items() if isinstance(found, Mapping)
        },
        "log": [clean(str(metrics.pop(key, "") or "")) for key in ("ranks", "kind", "log", "log_tail")],
        "pairs": {str(key): _short(metrics.pop(key)) for key in list(metrics) if " vs " in str(key)},
        "rest": {str(key): _short(value) for key, value in metrics.items()},
    }
    return {key: value for key, value in out.items() if value not in ("", [], {}, None, [""] * 4)}


def _framework(found: Mapping) -> dict[str, Any]:
    out = dict(_short(found))
    stages = [entry for entry in out.get("stages") or [] if isinstance(entry, Mapping)]
    keys = ("stage", "free", "taught", "observed_over_model", "state")
    # the worst place of a stage is told where it went wrong
    out["stages"] = [
        [
            *(entry.get(key) for key in keys),
            *([entry["worst"]] if entry.get("state") != "ok" and "worst" in entry else []),
        ]
        for entry in stages
    ]
    rows = [entry for entry in out.get("worst_rows") or [] if isinstance(entry, Mapping)]
    out["worst_rows"] = [
        [entry.get(key) for key in ("token", "rank", "row", "experts", "margin", "relative")] for entry in rows
    ]
    return out


def _short(value: Any, digits: int = 4) -> Any:
    """A value with floats cut to the digits that are read, and no control characters."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        # a value and what was expected differ late
        return {str(key): _short(item, 9 if key in ("value", "expected") else digits) for key, item in value.items()}
    return [_short(item, digits) for item in value] if isinstance(value, list | tuple) else value


# Commands, links, numbers.
def kept_options(command: Any) -> str:
    """Of the command that made the results, the options that decide how a case runs."""
    words, out = [str(word) for word in command] if isinstance(command, list) else [], []
    for index, word in enumerate(words):
        if word in KEPT_SWITCHES or (word.partition("=")[0] in KEPT_OPTIONS and "=" in word):
            out.append(word)
        elif word in KEPT_OPTIONS and index + 1 < len(words):
            out += [word, words[index + 1]]
    return clean(shlex.join(out))


def command_line(command: Any) -> str:
    return clean(shlex.join(map(str, command))) if isinstance(command, list) else ""


def case_link(text: str) -> str:
    return "#case=" + quote(text.encode("utf-8", "replace"), safe="/+")


def cell_link(mode: str, transport: str, fmt: str) -> str:
    return "#cases?" + urlencode({"mode": mode, "transport": transport, "format": fmt})


def number(value: float | None) -> str:
    """A margin as people read it."""
    if value is None:
        return "–"
    if value >= INFINITE:
        return "∞"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def clean(text: str) -> str:
    """A text without terminal colours and control characters."""
    return CONTROL.sub("", ANSI.sub("", text).replace("\r\n", "\n"))


def _time(value: Any) -> str:
    try:
        return datetime.fromisoformat(value).strftime("%Y-%m-%d %H:%M %Z")
    except (TypeError, ValueError):
        return ""


def _finite(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _mapping(value: Any) -> Mapping:
    return value if isinstance(value, Mapping) else {}
