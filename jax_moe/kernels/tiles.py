"""Which kernel and tile multiply rows by their experts' weights, from the shapes alone: no tuning when a program runs.

The table comes from measurements on one H100 (docs/kernels.md has them, with dates). Its key is the mean number of rows
an expert has, which is what decides whether reading weights or multiplying is the work.
"""

import dataclasses
from collections.abc import Callable

from jax_moe.kernels import mosaic_gpu_grouped_matmul as wide
from jax_moe.kernels import mosaic_gpu_small_groups as small


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel and its tile; the rest is for people.

    Attributes:
      tile: of the kernel that runs.
      why: the tile in words.
      measured: card, day and mean rows of an expert of the measurement that it came from; see the log.
    """

    tile: wide.Tile | small.Tile
    why: str
    measured: str

    @property
    def run(self) -> Callable:
        return wide.grouped_matmul if isinstance(self.tile, wide.Tile) else small.grouped_matmul

    def __str__(self) -> str:
        return f"{self.why}; from {self.measured} rows an expert"


# Mean rows of an expert up to which a choice holds.
TABLE: tuple[tuple[float, Choice], ...] = (
    (1.5, Choice(small.Tile(rows=8), "weights on the 64-row side, 8 tokens a tile", "H100, 2026-11-24: 0.06, 1")),
    (12, Choice(small.Tile(rows=16), "weights on the 64-row side, 16 tokens a tile", "H100, 2026-11-24: 2, 4")),
    (64, Choice(small.Tile(rows=32), "weights on the 64-row side, 32 tokens a tile", "H100, 2026-11-24: 16, 24, 48")),
    (160, Choice(wide.Tile(rows=64), "tiles of 64 rows", "H100, 2026-11-24: 128")),
    (float("inf"), Choice(wide.Tile(rows=128), "tiles of 128 rows", "H100, 2026-11-24: 256 to 2048")),
)


def choose_tile(rows: int, experts: int) -> Choice:
    """The choice for a buffer of `rows` rows over `experts` experts, taken as if they were spread evenly."""
    mean = rows / max(experts, 1)
    return next(choice for most, choice in TABLE if mean <= most)
