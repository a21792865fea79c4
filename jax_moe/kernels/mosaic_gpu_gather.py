"""Rows gathered by index into a stage of operands, by the threads of the loading warpgroup.

TMA on Hopper copies boxes, not rows from anywhere. cp.async copies 16 bytes a lane from any address: eight lanes take
the 128 bytes of a row, a warpgroup 16 rows at a time, and put them where TMA's 128-byte swizzle would have.
"""

from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_moe.kernels.mosaic_gpu_epilogue import SPLAT, _i64, _scalar, arith, gpu, ir, llvm, mgpu_utils

try:
    from jax._src.lib.mlir.dialects import nvvm
except ImportError as error:  # pragma: no cover - a jaxlib without the GPU dialects
    raise NotImplementedError("this jaxlib has no NVVM dialect") from error


def start(x_ref, index_ref, target, first, k, *, rows: int) -> None:
    """Starts copies of 64 columns, from `64 * k` on, of x's rows index[first:first + rows] to `target`.

    Args:
      x_ref: (t, D) of 16 bits a number in global memory; columns past D are zeros.
      index_ref: int32 in global memory, readable up to `first + rows`; negative ones read row 0.
      target: (rows, 64) in shared memory with a swizzle of 128 bytes.
      first, k: int32 scalars.
      rows: a multiple of 8.
    """
    depth = x_ref.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType((plgpu.SwizzleTransform(128),)), SPLAT, SPLAT)
    )
    def copy(ctx, x_ref, index_ref, target, first, k):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        i8 = ir.IntegerType.get_signless(8)
        c = lambda v: mgpu_utils.c(v, i32)  # noqa: E731
        thread = arith.remui(arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x)), c(128))
        row, part = arith.divui(thread, c(8)), arith.remui(thread, c(8))
        column = arith.addi(arith.muli(_scalar(k), c(64)), arith.muli(part, c(8)))
        inside = arith.cmpi(arith.CmpIPredicate.slt, column, c(depth))
        size = arith.select(inside, c(16), c(0))
        column = arith.select(inside, column, c(0))
        swizzled = arith.muli(arith.xori(part, arith.remui(row, c(8))), c(16))
        to = mgpu_utils.getelementptr(
            mgpu_utils.memref_ptr(target), [arith.addi(arith.muli(row, c(128)), swizzled)], i8
        )
        index = mgpu_utils.getelementptr(mgpu_utils.memref_ptr(index_ref), [arith.addi(_scalar(first), row)], i32)
        x = llvm.addrspacecast(llvm.PointerType.get(1), mgpu_utils.memref_ptr(x_ref))
        for r in range(0, rows, 16):

            def copy_row(r=r):
                source = llvm.load(i32, mgpu_utils.getelementptr(index, [r], i32))
                source = arith.maxsi(source, c(0))
                element = arith.addi(arith.muli(_i64(source), _i64(depth)), _i64(column))
                address = mgpu_utils.getelementptr(x, [element], ir.MemRefType(x_ref.type).element_type)
                nvvm.cp_async_shared_global(
                    mgpu_utils.getelementptr(to, [r * 128], i8), address, 16,
                    nvvm.LoadCacheModifierKind.CG, cp_size=size,
                )  # fmt: skip

            if r + 16 <= rows:
                copy_row()
            else:  # the upper half of the warpgroup has no row left
                with mgpu_utils.when(arith.cmpi(arith.CmpIPredicate.slt, row, c(rows - r))):
                    copy_row()
        nvvm.cp_async_commit_group()

    copy(x_ref, index_ref, target, first, k)  # pyright: ignore[reportCallIssue]


def wait(newest: int) -> None:
    """Waits for this thread's copies but for the `newest` calls of `start`, and shows them to wgmma."""

    @plgpu.inline_mgpu()
    def wait_copies(ctx):
        del ctx
        nvvm.cp_async_wait_group(newest)
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    wait_copies()  # pyright: ignore[reportCallIssue]
