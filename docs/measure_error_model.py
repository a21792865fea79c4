"""Observed error over the error model's prediction, by dtype, width, top-k, mode and option: the tables of numerics.md.

    python docs/measure_error_model.py             run everything (minutes), print Markdown
    python docs/measure_error_model.py --only mode run one of the tables
    python docs/measure_error_model.py --list      print the case ids

"observed / model" is the RMS error of all output elements over the RMS the model predicts: 1 would be a perfect model,
below 1 a framework that rounds less often than it may. "margin" is the worst error over its bound in the gate `oracle`:
above 1 the case fails.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Iterator

from parity import backends
from parity.backends.base import Options, cores
from parity.case import Case
from parity.runner import Session, session

FORMATS = ("bf16", "f32")
TIMEOUT = 300.0

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


def measure(live: Session, case: Case) -> dict[str, tuple[float, float]]:
    """Framework -> (observed over model, margin of the gate `oracle`)."""
    results, reference = live.execute(case, live.backends)
    judgement = live.harness.judge(case, reference, results)
    if judgement.verdict != "pass":
        print(f"{case}: {judgement.reason}", file=sys.stderr)
    out = {}
    for name, found in judgement.metrics["frameworks"].items():
        margins = [gate.margin for gate in judgement.gates if gate.gate == "oracle" and gate.framework == name]
        out[name] = found["observed_over_model"], max(margin for margin in margins if margin is not None)
    return out


def table(live: Session, title: str) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Lines of one Markdown table, each with what it adds to the summary."""
    names = [backend.name for backend in live.backends]
    heads = [f"{name} {fmt}" for fmt in FORMATS for name in names]
    yield f"| {title} | " + " | ".join(heads) + " |", {}
    yield "|---" * (len(heads) + 1) + "|", {}
    for label, text in TABLES[title]:
        cells, found = [], {}
        for fmt in FORMATS:
            measured = measure(live, Case.parse(text.format(fmt)))
            cells += ["{:.2f} ({:.2f})".format(*measured[name]) for name in names]
            found |= {f"{name} {fmt}": list(measured[name]) for name in names}
        yield f"| {label} | " + " | ".join(cells) + " |", found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=TABLES)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    titles = [args.only] if args.only else list(TABLES)
    if args.list:
        print("\n".join(text.format(fmt) for title in titles for _, text in TABLES[title] for fmt in FORMATS))
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen = [backends.load(name, Options()) for name in backends.DEFAULT]
    summary: dict[str, list[list[float]]] = {}
    with session(chosen, TIMEOUT) as live:
        for title in titles:
            for line, found in table(live, title):
                print(line, flush=True)
                for name, pair in found.items():
                    summary.setdefault(name, []).append(pair)
            print()
        versions = live.pools.all_versions()
    print("| over all rows | observed / model, least to most | median | largest margin |\n|---|---|---|---|")
    for name, pairs in summary.items():
        ratios, margins = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        print(f"| {name} | {min(ratios):.2f} to {max(ratios):.2f} | {statistics.median(ratios):.2f} "
              f"| {max(margins):.2f} |")  # fmt: skip
    print(f"\n{cores()} CPU cores, {platform.machine()}; "
          + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
