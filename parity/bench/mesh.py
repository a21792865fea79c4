"""Several devices, as the command sees them: which spreads to time, and the table of what came out."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.table import Table

from parity.bench import catalog
from parity.bench.driver import Job, Run
from parity.bench.shapes import Shape
from parity.case import Case, CaseError

STAGES = ("whole", "dispatch", "experts", "combine")
SPEEDS = ("dispatch", "combine", "all_to_all", "all_gather")


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
        return "dp1.tp1/local"
    tp = int(re.findall(r"\.tp(\d+)", parallel)[0])
    if ranks % tp:
        raise CaseError(f"--ranks {ranks}: tp is {tp}, which does not divide it")
    return re.sub(r"^dp\d+", f"dp{ranks // tp}", parallel)


def jobs(shapes: Sequence[Shape], parallel: Sequence[str], ranks: Sequence[int]) -> list[Job]:
    """Every shape on every spread; with `ranks`, each spread over each number of them, scaled both ways.

    Strong scaling keeps the tokens of the shape; weak scaling gives the first number of ranks those, and the others as
    many for each rank.

    Raises:
      CaseError: no such spread, or a shape that does not divide over it.
    """
    entry = catalog.named(["jax_moe"])[0]
    out = []
    for shape in shapes:
        for text in parallel:
            if not re.match(r"dp\d+\.tp\d+[^/]*/\w+$", text):
                raise CaseError(f"--parallel {text!r}: expected mode and transport of a case id, as dp4.tp1.ep/padded")
            for count in ranks or (world(text),):
                where = spread(text, count) if ranks else text
                _check(where, shape)
                weak = shape.tokens * count // (ranks[0] if ranks else count)
                kinds = {"strong": shape.tokens, "weak": weak}
                for kind, tokens in kinds.items() if weak != shape.tokens else [("both", shape.tokens)]:
                    sized = shape if tokens == shape.tokens else shape.with_tokens(tokens)
                    extra = {"scaling": kind} if len(ranks) > 1 else {}
                    out.append(Job(entry=entry, what="mesh", shape=sized, parallel=where, extra=extra))
    return list({(job.shape.id, job.parallel, str(job.extra)): job for job in out}.values())


def _check(parallel: str, shape: Shape) -> None:
    case = Case.parse(
        f"{parallel}/bf16/t1.d{shape.hidden}.f{shape.intermediate}/e{shape.experts}.k{shape.top_k}/gate+renorm"
    )
    if case.world > 1 and not case.ep:
        raise CaseError(f"--parallel {parallel!r} moves no tokens between ranks: add '.ep'")


def table(run: Run) -> Table:
    """One line a spread: milliseconds by stage, and GB/s that each rank sends, beside those of plain collectives."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("shape", "spread", "scaling"):
        out.add_column(name, no_wrap=True)
    columns = ["tokens a rank", *(f"{name} ms" for name in STAGES), *(f"{name} GB/s" for name in SPEEDS), "error"]
    for name in columns:
        out.add_column(name, justify="right")
    out.add_column("")
    for row in run.rows:
        head = [row["name"], row["parallel"], str(row.get("scaling", ""))]
        if row["status"] not in ("ok", "wrong"):
            out.add_row(*head, *("-",) * len(columns), f"{row['status']}: {row['reason']}")
            continue
        times = [f"{row[f'{name}_ms']:.4g}" for name in STAGES]
        speeds = [f"{row[f'{name}_gbps']:.4g}" if f"{name}_gbps" in row else "-" for name in SPEEDS]
        notes = ["WRONG"] * (row["status"] == "wrong") + ["host clock"] * (row["clock"] == "wall")
        out.add_row(*head, str(row["tokens_per_rank"]), *times, *speeds, f"{row['error']:.1e}", ", ".join(notes))
    return out
