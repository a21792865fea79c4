"""Rows gathered in expert order while a product multiplies those before them: by spare warps, ahead of the loads.

Shape suffixes: t tokens, R rows in expert order, D depth.

The rows are copied into a buffer in global memory, unit by unit (a few rows), in the order in which they are
multiplied. A warp claims the next unit from a counter, copies it, and adds its rows to the count of the block of rows
they lie in. Who loads a tile waits until the blocks under it are complete. Who copies a row decides nothing about its
bits.

Why every wait ends. Copying waits for nothing: between its claim and its count a warp only loads and stores. Only a
warp that runs can hold a claim, and the warps of any one CTA go on claiming until all units below `total` are claimed.
So with one CTA on the card, or as many as another stream or process leaves room for, all units are claimed, and all
that are claimed are counted; those CTAs finish, and make room for the others, who find everything done. No CTA has to
be resident for another to go on. What is waited for lies below `total`: a tile's own rows do, units do not reach past a
block (a power of two of rows that divides it), and a block that `total` cuts is complete with the rows below it. Rows
from `total` on, and tokens that no index below it names, are neither copied nor waited for; an index out of range gives
zeros. (TMA reads a box of a tile's whole height: past a small group that is rows of others, here or not yet, whose
products are not stored.) The counts are this call's own: XLA hands each call zeros, which end with it. Should a wait
fail to end all the same, it traps: an error in place of a program that hangs.

Order between SMs and proxies: the copying lanes make their stores visible to the card and to TMA (fence.proxy.async,
fence.acq_rel.gpu), meet, and one of them adds to the count (release); a reader sees the count (acquire), and fences
again before it has TMA read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_moe.kernels.mosaic_gpu_epilogue import SPLAT, global_pointer, ir, llvm, scalar
from jax_moe.kernels.schedule import FIELDS

BLOCK = 128  # rows of a count
LOADS = 4  # of 16 bytes a lane, in flight: what fits into the registers of a loading warp
UNIT_BYTES = 16384  # about as many are claimed at a time
LOOKS = 1 << 26  # at a count, before a wait traps: about a minute, where a wait is microseconds


def unit_rows(width: int) -> int:
    """Rows of `width` numbers of two bytes in a unit: a power of two, at most one for each lane."""
    rows = max(1, UNIT_BYTES // (2 * width))
    return min(1 << (rows.bit_length() - 1), 32)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows on their way, in a kernel: x[index[r]] becomes rows[r] for r below `total`.

    `counters` has, for all CTAs of a call, the rows that are claimed, and of each block the rows that have arrived;
    None in the interpreter, which has neither them nor the warps that copy.
    """

    x: Any
    index: Any
    rows: Any
    counters: Any
    total: jax.Array

    @staticmethod
    def of(x_ref, index_ref, rows_ref, schedule_ref, *, experts: int, interpret: bool) -> Rows:
        count = 1 + -(-rows_ref.shape[0] // BLOCK)
        counters = None if interpret else pl.get_global(plgpu.SemaphoreType.REGULAR((count,)))
        last = (schedule_ref[5] - 1) * FIELDS
        expert, start, size = schedule_ref[last], schedule_ref[last + 3], schedule_ref[last + 4]
        total = jnp.where(expert == experts, start, start + size)
        return Rows(x_ref, index_ref, rows_ref, counters, jnp.minimum(total, rows_ref.shape[0]))

    def beside(self, load: Callable[[], None]) -> None:
        """In the loading warpgroup: one warp runs `load`, the others copy."""
        if self.counters is None:
            load()
            return

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(load)
            pl.when(warp != 0)(self.copy)

    def begin(self) -> None:
        """In a multiplying warpgroup, which has nothing to multiply yet: each warp copies a unit."""
        if self.counters is not None:
            self.copy(once=True)

    def copy(self, *, once: bool = False) -> None:
        copy_rows(self.x, self.index, self.rows, self.counters, self.total, once=once)

    def wait(self, work) -> None:
        """Until TMA can read the rows of a tile."""
        first, rows = work.row, jnp.where(work.zeros, 0, work.rows)
        if self.counters is not None:
            await_rows(self.counters, first, rows, self.total)
            return

        def copy(r, carry):
            token, tokens = self.index[first + r], self.x.shape[0]
            row = self.x[jnp.clip(token, 0, tokens - 1), :]
            self.rows[first + r, :] = jnp.where((token >= 0) & (token < tokens), row, 0)
            return carry

        lax.fori_loop(0, rows, copy, None)


def _asm(text: str, operands: list, constraints: str) -> None:
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, constraints, has_side_effects=True)


