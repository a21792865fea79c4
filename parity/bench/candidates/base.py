"""What a candidate is, and the arguments that all of them are given.

    what             arguments                                          result
    layer            x (T, D), gate (E, D), gate_up, down               (T, D)
    gate_up          rows (R, D), gate_up (E, 2F, D), sizes (E,)        (R, F)
    down             h (R, F), down (E, D, F), sizes                    (R, D)
    grouped_matmul   rows, gate_up, sizes                               (R, 2F)
    gather           x, row_token (R,), position (T, K), sizes          (R, D)
    combine          y (R, D), weights (T, K), position, row_token, row_slot     (T, D)
    routing          x, gate                                            ids, weights (T, K)

Values are bfloat16, integers int32, weights of slots float32. Gate rows come before up rows unless the layout says
other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from parity.bench import draws
from parity.bench.shapes import Shape

LAYOUTS = ("stored", "transposed", "interleaved")
"""Of weights: (E, N, K) as checkpoints store them; (E, K, N); (E, N, K) with gate and up rows by turns."""


class Candidate(ABC):
    """One implementation, in its own process; the module may import what it likes."""

    layout: str = "stored"
    """How it wants the experts' weights; they are made so, and the making is in no time."""

    @abstractmethod
    def operation(self, what: str, shape: Shape) -> Callable[..., Any]:
        """The function to time, of the arguments above (or of what `prepare` made of them)."""

    def prepare(self, what: str, shape: Shape, arguments: tuple, routing: draws.Routing) -> tuple:
        """Called once for each set of inputs, outside of all times."""
        return arguments

    def note(self) -> str:
        """What is to be said of the last operation that was timed: a tile it chose, say."""
        return ""


class Inputs:
    """Makes the arguments of one kind of work, set by set; weights are made once and shared by all sets."""

    def __init__(self, lab: Any, shape: Shape, layout: str) -> None:
        self.lab, self.shape, self.layout = lab, shape, layout
        self.scale = draws.deviations(shape)
        self._weights: dict[str, Any] = {}

    def weights(self, name: str) -> Any:
        if name not in self._weights:
            D, F, E = self.shape.hidden, self.shape.intermediate, self.shape.experts
            if name == "gate":
                self._weights[name] = self.lab.normal(draws.seed("gate"), (E, D), self.scale["gate"])
            else:
                sizes = (2 * F, D) if name == "gate_up" else (D, F)
                layout = "stored" if name == "down" and self.layout == "interleaved" else self.layout
                seeds = [draws.seed(name, expert) for expert in range(E)]
                self._weights[name] = self.lab.stacked(seeds, sizes, self.scale[name], layout)
        return self._weights[name]

    def values(self, name: str, part: int) -> Any:
        T, D, F, R = self.shape.tokens, self.shape.hidden, self.shape.intermediate, self.shape.rows
        sizes = {"x": (T, D), "rows": (R, D), "h": (R, F), "y": (R, D)}[name]
        return self.lab.normal(draws.seed(name, part), sizes, self.scale[name])

    def arguments(self, what: str, part: int, routing: draws.Routing) -> tuple:
        put = self.lab.put
        if what == "layer":
            return self.values("x", part), self.weights("gate"), self.weights("gate_up"), self.weights("down")
        if what in ("gate_up", "grouped_matmul"):
            return self.values("rows", part), self.weights("gate_up"), put(routing.sizes)
        if what == "down":
            return self.values("h", part), self.weights("down"), put(routing.sizes)
        if what == "gather":
            return self.values("x", part), put(routing.row_token), put(routing.position), put(routing.sizes)
        if what == "combine":
            places = (routing.position, routing.row_token, routing.row_slot)
            return self.values("y", part), put(routing.weights), *map(put, places)
        assert what == "routing", what
        return self.values("x", part), self.weights("gate")

    def keep(self, shape: Shape) -> Inputs:
        """The same weights for other tokens of the same model."""
        assert shape.model == self.shape.model, "weights belong to a model"
        other = Inputs(self.lab, shape, self.layout)
        other._weights = self._weights
        return other
