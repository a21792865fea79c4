"""The whole layer in every parallel mode against one dense formula in float64."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_moe as jm
from jax_moe import layer

from . import dense
from .layers import MODES, PLAIN, RICH, SHARED, arrays, compiled, num_shards, real_rows, run, sharded, tokens

ROWS = 4
NARROW = {"rtol": 1e-5, "atol": 1e-5}


def uneven(parallel, rows=ROWS):
    """Counts with a full shard, an empty one, and some between."""
    return np.array([[rows, 0, 1, rows - 1][i % 4] for i in range(num_shards(parallel))], np.int32)


def with_router(config, **fields):
    return dataclasses.replace(config, router=dataclasses.replace(config.router, **fields))


def padded(parallel, seed=1):
    """Counts, x with NaN in its padding, and which rows are tokens; of one shape, so that tests share programs."""
    counts, rows = uneven(parallel), ROWS + 1
    real = real_rows(counts, rows)
    x = tokens(len(real), 16, seed=seed)
    x[~real] = np.nan
    return counts, x, real


@pytest.mark.parametrize(
    ("config", "mode"),
    [(RICH, mode) for mode in MODES] + [(SHARED, mode) for mode in ("tp2", "dp2.tp2.ep", "dp2.tp2.ep.nosp")],
    ids=lambda value: value if isinstance(value, str) else "rich" if value is RICH else "shared",
)
def test_every_mode_is_the_dense_formula_with_uneven_shards_and_nan_padding(config, mode):
    parallel = MODES[mode]
    counts, x, real = padded(parallel)
    y, _ = run(config, parallel, x, counts=counts, trace=True)
    np.testing.assert_allclose(y[real], dense.layer(arrays(config), x[real], config), **NARROW)
    assert (y[~real] == 0).all()


@pytest.mark.parametrize(
    ("mode", "dtype", "roundoff"),
    [("dp2.tp2", "bfloat16", 2**-8), ("dp2.tp2.ep", "bfloat16", 2**-8), ("dp2.tp2.ep", "float16", 2**-11)],
)
def test_in_a_narrow_dtype_every_value_is_within_a_few_roundings(mode, dtype, roundoff):
    parallel = MODES[mode]
    config = dataclasses.replace(SHARED, dtype=dtype, shared_gate=True, num_experts=16, hidden_size=64)
    x = tokens(8 * num_shards(parallel), 64, dtype)
    y, wanted = run(config, parallel, x), dense.layer(arrays(config), x, config)
    error = np.linalg.norm(y - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    # Roundings of h, of the down result and of the output: 0.4 of the roundoff each, independent.
    assert error.max() < 2 * 0.4 * roundoff * np.sqrt(3)


@pytest.mark.parametrize(("tp", "rows"), [(2, 0), (2, 1), (2, 2), (2, 3), (4, 1), (4, 3), (4, 4), (4, 5)])
def test_sequence_parallelism_returns_exactly_the_tokens_that_came(tp, rows):
    parallel = jm.ParallelConfig(dp=2, tp=tp, expert_parallel=True)
    x = tokens(rows * 2, 16)
    y = run(SHARED, parallel, x)
    assert y.shape == x.shape
    np.testing.assert_allclose(y, dense.layer(arrays(SHARED), x, SHARED), **NARROW)


def test_one_token_over_two_tp_ranks_is_not_taken_for_a_shard():
    for parallel in (MODES["tp2.ep.sp"], MODES["tp2.ep"], MODES["tp2"]):
        x = tokens(1, 16)
        np.testing.assert_allclose(run(PLAIN, parallel, x), dense.layer(arrays(PLAIN), x, PLAIN), **NARROW)


@pytest.mark.parametrize("mode", ["dp2", "dp2.tp2", "dp2.ep", "dp2.tp2.ep", "dp2.tp2.ep.native"])
def test_one_busy_rank_and_idle_others(mode):
    parallel = MODES[mode]
    counts, rows = np.zeros(num_shards(parallel), np.int32), ROWS + 1
    counts[-1] = rows
    x = tokens(rows * num_shards(parallel), 16)
    y, _ = run(RICH, parallel, x, counts=counts, trace=True)
    np.testing.assert_allclose(y[-rows:], dense.layer(arrays(RICH), x[-rows:], RICH), **NARROW)
    assert (y[:-rows] == 0).all()


def test_no_real_tokens_at_all():
    x = np.full((2 * (ROWS + 1), 16), np.nan, np.float32)
    y, trace = run(RICH, MODES["dp2.tp2.ep"], x, counts=np.zeros(2, np.int32), trace=True)
    assert (y == 0).all()
    assert trace.expert_load.sum() == trace.group_sizes.sum() == 0


@pytest.mark.parametrize("mode", ["tp2", "dp2.tp2.ep.nosp"])
def test_router_weight_on_the_input(mode):
    config = with_router(SHARED, weight_on_input=True)
    x = tokens(ROWS * num_shards(MODES[mode]), 16)
    np.testing.assert_allclose(run(config, MODES[mode], x), dense.layer(arrays(config), x, config), **NARROW)


@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        ("tp2", {"activation": "swigluoai", "gate_up_layout": "interleaved"}),
        ("tp2", {"activation": "swigluoai"}),
        ("tp2", {"activation": "relu2", "gated": False}),
        ("dp2.tp2.ep.nosp", {"activation": "gelu", "gate_up_layout": "interleaved"}),
    ],
    ids=str,
)
def test_layouts_and_activations_survive_the_split(mode, fields):
    config = dataclasses.replace(SHARED, **fields)
    x = tokens(ROWS * num_shards(MODES[mode]), 16) * 4
    np.testing.assert_allclose(
        run(config, MODES[mode], x), dense.layer(arrays(config), x, config), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("mode", ["dp2.tp2.ep", "dp2.tp2.ep.native"])
def test_logits_may_be_given_with_nan_in_padding(mode):
    parallel, config = MODES[mode], with_router(SHARED, source="logits", renormalize=True)
    counts, x, real = padded(parallel)
    logits = tokens(len(real), 8, seed=5)
    logits[~real] = np.nan
    y = run(config, parallel, x, router_logits=logits, counts=counts)
    wanted = dense.layer(arrays(config), x[real], config, router_logits=logits[real])
    np.testing.assert_allclose(y[real], wanted, **NARROW)
    assert (y[~real] == 0).all()


@pytest.mark.parametrize("mode", ["dp2.tp2.ep", "dp2.tp2.ep.native"])
def test_ids_and_weights_may_be_given_and_are_used_as_they_are(mode):
    parallel, config = MODES[mode], with_router(SHARED, source="ids", renormalize=True, scaling_factor=3.0)
    counts, x, real = padded(parallel)
    rng = np.random.default_rng(3)
    ids = np.array([rng.permutation(8)[:3] for _ in range(len(real))], np.int32)
    weights = rng.standard_normal((len(real), 3)).astype(np.float32)
    ids[~real], weights[~real] = 10**6, np.nan
    y = run(config, parallel, x, topk_ids=ids, topk_weights=weights, counts=counts)
    wanted = dense.layer(arrays(config), x[real], config, topk_ids=ids[real], topk_weights=weights[real])
    np.testing.assert_allclose(y[real], wanted, **NARROW)
    assert (y[~real] == 0).all()


def test_a_given_id_that_is_no_expert_goes_nowhere():
    config = with_router(PLAIN, source="ids")
    x, weights = tokens(2, 16), np.ones((2, 3), np.float32)
    y, trace = run(
        config, MODES["one rank"], x, topk_ids=np.array([[0, -1, 8], [1, 2, 3]]), topk_weights=weights, trace=True
    )
    one = dense.layer(arrays(config), x[:1], config, topk_ids=[[0]], topk_weights=[[1.0]])
    np.testing.assert_allclose(y[:1], one, **NARROW)
    assert trace.expert_load.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert trace.router_logits is None


@pytest.mark.parametrize("parallel", MODES.values(), ids=MODES)
def test_the_trace_says_what_was_decided(parallel):
    counts, x, real = padded(parallel)
    _, trace = run(RICH, parallel, x, counts=counts, trace=True)
    fields = {f.name: getattr(trace, f.name) for f in dataclasses.fields(trace) if f.name != "stages"}
    ranks = [{name: np.split(a, parallel.world)[r] for name, a in fields.items()} for r in range(parallel.world)]

    logits = x[real].astype(np.float64) @ arrays(RICH)["router.gate"].T.astype(np.float64)
    routed = [dense.route_token(row, arrays(RICH)["router.bias"], RICH) for row in logits]
    ids = np.array([ids for ids, _ in routed])
    load = np.bincount(ids.reshape(-1), minlength=8)
    local = 8 // parallel.ep
    for number, rank in enumerate(ranks):
        token = rank["token_index"]
        here = token >= 0
        np.testing.assert_array_equal(rank["topk_ids"][here], ids[token[here]])
        np.testing.assert_allclose(rank["topk_weights"][here], np.array([w for _, w in routed])[token[here]], rtol=1e-5)
        np.testing.assert_allclose(rank["router_logits"][here], logits[token[here]], rtol=1e-4, atol=1e-5)
        assert (rank["topk_ids"][~here] == 8).all()
        assert (rank["topk_weights"][~here] == 0).all()
        np.testing.assert_array_equal(rank["expert_load"], load)
        first = number * local if parallel.expert_parallel else 0
        seen = range(len(ids)) if parallel.expert_parallel else token[here].tolist()
        rows_here = sorted((ids[t, k], t, k) for t in seen for k in range(3) if first <= ids[t, k] < first + local)
        assert rank["row_token"].tolist()[: len(rows_here)] == [t for _, t, _ in rows_here]
        assert rank["row_slot"].tolist()[: len(rows_here)] == [k for _, _, k in rows_here]
        assert (rank["row_token"][len(rows_here) :] == -1).all()
        assert rank["group_sizes"].sum() == len(rows_here)
    tokens_seen = [t for rank in ranks for t in rank["token_index"] if t >= 0]
    copies = 1 if parallel.sp else parallel.tp
    assert sorted(tokens_seen) == sorted(list(range(len(ids))) * copies)


@pytest.mark.parametrize("trace_of", ["one rank", "dp2.tp2", "dp2.tp2.ep"])
def test_the_trace_of_no_rows_has_the_shapes_of_any_other(trace_of):
    parallel = MODES[trace_of]
    y, none = run(RICH, parallel, tokens(0, 16), trace=True)
    assert y.shape == (0, 16)
    counts, x, _ = padded(parallel)
    _, some = run(RICH, parallel, x, counts=counts, trace=True)
    described = ([(str(path), a.dtype, a.shape[1:]) for path, a in jax.tree.leaves_with_path(t)] for t in (none, some))
    assert next(described) == next(described)
    assert none.expert_load.shape == some.expert_load.shape
    assert none.group_sizes.shape == some.group_sizes.shape


LOCAL = ("one rank", "dp2.tp2", "dp2.ep", "dp2.tp2.ep", "dp2.tp2.ep.nosp", "dp2.tp2.ep.native")


@pytest.mark.parametrize(
    ("mode", "check_vma"), [(mode, True) for mode in LOCAL] + [("dp2.tp2.ep", False), ("dp2.tp2.ep.nosp", False)]
)
def test_moe_local_in_a_shard_map_of_ones_own_is_moe(mode, check_vma):
    parallel = MODES[mode]
    params, mesh = sharded(RICH, parallel)
    counts, x, _ = padded(parallel)
    rows = P(("dp", "tp")) if parallel.native else P("dp")

    def body(params, x, counts):
        return jm.moe_local(params, 2 * x, config=RICH, parallel=parallel, counts=counts)

    specs = (jm.param_specs(RICH, parallel), rows, P())
    step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=check_vma))
    expected, _ = run(RICH, parallel, 2 * x, counts=counts, trace=True)
    np.testing.assert_allclose(step(params, x, counts), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["one rank", "dp2.tp2", "dp2.tp2.ep", "dp2.tp2.ep.nosp", "dp2.tp2.ep.native"])
def test_gradients_are_those_of_one_rank_and_of_finite_differences(mode):
    parallel, config = MODES[mode], RICH
    counts, x, real = padded(parallel)
    weigh = tokens(len(real), 16, seed=9)
    params, mesh = sharded(config, parallel)

    @jax.jit
    def gradients(params, x):
        def loss(params, x):
            return jnp.sum(jm.moe(params, x, config=config, parallel=parallel, mesh=mesh, counts=counts) * weigh)

        return jax.grad(loss, argnums=(0, 1))(params, x)

    by_params, by_x = gradients(params, x)
    by_x, by_name = np.asarray(by_x, np.float64), jm.to_mapping(jm.unshard(by_params, config))
    assert (by_x[~real] == 0).all()

    def dense_loss(arrays, x):
        return np.sum(dense.layer(arrays, x, config) * weigh[real])

    given, rng = {n: np.asarray(a, np.float64) for n, a in arrays(config).items()}, np.random.default_rng(0)
    for name, array in [*given.items(), ("x", x[real].astype(np.float64))]:
        if name == "router.bias":
            assert not by_name[name].any()
            continue
        direction = rng.standard_normal(array.shape)
        step = 1e-5 * direction

        def at(moved, name=name):
            return dense_loss(given, moved) if name == "x" else dense_loss({**given, name: moved}, x[real])

        slope = (at(array + step) - at(array - step)) / 2e-5
        actual = np.sum((by_x[real] if name == "x" else np.asarray(by_name[name], np.float64)) * direction)
        assert actual == pytest.approx(slope, rel=2e-3, abs=2e-3), name


def test_without_a_jit_around_it_the_layer_is_compiled_once():
    parallel = MODES["dp2.ep"]
    params, mesh = sharded(PLAIN, parallel)
    x = tokens(4, 16)
    before = layer._compiled._cache_size()
    for _ in range(2):
        y = jm.moe(params, x, config=PLAIN, parallel=parallel, mesh=mesh)
        np.testing.assert_allclose(y, dense.layer(arrays(PLAIN), x, PLAIN), **NARROW)
    assert layer._compiled._cache_size() == before + 1


def test_a_repeated_run_is_equal_bit_for_bit():
    counts, x, _ = padded(MODES["dp2.tp2.ep.nosp"])
    step = compiled(RICH, MODES["dp2.tp2.ep.nosp"], trace=True)
    one, other = (step(x, {"counts": counts}) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def stacked(one, args):
    """`one` on each of a batch in turn."""
    leaves, tree = jax.tree.flatten(args)
    return np.stack([one(*jax.tree.unflatten(tree, each)) for each in zip(*leaves, strict=True)])


@pytest.mark.parametrize("mode", ["one rank", "dp2.tp2.ep"])
def test_under_vmap_tokens_or_tokens_and_parameters_are_a_batch(mode):
    parallel = MODES[mode]
    params, mesh = sharded(PLAIN, parallel)

    @jax.jit
    def layer(params, x):
        return jm.moe(params, x, config=PLAIN, parallel=parallel, mesh=mesh)

    x = np.stack([tokens(ROWS * num_shards(parallel), 16, seed=seed) for seed in range(3)])
    got = jax.jit(jax.vmap(layer, (None, 0)))(params, x)
    np.testing.assert_allclose(got, stacked(lambda x: layer(params, x), (x,)), **NARROW)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, leaf / 2]), params)
    np.testing.assert_allclose(jax.jit(jax.vmap(layer))(many, x), stacked(layer, (many, x)), **NARROW)


def test_products_of_float32_are_float32_unless_tf32_is_asked_for_and_the_router_s_always():
    params, mesh = sharded(SHARED, MODES["one rank"])
    x = tokens(ROWS, 16)

    def products():
        """The precision of each product in the layer's program, before anything optimizes it; then the values."""
        step = jax.jit(lambda x: jm.moe(params, x, config=SHARED, parallel=MODES["one rank"], mesh=mesh))
        found = re.findall(r"dot_general.*precision = \[(\w+), \w+\]", step.lower(x).as_text())
        return collections.Counter(found), step(x)

    full, y = products()
    assert set(full) == {"HIGHEST"}
    with jax.default_matmul_precision("tensorfloat32"):
        narrow, y_narrow = products()
    assert narrow["HIGHEST"] == 1  # the router's
    assert narrow["HIGH"] == full["HIGHEST"] - 1 >= 4
    np.testing.assert_array_equal(y, y_narrow)  # CPUs have no TF32
    with jax.default_matmul_precision("bfloat16"):
        assert products()[0] == full
