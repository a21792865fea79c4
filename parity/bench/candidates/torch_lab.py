"""PyTorch's side of a benchmark: inputs by formula, float32 products for the reference, the clock.

On a GPU each set of inputs is captured as a CUDA graph, whose replay lies between two events; a wait on the device
before it keeps the launch out of the time. What cannot be captured is called between the events as it is.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from parity.bench import draws, timing
from parity.bench.floors import Rates

CHUNK = 1 << 26
WAIT_CYCLES = 400_000
"""About 0.2 ms, in which the host launches what is to be timed."""


def _signed(value: int) -> int:
    """The int32 with the bits of a uint32: torch has no arithmetic on those."""
    return value - (1 << 32) if value >= 1 << 31 else value


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift that brings in zeros."""
    return (value >> bits) & ((1 << (32 - bits)) - 1)


def _values(index: torch.Tensor, seed: int, factor: np.float32) -> torch.Tensor:
    """bfloat16 by the formula of `draws`, of indices as int32; int32 products wrap."""
    value = index * _signed(draws.GOLDEN) + _signed(seed)
    value = (value ^ _shift(value, 16)) * _signed(draws.FIRST)
    value = (value ^ _shift(value, 13)) * _signed(draws.SECOND)
    value = value ^ _shift(value, 16)
    total = (value & 255) + (_shift(value, 8) & 255) + (_shift(value, 16) & 255) + _shift(value, 24) - draws.MEAN
    return (total.float() * float(factor)).bfloat16()


class Lab:
    """Arrays and the clock of one device."""

    def __init__(self, where: str) -> None:
        self.on_gpu = where == "gpu"
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        kind = torch.cuda.get_device_name() if self.on_gpu else platform.machine()
        self.versions = {"torch": torch.__version__, "device": kind}
        torch.set_grad_enabled(False)  # for the process, which serves nothing else

    def normal(self, seed: int, shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        count, factor = math.prod(shape), draws.factor(deviation)
        out = torch.empty(count, dtype=torch.bfloat16, device=self.device)
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            index = torch.arange(start, stop, dtype=torch.int64, device=self.device).to(torch.int32)
            out[start:stop] = _values(index, seed, factor)
        return out.view(shape)

    def stacked(self, seeds: Sequence[int], sizes: tuple[int, int], deviation: float, layout: str) -> torch.Tensor:
        rows, columns = sizes
        index = torch.arange(rows * columns, dtype=torch.int32, device=self.device).view(rows, columns)
        if layout == "transposed":
            index = index.T.contiguous()
        elif layout == "interleaved":
            index = torch.stack([index[: rows // 2], index[rows // 2 :]], dim=1).view(rows, columns)
        out = torch.empty(len(seeds), *index.shape, dtype=torch.bfloat16, device=self.device)
        for expert, seed in enumerate(seeds):
            out[expert] = _values(index, seed, draws.factor(deviation))
        return out

    def put(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    def rows(self, array: torch.Tensor, index: np.ndarray) -> np.ndarray:
        return array[torch.from_numpy(np.asarray(index, np.int64)).to(self.device)].float().cpu().numpy()

    def product(self, weights: torch.Tensor, expert: int, x: np.ndarray, layout: str) -> np.ndarray:
        matrix = weights[expert].float()
        out = (self.put(x) @ (matrix if layout == "transposed" else matrix.T)).cpu().numpy()
        return np.concatenate([out[:, ::2], out[:, 1::2]], axis=1) if layout == "interleaved" else out

    def checksum(self, array: torch.Tensor) -> int:
        return int(array.view(torch.int16).sum(dtype=torch.int64)) & draws.MASK

    def finite(self, array: torch.Tensor) -> bool:
        return bool(array.isfinite().all())

    def rates(self) -> Rates:
        """What a large bf16 product and a large copy reach."""
        side, count = (8192, 1 << 29) if self.on_gpu else (128, 1 << 20)
        a = self.normal(draws.seed("rows"), (side, side), 1.0)
        b = self.normal(draws.seed("h"), (side, side), 1.0)
        product = self.measure(lambda a, b: a @ b, [(a, b)], 10)
        flat = torch.zeros(count, dtype=torch.int16, device=self.device)
        copy = self.measure(lambda v: v + 1, [(flat,)], 10)
        return Rates(2e-9 * side**3 / product.device_ms, 1e-6 * 4 * count / copy.device_ms)

    def measure(self, function: Callable[..., Any], sets: Sequence[tuple], repeat: int) -> timing.Timing:
        """Call once, then time calls that rotate over the sets of inputs."""
        peak = temporary = None
        if self.on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = function(*sets[0])
        self._wait()
        compile_s = time.perf_counter() - began
        if self.on_gpu:
            del result
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = function(*sets[0])
            self._wait()
            others = sum(_bytes(arguments) for arguments in sets[1:]) - sum(_shared(sets))
            peak = torch.cuda.max_memory_allocated() - others
            temporary = torch.cuda.max_memory_allocated() - before - _bytes(result)
        for arguments in sets:
            function(*arguments)
        self._wait()
        calls, clock = self._calls(function, sets)
        each = [self._one(calls[index % len(calls)]) for index in range(repeat)]
        device_ms, spread = timing.summary(each)
        return timing.Timing(
            device_ms=device_ms,
            spread=spread,
            wall_ms=self._wall(function, sets, timing.calls_for(device_ms, repeat)),
            clock=clock,
            compile_s=compile_s,
            peak_bytes=peak,
            temporary_bytes=temporary,
            result=result,
        )

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _calls(self, function: Callable[..., Any], sets: Sequence[tuple]) -> tuple[list[Callable[[], Any]], str]:
        plain = [lambda arguments=arguments: function(*arguments) for arguments in sets]
        if not self.on_gpu:
            return plain, "wall"
        graphs, pool = [], None
        try:
            # what waits for the device cannot be captured, and to try it would leave the allocator in a capture
            try:
                torch.cuda.set_sync_debug_mode("error")
                function(*sets[0])
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for arguments in sets:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    function(*arguments)
                pool = graph.pool()
                graphs.append(graph)
        except RuntimeError:
            torch.cuda.synchronize()
            return plain, "events"
        for graph in graphs:
            graph.replay()
        torch.cuda.synchronize()
        return [graph.replay for graph in graphs], "graph"

    def _one(self, call: Callable[[], Any]) -> float:
        if not self.on_gpu:
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(WAIT_CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def _wall(self, function: Callable[..., Any], sets: Sequence[tuple], calls: int) -> float:
        began = time.perf_counter()
        for index in range(calls):
            function(*sets[index % len(sets)])
        self._wait()
        return (time.perf_counter() - began) * 1e3 / calls


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in _tensors(value)] if isinstance(values, tuple | list) else []


def _bytes(values: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(values))


def _shared(sets: Sequence[tuple]) -> list[int]:
    """Bytes of what later sets share with the first one."""
    first = {id(tensor) for tensor in _tensors(sets[0])}
    return [tensor.nbytes for arguments in sets[1:] for tensor in _tensors(arguments) if id(tensor) in first]
