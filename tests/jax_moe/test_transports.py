"""The layer over every transport equals one dense formula, with the collectives, bytes and drops that are promised."""

import collections
import dataclasses
import pathlib
import re
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moe as jm
from jax_moe import capabilities
from jax_moe.estimate import hit_probability

from . import arrivals, dense
from .layers import RICH, SHARED, arrays, num_shards, real_rows, run, sharded, tokens

ROOT = pathlib.Path(__file__).parents[2]
ROWS = 5
NARROW = {"rtol": 1e-5, "atol": 1e-5}

# Sizes of each mode of the capability table.
SIZES = {
    "single": {},
    "DP": {"dp": 2},
    "TP": {"tp": 2},
    "DP+TP": {"dp": 2, "tp": 2},
    "DP+EP": {"dp": 2, "expert_parallel": True},
    "EP+SP": {"dp": 2, "tp": 2, "expert_parallel": True},
    "EP+SP native": {"dp": 2, "tp": 2, "expert_parallel": True, "token_layout": "dp_tp"},
    "EP, SP off": {"dp": 2, "tp": 2, "expert_parallel": True, "sequence_parallel": False},
}
CELLS = {
    **{(name, mode): {"transport": name, **SIZES[mode]} for name in ("ragged", "padded") for mode in SIZES},
    ("ragged", "2x2 nodes"): {"transport": "ragged", "dp": 4, "expert_parallel": True, "nodes": 2},
    ("padded", "2x4 nodes"): {"transport": "padded", "dp": 4, "tp": 2, "expert_parallel": True, "nodes": 2},
}
CELLS = {
    (name, mode): fields for (name, mode), fields in CELLS.items() if "nodes" in mode or mode in jm.CAPABILITIES[name]
}
# Of the compiled program on CPU, where a ragged exchange is an all-to-all too. Dispatch has two, rows and routing, and
# combine one; ragged gathers sizes first; SP that is not native gathers its sequence. Every hop has its own.
EXPECTED = {
    ("ragged", "DP+EP"): {"all-to-all": 3, "all-gather": 1},
    ("ragged", "EP+SP"): {"all-to-all": 3, "all-gather": 2},
    ("ragged", "EP+SP native"): {"all-to-all": 3, "all-gather": 1},
    ("ragged", "2x2 nodes"): {"all-to-all": 6, "all-gather": 2},
    ("padded", "DP+EP"): {"all-to-all": 3},
    ("padded", "EP+SP"): {"all-to-all": 3, "all-gather": 1},
    ("padded", "EP+SP native"): {"all-to-all": 3},
    ("padded", "2x4 nodes"): {"all-to-all": 6, "all-gather": 1},
}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")


def lowered(config, parallel, rows, platform="cpu", **options):
    """The layer's program for `rows` on each shard of x, and how to place arrays for it."""
    params, mesh = sharded(config, parallel)
    place = NamedSharding(mesh, P(parallel.token_axes))
    step = jax.jit(
        lambda *args: jm.moe(*args[:2], config=config, parallel=parallel, mesh=mesh, counts=args[2], **options)
    )
    x = jax.device_put(tokens(rows * num_shards(parallel), config.hidden_size), place)
    counts = jax.device_put(np.zeros(num_shards(parallel), np.int32), NamedSharding(mesh, P()))
    return step.trace(params, x, counts).lower(lowering_platforms=(platform,)), params, place


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_what_the_table_allows_is_the_dense_formula_and_has_no_other_collectives(cell):
    parallel, config = jm.ParallelConfig(**CELLS[cell]), RICH if cell[0] == "ragged" else SHARED
    program, params, place = lowered(config, parallel, ROWS)
    program = program.compile()
    found = collections.Counter(re.findall(rf" ({'|'.join(KINDS)})(?:-start)?\(", program.as_text()))
    assert dict(found) == EXPECTED[cell]
    shards = num_shards(parallel)
    for counts in ([[4, 0, 1, 3][i % 4] for i in range(shards)], [0] * (shards - 1) + [1], [ROWS] * shards):
        real = real_rows(counts, ROWS)
        x = tokens(len(real), config.hidden_size)
        x[~real] = np.nan
        given = params, jax.device_put(x, place), jnp.asarray(counts, jnp.int32)
        y = np.asarray(program(*given))
        np.testing.assert_allclose(y[real], dense.layer(arrays(config), x[real], config), **NARROW)
        assert (y[~real] == 0).all()
        np.testing.assert_array_equal(program(*given), y)


