"""Gradients through the collectives: what four ranks find is what one rank with all tokens finds."""

import numpy as np
import pytest
import torch
import torch_dense as dense
from torch_modes import MODES, TRANSPORTS, backward_on_rank, holder, holders, random_tokens

from torch_moe import MoE, MoEConfig, RouterConfig
from torch_moe.params import local_part

CONFIG = MoEConfig(
    num_experts=8,
    top_k=3,
    hidden_size=16,
    intermediate_size=8,
    expert_bias=True,
    num_shared_experts=1,
    shared_gate=True,
    latent_size=12,
    dtype="float32",
    router=RouterConfig(scoring="sigmoid", renormalize=True, score_correction_bias=True),
)
PLAIN = MoEConfig(num_experts=8, top_k=3, hidden_size=16, intermediate_size=8, dtype="float32", num_shared_experts=1)
ON_INPUT = MoEConfig(
    num_experts=8,
    top_k=3,
    hidden_size=16,
    intermediate_size=8,
    expert_bias=True,
    dtype="float32",
    router=RouterConfig(source="ids", weight_on_input=True),
)


def on_one_rank(config, arrays, counts, given, seeds):
    """Gradients of x of each holder and of the whole parameters."""
    moe = MoE(config)
    moe.load_params(dense.random_params(config))

    def real(values):
        return [torch.from_numpy(value[:count]) for value, count in zip(values, counts, strict=True)]

    x = torch.cat(real(arrays)).requires_grad_()
    given = {name: torch.cat(real(values)) for name, values in given.items()}
    for value in given.values():
        if value.is_floating_point():
            value.requires_grad_()
    (moe(x, **given) * torch.cat(real(seeds))).sum().backward()
    by_holder = {"x": x.grad.split(counts)}
    by_holder |= {name: value.grad.split(counts) for name, value in given.items() if value.requires_grad}
    return by_holder, {name: parameter.grad for name, parameter in moe.named_parameters()}


def compare(found, expected, what):
    scale = max(np.abs(expected).max(initial=0.0), 1e-3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * scale, err_msg=what)


ALL = MODES | TRANSPORTS
COPYING = (
    "dp4.ep/ragged",
    "dp2.tp2.ep/padded",
    "dp2.tp2.ep.native/ragged",
    "dp4.ep.nodes2/ragged",
    "dp4.ep.nodes2/padded",
)


@pytest.mark.parametrize("config", [PLAIN, CONFIG, ON_INPUT], ids=["plain", "everything", "weight on input"])
@pytest.mark.parametrize("mode", [*MODES, *COPYING])
def test_gradients_of_four_ranks_are_those_of_one(pool, mode, config):
    parallel = ALL[mode]
    counts, sizes = [5, 0, 7, 2][: holders(parallel)], [6, 0, 7, 4][: holders(parallel)]
    arrays, rng = random_tokens(config, sizes), np.random.default_rng(4)
    for x, count in zip(arrays, counts, strict=True):
        x[count:] = np.nan
    seeds = [rng.standard_normal((size, 16)).astype(np.float32) for size in sizes]
    given = {}
    if config.router.source == "ids":
        given = {
            "topk_ids": [rng.permuted(np.tile(np.arange(8), (size, 1)), axis=1)[:, :3].copy() for size in sizes],
            "topk_weights": [rng.standard_normal((size, 3)).astype(np.float32) for size in sizes],
        }
    found = pool.run(backward_on_rank, config, parallel, arrays, counts, given, seeds)
    by_holder, whole = on_one_rank(config, arrays, counts, given, seeds)

    for rank, gradients in enumerate(found):
        own = holder(rank, parallel)
        for name, wanted in by_holder.items():
            compare(gradients[name][: counts[own]], wanted[own].numpy(), f"{name} on rank {rank}")
            assert not gradients[name][counts[own] :].any(), f"{name} of padding on rank {rank}"
    for name, wanted in whole.items():
        for rank in range(4):
            dp, tp = divmod(rank, parallel.tp)
            part = local_part(name, wanted, config, parallel, dp_index=dp, tp_index=tp).numpy()
            if name.startswith("experts.") and parallel.expert_parallel:
                compare(found[rank][name], part, f"{name} on rank {rank}")
            elif dp == 0:
                total = sum(found[other * parallel.tp + tp][name] for other in range(parallel.dp))
                compare(total, part, f"{name} summed over dp, tp rank {tp}")


def test_replicated_parameters_have_equal_gradients_on_all_tp_ranks(pool):
    for mode in ("dp2.tp2", "dp2.tp2.ep", "dp2.tp2.ep.nosp", "dp2.tp2.ep.native"):
        parallel = MODES[mode]
        sizes = [5, 3, 2, 4][: holders(parallel)]
        arrays = random_tokens(CONFIG, sizes)
        seeds = [np.ones_like(x) for x in arrays]
        found = pool.run(backward_on_rank, CONFIG, parallel, arrays, None, {}, seeds)
        for name in ("router.gate", "latent.down", "latent.up", "shared.gate"):
            for dp in range(2):
                np.testing.assert_array_equal(found[2 * dp][name], found[2 * dp + 1][name], err_msg=f"{mode} {name}")