def copy_ptx(*, tokens: int, width: int, unit: int, once: bool) -> str:
    """$0 tokens, $1 index, $2 rows, $3 counters, $4 rows in all; a warp's share of the copying."""
    step = 32 * 16  # bytes of a row that one load of a warp takes
    row_bytes = 2 * width
    batches, rest = divmod(row_bytes, LOADS * step)
    data = [f"{{{', '.join(f'v{i}_{j}' for j in range(4))}}}" for i in range(LOADS)]
    zero = [f"mov.b32 v{i}_{j}, 0;" for i in range(LOADS) for j in range(4)]

    def move(pieces: list[str]) -> list[str]:
        """`pieces`: for each load the predicate of the lanes that have something to move."""
        loads = [
            f"@{p} ld.global.nc.L1::no_allocate.v4.b32 {data[i]}, [from + {i * step}];" for i, p in enumerate(pieces)
        ]
        stores = [
            f"{'' if p == 'inside' else '@in_row '}st.global.v4.b32 [to + {i * step}], {data[i]};"
            for i, p in enumerate(pieces)
        ]
        return [*zero[: 4 * len(pieces)], *loads, *stores]

    row = []
    if batches:
        row += [f"mov.b32 left, {batches};", "BATCH:", *move(["inside"] * LOADS)]
        row += [f"add.u64 from, from, {LOADS * step};", f"add.u64 to, to, {LOADS * step};"]
        row += ["sub.u32 left, left, 1;", "setp.ne.u32 p, left, 0;", "@p bra BATCH;"]
    if rest:
        whole, edge = divmod(rest, step)
        pieces = ["inside"] * whole
        if edge:
            row += [f"setp.lt.u32 in_row, lane, {edge // 16};", "and.pred edge, in_row, inside;"]
            pieces.append("edge")
        row += move(pieces)
    claim = [f"@leader atom.relaxed.gpu.global.add.u32 next, [$3], {unit};"]
    share = "shfl.sync.idx.b32 next, next, 0, 31, 0xffffffff;"
    load_index = [
        "add.u32 at, next, lane;",
        f"setp.lt.u32 p, lane, {unit};",
        "setp.lt.and.s32 p, at, $4, p;",
        "mad.wide.u32 address, at, 4, $1;",
        "@p ld.global.nc.b32 ahead, [address];",
    ]
    lines = [
        "{",
        ".reg .pred p, leader, inside, in_row, edge;",
        ".reg .b32 lane, unit, next, row, end, at, source, index, ahead, left;",
        ".reg .b64 x, out, from, to, address;",
        *(f".reg .b32 v{i}_{j};" for i in range(LOADS) for j in range(4)),
        "mov.u32 lane, %laneid;",
        "setp.eq.u32 leader, lane, 0;",
        "mad.wide.u32 x, lane, 16, $0;",
        "mad.wide.u32 out, lane, 16, $2;",
        "mov.b32 next, 0;",
        "mov.b32 ahead, 0;",
        *claim,
        share,
        *load_index,
        "UNIT:",
        "mov.b32 unit, next;",
        "mov.b32 index, ahead;",
        "setp.ge.s32 p, unit, $4;",
        "@p bra DONE;",
        *([] if once else claim),  # what it answers is not needed before this unit is copied
        f"add.u32 end, unit, {unit};",
        "min.s32 end, end, $4;",
        "mov.b32 row, unit;",
        "ROW:",
        "sub.u32 at, row, unit;",
        "shfl.sync.idx.b32 source, index, at, 31, 0xffffffff;",
        f"setp.lt.u32 inside, source, {tokens};",
        "selp.b32 source, source, 0, inside;",
        f"mad.wide.u32 from, source, {row_bytes}, x;",
        f"mad.wide.u32 to, row, {row_bytes}, out;",
        *row,
        "add.u32 row, row, 1;",
        "setp.lt.s32 p, row, end;",
        "@p bra ROW;",
        *([] if once else [share, *load_index]),
        "fence.proxy.async;",
        "fence.acq_rel.gpu;",
        "bar.warp.sync 0xffffffff;",
        f"shr.u32 at, unit, {BLOCK.bit_length() - 1};",
        "mad.wide.u32 address, at, 4, $3;",
        "sub.u32 at, end, unit;",
        "@leader red.release.gpu.global.add.u32 [address + 4], at;",
        *([] if once else ["bra UNIT;"]),
        "DONE:",
        "}",
    ]
    return "\n".join(lines)


