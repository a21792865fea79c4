"""`parity determinism`: is a token's result the same, bit for bit, when the batch around it is another one?

Each case runs as it is, and once more for each way of changing the batch (`parity.promises.PROPERTIES`). A variant is
nothing but other arrays, of a case that may have other counts, so that every backend can be asked. Where the table
promises equal bits, other bits are a failure; elsewhere they are reported.

    T tokens of the case   n tokens watched   E experts   K choices   D hidden
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from parity import report
from parity.arrays import ArrayRef, bits_of_float32, float32_of_bits
from parity.backends.base import Backend
from parity.backends.layout import INPUTS, PADDING, block_counts
from parity.case import Case
from parity.launch import RankError
from parity.promises import KERNELS, LAYERS, PROPERTIES, Promise, promised
from parity.records import plain
from parity.results import RankResult
from parity.runner import Harness, Session, session
from parity.tolerance import UNIT_ROUNDOFF
from parity.verdict.layout import assemble, holdings
from parity.verdict.structure import shown

PASSED, FAILED, BROKEN = 0, 1, 3
OTHER_PADDING = 1.5
_IN_ORDER = {"router_logits": "router logits", "topk_weights": "weights", "y": "output"}
"""What is compared bit for bit, as it is computed."""
KEPT, CHANGED, OPEN, ERROR = "equal", "differs", "not tried", "error"


@dataclass(frozen=True)
class Variant:
    """The same layer with another batch."""

    what: str
    """Of `PROPERTIES`."""
    case: Case
    arrays: Mapping[str, ArrayRef]
    before: np.ndarray
    """(n,) dense index in the case of the tokens that are watched."""
    after: np.ndarray
    """(n,) where they lie in the variant."""
    routed_alike: bool = False
    """Whether all tokens must go to the experts they went to, for the variant to be what it says."""


@dataclass(frozen=True)
class Finding:
    """What became of the watched tokens in one framework."""

    case: str
    framework: str
    what: str
    state: str
    """"equal", "differs", "not tried" or "error"."""
    promised: bool
    tokens: int = 0
    differing: int = 0
    ulps: float = 0.0
    """The largest difference, in ulps of the token's largest value."""
    first: str = ""
    """The first thing that differs: "router logits", "weights" or "output"."""
    reason: str = ""

    @property
    def good(self) -> bool:
        return self.state != ERROR and not (self.promised and self.state == CHANGED)


