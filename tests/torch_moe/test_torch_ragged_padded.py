"""The layer over ragged and padded, on one node and two: every mode, uneven ranks, padding, and what drops cost."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch_dense as dense
from test_torch_gradients import on_one_rank
from test_torch_parallel import OPTIONS, SMALL, check, run
from torch_delivery import deliver
from torch_modes import TRANSPORTS, build, forward_on_rank, holders, random_tokens
from torch_ranks import RankPool

from torch_moe import MoE, MoEConfig, ParallelConfig, RouterConfig, make_mesh
from torch_moe.mesh import find_ranks

GIVEN = dataclasses.replace(SMALL, num_shared_experts=1, router=RouterConfig(source="ids"))


def everything(config, parallel, pool):
    """Uneven ranks with NaN in their padding; outputs, traces and the dense formula."""
    counts, sizes = [3, 6, 0, 5][: holders(parallel)], [6, 6, 4, 9][: holders(parallel)]
    return run(pool, config, parallel, sizes, counts=counts, padding=float("nan"))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("mode", TRANSPORTS)
def test_every_mode_computes_the_dense_formula_and_decides_as_allgather_does(pool, mode, option):
    parallel = TRANSPORTS[mode]
    config = dataclasses.replace(SMALL, **OPTIONS[option])
    found, traces, expected = everything(config, parallel, pool)
    check(found, expected, parallel, 3e-5)
    usual = dataclasses.replace(parallel, transport="allgather", nodes=1)
    _, others, _ = everything(config, usual, pool)
    for trace, other in zip(traces, others, strict=True):
        assert trace["dropped"] == 0
        for name in ("token_index", "topk_ids", "topk_weights", "expert_load", "group_sizes"):
            np.testing.assert_array_equal(trace[name], other[name], err_msg=name)
        used = trace["group_sizes"].sum()
        assert (trace["row_token"][used:] == -1).all()
        for name in ("row_token", "row_slot"):
            rows, wanted = trace[name][:used], other[name][:used]
            if parallel.nodes > 1:  # Two hops bring them in another order.
                expert = np.repeat(np.arange(len(trace["group_sizes"])), trace["group_sizes"])
                order = np.lexsort((trace["row_slot"][:used], trace["row_token"][:used], expert))
                rows = rows[order]
            np.testing.assert_array_equal(rows, wanted, err_msg=name)


@pytest.mark.parametrize("mode", TRANSPORTS)
def test_few_tokens_or_none(pool, mode):
    parallel = TRANSPORTS[mode]
    for sizes in ([0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]):
        found, _, expected = run(pool, SMALL, parallel, sizes[-holders(parallel) :])
        check(found, expected, parallel)


def test_ranks_may_have_arrays_of_very_different_sizes(pool):
    for mode in ("dp4.ep/ragged", "dp4.ep/padded", "dp4.ep.nodes2/padded"):
        found, _, expected = run(pool, SMALL, TRANSPORTS[mode], [130, 40, 0, 1])
        check(found, expected, TRANSPORTS[mode])


def test_experts_of_kept_groups_on_one_node_cross_once(pool):
    """Node-limited routing: as many groups as nodes, so that a token's experts lie on the nodes it keeps."""
    config = dataclasses.replace(SMALL, router=RouterConfig(num_groups=2, groups_kept=1))
    for mode in ("dp4.ep.nodes2/ragged", "dp4.ep.nodes2/padded"):
        found, traces, expected = run(pool, config, TRANSPORTS[mode], [5, 2, 0, 6])
        check(found, expected, TRANSPORTS[mode])
        for rank, trace in enumerate(traces):
            nodes = trace["topk_ids"] // 4
            assert (nodes == nodes[:, :1]).all(), f"rank {rank}"


DROPS = {
    "dp4.ep/ragged": {"max_rows": 7},
    "dp4.ep/padded": {"capacity_factor": 0.5},
    "dp4.ep.nodes2/ragged": {"max_rows": 6},
    "dp4.ep.nodes2/padded": {"capacity_factor": 0.4},
    "dp2.tp2.ep.native/padded": {"capacity_factor": 0.25},
    "dp2.tp2.ep.native/ragged": {"max_rows": 1},
}


