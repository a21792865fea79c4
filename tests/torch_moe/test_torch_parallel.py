"""The layer on four ranks against the dense formula: every mode and option, uneven and empty ranks, padding."""

import dataclasses

import numpy as np
import pytest
import torch
import torch_dense as dense
from torch_modes import MODES, build, forward_on_rank, holder, holders, random_tokens
from torch_ranks import RankError, RankPool

from torch_moe import MoE, MoEConfig, ParallelConfig, RouterConfig, make_mesh

SMALL = MoEConfig(num_experts=8, top_k=3, hidden_size=16, intermediate_size=24, dtype="float32")
OPTIONS = {
    "shared": {"num_shared_experts": 1},
    "biases": {"expert_bias": True, "activation": "swigluoai", "gate_up_layout": "interleaved"},
    "weight on input": {"router": RouterConfig(weight_on_input=True), "expert_bias": True},
    "everything": {
        "expert_bias": True,
        "num_shared_experts": 2,
        "shared_gate": True,
        "latent_size": 12,
        "router": RouterConfig(
            scoring="sigmoid", renormalize=True, num_groups=4, groups_kept=2, score_correction_bias=True
        ),
    },
}
SP_MODES = [mode for mode, parallel in MODES.items() if parallel.sp and parallel.token_layout == "dp"]


def run(pool, config, parallel, sizes, *, counts=None, padding=0.0):
    """Outputs and traces of all ranks, and the dense formula's answer for each holder."""
    arrays = random_tokens(config, sizes)
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


def check(found, expected, parallel, tolerance=1e-5):
    """All tokens of all ranks, not one rank's chunk of them."""
    for rank, y in enumerate(found):
        want = expected[holder(rank, parallel)]
        assert y.shape == want.shape, f"rank {rank}: {y.shape} for {want.shape}"
        if not want.size:
            continue
        error = np.abs(y - want)
        worst = np.unravel_index(error.argmax(), error.shape)
        scale = np.sqrt((want**2).mean())
        assert error[worst] <= tolerance * scale, f"rank {rank}, token and column {worst}: {error[worst]} for {scale}"


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_computes_the_dense_formula(pool, mode):
    parallel = MODES[mode]
    found, _, expected = run(pool, SMALL, parallel, [7] * holders(parallel))
    check(found, expected, parallel)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_every_option_holds_in_every_mode(pool, mode, option):
    parallel = MODES[mode]
    config = dataclasses.replace(SMALL, **OPTIONS[option])
    found, _, expected = run(pool, config, parallel, [5, 0, 6, 3][: holders(parallel)])
    check(found, expected, parallel, 3e-5)


@pytest.mark.parametrize("mode", ["dp4", "dp2.tp2", "dp2.tp2.ep", "dp2.tp2.ep.nosp", "dp2.tp2.ep.native"])
def test_in_bfloat16_every_mode_is_within_its_roundings(pool, mode):
    parallel = MODES[mode]
    config = dataclasses.replace(SMALL, dtype="bfloat16", **OPTIONS["shared"])
    found, _, expected = run(pool, config, parallel, [7] * holders(parallel))
    check(found, expected, parallel, 3e-2)


@pytest.mark.parametrize("mode", MODES)
def test_one_busy_rank_among_idle_ones(pool, mode):
    parallel = MODES[mode]
    sizes = [0] * holders(parallel)
    sizes[-1] = 5
    found, traces, expected = run(pool, SMALL, parallel, sizes)
    check(found, expected, parallel)
    assert all(trace["expert_load"].sum() == 15 for trace in traces)


@pytest.mark.parametrize("mode", MODES)
def test_no_tokens_anywhere(pool, mode):
    parallel = MODES[mode]
    found, traces, expected = run(pool, SMALL, parallel, [0] * holders(parallel))
    check(found, expected, parallel)
    assert not any(trace["expert_load"].any() for trace in traces)


@pytest.mark.parametrize("mode", ["dp4", "dp4.ep", "dp2.tp2.ep.native"])
def test_very_uneven_ranks(pool, mode):
    found, _, expected = run(pool, SMALL, MODES[mode], [500, 200, 256, 1])
    check(found, expected, MODES[mode])


