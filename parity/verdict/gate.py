"""What a gate found."""

from __future__ import annotations

import math
from dataclasses import dataclass

GATES = ("sane", "exact", "router", "stages", "oracle", "frameworks", "sensitive")


@dataclass(frozen=True)
class Gate:
    """One gate's finding: `margin` is error over bound where there is a bound (fails above 1), else None."""

    gate: str
    framework: str
    passed: bool
    detail: str
    margin: float | None = None
    stage: str = ""
    """The stage (`parity.stages`) it is about, if it is about one."""


def graded(gate: str, framework: str, margin: float, detail: str, stage: str = "") -> Gate:
    margin = math.inf if math.isnan(margin) else margin
    return Gate(gate, framework, margin <= 1, detail, margin, stage)
