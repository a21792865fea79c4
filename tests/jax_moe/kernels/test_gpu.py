"""The kernels on a Hopper GPU, against float64 on adversarial sizes. Run with JAX_PLATFORMS=cuda and -m gpu."""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe as jm
from jax_moe import kernels
from jax_moe.kernels import choice, reference
from jax_moe.kernels import mosaic_gpu_grouped_matmul as wide
from jax_moe.kernels import mosaic_gpu_small_groups as small
from jax_moe.kernels.triton_routing import make_schedule
from tests.jax_moe.kernels.problems import ACTIVATIONS, KINDS, SILU, assert_right, expected, group_sizes, operands

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not choice.runs_on_hopper(), reason="needs a GPU of compute capability 9.0"),
    # JAX 0.11 announces that a later version will be without it; then the reference takes over (hopper.no_triton).
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

TILES = {
    "128 rows": (wide, wide.Tile()),
    "64 rows": (wide, wide.Tile(rows=64)),
    "pairs": (wide, wide.Tile(pair=True)),
    **{f"{rows} tokens": (small, small.Tile(rows=rows)) for rows in (8, 16, 32, 64, 128)},
}


def check(kernel, tile, kind, activation, bias):
    """Compiles and runs one problem twice: right by row, zeros past the end, and the same bits again."""
    spare = 0 if kind == "everything in one" else tile.rows + 37
    weight_rows = 272 if activation is not None and activation.gated else 264
    x, w, sizes, b = operands(group_sizes(kind, tile.rows), 200, weight_rows, spare=spare, bias=bias)

    @jax.jit
    def run(x, w, sizes, b):
        schedule = make_schedule(sizes, rows=x.shape[0], tile=tile.rows)
        return kernel.grouped_matmul(x, w, schedule, activation=activation, bias=b, tile=tile)

    first, second = run(x, w, sizes, b), run(x, w, sizes, b)
    assert_right(first, expected(x, w, sizes, activation=activation, bias=b), int(sizes.sum()))
    np.testing.assert_array_equal(np.asarray(first).view(np.uint16), np.asarray(second).view(np.uint16))


@pytest.mark.parametrize("name", TILES)
def test_every_tile_is_right_at_every_edge(name):
    problems = [(kind, None, kind == "edges") for kind in KINDS] + [(kind, SILU, kind == "edges") for kind in KINDS]
    problems += [("edges", activation, True) for activation in ACTIVATIONS.values()]
    with ThreadPoolExecutor(8) as pool:  # most of the time is compiling
        for done in [pool.submit(check, *TILES[name], *problem) for problem in problems]:
            done.result()


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 8, 128), (64, 8, 256), (300, 4, 40), (8192, 8, 128)])
def test_routing_and_rows_are_the_reference_s(tokens, top_k, experts):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((tokens, experts)), jnp.float32)
    ids, weights = kernels.choose_experts(
        logits, None, top_k=top_k, scoring="softmax", renormalize=True, scaling=1.0, implementation="triton"
    )
    want_ids, want_weights = reference.choose_experts(logits, None, top_k, "softmax", True, 1.0)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=5e-6)
    first, held = experts // 4, experts // 2
    plans = [
        kernels.plan_rows(ids, first, num_local_experts=held, implementation=name) for name in ("triton", "reference")
    ]
    jax.tree.map(np.testing.assert_array_equal, *plans)
    position, sizes = plans[0]
    rows = tokens * top_k
    target = jnp.where(position >= 0, position, rows).reshape(-1)
    index = jnp.full((rows,), -1, jnp.int32).at[target].set(jnp.arange(rows, dtype=jnp.int32) // top_k, mode="drop")
    x = jnp.asarray(rng.standard_normal((tokens, 328)), jnp.bfloat16)
    want = reference.gather_rows(x, index)
    spread = kernels.gather_rows(x, index, position_tK=position, group_sizes_e=sizes, implementation="triton")
    np.testing.assert_array_equal(spread, want)
    np.testing.assert_array_equal(kernels.gather_rows(x, index, implementation="triton"), want)
    combined = kernels.combine_rows(want, position, weights, implementation="triton")
    np.testing.assert_allclose(combined, reference.combine_rows(want, position, weights), rtol=1e-5, atol=1e-5)


LAYERS = {
    "silu": {},
    "swigluoai": {"activation": "swigluoai", "gate_up_layout": "interleaved", "expert_bias": True},
    "relu2": {"activation": "relu2", "gated": False},
    "weight on input": {"router": jm.RouterConfig(weight_on_input=True)},
    "latent and shared": {"latent_size": 128, "num_shared_experts": 1, "shared_gate": True},
    "odd widths": {"hidden_size": 328, "intermediate_size": 136},
}


@pytest.mark.parametrize("tokens", [1, 130, 3000])
@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_with_kernels_is_the_layer_without(name, tokens):
    config = jm.MoEConfig(
        **{"num_experts": 32, "top_k": 4, "hidden_size": 512, "intermediate_size": 256, **LAYERS[name]}
    )
    parallel = jm.ParallelConfig()
    mesh = jm.make_mesh(parallel)
    params = jm.shard(jm.init(jax.random.key(1), config), config, parallel, mesh)
    x = jax.random.normal(jax.random.key(2), (tokens, config.hidden_size), jnp.bfloat16)

    def run(implementation):
        layer = functools.partial(
            jm.moe, config=config, parallel=parallel, mesh=mesh, trace=True, implementation=implementation
        )
        return jax.jit(layer)(params, x)

    (y, trace), (want, want_trace) = run(None), run("reference")
    np.testing.assert_array_equal(trace.topk_ids, want_trace.topk_ids)
    np.testing.assert_array_equal(trace.row_token, want_trace.row_token)
    np.testing.assert_array_equal(trace.group_sizes, want_trace.group_sizes)
    y, want = np.asarray(y, np.float64), np.asarray(want, np.float64)
    assert np.linalg.norm(y - want) <= 2.0**-9 * np.linalg.norm(want)


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
