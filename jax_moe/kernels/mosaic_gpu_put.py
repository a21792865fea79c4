"""Blocks of rows stored into the memory of other GPUs of the host, over NVLink, by the threads that read them.

Every rank has one block for each rank. It stores block d of its array as block r of rank d's result, r being its own
number: an all-to-all of equal blocks, of any number of arrays at once.

No store before its place is free: in one process XLA has all ranks meet before a kernel that asks for addresses of
peers. Each has by then done all it was given before, so what the result overwrites is read and the semaphores are
zeros. Nothing is read before it is there: a thread block stores, then signals the same thread block of the peer, which
waits for one signal from each. A signal is a release, and a wait an acquire, of the whole system; semaphores made in
the kernel's scratch are one for each thread block.
"""

from __future__ import annotations

import ctypes
import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_moe._compat import varying_axes
from jax_moe.kernels import hopper
from jax_moe.kernels.mosaic_gpu_epilogue import arith, global_pointer, gpu, ir, llvm, mgpu_utils

try:
    from jax._src.lib.mlir.dialects import scf
except ImportError as error:  # pragma: no cover - a jaxlib without the GPU dialects
    raise NotImplementedError("this jaxlib has no SCF dialect") from error

THREADS = 128
BLOCKS = 132  # all of them must run at once, as several of 128 threads do on each processor
MOST_RANKS = 8  # whose addresses XLA passes to a kernel
IN_FLIGHT = 8  # loads a thread starts before it stores the first


def no_puts(*arrays: jax.Array, axes: tuple[str, ...]) -> str | None:
    """Why the ranks of `axes` cannot store into each other's memory here; None: they can."""
    if jax.process_count() > 1:
        return f"{jax.process_count()} processes: expected one over all GPUs"
    mesh = jax.sharding.get_abstract_mesh()
    platform = getattr(mesh.abstract_device, "platform", None) or jax.default_backend()
    if platform != "gpu":
        return f"it stores into the memory of GPUs, and these ranks are on {platform.upper()}"
    around = {axis: size for axis, size in mesh.shape.items() if size > 1}
    among = {axis: size for axis in axes if (size := jax.lax.axis_size(axis)) > 1}
    if list(around) != list(among):  # a peer is told by its place in the mesh
        return f"the mesh has axes {around} and the exchange is over {among}: expected the same ones in the same order"
    if (ranks := math.prod(among.values())) > MOST_RANKS:
        return f"{ranks} ranks: expected at most {MOST_RANKS}"
    if jax.__version_info__ < (0, 11):
        return f"JAX {jax.__version__}: expected 0.11 or newer, where a kernel can name a peer's array"
    if any(varying_axes(x) for x in arrays):
        return "inside shard_map with check_vma=True; the kernel's results carry no varying axes"
    return hopper.no_hopper() or no_peer_access()


@functools.cache
def no_peer_access() -> str | None:
    """Why the GPUs of this process cannot address each other's memory; None: they can, or there are none here."""
    gpus = [device.local_hardware_id for device in jax.local_devices() if device.platform == "gpu"]
    if len(gpus) < 2:
        return None
    can, driver = ctypes.c_int(), ctypes.CDLL("libcuda.so.1")
    for here in gpus:
        for there in gpus:
            if here != there and (driver.cuDeviceCanAccessPeer(ctypes.byref(can), here, there) or not can.value):
                return f"GPU {here} cannot address the memory of GPU {there}"
    return None