@pytest.mark.parametrize("mode", SIZES)
@pytest.mark.parametrize("name", jm.CAPABILITIES)
def test_the_whole_table_is_true(name, mode):
    if mode in jm.CAPABILITIES[name]:
        parallel = jm.ParallelConfig(transport=name, **SIZES[mode])
        assert parallel.mode == mode
        assert "rank" in jm.explain(SHARED, parallel).moves
        return
    with pytest.raises(ValueError, match="transport = ") as error:
        jm.ParallelConfig(transport=name, **SIZES[mode])
    for word in (name, mode, *capabilities.serving(mode)):
        assert repr(word) in str(error.value)


@pytest.mark.parametrize("name", jm.CAPABILITIES)
def test_nodes_and_dtypes_are_those_of_the_table(name):
    sizes = {} if name == "local" else {"expert_parallel": True}
    if name in jm.ACROSS_NODES:
        assert jm.make_mesh(jm.ParallelConfig(transport=name, dp=4, nodes=2, **sizes)).axis_names[0] == "node"
    else:
        with pytest.raises(ValueError, match=rf"nodes = 2: expected 1 with transport '{name}'; 'padded' or 'ragged'"):
            jm.ParallelConfig(transport=name, dp=4, nodes=2, **sizes)
    for dtype in ("bfloat16", "float16", "float32"):
        assert dtype in jm.TRANSPORT_DTYPES[name]
        jm.check(dataclasses.replace(SHARED, dtype=dtype), jm.ParallelConfig(transport=name, dp=2, **sizes))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nodes": 0}, "nodes = 0"),
        ({"nodes": 3}, "nodes = 3: expected a divisor of dp = 4"),
        ({"max_rows": 0}, "max_rows = 0"),
        ({"capacity_factor": 1.0}, "capacity_factor = 1.0: expected None with transport 'ragged'"),
        ({"transport": "padded", "capacity_factor": 0.0}, "capacity_factor = 0.0: expected a positive"),
        ({"transport": "padded", "capacity_factor": float("inf")}, "capacity_factor = inf"),
        ({"transport": "padded", "capacity_factor": "1"}, "capacity_factor = '1'"),
        ({"transport": "padded", "max_rows": 4}, "max_rows = 4: expected None with transport 'padded'"),
    ],
)
def test_a_limit_that_fits_nothing_names_field_and_value(fields, message):
    with pytest.raises(ValueError, match=message):
        jm.ParallelConfig(**{"dp": 4, "expert_parallel": True, "transport": "ragged", **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"transport": "ragged", "max_rows": 4, "dp": 4, "nodes": 2},
        {"transport": "padded", "capacity_factor": 0.5, "dp": 2, "tp": 2},
    ],
    ids=str,
)
def test_what_is_dropped_adds_nothing_and_is_counted(fields):
    config = dataclasses.replace(SHARED, num_shared_experts=0, router=jm.RouterConfig(source="ids"))
    parallel = jm.ParallelConfig(expert_parallel=True, **fields)
    rng, rows = np.random.default_rng(3), 6
    counts = [rows, 1, 0, rows - 1][: parallel.dp]
    real = real_rows(counts, rows)
    x, weights = tokens(len(real), 16), rng.random((len(real), 3)).astype(np.float32)
    ids = np.array([rng.permutation(8)[:3] for _ in real], np.int32)
    y, trace = run(
        config, parallel, x, counts=np.array(counts, np.int32), topk_ids=ids, topk_weights=weights, trace=True
    )
    hops = (2, 2) if parallel.nodes == 2 else (4,)
    routed = np.where(real[:, None], ids, 8).reshape(4, -1, 3)
    came = arrivals.arrive(
        routed, 2, hops, parallel.transport, capacity=parallel.capacity_factor, max_rows=parallel.max_rows
    )
    assert sum(came.dropped) > 0
    assert trace.dropped.tolist() == came.dropped
    kept = np.zeros(ids.shape, bool)
    number = np.cumsum(real) - 1
    for rank, copies in enumerate(came.copies):
        pairs = [(ids[c.token, k], i, k) for i, c in enumerate(copies) if c is not None for k in c.slots]
        for e, i, k in pairs:
            assert e // 2 == rank
            kept[copies[i].token, k] = True
        row_token = np.split(trace.row_token, 4)[rank]
        assert row_token[: len(pairs)].tolist() == [number[copies[i].token] for _, i, _ in sorted(pairs)]
        assert (row_token[len(pairs) :] == -1).all()
    wanted = dense.layer(arrays(config), x, config, topk_ids=ids, topk_weights=weights * kept)
    np.testing.assert_allclose(y[real], wanted[real], **NARROW)
    load = np.bincount(ids[real].reshape(-1), minlength=8)
    np.testing.assert_array_equal(trace.expert_load.reshape(4, 8), np.tile(load, (4, 1)))


