"""Observed error over the error model's prediction, of the output and of each stage, for the page on numerics.

    python docs/measure_error_model.py             run everything (minutes), print Markdown
    python docs/measure_error_model.py --only mode run one of the sweeps
    python docs/measure_error_model.py --list      print the case ids
    python docs/measure_error_model.py --save      also keep the points and draw them: error_model.json, error_model.svg
    python docs/measure_error_model.py --draw      draw error_model.svg from error_model.json again, run nothing

"observed / model" is the RMS error of all elements over the RMS the model predicts: 1 would be a perfect model, below 1
a framework that rounds less often than it may. "margin" is the worst error over its bound, in the gate `oracle` or in a
taught stage: above 1 the case fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from parity import backends
from parity.backends.base import Options, cores
from parity.case import Case
from parity.runner import Session, session
from parity.stages import STAGES
from parity.tolerance import SLACK

FORMATS = ("bf16", "f32")
TIMEOUT = 300.0
DATA, PLOT = (Path(__file__).parent / f"error_model.{kind}" for kind in ("json", "svg"))

# title -> rows of (what varies, case id with {} for the format)
TABLES = {
    "width": [
        (f"D {d}, F {f}", f"dp1.tp1/local/{{}}/t48.d{d}.f{f}/e8.k2")
        for d, f in ((32, 32), (64, 64), (256, 256), (1024, 256), (256, 1024), (1024, 1024))
    ],
    "top-k": [(f"K {k}", f"dp1.tp1/local/{{}}/t48.d256.f256/e16.k{k}") for k in (1, 2, 4, 8, 16)],
    "mode": [
        ("DP", "dp2.tp1/local/{}/t24.d256.f256/e8.k2/shared+gate"),
        ("TP 2", "dp1.tp2/local/{}/t48.d256.f256/e8.k2/shared+gate"),
        ("TP 4", "dp1.tp4/local/{}/t48.d256.f256/e8.k2/shared+gate"),
        ("DP+TP", "dp2.tp2/local/{}/t24.d256.f256/e8.k2/shared+gate"),
        ("DP+EP", "dp4.tp1.ep/allgather/{}/t12.d256.f256/e8.k2/shared+gate"),
        ("EP+SP", "dp2.tp2.ep/allgather/{}/t24.d256.f256/e8.k2/shared+gate"),
        ("EP+SP native", "dp2.tp2.ep.native/allgather/{}/t24.d256.f256/e8.k2/shared+gate"),
        ("EP, SP off", "dp2.tp2.ep.nosp/allgather/{}/t24.d256.f256/e8.k2/shared+gate"),
    ],
    "option": [
        (name, f"dp1.tp1/local/{{}}/t48.d256.f256/e16.k4/{name}")
        for name in ("gate", "shared", "latent", "weightin+sigmoid", "renorm", "relu2", "swigluoai+expertbias", "mean")
    ],
}


def measure(live: Session, case: Case) -> dict[str, dict]:
    """Framework -> "output", the ratio and the margin of the gate `oracle`, and "stages", the lines of its table."""
    results, reference = live.execute(case, live.backends)
    judgement = live.harness.judge(case, reference, results)
    if judgement.verdict != "pass":
        print(f"{case}: {judgement.reason}", file=sys.stderr)
    out = {}
    for name, found in judgement.metrics["frameworks"].items():
        margins = [gate.margin for gate in judgement.gates if gate.gate == "oracle" and gate.framework == name]
        out[name] = {
            "output": (found["observed_over_model"], max(margin for margin in margins if margin is not None)),
            "stages": found["stages"],
        }
    return out


def table(live: Session, title: str, found: dict[str, list[dict]]) -> Iterator[str]:
    """Lines of one Markdown table; what was measured is added to `found`, by framework and format."""
    names = [backend.name for backend in live.backends]
    heads = [f"{name} {fmt}" for fmt in FORMATS for name in names]
    yield f"| {title} | " + " | ".join(heads) + " |"
    yield "|---" * (len(heads) + 1) + "|"
    for label, text in TABLES[title]:
        cells = []
        for fmt in FORMATS:
            measured = measure(live, Case.parse(text.format(fmt)))
            for name in names:
                cells.append("{:.2f} ({:.2f})".format(*measured[name]["output"]))
                found.setdefault(f"{name} {fmt}", []).append(measured[name])
        yield f"| {label} | " + " | ".join(cells) + " |"


def output_summary(found: dict[str, list[dict]]) -> Iterator[str]:
    """All rows of all sweeps together."""
    yield "| over all rows | observed / model, least to most | median | largest margin |"
    yield "|---|---|---|---|"
    for name, rows in found.items():
        ratios, margins = zip(*(row["output"] for row in rows), strict=True)
        yield f"| {name} | {_range(ratios)} | {statistics.median(ratios):.2f} | {max(margins):.2f} |"


def stage_summary(found: dict[str, list[dict]]) -> Iterator[str]:
    """Stage by stage, taught: ratios, and in brackets margins, from least to most."""
    yield "| stage | " + " | ".join(found) + " |"
    yield "|---" * (len(found) + 1) + "|"
    for stage in STAGES:
        cells = []
        for rows in found.values():
            lines = [line for row in rows for line in row["stages"] if line["stage"] == stage.name]
            ratios = [line["observed_over_model"] for line in lines if line["observed_over_model"]]
            margins = [line["taught"] for line in lines if line["taught"] is not None and line["observed_over_model"]]
            exact = [line["taught"] for line in lines if line["observed_over_model"] is None]
            words = [f"{_range(ratios)} ({_range(margins)})"] if margins else []
            cells.append("; ".join(words + ["exact"] * (bool(exact) and max(exact) == 0)))
        yield f"| {stage.title} | " + " | ".join(cells) + " |"


def _range(values) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def points(found: dict[str, list[dict]]) -> dict[str, list[list[float]]]:
    """For each framework and format: the RMS error of a stage that is predicted, and observed, over the RMS value."""
    out = {}
    for name, rows in found.items():
        lines = [line for row in rows for line in row["stages"] if line["predicted"] and line["observed_over_model"]]
        pairs = [(line["predicted"], line["predicted"] * line["observed_over_model"]) for line in lines]
        out[name] = [[float(f"{value:.3g}") for value in pair] for pair in sorted(set(pairs))]
    return out


def draw(data: dict[str, list[list[float]]]) -> str:
    """Observed against predicted, both logarithmic; on the line the model is exact, the dashed line is the bound."""
    low, high, size, left, top = -9.0, -1.0, 480, 60, 16
    colours = {"jax": "#2f6f9f", "torch": "#b3641d"}

    def x(value: float) -> float:
        return round(left + (math.log10(value) - low) / (high - low) * size, 1)

    def y(value: float) -> float:
        return round(top + size - (math.log10(value) - low) / (high - low) * size, 1)

    ends = 10**low, 10**high
    out = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {left + size + 24} {top + size + 52}' "
        "font-family='system-ui, sans-serif' font-size='12'>",
        "<title>RMS error of each stage, observed against predicted</title>",
        f"<rect width='{left + size + 24}' height='{top + size + 52}' fill='#fbfbf9'/>",
    ]
    for power in range(int(low), int(high) + 1):
        at = 10.0**power
        out.append(f"<path d='M{x(at)},{top}V{top + size}M{left},{y(at)}H{left + size}' stroke='#e3e4e8'/>")
        out.append(f"<text x='{x(at)}' y='{top + size + 16}' text-anchor='middle' fill='#5b6472'>1e{power}</text>")
        out.append(f"<text x='{left - 6}' y='{y(at) + 4}' text-anchor='end' fill='#5b6472'>1e{power}</text>")
    line = "M" + "L".join(f"{x(end)},{y(end)}" for end in ends)
    bound = f"M{x(ends[0])},{y(ends[0] * SLACK)}L{x(ends[1] / SLACK)},{y(ends[1])}"
    out.append(f"<path d='{line}' stroke='#1f2430'/><path d='{bound}' stroke='#1f2430' stroke-dasharray='4 3'/>")
    for index, (name, pairs) in enumerate(data.items()):
        colour = colours.get(name.split()[0], "#3d7a4b")
        dots = "".join(f"M{x(predicted)},{y(observed)}h0" for predicted, observed in pairs if observed > ends[0])
        out.append(f"<path d='{dots}' stroke='{colour}' stroke-width='4' stroke-linecap='round' opacity='.45'/>")
        out.append(
            f"<text x='{left + 12}' y='{top + 20 + 16 * index}' fill='{colour}'>{name}: {len(pairs)} points</text>"
        )
    middle, ink = left + size / 2, "text-anchor='middle' fill='#1f2430'"
    out.append(f"<text x='{middle}' y='{top + size + 40}' {ink}>predicted RMS error / RMS value</text>")
    out.append(f"<text transform='translate(14 {top + size / 2}) rotate(-90)' {ink}>observed</text>")
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=TABLES)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    titles = [args.only] if args.only else list(TABLES)
    if args.list:
        print("\n".join(text.format(fmt) for title in titles for _, text in TABLES[title] for fmt in FORMATS))
        return 0
    if args.draw:
        PLOT.write_text(draw(json.loads(DATA.read_text(encoding="utf-8"))), encoding="utf-8")
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen = [backends.load(name, Options()) for name in backends.DEFAULT]
    found: dict[str, list[dict]] = {}
    with session(chosen, TIMEOUT) as live:
        for title in titles:
            for line in table(live, title, found):
                print(line, flush=True)
            print()
        versions = live.pools.all_versions()
    for summary in (output_summary, stage_summary):
        print("\n".join(summary(found)) + "\n")
    if args.save:
        DATA.write_text(json.dumps(points(found)).replace("]], ", "]],\n ") + "\n", encoding="utf-8")
        PLOT.write_text(draw(points(found)), encoding="utf-8")
    print(f"{cores()} CPU cores, {platform.machine()}; "
          + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
