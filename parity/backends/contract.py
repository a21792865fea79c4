"""Whether what a backend returned is an answer at all, before anything in it is judged.

An answer that cannot be compared is an *error of the backend*; one that can be and is wrong is a *failure of the
layer*. Of the right form is an answer in which every rank of the case has a `RankResult` whose arrays are NumPy arrays
of the right kinds and widths. An output with too few rows, or with NaN or infinity in a real token's row, has the
right form, and cannot be compared either: whose fault it is depends on who vouches for the class in between
(`Backend.blame_layer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from parity.backends.layout import block_counts, block_of_rank
from parity.case import Case
from parity.results import Decisions, RankResult, Rows

KINDS = {"f": "floating-point", "iu": "integer"}


class AnswerError(Exception):
    """A backend returned something that cannot be judged; the message names the rank and what was expected."""


def check(case: Case, results: object, blame_layer: bool) -> dict[int, RankResult]:
    """The results of one process, as they were returned.

    Args:
      case: what was run.
      results: what `Backend.run` returned.
      blame_layer: leave rows and values of the output to the verdict.

    Raises:
      AnswerError: they are no answer.
    """
    if not isinstance(results, Mapping):
        raise AnswerError(f"run returned {_what(results)}, expected a mapping of rank to RankResult")
    for rank in results:
        if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or not 0 <= rank < case.world:
            raise AnswerError(f"run answered for rank {rank!r}, expected ranks 0 to {case.world - 1}")
    for rank, result in results.items():
        for fault in faults(case, int(rank), result, blame_layer):
            raise AnswerError(f"rank {rank}: {fault}")
    return {int(rank): result for rank, result in results.items()}


def faults(case: Case, rank: int, result: object, blame_layer: bool) -> Iterator[str]:
    """What keeps one rank's result from being judged, in words."""
    if not isinstance(result, RankResult):
        yield f"{_what(result)}, expected a RankResult"
        return
    if not isinstance(result.y_dtype, str):
        yield f"y_dtype is {_what(result.y_dtype)}, expected the name of a dtype"
    if fault := _array("y", result.y, "f", 2):
        yield fault
        return
    if not blame_layer:
        yield from _output_faults(case, rank, result.y)
    for name, mapping in (("stages", result.stages), ("taught", result.taught)):
        if not isinstance(mapping, Mapping):
            yield f"{name} is {_what(mapping)}, expected a mapping of stage to array"
            return
        yield from (f for key, value in mapping.items() if (f := _array(f"{name}[{key!r}]", value, "fiu", None)))
    if result.decisions is not None:
        yield from _decision_faults(case, result.decisions)


def ranks_fault(case: Case, answered: list[int]) -> str | None:
    """What is wrong with the ranks that all processes together answered for; None if each is there once."""
    missing = sorted(set(range(case.world)) - set(answered))
    if missing:
        return f"no result for rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {case.world}"
    twice = sorted({rank for rank in answered if answered.count(rank) > 1})
    return f"more than one process answered for rank {twice[0]}" if twice else None


def _output_faults(case: Case, rank: int, y: np.ndarray) -> Iterator[str]:
    count = block_counts(case)[block_of_rank(case, rank)]
    if len(y) < count or y.shape[1] != case.hidden:
        yield f"y has shape {y.shape}, expected ({count} or more, {case.hidden})"
        return
    finite = np.isfinite(y[:count])
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        rows = int((~finite).any(axis=1).sum())
        yield f"y is {y[row, column]} at row {row}, column {column} ({rows} of {count} rows), expected finite values"


def _decision_faults(case: Case, decisions: object) -> Iterator[str]:
    if not isinstance(decisions, Decisions):
        yield f"decisions are {_what(decisions)}, expected Decisions"
        return
    found = [
        _array("token_index", decisions.token_index, "iu", 1),
        _array("topk_ids", decisions.topk_ids, "iu", 2),
        _array("topk_weights", decisions.topk_weights, "f", 2),
        decisions.router_logits is not None and _array("router_logits", decisions.router_logits, "f", 2),
    ]
    if not any(found):
        tokens = len(decisions.token_index)
        found += [
            _shape("topk_ids", decisions.topk_ids, (tokens, case.top_k)),
            _shape("topk_weights", decisions.topk_weights, (tokens, case.top_k)),
            decisions.router_logits is not None
            and _shape("router_logits", decisions.router_logits, (tokens, case.experts)),
        ]
    rows = decisions.rows
    if rows is not None and not isinstance(rows, Rows):
        found.append(f"rows are {_what(rows)}, expected Rows")
    elif rows is not None:
        shapes = {
            "group_sizes": (case.experts // case.ep_size,),
            "row_token": (np.size(rows.row_token),),
            "row_slot": (np.size(rows.row_token),),
            "expert_load": (case.experts,),
        }
        for name, shape in shapes.items():
            value = getattr(rows, name)
            found.append(_array(name, value, "iu", 1) or _shape(name, value, shape))
    yield from (fault for fault in found if fault)


def _array(name: str, value: object, kinds: str, ndim: int | None) -> str | None:
    """What is wrong with the type, kind or number of axes of an array."""
    words = " or ".join(text for letters, text in KINDS.items() if letters[0] in kinds)
    if not isinstance(value, np.ndarray):
        return f"{name} is {_what(value)}, expected a NumPy array, {words}"
    if value.dtype.kind not in kinds:
        return f"{name} has dtype {value.dtype}, expected {words}"
    if ndim is not None and value.ndim != ndim:
        return f"{name} has shape {value.shape}, expected {ndim} ax{'e' if ndim > 1 else 'i'}s"
    return None


def _shape(name: str, value: np.ndarray, shape: tuple[int, ...]) -> str | None:
    return None if value.shape == shape else f"{name} has shape {value.shape}, expected {shape}"


def _what(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"
