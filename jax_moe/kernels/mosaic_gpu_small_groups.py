"""Grouped matmul for Hopper with few rows per expert: the weights fill the 64-row side of wgmma, the tokens the other.

Shape suffixes: R rows sorted by expert, e experts, D depth, N output columns, F activated columns.

With few rows an expert the work is to read the weights once. A tile is 128 rows of weights (gated: 64 gate rows and the
64 up rows that go with them) times 8 to 128 tokens, so tokens waste no more than a multiple of 8, and even one token
spreads over as many CTAs as there are tiles of weights. One warpgroup keeps up to 210 KB of loads in flight, another
multiplies.

Where a tile holds all tokens there are, they need not be gathered: every expert multiplies all of them, which costs
nothing while the weights are still on their way, and stores the columns of those that chose it (`by_token`).
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
    drain,
    find_work,
    gate_layout,
    operand_memory,
    persistent,
    sm_count,
    transposed,
    views,
    weight_operands,
    weight_tile,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Shape of a CTA's tile and of its pipeline.

    Attributes:
      rows: tokens of a tile, 8 to 128 in powers of two.
      depth: columns of a stage, a multiple of 64.
      band: token tiles walked together; large, so that all tiles of an expert find its weights in the L2 cache.
    """

    rows: int = 16
    depth: int = 128
    band: int = 4096

    @property
    def stages(self) -> int:
        """As many stages of operands as fit in 210 KB."""
        return 210 * 1024 // (2 * self.depth * (128 + self.rows))