def put_blocks(arrays: tuple[jax.Array, ...], *, axes: tuple[str, ...], blocks: int = BLOCKS) -> tuple[jax.Array, ...]:
    """Block d of each array to rank d, where it becomes block r, r this rank: what `all_to_all` does, in one kernel.

    Args:
      arrays: (N * C, ...) each, any C and any dtype of whole bytes; not empty.
      axes: mesh axes of the N ranks, all of more than one rank that the mesh has.
      blocks: the most thread blocks; they must all fit on the card at once.

    Raises:
      NotImplementedError: says what it would take.
    """
    reason = no_puts(*arrays, axes=axes)
    if reason is not None:
        raise NotImplementedError(f"transport 'one_sided' cannot run here: {reason}")
    sizes = [jax.lax.axis_size(axis) for axis in axes]
    ranks = math.prod(sizes)
    by_block = [x.reshape(ranks, -1) for x in arrays]
    units = max(_units(x.shape[1] * x.dtype.itemsize)[0] for x in by_block)
    grid = min(blocks, -(-units // THREADS))
    count = len(arrays)

    def moe_put_blocks(*refs):
        sources, results, arrived = refs[:count], refs[count : 2 * count], refs[2 * count]
        me = jax.numpy.int32(0)
        for axis, size in zip(axes, sizes, strict=True):
            me = me * size + jax.lax.axis_index(axis)
        # Each begins with the rank after it, so that no two store to one rank at a time; its own block comes last.
        for step in (*range(1, ranks), 0):
            peer = jax.lax.rem(me + step, jax.numpy.int32(ranks))
            for source, result in zip(sources, results, strict=True):
                place = result.at[me]
                if step:
                    place = plgpu.remote_ref(place, peer, pl.DeviceIdType.LOGICAL)
                _copy(source.at[peer], place, grid)
            if step:
                pl.semaphore_signal(arrived, device_id=peer, device_id_type=pl.DeviceIdType.LOGICAL)
        pl.semaphore_wait(arrived, ranks - 1)

    moved = plgpu.kernel(
        moe_put_blocks,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in by_block],
        scratch_types=[plgpu.SemaphoreType.REGULAR],
        grid=(grid,),
        grid_names=("blocks",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*by_block)
    return tuple(y.reshape(x.shape) for x, y in zip(arrays, moved, strict=True))


def _units(size: int) -> tuple[int, int]:
    """How many pieces a block of `size` bytes is moved in, and their bytes: 16 where they divide it, else fewer."""
    width = math.gcd(size, 16)
    return size // width, width


def _rounds(units: int, stride: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Two loops of `stride` threads over all pieces: where they start and stop, and how many pieces a turn is.

    Thread i begins with piece start + i, takes every `stride`th piece of a turn, and skips to the next turn.
    """
    number = min(IN_FLIGHT, max(1, units // stride))
    whole = units // (stride * number) * stride * number
    return (0, whole, number), (whole, units, 1)


def _copy(source, target, grid: int) -> None:
    """The threads of the whole grid copy `source` to `target`, both contiguous and of one shape."""
    size = math.prod(source.shape) * source.dtype.itemsize

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def copy(ctx, source, target):
        del ctx
        units, width = _units(size)
        i8, i32, index = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32), ir.IndexType.get()
        i64 = ir.IntegerType.get_signless(64)
        piece = ir.VectorType.get((width // 4,), i32) if width > 4 else ir.IntegerType.get_signless(8 * width)
        c = lambda v: mgpu_utils.c(v, index)  # noqa: E731
        pointers = [global_pointer(ref) for ref in (source, target)]
        thread = arith.addi(arith.muli(gpu.block_id(gpu.Dimension.x), c(THREADS)), gpu.thread_id(gpu.Dimension.x))
        stride = grid * THREADS

        def move(first, number: int):
            at = [arith.muli(arith.addi(first, c(u * stride)), c(width)) for u in range(number)]
            at = [arith.index_cast(i64, a) for a in at]
            pieces = [llvm.load(piece, mgpu_utils.getelementptr(pointers[0], [a], i8), alignment=width) for a in at]
            for a, value in zip(at, pieces, strict=True):
                llvm.store(value, mgpu_utils.getelementptr(pointers[1], [a], i8), alignment=width)

        for start, stop, number in _rounds(units, stride):
            body = scf.ForOp(arith.addi(thread, c(start)), c(stop), c(stride * number))
            with ir.InsertionPoint(body.body):
                move(body.induction_variable, number)
                scf.yield_([])

    copy(source, target)  # pyright: ignore[reportCallIssue]