WAIT_PTX = f"""{{
.reg .pred p;
.reg .b32 block, last, need, have, looks;
.reg .b64 at;
setp.eq.u32 p, $2, 0;
@p bra ARRIVED;
shr.u32 block, $1, {BLOCK.bit_length() - 1};
add.u32 last, $1, $2;
sub.u32 last, last, 1;
shr.u32 last, last, {BLOCK.bit_length() - 1};
BLOCK:
mad.lo.u32 need, block, -{BLOCK}, $3;
min.s32 need, need, {BLOCK};
mad.wide.u32 at, block, 4, $0;
mov.b32 looks, {LOOKS};
WAIT:
sub.u32 looks, looks, 1;
setp.eq.u32 p, looks, 0;
@p trap;
ld.acquire.gpu.global.b32 have, [at + 4];
setp.lt.s32 p, have, need;
@p bra WAIT;
add.u32 block, block, 1;
setp.le.u32 p, block, last;
@p bra BLOCK;
fence.proxy.async;
ARRIVED:
}}"""


def copy_rows(x_ref, index_ref, rows_ref, counters_ref, total, *, once: bool = False) -> None:
    """Copies x[index[r]] to rows[r], for r below `total`, for as long as there are units to claim.

    Args:
      x_ref: (t, D) of 16 bits a number in global memory, D a multiple of 8.
      index_ref: (R,) int32; rows of an index out of range are zeros.
      rows_ref: (R, D).
      counters_ref: int32, of `Rows`.
      total: int32, at most R; rows from there on stay as they are.
      once: each warp copies one unit and returns.
    """
    tokens, width = x_ref.shape
    text = copy_ptx(tokens=tokens, width=width, unit=unit_rows(width), once=once)
    references = (plgpu.RefType(),) * 4

    @plgpu.inline_mgpu(arg_types=(*references, SPLAT))
    def copy(ctx, *operands):
        del ctx
        *refs, total = operands
        pointers = [global_pointer(ref) for ref in refs]
        _asm(text, [*pointers, scalar(total)], "l,l,l,l,r")

    copy(x_ref, index_ref, rows_ref, counters_ref, total)  # pyright: ignore[reportCallIssue]


def await_rows(counters_ref, first, rows, total) -> None:
    """Waits until rows first to first + rows - 1, those below `total` of them, can be read by TMA."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, SPLAT, SPLAT))
    def wait(ctx, counters_ref, *scalars):
        del ctx
        pointer = global_pointer(counters_ref)
        _asm(WAIT_PTX, [pointer, *map(scalar, scalars)], "l,r,r,r")

    wait(counters_ref, first, rows, total)  # pyright: ignore[reportCallIssue]