def variants(case: Case, arrays: Mapping[str, ArrayRef], folder: Path) -> Iterator[Variant]:
    """The ways of changing a case's batch that it allows.

    Args:
      case: which.
      arrays: all of the case's.
      folder: where changed arrays go.
    """
    tokens = {name: np.array(arrays[name].open()) for name in INPUTS if name in arrays}
    ends = np.cumsum(case.tokens)
    rank = np.repeat(np.arange(case.dp), case.tokens)
    place = np.arange(case.total_tokens) - (ends - case.tokens)[rank]
    everyone, watched = np.arange(case.total_tokens), place % 2 == 0

    def variant(
        what: str,
        changed: Mapping[str, np.ndarray],
        before: np.ndarray,
        after: np.ndarray,
        counts: tuple[int, ...] | None = None,
    ) -> Variant:
        sized = case if counts is None else dataclasses.replace(case, tokens=counts)
        here = folder / what
        here.mkdir(parents=True, exist_ok=True)
        out = dict(arrays)
        for name, values in changed.items():
            path = here / name
            values.tofile(path)
            out[name] = ArrayRef(str(path), arrays[name].dtype if name in arrays else "float32", values.shape)
        return Variant(what, sized, out, before, after, routed_alike=what == "values")

    if len(set(block_counts(case))) > 1:
        yield variant("padding", {PADDING: np.array([OTHER_PADDING], np.float32)}, everyone, everyone)
    if not watched.all():
        kept = np.flatnonzero(watched)
        numbers = _other_numbers(case, tokens["x"], arrays["x"].dtype)
        yield variant("values", {"x": np.where(watched[:, None], tokens["x"], numbers)}, kept, kept)
        yield variant("others", _mixed(case, arrays, tokens, watched), kept, kept)
        counts = tuple(-(-count // 2) for count in case.tokens)
        yield variant("fewer", {n: v[watched] for n, v in tokens.items()}, kept, np.arange(len(kept)), counts)
        order = (ends[rank] - 1 - place).astype(np.int64)  # backwards in each DP rank
        yield variant("moved", {n: v[order] for n, v in tokens.items()}, everyone, order)
    if len(set(rank.tolist())) > 1:
        mine = rank == rank[0]
        yield variant("elsewhere", _mixed(case, arrays, tokens, mine), np.flatnonzero(mine), np.flatnonzero(mine))


def _other_numbers(case: Case, x: np.ndarray, dtype: str) -> np.ndarray:
    """(T, D) tokens of twice the size, so that their largest value and mean are others too; routed alike.

    Twice the token, twice the logits: the same order of scores. Where logits or ids are given, any order of the columns
    will do.
    """
    doubled = bits_of_float32(2 * float32_of_bits(x)) if dtype == "bfloat16" else 2 * x
    return doubled if case.flags.gate else doubled[:, ::-1]


def _mixed(
    case: Case, arrays: Mapping[str, ArrayRef], tokens: Mapping[str, np.ndarray], kept: np.ndarray
) -> dict[str, np.ndarray]:
    """Per-token inputs in which all tokens but those `kept` (T,) are others, and prefer other experts."""
    other = {
        "x": lambda v: _other_numbers(case, v, arrays["x"].dtype)[:, :: -1 if case.flags.gate else 1],
        "router_logits": lambda v: np.roll(v, 1, axis=1),
        "topk_ids": lambda v: (v + 1) % case.experts,
        "topk_weights": lambda v: v,
    }
    return {name: np.where(kept[:, None], values, other[name](values)) for name, values in tokens.items()}


def compare(
    case: Case, base: Sequence[RankResult], variant: Variant, changed: Sequence[RankResult], name: str, keeps: bool
) -> Finding:
    """Hold a variant's watched tokens to the same tokens of the case, bit for bit."""
    here, there = _answer(case, base), _answer(variant.case, changed)
    found = Finding(str(case), name, variant.what, KEPT, keeps, tokens=len(variant.before))
    ids, others = here.get("topk_ids"), there.get("topk_ids")
    if variant.routed_alike and ids is not None and others is not None and not np.array_equal(ids, others):
        return dataclasses.replace(found, state=OPEN, reason="the other tokens went to other experts")
    off: dict[str, np.ndarray] = {}
    for key in (key for key in _IN_ORDER if key in here and key in there):
        one, two = here[key][variant.before], there[key][variant.after]
        off[key] = (one.view(np.uint32) != two.view(np.uint32)).any(axis=1)
    first = next((_IN_ORDER[key] for key, tokens in off.items() if tokens.any()), "")
    if not off["y"].any():  # what differs before it, if anything, is rounded away
        return dataclasses.replace(found, first=first)
    one, two = here["y"][variant.before].astype(np.float64), there["y"][variant.after]
    largest = np.maximum(np.abs(one).max(axis=1), np.finfo(np.float32).tiny)
    ulp = 2 * UNIT_ROUNDOFF[case.format] * 2.0 ** np.floor(np.log2(largest))
    ulps = float((np.abs(one - two).max(axis=1) / ulp).max())
    return dataclasses.replace(found, state=CHANGED, differing=int(off["y"].sum()), ulps=ulps, first=first)


def _answer(case: Case, ranks: Sequence[RankResult]) -> dict[str, np.ndarray]:
    """Results of every token by dense index: `y`, and what the framework shows of its router."""
    whole = [ranks[r].y[:count] for r, (_, count) in enumerate(holdings(case)) if case.native or r % case.tp == 0]
    out: dict[str, np.ndarray] = {"y": np.ascontiguousarray(np.concatenate(whole), np.float32)}
    if (decisions := shown(ranks)) is not None:
        for name in ("topk_ids", "topk_weights", "router_logits"):
            if all(getattr(d, name) is not None for d in decisions):
                dtype = np.int32 if name == "topk_ids" else np.float32
                out[name] = np.ascontiguousarray(assemble(case, decisions, name), dtype)
    return out


def run(live: Session, cases: Sequence[Case]) -> Iterator[Finding]:
    """Every case, every way of changing its batch, every framework."""
    for case in cases:
        taking = [backend for backend in live.backends if backend.unsupported(case) is None]
        if not taking:
            continue
        keeps = {b.name: promised(b.name, b.options.platform, case) for b in taking}

        def error(what: str, reason: str, case: Case = case, taking: Sequence[Backend] = taking) -> Iterator[Finding]:
            for backend in taking:
                yield Finding(str(case), backend.name, what, ERROR, False, reason=reason)

        try:
            arrays = live.arrays(case)
            base, _ = live.answers(case, arrays, taking)
        except RankError as trouble:
            yield from error("repeat", trouble.reason)
            continue
        for name, ranks in base.items():
            equal = [result.repeat_equal for result in ranks]
            state = OPEN if None in equal else KEPT if all(equal) else CHANGED
            yield Finding(str(case), name, "repeat", state, "repeat" in keeps[name])
        for variant in variants(case, arrays, live.scratch / "variants"):
            try:
                changed, _ = live.answers(variant.case, variant.arrays, taking)
            except RankError as trouble:
                yield from error(variant.what, trouble.reason)
                continue
            for name, ranks in changed.items():
                yield compare(case, base[name], variant, ranks, name, variant.what in keeps[name])


def main(
    cases: Sequence[Case],
    chosen: Sequence[Backend],
    timeout: float,
    as_json: bool,
    console: Console,
    say: Callable[[str], None] = print,
) -> int:
    """Run the cases and print what changed, or JSON.

    Returns:
      The exit status: 0 if all that is promised was kept, 1 if not, 3 if a rank failed or nothing was compared.
    """
    began, findings = time.monotonic(), []
    with session(chosen, timeout, harness=Harness.default(stages=False)) as live:
        for finding in run(live, cases):
            findings.append(finding)
            console.print(_line(finding), highlight=False, soft_wrap=True)
    broken = [f for f in findings if not f.good]
    compared = any(f.state in (KEPT, CHANGED) for f in findings)
    status = FAILED if any(f.state == CHANGED for f in broken) else BROKEN if broken or not compared else PASSED
    seconds = time.monotonic() - began
    if as_json:
        data = {"status": status, "seconds": round(seconds, 3), "findings": [asdict(f) for f in findings]}
        say(json.dumps(plain(data), indent=2))
        return status
    console.print(table(findings))
    kept = sum(f.promised and f.state == KEPT for f in findings)
    tried = sum(f.promised and f.state in (KEPT, CHANGED) for f in findings)
    console.print(f"{kept} of {tried} promises kept in {report.duration(seconds)}; what is not promised is only shown")
    return status


def _line(finding: Finding) -> str:
    broken = " [red]though promised[/]" if finding.promised and finding.state == CHANGED else ""
    head = f"[{_colour(finding)}]{finding.state:9}[/] {finding.framework:6} {finding.what:9} {escape(finding.case)}"
    return f"{head} [dim]{escape(_detail(finding))}[/]{broken}"


def _colour(finding: Finding) -> str:
    return "green" if finding.state == KEPT else "yellow" if finding.good else "red"


def _detail(finding: Finding) -> str:
    if finding.state != CHANGED:
        return finding.reason
    if not finding.tokens:
        return "in a repeated run"
    return f"{finding.differing} of {finding.tokens} tokens, at most {finding.ulps:.3g} ulps, from {finding.first} on"


def table(findings: Sequence[Finding]) -> Table:
    """Case and framework by what was changed: equal, or how many tokens differ; promises are marked."""
    out = Table(title="is a token's result the same when ...  (* promised)", title_justify="left", show_lines=True)
    out.add_column("case", overflow="fold")
    out.add_column("framework")
    for name in PROPERTIES:
        out.add_column(name)
    by_row: dict[tuple[str, str], dict[str, Finding]] = {}
    for finding in findings:
        by_row.setdefault((finding.case, finding.framework), {})[finding.what] = finding
    for (case, framework), found in by_row.items():
        out.add_row(escape(case), framework, *(_cell(found.get(name)) for name in PROPERTIES))
    return out


def _cell(finding: Finding | None) -> str:
    if finding is None or finding.state == OPEN:
        return "[dim]not tried[/]"
    text = finding.state
    if finding.state == CHANGED and finding.tokens:
        text = f"{finding.differing} of {finding.tokens} differ"
    return f"[{_colour(finding)}]{text}{'*' if finding.promised else ''}[/]"


def promises() -> list[dict]:
    """The tables of promises, as JSON has them."""
    return [
        {"of": of, "framework": p.framework, "platform": p.platform, "what": p.what, "why": p.why}
        | {name: name in p.keeps for name in PROPERTIES}
        for of, rows in (("layer", LAYERS), ("kernel", KERNELS))
        for p in rows
    ]


def promise_tables() -> Iterator[Table]:
    """What layers promise by transport, and what kernels promise."""
    for title, head, rows in (
        ("layers: a token's result is the same when ...", "transport", LAYERS),
        ("kernels: a row's or a token's result is the same when ...", "implementation", KERNELS),
    ):
        out = Table(title=title, title_justify="left", show_lines=True)
        for column in ("framework", "platform", head):
            out.add_column(column)
        for name in PROPERTIES:
            out.add_column(name, justify="center")
        out.add_column("why not more", overflow="fold")
        for promise in rows:
            out.add_row(*_promise_cells(promise))
        yield out


def _promise_cells(promise: Promise) -> tuple[str, ...]:
    marks = ("yes" if name in promise.keeps else "-" for name in PROPERTIES)
    return (promise.framework, promise.platform, promise.what, *marks, promise.why)


def legend() -> str:
    """What the columns mean, a line each."""
    width = max(map(len, PROPERTIES))
    return "\n".join(f"{name:{width}}  {what}" for name, what in PROPERTIES.items())
