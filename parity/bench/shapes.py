"""What is timed: sizes of a layer, by a name or by numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from parity.case import Case, CaseError, Flags

WHATS = ("layer", "gate_up", "down", "grouped_matmul", "gather", "combine", "routing")
"""The layer, and the operations it consists of."""
SWEEP = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
"""Tokens of a model that is named without any."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a bfloat16 layer with gated SiLU: tokens T, hidden D, intermediate F, experts E, top-k K."""

    name: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    def __post_init__(self) -> None:
        for field in ("tokens", "hidden", "intermediate", "experts", "top_k"):
            if getattr(self, field) < 1:
                raise CaseError(f"shape {self.name!r}: {field} is {getattr(self, field)}; it must be at least 1")
        if self.top_k > self.experts:
            raise CaseError(f"shape {self.name!r}: top-k is {self.top_k} of {self.experts} experts")

    @property
    def rows(self) -> int:
        """Token-expert pairs."""
        return self.tokens * self.top_k

    @property
    def model(self) -> str:
        """Everything but the tokens: shapes that share it share their weights."""
        return f"d{self.hidden}.f{self.intermediate}/e{self.experts}.k{self.top_k}"

    @property
    def id(self) -> str:
        return f"t{self.tokens}.{self.model}"

    def with_tokens(self, tokens: int) -> Shape:
        return replace(self, tokens=tokens, name=f"{self.name}@{tokens}")


MODELS = {
    "120b": (4096, 1024, 128, 8),  # SonicMoE's 120B class
    "qwen3_30b": (2048, 768, 128, 8),
    "mixtral": (4096, 14336, 8, 2),
    "deepseek_v3": (7168, 2048, 256, 8),
    "gpt_oss_120b": (2880, 2880, 128, 4),
}
"""Hidden size, intermediate size, experts, top-k. The names are those of the models whose layers have these sizes."""
PREFILL = {"120b": 32768, "qwen3_30b": 8192, "mixtral": 4096, "deepseek_v3": 4096, "gpt_oss_120b": 8192}
DECODE = (("qwen3_30b", 1), ("qwen3_30b", 16), ("qwen3_30b", 64), ("qwen3_30b", 256), ("deepseek_v3", 64))


def _shape(name: str, model: str, tokens: int) -> Shape:
    hidden, intermediate, experts, top_k = MODELS[model]
    return Shape(
        name=name, tokens=tokens, hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k
    )  # fmt: skip


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in [_shape(f"prefill_{model}", model, tokens) for model, tokens in PREFILL.items()]
    + [_shape(f"decode{tokens}_{model}", model, tokens) for model, tokens in DECODE]
}
"""The ten shapes of docs/kernels.md."""
TINY = Shape(name="tiny", tokens=24, hidden=128, intermediate=64, experts=8, top_k=2)
"""What is timed on a CPU when nothing is named: seconds, not minutes."""


def parse(text: str) -> list[Shape]:
    """The shapes that one word of the command line names.

    Args:
      text: a shape (`prefill_mixtral`, `tiny`), a model (`mixtral`: one shape for each of SWEEP), sizes
        (`t64.d128.f96/e8.k2`), or a whole case id without flags, whose mesh and transport do not matter here.

    Raises:
      CaseError: neither, or a case with flags: only the plain layer is timed.
    """
    if text in SHAPES:
        return [SHAPES[text]]
    if text == TINY.name:
        return [TINY]
    if text in MODELS:
        return [_shape(f"{text}@{tokens}", text, tokens) for tokens in SWEEP]
    if match := re.fullmatch(r"t(\d+)\.d(\d+)\.f(\d+)/e(\d+)\.k(\d+)", text):
        tokens, hidden, intermediate, experts, top_k = map(int, match.groups())
        return [
            Shape(name=text, tokens=tokens, hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k)
        ]  # fmt: skip
    if text.count("/") < 4:
        known = ", ".join([*SHAPES, TINY.name, *MODELS])
        raise CaseError(f"unknown shape {text!r}; give sizes as t64.d128.f96/e8.k2, a case id, or one of: {known}")
    case = Case.parse(text)
    if case.flags != Flags() or case.format != "bf16":
        raise CaseError(f"case {text!r}: the benchmark times the plain bf16 layer, without flags; give its sizes alone")
    return parse(f"t{case.total_tokens}.d{case.hidden}.f{case.intermediate}/e{case.experts}.k{case.top_k}")


def choose(names: Sequence[str], tokens: Sequence[int], default: Sequence[Shape]) -> list[Shape]:
    """The shapes to time, those of a model together, each once.

    Args:
      names: words as `parse` takes them; none: `default`.
      tokens: replaces the tokens of every shape; empty: each keeps its own.
      default: used when nothing is named.
    """
    shapes = [shape for name in names for shape in parse(name)] if names else list(default)
    if tokens:
        by_model = {shape.model: replace(shape, name=_model_name(shape)) for shape in shapes}
        shapes = [shape.with_tokens(count) for shape in by_model.values() for count in tokens]
    order = list(dict.fromkeys(shape.model for shape in shapes))
    found = {shape.id: shape for shape in reversed(shapes)}
    return sorted(found.values(), key=lambda shape: (order.index(shape.model), shape.tokens))


def _model_name(shape: Shape) -> str:
    sizes = (shape.hidden, shape.intermediate, shape.experts, shape.top_k)
    return next((name for name, values in MODELS.items() if values == sizes), shape.model)