def _kernel(
    *refs, tile: Tile, activation, has_bias: bool, sms: int, experts: int, interpret: bool, by_token: bool
):  # fmt: skip
    schedule_ref, x_ref, w_ref, *rest = refs
    bias_ref = rest.pop(0) if has_bias else None
    out_ref, x_smem, w_smem, *rest, full, empty = rest
    x_load, x_smem = views(x_smem, interpret=interpret)
    w_load, w_smem = views(w_smem, interpret=interpret)
    atoms = tile.depth // DEPTH

    layout = gate_layout(activation)
    gated = layout is not None
    out_columns = 64 if gated else 128
    depth, columns = x_ref.shape[1], out_ref.shape[1]
    k_tiles = -(-depth // tile.depth)
    column_tiles = -(-columns // out_columns)
    stages = tile.stages
    # A load's box must fit into its array. What is left of a stage's rows is whatever was there: columns of the
    # accumulator that nobody stores.
    box = min(tile.rows, x_ref.shape[0])

    wg, sm = lax.axis_index("wg"), lax.axis_index("sm")
    items = schedule_ref[5] * column_tiles
    trips = lax.div(items - sm + (sms - 1), jnp.int32(sms))
    find = functools.partial(
        find_work, schedule_ref, experts=experts, tile=tile.rows, column_tiles=column_tiles, band=tile.band
    )

    @pl.when(wg == 1)
    def _load():
        def item(i, step):
            work = find(sm + i * sms)
            column = work.column * out_columns

            def load(k, step):
                slot = lax.rem(step, jnp.int32(stages))

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                for atom in range(atoms):
                    at = k * atoms + atom
                    for part in range(2 if gated else 1):
                        source = weight_tile(w_ref, work.expert, part, column, out_columns, at, layout)
                        target = w_load.at[slot, atom, pl.ds(part * out_columns, out_columns)]
                        plgpu.copy_gmem_to_smem(source, target, full.at[slot])
                    source = x_ref.at[pl.ds(0 if by_token else work.row, box), pl.ds(at * DEPTH, DEPTH)]
                    target = x_load.at[slot, atom] if box == tile.rows else x_load.at[slot, atom, pl.ds(0, box)]
                    plgpu.copy_gmem_to_smem(source, target, full.at[slot])
                return step + 1

            return lax.fori_loop(0, jnp.where(work.zeros, 0, k_tiles), load, step)

        drain(lax.fori_loop(0, trips, item, jnp.int32(0)), empty, stages)

    @pl.when(wg == 0)
    def _multiply():
        def store(value, work):
            column = work.column * out_columns
            if interpret:
                store_by_row(value, work, column)
            elif by_token:
                epilogue.store_chosen_columns(value, out_ref, work.row, work.tokens, column)
            else:
                epilogue.store_columns(value, out_ref, work.row, work.rows, column)

        def store_by_row(value, work, column):
            out_smem = rest[0]
            out_smem[...] = value
            for width in {out_columns, columns % out_columns} - {0}:  # the interpreter has no masked store
                edge = column + out_columns > columns

                @pl.when(jnp.logical_not(edge) if width == out_columns else edge)
                def _(width=width):
                    def one(from_column, row):
                        for c in range(width):
                            out_ref[row, column + c] = out_smem[c, from_column]
                        return row + 1

                    def if_chosen(token, row):
                        wanted = lax.shift_right_logical(work.tokens, token) & 1
                        return lax.fori_loop(token, token + wanted, one, row)

                    most, body = (tile.rows, if_chosen) if by_token else (work.rows, one)
                    lax.fori_loop(0, most, body, work.row)

        def item(i, step):
            work = find(sm + i * sms)

            @pl.when(work.zeros)
            def _zeros():
                zeros = jnp.full((out_columns, tile.rows), 0.0, out_ref.dtype)
                store(zeros if interpret else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA), work)

            @pl.when(jnp.logical_not(work.zeros))
            def _matmul():
                def multiply(acc):
                    def mma(k, carry):
                        slot = lax.rem(step + k, jnp.int32(stages))
                        plgpu.barrier_wait(full.at[slot])
                        for atom in range(atoms):
                            plgpu.wgmma(acc, w_smem.at[slot, atom], transposed(x_smem.at[slot, atom]))
                        return carry

                    def steady(k, carry):
                        mma(k, carry)
                        plgpu.wgmma_wait(atoms)  # the stage before this one has been read
                        plgpu.barrier_arrive(empty.at[lax.rem(step + k - 1, jnp.int32(stages))])
                        return carry

                    mma(0, None)
                    lax.fori_loop(1, k_tiles, steady, None)
                    return acc[...]

                value = pl.run_scoped(multiply, plgpu.ACC((128, tile.rows), jnp.float32))
                plgpu.barrier_arrive(empty.at[lax.rem(step + (k_tiles - 1), jnp.int32(stages))])
                parts = [value[:64], value[64:]] if gated else [value]
                if bias_ref is not None:
                    for p in range(len(parts)):
                        source = bias_ref.at[work.expert, p, pl.ds(work.column * out_columns, out_columns)]
                        bias = epilogue.load_bias(source, reduced=1)
                        parts[p] += lax.broadcast_in_dim(bias, (out_columns, tile.rows), (0,))
                value = parts[0]
                if activation is not None:
                    value = epilogue.activate(activation, parts[0], parts[1] if gated else None)
                store(value.astype(out_ref.dtype), work)

            return step + jnp.where(work.zeros, 0, k_tiles)

        lax.fori_loop(0, trips, item, jnp.int32(0))


def grouped_matmul(
    x_RD: jax.Array,
    w: jax.Array,
    schedule: jax.Array,
    *,
    activation=None,
    bias: jax.Array | None = None,
    tile: Tile = Tile(),
    rows: int | None = None,
    interpret=None,
) -> jax.Array:
    """x @ w[expert].T for rows sorted by expert, with bias and activation where given; made for few rows an expert.

    Args:
      x_RD: (R, D) bfloat16 or float16.
      w: (e, N, D), same dtype; gated: (e, 2F, D), gate and up rows in `activation.layout`.
      schedule: make_schedule(sizes, rows=R, tile=tile.rows).
      activation: None, or a value with the fields name, gated, layout, alpha, limit.
      bias: (e, rows of w) or None, added in float32 before the activation.
      tile: shape of the tiles.
      rows: R, when x is not rows but all the tokens there are, (t, D) with t at most tile.rows and 32; each record of
        the schedule then has one tile, and the tokens of its expert as bits.
      interpret: InterpretGPUParams to run on CPU.

    Returns:
      (R, N), gated (R, F), in x's dtype. Rows past the last group are zeros.
    """
    by_token = rows is not None
    rows = x_RD.shape[0] if rows is None else rows
    experts, gated = w.shape[0], gate_layout(activation) is not None
    weights, columns = weight_operands(w, bias, activation, past=128)
    operands = [schedule, x_RD, *weights]
    sms = sm_count() if interpret is None else 2
    body = functools.partial(
        _kernel, tile=tile, activation=activation, has_bias=bias is not None, sms=sms, experts=experts,
        interpret=interpret is not None, by_token=by_token,
    )  # fmt: skip
    name = "moe_gate_up_small" if activation is not None else "moe_grouped_matmul_small"
    out_tile = [plgpu.SMEM((64 if gated else 128, tile.rows), x_RD.dtype)] if interpret is not None else []
    memory = functools.partial(operand_memory, dtype=x_RD.dtype, interpret=interpret is not None)
    return persistent(
        body,
        name,
        out_type=jax.ShapeDtypeStruct((rows, columns), x_RD.dtype),
        scratch_types=[
            memory((tile.stages, tile.depth // DEPTH, tile.rows, DEPTH)),
            memory((tile.stages, tile.depth // DEPTH, 128, DEPTH)),
            *out_tile,
            plgpu.Barrier(num_arrivals=(3 if gated else 2) * (tile.depth // DEPTH), num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=tile.stages),
        ],
        sms=sms,
        warpgroups=2,
        interpret=interpret,
    )(*operands)
