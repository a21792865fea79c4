"""JAX's side of a benchmark: inputs by formula, float32 products for the reference, the clock.

A call's time is read from a profile of the device: from the start of its first kernel to the end of its last one.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from parity.bench import draws, timing
from parity.bench.floors import Rates

_GOLDEN, _FIRST, _SECOND = (np.uint32(v) for v in (draws.GOLDEN, draws.FIRST, draws.SECOND))


def _values(index: jax.Array, seed: jax.Array, factor: jax.Array) -> jax.Array:
    """bfloat16 by the formula of `draws`, of uint32 indices."""
    value = index * _GOLDEN + seed
    value = (value ^ (value >> 16)) * _FIRST
    value = (value ^ (value >> 13)) * _SECOND
    value = value ^ (value >> 16)
    parts = [((value >> (8 * byte)) & 255).astype(jnp.int32) for byte in range(4)]
    total = parts[0] + parts[1] + parts[2] + parts[3] - draws.MEAN
    return (total.astype(jnp.float32) * factor).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=1)
def normal(seed: jax.Array, shape: tuple[int, ...], factor: jax.Array) -> jax.Array:
    return _values(jax.lax.iota(jnp.uint32, math.prod(shape)), seed, factor).reshape(shape)


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def stacked(seeds: jax.Array, sizes: tuple[int, int], factor: jax.Array, layout: str, blocks: int = 1) -> jax.Array:
    """Weights of `sizes` for each seed; with blocks, gate and up rows in as many pairs of blocks (`tp_blocks`)."""
    rows, columns = sizes
    shape = (len(seeds), columns, rows) if layout == "transposed" else (len(seeds), rows, columns)
    axes = (2, 1) if layout == "transposed" else (1, 2)
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in axes)
    if layout == "interleaved":
        row = row // 2 + (row % 2) * (rows // 2)
    if blocks > 1:
        half, part = rows // 2, rows // 2 // blocks
        row = row % (2 * part) // part * half + row // (2 * part) * part + row % part
    return _values(row * np.uint32(columns) + column, seeds[:, None, None], factor)


@functools.partial(jax.jit, static_argnums=3)
def _product(weights: jax.Array, expert: jax.Array, x: jax.Array, layout: str) -> jax.Array:
    matrix = weights[expert].astype(jnp.float32)
    matrix = matrix if layout == "transposed" else matrix.T
    return jnp.dot(x, matrix, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _sum_of_bits(array: jax.Array) -> jax.Array:
    return jnp.sum(jax.lax.bitcast_convert_type(array, jnp.int16), dtype=jnp.int32)


@jax.jit
def _finite(array: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(array))


@dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled function: `call` takes arrays; the rest is as in `timing.Timing`."""

    call: Callable[..., Any]
    compile_s: float
    peak_bytes: int | None
    temporary_bytes: int | None