def gradients(**fields):
    parallel = jm.ParallelConfig(**fields)
    params, mesh = sharded(RICH, parallel)
    x, weigh = tokens(8, 16), tokens(8, 16, seed=9)

    def loss(params, x):
        return jnp.sum(jm.moe(params, x, config=RICH, parallel=parallel, mesh=mesh) * weigh)

    by_params, by_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    return {**jm.to_mapping(jm.unshard(by_params, RICH)), "x": np.asarray(by_x)}


def test_gradients_are_those_of_one_rank():
    one = gradients()
    for name, gradient in gradients(expert_parallel=True, transport="ragged", dp=2, tp=2).items():
        np.testing.assert_allclose(gradient, one[name], rtol=1e-4, atol=1e-5, err_msg=name)


COLLECTIVE = re.compile(
    r"(stablehlo\.all_to_all|stablehlo\.all_gather|stablehlo\.reduce_scatter|@ragged_all_to_all)\b.*?"
    r": \(tensor<([^>]*)>(.*?)\) -> tensor<([^>]*)>",
    re.S,
)


def size(tensor):
    *shape, dtype = tensor.split("x")
    return int(np.prod([int(n) for n in shape], dtype=int)) * {"f32": 4, "bf16": 2, "i32": 4, "ui32": 4}[dtype]


