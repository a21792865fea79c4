"""The whole layer, lowered for a card that is not here: which kernels its program holds, and what it refuses."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_moe as jm
from jax_moe.kernels import choice, ops
from tests.jax_moe.kernels.problems import CARDS, card
from tests.jax_moe.layers import sharded, tokens

CAPABILITY = {"A100": "8.0", "L4": "8.9", "H100": "9.0"}
MOSAIC = {"moe_gate_up_small", "moe_grouped_matmul_small"}
TRITON = {"moe_triton_gate_up", "moe_triton_grouped_matmul"}
ROWS = {"moe_spread_rows"}
ALL_ROWS = {"moe_spread_rows", "moe_combine_rows"}
AHEAD = {"moe_gate_up_any_height_ahead"}


def kernels_of(kind, implementation=None, *, batch=False, gradient=False, rows=12, **fields):
    """The kernels that multiply and move rows in a layer's program for this card; with batch, of two under vmap."""
    config = jm.MoEConfig(**{"num_experts": 8, "top_k": 3, "hidden_size": 64, "intermediate_size": 64, **fields})
    parallel = jm.ParallelConfig()
    params, mesh = sharded(config, parallel)
    x = tokens(rows, config.hidden_size, config.dtype)
    run = functools.partial(jm.moe_local, config=config, parallel=parallel, implementation=implementation)
    with card(CARDS[kind], mesh):
        specs = (jm.param_specs(config, parallel), P("dp"))
        run = jax.shard_map(
            run, mesh=jax.sharding.get_abstract_mesh(), in_specs=specs, out_specs=P("dp"), check_vma=False
        )
        operands = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, x))
        if gradient:
            run = jax.grad(lambda *operands, run=run: run(*operands).astype("float32").sum(), argnums=(0, 1))
        if batch:
            run = jax.vmap(run)
            operands = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype), operands)
        program = jax.jit(run).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    return set(re.findall(r"moe_[a-z_]+[a-z]", program)) & (MOSAIC | TRITON | ALL_ROWS | AHEAD)


@pytest.fixture
def on(monkeypatch):
    return lambda kind: monkeypatch.setattr(choice, "capability", lambda: CAPABILITY[kind])


@pytest.mark.parametrize(
    ("kind", "implementation", "kernels"),
    [
        ("H100", None, MOSAIC | ROWS),
        ("H100", "mosaic_gpu", MOSAIC | ROWS),
        ("H100", "triton", TRITON | ALL_ROWS),
        ("H100", "reference", set()),
        ("L4", None, TRITON | ROWS),
        ("A100", "triton", TRITON | ALL_ROWS),
    ],
)
def test_the_program_of_a_layer_holds_the_kernels_of_its_card_or_its_name(on, kind, implementation, kernels):
    on(kind)
    assert kernels_of(kind, implementation) == kernels


@pytest.mark.parametrize(
    ("kind", "implementation", "kernels"),
    [("H100", None, MOSAIC), ("H100", "mosaic_gpu", MOSAIC | ROWS), ("A100", None, TRITON | ROWS)],
)
def test_few_tokens_are_not_gathered_on_hopper_where_nothing_is_named(on, kind, implementation, kernels):
    on(kind)
    assert kernels_of(kind, implementation, rows=4) == kernels


