"""The layer on four ranks against the dense formula: every parallel mode, uneven and empty ranks, padding, gradients."""

import dataclasses

import numpy as np
import pytest
import torch
import torch_dense as dense

from torch_moe import MoE, MoEConfig, ParallelConfig, make_mesh

MODES = {
    "dp4": ParallelConfig(dp=4),
    "dp2.tp2": ParallelConfig(dp=2, tp=2),
    "tp4": ParallelConfig(tp=4),
    "dp4.ep": ParallelConfig(dp=4, expert_parallel=True),
    "dp2.tp2.ep": ParallelConfig(dp=2, tp=2, expert_parallel=True),
    "dp2.tp2.ep.nosp": ParallelConfig(dp=2, tp=2, expert_parallel=True, sequence_parallel=False),
    "dp2.tp2.ep.native": ParallelConfig(dp=2, tp=2, expert_parallel=True, token_layout="dp_tp"),
    "tp4.ep.nosp": ParallelConfig(tp=4, expert_parallel=True),
    "tp4.ep.sp": ParallelConfig(tp=4, expert_parallel=True, sequence_parallel=True),
    "tp4.ep.native": ParallelConfig(tp=4, expert_parallel=True, sequence_parallel=True, token_layout="dp_tp"),
}

SMALL = MoEConfig(num_experts=8, top_k=3, hidden_size=16, intermediate_size=24, dtype="float32")


def holders(parallel: ParallelConfig) -> int:
    """How many ranks hold tokens of their own."""
    return parallel.world if parallel.token_layout == "dp_tp" else parallel.dp


def holder(rank: int, parallel: ParallelConfig) -> int:
    return rank if parallel.token_layout == "dp_tp" else rank // parallel.tp


def forward_on_rank(rank, config, parallel, arrays, counts, extras):
    """Runs one forward; `arrays` holds x of each token holder."""
    moe = MoE(config, parallel, make_mesh(parallel))
    moe.load_params(dense.random_params(config))
    own = holder(rank, parallel)
    given = {name: torch.from_numpy(values[own]) for name, values in extras.items()}
    x = torch.from_numpy(arrays[own]).to(getattr(torch, config.dtype))
    with torch.no_grad():
        y = moe(x, counts=counts, **given)
        again = moe(x, counts=counts, **given)
        traced, trace = moe(x, counts=counts, trace=True, **given)
    assert torch.equal(y, again), "a repeated run differs"
    assert torch.equal(y, traced), "the trace changes the result"
    found = {
        field.name: None if getattr(trace, field.name) is None else getattr(trace, field.name).numpy()
        for field in dataclasses.fields(trace)
    }
    return y.float().numpy(), found


def run(pool, config, parallel, sizes, *, counts=None, padding=0.0, seed=1):
    """Outputs and traces of all ranks, and the dense formula's answer for each token holder."""
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((size, config.hidden_size)).astype(np.float32) for size in sizes]
    if config.dtype == "bfloat16":
        arrays = [torch.from_numpy(x).bfloat16().float().numpy() for x in arrays]
    real = list(sizes) if counts is None else list(counts)
    for x, count in zip(arrays, real, strict=True):
        x[count:] = padding
    results = pool.run(forward_on_rank, config, parallel, arrays, counts, {})
    params = dense.to_numpy(dense.random_params(config))
    expected = [
        np.concatenate([dense.moe(params, x[:count], config), np.zeros((len(x) - count, config.hidden_size))])
        for x, count in zip(arrays, real, strict=True)
    ]
    return [y for y, _ in results], [trace for _, trace in results], expected


def check(found, expected, parallel, tolerance):
    for rank, y in enumerate(found):
        want = expected[holder(rank, parallel)]
        assert y.shape == want.shape, f"rank {rank}: {y.shape} for {want.shape}"
        scale = np.sqrt((want**2).mean()) if want.size else 1.0
        error = np.abs(y - want)
        worst = np.unravel_index(error.argmax(), error.shape) if error.size else None
        assert worst is None or error[worst] <= tolerance * scale, (
            f"rank {rank}, token and column {worst}: {error[worst]}"
        )


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_computes_the_dense_formula(pool, mode):
    parallel = MODES[mode]
    found, _, expected = run(pool, SMALL, parallel, [7] * holders(parallel))
    check(found, expected, parallel, 1e-5)
