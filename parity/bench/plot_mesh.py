"""A run over a mesh as one picture: time by stage, bus bandwidth against size, and scaling; SVG by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parity.bench import mesh
from parity.bench.driver import Run

COLORS = {"route": "#9e9e9e", "dispatch": "#1f77b4", "experts": "#2ca02c", "combine": "#ff7f0e"}
MARKERS = {"dispatch": "o", "combine": "s"}


def draw(run: Run, path: Path, subtitle: str) -> bool:
    """Write the picture; False if there is nothing to draw."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = mesh.measured(run, "mesh")
    panels: list[Callable[[Any], None]] = []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        panels.append(lambda axes, mine=mine: _bars(axes, mine))
    panels += [lambda axes, row=row: _bandwidth(axes, row, rows) for row in mesh.measured(run, mesh.COLLECTIVES)]
    panels += [lambda axes, kind=kind: _scaling(axes, rows, kind) for kind in ("strong", "weak") if _scaled(rows, kind)]
    if not panels:
        return False
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    with rc_context({"svg.hashsalt": "parity", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7 * columns, 4.2 * lines + 0.6), layout="constrained")
        grid: Any = figure.subplots(lines, columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            panel(axes)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        figure.suptitle(f"jax_moe over several devices\n{subtitle}", fontsize=11)
        figure.savefig(path, format="svg", metadata={"Date": None})
    return True


def _bars(axes: Any, rows: list[dict]) -> None:
    """Milliseconds of each stage of each spread, end to end, with the whole as a mark."""
    labels = [row["parallel"] + (f" {row['scaling']}" if "scaling" in row else "") for row in rows]
    left = [0.0] * len(rows)
    for stage in mesh.STAGES:
        lengths = [row[f"{stage}_ms"] for row in rows]
        axes.barh(range(len(rows)), lengths, left=left, color=COLORS[stage], label=stage)
        left = [start + length for start, length in zip(left, lengths, strict=True)]
    axes.plot([row["whole_ms"] for row in rows], range(len(rows)), "k|", markersize=14, label="whole layer")
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=f"{rows[0]['name']}, {rows[0]['shape']['tokens']} tokens")
    axes.grid(True, axis="x", linewidth=0.3)
    axes.legend(fontsize=8)


def _bandwidth(axes: Any, row: dict, rows: list[dict]) -> None:
    """What plain collectives reach, against what a rank sends, and where dispatch and combine lie."""
    for name, points in row["collectives"].items():
        sent = [each["ms"] * each["busbw"] * 1e6 for each in points]
        axes.plot(sent, [each["busbw"] for each in points], linewidth=1, marker=".", label=name.replace("_", "-"))
    mine = [each for each in rows if each["ranks"] == row["ranks"]]
    transports = list(dict.fromkeys(each["parallel"].split("/")[1] for each in mine))
    for stage in mesh.MOVES:
        for index, transport in enumerate(transports):
            points = [
                (each[f"{stage}_bytes"], each[f"{stage}_gbps"])
                for each in mine
                if each["parallel"].endswith(f"/{transport}") and f"{stage}_gbps" in each
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    MARKERS[stage],
                    color=f"C{index + len(row['collectives'])}",
                    fillstyle="none" if stage == "combine" else "full",
                    label=f"{transport}: {stage}",
                )
    axes.set(xscale="log", yscale="log", xlabel="bytes that a rank sends to others", ylabel="GB/s")
    axes.set_title(f"bus bandwidth, {row['ranks']} ranks")
    axes.grid(True, linewidth=0.3)
    axes.legend(fontsize=7, ncols=2)


def _key(row: dict) -> tuple[str, str]:
    """Shape, and the spread without its sizes: `dp.ep/padded`."""
    mode, transport = row["parallel"].split("/")
    parts = [part.rstrip("0123456789") for part in mode.split(".") if part not in ("dp1", "tp1")]
    return row["name"].split("@")[0], f"{'.'.join(parts)}/{transport}"


def _scaled(rows: list[dict], kind: str) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Lines of (ranks, milliseconds of the whole) for each shape and spread; one rank belongs to all of a shape."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    mine = [row for row in rows if row.get("scaling", "both") in (kind, "both")]
    for row in mine:
        if row["ranks"] > 1:
            found.setdefault(_key(row), []).append((row["ranks"], row["whole_ms"]))
    for row in mine:
        if row["ranks"] == 1:
            for key, points in found.items():
                if key[0] == _key(row)[0]:
                    points.append((1, row["whole_ms"]))
    return {key: sorted(points) for key, points in found.items() if len({count for count, _ in points}) > 1}


def _scaling(axes: Any, rows: list[dict], kind: str) -> None:
    counts: set[int] = set()
    for (name, form), points in _scaled(rows, kind).items():
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=1, label=f"{name} {form}")
        counts |= {count for count, _ in points}
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="ms", title=f"{kind} scaling, whole layer")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(counts), map(str, sorted(counts)))
    axes.grid(True, linewidth=0.3)
    axes.legend(fontsize=8)
