"""Several devices, as the command sees them: which spreads to time, and the tables of what came out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.table import Table

from parity.bench import catalog
from parity.bench.driver import Job, Run
from parity.bench.shapes import Shape
from parity.case import CAPABILITIES, TRANSPORTS, Case, CaseError

STAGES = ("route", "dispatch", "experts", "combine")
MOVES = ("dispatch", "combine")
ALL, COLLECTIVES, SHARED, ALONE = "all", "collectives", "+shared", "dp1.tp1/local"
FORMS = {"DP+EP": "dp{n}.tp1.ep", "TP": "dp1.tp{n}", "EP, SP off": "dp1.tp{n}.ep", "EP+SP": "dp1.tp{n}.ep.sp"}
"""The spreads of `all` over n ranks, by parallel mode: tokens different on all ranks, or equal, SP off and on."""
COUNTERPARTS = {"allgather": ("all_gather", "reduce_scatter"), "local": ("all_reduce", "all_reduce")}
"""The collectives that a transport's dispatch and combine are held against; the others': an all-to-all."""


def world(parallel: str) -> int:
    """Ranks of a spread such as `dp4.tp1.ep/padded`."""
    dp, tp = map(int, re.findall(r"^dp(\d+)\.tp(\d+)", parallel)[0])
    return dp * tp


def spread(parallel: str, ranks: int) -> str:
    """The same spread over another number of ranks, tp kept; one rank moves nothing.

    Raises:
      CaseError: tp does not divide the ranks.
    """
    if ranks == 1:
        return ALONE
    tp = int(re.findall(r"\.tp(\d+)", parallel)[0])
    if ranks % tp:
        raise CaseError(f"--ranks {ranks}: tp is {tp}, which does not divide it")
    return re.sub(r"^dp\d+", f"dp{ranks // tp}", parallel)


def every(ranks: int, on_gpu: bool = True) -> list[str]:
    """All transports on so many ranks, in every mode of FORMS that they serve; on CPUs there is no `one_sided`."""
    if ranks == 1:
        return [ALONE]
    return [
        f"{form.format(n=ranks)}/{transport}"
        for mode, form in FORMS.items()
        for transport in TRANSPORTS
        if mode in CAPABILITIES[transport] and (on_gpu or transport != "one_sided")
    ]


def jobs(shapes: Sequence[Shape], parallel: Sequence[str], ranks: Sequence[int], on_gpu: bool = True) -> list[Job]:
    """Every shape on every spread; with `ranks`, each spread over each number of them, scaled both ways.

    Strong scaling keeps the tokens of the shape; weak scaling gives the first number of ranks those, and the others as
    many for each rank. `dp1.tp1/local` is one rank whatever `ranks` say, and so the base of both.

    Args:
      shapes: with the tokens of all ranks.
      parallel: spreads as `dp4.tp1.ep/padded`; "all" for every one that `ranks` allow; "collectives" for plain ones.
        What ends in "+shared" is the layer with and without a shared expert.
      ranks: numbers of them.
      on_gpu: whether they are GPUs.

    Raises:
      CaseError: no such spread, or a shape that does not divide over it.
    """
    entry = catalog.named(["jax_moe"])[0]
    out = []
    for text in parallel:
        if text == COLLECTIVES:
            for count in _needed(ranks, text):
                if count > 1:
                    nothing = Shape(name="-", tokens=1, hidden=1, intermediate=1, experts=1, top_k=1)
                    out.append(Job(entry=entry, what=COLLECTIVES, shape=nothing, parallel=f"dp{count}.tp1"))
    for text, count, where in _placed(parallel, ranks, on_gpu):
        for shape in shapes:
            _check(text, where, shape)
            first = ranks[0] if ranks else count
            weak = max(1, shape.tokens * count // first)
            kinds = {"strong": shape.tokens, "weak": weak}
            for kind, tokens in kinds.items() if weak != shape.tokens else [("both", shape.tokens)]:
                sized = shape if tokens == shape.tokens else shape.with_tokens(tokens)
                extra = {"scaling": kind} if len({*ranks, count}) > 1 else {}
                what = "shared" if text.endswith(SHARED) else "mesh"
                out.append(Job(entry=entry, what=what, shape=sized, parallel=where, extra=extra))
    return list({(job.what, job.shape.id, job.parallel, str(job.extra)): job for job in out}.values())


def _needed(ranks: Sequence[int], text: str) -> Sequence[int]:
    if not ranks:
        raise CaseError(f"--parallel {text}: say over how many ranks, as in --ranks 2,4")
    return ranks


def _placed(parallel: Sequence[str], ranks: Sequence[int], on_gpu: bool) -> Iterator[tuple[str, int, str]]:
    """What was typed, a number of ranks, and a spread over so many."""
    for text in parallel:
        plain = text.removesuffix(SHARED)
        if plain == ALL:
            yield from ((text, count, where) for count in _needed(ranks, text) for where in every(count, on_gpu))
        elif plain == ALONE:
            yield text, 1, plain
        elif re.match(r"dp\d+\.tp\d+[^/]*/\w+$", plain):
            for count in ranks or (world(plain),):
                yield text, count, spread(plain, count) if ranks else plain
        elif plain != COLLECTIVES:
            raise CaseError(
                f"--parallel {text!r}: expected mode and transport of a case id, as dp4.tp1.ep/padded, or {ALL}, or "
                f"{COLLECTIVES}"
            )


def _check(text: str, parallel: str, shape: Shape) -> None:
    case = Case.parse(
        f"{parallel}/bf16/t1.d{shape.hidden}.f{shape.intermediate}/e{shape.experts}.k{shape.top_k}/gate+renorm"
        + (SHARED if text.endswith(SHARED) else "")
    )
    if case.dp > 1 and not case.ep:
        raise CaseError(f"--parallel {parallel!r} moves no tokens between ranks: add '.ep'")


def busbw(run: Run, ranks: int, collective: str, sent: float) -> float | None:
    """GB/s of a plain collective of this run in which a rank sends so many bytes, between the sizes that were timed."""
    for row in run.rows:
        if row["status"] == "ok" and row["what"] == COLLECTIVES and row["ranks"] == ranks:
            points = [(each["ms"] * each["busbw"] * 1e6, each["busbw"]) for each in row["collectives"][collective]]
            return _between(sorted(points), sent)
    return None


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear in the logarithm of x; beyond the ends, the value there."""
    if x <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if x <= right:
            return low + (high - low) * math.log(x / left) / math.log(right / left)
    return points[-1][1]


