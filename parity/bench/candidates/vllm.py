"""vLLM's fused_moe Triton kernel, at the best of several tiles for each shape.

Only its kernel is called, with the arguments it has in vLLM 0.33. Routing, and the alignment of tokens to tiles that
precedes the kernel in vLLM, happen outside of all times; activation and the sum over slots are small kernels of ours.
"""

# Neither Triton nor the peers are installed where types are checked.
# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from parity.bench import draws
from parity.bench.candidates.base import Candidate
from parity.bench.shapes import Shape

TRIES = 5
"""Replays by which a tile is chosen."""
SMALL_ROWS = 96
"""Mean rows of an expert below which tiles for few rows are tried."""


@triton.jit
def _silu_pair(inner, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(inner + row * 2 * width + column, mask=inside).to(tl.float32)
    up = tl.load(inner + row * 2 * width + width + column, mask=inside).to(tl.float32)
    tl.store(out + row * width + column, (gate / (1 + tl.exp(-gate)) * up).to(tl.bfloat16), mask=inside)


@triton.jit
def _sum_slots(y, out, width, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(SLOTS):
        total += tl.load(y + (row * SLOTS + slot) * width + column, mask=inside).to(tl.float32)
    tl.store(out + row * width + column, total.to(tl.bfloat16), mask=inside)


def _tile(m: int, n: int, k: int, group: int, warps: int, stages: int) -> dict[str, int]:
    return {
        "BLOCK_SIZE_M": m,
        "BLOCK_SIZE_N": n,
        "BLOCK_SIZE_K": k,
        "GROUP_SIZE_M": group,
        "num_warps": warps,
        "num_stages": stages,
    }


WIDE = (_tile(128, 256, 64, 16, 8, 4), _tile(128, 128, 64, 16, 8, 4), _tile(64, 128, 64, 32, 4, 4))
NARROW = (
    _tile(64, 128, 64, 1, 4, 4),
    _tile(32, 128, 64, 1, 4, 4),
    _tile(16, 64, 128, 1, 4, 4),
    _tile(16, 128, 64, 1, 4, 4),
    _tile(16, 32, 128, 64, 4, 4),
)


def align(ids: torch.Tensor, experts: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs by expert, each expert's padded to whole tiles with an index past the last pair.

    Example: ids [[1], [0], [1]], 2 experts, tiles of 2: pairs [1, 3, 0, 2], experts of the tiles [0, 1], 4 in all.

    Returns:
      pairs (P,) int32, the expert of each tile (P / block,) int32, and P, (1,) int32.
    """
    flat = ids.reshape(-1).long()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)
    padded = -(-counts // block) * block
    first, start = counts.cumsum(0) - counts, padded.cumsum(0) - padded
    expert = flat[order]
    pairs = torch.full((int(padded.sum()),), flat.numel(), dtype=torch.int32, device=ids.device)
    pairs[start[expert] + torch.arange(flat.numel(), device=ids.device) - first[expert]] = order.int()
    tiles = torch.repeat_interleave(torch.arange(experts, device=ids.device), padded // block).int()
    return pairs, tiles, padded.sum().int().view(1)


class Vllm(Candidate):
    def __init__(self) -> None:
        try:
            module = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
        except ModuleNotFoundError:
            module = importlib.import_module("vllm_kernel")
        self.kernel = module.fused_moe_kernel
        self._note = ""
        self._best: dict[tuple[str, str], dict[str, int]] = {}

    def note(self) -> str:
        return self._note

    def operation(self, what: str, shape: Shape) -> Callable[..., Any]:
        # `prepare` has bound everything that a call needs
        return lambda call, *_: call()

    def prepare(self, what: str, shape: Shape, arguments: tuple, routing: draws.Routing) -> tuple:
        key = (what, shape.id)
        if key not in self._best:
            times = {}
            for index, tile in enumerate(NARROW if shape.rows / shape.experts < SMALL_ROWS else WIDE):
                try:
                    times[index] = (_milliseconds(self._call(what, shape, arguments, routing, tile)), tile)
                except triton.runtime.errors.OutOfResources:
                    continue
            self._best[key] = min(times.values(), key=lambda pair: pair[0])[1]
        best = self._best[key]
        self._note = "tile {BLOCK_SIZE_M}x{BLOCK_SIZE_N}x{BLOCK_SIZE_K}, group {GROUP_SIZE_M}".format(**best)
        return self._call(what, shape, arguments, routing, best), *arguments

    def _call(
        self, what: str, shape: Shape, arguments: tuple, routing: draws.Routing, tile: dict[str, int]
    ) -> Callable[[], torch.Tensor]:
        device = arguments[0].device
        top_k, block = shape.top_k, tile["BLOCK_SIZE_M"]
        if what == "layer":
            x, gate, gate_up, down = arguments
            scores, ids = torch.softmax(x.float() @ gate.float().T, -1).topk(top_k, -1)
            scores = scores / scores.sum(-1, keepdim=True)
            places = align(ids, shape.experts, block)

            def layer() -> torch.Tensor:
                inner = self._product(x, gate_up, scores, places, False, top_k, tile)
                y = self._product(_activate(inner), down, scores, places, True, 1, tile)
                return _add_slots(y, top_k)

            return layer
        # one row a pair, sorted by expert already
        rows, weights, _ = arguments
        expert = torch.repeat_interleave(torch.arange(shape.experts), torch.from_numpy(routing.sizes).long())
        places = align(expert.to(device)[:, None], shape.experts, block)
        ones = torch.ones(shape.rows, 1, device=device)

        def single() -> torch.Tensor:
            out = self._product(rows, weights, ones, places, False, 1, tile)
            return _activate(out) if what == "gate_up" else out

        return single

    def _product(
        self,
        rows: torch.Tensor,
        weights: torch.Tensor,
        scores: torch.Tensor,
        places: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        weigh: bool,
        top_k: int,
        tile: dict[str, int],
    ) -> torch.Tensor:
        """(pairs, N): row pair // top_k times its expert's weights, in the order of the pairs."""
        pairs, tiles, total = places
        count, (_, N, K) = rows.shape[0] * top_k, weights.shape
        out = torch.empty(count, N, dtype=torch.bfloat16, device=rows.device)
        padded = pairs.numel()
        if rows.shape[0] < tile["BLOCK_SIZE_M"]:
            padded = min(padded, count * tile["BLOCK_SIZE_M"])
        grid = (triton.cdiv(padded, tile["BLOCK_SIZE_M"]) * triton.cdiv(N, tile["BLOCK_SIZE_N"]),)
        strides = (rows.stride(0), 1, weights.stride(0), 1, weights.stride(1), N, 1)
        self.kernel[grid](
            *(rows, weights, out, None, None, None, scores, pairs, tiles, total, N, K, padded, count, *strides),
            *(0,) * 9,
            MUL_ROUTED_WEIGHT=weigh,
            top_k=top_k,
            compute_type=tl.bfloat16,
            use_fp8_w8a8=False,
            use_int8_w8a8=False,
            use_int8_w8a16=False,
            per_channel_quant=False,
            naive_block_assignment=False,
            HAS_BIAS=False,
            SWAP_AB=False,
            USE_TD=False,
            SPLIT_K=1,
            **tile,
        )
        return out


def _activate(inner: torch.Tensor) -> torch.Tensor:
    rows, width = inner.shape[0], inner.shape[1] // 2
    out = torch.empty(rows, width, dtype=inner.dtype, device=inner.device)
    _silu_pair[(rows, triton.cdiv(width, 1024))](inner, out, width, BLOCK=1024)
    return out


def _add_slots(y: torch.Tensor, top_k: int) -> torch.Tensor:
    tokens, width = y.shape[0] // top_k, y.shape[1]
    out = torch.empty(tokens, width, dtype=y.dtype, device=y.device)
    _sum_slots[(tokens, triton.cdiv(width, 1024))](y, out, width, SLOTS=top_k, BLOCK=1024)
    return out


def _milliseconds(call: Callable[[], torch.Tensor]) -> float:
    """The least of TRIES calls, between events, after one that compiles."""
    call()
    times = []
    for _ in range(TRIES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(400_000)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


CANDIDATE = Vllm
