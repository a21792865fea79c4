"""What the products for Hopper share: memory seen two ways, work list, loading warpgroup, operands, launch.

Shape suffixes: R rows sorted by expert, e experts, D depth, N output columns, F activated columns.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_moe.kernels.mosaic_gpu_ahead import Rows
from jax_moe.kernels.schedule import FIELDS

DEPTH = 64  # columns, of two bytes each, in the 128 bytes of one swizzle atom


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
    `kind` is the number of its height, from the lowest that the kernel has.
    """

    expert: jax.Array
    row: jax.Array
    rows: jax.Array
    column: jax.Array
    zeros: jax.Array
    tokens: jax.Array
    kind: jax.Array | int = 0


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
    in_band = jnp.minimum(tiles - band_index * band, band)
    local = local - band_index * (band * column_tiles)
    column = lax.div(local, in_band)
    zeros = expert == experts
    number = band_index * band + lax.rem(local, in_band)
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
    *, heights: tuple[int, ...], parts: int, layout, k_tiles: int, stages: int, together: int = 1, ahead=None,
) -> None:  # fmt: skip
    """The loading warpgroup: operands of `find(0)`, `find(1)`, ..., through the ring of stages.

    `together` stages are filled at a time: what they have of a row lies side by side in memory, and is asked for so.
    Rows that are being gathered (`ahead`) are waited for.
    """
    out_columns = 256 // parts

    def item(i, step):
        work = find(i)
        column = work.column * out_columns
        if ahead is not None:
            ahead.wait(work)

        def load(k, count: int, height: int):
            """Stages k to k + count - 1 of the tile."""
            slots = [lax.rem(step + k + n, jnp.int32(stages)) for n in range(count)]
            for n, slot in enumerate(slots):

                @pl.when(step + k + n >= stages)
                def _(slot=slot):
                    plgpu.barrier_wait(empty.at[slot])

            for n, slot in enumerate(slots):
                source = x_ref.at[pl.ds(work.row, height), pl.ds((k + n) * DEPTH, DEPTH)]
                target = x_load.at[slot] if len(heights) == 1 else x_load.at[slot, pl.ds(0, height)]
                plgpu.copy_gmem_to_smem(source, target, full.at[slot])
            for part in range(parts):
                for n, slot in enumerate(slots):
                    source = weight_tile(w_ref, work.expert, part, column, out_columns, k + n, layout)
                    target = w_load.at[slot, pl.ds(part * out_columns, out_columns)]
                    plgpu.copy_gmem_to_smem(source, target, full.at[slot])

        def tile(height: int):
            def some(number, carry):
                load(number * together, together, height)
                return carry

            lax.fori_loop(0, k_tiles // together, some, None)
            if rest := k_tiles % together:
                load(jnp.int32(k_tiles - rest), rest, height)  # a box may reach past the depth; static ones may not

        for kind, height in enumerate(heights):
            pl.when(jnp.logical_not(work.zeros) & (work.kind == kind))(functools.partial(tile, height))
        return step + jnp.where(work.zeros, 0, k_tiles)

    drain(lax.fori_loop(0, trips, item, jnp.int32(0)), empty, stages)


def drain(step, empty, stages: int) -> None:
    """After `step` stages have been filled: leaves no barrier with a phase that nobody has seen."""

    def see(s, carry):
        plgpu.barrier_wait(empty.at[lax.rem(s, jnp.int32(stages))])
        return carry

    lax.fori_loop(jnp.maximum(step - stages, 0), step, see, None)


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


def persistent(body, name: str, *, out_type, scratch_types, sms: int, warpgroups: int, interpret):
    """A kernel of one CTA for each of `sms`, as all products are: by lane, with barriers of their own.

    Args:
      body: of the operands' refs, the results' and those of `scratch_types`; it finds itself on the axes "sm" and "wg".
      name: what profiles show.
      out_type, scratch_types: as of `plgpu.kernel`.
      warpgroups: of a CTA.
      interpret: InterpretGPUParams to run on CPU, where barriers are the interpreter's.
    """

    def kernel(*refs):
        body(*refs)

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(sms,),
        grid_names=("sm",),
        num_threads=warpgroups,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=interpret is None,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )


def launch(
    kernel, x_RD: jax.Array, w: jax.Array, schedule: jax.Array,
    *, activation, bias: jax.Array | None, index_R: jax.Array | None, tile, interpret, results: tuple[int, ...],
    suffix: str = "",
) -> jax.Array:  # fmt: skip
    """A kernel of two multiplying warpgroups and one that loads, with tiles of 256 rows of weights.

    Args:
      kernel: of refs (schedule, x, weights, bias or None, result, the three stages of shared memory, barriers full and
        empty), the rows on their way or None as `ahead`, and the launch: tile, activation, sms, experts, interpret.
      results: shape of the shared memory that results pass through.
      suffix: of the kernel's name.

    The others are those of a product.
    """
    rows = x_RD.shape[0] if index_R is None else index_R.shape[0]
    experts, gated = w.shape[0], gate_layout(activation) is not None
    weights, columns = weight_operands(w, bias, activation, past=256)
    sms = sm_count() if interpret is None else 2
    fixed = {"tile": tile, "activation": activation, "sms": sms, "experts": experts, "interpret": interpret is not None}

    def body(schedule_ref, x_ref, w_ref, *rest):
        bias_ref, rest = (None, rest) if bias is None else (rest[0], rest[1:])
        ahead = None
        if index_R is not None:  # the tokens are not multiplied, but their rows
            index_ref, out_ref, rows_ref, *rest = rest
            ahead = Rows.of(x_ref, index_ref, rows_ref, schedule_ref, experts=experts, interpret=interpret is not None)
            x_ref, rest = rows_ref, [out_ref, *rest]
        kernel(schedule_ref, x_ref, w_ref, bias_ref, *rest, ahead=ahead, **fixed)

    name = "moe_gate_up" if activation is not None else "moe_grouped_matmul"
    memory = functools.partial(operand_memory, dtype=x_RD.dtype, interpret=interpret is not None)
    types = [jax.ShapeDtypeStruct((rows, width), x_RD.dtype) for width in (columns, x_RD.shape[1])]
    return persistent(
        body,
        name + suffix + ("" if index_R is None else "_ahead"),
        out_type=types[: 1 if index_R is None else 2],
        scratch_types=[
            memory((tile.stages, tile.rows, DEPTH)),
            memory((tile.stages, 256, DEPTH)),
            memory(results),
            plgpu.Barrier(num_arrivals=3 if gated else 2, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
        ],
        sms=sms,
        warpgroups=3,
        interpret=interpret,
    )(schedule, x_RD, *weights, *([] if index_R is None else [index_R]))[0]