@pytest.mark.parametrize(
    "fields",
    [
        {"transport": "allgather", "dp": 4},
        {"transport": "allgather", "dp": 2, "tp": 2, "token_layout": "dp_tp"},
        {"transport": "padded", "dp": 4},
        {"transport": "padded", "dp": 4, "capacity_factor": 0.5},
        {"transport": "padded", "dp": 4, "nodes": 2, "capacity_factor": 0.5},
        {"transport": "ragged", "dp": 4},
        {"transport": "ragged", "dp": 4, "nodes": 2, "max_rows": 7},
    ],
    ids=str,
)
def test_estimated_bytes_are_those_of_the_program(fields):
    # With a latent, which is narrower and all that travels, and without.
    config = SHARED if fields["transport"] == "allgather" else RICH
    parallel = jm.ParallelConfig(expert_parallel=True, **fields)
    text = lowered(config, parallel, ROWS, "cuda")[0].as_text()
    held, sent = 0, 0
    for kind, operand, _, result in COLLECTIVE.findall(text):
        held += size(operand) + size(result)
        ranks = 4 // parallel.nodes
        others = {"stablehlo.all_gather": ranks - 1, "stablehlo.reduce_scatter": 1 - 1 / ranks}.get(kind, 1 - 1 / ranks)
        sent += size(operand) * others * (kind != "@ragged_all_to_all")
    costs = jm.estimate(config, parallel, ROWS)
    assert costs.buffer_bytes == held
    if costs.exact:
        assert costs.dispatch_bytes + costs.combine_bytes == sent
    assert costs.messages == (4 // parallel.nodes - 1) * len(COLLECTIVE.findall(text))


@pytest.mark.parametrize(("nodes", "groups"), [(1, (1, 1)), (2, (1, 1)), (2, (4, 2)), (4, (4, 1))])
def test_expected_copies_are_those_of_many_uniform_tokens(nodes, groups):
    ranks, rows, top_k, local = 8, 150, 4, 2
    rng, (count, kept) = np.random.default_rng(0), groups
    config = dataclasses.replace(
        SHARED,
        num_experts=16,
        top_k=top_k,
        router=jm.RouterConfig(num_groups=count, groups_kept=kept),
    )
    eligible = np.arange(16).reshape(count, -1)
    draw = lambda: rng.permutation(eligible[rng.permutation(count)[:kept]].reshape(-1))[:top_k]  # noqa: E731
    ids = np.array([[draw() for _ in range(rows)] for _ in range(ranks)])
    hops = (nodes, ranks // nodes) if nodes > 1 else (ranks,)
    crossed = arrivals.arrive(ids, local, hops, "ragged").crossed
    parallel = jm.ParallelConfig(dp=ranks, nodes=nodes, transport="ragged", expert_parallel=True)
    costs = jm.estimate(config, parallel, rows)
    for hop, actual in zip(costs.hops, crossed, strict=True):
        assert hop.copies * ranks == pytest.approx(actual, rel=0.05)


def test_estimates_reach_a_thousand_ranks_and_order_transports_as_expected():
    config = jm.MoEConfig(
        num_experts=1024,
        top_k=8,
        hidden_size=7168,
        intermediate_size=2048,
        router=jm.RouterConfig(num_groups=128, groups_kept=4),
    )
    wide = {"dp": 1024, "expert_parallel": True}
    costs = {
        name: jm.estimate(config, jm.ParallelConfig(transport=name, **wide), 128)
        for name in ("allgather", "padded", "ragged")
    }
    nodes = jm.estimate(config, jm.ParallelConfig(transport="ragged", nodes=128, **wide), 128)
    assert costs["ragged"].hops[0].copies == pytest.approx(128 * 8 * 1023 / 1024)
    assert costs["ragged"].dispatch_bytes < costs["padded"].dispatch_bytes == costs["allgather"].dispatch_bytes
    # A token enters at most four nodes.
    assert nodes.hops[0].copies < 128 * 4
    assert nodes.messages < costs["ragged"].messages / 7
    assert hit_probability(config, 1024) == pytest.approx(8 / 1024)


def test_without_a_rank_to_send_to_nothing_is_sent():
    for name in ("padded", "ragged", "allgather"):
        costs = jm.estimate(SHARED, jm.ParallelConfig(expert_parallel=True, transport=name), 7)
        assert (costs.dispatch_bytes, costs.combine_bytes, costs.messages) == (0, 0, 0)
    with pytest.raises(ValueError, match="tokens_per_rank = -1"):
        jm.estimate(SHARED, jm.ParallelConfig(), -1)


def test_moves_are_explained():
    parallel = jm.ParallelConfig(dp=4, nodes=2, expert_parallel=True, transport="ragged", max_rows=9)
    said = jm.explain(SHARED, parallel, tokens_per_rank=10)
    assert "by way of one rank on each of 2 nodes" in said.transport
    assert "accepts 9 rows" in said.transport
    assert "across nodes: dispatch sends about" in said.moves
    assert "buffers hold" in said.moves
    padded = jm.ParallelConfig(dp=2, expert_parallel=True, transport="padded", capacity_factor=1.5)
    # A row is 16 float32 and 3 ids and weights; 10 slots of 10 rows.
    assert "for 10 tokens of its own: dispatch sends 880 B in 2" in jm.explain(SHARED, padded, tokens_per_rank=10).moves


PROCESS = """
    import sys
    import jax
    import numpy as np
    rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    import jax_moe as jm
    from tests.jax_moe.layers import SHARED, arrays, tokens

    for name in ("ragged", "padded"):
        parallel = jm.ParallelConfig(dp=2, nodes=2, expert_parallel=True, transport=name)
        mesh = jm.make_mesh(parallel)
        params = jm.shard(jm.from_mapping(arrays(SHARED)), SHARED, parallel, mesh)
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(parallel.token_axes))
        x = tokens(10, 16)
        x = jax.make_array_from_callback(x.shape, place, lambda index: x[index])
        step = jax.jit(lambda p, x: jm.moe(p, x, config=SHARED, parallel=parallel, mesh=mesh))
        np.save(f"{out}/{name}.{rank}.npy", step(params, x).addressable_data(0))
"""


def test_one_process_a_rank_computes_the_same(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(PROCESS)]
    ranks = [
        subprocess.Popen([*command, str(r), port, str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        pytest.fail("\n".join(error[-2000:] for error in errors))
    wanted = dense.layer(arrays(SHARED), tokens(10, 16), SHARED)
    for name in ("ragged", "padded"):
        y = np.concatenate([np.load(tmp_path / f"{name}.{rank}.npy") for rank in range(2)])
        np.testing.assert_allclose(y, wanted, **NARROW)
