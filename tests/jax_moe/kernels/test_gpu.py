"""The kernels on a Hopper GPU, against float64 on adversarial sizes. Run with JAX_PLATFORMS=cuda and -m gpu.

Those in Triton, which are for Ampere and Ada too, run here as well.
"""

import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe as jm
from jax_moe import kernels
from jax_moe.kernels import choice
from jax_moe.kernels import mosaic_gpu_any_height as any_height
from jax_moe.kernels import mosaic_gpu_grouped_matmul as wide
from jax_moe.kernels import mosaic_gpu_small_groups as small
from jax_moe.kernels import triton_grouped_matmul as triton
from jax_moe.kernels.triton_routing import make_schedule
from tests.jax_moe.kernels.problems import ACTIVATIONS, KINDS, SILU, assert_right, expected, group_sizes, operands

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not choice.runs_on_hopper(), reason="needs a GPU of compute capability 9.0"),
]

SEVERAL = any_height.Tile(rows=144, lower=4, step=8)
HIGHER = any_height.Tile(rows=176, lower=3)
TILES = {
    "128 rows": (wide, wide.Tile()),
    "136 rows": (any_height, any_height.Tile(rows=136)),
    "144 rows, by two stages": (any_height, any_height.Tile(rows=144, together=2)),
    "176 rows": (any_height, any_height.Tile(rows=176)),
    "128, 144, 160 and 176 rows": (any_height, HIGHER),
    "112, 120, ... 144 rows": (any_height, SEVERAL),
    **{f"{rows} tokens": (small, small.Tile(rows=rows)) for rows in (8, 16, 32, 64, 128)},
    **{f"triton, {tile.rows} rows": (triton, tile) for _, tile in triton.TABLE},
}


def check(kernel, tile, kind, activation, bias, dtype=jnp.bfloat16, depth=200):
    """Compiles and runs one problem twice: right by row, zeros past the end, and the same bits again."""
    spare = 0 if kind == "everything in one" else tile.rows + 37
    weight_rows = 272 if activation is not None and activation.gated else 264
    x, w, sizes, b = operands(group_sizes(kind, tile.rows), depth, weight_rows, spare=spare, bias=bias, dtype=dtype)

    @jax.jit
    def run(x, w, sizes, b):
        schedule = make_schedule(sizes, rows=len(x), tile=tile.rows)
        return kernel.grouped_matmul(x, w, schedule, activation=activation, bias=b, tile=tile)

    first, second = run(x, w, sizes, b), run(x, w, sizes, b)
    assert_right(first, expected(x, w, sizes, activation=activation, bias=b), int(sizes.sum()))
    np.testing.assert_array_equal(np.asarray(first).view(np.uint16), np.asarray(second).view(np.uint16))


@pytest.mark.parametrize("name", TILES)
def test_every_tile_is_right_at_every_edge(name):
    problems = [(kind, None, kind == "edges") for kind in KINDS] + [(kind, SILU, kind == "edges") for kind in KINDS]
    problems += [("edges", activation, True) for activation in ACTIVATIONS.values()]
    problems += [("edges", None, True, jnp.float16), ("mostly empty", SILU, False, jnp.float16)]
    problems.append(("edges", SILU, True, jnp.bfloat16, 328))  # six stages in place of four
    problems.append(("edges", None, False, jnp.bfloat16, 136))  # three
    if getattr(TILES[name][1], "lower", 0):  # several bodies to compile, and a test of their own below
        problems = problems[2::3]
    with ThreadPoolExecutor(8) as pool:  # most of the time is compiling
        for done in [pool.submit(check, *TILES[name], *problem) for problem in problems]:
            done.result()