@pytest.mark.parametrize("mode", SP_MODES)
@pytest.mark.parametrize("tokens", ["0", "1", "tp-1", "tp", "tp+1"])
def test_after_the_sequence_gather_exactly_the_tokens_that_came_in_are_left(pool, mode, tokens):
    parallel = MODES[mode]
    count = {"0": 0, "1": 1, "tp-1": parallel.tp - 1, "tp": parallel.tp, "tp+1": parallel.tp + 1}[tokens]
    config = dataclasses.replace(SMALL, num_shared_experts=1)
    found, traces, expected = run(pool, config, parallel, [count] * parallel.dp)
    check(found, expected, parallel)
    chunk = -(-count // parallel.tp)
    assert all(trace["token_index"].shape == (chunk,) for trace in traces)


@pytest.mark.parametrize("option", ["shared", "everything"])
@pytest.mark.parametrize("mode", MODES)
def test_nan_in_padding_changes_no_real_row_and_no_load(pool, mode, option):
    parallel = MODES[mode]
    config = dataclasses.replace(SMALL, **OPTIONS[option])
    counts, sizes = [3, 6, 0, 5][: holders(parallel)], [6, 6, 4, 9][: holders(parallel)]
    found, traces, expected = run(pool, config, parallel, sizes, counts=counts, padding=float("nan"))
    check(found, expected, parallel, 3e-5)
    assert all(trace["expert_load"].sum() == 3 * sum(counts) for trace in traces)


@pytest.mark.parametrize("mode", ["dp2.tp2", "dp2.tp2.ep", "dp2.tp2.ep.nosp", "dp2.tp2.ep.native"])
@pytest.mark.parametrize("source", ["logits", "ids"])
def test_given_routing_lies_as_the_tokens_do(pool, mode, source):
    parallel = MODES[mode]
    config = dataclasses.replace(SMALL, router=RouterConfig(source=source))
    sizes = [5, 3, 1, 4][: holders(parallel)]
    arrays, rng = random_tokens(config, sizes), np.random.default_rng(8)
    given = {"router_logits": [rng.standard_normal((size, 8)).astype(np.float32) for size in sizes]}
    if source == "ids":
        given = {
            "topk_ids": [rng.permuted(np.tile(np.arange(8), (size, 1)), axis=1)[:, :3].copy() for size in sizes],
            "topk_weights": [rng.standard_normal((size, 3)).astype(np.float32) for size in sizes],
        }
    results = pool.run(forward_on_rank, config, parallel, arrays, None, given)
    params = dense.to_numpy(dense.random_params(config))
    expected = [
        dense.moe(params, x, config, **{name: values[own] for name, values in given.items()})
        for own, x in enumerate(arrays)
    ]
    check([y for y, _ in results], expected, parallel)


@pytest.mark.parametrize("mode", MODES)
def test_the_ranks_rows_are_those_of_one_rank_with_all_tokens(pool, mode):
    parallel = MODES[mode]
    counts, sizes = [4, 6, 0, 5][: holders(parallel)], [5, 6, 4, 5][: holders(parallel)]
    _, traces, _ = run(pool, SMALL, parallel, sizes, counts=counts, padding=float("nan"))
    arrays = random_tokens(SMALL, sizes)
    together = torch.from_numpy(np.concatenate([x[:count] for x, count in zip(arrays, counts, strict=True)]))
    moe = MoE(SMALL)
    moe.load_params(dense.random_params(SMALL))
    _, alone = moe(together, trace=True)

    # Tokens: every number once (tp ranks that route the same tokens repeat them), with the same choice.
    routers = range(4) if parallel.sp else range(0, 4, parallel.tp)
    index = np.concatenate([traces[rank]["token_index"] for rank in routers])
    assert index[index >= 0].tolist() == list(range(sum(counts)))
    ids = np.concatenate([traces[rank]["topk_ids"] for rank in routers])
    np.testing.assert_array_equal(ids[index >= 0], alone.topk_ids)
    assert (ids[index < 0] == 8).all()
    weights = np.concatenate([traces[rank]["topk_weights"] for rank in routers])
    assert (weights[index < 0] == 0).all()

    # Rows: expert by expert the same tokens and slots in the same order.
    for trace in traces:
        np.testing.assert_array_equal(trace["expert_load"], alone.expert_load)
    ends = np.cumsum(alone.group_sizes.numpy())
    for rank, trace in enumerate(traces):
        first = rank * 8 // parallel.ep if parallel.expert_parallel else 0
        used = int(trace["group_sizes"].sum())
        assert (trace["row_token"][used:] == -1).all()
        if not parallel.expert_parallel:
            own = trace["token_index"][trace["token_index"] >= 0]
            wanted = np.isin(alone.row_token.numpy(), own)
            np.testing.assert_array_equal(trace["row_token"][:used], alone.row_token.numpy()[wanted])
            np.testing.assert_array_equal(trace["row_slot"][:used], alone.row_slot.numpy()[wanted])
            continue
        start = ends[first - 1] if first else 0
        np.testing.assert_array_equal(trace["row_token"][:used], alone.row_token[start : start + used])
        np.testing.assert_array_equal(trace["row_slot"][:used], alone.row_slot[start : start + used])
        held = alone.group_sizes[first : first + 8 // parallel.ep]
        np.testing.assert_array_equal(trace["group_sizes"], held)


def call_with_different_counts(rank, parallel):
    moe = build(SMALL, parallel)
    with pytest.raises(ValueError, match=r"counts differ between ranks .*\[3, 3\]"):
        moe(torch.zeros(4, 16), counts=[3, 3] if rank == 0 else [3, 4])


def call_with_different_rows_over_tp(rank, parallel):
    moe = build(SMALL, parallel)
    with pytest.raises(ValueError, match=r"rows of x differ between the tp=2 ranks .* on ranks \["):
        moe(torch.zeros(4 + rank % 2, 16))


@pytest.mark.parametrize("mode", ["dp2.tp2", "dp2.tp2.ep", "dp2.tp2.ep.nosp"])
def test_ranks_that_disagree_about_sizes_all_raise_and_show_them(pool, mode):
    pool.run(call_with_different_rows_over_tp, MODES[mode])
    if mode != "dp2.tp2":  # There a DP rank hears of its own tp ranks alone, unless a trace is asked for.
        pool.run(call_with_different_counts, MODES[mode])


def use_meshes_that_do_not_fit(rank):
    with pytest.raises(ValueError, match=r"device_mesh of shape \(4, 1\) with axes .*: allowed is \(2, 2\)"):
        MoE(SMALL, ParallelConfig(dp=2, tp=2), make_mesh(ParallelConfig(dp=4)))
    with pytest.raises(ValueError, match=r"dp=2, tp=1: allowed is dp \* tp ranks, not a process group of 4"):
        make_mesh(ParallelConfig(dp=2))
    named = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    with pytest.raises(
        ValueError, match=r"with axes \('data', 'model'\): allowed is \(2, 2\) with axes \('dp', 'tp'\)"
    ):
        MoE(SMALL, ParallelConfig(dp=2, tp=2), named)
    reversed_ranks = torch.distributed.DeviceMesh("cpu", [[3, 2], [1, 0]], mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match="allowed are ranks in ascending order"):
        MoE(SMALL, ParallelConfig(dp=2, tp=2), reversed_ranks)


def test_a_mesh_of_another_shape_or_order_is_an_error(pool):
    pool.run(use_meshes_that_do_not_fit)


def count_groups(rank, parallel):
    mesh = make_mesh(parallel)
    layers = [MoE(SMALL, parallel, mesh) for _ in range(3)]
    return len({layer.ranks.world for layer in layers})


def test_layers_on_one_mesh_share_their_groups(pool):
    assert pool.run(count_groups, MODES["dp2.tp2.ep"]) == [1, 1, 1, 1]


def raise_on_one_rank(rank):
    if rank == 1:
        raise KeyError("the second rank's own trouble")
    torch.distributed.barrier()


def tell_rank(rank):
    return rank


def test_a_rank_that_fails_shows_its_traceback_and_the_pool_recovers():
    pool = RankPool(2)
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed:.*raise_on_one_rank.*second rank's own trouble"):
        pool.run(raise_on_one_rank)
    assert pool.run(tell_rank) == [0, 1]
    pool.stop()
