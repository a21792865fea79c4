"""Lessons: the oracle's results of each stage as all frameworks and the oracle itself are taught them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from parity.arrays import DTYPE, ArrayRef, bits_of_float32
from parity.case import Case
from parity.oracle.hands import Hands, TaughtHands
from parity.oracle.layer import Reference, reference
from parity.oracle.value import Value

ROUNDED = ("latent_in", "dispatch", "gate_up", "activation", "down")
"""Lessons in the case's dtype; the others are float32."""


def teach(case: Case, arrays: Mapping[str, ArrayRef], folder: Path) -> tuple[Reference, dict[str, ArrayRef]]:
    """The reference with every stage's result, and the lessons of them.

    Args:
      case: what to compute.
      arrays: every array of the case by name.
      folder: where the lessons go.

    Returns:
      The reference, whose `taught` gives what each stage makes of the lessons before it (computed when asked for, and
      kept); and the lessons by name: of each stage that the case has, "topk_ids" and "topk_weights" for the choice.
    """
    free = reference(case, arrays, hands=Hands(case, keeps=True))
    lessons = write(case, free, folder)

    @functools.cache
    def taught(skips: frozenset[str]) -> Reference:
        return reference(case, arrays, hands=TaughtHands(case, lessons, skips))

    # the default is filled in here, or the cache would take it for another argument
    return dataclasses.replace(free, taught=lambda skips=frozenset(): taught(skips)), lessons


def write(case: Case, free: Reference, folder: Path) -> dict[str, ArrayRef]:
    """Write the lessons.

    Raises:
      OSError: no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = {}

    def put(name: str, values: np.ndarray, dtype: str) -> None:
        path = folder / name
        stored = bits_of_float32(values) if dtype == "bfloat16" else values.astype(dtype)
        stored.tofile(path)
        out[name] = ArrayRef(str(path), dtype, stored.shape)

    for stage, value in free.stages.items():
        if stage not in ("inputs", "reduce"):
            put(stage, value.exact, DTYPE[case.format] if stage in ROUNDED else "float32")
    put("topk_ids", free.ids, "int32")
    if "dispatch" not in out:  # rows are copies of tokens
        put("dispatch", _copies(free, case).exact, DTYPE[case.format])
    return out


def _copies(free: Reference, case: Case) -> Value:
    return Value(np.repeat(free.stages["inputs"].exact, case.top_k, axis=0))