def counterpart(parallel: str, stage: str) -> str:
    """The plain collective that a transport's stage is held against."""
    mode, transport = parallel.split("/")
    if stage == "combine" and ".ep" in mode and ".sp" not in mode and not re.search(r"\.tp1\b", mode):
        return "all_reduce"  # SP off: the sum over tp
    return COUNTERPARTS.get(transport, ("all_to_all", "all_to_all"))[MOVES.index(stage)]


def measured(run: Run, what: str) -> list[dict]:
    return [row for row in run.rows if row["what"] == what and row["status"] in ("ok", "wrong")]


def tables(run: Run) -> list[Table]:
    """Whatever of the three kinds there is: spreads, shared experts, plain collectives; and what has no numbers."""
    found = [_spreads(run), _shared(run), _collectives(run), _missing(run)]
    return [table for table in found if table.row_count]


def _table(words: Sequence[str], numbers: Sequence[str]) -> Table:
    out = Table(box=None, pad_edge=False, header_style="bold")
    for name in words:
        out.add_column(name, no_wrap=True)
    for name in numbers:
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("")
    return out


def _head(row: dict) -> list[str]:
    return [row["name"], row["parallel"] + f" {row.get('scaling', '')}".rstrip(), str(row["tokens_per_rank"])]


def _notes(row: dict) -> str:
    notes = ["WRONG"] * (row["status"] == "wrong") + ["host clock"] * (row["clock"] == "wall")
    return ", ".join(notes)


def _spreads(run: Run) -> Table:
    """One line a spread: milliseconds by stage, and GB/s that each rank sends, of those of the plain collective."""
    out = _table(
        ("shape", "spread", "tokens/rank"), ("whole ms", *STAGES, "sum", "dispatch GB/s", "combine GB/s", "error")
    )
    for row in measured(run, "mesh"):
        times = [row["whole_ms"], *(row[f"{name}_ms"] for name in STAGES)]
        speeds = []
        for stage in MOVES:
            if f"{stage}_gbps" not in row:
                speeds.append("-")
                continue
            plain = busbw(run, row["ranks"], counterpart(row["parallel"], stage), row[f"{stage}_bytes"])
            speeds.append(f"{row[f'{stage}_gbps']:.3g}" + (f" of {plain:.3g}" if plain else ""))
        cells = [f"{value:.4g}" for value in (*times, sum(times[1:]))]
        out.add_row(*_head(row), *cells, *speeds, f"{row['error']:.1e}", _notes(row))
    return out


def _shared(run: Run) -> Table:
    out = _table(
        ("shape", "spread", "tokens/rank"),
        ("with ms", "without ms", "shared ms", "overlap", "exchange hidden", "error"),
    )
    for row in measured(run, "shared"):
        times = [f"{row[f'{name}_ms']:.4g}" for name in ("whole", "without", "shared")]
        hidden = f"{row['exchange_hidden']:.0%} of {row['exchange_ms']:.3g} ms" if "exchange_ms" in row else "-"
        out.add_row(*_head(row), *times, f"{row['overlap']:.0%}", hidden, f"{row['error']:.1e}", _notes(row))
    return out


def _collectives(run: Run) -> Table:
    rows = measured(run, COLLECTIVES)
    names = list(rows[0]["collectives"]) if rows else []
    out = _table(("ranks", "bytes"), [f"{name} GB/s (us)" for name in names])
    for row in rows:
        for points in zip(*row["collectives"].values(), strict=True):
            cells = [f"{each['busbw']:.3g} ({each['ms'] * 1e3:.3g})" for each in points]
            out.add_row(str(row["ranks"]), f"{points[0]['size']:,}", *cells, _notes(row))
    return out


def _missing(run: Run) -> Table:
    out = _table(("shape", "spread", "not timed"), ())
    for row in run.rows:
        if row["status"] not in ("ok", "wrong"):
            out.add_row(row["name"], row["parallel"], f"{row['what']}: {row['status']}: {row['reason']}")
    return out
