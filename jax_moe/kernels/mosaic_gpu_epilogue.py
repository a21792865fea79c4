"""What the Hopper kernels do with an accumulator: activation in float32, and stores of part of a tile."""

import inspect

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

try:  # lowering helpers for the stores; present wherever Mosaic GPU is
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, gpu, llvm, math, vector
    from jax.experimental.mosaic.gpu import utils as mgpu_utils
except ImportError as error:  # pragma: no cover - a jaxlib without the GPU dialects
    raise NotImplementedError("this jaxlib has no Mosaic GPU dialects") from error


STORES_TRANSPOSED = hasattr(plgpu, "InterpretGPUParams")


def load_bias(ref, *, reduced: int) -> jax.Array:
    """A vector from global memory in the layout of an accumulator's rows (reduced=1) or columns (reduced=0)."""
    # Before 0.11 the index is a required argument, since then a deprecated one.
    index = () if inspect.signature(plgpu.load).parameters["idx"].default is not inspect.Parameter.empty else (None,)
    return plgpu.load(ref, *index, layout=plgpu.Layout.WGMMA.reduce(reduced), optimized=False)


def transpose_into(value: jax.Array, ref, *, interpret: bool) -> None:
    """Writes the transpose of `value`, (64, n) of 16 bits in WGMMA layout, to `ref`, (n, 64) in shared memory."""
    if interpret:
        ref[...] = value.T
        return
    transposed = ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))
    # Since 0.11 stmatrix transposes as it stores; before, lanes exchange halves of their registers first.
    transposed[...] = value if STORES_TRANSPOSED else plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)


def erfc(x: jax.Array) -> jax.Array:
    """The complementary error function with a relative error of 1.2e-7 (Numerical Recipes, erfcc).

    The relative bound matters: gelu of a large negative number is small, and must not drown in the error of 1 + erf.
    """
    z = jnp.abs(x)
    t = 1.0 / (1.0 + 0.5 * z)
    poly = 0.17087277
    for c in (-0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368):
        poly = poly * t + c
    tail = t * jnp.exp(-z * z - 1.26551223 + t * poly)
    return jnp.where(x >= 0, tail, 2.0 - tail)


def sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def activate(activation, gate: jax.Array, up: jax.Array | None) -> jax.Array:
    """The activation in float32: of `gate` and `up` where it is gated, of `gate` alone where it is not."""
    name = activation.name
    if name == "silu":
        h = gate * sigmoid(gate)
    elif name == "gelu":
        h = 0.5 * gate * erfc(gate * -0.7071067811865476)
    elif name == "gelu_tanh":
        # 0.5 (1 + tanh(u)) is sigmoid(2 u): one exponential, and no cancellation for large negative u.
        h = gate * sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    elif name == "relu2":
        h = jnp.square(jnp.maximum(gate, 0.0))
    elif name == "swigluoai":
        gate = jnp.minimum(gate, activation.limit)
        up = jnp.clip(up, -activation.limit, activation.limit) + 1.0
        h = gate * sigmoid(activation.alpha * gate)
    else:
        raise NotImplementedError(f"activation {name!r} has no Hopper epilogue")
    return h if up is None else h * up


def global_pointer(ref) -> "ir.Value":
    """Where a reference to global memory begins."""
    return llvm.addrspacecast(llvm.PointerType.get(1), mgpu_utils.memref_ptr(ref))


def scalar(array) -> "ir.Value":
    return array.registers.flat[0]


def _i64(value) -> "ir.Value":
    i64 = ir.IntegerType.get_signless(64)
    if isinstance(value, int):
        return mgpu_utils.c(value, i64)
    if isinstance(value.type, ir.IndexType):
        return arith.index_cast(i64, value)
    return value if value.type == i64 else arith.extsi(i64, value)


def _lane_origin() -> tuple["ir.Value", "ir.Value"]:
    """Row and column, within a 64 x 8 block of an accumulator, of the first element that this CUDA thread holds."""
    i32 = ir.IntegerType.get_signless(32)
    c = lambda v: mgpu_utils.c(v, i32)  # noqa: E731
    thread = arith.remui(arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x)), c(128))
    warp, lane = arith.divui(thread, c(32)), arith.remui(thread, c(32))
    row = arith.addi(arith.muli(warp, c(16)), arith.divui(lane, c(4)))
    return row, arith.muli(arith.remui(lane, c(4)), c(2))


