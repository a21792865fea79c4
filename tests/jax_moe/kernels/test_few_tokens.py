"""The routed experts of few tokens as one operation: kernels for CUDA, interpreted, and on a card."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

import jax_moe as jm
from jax_moe import kernels, layer
from jax_moe.kernels import choice, hopper, reference
from jax_moe.kernels import mosaic_gpu_small_groups as small
from tests.jax_moe.kernels.problems import ACTIVATIONS, assert_right, expected, operands

needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="the GPU interpreter of this JAX cannot transpose references; that of 0.11 can",
)
needs_card = pytest.mark.skipif(choice.capability() != "9.0", reason="needs a GPU of compute capability 9.0")
PARALLEL = jm.ParallelConfig()

LAYERS = {
    "silu": {},
    "swigluoai": {"activation": "swigluoai", "gate_up_layout": "interleaved", "expert_bias": True},
    "relu2": {"activation": "relu2", "gated": False},
    "groups": {
        "router": jm.RouterConfig(
            scoring="sigmoid", num_groups=4, groups_kept=2, score_correction_bias=True, renormalize=True
        )
    },
    "shared": {"num_shared_experts": 1, "shared_gate": True},
    "every expert": {"num_experts": 4, "top_k": 4},
}


def config_of(name, **widths):
    sizes = {"num_experts": 8, "top_k": 2, "hidden_size": 72, "intermediate_size": 80}
    return jm.MoEConfig(**{**sizes, **widths, **LAYERS[name]})


def problem(config, tokens):
    mesh = jm.make_mesh(PARALLEL)
    params = jm.shard(jm.init(jax.random.key(0), config), config, PARALLEL, mesh)
    x = jax.random.normal(jax.random.key(tokens), (tokens, config.hidden_size)).astype(config.dtype)
    return params, x


def forward(config, implementation=None, *, trace=False):
    return lambda params, x: layer._forward(
        params, x, {}, None, None, config, PARALLEL, implementation, trace
    )  # what `moe` maps over its mesh; there a CPU would decide for the reference


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(choice, "capability", lambda: "9.0")


@pytest.fixture
def interpreted(monkeypatch, on_hopper):
    """Kernels run in plain JAX and in the GPU interpreter. Counts how often the routing kernel was called."""
    call, multiply, calls = pl.pallas_call, small.grouped_matmul, []

    def interpret(*args, compiler_params=None, **options):
        calls.append(options["name"])
        return call(*args, interpret=True, **options)

    monkeypatch.setattr(pl, "pallas_call", interpret)
    monkeypatch.setattr(
        small, "grouped_matmul", functools.partial(multiply, interpret=getattr(plgpu, "InterpretGPUParams", None)())
    )
    return calls


def few_schedule(chosen):
    """Records for (t, E) bools, by loops."""
    records, start = [], 0
    busy = np.flatnonzero(chosen.any(axis=0))
    for number, expert in enumerate(busy):
        tokens = np.flatnonzero(chosen[:, expert])
        records.append([expert, number, 1, start, len(tokens), len(busy), sum(1 << int(t) for t in tokens), 0])
        start += len(tokens)
    return jnp.asarray(records, jnp.int32).reshape(-1)


def every_row(chosen):
    return np.concatenate([np.flatnonzero(chosen[:, e]) for e in range(chosen.shape[1])])


@needs_interpreter
@pytest.mark.parametrize(
    ("tokens", "tile", "activation"), [(1, 8, "silu"), (3, 8, None), (8, 8, "interleaved"), (13, 16, "relu2")]
)
def test_tokens_are_multiplied_where_they_lie(tokens, tile, activation):
    rng = np.random.default_rng(tokens)
    chosen = rng.random((tokens, 5)) < 0.5
    chosen[:, 1], chosen[-1, 2] = False, True  # one expert that nobody chose, one that the last token did
    sizes = chosen.sum(axis=0)
    x, w, _, bias = operands([tokens] + [0] * 4, 136, 144, bias=True)
    rows = x[every_row(chosen)]
    activation = activation and ACTIVATIONS[activation]
    got = small.grouped_matmul(
        x, w, few_schedule(chosen), activation=activation, bias=bias, tile=small.Tile(rows=tile), rows=len(rows),
        interpret=plgpu.InterpretGPUParams(),
    )  # fmt: skip
    assert_right(got, expected(rows, w, sizes, activation=activation, bias=bias), len(rows))


@pytest.mark.parametrize("tokens", [1, 13])
def test_products_of_tokens_lower_for_cuda(tokens):
    x, w, _, _ = operands([tokens] + [0] * 4, 200, 272)
    work = few_schedule(np.ones((tokens, 5), bool))

    def run(x, w, work):
        return small.grouped_matmul(
            x, w, work, activation=ACTIVATIONS["silu"], tile=small.Tile(rows=16), rows=5 * tokens
        )

    program = jax.jit(run).trace(x, w, work).lower(lowering_platforms=("cuda",)).as_text()
    assert "moe_gate_up_small" in program
    assert "stablehlo.pad" not in program  # to the tile: that would be a launch of its own


@needs_interpreter
@pytest.mark.parametrize(("name", "tokens"), [("silu", 1), ("swigluoai", 5), ("groups", 3), ("every expert", 2)])
def test_few_tokens_come_out_as_the_reference_has_them(interpreted, name, tokens):
    config = config_of(name)
    params, x = problem(config, tokens)
    got = np.asarray(forward(config)(params, x), np.float64)
    assert interpreted == ["moe_route"]
    want = np.asarray(forward(config, "reference")(params, x), np.float64)
    assert np.linalg.norm(got - want) <= 2.0**-8 * np.linalg.norm(want)


@needs_interpreter
def test_gradients_are_the_reference_s_for_the_choice_that_was_made(interpreted):
    config = config_of("groups")
    params, x = problem(config, 5)

    def gradients(implementation):
        def loss(params, x):
            return jnp.var(forward(config, implementation)(params, x).astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1))(params, x)

    for got, want in zip(jax.tree.leaves(gradients(None)), jax.tree.leaves(gradients("reference")), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert np.linalg.norm(got - want) <= 2.0**-7 * np.linalg.norm(want) + 1e-12


def test_the_layer_takes_the_operation_where_all_is_here_and_shown_to_nobody(monkeypatch, on_hopper):
    taken = []

    def few_tokens(*operands):
        taken.append(operands[0].shape[0])
        return reference.few_tokens(*operands)

    monkeypatch.setitem(kernels.OPERATIONS["few_tokens"], "mosaic_gpu", few_tokens)
    config = config_of("silu")
    for tokens in (1, 8):
        jax.eval_shape(forward(config), *problem(config, tokens))
    assert taken == [1, 8]
    params, x = problem(config, 4)
    given = layer._few_tokens(
        params, x, {"router_logits": jnp.zeros((4, 8))}, config, PARALLEL, ACTIVATIONS["silu"], None
    )
    assert given is not None
    assert taken.pop() == 4
    for implementation in ("reference", "triton", "mosaic_gpu"):  # a name means each operation
        assert layer._few_tokens(params, x, {}, config, PARALLEL, ACTIVATIONS["silu"], implementation) is None
    assert taken == [1, 8]


def test_explain_says_when_it_runs_and_that_groups_have_a_kernel(on_hopper):
    config = config_of("groups")
    few, more, named, mesh = (
        jm.explain(config, PARALLEL, tokens_per_rank=8).kernels,
        jm.explain(config, PARALLEL, tokens_per_rank=9).kernels,
        jm.explain(config, PARALLEL, tokens_per_rank=8, implementation="mosaic_gpu").kernels,
        jm.explain(config, PARALLEL, jm.make_mesh(PARALLEL), tokens_per_rank=8).kernels,
    )
    assert "choose_experts: triton" in few
    assert few.endswith("all in one few_tokens: mosaic_gpu")
    for other in (more, named, mesh):
        assert "few_tokens" not in other


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": 9}, "9 tokens: expected at most 8"),
        ({"tokens": 0}, "nothing to route"),
        ({"experts": 513}, "513 experts"),
        ({"dtype": jnp.float32}, "float32"),
        ({"inter": 56}, "depth 56"),
    ],
)
def test_what_it_cannot_take_has_a_reason(change, reason):
    size = {"tokens": 4, "experts": 8, "inter": 80, "dtype": jnp.bfloat16, **change}
    shape = jax.ShapeDtypeStruct
    x, logits = shape((size["tokens"], 72), size["dtype"]), shape((size["tokens"], size["experts"]), jnp.float32)
    up = shape((size["experts"], 2 * size["inter"], 72), size["dtype"])
    down = shape((size["experts"], 72, size["inter"]), size["dtype"])
    why = hopper.no_few_tokens(x, logits, None, up, None, down, None, ACTIVATIONS["silu"], kernels.Rule(top_k=2))
    assert reason in why


def test_shapes_that_do_not_fit_are_named():
    x, logits = jnp.zeros((3, 8)), jnp.zeros((3, 4))
    up, down = jnp.zeros((4, 12, 8)), jnp.zeros((4, 8, 6))
    run = functools.partial(kernels.few_tokens, activation=ACTIVATIONS["silu"], rule=kernels.Rule(top_k=2))
    assert run(x, logits, None, up, down).shape == (3, 8)
    with pytest.raises(ValueError, match=r"logits \(3, 5\)"):
        run(x, jnp.zeros((3, 5)), None, up, down)
    with pytest.raises(ValueError, match=r"expected \(R, D\)"):
        run(x, logits, None, up, jnp.zeros((4, 8, 7)))
    with pytest.raises(ValueError, match="of 9 outputs"):
        run(x, logits, None, up, jnp.zeros((4, 9, 6)))


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize(("name", "tokens"), [*zip(LAYERS, (1, 5, 8, 1, 8, 3), strict=True)])
def test_on_a_card_few_tokens_are_right_and_repeatable(name, tokens):
    config = config_of(name, hidden_size=328, intermediate_size=136)
    params, x = problem(config, tokens)
    mesh = jm.make_mesh(PARALLEL)

    def run(implementation, **options):
        call = functools.partial(jm.moe, config=config, parallel=PARALLEL, mesh=mesh, implementation=implementation)
        return jax.jit(functools.partial(call, **options))

    few = run(None)
    assert "moe_route" in few.lower(params, x).as_text()
    got = np.asarray(few(params, x))
    for _ in range(20):
        np.testing.assert_array_equal(np.asarray(few(params, x)).view(np.uint16), got.view(np.uint16))
    for want in (run("reference")(params, x), run(None, trace=True)(params, x)[0]):
        want = np.asarray(want, np.float64)
        assert np.linalg.norm(got.astype(np.float64) - want) <= 2.0**-8 * np.linalg.norm(want)