def given_ids(counts, sizes, seed=8):
    rng = np.random.default_rng(seed)
    given = {
        "topk_ids": [rng.permuted(np.tile(np.arange(8), (size, 1)), axis=1)[:, :3].copy() for size in sizes],
        "topk_weights": [rng.standard_normal((size, 3)).astype(np.float32) for size in sizes],
    }
    real = [ids[:count].tolist() for ids, count in zip(given["topk_ids"], counts, strict=True)]
    return given, real


def kept_slots(real, sizes, parallel, options):
    """(size, K) of each holder: whether a slot reaches its expert; and what each rank drops."""
    levels = (parallel.nodes, 4 // parallel.nodes) if parallel.nodes > 1 else (4,)
    rows = {"array_rows": max(sizes)} if parallel.transport == "padded" else {}
    held, dropped, _ = deliver(real, 8, levels, **rows, **options)
    kept = [np.zeros((size, 3), bool) for size in sizes]
    for copy in (copy for copies in held for copy in copies if copy is not None):
        kept[copy[0]][copy[1], copy[2]] = True
    return kept, dropped


@pytest.mark.parametrize("mode", DROPS)
def test_a_dropped_copy_adds_nothing_and_is_counted(pool, mode):
    parallel = dataclasses.replace(TRANSPORTS[mode], **DROPS[mode])
    counts, sizes = [4, 7, 0, 6], [5, 7, 2, 9]
    arrays = random_tokens(GIVEN, sizes)
    given, real = given_ids(counts, sizes)
    kept, dropped = kept_slots(real, sizes, parallel, DROPS[mode])
    assert sum(dropped) > 0
    results = pool.run(forward_on_rank, GIVEN, parallel, arrays, counts, given)
    params = dense.to_numpy(dense.random_params(GIVEN))
    for rank, (y, trace) in enumerate(results):
        weights = np.where(kept[rank], given["topk_weights"][rank], 0)[: counts[rank]]
        wanted = dense.moe(
            params,
            arrays[rank][: counts[rank]],
            GIVEN,
            topk_ids=given["topk_ids"][rank][: counts[rank]],
            topk_weights=weights,
        )
        np.testing.assert_allclose(y[: counts[rank]], wanted, rtol=1e-4, atol=1e-5)
        assert not y[counts[rank] :].any()
        assert trace["dropped"] == dropped[rank]
        routed = given["topk_weights"][rank][: counts[rank]]
        np.testing.assert_array_equal(trace["topk_weights"][: counts[rank]], routed)
        assert trace["expert_load"].sum() == 3 * sum(counts)
    assert sum(trace["group_sizes"].sum() for _, trace in results) == sum(mask.sum() for mask in kept)


def gradients_on_rank(rank, parallel, arrays, given, seeds):
    moe = build(GIVEN, parallel)
    x = torch.from_numpy(arrays[rank]).requires_grad_()
    weights = torch.from_numpy(given["topk_weights"][rank]).requires_grad_()
    y = moe(x, topk_ids=torch.from_numpy(given["topk_ids"][rank]), topk_weights=weights)
    (y * torch.from_numpy(seeds[rank])).sum().backward()
    return x.grad.numpy(), weights.grad.numpy(), moe.experts.down.grad.numpy()


@pytest.mark.parametrize("mode", ["dp4.ep/ragged", "dp4.ep/padded", "dp4.ep.nodes2/padded"])
def test_no_gradient_flows_through_a_dropped_copy(pool, mode):
    parallel = dataclasses.replace(TRANSPORTS[mode], **DROPS[mode])
    sizes = [5, 7, 0, 6]
    arrays = random_tokens(GIVEN, sizes)
    given, real = given_ids(sizes, sizes)
    seeds = [np.random.default_rng(4).standard_normal(x.shape).astype(np.float32) for x in arrays]
    kept, _ = kept_slots(real, sizes, parallel, DROPS[mode])
    masked = {
        "topk_ids": given["topk_ids"],
        "topk_weights": [np.where(mask, w, 0) for mask, w in zip(kept, given["topk_weights"], strict=True)],
    }
    by_holder, whole = on_one_rank(GIVEN, arrays, sizes, masked, seeds)
    for rank, (x, weights, down) in enumerate(pool.run(gradients_on_rank, parallel, arrays, given, seeds)):
        np.testing.assert_allclose(x, by_holder["x"][rank], rtol=1e-4, atol=1e-5)
        wanted = np.where(kept[rank], by_holder["topk_weights"][rank], 0)
        np.testing.assert_allclose(weights, wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(down, whole["experts.down"][2 * rank : 2 * rank + 2], rtol=1e-4, atol=1e-5)


ALONE = (
    ParallelConfig(expert_parallel=True, transport="padded", capacity_factor=0.5),
    ParallelConfig(expert_parallel=True, transport="ragged", max_rows=2),
)


def test_one_rank_alone_drops_by_the_same_rule():
    config = MoEConfig(num_experts=4, top_k=1, hidden_size=8, intermediate_size=8, dtype="float32")
    x = torch.randn(6, 8)
    layers = {}
    for parallel in (ParallelConfig(), *ALONE):
        moe = MoE(config, parallel)
        moe.load_params(dense.random_params(config))
        layers[parallel.transport] = moe(x, trace=True)
    whole, _ = layers["local"]
    for transport, kept in (("padded", 3), ("ragged", 2)):
        y, trace = layers[transport]
        torch.testing.assert_close(y[:kept], whole[:kept])
        assert not y[kept:].any()
        assert int(trace.dropped) == 6 - kept


def find_groups(rank):
    found = []
    for dp, tp in ((4, 1), (2, 2)):
        parallel = ParallelConfig(dp=dp, tp=tp, expert_parallel=True, transport="ragged", nodes=2)
        mesh = make_mesh(parallel)
        ranks = find_ranks(parallel, mesh)
        assert mesh.mesh_dim_names == ("node", "local", "tp")
        assert tuple(mesh.shape) == (2, dp // 2, tp)
        assert (ranks.dp_index, ranks.tp_index) == divmod(rank, tp)
        assert [(axis.ranks, axis.index) for axis in ranks.levels] == [(2, rank // 2), (2, rank % 2)]
        again = find_ranks(parallel, mesh)
        assert [axis.group for axis in again.levels] == [axis.group for axis in ranks.levels]
        members = [dist.get_process_group_ranks(axis.group) for axis in ranks.levels]
        found.append((members, dist.get_process_group_ranks(ranks.dp)))
    with pytest.raises(ValueError, match=r"allowed is \(2, 1, 2\) with axes \('node', 'local', 'tp'\)"):
        find_ranks(parallel, make_mesh(ParallelConfig(dp=2, tp=2)))
    return found


def test_nodes_split_the_mesh_and_keep_the_order_of_ranks(pool):
    for rank, found in enumerate(pool.run(find_groups)):
        node, place = divmod(rank, 2)
        levels = [[place, place + 2], [2 * node, 2 * node + 1]]
        assert found[0] == (levels, [0, 1, 2, 3])
        assert found[1] == (levels, [place, place + 2])


def test_the_layer_on_eight_ranks_of_two_and_four_nodes():
    pool = RankPool(8)
    config = dataclasses.replace(SMALL, num_experts=16, **OPTIONS["shared"])
    try:
        for nodes, tp, transport in ((2, 1, "ragged"), (2, 2, "padded"), (4, 1, "padded")):
            parallel = ParallelConfig(dp=8 // tp, tp=tp, expert_parallel=True, transport=transport, nodes=nodes)
            found, _, expected = run(pool, config, parallel, [3, 0, 4, 1, 2, 5, 0, 1][: holders(parallel)])
            check(found, expected, parallel)
    finally:
        pool.stop()
