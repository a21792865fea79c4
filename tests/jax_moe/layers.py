"""Small layers, parallel modes, and compiled functions that tests share."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

import jax_moe as jm

MODES = {
    "one rank": jm.ParallelConfig(),
    "one rank, ep": jm.ParallelConfig(expert_parallel=True, transport="allgather"),
    "tp2": jm.ParallelConfig(tp=2),
    "dp2": jm.ParallelConfig(dp=2),
    "dp2.tp2": jm.ParallelConfig(dp=2, tp=2),
    "dp2.ep": jm.ParallelConfig(dp=2, expert_parallel=True),
    "tp2.ep": jm.ParallelConfig(tp=2, expert_parallel=True),
    "tp2.ep.sp": jm.ParallelConfig(tp=2, expert_parallel=True, sequence_parallel=True),
    "tp4.ep.native": jm.ParallelConfig(tp=4, expert_parallel=True, sequence_parallel=True, token_layout="dp_tp"),
    "dp2.tp2.ep": jm.ParallelConfig(dp=2, tp=2, expert_parallel=True),
    "dp2.tp2.ep.nosp": jm.ParallelConfig(dp=2, tp=2, expert_parallel=True, sequence_parallel=False),
    "dp2.tp2.ep.native": jm.ParallelConfig(dp=2, tp=2, expert_parallel=True, token_layout="dp_tp"),
    "dp2.tp4.ep": jm.ParallelConfig(dp=2, tp=4, expert_parallel=True),
}

# Widths that all differ, so that no mix-up can run.
PLAIN = jm.MoEConfig(num_experts=8, top_k=3, hidden_size=16, intermediate_size=8, dtype="float32")
RICH = jm.MoEConfig(
    num_experts=8,
    top_k=3,
    hidden_size=16,
    intermediate_size=8,
    expert_bias=True,
    shared_intermediate_size=12,
    shared_gate=True,
    latent_size=10,
    dtype="float32",
    router=jm.RouterConfig(
        scoring="sigmoid",
        renormalize=True,
        num_groups=4,
        groups_kept=2,
        score_correction_bias=True,
        scaling_factor=2.5,
    ),
)
SHARED = jm.MoEConfig(
    num_experts=8,
    top_k=3,
    hidden_size=16,
    intermediate_size=8,
    expert_bias=True,
    num_shared_experts=2,
    dtype="float32",
)


@functools.cache
def arrays(config: jm.MoEConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters by name, biases too drawn from a normal; float64 values that float32 or bfloat16 hold exactly."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, (shape, dtype) in jm.params.shapes(config).items():
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
        drawn[name] = (rng.standard_normal(shape) * scale).astype(dtype)
    return drawn


def tokens(rows: int, width: int, dtype: str = "float32", seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(jax.numpy.dtype(dtype))


@functools.cache
def sharded(config: jm.MoEConfig, parallel: jm.ParallelConfig) -> tuple[jm.MoEParams, jax.sharding.Mesh]:
    mesh = jm.make_mesh(parallel)
    return jm.shard(jm.from_mapping(arrays(config)), config, parallel, mesh), mesh


@functools.cache
def compiled(config: jm.MoEConfig, parallel: jm.ParallelConfig, trace: bool = False) -> Any:
    """The layer under jit; as many programs as there are shapes."""
    params, mesh = sharded(config, parallel)

    @jax.jit
    def step(params: jm.MoEParams, x: jax.Array, given: dict) -> Any:
        return jm.moe(params, x, config=config, parallel=parallel, mesh=mesh, trace=trace, **given)

    return lambda x, given: step(params, x, given)


def run(config: jm.MoEConfig, parallel: jm.ParallelConfig, x: np.ndarray, *, trace: bool = False, **given: Any) -> Any:
    """y as NumPy float64, or (y, Trace) with NumPy fields."""
    result = compiled(config, parallel, trace)(x, given)
    if not trace:
        return np.asarray(result, np.float64)
    return np.asarray(result[0], np.float64), jax.tree.map(np.asarray, result[1])


def num_shards(parallel: jm.ParallelConfig) -> int:
    return parallel.world if parallel.native else parallel.dp


def real_rows(counts: list[int], rows: int) -> np.ndarray:
    """Which of the rows of all shards are tokens."""
    return np.concatenate([np.arange(rows) < count for count in counts])
