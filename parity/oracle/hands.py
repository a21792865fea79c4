"""What one stage of the oracle hands to the next: its own exact result, or the lesson that the frameworks get too.

    T tokens   K choices of a token   rows of an expert's input are numbered token * K + slot

*Free*: each result goes on with the error it has gathered, rounded where a layer rounds. *Taught*: each stage starts
anew from the lesson, which all sides have bit for bit, so that only its own error is left.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from parity.arrays import ArrayRef, float32_of_bits, values
from parity.case import Case
from parity.oracle.value import Value
from parity.tolerance import STAGE_ERRORS, ErrorModel


class Hands:
    """Free, and keeping what passes through if asked."""

    teaches = False

    def __init__(self, case: Case, keeps: bool) -> None:
        self.case, self.keeps, self.model = case, keeps, ErrorModel(case.format)
        self.kept: dict[str, Value] = {}
        """By stage, (T, ...) or, of stages by row, (T * K, ...); "topk_weights" (T, K), and "inputs", what rows are
        copies of."""

    def on(self, stage: str, value: Value, at: np.ndarray | None = None) -> Value:
        """Take a stage's result (rows `at` of all), and give what the next stage reads."""
        self.keep(stage, value, at)
        return value if STAGE_ERRORS[stage].rounds == "no" else value.rounded(self.model)

    def choice(self, ids: np.ndarray, weights: Value) -> tuple[np.ndarray, Value]:
        self.keep("topk_weights", weights)
        return ids, weights

    def keep(self, stage: str, value: Value, at: np.ndarray | None = None) -> None:
        if not self.keeps:
            return
        if at is None:
            self.kept[stage] = value
            return
        whole = self.kept.get(stage)
        if whole is None:
            shape = (self.case.total_tokens * self.case.top_k, value.exact.shape[1])
            tp, bias = (None if part is None else np.zeros(shape, np.float32) for part in (value.tp, value.bias))
            whole = self.kept[stage] = Value(np.zeros(shape), np.zeros(shape, np.float32), tp, bias)
        whole.exact[at] = value.exact
        assert whole.variance is not None
        whole.variance[at] = value.before
        if whole.tp is not None:
            whole.tp[at] = value.tp
        if whole.bias is not None:
            whole.bias[at] = value.bias


class TaughtHands(Hands):
    """Hands on lessons in place of results, but for the stages in `skips`, which go on as they are."""

    teaches = True

    def __init__(self, case: Case, lessons: Mapping[str, ArrayRef], skips: frozenset[str] = frozenset()) -> None:
        super().__init__(case, keeps=True)
        self.lessons, self.skips = lessons, skips

    def on(self, stage: str, value: Value, at: np.ndarray | None = None) -> Value:
        own = super().on(stage, value, at)
        if stage in self.skips:
            return own
        lesson = self.lessons[stage]
        return Value((values(lesson) if at is None else _rows(lesson, at)).astype(np.float64))

    def choice(self, ids: np.ndarray, weights: Value) -> tuple[np.ndarray, Value]:
        super().choice(ids, weights)
        taught = values(self.lessons["topk_weights"]).astype(np.float64)
        return np.asarray(self.lessons["topk_ids"].open(), np.int64), Value(taught)


def _rows(ref: ArrayRef, at: np.ndarray) -> np.ndarray:
    stored = ref.open()[at]
    return float32_of_bits(stored) if ref.dtype == "bfloat16" else stored
