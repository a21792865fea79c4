"""The cost model against the bytes that the collectives are given."""

import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist
from torch_delivery import deliver
from torch_modes import mesh_of

from torch_moe import MoEConfig, ParallelConfig, RouterConfig, collectives, estimate, transport
from torch_moe.mesh import find_ranks
from torch_moe.transport.base import Exchange, Placement

BASE = {"num_experts": 8, "hidden_size": 6, "intermediate_size": 4}
EVEN = MoEConfig(**BASE, top_k=3, dtype="float32")
GROUPED = MoEConfig(**BASE, top_k=2, router=RouterConfig(num_groups=4, groups_kept=2))
LATENT = MoEConfig(**BASE, top_k=1, latent_size=3)
DP4 = ParallelConfig(dp=4, expert_parallel=True)
PARALLEL = {
    "allgather": DP4,
    "allgather, SP off": ParallelConfig(dp=2, tp=2, expert_parallel=True, sequence_parallel=False),
    "ragged": dataclasses.replace(DP4, transport="ragged"),
    "padded": dataclasses.replace(DP4, transport="padded"),
    "padded, capacity 0.7": dataclasses.replace(DP4, transport="padded", capacity_factor=0.7),
    "ragged, 2 nodes": dataclasses.replace(DP4, transport="ragged", nodes=2),
    "padded, 2 nodes": dataclasses.replace(DP4, transport="padded", nodes=2),
    "padded, 2 nodes, capacity 0.4": dataclasses.replace(DP4, transport="padded", nodes=2, capacity_factor=0.4),
    "ragged, SP, 2 nodes": ParallelConfig(dp=2, tp=2, expert_parallel=True, transport="ragged", nodes=2),
}


