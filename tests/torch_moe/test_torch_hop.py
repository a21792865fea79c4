"""ragged and padded on 2, 3, 4 and 8 ranks, and over two hops: every copy, its place, and what is lost, exactly."""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch_delivery import deliver, rows_of
from torch_ranks import RankPool

from torch_moe import transport
from torch_moe.mesh import Axis
from torch_moe.transport import bounds, hop
from torch_moe.transport.base import Exchange, Placement

WIDTH = 3
_groups: dict = {}


def group_of(ranks):
    """One group a set of ranks for the life of the process; all ranks of the pool make it together."""
    if ranks not in _groups:
        _groups[ranks] = dist.new_group(list(ranks))
    return _groups[ranks]


def level_axes(rank, levels):
    """This rank's axes, and None on ranks beyond the product of the levels."""
    world, axes = int(np.prod(levels)), []
    for depth, size in enumerate(levels):
        inner = int(np.prod(levels[depth + 1 :]))
        for first in (r for r in range(world) if r // inner % size == 0):
            members = tuple(range(first, first + size * inner, inner))
            group = group_of(members) if size > 1 else None
            if rank in members:
                axes.append(Axis(group=group, ranks=size, index=members.index(rank)))
    return tuple(axes)


def payload_of(rank, tokens):
    """Values that name their rank and token, exact in bfloat16, and scales beside them."""
    values = (16.0 * rank + torch.arange(tokens))[:, None] + torch.tensor([0.0, 128.0, 0.5])[:WIDTH]
    values = values.bfloat16()
    return {
        "values": values,
        "scales": values[:, :1].float() / 7,
        "bytes": (values[:, :2] / 64).to(torch.float8_e4m3fn),
    }


def weights_of(rank, shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(rank))


def run_transport(rank, name, levels, ids, experts, top_k, array_rows, options):
    axes = level_axes(rank, levels)
    if not axes:
        return None
    local = experts // len(ids)
    own = torch.tensor(ids[rank], dtype=torch.int32).reshape(len(ids[rank]), top_k)
    weights = weights_of(rank, own.shape)
    mover = getattr(transport, name)
    rows, handle = mover.dispatch(
        payload_of(rank, len(own)),
        own,
        weights,
        placement=Placement(num_experts=experts, first_expert=rank * local, local_experts=local),
        exchange=Exchange(group=None, sizes=tuple(map(len, ids)), rows=array_rows, levels=axes, **options),
    )
    used = int(handle.plan.group_sizes.sum())
    for value in rows.values():
        assert len(value) == handle.num_rows
        assert not value[used:].float().any(), "rows past the last are not zeros"
    expert = torch.repeat_interleave(rank * local + torch.arange(local), handle.plan.group_sizes)
    y = torch.full((handle.num_rows, WIDTH), 1e30)  # past the last row: anything
    y[:used] = rows["values"][:used].float() * (expert[:, None] + 1)
    combined = mover.combine(y, handle)
    numbers = mover.carry(100 * rank + torch.arange(len(own))[:, None], handle)
    row_number = numbers[handle.plan.row_token[:used].long(), 0] if used else numbers[:0, 0]
    return {
        "rows": {key: value[:used].float().numpy() for key, value in rows.items()},
        "number": row_number.numpy(),
        "slot": handle.plan.row_slot[:used].numpy(),
        "sizes": handle.plan.group_sizes.numpy(),
        "dropped": int(handle.dropped),
        "received": [None if h.receive is None else sum(h.receive) for h in handle.hops],
        "held": len(numbers),
        "combined": combined.numpy(),
    }


def check(pool, levels, ids, experts, *, name, array_rows=None, **options):
    """All ranks against the simulation, value by value."""
    array_rows = max(map(len, ids)) if array_rows is None else array_rows
    local, top_k = experts // len(ids), max((len(token) for rank in ids for token in rank), default=2)
    results = pool.run(run_transport, name, levels, ids, experts, top_k, array_rows, options)[: len(ids)]
    slotted = {"array_rows": array_rows} if name == "padded" else {}
    held, dropped, _ = deliver(ids, experts, levels, **slotted, **options)
    kept = [np.zeros((len(own), top_k), bool) for own in ids]
    for rank, (found, copies) in enumerate(zip(results, held, strict=True)):
        where = f"{name} {levels} rank {rank}"
        rows = rows_of(copies, ids, rank * local, local)
        tokens = [copies[index][:2] for _, index, _ in rows]
        for (_, _, slot), (source, token) in zip(rows, tokens, strict=True):
            kept[source][token, slot] = True
        for key in ("values", "scales", "bytes"):
            wanted = np.array(
                [payload_of(source, token + 1)[key][token].float().numpy() for source, token in tokens]
            ).reshape(found["rows"][key].shape)
            np.testing.assert_array_equal(found["rows"][key], wanted, err_msg=f"{where} {key}")
        assert found["number"].tolist() == [100 * source + token for source, token in tokens], where
        assert found["slot"].tolist() == [slot for _, _, slot in rows], where
        wanted = np.bincount([e - rank * local for e, _, _ in rows], minlength=local)
        assert found["sizes"].tolist() == wanted.tolist(), where
        assert found["dropped"] == dropped[rank], where
        assert found["held"] == len(copies), where
        limits = {key: options.get(key) for key in ("capacity_factor", "max_rows")}
        bound = bounds.received_copies(array_rows, top_k=top_k, hops=levels, **limits)
        assert len(copies) <= bound, where
        if name == "padded":
            assert len(copies) == bound, where
    for rank, found in enumerate(results):
        own = np.array(ids[rank], float).reshape(len(ids[rank]), top_k)
        factor = (weights_of(rank, own.shape).double().numpy() * (own + 1) * kept[rank]).sum(-1, keepdims=True)
        wanted = factor * payload_of(rank, len(own))["values"].double().numpy()
        np.testing.assert_allclose(found["combined"], wanted, rtol=1e-5, err_msg=f"{name} {levels} rank {rank}")
    return results


def draw(sizes, experts, top_k, seed=3):
    rng = np.random.default_rng(seed)
    return [[rng.permutation(experts)[:top_k].tolist() for _ in range(size)] for size in sizes]


VARIANTS = [
    ("ragged", {}),
    ("padded", {}),
    ("ragged", {"max_rows": 3}),
    ("padded", {"capacity_factor": 0.5}),
]
LEVELS = [(1,), (2,), (3,), (4,), (2, 2), (4, 1), (1, 4)]
SHAPES = {
    "uneven": lambda ranks, e: draw([3, 0, 5, 2][:ranks], ranks * e, min(2, ranks * e)),
    "one token": lambda ranks, e: draw([0, 0, 0, 1][-ranks:], ranks * e, min(2, ranks * e)),
    "no token": lambda ranks, e: [[] for _ in range(ranks)],
    "one expert": lambda ranks, e: [[[ranks * e - 1]] * size for size in [3, 1, 4, 2][:ranks]],
    "one rank": lambda ranks, e: [[list(range(min(e, 3)))] * size for size in [3, 1, 4, 2][:ranks]],
    "every expert": lambda ranks, e: draw([2, 1, 0, 3][:ranks], ranks * e, ranks * e),
    "sentinels": lambda ranks, e: [
        [[ranks * e, 0], [-1, ranks * e - 1], [ranks * e] * 2][:size] for size in [3, 0, 2, 1][:ranks]
    ],
}


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_copy_arrives_where_and_as_it_should(pool, shape, levels):
    ranks = int(np.prod(levels))
    local = {"uneven": 3, "one token": 1, "every expert": 1 if ranks > 2 else 3, "one rank": 12}.get(shape, 2)
    ids = SHAPES[shape](ranks, local)
    for name, options in VARIANTS:
        check(pool, levels, ids, ranks * local, name=name, **options)


@pytest.mark.parametrize("local", [1, 3, 12])
def test_whatever_number_of_experts_a_rank_holds(pool, local):
    ids = draw([6, 2, 0, 7], 4 * local, min(4, 4 * local))
    for levels, (name, options) in itertools.product([(4,), (2, 2)], VARIANTS):
        check(pool, levels, ids, 4 * local, name=name, array_rows=9, **options)


@pytest.mark.parametrize("seed", range(6))
def test_drops_follow_the_stated_rule(pool, seed):
    rng = np.random.default_rng(seed)
    ids = draw(rng.integers(0, 9, 4), 8, int(rng.integers(1, 5)), seed)
    lost = 0
    for levels in [(4,), (2, 2)]:
        lost += sum(r["dropped"] for r in check(pool, levels, ids, 8, name="ragged", max_rows=int(rng.integers(1, 6))))
        factor = float(rng.uniform(0.1, 0.8))
        lost += sum(
            r["dropped"] for r in check(pool, levels, ids, 8, name="padded", array_rows=9, capacity_factor=factor)
        )
    assert lost, "nothing was dropped"


def test_no_copy_is_sent_twice_and_none_in_vain(pool):
    ids = draw([7, 3, 0, 5], 8, 3)
    for levels in [(4,), (2, 2)]:
        results = check(pool, levels, ids, 8, name="ragged")
        ranks = sum(len({expert // 2 for expert in token}) for own in ids for token in own)
        nodes = sum(len({expert // 4 for expert in token}) for own in ids for token in own)
        received = np.sum([found["received"] for found in results], axis=0).tolist()
        assert received == ([ranks] if levels == (4,) else [nodes, ranks])


def test_eight_ranks_in_one_hop_and_in_two():
    pool = RankPool(8)
    try:
        ids = draw([3, 0, 4, 2, 1, 0, 5, 2], 24, 4)
        for levels in [(8,), (2, 4), (4, 2)]:
            for name, options in VARIANTS:
                check(pool, levels, ids, 24, name=name, **options)
    finally:
        pool.stop()


def send_on_rank(rank, payload_names):
    axis = Axis(group=dist.group.WORLD, ranks=4, index=rank)
    ids = torch.tensor([[2 * rank, (2 * rank + 3) % 8]])
    payload = {name: torch.full((1, 2, 2), float(rank)) for name in payload_names}
    received, got, weights, _ = hop.send(payload, ids, torch.ones(1, 2), axis=axis, num_experts=8, block=2)
    return {name: value[:, 0, 0].tolist() for name, value in received.items()}, got.tolist(), weights.tolist()


def test_a_payload_may_have_any_names_and_shapes_or_none_at_all(pool):
    for names in ((), ("values",), ("values", "scales")):
        for rank, (received, ids, weights) in enumerate(pool.run(send_on_rank, names)):
            sources = sorted([rank, (rank - 1) % 4])
            assert received == dict.fromkeys(names, sources)
            own = {rank: [2 * rank, 8], (rank - 1) % 4: [8, (2 * rank + 1) % 8]}
            assert ids == [own[source] for source in sources]
            assert weights == [[1, 1], [1, 1]]


def rounding_order(rank):
    axis = Axis(group=dist.group.WORLD, ranks=4, index=rank)
    ids = torch.tensor([[3, 2, 1, 0]])
    totals = []
    for slots in (None, 1):
        _, _, _, there = hop.send({}, ids, torch.ones(1, 4), axis=axis, num_experts=4, block=1, slots=slots)
        parts = torch.tensor([1e8, 1.0, -1e8, 1.0])[rank].expand(4, 1).contiguous()
        totals.append(hop.back(parts, there).item())
    return totals


def test_partial_sums_are_added_in_rank_order_whatever_the_slots(pool):
    total = np.float32(0)
    for value in (1e8, 1.0, -1e8, 1.0):
        total = np.float32(total + np.float32(value))
    assert pool.run(rounding_order) == [[total, total]] * 4


def test_the_worked_examples_of_the_module():
    owners = torch.tensor([[0, 1], [1, 1], [0, 0]])
    wanted = hop._wanted(owners, 2)
    axis = Axis(group=None, ranks=2, index=0)
    found = hop._exact(wanted, axis, None)
    assert found.copy_token.tolist() == [0, 2, 0, 1]
    assert found.position.tolist() == [[0, 2], [-1, 3], [1, -1]]
    for slots, copies, position, lost in (
        (3, [0, 2, -1, 0, 1, -1], [[0, 3], [-1, 4], [1, -1]], 0),
        (1, [0, 0], [[0, 1], [-1, -1], [-1, -1]], 2),
    ):
        found = hop._in_slots(wanted, axis, slots)
        assert (found.copy_token.tolist(), found.position.tolist(), int(found.dropped)) == (copies, position, lost)


@pytest.mark.parametrize(
    ("options", "hops", "expected"),
    [
        ({}, [4], 40),
        ({"capacity_factor": 1.2}, [4], 24),
        ({"max_rows": 15}, [4], 15),
        ({}, [2, 2], 40),
        ({"capacity_factor": 100.0}, [4], 40),
        ({"capacity_factor": 1e-9}, [4], 4),
        ({"capacity_factor": 0.5}, [2, 2], 10),
    ],
)
def test_the_bound_on_what_a_rank_receives(options, hops, expected):
    assert bounds.received_copies(10, top_k=2, hops=hops, **options) == expected


def test_no_rows_have_no_slots():
    assert bounds.slots(0, top_k=2, ranks=4, capacity_factor=None) == 0
    assert bounds.slots(0, top_k=2, ranks=4, capacity_factor=1.0) == 0
