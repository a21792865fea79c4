"""Draws the pictures of parallelism.md: what each of four ranks holds, and which collective goes where.

    python docs/pictures/draw.py            write the SVG files beside this script
    python docs/pictures/draw.py --check    exit 1 if a file is not what this script draws

Plain SVG with its own light panel, so that it reads the same on a light and on a dark page. No dependency.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

EXPERTS, BATCH = 8, 8
COLUMN, GAP, LEFT, TOP = 168, 12, 14, 46
INK, SOFT, PANEL, LINE = "#1f2430", "#5b6472", "#fbfbf9", "#c9ccd3"
TOKEN, EXPERT, ABSENT, MOVE, LOCAL = "#2f6f9f", "#b3641d", "#ecebe6", "#3d7a4b", "#e7e4dc"
FONT = "font-family='system-ui, sans-serif'"


@dataclass(frozen=True)
class Rank:
    """One column: its place, the tokens it is given, the experts it holds, and which of how many parts of F."""

    name: str
    tokens: range
    experts: range
    part: tuple[int, int]


@dataclass(frozen=True)
class Step:
    """One row: work on each rank alone (no groups), or a collective within each group of ranks."""

    text: str
    groups: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Mode:
    """One picture."""

    file: str
    title: str
    ranks: tuple[Rank, ...]
    steps: tuple[Step, ...]


def ranks(dp: int, tp: int, *, ep: bool, native: bool = False) -> tuple[Rank, ...]:
    """Four ranks of a mesh, rank = dp index * tp + tp index."""
    out = []
    for r in range(dp * tp):
        d, j = divmod(r, tp)
        share = BATCH // dp
        tokens = range(d * share, (d + 1) * share)
        if native:
            tokens = range(r * BATCH // (dp * tp), (r + 1) * BATCH // (dp * tp))
        local = EXPERTS // (dp * tp)
        experts = range(r * local, (r + 1) * local) if ep else range(EXPERTS)
        out.append(Rank(f"rank {r}: dp {d}, tp {j}", tokens, experts, (0, 1) if ep else (j, tp)))
    return tuple(out)


ALL, OVER_TP, OVER_DP = ((0, 1, 2, 3),), ((0, 1), (2, 3)), ((0, 2), (1, 3))
RUN = "experts on own rows, weighted sum"
MODES = (
    Mode("dp.svg", "DP: four copies of the layer", ranks(4, 1, ep=False), (Step("route"), Step(RUN))),
    Mode(
        "tp.svg",
        "TP: every expert everywhere, a quarter of F each",
        ranks(1, 4, ep=False),
        (
            Step("route (the same on all)"),
            Step("experts on F / 4: partial sums"),
            Step("all-reduce over tp, float32", ALL),
        ),
    ),
    Mode(
        "dp_tp.svg",
        "DP+TP: a TP group for each DP rank",
        ranks(2, 2, ep=False),
        (Step("route"), Step("experts on F / 2: partial sums"), Step("all-reduce over tp, float32", OVER_TP)),
    ),
    Mode(
        "dp_ep.svg",
        "DP+EP: own tokens, own experts",
        ranks(4, 1, ep=True),
        (
            Step("route own tokens"),
            Step("dispatch: all-gather tokens, ids, weights over dp", ALL),
            Step(RUN),
            Step("combine: reduce-scatter over dp, float32", ALL),
        ),
    ),
    Mode(
        "ep_sp.svg",
        "EP+SP: tp ranks share out their tokens",
        ranks(2, 2, ep=True),
        (
            Step("SP scatter: keep own chunk"),
            Step("route own chunk"),
            Step("dispatch: all-gather over dp and tp", ALL),
            Step(RUN),
            Step("combine: reduce-scatter over dp and tp, float32", ALL),
            Step("+ whole shared expert, round"),
            Step("SP gather: all-gather over tp, trim", OVER_TP),
        ),
    ),
    Mode(
        "ep_native.svg",
        "EP+SP native: tokens arrive and leave in chunks",
        ranks(2, 2, ep=True, native=True),
        (
            Step("route own chunk"),
            Step("dispatch: all-gather over dp and tp", ALL),
            Step(RUN),
            Step("combine: reduce-scatter over dp and tp, float32", ALL),
            Step("+ whole shared expert, round"),
        ),
    ),
    Mode(
        "ep_nosp.svg",
        "EP, SP off: tp ranks do not share out tokens, only experts",
        ranks(2, 2, ep=True),
        (
            Step("route (the same over tp)"),
            Step("dispatch: all-gather over dp", OVER_DP),
            Step(RUN),
            Step("combine: reduce-scatter over dp, float32", OVER_DP),
            Step("+ half of the shared expert"),
            Step("all-reduce over tp, float32", OVER_TP),
        ),
    ),
)


def text(x: float, y: float, words: str, *, size: int = 12, fill: str = INK, anchor: str = "start") -> str:
    return f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{fill}' text-anchor='{anchor}' {FONT}>{words}</text>"


def box(x: float, y: float, w: float, h: float, fill: str, stroke: str = "none") -> str:
    return f"<rect x='{x:g}' y='{y:g}' width='{w:g}' height='{h:g}' rx='3' fill='{fill}' stroke='{stroke}'/>"


def sheet(width: float, height: float, title: str, parts: list[str]) -> str:
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' width='{width:g}' "
        f"height='{height:g}' role='img'><title>{title}</title>"
    )
    panel = f"<rect width='{width:g}' height='{height:g}' rx='8' fill='{PANEL}' stroke='{LINE}'/>"
    return "\n".join([head, panel, text(LEFT, 26, title, size=15), *parts, "</svg>"]) + "\n"


def column(x: float, rank: Rank) -> list[str]:
    """What one rank holds."""
    out = [text(x, TOP + 10, rank.name), text(x, TOP + 30, "tokens in", size=10, fill=SOFT)]
    cell = COLUMN / BATCH
    for t in range(BATCH):
        here = t in rank.tokens
        out.append(box(x + t * cell, TOP + 36, cell - 3, 18, TOKEN if here else ABSENT))
        if here:
            out.append(text(x + t * cell + (cell - 3) / 2, TOP + 49, str(t), size=10, fill="#ffffff", anchor="middle"))
    out.append(text(x, TOP + 72, "experts (height: F)", size=10, fill=SOFT))
    for e in range(EXPERTS):
        left, top, height = x + e * cell, TOP + 78, 48
        out.append(box(left, top, cell - 3, height, ABSENT))
        if e in rank.experts:
            index, parts = rank.part
            out.append(box(left, top + index * height / parts, cell - 3, height / parts, EXPERT))
        out.append(text(left + (cell - 3) / 2, top + height + 12, str(e), size=9, fill=SOFT, anchor="middle"))
    return out


def steps(mode: Mode, y: float) -> tuple[list[str], float]:
    """The rows below the ranks, and where they end."""
    out = []
    for step in mode.steps:
        if not step.groups:
            for r in range(len(mode.ranks)):
                x = LEFT + r * (COLUMN + GAP)
                out += [box(x, y, COLUMN, 22, LOCAL), text(x + COLUMN / 2, y + 15, step.text, size=9, anchor="middle")]
            y += 28
            continue
        for row in [(group,) for group in step.groups] if overlap(step.groups) else [step.groups]:
            for members in row:
                left = LEFT + members[0] * (COLUMN + GAP)
                width = (members[-1] - members[0]) * (COLUMN + GAP) + COLUMN
                out.append(box(left, y, width, 22, "#dcebdf", MOVE))
                for r in members:
                    middle = LEFT + r * (COLUMN + GAP) + COLUMN / 2
                    out.append(f"<path d='M{middle - 6:g} {y - 5:g} l6 5 l6 -5 z' fill='{MOVE}'/>")
                label = step.text if len(members) > 2 else f"{step.text} (ranks {listed(members)})"
                out.append(text(left + width / 2, y + 15, label, size=10, anchor="middle"))
            y += 30
    return out, y


def overlap(groups: tuple[tuple[int, ...], ...]) -> bool:
    """Whether groups interleave, so that they need a row each."""
    return any(a[0] < b[0] < a[-1] for a in groups for b in groups)


def listed(members: tuple[int, ...]) -> str:
    return " and ".join(map(str, members))


def draw(mode: Mode) -> str:
    parts = []
    for r, rank in enumerate(mode.ranks):
        parts += column(LEFT + r * (COLUMN + GAP), rank)
    rows, end = steps(mode, TOP + 152)
    width = 2 * LEFT + len(mode.ranks) * (COLUMN + GAP) - GAP
    return sheet(width, end + 8, mode.title, parts + rows)


def draw_chunks(tokens: int = 5, tp: int = 4) -> str:
    """SP scatter, gather and trim of a few tokens."""
    chunk = -(-tokens // tp)
    cell, high = 40, 26
    width = 2 * LEFT + chunk * tp * cell + tp * GAP + 120

    def row(y: float, label: str, cells: list[str], split: bool) -> list[str]:
        out = [text(LEFT, y + 17, label, size=11, fill=SOFT)]
        for i, word in enumerate(cells):
            x = LEFT + 130 + i * cell + (i // chunk * GAP if split else 0)
            real = word.isdigit()
            out.append(box(x, y, cell - 3, high, TOKEN if real else ABSENT, "none" if real else LINE))
            fill = "#ffffff" if real else SOFT
            out.append(text(x + (cell - 3) / 2, y + 17, word, size=11, fill=fill, anchor="middle"))
        return out

    real = [str(i) for i in range(tokens)]
    padded = real + ["pad"] * (chunk * tp - tokens)
    parts = row(46, "x on every rank", real, False)
    parts += row(88, "chunk of each rank", padded, True)
    for r in range(tp):
        x = LEFT + 130 + r * (chunk * cell + GAP) + chunk * cell / 2
        parts.append(text(x, 128, f"rank {r}", size=10, fill=SOFT, anchor="middle"))
    parts += row(140, "all-gather over tp", padded, False)
    parts += row(182, "trim to t", real, False)
    return sheet(width, 224, f"SP with t = {tokens} on tp = {tp}: chunks of {chunk}", parts)


def pictures() -> dict[str, str]:
    """File name -> SVG."""
    return {mode.file: draw(mode) for mode in MODES} | {"sp_chunks.svg": draw_chunks()}


def main() -> int:
    folder, stale = Path(__file__).parent, []
    for name, svg in pictures().items():
        path = folder / name
        if "--check" in sys.argv[1:]:
            stale += [name] * (not path.exists() or path.read_text(encoding="utf-8") != svg)
        else:
            path.write_text(svg, encoding="utf-8")
    if stale:
        print("not what draw.py draws: " + ", ".join(stale), file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
