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

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_moe.kernels import mosaic_gpu_epilogue as epilogue
from jax_moe.kernels.mosaic_gpu_ahead import Rows
from jax_moe.kernels.schedule import FIELDS, make_schedule

DEPTH = 64  # columns, of two bytes each, in the 128 bytes of one swizzle atom


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Shape of a CTA's tile and of its pipeline.

    Attributes:
      rows: 128, which two warpgroups share as 64 rows each, or 64, which they share as columns. A tile is 256 rows of
        weights wide; a gated one has 128 of gate and 128 of up.
      stages: stages of the ring of operands.
      band: tiles of rows that are walked together before the next column of weights.
    """

    rows: int = 128
    stages: int = 4
    band: int = 16


def operand_memory(shape, dtype, *, interpret: bool):
    """Shared memory for (..., rows, DEPTH) operands, seen two ways: by TMA as rows, by wgmma as tiles of eight rows.

    Both views are the same bytes in the same swizzle. A copy into the tiled view would need every dimension of the
    array in global memory to be a multiple of its tile; a box of plain rows is cut off at the array's edges and padded
    with zeros.
    """
    swizzle = plgpu.SwizzleTransform(128)
    tiled = plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, DEPTH)), swizzle))
    # The interpreter keeps each view of a union apart, and has no need of two.
    return tiled if interpret else plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=(swizzle,)), tiled)


def views(ref, *, interpret: bool):
    """The view of `operand_memory` for TMA and the one for wgmma."""
    return (ref, ref) if interpret else tuple(ref)


def gate_layout(activation) -> str | None:
    """How gate and up lie in the weights; None when there is no gate."""
    return activation.layout if activation is not None and activation.gated else None


def named(body, name: str):
    """`body` under the name that profiles will show."""

    def kernel(*refs):
        body(*refs)

    kernel.__name__ = name
    return kernel


def transposed(ref):
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def sm_count() -> int:
    """Multiprocessors of the default GPU; 132 (an H100 or H200) where there is none, as when lowering ahead of time."""
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        return 132
    return getattr(device, "core_count", None) or 132


@dataclasses.dataclass(frozen=True)
class Work:
    """One tile: its expert, first row, rows that are its own (or a whole tile of them), column tile.

    `zeros` says that it lies past the last group; `tokens` is the word of the record that says which tokens it has;
    `height` is the number of its height, of those that the kernel has.
    """

    expert: jax.Array
    row: jax.Array
    rows: jax.Array
    column: jax.Array
    zeros: jax.Array
    tokens: jax.Array
    height: jax.Array | int = 0


def find_work(
    schedule_ref, linear, *, experts: int, tile: int, column_tiles: int, band: int, lower: int = 0, step: int = 8
) -> Work:
    """Item number `linear` of the work list: experts, then bands of row tiles, then columns, then rows in the band.

    With `lower` a kernel has lower heights as well: `tile - step`, `tile - 2 * step`, ... A group's tiles share out its
    rows: all have the same height, or the first of them the next higher one. Example: 300 rows, a tile of 144 and two
    lower heights, 16 apart: three tiles, all of 112; the last is moved back until it ends with the group.
    """
    at = lax.div(linear, jnp.int32(column_tiles)) * FIELDS
    expert, first, tiles = schedule_ref[at], schedule_ref[at + 1], schedule_ref[at + 2]
    start, size = schedule_ref[at + 3], schedule_ref[at + 4]
    local = linear - first * column_tiles
    band_index = lax.div(local, jnp.int32(band * column_tiles))
    height = jnp.minimum(tiles - band_index * band, band)
    local = local - band_index * (band * column_tiles)
    column = lax.div(local, height)
    zeros = expert == experts
    number = band_index * band + lax.rem(local, height)
    if lower:
        least = tile - lower * step
        steps = lax.div(jnp.maximum(size - tiles * least, 0) + (step - 1), jnp.int32(step))  # above the least, in all
        steps = jnp.where(zeros, tiles * lower, steps)
        each = lax.div(steps, tiles)
        more = steps - each * tiles  # tiles with one step more than each
        row = number * (least + each * step) + jnp.minimum(number, more) * step
        kind = each + (number < more).astype(jnp.int32)
        rows = least + kind * step
    else:
        kind, row, rows = 0, number * tile, tile
    own = jnp.minimum(jnp.where(zeros, size - row, size), rows)
    row = jnp.where(zeros, row, jnp.maximum(jnp.minimum(row, size - rows), 0)) + start
    return Work(jnp.minimum(expert, experts - 1), row, own, column, zeros, schedule_ref[at + 6], kind)


def weight_tile(w_ref, expert, part, column, columns, k, layout):
    """The (columns, DEPTH) tile of an expert's weights; `part` picks gate (0) or up (1) rows of a gated view."""
    rows, depth = pl.ds(column, columns), pl.ds(k * DEPTH, DEPTH)
    if layout is None:
        return w_ref.at[expert, rows, depth]
    return w_ref.at[expert, part, rows, depth] if layout == "concatenated" else w_ref.at[expert, rows, part, depth]