def _pairs(array):
    """The registers of an array in WGMMA layout: (row, column) offsets from the lane's origin, and two elements."""
    rows, columns = array.shape
    flat = array.registers.reshape(rows // 64, columns // 8, 2)
    for m in range(rows // 64):
        for half in range(2):
            for n in range(columns // 8):
                yield m * 64 + half * 8, n * 8, flat[m, n, half]


def _address(ref, row, column) -> "ir.Value":
    strides, offset = ir.MemRefType(ref.type).get_strides_and_offset()
    assert (offset, strides[1]) == (0, 1), (strides, offset)
    index = arith.addi(arith.muli(_i64(row), _i64(strides[0])), _i64(column))
    base = mgpu_utils.memref_ptr(ref)
    return mgpu_utils.getelementptr(base, [index], ir.MemRefType(ref.type).element_type)


SPLAT = plgpu.Layout.WG_SPLAT(())


def store_rows(array, out_ref, row, rows, column) -> None:
    """Writes the first `rows` rows of `array` to `out_ref[row:, column:]`, 4 bytes a lane; columns past its edge stay.

    Args:
      array: (64, C) bfloat16 or float16 in WGMMA layout.
      out_ref: (R, N) in global memory, N a multiple of 8.
      row, rows, column: int32 scalars.
    """
    columns = out_ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), SPLAT, SPLAT, SPLAT))
    def store(ctx, array, out_ref, row, rows, column):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        row, rows, column = scalar(row), scalar(rows), scalar(column)
        lane_row, lane_column = _lane_origin()
        at = arith.addi(column, lane_column)
        for half in range(2):
            offset = arith.addi(lane_row, mgpu_utils.c(half * 8, i32))
            inside = arith.cmpi(arith.CmpIPredicate.slt, offset, rows)
            with mgpu_utils.when(inside):
                base = _address(out_ref, arith.addi(row, offset), at)
                for r, n, pair in _pairs(array):
                    if r != half * 8:
                        continue
                    i32_pair = llvm.bitcast(i32, pair)
                    pointer = mgpu_utils.getelementptr(base, [n], array.mlir_dtype)
                    block = arith.addi(column, mgpu_utils.c(n, i32))
                    exists = arith.cmpi(arith.CmpIPredicate.slt, block, mgpu_utils.c(columns, i32))
                    with mgpu_utils.when(exists):
                        llvm.store(i32_pair, pointer)

    store(array, out_ref, row, rows, column)  # pyright: ignore[reportCallIssue]


def store_columns(array, out_ref, row, rows, column) -> None:
    """Writes `array` transposed: its column t becomes row `row + t` of `out_ref`, for the first `rows` of them.

    Args:
      array: (C, n) bfloat16 or float16 in WGMMA layout, C a multiple of 64; lands in columns `column` to `column + C`.
      out_ref: (R, N) in global memory, N a multiple of 8; columns past N are left.
      row, rows, column: int32 scalars.
    """
    columns = out_ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), SPLAT, SPLAT, SPLAT))
    def store(ctx, array, out_ref, row, rows, column):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        row, rows, column = scalar(row), scalar(rows), scalar(column)
        lane_row, lane_column = _lane_origin()
        base = _address(out_ref, arith.addi(row, lane_column), arith.addi(column, lane_row))
        for r, n, pair in _pairs(array):
            exists = arith.cmpi(
                arith.CmpIPredicate.slt,
                arith.addi(column, arith.addi(lane_row, mgpu_utils.c(r, i32))),
                mgpu_utils.c(columns, i32),
            )
            for second in range(2):
                inside = arith.cmpi(
                    arith.CmpIPredicate.slt, arith.addi(lane_column, mgpu_utils.c(n + second, i32)), rows
                )
                with mgpu_utils.when(arith.andi(exists, inside)):
                    value = vector.extract(
                        pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([second])
                    )
                    pointer = mgpu_utils.getelementptr(base, [(n + second) * columns + r], array.mlir_dtype)
                    llvm.store(value, pointer)

    store(array, out_ref, row, rows, column)  # pyright: ignore[reportCallIssue]


def store_chosen_columns(array, out_ref, row, tokens, column) -> None:
    """Writes columns of `array` to rows of `out_ref`: of those whose bit in `tokens` is set, in order, from `row` on.

    Args:
      array: (C, n) bfloat16 or float16 in WGMMA layout, C a multiple of 64, n at most 32.
      out_ref: (R, N) in global memory, N a multiple of 8; columns past N are left.
      row, tokens, column: int32 scalars. Example: row 5, tokens 0b1101: columns 0, 2, 3 become rows 5, 6, 7.
    """
    columns = out_ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), SPLAT, SPLAT, SPLAT))
    def store(ctx, array, out_ref, row, tokens, column):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        c = lambda v: mgpu_utils.c(v, i32)  # noqa: E731
        row, tokens, column = scalar(row), scalar(tokens), scalar(column)
        lane_row, lane_column = _lane_origin()
        first_column = arith.addi(column, lane_row)
        for n in range(0, array.shape[1], 8):
            for second in range(2):
                token = arith.addi(lane_column, c(n + second))
                chosen = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(arith.shrui(tokens, token), c(1)), c(0))
                with mgpu_utils.when(chosen):
                    earlier = arith.andi(tokens, arith.subi(arith.shli(c(1), token), c(1)))
                    base = _address(out_ref, arith.addi(row, math.ctpop(earlier)), first_column)
                    for r, column_n, pair in _pairs(array):
                        if column_n != n:
                            continue
                        exists = arith.cmpi(arith.CmpIPredicate.slt, arith.addi(first_column, c(r)), c(columns))
                        with mgpu_utils.when(exists):
                            value = vector.extract(
                                pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([second])
                            )
                            llvm.store(value, mgpu_utils.getelementptr(base, [r], array.mlir_dtype))

    store(array, out_ref, row, tokens, column)  # pyright: ignore[reportCallIssue]