class Lab:
    """Arrays and the clock of one device."""

    def __init__(self, where: str) -> None:
        self.device = jax.devices()[0]
        self.on_gpu = self.device.platform == "gpu"
        if self.on_gpu != (where == "gpu"):
            raise RuntimeError(f"JAX runs on {self.device.platform!r}, not on {where!r}")
        self.versions = {"jax": jax.__version__, "device": self.device.device_kind}

    def normal(self, seed: int, shape: tuple[int, ...], deviation: float) -> jax.Array:
        return normal(np.uint32(seed), shape, draws.factor(deviation))

    def stacked(self, seeds: Sequence[int], sizes: tuple[int, int], deviation: float, layout: str) -> jax.Array:
        return stacked(jnp.array(seeds, jnp.uint32), sizes, draws.factor(deviation), layout)

    def put(self, values: np.ndarray) -> jax.Array:
        return jnp.asarray(values)

    def rows(self, array: jax.Array, index: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.take(array, jnp.asarray(index, jnp.int32), axis=0).astype(jnp.float32))

    def product(self, weights: jax.Array, expert: int, x: np.ndarray, layout: str) -> np.ndarray:
        padded = np.zeros((8, x.shape[1]), np.float32)  # one program for all numbers of rows
        padded[: len(x)] = x
        out = np.asarray(_product(weights, jnp.int32(expert), padded, layout))[: len(x)]
        return np.concatenate([out[:, ::2], out[:, 1::2]], axis=1) if layout == "interleaved" else out

    def checksum(self, array: jax.Array) -> int:
        return int(_sum_of_bits(array)) & draws.MASK

    def finite(self, array: jax.Array) -> bool:
        return bool(_finite(array))

    def memory(self) -> int:
        """Bytes that programs may use."""
        stats = self.device.memory_stats() or {}
        return stats.get("bytes_limit") or psutil.virtual_memory().available

    def rates(self) -> Rates:
        """What a large bf16 product and a large copy reach."""
        side, count = (8192, 1 << 28) if self.on_gpu else (128, 1 << 19)
        a = self.normal(draws.seed("rows"), (side, side), 1.0)
        b = self.normal(draws.seed("h"), (side, side), 1.0)
        product = self.measure(lambda a, b: a @ b, [(a, b)], 10)
        flat = jnp.zeros(count, jnp.int32)  # XLA's loop over 16 bits is a fifth slower
        copy = self.measure(lambda v: v + jnp.int32(1), [(flat,)], 10)
        return Rates(2e-9 * side**3 / product.device_ms, 1e-6 * 8 * count / copy.device_ms)

    def compile(self, function: Callable[..., Any], *arguments: Any) -> Program:
        """Compile a function for arguments like these.

        Args:
          function: of arrays, or what `jax.jit(...).trace(...)` gave.
          arguments: arrays; none where it is traced already.

        Raises:
          MemoryError: the compiled program needs more memory than the device has.
        """
        began = time.perf_counter()
        traced: Any = function if not arguments else jax.jit(function).trace(*arguments)
        compiled = traced.lower().compile()
        compile_s = time.perf_counter() - began
        memory = compiled.memory_analysis()
        temporary = peak = None
        if memory is not None:
            temporary = int(memory.temp_size_in_bytes)
            peak = temporary + int(memory.argument_size_in_bytes + memory.output_size_in_bytes)
            if peak > self.memory():
                raise MemoryError(f"needs {peak / 1e9:.0f} GB, there are {self.memory() / 1e9:.0f} GB")
        return Program(call=compiled, compile_s=compile_s, peak_bytes=peak, temporary_bytes=temporary)

    def measure(self, function: Callable[..., Any], sets: Sequence[tuple], repeat: int) -> timing.Timing:
        """Compile once, then time calls that rotate over the sets of inputs.

        Raises:
          MemoryError: the compiled program needs more memory than the device has.
        """
        return self.time(self.compile(function, *sets[0]), sets, repeat)

    def time(self, program: Program, sets: Sequence[tuple], repeat: int, *, meeting: bool = True) -> timing.Timing:
        """Time calls that rotate over the sets of inputs.

        Args:
          program: from `compile`.
          sets: of arguments.
          repeat: calls that the median is taken of.
          meeting: whether several devices, if there are, wait for each other in it; see `timing.of_devices`.
        """
        result = jax.block_until_ready(program.call(*sets[0]))
        for arguments in sets:
            jax.block_until_ready(program.call(*arguments))
        device_ms, spread, clock, exposed = self._device_time(program.call, sets, repeat, meeting)
        return timing.Timing(
            device_ms=device_ms,
            spread=spread,
            wall_ms=self._wall(program.call, sets, timing.calls_for(device_ms, repeat)),
            clock=clock,
            compile_s=program.compile_s,
            peak_bytes=program.peak_bytes,
            temporary_bytes=program.temporary_bytes,
            result=result,
            exchange=exposed,
        )

    def _wall(self, compiled: Callable[..., Any], sets: Sequence[tuple], calls: int) -> float:
        began, out = time.perf_counter(), None
        for index in range(calls):
            out = compiled(*sets[index % len(sets)])
            if not self.on_gpu:
                # with several host devices, queued programs starve each other of the threads their collectives need
                jax.block_until_ready(out)
        jax.block_until_ready(out)
        return (time.perf_counter() - began) * 1e3 / calls

    def _device_time(
        self, compiled: Callable[..., Any], sets: Sequence[tuple], repeat: int, meeting: bool
    ) -> tuple[float, float, str, timing.Exchange | None]:
        if self.on_gpu:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # kernels are all that is wanted
            options.enable_hlo_proto = False
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder, profiler_options=options):
                    for index in range(repeat):
                        jax.block_until_ready(compiled(*sets[index % len(sets)]))
                        time.sleep(timing.REST_SECONDS)
                devices = list(_kernels(Path(folder)).values())
            found = [timing.spans([kernel[:2] for kernel in kernels], repeat) for kernels in devices]
            calls = [spans for spans in found if spans]
            if calls and len(calls) == len(found):
                each = timing.of_devices(calls, meeting=meeting)
                return *timing.summary(each), "profile", timing.exchange(devices, repeat)
        each = []
        for index in range(repeat):
            began = time.perf_counter()
            jax.block_until_ready(compiled(*sets[index % len(sets)]))
            each.append((time.perf_counter() - began) * 1e3)
        return *timing.summary(each), "wall", None


def _kernels(folder: Path) -> dict[str, list[tuple[int, int, str]]]:
    """(start, duration, name) in nanoseconds of all that ran on each GPU, from the profile in a folder."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if "GPU" not in plane.name:
                continue
            events = [
                (int(event.start_ns), int(event.duration_ns), str(event.name))
                for line in plane.lines
                if line.name and "Stream" in line.name
                for event in line.events
            ]
            if events:
                found[plane.name] = events
    return found