@pytest.mark.parametrize(
    ("kind", "implementation", "fields", "rows_moved"),
    [
        ("H100", None, {}, set()),
        ("H100", "mosaic_gpu", {}, ROWS),
        ("H100", None, {"router": jm.RouterConfig(weight_on_input=True)}, ROWS),
        ("H100", None, {"num_experts": 16}, ROWS),  # fewer rows an expert
        ("H100", None, {"intermediate_size": 760}, ROWS),  # fewer rows of weights
    ],
)
def test_many_rows_an_expert_are_gathered_by_the_product_where_nothing_is_named(
    on, kind, implementation, fields, rows_moved
):
    on(kind)
    found = kernels_of(kind, implementation, rows=8 * 512 // 3 + 1, **{"intermediate_size": 768, **fields})
    assert found == (rows_moved or AHEAD)


def test_gathering_in_the_product_changes_neither_a_layer_nor_its_gradient(on, monkeypatch):
    on("H100")
    calls = []
    for operation, table in ops.OPERATIONS.items():
        for name in set(table) - {"reference"}:  # the kernels' place in a program, not the kernels
            spy = functools.partial(
                lambda operation, *args: calls.append(operation) or plain[operation](*args), operation
            )
            monkeypatch.setitem(table, name, spy)
    plain = {operation: table["reference"] for operation, table in ops.OPERATIONS.items()}
    config = jm.MoEConfig(num_experts=2, top_k=2, hidden_size=64, intermediate_size=768, expert_bias=True)
    parallel = jm.ParallelConfig()
    params, mesh = sharded(config, parallel)
    x = tokens(512, config.hidden_size, config.dtype)

    def loss(params, x, implementation):
        run = functools.partial(jm.moe_local, config=config, parallel=parallel, implementation=implementation)
        specs = (jm.param_specs(config, parallel), P("dp"))
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("dp"), check_vma=False)
        y = run(params, x).astype("float32")
        return (y**2).sum(), y

    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    got = step(params, x, None)
    assert "gather_gate_up" in calls
    assert "gather_rows" not in calls
    want = step(params, x, "reference")
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(("kind", "products"), [("H100", MOSAIC), ("A100", TRITON)])
def test_a_layer_under_vmap_keeps_its_kernels(on, kind, products):
    on(kind)
    assert kernels_of(kind, batch=True) == products | ROWS
    assert kernels_of(kind, batch=True, gradient=True) >= products | ROWS


def test_float16_takes_the_same_kernels_and_float32_none_unless_it_may_be_tf32(on):
    on("H100")
    assert kernels_of("H100", dtype="float16") == MOSAIC | ROWS
    assert kernels_of("H100", dtype="float32") == ROWS
    with jax.default_matmul_precision("tensorfloat32"):
        assert kernels_of("H100", dtype="float32") == ROWS
        assert kernels_of("H100", "triton", dtype="float32") == TRITON | ALL_ROWS
        on("A100")
        assert kernels_of("A100", dtype="float32") == TRITON | ROWS


@pytest.mark.parametrize(
    ("kind", "implementation", "fields", "message"),
    [
        ("A100", "mosaic_gpu", {}, "gate_up: .* compute capability 8.0: expected 9.0"),
        ("H100", "mosaic_gpu", {"hidden_size": 68}, "depth 68: expected a multiple of 8, 64 or more"),
        ("H100", "mosaic_gpu", {"intermediate_size": 60}, "intermediate size of 60: expected a multiple of 8"),
        ("H100", "mosaic_gpu", {"dtype": "float32"}, "float32 and float32: expected both bfloat16 or both float16"),
        ("H100", "triton", {"dtype": "float32"}, "float32: expected jax.default_matmul_precision"),
    ],
)
def test_a_named_layer_says_what_it_cannot_run_and_what_it_would(on, kind, implementation, fields, message):
    on(kind)
    with pytest.raises(NotImplementedError, match=message):
        kernels_of(kind, implementation, **fields)
    assert kernels_of(kind, None, **fields)


def test_an_explanation_names_the_kernels_and_their_tiles(on):
    config = jm.MoEConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=64)
    on("H100")
    said = jm.explain(config, jm.ParallelConfig(), tokens_per_rank=4096).kernels
    assert "gate_up: mosaic_gpu (tiles of 128 rows; from H" in said
    assert "gather_rows: triton" in said
    assert "gather_gate_up" not in said
    wider = dataclasses.replace(config, intermediate_size=768)
    said = jm.explain(wider, jm.ParallelConfig(), tokens_per_rank=4096).kernels
    assert "gathered while others are multiplied, gather_gate_up: mosaic_gpu" in said
    said = jm.explain(config, jm.ParallelConfig(), tokens_per_rank=4, implementation="triton").kernels
    assert "grouped_matmul: triton (tiles of 16 rows)" in said
    assert "combine_rows: triton" in said
    assert "gather_gate_up" not in said
    on("A100")
    with pytest.raises(NotImplementedError, match=r"compute capability 8\.0"):
        jm.explain(config, jm.ParallelConfig(), implementation="mosaic_gpu")
