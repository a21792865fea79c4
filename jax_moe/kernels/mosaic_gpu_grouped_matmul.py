"""Grouped matmul for Hopper: persistent, warp-specialized wgmma, with an optional gated activation in its epilogue.

Shape suffixes: R rows sorted by expert, e experts, D depth, N output columns, F activated columns.

One CTA an SM walks a work list of output tiles (schedule.py). Its last warpgroup loads operands through TMA into a
ring of shared-memory stages and runs ahead across tiles; the two others multiply. A gated tile multiplies a tile of
gate rows and the tile of the matching up rows of the weights into one accumulator, side by side, and stores only their
activated product. Gate and up rows are addressed through a view of the weights with one more axis, so both checkpoint
layouts (concatenated, interleaved) cost the same.
"""

import dataclasses
import functools
from typing import ClassVar

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Shape of a CTA's tile and of its pipeline.

    Attributes:
      rows: 128, of which each multiplying warpgroup has 64. A tile is 256 rows of weights wide; a gated one has 128 of
        gate and 128 of up.
      stages: stages of the ring of operands.
      band: tiles of rows that are walked together before the next column of weights.
    """

    rows: ClassVar[int] = 128
    stages: int = 4
    band: int = 16


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
    depth, columns = x_ref.shape[1], out_ref.shape[1]
    k_tiles = -(-depth // DEPTH)
    column_tiles = -(-columns // out_columns)
    stages = tile.stages

    wg, sm = lax.axis_index("wg"), lax.axis_index("sm")
    items = schedule_ref[5] * column_tiles
    trips = lax.div(items - sm + (sms - 1), jnp.int32(sms))
    find = functools.partial(
        find_work, schedule_ref, experts=experts, tile=tile.rows, column_tiles=column_tiles, band=tile.band
    )

    @pl.when(wg == 2)
    def _load():
        plgpu.set_max_registers(40, action="decrease")

        load = functools.partial(
            load_tiles, lambda i: find(sm + i * sms), trips, x_ref, w_ref, x_load, w_load, full, empty,
            heights=(tile.rows,), parts=parts, layout=layout, k_tiles=k_tiles, stages=stages, ahead=ahead,
        )  # fmt: skip
        load() if ahead is None else ahead.beside(load)

    @pl.when(wg < 2)
    def _multiply():
        plgpu.set_max_registers(232, action="increase")
        if ahead is not None:
            ahead.begin()

        def store_tile(value, row, column):
            """64 whole rows through shared memory, 64 columns at a time; zeros where there is no value."""
            for c in range(out_columns // 64):
                if value is None:
                    block = jnp.full((64, 64), 0.0, out_ref.dtype)
                    block = block if interpret else plgpu.layout_cast(block, plgpu.Layout.WGMMA)
                else:
                    block = value[:, c * 64 : (c + 1) * 64]
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                out_smem[wg, c % 2] = block
                plgpu.commit_smem()
                target = out_ref.at[pl.ds(row, 64), pl.ds(column + c * 64, 64)]
                plgpu.copy_smem_to_gmem(out_store.at[wg, c % 2], target)

        def matmul(work, step):
            """This warpgroup's rows of a tile."""
            row = work.row + wg * 64
            rows = jnp.minimum(work.rows - wg * 64, 64)
            column = work.column * out_columns
            own = pl.ds(wg * 64, 64)

            def multiply(acc):
                def mma(k, carry):
                    slot = lax.rem(step + k, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[slot])
                    # Gate and up are one operand, side by side.
                    plgpu.wgmma(acc, x_smem.at[slot, own], transposed(w_smem.at[slot, pl.ds(0, 256)]))
                    return carry

                def steady(k, carry):
                    mma(k, carry)
                    plgpu.wgmma_wait(1)  # the multiplications before these have read their stage
                    plgpu.barrier_arrive(empty.at[lax.rem(step + k - 1, jnp.int32(stages))])
                    return carry

                mma(0, None)
                lax.fori_loop(1, k_tiles, steady, None)
                return acc[...]

            value = pl.run_scoped(multiply, plgpu.ACC((64, 256), jnp.float32))
            plgpu.barrier_arrive(empty.at[lax.rem(step + (k_tiles - 1), jnp.int32(stages))])
            values = [value[:, :out_columns], value[:, out_columns:]] if gated else [value]
            if bias_ref is not None:
                for part in range(parts):
                    source = bias_ref.at[work.expert, part, pl.ds(column, out_columns)]
                    bias = epilogue.load_bias(source, reduced=0)
                    values[part] += lax.broadcast_in_dim(bias, (64, out_columns), (1,))
            value = values[0]
            if activation is not None:
                value = epilogue.activate(activation, values[0], values[1] if gated else None)
            value = value.astype(out_ref.dtype)
            whole = work.rows == tile.rows

            @pl.when(whole)
            def _():
                store_tile(value, row, column)

            @pl.when(jnp.logical_not(whole))
            def _():
                if interpret:
                    store_by_row(value, row, rows, column)
                else:
                    epilogue.store_rows(value, out_ref, row, rows, column)

        def store_by_row(value, row, rows, column):
            for c in range(out_columns // 64):
                out_smem[wg, c % 2] = value[:, c * 64 : (c + 1) * 64]
                for width in {64, columns % 64} - {0}:  # the interpreter has no masked store
                    edge = column + c * 64 + 64 > columns

                    @pl.when(jnp.logical_not(edge) if width == 64 else edge & (column + c * 64 < columns))
                    def _(width=width, c=c):
                        def store(r, carry):
                            out_ref[row + r, pl.ds(column + c * 64, width)] = out_smem[wg, c % 2, r, pl.ds(0, width)]
                            return carry

                        lax.fori_loop(0, rows, store, None)

        def item(i, step):
            work = find(sm + i * sms)

            @pl.when(work.zeros)
            def _():
                store_tile(None, work.row + wg * 64, work.column * out_columns)

            @pl.when(jnp.logical_not(work.zeros))
            def _():
                matmul(work, step)

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
      x_RD: (R, D) bfloat16 or float16, R at least `tile.rows`.
      w: (e, N, D), same dtype; gated: (e, 2F, D), gate and up rows in `activation.layout`.
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
        results=(2, 2, 64, DEPTH),
    )  # fmt: skip
