"""The layer on CUDA: grouped_mm and where it does not fit, true float32, and ranks over NCCL.

With one GPU, an NCCL that takes several ranks on it (2.30 and newer, NCCL_MULTI_RANK_GPU_ENABLE=1) runs every mode.
"""

import dataclasses
import os

import numpy as np
import pytest
import torch
import torch_dense as dense
from torch_modes import MODES, TRANSPORTS, backward_on_rank, forward_on_rank, holder, holders, random_tokens
from torch_ranks import RankPool

from torch_moe import MoE, MoEConfig, ParallelConfig, RouterConfig
from torch_moe.matmul import grouped_linear, grouped_mm_fits, linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

CONFIG = MoEConfig(
    num_experts=8,
    top_k=3,
    hidden_size=64,
    intermediate_size=96,
    expert_bias=True,
    num_shared_experts=1,
    shared_gate=True,
    latent_size=32,
    router=RouterConfig(scoring="sigmoid", renormalize=True, score_correction_bias=True),
)
ROUNDING = {"float32": 3e-5, "bfloat16": 3e-2}
SIZES = ([5, 0, 16, 3], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 24])


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("inner", [64, 60], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_products_and_gradients_are_the_cpus(dtype, sizes, inner):
    rows, used = sum(sizes) + 4, sum(sizes)
    x, w, bias = torch.randn(rows, inner).to(dtype), torch.randn(4, 40, inner).to(dtype), torch.randn(4, 40).to(dtype)
    x[used:] = float("nan")
    seed = torch.randn(rows, 40)
    results = []
    for device in ("cpu", "cuda"):
        operands = [value.to(device).requires_grad_() for value in (x, w, bias)]
        assert grouped_mm_fits(*operands[:2]) == (device == "cuda" and dtype == torch.bfloat16 and inner == 64)
        group_sizes = torch.tensor(sizes, dtype=torch.int32, device=device)
        y = grouped_linear(operands[0], operands[1], group_sizes, bias_eN=operands[2])
        results.append([y, *torch.autograd.grad(y, operands, seed.to(device))])
    for name, expected, found in zip(("y", "x", "w", "bias"), *results, strict=True):
        found = found.cpu()
        assert found.dtype == expected.dtype
        assert found.isfinite().all(), name
        assert relative(found, expected) < (1e-5 if dtype == torch.float32 else 6e-3), name
        if name in ("y", "x"):
            assert not found[used:].any(), name
        if name == "w":
            assert not found[torch.tensor(sizes) == 0].any(), "an expert without rows has a gradient"


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_float32_is_never_tf32(tensor_cores):
    x, w = torch.randn(256, 2048, device="cuda", requires_grad=True), torch.randn(128, 2048, device="cuda")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert relative(x @ w.T, x.double() @ w.double().T) > 1e-5, "this GPU has no TF32 to turn off"
        y = linear(x, w, tensor_cores=tensor_cores)
        grouped = grouped_linear(x, w[None], torch.tensor([256], dtype=torch.int32, device="cuda"))
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    exact = x.double() @ w.double().T
    assert relative(y, exact) < 2e-6
    assert relative(grouped, exact) < 2e-6
    assert relative(gradient, torch.ones_like(exact) @ w.double()) < 2e-6


def test_bfloat16_products_keep_a_float32_sum():
    x, w = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((256, 2048), (128, 2048)))
    for tensor_cores in (False, True):
        assert relative(linear(x, w, tensor_cores=tensor_cores), x.double() @ w.double().T) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_gpu_computes_the_dense_formula_bitwise_repeatably_with_gradients(dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    params = dense.random_params(config)
    moe = MoE(config, device="cuda")
    moe.load_params(params)
    x = torch.randn(50, 64).to(getattr(torch, dtype))
    padded = torch.cat([x, torch.full((3, 64), float("nan"), dtype=x.dtype)]).cuda().requires_grad_()
    seed = torch.randn(53, 64, device="cuda", dtype=x.dtype)

    def once():
        y, trace = moe(padded, counts=[50], trace=True)
        return trace, [y, *torch.autograd.grad(y, [padded, *moe.parameters()], seed)]

    (trace, first), (_, second) = once(), once()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(value.isfinite().all() for value in first)
    expected = dense.moe(
        dense.to_numpy(params),
        x.double().numpy(),
        config,
        topk_ids=trace.topk_ids[:50].cpu().numpy(),
        topk_weights=trace.topk_weights[:50].detach().cpu().numpy(),
    )
    assert relative(first[0][:50].cpu(), torch.from_numpy(expected)) < ROUNDING[dtype] / 3
    assert not first[0][50:].any()


def test_ties_go_to_the_lowest_indices_on_cuda_too():
    config = MoEConfig(
        num_experts=64,
        top_k=6,
        hidden_size=8,
        intermediate_size=8,
        dtype="float32",
        router=RouterConfig(source="logits"),
    )
    moe = MoE(config, device="cuda")
    _, trace = moe(torch.zeros(300, 8, device="cuda"), router_logits=torch.zeros(300, 64, device="cuda"), trace=True)
    assert trace.topk_ids.unique(dim=0).tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("weight_on_input", [False, True])
def test_padded_never_makes_the_host_wait(weight_on_input):
    router = dataclasses.replace(CONFIG.router, weight_on_input=weight_on_input)
    config = dataclasses.replace(CONFIG, router=router)
    parallel = ParallelConfig(expert_parallel=True, transport="padded", capacity_factor=0.2)
    moe = MoE(config, parallel, device="cuda")
    moe.load_params(dense.random_params(config))
    x = torch.randn(50, 64, device="cuda", dtype=torch.bfloat16)
    expected, trace = moe(x, trace=True)
    assert int(trace.dropped) == 20  # ceil(0.2 * 50 * 3) slots
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = moe(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


def many_ranks() -> int:
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        return 4
    return 4 if torch.cuda.device_count() >= 4 else torch.cuda.device_count()


@pytest.fixture(scope="module")
def nccl():
    world = many_ranks()
    if world < 2:
        pytest.skip("needs two NVIDIA GPUs, or NCCL_MULTI_RANK_GPU_ENABLE=1 with NCCL 2.30 or newer")
    ranks = RankPool(world, "nccl")
    yield ranks
    ranks.stop()


TWO = {
    "dp2": ParallelConfig(dp=2),
    "tp2": ParallelConfig(tp=2),
    "dp2.ep": ParallelConfig(dp=2, expert_parallel=True),
    "tp2.ep.nosp": ParallelConfig(tp=2, expert_parallel=True),
    "tp2.ep.sp": ParallelConfig(tp=2, expert_parallel=True, sequence_parallel=True),
    "tp2.ep.native": ParallelConfig(tp=2, expert_parallel=True, sequence_parallel=True, token_layout="dp_tp"),
    "dp2.ep/ragged": ParallelConfig(dp=2, expert_parallel=True, transport="ragged"),
    "dp2.ep/padded": ParallelConfig(dp=2, expert_parallel=True, transport="padded"),
    "dp2.ep.nodes2/ragged": ParallelConfig(dp=2, expert_parallel=True, transport="ragged", nodes=2),
    "dp2.ep.nodes2/padded": ParallelConfig(dp=2, expert_parallel=True, transport="padded", nodes=2),
}


def modes_here():
    return MODES | TRANSPORTS if many_ranks() == 4 else TWO


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", modes_here())
def test_every_mode_over_nccl_computes_the_dense_formula(nccl, mode, dtype):
    parallel, config = modes_here()[mode], dataclasses.replace(CONFIG, dtype=dtype)
    counts, sizes = [5, 0, 17, 3][: holders(parallel)], [6, 0, 17, 7][: holders(parallel)]
    arrays = random_tokens(config, sizes)
    for x, count in zip(arrays, counts, strict=True):
        x[count:] = np.nan
    results = nccl.run(forward_on_rank, config, parallel, arrays, counts, {})
    params = dense.to_numpy(dense.random_params(config))
    for rank, (y, trace) in enumerate(results):
        own = holder(rank, parallel)
        expected = dense.moe(params, arrays[own][: counts[own]], config)
        assert y.shape == arrays[own].shape
        assert not y[counts[own] :].any()
        error = np.abs(y[: counts[own]] - expected).max(initial=0.0)
        assert error <= ROUNDING[dtype] * np.abs(expected).max(initial=1e-9), f"rank {rank}: {error}"
        assert trace["expert_load"].sum() == 3 * sum(counts)


@pytest.mark.parametrize("mode", modes_here())
def test_gradients_over_nccl_are_finite_and_repeat_bitwise(nccl, mode):
    parallel = modes_here()[mode]
    sizes = [5, 0, 17, 3][: holders(parallel)]
    arrays = random_tokens(CONFIG, sizes)
    seeds = [np.ones_like(x) for x in arrays]
    first, second = (nccl.run(backward_on_rank, CONFIG, parallel, arrays, None, {}, seeds) for _ in range(2))
    for rank, (ours, again) in enumerate(zip(first, second, strict=True)):
        for name, value in ours.items():
            assert np.isfinite(value).all(), f"{name} on rank {rank}"
            np.testing.assert_array_equal(value, again[name], err_msg=f"{name} on rank {rank}")
