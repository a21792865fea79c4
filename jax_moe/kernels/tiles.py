"""Which kernel and tile multiply rows by their experts' weights, from the shapes alone: no tuning when a program runs.

The table comes from measurements on one card each (docs/kernels.md has them). Its key is the mean number of rows an
expert has, which is what decides whether reading weights or multiplying is the work.
"""

import dataclasses
from collections.abc import Callable

from jax_moe.kernels import mosaic_gpu_any_height as any_height
from jax_moe.kernels import mosaic_gpu_grouped_matmul as wide
from jax_moe.kernels import mosaic_gpu_small_groups as small

KERNELS = {"wide": wide, "any_height": any_height, "small": small}
"""Modules, by what this one calls them."""
Tile = wide.Tile | any_height.Tile | small.Tile


def kernel_of(tile: Tile) -> str:
    """The name of the kernel that a tile belongs to."""
    return next(name for name, module in KERNELS.items() if isinstance(tile, module.Tile))


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel and its tile, and where it comes from.

    Attributes:
      tile: of the kernel that runs.
      measured: card, day and mean rows of an expert of the measurement that it came from; see the log.
    """

    tile: Tile
    measured: str

    @property
    def run(self) -> Callable:
        return KERNELS[kernel_of(self.tile)].grouped_matmul

    @property
    def words(self) -> str:
        """The tile, for people."""
        if isinstance(self.tile, small.Tile):
            return f"weights on the 64-row side, {self.tile.rows} tokens a tile"
        if isinstance(self.tile, wide.Tile):
            return f"tiles of {self.tile.rows} rows"
        *lower, highest = map(str, self.tile.heights)
        heights = f"{', '.join(lower)} or {highest}" if lower else highest
        words = f"256 rows of weights by {heights} tokens"
        return words if self.tile.together == 1 else f"{words}, {self.tile.together} stages loaded at a time"

    def __str__(self) -> str:
        return f"{self.words}; from {self.measured} rows an expert"


def _same(tile: Tile, measured: str) -> tuple[Choice, Choice]:
    return Choice(tile, measured), Choice(tile, measured)


# Mean rows of an expert up to which a row holds; the choice for a product with a gate, and for one without.
TABLE: tuple[tuple[float, Choice, Choice], ...] = (
    (1.5, *_same(small.Tile(rows=8), "H100, 2026-11-24: 0.06, 1")),
    (12, *_same(small.Tile(rows=16), "H100, 2026-11-24: 2, 4")),
    (64, *_same(small.Tile(rows=32), "H100, 2026-11-24: 16, 24, 48")),
    (180, *_same(any_height.Tile(rows=144, together=2), "H100, 2026-11-28: 128")),
    (360, *_same(any_height.Tile(rows=144, lower=4, step=8), "H100, 2026-11-28: 256")),
    (
        720,
        Choice(any_height.Tile(rows=136), "H200, 2026-11-28: 512"),
        Choice(any_height.Tile(rows=176, lower=3), "H100, 2026-11-28: 512"),
    ),
    (1440, Choice(wide.Tile(), "H200, 2026-11-28: 1024"), Choice(any_height.Tile(rows=176), "H100, 2026-11-28: 1024")),
    (float("inf"), *_same(wide.Tile(), "H200, 2026-11-28: 2048")),
)

# Rows are gathered while others are multiplied from so many rows an expert on, and so many rows of weights: with fewer
# of the first, reading weights is the work, and memory has no time to spare; with fewer of the second, rows are
# multiplied faster than they are copied. H100, 2026-11-28: 512 and 2048 rows, 1536 and 2048 rows of weights.
AHEAD_ROWS, AHEAD_WEIGHTS = 512, 1536


def choose_tile(rows: int, experts: int, *, gated: bool) -> Choice:
    """The choice for a buffer of `rows` rows over `experts` experts, taken as if they were spread evenly."""
    mean = rows / max(experts, 1)
    return next(choices[0 if gated else 1] for most, *choices in TABLE if mean <= most)