def load_tiles(
    find, trips, x_ref, w_ref, x_load, w_load, full, empty,
    *, heights: tuple[int, ...], parts: int, layout, k_tiles: int, stages: int, rows=None,
) -> None:  # fmt: skip
    """The loading warpgroup: operands of `find(0)`, `find(1)`, ..., through the ring of stages.

    Rows that are being gathered (`rows`) are waited for.
    """
    out_columns = 256 // parts

    def item(i, step):
        work = find(i)
        steps = jnp.where(work.zeros, 0, k_tiles)
        if rows is not None:
            rows.wait(work)

        def load(k, step, height):
            slot = lax.rem(step, jnp.int32(stages))

            @pl.when(step >= stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            source = x_ref.at[pl.ds(work.row, height), pl.ds(k * DEPTH, DEPTH)]
            target = x_load.at[slot] if len(heights) == 1 else x_load.at[slot, pl.ds(0, height)]
            plgpu.copy_gmem_to_smem(source, target, full.at[slot])
            for part in range(parts):
                plgpu.copy_gmem_to_smem(
                    weight_tile(w_ref, work.expert, part, work.column * out_columns, out_columns, k, layout),
                    w_load.at[slot, pl.ds(part * out_columns, out_columns)],
                    full.at[slot],
                )
            return step + 1

        for kind, height in enumerate(heights):

            @pl.when(work.height == kind)
            def _(height=height):
                lax.fori_loop(0, steps, functools.partial(load, height=height), step)

        return step + steps

    step = lax.fori_loop(0, trips, item, jnp.int32(0))

    def drain(s, carry):  # leave no barrier with a phase that nobody has seen
        plgpu.barrier_wait(empty.at[lax.rem(s, jnp.int32(stages))])
        return carry

    lax.fori_loop(jnp.maximum(step - stages, 0), step, drain, None)


def _kernel(*refs, tile: Tile, activation, has_bias: bool, has_index: bool, sms: int, experts: int, interpret: bool):
    schedule_ref, x_ref, w_ref, *rest = refs
    bias_ref = rest.pop(0) if has_bias else None
    rows = None
    if has_index:  # the tokens are not multiplied, but their rows
        index_ref, out_ref, rows_ref, *rest = rest
        rows = Rows.of(x_ref, index_ref, rows_ref, schedule_ref, experts=experts, interpret=interpret)
        x_ref, rest = rows_ref, [out_ref, *rest]
    out_ref, x_smem, w_smem, out_smem, full, empty = rest
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
            heights=(tile.rows,), parts=parts, layout=layout, k_tiles=k_tiles, stages=stages, rows=rows,
        )  # fmt: skip
        load() if rows is None else rows.beside(load)

    @pl.when(wg < 2)
    def _multiply():
        plgpu.set_max_registers(232, action="increase")
        if rows is not None:
            rows.begin()

        def store_tile(value, row, column, width):
            """64 whole rows through shared memory, 64 columns at a time; zeros where there is no value."""
            for c in range(width // 64):
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
            """This warpgroup's share of a tile: rows of it, or, where the tile is only 64 rows high, columns."""
            half = tile.rows == 64
            width = out_columns // 2 if half else out_columns
            row = work.row if half else work.row + wg * 64
            rows = jnp.minimum(work.rows - (row - work.row), 64)
            column = work.column * out_columns + (wg * width if half else 0)
            a_rows = pl.ds(0, 64) if half else pl.ds(wg * 64, 64)
            # With 128 rows gate and up are one operand, side by side; a share of 64 rows finds its own in two places.
            if half:
                b_rows, b_size = [pl.ds(part * out_columns + wg * width, width) for part in range(parts)], width
            else:
                b_rows, b_size = [pl.ds(0, 256)], 256

            def multiply(*accs):
                def mma(k, carry):
                    slot = lax.rem(step + k, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[slot])
                    for acc, b in zip(accs, b_rows, strict=True):
                        plgpu.wgmma(acc, x_smem.at[slot, a_rows], transposed(w_smem.at[slot, b]))
                    return carry

                def steady(k, carry):
                    mma(k, carry)
                    plgpu.wgmma_wait(len(accs))  # the multiplications before these have read their stage
                    plgpu.barrier_arrive(empty.at[lax.rem(step + k - 1, jnp.int32(stages))])
                    return carry

                mma(0, None)
                lax.fori_loop(1, k_tiles, steady, None)
                return tuple(acc[...] for acc in accs)

            values = pl.run_scoped(multiply, *[plgpu.ACC((64, b_size), jnp.float32) for _ in b_rows])
            plgpu.barrier_arrive(empty.at[lax.rem(step + (k_tiles - 1), jnp.int32(stages))])
            if gated and not half:
                values = (values[0][:, :width], values[0][:, width:])
            values = list(values)
            if bias_ref is not None:
                for part in range(parts):
                    source = bias_ref.at[work.expert, part, pl.ds(column, width)]
                    bias = epilogue.load_bias(source, reduced=0)
                    values[part] += lax.broadcast_in_dim(bias, (64, width), (1,))
            value = values[0]
            if activation is not None:
                value = epilogue.activate(activation, values[0], values[1] if gated else None)
            value = value.astype(out_ref.dtype)
            whole = work.rows == (64 if half else 128)

            @pl.when(whole)
            def _():
                store_tile(value, row, column, width)

            @pl.when(jnp.logical_not(whole))
            def _():
                if interpret:
                    store_by_row(value, row, rows, column, width)
                else:
                    epilogue.store_rows(value, out_ref, row, rows, column)

        def store_by_row(value, row, rows, column, columns_of_value):
            for c in range(columns_of_value // 64):
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
                if tile.rows == 128:
                    store_tile(None, work.row + wg * 64, work.column * out_columns, out_columns)
                else:
                    width = out_columns // 2
                    store_tile(None, work.row, work.column * out_columns + wg * width, width)

            @pl.when(jnp.logical_not(work.zeros))
            def _():
                matmul(work, step)

            return step + jnp.where(work.zeros, 0, k_tiles)

        lax.fori_loop(0, trips, item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def weight_operands(w: jax.Array, bias: jax.Array | None, activation, *, past: int) -> tuple[list[jax.Array], int]:
    """Weights and bias as the kernels address them, and how many columns the result has.

    Args:
      w: (e, N, D); gated: (e, 2F, D), which is seen with one more axis of gate and up.
      bias: (e, rows of w) or None; becomes (e, 1 or 2, columns) in float32.
      activation: None, or a value with the fields gated and layout.
      past: columns of a tile. Those past the edge are never stored, but their bias is read.
    """
    experts, columns, depth = w.shape
    layout = gate_layout(activation)
    order = (1, columns)
    if layout is not None:
        columns //= 2
        order = (2, columns) if layout == "concatenated" else (columns, 2)
        w = w.reshape(experts, *order, depth)
    if bias is None:
        return [w], columns
    bias = bias.reshape(experts, *order)
    if layout is not None and layout != "concatenated":
        bias = bias.transpose(0, 2, 1)
    return [w, jnp.pad(bias.astype(jnp.float32), ((0, 0), (0, 0), (0, -columns % past)))], columns


def compiler_params(interpret) -> plgpu.CompilerParams:
    """How all products are compiled: by lane, with barriers of their own but in the interpreter."""
    return plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=interpret is None,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
    )


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
    rows = x_RD.shape[0] if index_R is None else index_R.shape[0]
    experts, gated = w.shape[0], gate_layout(activation) is not None
    weights, columns = weight_operands(w, bias, activation, past=256)
    sms = sm_count() if interpret is None else 2
    body = functools.partial(
        _kernel, tile=tile, activation=activation, has_bias=bias is not None,
        has_index=index_R is not None, sms=sms, experts=experts, interpret=interpret is not None,
    )  # fmt: skip
    name = "moe_gate_up" if activation is not None else "moe_grouped_matmul"
    memory = functools.partial(operand_memory, dtype=x_RD.dtype, interpret=interpret is not None)
    types = [jax.ShapeDtypeStruct((rows, width), x_RD.dtype) for width in (columns, x_RD.shape[1])]
    results = plgpu.kernel(
        named(body, name),
        out_type=types[: 1 if index_R is None else 2],
        scratch_types=[
            memory((tile.stages, tile.rows, DEPTH)),
            memory((tile.stages, 256, DEPTH)),
            memory((2, 2, 64, DEPTH)),
            plgpu.Barrier(num_arrivals=3 if gated else 2, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
        ],
        grid=(sms,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        interpret=interpret,
        compiler_params=compiler_params(interpret),
    )(schedule, x_RD, *weights, *([] if index_R is None else [index_R]))
    return results[0]


__all__ = ["Tile", "grouped_matmul", "make_schedule", "sm_count"]
