"""The transports that send a token once to each rank: what moves, in which order, and what comes back, exactly."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jax_moe import transport
from jax_moe.transport import bounds, hops, lanes

from . import arrivals

WIDTH, ROWS = 3, 5
AXES = ("a", "b")

# Hops, experts on a rank, top-k. One rank, and 2, 3, 4 and 8, one hop and two; 1, 3 and 12 experts a rank; top-k = E.
GRIDS = {
    "1": ((1,), 3, 2),
    "2": ((2,), 12, 4),
    "3": ((3,), 1, 3),
    "4": ((4,), 3, 3),
    "8": ((8,), 1, 2),
    "2x2": ((2, 2), 3, 4),
    "2x4": ((2, 4), 1, 3),
    "4x1": ((4, 1), 2, 3),
}
LIMITS = {"ragged": [{}, {"max_rows": 4}], "padded": [{}, {"capacity_factor": 0.4}]}
CASES = [
    *(("ragged", grid, 0) for grid in GRIDS if grid != "4"),
    *(("padded", grid, 0) for grid in GRIDS if grid not in ("2", "4", "8", "4x1")),
    *(("ragged", grid, 1) for grid in ("3", "2x2")),
    *(("padded", grid, 1) for grid in ("1", "2x2")),
]


def patterns(ranks, local, top_k):
    """Ids (ranks, ROWS, K) by name; `experts` is none."""
    experts, rng = ranks * local, np.random.default_rng(ranks + top_k)
    spread = np.array([[rng.permutation(experts)[:top_k] for _ in range(ROWS)] for _ in range(ranks)])
    uneven = spread.copy()
    for rank in range(ranks):  # rank 0 full, rank 1 empty, others between; real rows need not come first
        uneven[rank, rng.permutation(ROWS)[: [0, ROWS, 2, 1][rank % 4]]] = experts
    holed = np.where(rng.random(spread.shape) < 0.4, experts, spread)
    one_expert = np.full_like(spread, experts)
    one_expert[..., top_k - 1] = experts - 1
    one_rank = np.full_like(spread, experts)
    count = min(local, top_k)
    one_rank[..., :count] = (ranks - 1) * local + np.arange(count)
    one_token = np.full_like(spread, experts)
    one_token[ranks - 1, 2] = spread[ranks - 1, 2]
    return {
        "spread": spread,
        "uneven": uneven,
        "holed": holed,
        "one expert": one_expert,
        "one rank": one_rank,
        "one token": one_token,
        "no token": np.full_like(spread, experts),
    }


def arrays(ids, seed=0):
    """x and a gradient of small whole numbers and weights that are powers of two: all sums here are exact."""
    rng = np.random.default_rng(seed)
    tokens = ids.shape[0] * ids.shape[1]
    x = rng.integers(-4, 5, (tokens, WIDTH)).astype(np.float32)
    weights = 2.0 ** -rng.integers(0, 3, (tokens, ids.shape[2])).astype(np.float32)
    return x, weights, rng.integers(-4, 5, (tokens, WIDTH)).astype(np.float32)


def mesh_of(sizes):
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    return Mesh(devices, AXES[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


@functools.cache
def program(name, grid, limit, gradients=False, check_vma=False):
    """Dispatch, experts that multiply by e + 1, and combine, in one program over all ranks; or only its gradients."""
    sizes, local, _ = GRIDS[grid]
    mesh = mesh_of(sizes)
    axes = mesh.axis_names
    crossed = tuple((axis,) if size > 1 else () for axis, size in zip(axes, sizes, strict=True))
    mover, options = getattr(transport, name), LIMITS[name][limit]

    def step(x, ids, weights, g):
        first = jax.lax.axis_index(axes) * local

        def forward(x, weights):
            rows, handle = mover.dispatch(
                x, ids, weights, hops=crossed, first_expert=first, num_local_experts=local, **options
            )
            expert = jnp.repeat(jnp.arange(local), handle.plan.group_sizes_e, total_repeat_length=len(rows))
            return mover.combine(rows * (first + expert + 1.0)[:, None], handle), (rows, handle)

        if gradients:
            return jax.vjp(lambda *args: forward(*args)[0], x, weights)[1](g)
        y, (rows, handle) = forward(x, weights)
        numbers = jax.lax.axis_index(axes) * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
        came = hops.carry({"token": numbers + 1}, handle)["token"] - 1
        return y, rows, handle.plan, came, handle.dropped[None]

    spec = P(axes)
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma))


def came_of(ids, local, sizes, name, options):
    return arrivals.arrive(
        ids, local, sizes, name, capacity=options.get("capacity_factor"), max_rows=options.get("max_rows")
    )


@pytest.mark.parametrize(("name", "grid", "limit"), CASES, ids=lambda v: str(v))
def test_copies_arrive_in_order_and_sums_come_back_exactly(name, grid, limit):
    sizes, local, top_k = GRIDS[grid]
    ranks, options = math.prod(sizes), LIMITS[name][limit]
    for pattern, ids in patterns(ranks, local, top_k).items():
        x, weights, g = arrays(ids)
        flat = ids.reshape(-1, top_k).astype(np.int32)
        y, rows, plan, came, dropped = jax.tree.map(np.asarray, program(name, grid, limit)(x, flat, weights, g))
        wanted = came_of(ids, local, sizes, name, options)
        assert dropped.tolist() == wanted.dropped, pattern
        if not options:
            assert not any(wanted.dropped)
        for rank in range(ranks):
            tokens = [-1 if copy is None else copy.token for copy in wanted.copies[rank]]
            here = came.reshape(ranks, -1)[rank]
            assert here.tolist() == tokens + [-1] * (len(here) - len(tokens)), (pattern, rank)
            pairs = [
                (flat[copy.token, k], place, k)
                for place, copy in enumerate(wanted.copies[rank])
                if copy is not None
                for k in copy.slots
            ]
            values = rows.reshape(ranks, -1, WIDTH)[rank]
            order = [tokens[place] for _, place, _ in sorted(pairs)]
            np.testing.assert_array_equal(values[: len(order)], x[order], err_msg=f"{pattern}, rank {rank}")
            assert not values[len(order) :].any()
            assert plan.row_slot_R.reshape(ranks, -1)[rank, : len(order)].tolist() == [k for *_, k in sorted(pairs)]
            counts = np.bincount([e - rank * local for e, *_ in pairs], minlength=local)
            assert plan.group_sizes_e.reshape(ranks, -1)[rank].tolist() == counts.tolist()
        factor = factors(flat, wanted)
        np.testing.assert_array_equal(y, np.einsum("tk,tk,td->td", weights, factor, x), err_msg=pattern)


def factors(flat, wanted):
    """(tokens, K) what each slot is multiplied by: e + 1, or 0 where it reached no expert."""
    reached = np.zeros(flat.shape, bool)
    for copies in wanted.copies:
        for copy in copies:
            if copy is not None:
                reached[copy.token, copy.slots] = True
    return np.where(reached, flat + 1.0, 0)


@pytest.mark.parametrize(("grid", "limit"), [("2x2", 1)])
@pytest.mark.parametrize("name", LIMITS)
def test_gradients_go_the_same_way_exactly(name, grid, limit):
    sizes, local, top_k = GRIDS[grid]
    options = LIMITS[name][limit]
    for pattern, ids in patterns(math.prod(sizes), local, top_k).items():
        x, weights, g = arrays(ids)
        flat = ids.reshape(-1, top_k).astype(np.int32)
        dx, dw = program(name, grid, limit, gradients=True)(x, flat, weights, g)
        factor = factors(flat, came_of(ids, local, sizes, name, options))
        np.testing.assert_array_equal(dx, np.einsum("tk,tk,td->td", weights, factor, g), err_msg=pattern)
        np.testing.assert_array_equal(dw, np.einsum("tk,td,td->tk", factor, x, g), err_msg=pattern)


@pytest.mark.parametrize("name", ["allgather", *LIMITS])
def test_a_format_may_send_values_and_scales_and_bring_back_several_sums(name):
    ids = patterns(2, 12, 4)["uneven"]
    x, weights, _ = arrays(ids)
    flat = ids.reshape(-1, 4).astype(np.int32)
    codes, scales = x.astype(np.int8), np.exp2(x[:, :1])
    way = {"axes": ("a",)} if name == "allgather" else {"hops": (("a",),)}

    def step(codes, scales, ids, weights):
        payload = {"codes": codes, "scales": scales}
        mover, first = getattr(transport, name), jax.lax.axis_index("a") * 12
        rows, handle = mover.dispatch(payload, ids, weights, first_expert=first, num_local_experts=12, **way)
        y = rows["codes"].astype(jnp.float32) * rows["scales"]
        return mover.combine((y, -y[:, :1]), handle)

    spec = P("a")
    mapped = jax.jit(jax.shard_map(step, mesh=mesh_of((2,)), in_specs=spec, out_specs=spec, check_vma=False))
    y, minus = mapped(codes, scales, flat, weights)
    wanted = (weights * (flat < 24)).sum(1)[:, None] * x * scales
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_array_equal(minus, -wanted[:, :1])


@pytest.mark.parametrize("grid", ["3", "2x2"])
@pytest.mark.parametrize("name", LIMITS)
def test_sums_are_in_float32_in_order_of_rank(name, grid):
    sizes, local, top_k = GRIDS[grid]
    ids = patterns(math.prod(sizes), local, top_k)["spread"]
    flat, rng = ids.reshape(-1, top_k).astype(np.int32), np.random.default_rng(0)
    x = rng.standard_normal((len(flat), WIDTH)).astype(np.float32)
    weights = 2.0 ** rng.integers(-9, 9, flat.shape).astype(np.float32)
    y = np.asarray(program(name, grid, 0)(x, flat, weights, x)[0])
    made = x[:, None] * (flat[..., None] + 1).astype(np.float32)
    came = arrivals.arrive(ids, local, sizes, name)
    np.testing.assert_array_equal(y, arrivals.sums(flat, weights, made, local, sizes, came))


@pytest.mark.parametrize("name", LIMITS)
def test_with_types_of_varying_axes_the_result_is_the_same(name):
    _, local, top_k = GRIDS["3"]
    ids = patterns(3, local, top_k)["uneven"]
    x, weights, g = arrays(ids)
    given = x, ids.reshape(-1, top_k).astype(np.int32), weights, g
    jax.tree.map(
        np.testing.assert_array_equal, program(name, "3", 0)(*given), program(name, "3", 0, check_vma=True)(*given)
    )


@pytest.mark.parametrize("grid", ["4", "2x2"])
def test_no_more_copies_cross_than_tokens_have_ranks(grid):
    sizes, local, top_k = GRIDS[grid]
    for pattern, ids in patterns(4, local, top_k).items():
        flat = arrivals.arrive(ids, local, (4,), "ragged")
        crossed = arrivals.arrive(ids, local, sizes, "ragged").crossed
        owners = [[{e // local for e in row if e < 4 * local} - {r} for row in ids[r]] for r in range(4)]
        assert flat.crossed == [sum(len(o) for per_rank in owners for o in per_rank)], pattern
        if grid == "2x2":
            nodes = sum(len({o // 2 for o in of} - {r // 2}) for r, per_rank in enumerate(owners) for of in per_rank)
            assert crossed[0] == nodes


def numpy_ragged_all_to_all(operands, outputs, input_offsets, send_sizes, output_offsets, recv_sizes):
    """The contract of `ragged_all_to_all`, over all ranks at once: offsets are the sender's, on both sides.

    As many pieces to each rank as offsets hold for it, those to the first rank first.
    """
    outputs, ranks = [output.copy() for output in outputs], len(operands)
    by_rank = [np.reshape(of, (ranks, ranks, -1)) for of in (input_offsets, send_sizes, output_offsets, recv_sizes)]
    for source in range(ranks):
        for to in range(ranks):
            begins, counts, lands = (of[source][to] for of in by_rank[:3])
            np.testing.assert_array_equal(counts, by_rank[3][to][source], "the two ends do not agree")
            for begin, count, land in zip(begins, counts, lands, strict=True):
                assert 0 <= begin <= begin + count <= len(operands[source])
                assert 0 <= land <= land + count <= len(outputs[to])
                outputs[to][land : land + count] = operands[source][begin : begin + count]
    return outputs


def given_to_xla(ends, pieces):
    """What `lanes` hands to `ragged_all_to_all` for the segments of each rank: offsets and sizes, a row a rank."""
    given = []
    for row in zip(*ends, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.lax, "ragged_all_to_all", lambda rows, zeros, *given, axis_name: given)
            given.append(lanes._ragged_all_to_all(None, None, *map(jnp.asarray, row), axes=("a",), pieces=pieces))
    return [np.stack(each) for each in zip(*given, strict=True)]


@pytest.mark.parametrize("pieces", [1, 3, 256])
@pytest.mark.parametrize("most", [None, 5], ids=["all", "max_rows"])
def test_offsets_keep_the_contract_of_ragged_all_to_all(most, pieces):
    ranks, rng = 4, np.random.default_rng(1)
    sizes = rng.integers(0, ROWS + 1, (ranks, ranks)).astype(np.int32)
    sizes[2] = 0
    limit = bounds.ragged(ROWS, ranks, ranks, most)
    mesh = mesh_of((ranks,))
    rows = np.zeros((ranks, limit.send), np.float32)
    for r in range(ranks):
        rows[r, : sizes[r].sum()] = 100 * (r + 1) + np.arange(sizes[r].sum())

    def step(sizes, rows):
        lane, dropped = lanes.segments(sizes[0], ("a",), send=limit.send, receive=limit.receive, pair=limit.pair)
        there = lane.there(rows[0])
        ends = [end[None] for end in jax.tree.leaves((lane.sending, lane.receiving))]
        return ends, there[None], lane.back(there)[None], dropped[None]

    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False))
    ends, there, back, dropped = jax.tree.map(np.asarray, mapped(sizes, rows))
    out, into = ends[:3], ends[3:]
    zeros = np.zeros((ranks, limit.receive), np.float32)
    np.testing.assert_array_equal(there, numpy_ragged_all_to_all(rows, zeros, *given_to_xla(out + into, pieces)))
    zeros = np.zeros((ranks, limit.send), np.float32)
    np.testing.assert_array_equal(back, numpy_ragged_all_to_all(there, zeros, *given_to_xla(into + out, pieces)))
    for to in range(ranks):
        whole = np.concatenate([rows[s, sizes[s, :to].sum() : sizes[s, : to + 1].sum()] for s in range(ranks)])
        kept = whole[: limit.receive]
        np.testing.assert_array_equal(there[to, : len(kept)], kept)
        assert not there[to, len(kept) :].any()
        assert dropped[to] == len(whole) - len(kept)


def test_for_a_gpu_the_ragged_exchange_is_xlas_own_and_for_cpu_it_is_not():
    x, weights, g = arrays(np.zeros((3, ROWS, 3), int))
    given = x, np.zeros((3 * ROWS, 3), np.int32), weights, g
    forward, backward = (program("ragged", "3", 0, gradients).trace(*given) for gradients in (False, True))
    # Dispatch's rows and routing, combine, and here the tokens' numbers. Then the first two, and gradients of three.
    for traced, count in ((forward, 4), (backward, 5)):
        gpu = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert gpu.count("@ragged_all_to_all(") == count
        assert "stablehlo.all_to_all" not in gpu
        cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
        assert "@ragged_all_to_all" not in cpu
        assert cpu.count("stablehlo.all_to_all") == count


def test_between_processes_the_ragged_exchange_moves_equal_blocks(monkeypatch):
    # XLA's own hangs there
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    x, weights, g = arrays(np.zeros((3, ROWS, 3), int))
    traced = program.__wrapped__("ragged", "3", 0).trace(x, np.zeros((3 * ROWS, 3), np.int32), weights, g)
    gpu = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "@ragged_all_to_all" not in gpu
    assert gpu.count("stablehlo.all_to_all") == 4


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [
        (bounds.ragged(4, 2, 8), (4, 8, 32)),
        (bounds.ragged(4, 8, 2), (4, 8, 8)),
        (bounds.ragged(4, 2, 8, 5), (4, 8, 5)),
        (bounds.padded(4, 2, 8), (4, 32, 32)),
        (bounds.padded(4, 2, 8, 1.5), (2, 16, 16)),
        (bounds.padded(4, 2, 8, 0.001), (1, 8, 8)),
        (bounds.padded(4, 2, 8, 1000), (4, 32, 32)),
    ],
)
def test_buffers_are_as_large_as_documented(limit, wanted):
    assert (limit.pair, limit.send, limit.receive) == wanted


def test_two_hops_are_bounded_in_turn():
    first, second = bounds.hops("ragged", 4, 2, (2, 4))
    assert (first.send, first.receive, second.rows, second.send, second.receive) == (8, 8, 8, 16, 32)
