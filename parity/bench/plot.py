"""Time against tokens, a panel for each model and kind of work, with the floor as a line; SVG by matplotlib."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from parity.bench import floors
from parity.bench.driver import Run
from parity.bench.report import MEASURED, rows
from parity.bench.shapes import MODELS, Shape

MARKERS = "osD^vP"
SPAN = (1, 65536)
"""Tokens of the horizontal axis, at least."""


def why_not() -> str | None:
    """What is missing to draw, and how to get it."""
    if importlib.util.find_spec("matplotlib") is None:
        return "a plot needs matplotlib, which is not installed; install it with: pip install 'moe-parity[bench]'"
    return None


def panels(run: Run) -> dict[tuple[str, str], dict[str, list[tuple[int, float]]]]:
    """(model, what) -> candidate -> (tokens, milliseconds), by tokens."""
    found: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for row in rows(run):
        if row["status"] in MEASURED and "device_ms" in row:
            shape = Shape(**row["shape"])
            lines = found.setdefault((shape.model, row["what"]), {})
            lines.setdefault(row["candidate"], []).append((shape.tokens, row["device_ms"]))
    return {key: {name: sorted(points) for name, points in lines.items()} for key, lines in found.items()}


def draw(run: Run, path: Path, subtitle: str) -> None:
    """Write the picture.

    Args:
      run: with at least one measured row and its rates.
      path: of the SVG.
      subtitle: where and when.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found, rates = panels(run), run.best
    assert found, "nothing was measured"
    assert rates is not None, "a process that measured has given its rates"
    columns = min(3, len(found))
    lines = math.ceil(len(found) / columns)
    with rc_context({"svg.hashsalt": "parity", "svg.fonttype": "none"}):
        figure = Figure(figsize=(5 * columns, 3.6 * lines + 0.8), layout="constrained")
        grid: Any = figure.subplots(lines, columns, squeeze=False)
        for axes, (key, candidates) in zip(grid.flat, found.items(), strict=False):
            _panel(axes, key, candidates, rates)
        for axes in list(grid.flat)[len(found) :]:
            axes.set_visible(False)
        figure.suptitle(f"Milliseconds against tokens\n{subtitle}", fontsize=11)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _panel(
    axes: Any, key: tuple[str, str], candidates: dict[str, list[tuple[int, float]]], rates: floors.Rates
) -> None:
    model, what = key
    for index, (name, points) in enumerate(candidates.items()):
        axes.plot(*zip(*points, strict=True), marker=MARKERS[index % len(MARKERS)], linewidth=1, label=name)
    tokens = [point[0] for points in candidates.values() for point in points]
    first, last = min(SPAN[0], *tokens), max(SPAN[1], *tokens)
    along = [2**power for power in range(int(math.log2(first)), math.ceil(math.log2(last)) + 1)]
    floor = [floors.work(what, shape_of(model, count)).seconds(rates) * 1e3 for count in along]
    axes.plot(along, floor, color="black", linestyle="--", linewidth=1, label="floor")
    axes.set(xscale="log", yscale="log", title=f"{name_of(model)}: {what}", xlabel="tokens", ylabel="ms")
    axes.set_xscale("log", base=2)
    axes.grid(True, linewidth=0.3)
    axes.legend(fontsize=8)


def shape_of(model: str, tokens: int) -> Shape:
    """A shape from `Shape.model`."""
    sizes = [int(part[1:]) for part in model.replace("/", ".").split(".")]
    hidden, intermediate, experts, top_k = sizes
    return Shape(
        name=model, tokens=tokens, hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k
    )  # fmt: skip


def name_of(model: str) -> str:
    shape = shape_of(model, 1)
    sizes = (shape.hidden, shape.intermediate, shape.experts, shape.top_k)
    return next((name for name, values in MODELS.items() if values == sizes), model)