@pytest.mark.parametrize("activation", [None, SILU])
@pytest.mark.parametrize("several", [SEVERAL, HIGHER], ids=["up to 144 rows", "up to 176"])
def test_the_height_a_tile_gets_changes_no_bit(several, activation):
    sizes = [rows for height in several.heights for rows in (height - 1, height, height + 1, 2 * height + 3)]
    sizes += [0, 1, 18 * several.rows - 9, several.rows + 1, 2 * several.rows + 1]  # past a band, and three lowest
    x, w, sizes, b = operands(sizes, 328, 272, spare=several.rows + 5, bias=True)

    @functools.partial(jax.jit, static_argnums=0)
    def run(tile, x, w, sizes, b):
        schedule = make_schedule(sizes, rows=len(x), tile=tile.rows)
        return any_height.grouped_matmul(x, w, schedule, activation=activation, bias=b, tile=tile)

    first, second, alone = (run(tile, x, w, sizes, b) for tile in (several, several, any_height.Tile(rows=136)))
    assert_right(first, expected(x, w, sizes, activation=activation, bias=b), int(sizes.sum()))
    for other in (second, alone):
        np.testing.assert_array_equal(np.asarray(first).view(np.uint16), np.asarray(other).view(np.uint16))


def in_time(seconds, run, *args):
    """Runs a function of this module in a process of its own, so that a kernel that does not end is a failure."""
    code = f"from {__name__} import *; {run.__name__}(*{args!r})"
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run([sys.executable, "-c", code], env=env, timeout=seconds, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def check_ahead(name, activation, kind):
    """Rows gathered ahead, in two orders in turns, some of no token: right by row, and the same bits each time."""
    kernel, tile = TILES[name]
    activation = ACTIVATIONS[activation]
    x, w, sizes, b = operands(group_sizes(kind, tile.rows), 200, 272, spare=tile.rows + 37, bias=kind == "edges")
    total, rows = int(sizes.sum()), len(x)
    x = jnp.nan_to_num(x).at[-1].set(jnp.nan)  # a token that no row is of

    @jax.jit
    def run(x, w, sizes, b, index):
        schedule = make_schedule(sizes, rows=rows, tile=tile.rows)
        return kernel.grouped_matmul(x, w, schedule, activation=activation, bias=b, tile=tile, index_R=index)

    first = []
    for turn in range(6):
        order = np.random.default_rng(turn % 2).integers(0, rows - 1, rows)
        order[3::17], order[5::29] = -1, rows
        index = jnp.asarray(np.where(np.arange(rows) < total, order, rows - 1), jnp.int32)
        first.append(np.asarray(run(x, w, sizes, b, index)))
        np.testing.assert_array_equal(first[turn].view(np.uint16), first[turn % 2].view(np.uint16))
        if turn < 2:
            gathered = jnp.where((order[:, None] >= 0) & (order[:, None] < rows), x[np.clip(order, 0, rows - 2)], 0)
            assert_right(first[turn], expected(gathered, w, sizes, activation=activation, bias=b), total)


def check_ahead_at_every_edge(name, activation):
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(check_ahead, name, activation, kind) for kind in KINDS]:
            done.result()


