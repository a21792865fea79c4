"""Grouped matmul in Pallas Triton, with an optional gated activation in its epilogue: for Ampere and Ada.

Shape suffixes: R rows sorted by expert, e experts, D depth, N output columns, F activated columns.

A program multiplies one tile of the work list (schedule.py) by one tile of columns. A gated one has two accumulators,
of a tile of gate columns and of the up columns that belong to them, and stores their activated product. Rows and
columns past an edge are read from the edge and not stored; depth past the end is masked on both sides, since 0 * NaN is
NaN.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jax_moe.kernels.mosaic_gpu_epilogue import activate
from jax_moe.kernels.schedule import FIELDS, tile_bound

_WHOLE = pl.BlockSpec(memory_space=pl.ANY)


def gate_layout(activation) -> str | None:
    """How gate and up lie in the weights; None when there is no gate."""
    return activation.layout if activation is not None and activation.gated else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Shape of a program's tile and of its pipeline.

    Attributes:
      rows: 16 to 128, a power of two.
      columns: of the weights' rows, gate and up together.
      depth: of a step, in bytes: 128 are 64 of bfloat16.
      band: tiles of rows that are walked together before the next column of weights.
    """

    rows: int = 128
    columns: int = 128
    depth: int = 64
    band: int = 8
    stages: int = 4

    @property
    def warps(self) -> int:
        """Eight where a tile is large enough to share among them."""
        return 8 if self.rows * self.columns >= 128 * 128 else 4


# Mean rows of an expert up to which a tile of so many rows is taken.
TABLE: tuple[tuple[float, Tile], ...] = (
    (16, Tile(rows=16, depth=128)),
    (48, Tile(rows=32, depth=128)),
    (96, Tile(rows=64)),
    (float("inf"), Tile(rows=128)),
)


def choose_tile(rows: int, experts: int) -> Tile:
    """The tile for a buffer of `rows` rows over `experts` experts, taken as if they were spread evenly."""
    return next(tile for most, tile in TABLE if rows / max(experts, 1) <= most)


def _kernel(schedule_ref, x_ref, w_ref, *refs, tile: Tile, activation, has_bias: bool, precision):
    *bias, out_ref = refs
    (num_rows, depth), experts = x_ref.shape, w_ref.shape[0]
    columns = out_ref.shape[1]
    layout = gate_layout(activation)
    gated = layout is not None
    width = tile.columns // 2 if gated else tile.columns
    column_tiles = pl.cdiv(columns, width)
    step = tile.depth // x_ref.dtype.itemsize

    def one_tile(number, column_tile):
        at = number * FIELDS
        expert, first, start, size = (schedule_ref[at + i] for i in (0, 1, 3, 4))
        local = (number - first) * tile.rows + lax.iota(jnp.int32, tile.rows)
        target_row, target_column = start + local, column_tile * width + lax.iota(jnp.int32, width)
        stored = (local < size)[:, None] & (target_column < columns)[None, :]
        row, column = jnp.minimum(target_row, num_rows - 1)[:, None], jnp.minimum(target_column, columns - 1)
        zeros = expert == experts
        expert = jnp.minimum(expert, experts - 1)
        parts = [column]
        if gated:
            parts = [column, column + columns] if layout == "concatenated" else [2 * column, 2 * column + 1]

        def add(k, accs):
            index = k * step + lax.iota(jnp.int32, step)
            x_mask = w_mask = other = None
            if depth % step:
                other = 0.0
                x_mask = jnp.broadcast_to((index < depth)[None, :], (tile.rows, step))
                w_mask = jnp.broadcast_to((index < depth)[:, None], (step, width))
            x = plt.load(x_ref.at[row, index[None, :]], mask=x_mask, other=other)
            totals = []
            for acc, part in zip(accs, parts, strict=True):
                w = plt.load(w_ref.at[expert, part[None, :], index[:, None]], mask=w_mask, other=other)
                product = lax.dot(x, w, precision=precision, preferred_element_type=jnp.float32)
                totals.append(acc + product)
            return tuple(totals)

        accs = tuple(jnp.zeros((tile.rows, width), jnp.float32) for _ in parts)
        # Not a choice between two constants, which JAX lowers as one of booleans (0.10.2 and 0.11.2).
        steps = jnp.logical_not(zeros).astype(jnp.int32) * pl.cdiv(depth, step)
        values = list(lax.fori_loop(0, steps, add, accs))
        if has_bias:
            for i, part in enumerate(parts):
                values[i] += plt.load(bias[0].at[expert, part]).astype(jnp.float32)[None, :]
        value = values[0]
        if activation is not None:
            value = activate(activation, values[0], values[1] if gated else None)
            for z in values:  # minimum and maximum, as Triton has them, drop NaN
                value = jnp.where(z != z, z, value)
        value = jnp.where(zeros, 0.0, value).astype(out_ref.dtype)
        plt.store(out_ref.at[target_row[:, None], target_column[None, :]], value, mask=stored)

    total = schedule_ref[5]
    # Bands of row tiles go together: what runs at one time shares its operands in the L2 cache.
    program = pl.program_id(0)
    first_of_band = lax.div(program, jnp.int32(tile.band * column_tiles)) * tile.band
    height = jnp.minimum(total - first_of_band, tile.band)

    @pl.when(height > 0)
    def _():
        inside = lax.rem(program, jnp.int32(tile.band * column_tiles))
        column_tile = lax.div(inside, height)
        number = first_of_band + lax.rem(inside, height)

        @pl.when(column_tile < column_tiles)
        def _():
            one_tile(number, column_tile)


def grouped_matmul(
    x_RD: jax.Array,
    w: jax.Array,
    schedule: jax.Array,
    *,
    activation=None,
    bias: jax.Array | None = None,
    out_dtype=None,
    precision=None,
    tile: Tile = Tile(),
) -> jax.Array:
    """x @ w[expert].T for rows sorted by expert, with bias and activation where given.

    Args:
      x_RD: (R, D) bfloat16, float16 or float32; any R and D of 1 and more.
      w: (e, N, D), same dtype; gated: (e, 2F, D), gate and up rows in `activation.layout`.
      schedule: make_schedule(sizes, rows=R, tile=tile.rows).
      activation: None, or a value with the fields name, gated, layout, alpha, limit.
      bias: (e, rows of w) or None, added in float32 before the activation.
      out_dtype: of the result; None: that of x.
      precision: of a product of float32, as `jax.lax.dot` takes it.
      tile: shape of the tiles.

    Returns:
      (R, N), gated (R, F). Rows past the last group are zeros.
    """
    rows = x_RD.shape[0]
    experts, w_rows, _ = w.shape
    gated = gate_layout(activation) is not None
    columns = w_rows // 2 if gated else w_rows
    width = tile.columns // 2 if gated else tile.columns
    bands = pl.cdiv(tile_bound(rows, experts, tile.rows), tile.band)
    operands = [schedule, x_RD, w] + ([] if bias is None else [bias])
    return pl.pallas_call(
        functools.partial(_kernel, tile=tile, activation=activation, has_bias=bias is not None, precision=precision),
        out_shape=jax.ShapeDtypeStruct((rows, columns), out_dtype or x_RD.dtype),
        grid=(bands * tile.band * pl.cdiv(columns, width),),
        in_specs=[_WHOLE] * len(operands),
        out_specs=_WHOLE,
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        name="moe_triton_gate_up" if activation is not None else "moe_triton_grouped_matmul",
    )(*operands)
