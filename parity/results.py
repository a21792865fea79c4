"""What one rank of one framework hands back for a case, and how it travels: one `rank{r}.npz` a rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

MAPPINGS = ("stages", "taught")


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """One rank's output and the exact things that led to it.

    `y` holds the rank's tokens as they lie in its input: rows past the rank's count are padding. Widths: t tokens
    that lie on this rank, t' tokens that this rank routes (under sequence parallelism its chunk), e local experts.
    """

    y: np.ndarray
    """(t, D) float32; bfloat16 values are exact in it."""
    y_dtype: str
    """The dtype the framework returned, by name."""
    token_index: np.ndarray | None = None
    """(t',) dense index of each routed token, -1 for padding."""
    router_logits: np.ndarray | None = None
    """(t', E) float32, None when ids were given."""
    topk_ids: np.ndarray | None = None
    """(t', K) int32."""
    topk_weights: np.ndarray | None = None
    """(t', K) float32."""
    group_sizes: np.ndarray | None = None
    """(e,) int32 rows of each local expert."""
    row_token: np.ndarray | None = None
    """(R,) int32 dense index of the token behind each row, -1 past the last row."""
    row_slot: np.ndarray | None = None
    """(R,) int32 which of the token's K choices the row is."""
    expert_load: np.ndarray | None = None
    """(E,) int32 rows of each expert over all ranks."""
    dropped: int = 0
    """Copies of tokens this rank dropped for want of room."""
    repeat_equal: bool = True
    """Whether a second run of the same inputs gave the same bits (`y`)."""
    stages: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What each stage gave, by name (`parity.stages`), float32 unless said there."""
    taught: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The same, each stage computed from the oracle's inputs."""

    def save(self, folder: Path, rank: int) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in MAPPINGS}
        values |= {f"{name}.{key}": value for name in MAPPINGS for key, value in getattr(self, name).items()}
        # through a file object: np.savez would otherwise keep a half-written file's name on a full disk
        with open(folder / f"rank{rank}.npz", "wb") as file:
            np.savez(file, **{name: value for name, value in values.items() if value is not None})

    @classmethod
    def load(cls, folder: Path, rank: int) -> RankResult:
        with np.load(folder / f"rank{rank}.npz") as file:
            stored = {name: file[name] for name in file.files}
        values: dict = {name: value for name, value in stored.items() if "." not in name}
        for name in MAPPINGS:
            prefix = f"{name}."
            values[name] = {key.removeprefix(prefix): v for key, v in stored.items() if key.startswith(prefix)}
        values["y_dtype"] = str(values["y_dtype"])
        values["repeat_equal"] = bool(values["repeat_equal"])
        values["dropped"] = int(values["dropped"])
        return cls(**values)
