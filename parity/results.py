"""What one rank of one framework hands back for a case, and how it travels: one `rank{r}.npz` a rank.

t tokens that lie on this rank, t' tokens that this rank routes (under sequence parallelism its chunk), R rows that its
experts work on, e local experts, E experts, K choices of a token, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

MAPPINGS = ("stages", "taught")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What came to a rank's experts."""

    group_sizes: np.ndarray
    """(e,) int32 rows of each local expert."""
    row_token: np.ndarray
    """(R,) int32 dense index of the token behind each row, -1 past the last row."""
    row_slot: np.ndarray
    """(R,) int32 which of the token's K choices the row is."""
    expert_load: np.ndarray
    """(E,) int32 rows of each expert over all ranks."""
    dropped: int = 0
    """Copies of tokens this rank dropped for want of room."""


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What a rank's router chose for the tokens that it routes."""

    token_index: np.ndarray
    """(t',) dense index of each routed token, -1 for padding."""
    topk_ids: np.ndarray
    """(t', K) int32."""
    topk_weights: np.ndarray
    """(t', K) float32."""
    router_logits: np.ndarray | None = None
    """(t', E) float32, None when ids were given or the framework does not show them."""
    rows: Rows | None = None
    """None when the framework does not show them."""


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """One rank's output and, as far as the framework shows them, the exact things that led to it.

    `y` holds the rank's tokens as they lie in its input: rows past the rank's count are padding.
    """

    y: np.ndarray
    """(t, D) float32; bfloat16 values are exact in it."""
    y_dtype: str
    """The dtype the framework returned, by name."""
    decisions: Decisions | None = None
    """None when the framework shows its output alone."""
    repeat_equal: bool | None = None
    """Whether a second run of the same inputs gave the same bits (`y`); None when there was none."""
    stages: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What each stage gave, by name (`parity.stages`), float32 unless said there."""
    taught: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The same, each stage computed from the oracle's inputs."""

    def save(self, folder: Path, rank: int) -> None:
        """Write `rank{rank}.npz`."""
        rows = None if self.decisions is None else self.decisions.rows
        values: dict = {"y": self.y, "y_dtype": self.y_dtype, "repeat_equal": self.repeat_equal}
        for prefix, part in (("decisions", self.decisions), ("rows", rows)):
            for item in fields(part) if part is not None else ():
                if item.name != "rows":
                    values[f"{prefix}.{item.name}"] = getattr(part, item.name)
        values |= {f"{name}.{key}": value for name in MAPPINGS for key, value in getattr(self, name).items()}
        # through a file object: np.savez would otherwise keep a half-written file's name on a full disk
        with open(folder / f"rank{rank}.npz", "wb") as file:
            np.savez(file, **{name: value for name, value in values.items() if value is not None})

    @classmethod
    def load(cls, folder: Path, rank: int) -> RankResult:
        """Read what `save` wrote."""
        with np.load(folder / f"rank{rank}.npz") as file:
            stored = {name: file[name] for name in file.files}

        def part(name: str) -> dict:
            prefix = f"{name}."
            return {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}

        rows, decisions = part("rows"), part("decisions")
        if rows:
            rows["dropped"] = int(rows["dropped"])
            decisions["rows"] = Rows(**rows)
        return cls(
            y=stored["y"],
            y_dtype=str(stored["y_dtype"]),
            decisions=Decisions(**decisions) if decisions else None,
            repeat_equal=bool(stored["repeat_equal"]) if "repeat_equal" in stored else None,
            **{name: part(name) for name in MAPPINGS},
        )