def every_choice(config):
    """Each choice of experts once (each as often as another, with groups): what uniform routing means, exactly."""
    size = config.num_experts // config.router.num_groups
    return [
        list(ids)
        for kept in itertools.combinations(range(config.router.num_groups), config.router.groups_kept)
        for ids in itertools.combinations([e for e in range(config.num_experts) if e // size in kept], config.top_k)
    ]


class Counter:
    """Counts what a rank gives to collectives, instead of what the model thinks."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.sent = self.messages = self.buffers = 0

    def watch(self, monkeypatch):
        exchange, gather = dist.all_to_all_single, collectives._all_gather_single

        def all_to_all_single(output, tensor, receive=None, send=None, group=None):
            ranks, own = dist.get_world_size(group), dist.get_rank(group)
            parts = send or [len(tensor) // ranks] * ranks
            row = tensor[:1].nbytes if len(tensor) else 0
            self.sent += row * (sum(parts) - parts[own])
            self.messages += ranks - 1
            if tensor.dtype != torch.int64:  # Sizes are no rows.
                self.buffers += tensor.nbytes + output.nbytes
            return exchange(output, tensor, receive, send, group=group)

        def all_gather_single(output, tensor, group=None):
            self.sent += tensor.nbytes * (dist.get_world_size(group) - 1)
            self.messages += dist.get_world_size(group) - 1
            self.buffers += tensor.nbytes + output.nbytes
            return gather(output, tensor, group=group)

        monkeypatch.setattr(dist, "all_to_all_single", all_to_all_single)
        monkeypatch.setattr(collectives, "_all_gather_single", all_gather_single)


def count_on_rank(rank, config, parallel, tokens):
    ranks = find_ranks(parallel, mesh_of(parallel))
    local = config.num_experts // 4
    mover = getattr(transport, parallel.transport)
    ids = torch.tensor((every_choice(config) * tokens)[:tokens], dtype=torch.int32).reshape(tokens, config.top_k)
    x = torch.zeros(tokens, config.expert_width, dtype=getattr(torch, config.dtype))
    group, sharers = (ranks.world, 4) if parallel.sp or parallel.tp == 1 else (ranks.dp, parallel.dp)
    counter = Counter()
    with pytest.MonkeyPatch.context() as monkeypatch:
        counter.watch(monkeypatch)
        rows, handle = mover.dispatch(
            {"values": x},
            ids,
            torch.zeros(ids.shape),
            placement=Placement(num_experts=config.num_experts, first_expert=rank * local, local_experts=local),
            exchange=Exchange(
                group=group,
                sizes=(tokens,) * sharers,
                rows=tokens,
                levels=ranks.levels,
                capacity_factor=parallel.capacity_factor,
                max_rows=parallel.max_rows,
            ),
        )
        there = counter.sent, counter.messages, counter.buffers
        counter.reset()
        mover.combine(rows["values"].float(), handle)
    return {
        "dispatch_bytes": there[0],
        "combine_bytes": counter.sent,
        "dispatch_messages": there[1],
        "combine_messages": counter.messages,
        "buffer_bytes": there[2] + counter.buffers,
        "received_copies": len(handle.plan.position),
    }


@pytest.mark.parametrize("name", PARALLEL)
@pytest.mark.parametrize("config", [EVEN, GROUPED, LATENT], ids=["even", "grouped", "latent"])
def test_the_estimate_is_what_the_collectives_are_given(pool, config, name):
    parallel = PARALLEL[name]
    tokens = len(every_choice(config))
    expected = estimate(config, parallel, tokens)
    found = pool.run(count_on_rank, config, parallel, tokens)
    for key in found[0]:
        average = sum(counted[key] for counted in found) / 4
        assert average == pytest.approx(getattr(expected, key), rel=1e-12), key
    assert max(counted["received_copies"] for counted in found) <= expected.received_copies_bound


def test_nobody_has_a_token(pool):
    for parallel in PARALLEL.values():
        expected = estimate(EVEN, parallel, 0)
        for counted in pool.run(count_on_rank, EVEN, parallel, 0):
            assert counted == {key: getattr(expected, key) for key in counted}


def test_a_cap_costs_a_second_exchange_of_sizes_and_bounds_what_is_sent(pool):
    parallel = dataclasses.replace(DP4, transport="ragged", max_rows=50)
    expected = estimate(EVEN, parallel, 56)
    found = pool.run(count_on_rank, EVEN, parallel, 56)
    assert {counted["received_copies"] for counted in found} == {expected.received_copies} == {50}
    assert {counted["dispatch_messages"] for counted in found} == {expected.dispatch_messages}
    assert {counted["buffer_bytes"] for counted in found} != {0}
    assert expected.received_copies_bound == 50


def test_the_copies_sent_are_the_fewest_that_reach_every_expert():
    ids = [every_choice(EVEN)] * 4
    for nodes, levels in ((1, (4,)), (2, (2, 2))):
        parallel = dataclasses.replace(DP4, transport="ragged", nodes=nodes)
        _, _, sent = deliver(ids, 8, levels)
        assert sum(sent) / 4 * 6 * 4 == pytest.approx(estimate(EVEN, parallel, 56).combine_bytes)


def test_one_rank_sends_nothing_and_holds_its_tokens():
    for name in ("local", "allgather", "ragged", "padded"):
        parallel = ParallelConfig(expert_parallel=True, transport=name)
        found = estimate(EVEN, parallel, 10)
        assert (found.dispatch_bytes, found.combine_bytes, found.dispatch_messages, found.buffer_bytes) == (0, 0, 0, 0)
        assert found.received_copies == 10


def test_a_thousand_ranks():
    """DeepSeek-V3's sizes on 1,024 ranks in 128 nodes: nodes and groups bound what crosses."""
    config = MoEConfig(
        num_experts=1024,
        top_k=8,
        hidden_size=7168,
        intermediate_size=2048,
        router=RouterConfig(num_groups=128, groups_kept=4),
    )
    parallel = ParallelConfig(dp=1024, expert_parallel=True, transport="allgather")
    row, back, tokens = 7168 * 2 + 8 * 8, 7168 * 4, 128
    allgather = estimate(config, parallel, tokens)
    assert allgather.dispatch_bytes == 1023 * tokens * row
    ragged = estimate(config, dataclasses.replace(parallel, transport="ragged"), tokens)
    # One expert a rank: 8 copies of a token, of which the rank keeps a thousandth.
    assert ragged.dispatch_bytes == pytest.approx(1023 * (tokens * 8 / 1024 * row + 8))
    two_hops = estimate(config, dataclasses.replace(parallel, transport="ragged", nodes=128), tokens)
    assert two_hops.across_nodes_bytes < tokens * 4 * (row + back) + 127 * 8
    assert two_hops.across_nodes_bytes < (ragged.dispatch_bytes + ragged.combine_bytes) / 2
    assert two_hops.dispatch_messages == 4 * (127 + 7)
    assert ragged.dispatch_messages == 4 * 1023
    assert two_hops.received_copies == pytest.approx(ragged.received_copies)


def test_a_number_of_tokens_must_not_be_negative():
    with pytest.raises(ValueError, match="tokens_per_rank=-1: allowed"):
        estimate(EVEN, DP4, -1)
