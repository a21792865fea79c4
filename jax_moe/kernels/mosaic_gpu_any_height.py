"""Grouped matmul for Hopper in tiles of any multiple of 8 rows: weights on wgmma's 64-row side, tokens on the other.

Shape suffixes: R rows sorted by expert, e experts, D depth, N output columns, F activated columns.

The pipeline is that of mosaic_gpu_grouped_matmul.py with the operands swapped. A CTA's tile is 256 rows of weights by
`Tile.rows` tokens, or by one of several lower heights: each of its two multiplying warpgroups has 128 rows of weights
(gated: 64 gate rows and the 64 up rows that go with them, so that both halves of a pair are in one thread's registers)
and all of the tokens. The token side of wgmma may be any multiple of 8, so the height can be chosen just above a half,
a third, ... of a group: where groups have a few hundred rows, less of their last tile is wasted than with tiles of 128.
The accumulator is transposed on its way to shared memory, from where whole tiles leave as TMA boxes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_moe.kernels import mosaic_gpu_epilogue as epilogue
from jax_moe.kernels.mosaic_gpu_pipeline import (
    DEPTH,
    find_work,
    gate_layout,
    launch,
    load_tiles,
    transposed,
    views,
)

BLOCK = 64  # columns of the result in a block: one wgmma's rows of weights
SHARED = 227 * 1024 - 1024  # bytes of shared memory for operands and results; the rest is barriers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Shape of a CTA's tile and of its pipeline.

    Attributes:
      rows: tokens of a tile, a multiple of 8 up to 184; of the highest where there are several heights.
      lower: how many lower heights there are, `step`, 2 * `step`, ... below; each tile takes one of them.
      step: rows between two heights, a multiple of 8.
      stages: stages of the ring of operands.
      together: how many of them are loaded at a time: 2 reads weights faster, and leaves the ring less of a reserve.
      band: tiles of rows that are walked together before the next column of weights.
    """

    rows: int = 144
    lower: int = 0
    step: int = 16
    stages: int = 4
    together: int = 1
    band: int = 16

    def __post_init__(self) -> None:
        if any(height % 8 or not 8 <= height <= 184 for height in self.heights):
            raise ValueError(f"{self}: its heights are {self.heights}: expected multiples of 8 from 8 to 184")
        if not 1 <= self.together <= self.stages // 2:
            raise ValueError(f"{self}: {self.together} stages at a time: expected 1 to half of {self.stages}")
        if self.chunk < 8:
            raise ValueError(f"{self}: {self.stages} stages leave no shared memory for results")

    @property
    def heights(self) -> tuple[int, ...]:
        """From the lowest on."""
        return tuple(self.rows - i * self.step for i in reversed(range(self.lower + 1)))

    @property
    def chunk(self) -> int:
        """Tokens of a block of results, as many as shared memory has room for, at most half a tile."""
        left = SHARED - self.stages * (256 + self.rows) * 2 * DEPTH
        most = left // (2 * 2 * BLOCK) // 8 * 8
        return min(most, -(-self.rows // 16) * 8)

    def chunks(self, height: int) -> list[tuple[int, int]]:
        """(first token, tokens) of each block of results of a tile."""
        return [(first, min(self.chunk, height - first)) for first in range(0, height, self.chunk)]


def _kernel(
    schedule_ref, x_ref, w_ref, bias_ref, out_ref, x_smem, w_smem, out_smem, full, empty,
    *, ahead, tile: Tile, activation, sms: int, experts: int, interpret: bool,
) -> None:  # fmt: skip
    x_load, x_smem = views(x_smem, interpret=interpret)
    w_load, w_smem = views(w_smem, interpret=interpret)
    out_store, out_smem = views(out_smem, interpret=interpret)

    layout = gate_layout(activation)
    gated = layout is not None
    parts = 2 if gated else 1
    out_columns = 256 // parts  # of a CTA's tile
    width = out_columns // 2  # of a warpgroup's
    depth, columns = x_ref.shape[1], out_ref.shape[1]
    k_tiles = -(-depth // DEPTH)
    column_tiles = -(-columns // out_columns)
    stages = tile.stages

    wg, sm = lax.axis_index("wg"), lax.axis_index("sm")
    items = schedule_ref[5] * column_tiles
    trips = lax.div(items - sm + (sms - 1), jnp.int32(sms))
    find = functools.partial(
        find_work, schedule_ref, experts=experts, tile=tile.rows, column_tiles=column_tiles, band=tile.band,
        lower=tile.lower, step=tile.step,
    )  # fmt: skip

    @pl.when(wg == 2)
    def _load():
        plgpu.set_max_registers(40, action="decrease")

        load = functools.partial(
            load_tiles, lambda i: find(sm + i * sms), trips, x_ref, w_ref, x_load, w_load, full, empty,
            heights=tile.heights, parts=parts, layout=layout, k_tiles=k_tiles, stages=stages, together=tile.together,
            ahead=ahead,
        )  # fmt: skip
        load() if ahead is None else ahead.beside(load)

    @pl.when(wg < 2)
    def _multiply():
        plgpu.set_max_registers(232, action="increase")
        if ahead is not None:
            ahead.begin()

        def store_tile(blocks, row, column, height):
            """Blocks of BLOCK columns through shared memory, transposed; zeros where there are none."""
            if blocks is None:
                zeros = jnp.full((BLOCK, height), 0.0, out_ref.dtype)
                zeros = zeros if interpret else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
                blocks = [zeros] * (width // BLOCK)
            for b, block in enumerate(blocks):
                for first, size in tile.chunks(height):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    piece = block[:, first : first + size]
                    epilogue.transpose_into(piece, out_smem.at[wg, pl.ds(0, size)], interpret=interpret)
                    plgpu.commit_smem()
                    target = out_ref.at[pl.ds(row + first, size), pl.ds(column + b * BLOCK, BLOCK)]
                    plgpu.copy_smem_to_gmem(out_store.at[wg, pl.ds(0, size)], target)

        def store_by_row(blocks, row, rows, column, height):  # the interpreter has no masked store
            for b, block in enumerate(blocks):
                for first, length in tile.chunks(height):
                    out_smem[wg, pl.ds(0, length)] = block[:, first : first + length].T
                    for size in {BLOCK, columns % BLOCK} - {0}:
                        edge = column + (b + 1) * BLOCK > columns
                        here = jnp.logical_not(edge) if size == BLOCK else edge & (column + b * BLOCK < columns)

                        @pl.when(here)
                        def _(size=size, b=b, first=first, length=length):
                            def store(r, carry):
                                target = pl.ds(column + b * BLOCK, size)
                                out_ref[row + first + r, target] = out_smem[wg, r, pl.ds(0, size)]
                                return carry

                            lax.fori_loop(0, jnp.minimum(rows - first, length), store, None)

        def matmul(work, step, height):
            column = work.column * out_columns + wg * width
            # Gate and up rows of this warpgroup, or the two halves of its 128 rows.
            first_rows = [wg * BLOCK, out_columns + wg * BLOCK] if gated else [wg * width, wg * width + BLOCK]

            def multiply(*accs):
                def mma(k, carry):
                    slot = lax.rem(step + k, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[slot])
                    x = x_smem.at[slot] if tile.lower == 0 else x_smem.at[slot, pl.ds(0, height)]
                    for acc, first in zip(accs, first_rows, strict=True):
                        plgpu.wgmma(acc, w_smem.at[slot, pl.ds(first, BLOCK)], transposed(x))
                    return carry

                def steady(k, carry):
                    mma(k, carry)
                    plgpu.wgmma_wait(2)  # the multiplications before these have read their stage
                    plgpu.barrier_arrive(empty.at[lax.rem(step + k - 1, jnp.int32(stages))])
                    return carry

                mma(0, None)
                lax.fori_loop(1, k_tiles, steady, None)
                return tuple(acc[...] for acc in accs)

            values = list(pl.run_scoped(multiply, *[plgpu.ACC((BLOCK, height), jnp.float32)] * 2))
            plgpu.barrier_arrive(empty.at[lax.rem(step + (k_tiles - 1), jnp.int32(stages))])
            if bias_ref is not None:
                for b in range(2):
                    part, first = (b, column) if gated else (0, column + b * BLOCK)
                    bias = epilogue.load_bias(bias_ref.at[work.expert, part, pl.ds(first, BLOCK)], reduced=1)
                    values[b] += lax.broadcast_in_dim(bias, (BLOCK, height), (0,))
            if gated:
                values = [epilogue.activate(activation, *values)]
            elif activation is not None:
                values = [epilogue.activate(activation, value, None) for value in values]
            values = [value.astype(out_ref.dtype) for value in values]
            whole = work.rows == height

            @pl.when(whole)
            def _():
                store_tile(values, work.row, column, height)

            @pl.when(jnp.logical_not(whole))
            def _():
                if interpret:
                    store_by_row(values, work.row, work.rows, column, height)
                else:
                    for b, value in enumerate(values):
                        epilogue.store_columns(value, out_ref, work.row, work.rows, column + b * BLOCK)

        def item(i, step):
            work = find(sm + i * sms)

            @pl.when(work.zeros)
            def _():
                store_tile(None, work.row, work.column * out_columns + wg * width, tile.rows)

            for kind, height in enumerate(tile.heights):  # outside of the loop over depth, each with its own loop

                @pl.when(jnp.logical_not(work.zeros) & (work.kind == kind))
                def _(height=height):
                    matmul(work, step, height)

            return step + jnp.where(work.zeros, 0, k_tiles)

        lax.fori_loop(0, trips, item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def grouped_matmul(
    x_RD: jax.Array,
    w: jax.Array,
    schedule: jax.Array,
    *,
    activation=None,
    bias: jax.Array | None = None,
    index_R: jax.Array | None = None,
    tile: Tile = Tile(),
    interpret=None,
) -> jax.Array:
    """x @ w[expert].T for rows sorted by expert, with bias and activation where given.

    Args:
      x_RD: (R, D) of 16 bits a number, R at least `tile.rows`.
      w: (e, N, D) in x's dtype; gated: (e, 2F, D), gate and up rows in `activation.layout`.
      schedule: make_schedule(sizes, rows=R, tile=tile.rows).
      activation: None, or a value with the fields name, gated, layout, alpha, limit.
      bias: (e, rows of w) or None, added in float32 before the activation.
      index_R: (R,) int32; where given, x is (t, D) and row r is x[index[r]], copied while others are multiplied.
      tile: shape of the tiles.
      interpret: InterpretGPUParams to run on CPU.

    Returns:
      (R, N), gated (R, F), in x's dtype. Rows past the last group are zeros.
    """
    return launch(
        _kernel, x_RD, w, schedule, activation=activation, bias=bias, index_R=index_R, tile=tile, interpret=interpret,
        results=(2, tile.chunk, BLOCK), suffix="_any_height",
    )  # fmt: skip