def check_ahead_many_times(times):
    """Two orders of tokens in turns, half of the times in one program: the bits of rows that are gathered first."""
    tokens, depth, inter, experts, top_k = 8192, 4096, 1024, 32, 8
    rng, rows = np.random.default_rng(0), 8192 * 8
    sizes = jnp.asarray(rng.multinomial(rows - 99, np.ones(experts) / experts), jnp.int32)
    x = jax.random.normal(jax.random.key(0), (tokens, depth), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (experts, 2 * inter, depth), jnp.bfloat16) * jnp.bfloat16(depth**-0.5)
    index = [jnp.asarray(rng.permutation(np.tile(np.arange(tokens), top_k)), jnp.int32) for _ in range(2)]

    def differ(index, want):
        got = kernels.gather_gate_up(x, index, w, sizes, activation=SILU, implementation="mosaic_gpu")
        return jnp.sum(jax.lax.bitcast_convert_type(got, jnp.uint16) != jax.lax.bitcast_convert_type(want, jnp.uint16))

    gathered_first = jax.jit(lambda index: kernels.gate_up(x[index], w, sizes, activation=SILU))
    want = [gathered_first(index) for index in index]
    once = jax.jit(differ)
    found = [once(index[i % 2], want[i % 2]) for i in range(times // 2)]
    turns = jnp.arange(times // 2) % 2
    loop = jax.jit(lambda *both: jax.lax.map(lambda i: differ(*(jnp.where(i == 0, *two) for two in both)), turns))
    np.testing.assert_array_equal(jnp.stack(found), 0)
    np.testing.assert_array_equal(loop(index, want), 0)


@pytest.mark.parametrize(
    ("name", "activation"),
    [("128 rows", "silu"), ("136 rows", "silu"), ("128 rows", "relu2"), ("128, 144, 160 and 176 rows", "relu2")],
)
def test_rows_gathered_ahead_are_right_at_every_edge_and_where_there_are_none(name, activation):
    in_time(120, check_ahead_at_every_edge, name, activation)


def test_rows_gathered_ahead_have_the_same_bits_two_hundred_times():
    in_time(120, check_ahead_many_times, 200)


def router_of(kind, tokens, experts):
    """Logits: drawn; or so that 250 of 256 experts, or all but top-k of them, get no token."""
    logits = np.random.default_rng(0).standard_normal((tokens, experts)).astype(np.float32)
    kept = {"drawn": experts, "six experts": 6, "four experts": 4}[kind]
    logits[:, np.random.default_rng(1).permutation(experts)[kept:]] -= 100.0
    return logits


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(
    ("kind", "tokens", "top_k", "experts", "width"),
    [
        ("drawn", 1, 8, 128, 8),
        ("drawn", 64, 8, 256, 1032),  # one column tile and 8 more
        ("six experts", 255, 4, 256, 328),
        ("six experts", 256, 4, 256, 1024),
        ("four experts", 257, 4, 40, 2056),
        ("drawn", 300, 4, 40, 328),
        ("drawn", 8192, 8, 128, 136),
        ("drawn", 65537, 8, 40, 8),  # more than 4096 blocks of the sort
    ],
)
def test_routing_and_rows_are_the_formulas(kind, tokens, top_k, experts, width, dtype):
    logits = router_of(kind, tokens, experts)
    ids, weights = kernels.choose_experts(
        jnp.asarray(logits),
        None,
        top_k=top_k,
        scoring="softmax",
        renormalize=True,
        scaling=1.0,
        implementation="triton",
    )
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1, kind="stable")[:, :top_k])
    chosen = np.exp(np.take_along_axis(logits, np.asarray(ids), axis=1).astype(np.float64))
    np.testing.assert_allclose(weights, chosen / chosen.sum(axis=1, keepdims=True), rtol=5e-6)

    first, held = experts // 4, experts // 2
    position, sizes, pair = kernels.plan_rows(ids, first, num_local_experts=held, implementation="triton")
    key = np.asarray(ids).reshape(-1) - first
    key = np.where((key >= 0) & (key < held), key, held)
    np.testing.assert_array_equal(sizes, np.bincount(key, minlength=held + 1)[:held])
    place = np.empty(key.size, np.int64)
    place[np.argsort(key, kind="stable")] = np.arange(key.size)
    np.testing.assert_array_equal(position, np.where(key < held, place, -1).reshape(tokens, top_k))

    rows = tokens * top_k
    by_row = np.full(rows, -1)
    by_row[place[key < held]] = np.flatnonzero(key < held)
    np.testing.assert_array_equal(pair, by_row[: tokens * min(top_k, held)])
    index = np.where(by_row < 0, -1, by_row // top_k)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((tokens, width)), dtype)
    want = np.where((index >= 0)[:, None], np.asarray(x)[index], np.zeros_like(x[:1]))
    given = jnp.asarray(index, jnp.int32)
    spread = kernels.gather_rows(x, given, position_tK=position, group_sizes_e=sizes, implementation="triton")
    np.testing.assert_array_equal(spread, want)
    np.testing.assert_array_equal(kernels.gather_rows(x, given, implementation="triton"), want)
    weight = np.where(np.asarray(position) >= 0, np.asarray(weights, np.float64), 0.0)
    total = (want.astype(np.float64)[np.asarray(position)] * weight[:, :, None]).sum(axis=1)
    for name in ("triton", "reference"):
        combined = kernels.combine_rows(jnp.asarray(want), position, weights, implementation=name)
        np.testing.assert_allclose(combined, total, rtol=1e-5, atol=1e-5)


WIDE = {
    # Of a row's norm: each operand is off by up to 2^-10 where its bits are cut, and by about 2^-12 where rounded.
    "tf32": (2.0**-14, 2.0**-9),
    "float32": (0.0, 2.0**-20),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("asked", "name", "activation"),
    [("tf32", "triton", None), ("tf32", "triton", SILU), ("tf32", "reference", None), ("float32", "reference", None)],
    ids=["TF32 in Triton", "TF32 in Triton, gated", "TF32 in XLA", "float32 in XLA"],
)
def test_float32_products_are_off_by_what_was_asked_for(asked, name, kind, activation):
    x, w, sizes, b = operands(group_sizes(kind, 128), 200, 264, spare=37, bias=True, dtype=jnp.float32)
    total = int(sizes.sum())

    def run(x, w, sizes, b):
        if activation is None:
            return kernels.grouped_matmul(x, w, sizes, bias_eN=b, implementation=name)
        return kernels.gate_up(x, w, sizes, activation=activation, bias_eM=b, implementation=name)

    with jax.default_matmul_precision("tensorfloat32" if asked == "tf32" else None):
        y = np.asarray(jax.jit(run)(x, w, sizes, b), np.float64)
    want = expected(x, w, sizes, activation=activation, bias=b)
    assert (y[total:] == 0).all()
    least, most = WIDE[asked]
    error = np.linalg.norm(y[:total] - want[:total], axis=1) / np.maximum(np.linalg.norm(want[:total], axis=1), 1e-30)
    if total:
        print(f"{asked}, {name}, {kind}: {error.min():.2e} to {error.max():.2e}")
        assert least <= error.max() < most


def test_a_batch_under_vmap_has_the_bits_of_its_elements():
    x, w, sizes, b = operands([65, 0, 40], 200, 272, spare=9, bias=True)
    xs, some = jnp.stack([x, x[::-1], x * 2]), jnp.stack([sizes, sizes[::-1], jnp.array([0, 1, 0])])
    xs = jnp.where(jnp.isnan(xs), 0, xs)
    for name in ("mosaic_gpu", "triton"):

        def run(x, sizes, name=name):
            return kernels.gate_up(x, w, sizes, activation=SILU, bias_eM=b, implementation=name)

        got = jax.jit(jax.vmap(run))(xs, some)
        for i in range(3):
            np.testing.assert_array_equal(
                np.asarray(got[i]).view(np.uint16), np.asarray(jax.jit(run)(xs[i], some[i])).view(np.uint16)
            )


LAYERS = {
    "silu": {},
    "swigluoai": {"activation": "swigluoai", "gate_up_layout": "interleaved", "expert_bias": True},
    "relu2": {"activation": "relu2", "gated": False},
    "weight on input": {"router": jm.RouterConfig(weight_on_input=True)},
    "latent and shared": {"latent_size": 128, "num_shared_experts": 1, "shared_gate": True},
    "odd widths": {"hidden_size": 328, "intermediate_size": 136},
}


@pytest.mark.parametrize(
    ("tokens", "implementation", "dtype"),
    [
        *((tokens, None, "bfloat16") for tokens in (1, 130, 3000)),
        (130, "mosaic_gpu", "float16"),
        (130, "triton", "bfloat16"),
        (3000, "triton", "float16"),
    ],
)
@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_with_kernels_is_the_layer_without(name, tokens, implementation, dtype):
    config = jm.MoEConfig(
        **{"num_experts": 32, "top_k": 4, "hidden_size": 512, "intermediate_size": 256, "dtype": dtype, **LAYERS[name]}
    )
    parallel = jm.ParallelConfig()
    mesh = jm.make_mesh(parallel)
    params = jm.shard(jm.init(jax.random.key(1), config), config, parallel, mesh)
    x = jax.random.normal(jax.random.key(2), (tokens, config.hidden_size), jnp.dtype(dtype))

    def run(implementation):
        layer = functools.partial(
            jm.moe, config=config, parallel=parallel, mesh=mesh, trace=True, implementation=implementation
        )
        return jax.jit(layer)(params, x)

    (y, trace), (want, want_trace) = run(implementation), run("reference")
    np.testing.assert_array_equal(trace.topk_ids, want_trace.topk_ids)
    np.testing.assert_array_equal(trace.row_token, want_trace.row_token)
    np.testing.assert_array_equal(trace.group_sizes, want_trace.group_sizes)
    y, want = np.asarray(y, np.float64), np.asarray(want, np.float64)
    assert np.linalg.norm(y - want) <= float(jnp.finfo(jnp.dtype(dtype)).eps) / 4 * np.linalg.norm(want)


def test_padding_that_holds_nan_changes_nothing():
    config = jm.MoEConfig(num_experts=32, top_k=4, hidden_size=512, intermediate_size=256)
    parallel = jm.ParallelConfig()
    mesh = jm.make_mesh(parallel)
    params = jm.shard(jm.init(jax.random.key(1), config), config, parallel, mesh)
    x = jax.random.normal(jax.random.key(2), (64, 512), jnp.bfloat16)
    run = jax.jit(lambda x: jm.moe(params, x, config=config, parallel=parallel, mesh=mesh, counts=jnp.array([40])))
    y, with_nan = np.asarray(run(x), np.float32), np.asarray(run(x.at[40:].set(jnp.nan)), np.float32)
    np.testing.assert_array_equal(y, with_nan)
    assert (y[40:] == 0).all()


def test_a_gradient_through_the_kernels_is_the_reference_s():
    config = jm.MoEConfig(num_experts=8, top_k=2, hidden_size=128, intermediate_size=64)
    parallel = jm.ParallelConfig()
    mesh = jm.make_mesh(parallel)
    params = jm.shard(jm.init(jax.random.key(1), config), config, parallel, mesh)
    x = jax.random.normal(jax.random.key(2), (96, 128), jnp.bfloat16)

    def gradients(implementation):
        def loss(params, x):
            y = jm.moe(params, x, config=config, parallel=parallel, mesh=mesh, implementation=implementation)
            return jnp.var(y.astype(jnp.float32))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)

    for got, want in zip(jax.tree.leaves(gradients(None)), jax.tree.leaves(gradients("reference")), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert np.linalg.norm(got - want) <= 2.0**-7 * np.linalg.norm(want)


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_a_layer_under_vmap_is_each_of_its_batch_forward_and_backward(implementation):
    config = jm.MoEConfig(num_experts=8, top_k=2, hidden_size=128, intermediate_size=64)
    parallel = jm.ParallelConfig()
    mesh = jm.make_mesh(parallel)
    params = jm.shard(jm.init(jax.random.key(1), config), config, parallel, mesh)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), params)
    x = jax.random.normal(jax.random.key(2), (2, 96, 128), jnp.bfloat16)

    def loss(params, x):
        y = jm.moe(params, x, config=config, parallel=parallel, mesh=mesh, implementation=implementation)
        return jnp.var(y.astype(jnp.float32)), y

    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    ((_, y), gradients) = jax.jit(jax.vmap(step))(many, x)
    for i, own in enumerate((params, jax.tree.map(jnp.negative, params))):
        (_, want), want_gradients = jax.jit(step)(own, x[i])
        np.testing.assert_array_equal(np.asarray(y[i], np.float32), np.asarray(want, np.float32))
        for got, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
            got, wanted = np.asarray(got[i], np.float64), np.asarray(wanted, np.float64)
            assert np.linalg.norm(got - wanted) <= 2.0**-7 * np.linalg.norm(wanted)


def test_in_debug_mode_sizes_that_do_not_fit_do_no_harm():
    x, w, _, _ = operands([100], 200, 264)
    w = jnp.concatenate([w, w, w])
    for name in ("mosaic_gpu", "triton", "reference"):
        y, clipped = jax.jit(lambda s, name=name: kernels.grouped_matmul(x, w, s, implementation=name, debug=True))(
            jnp.array([60, -7, 2**30])
        )
        assert_right(y, expected(x, w, [60, 0, 40]), 100)
        assert int(clipped) == 7 + (2**31 - 1) // 3
