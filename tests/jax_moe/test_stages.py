"""Stages and lessons: each stage shows its own result, and hands on what it was taught."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval as pe
from jax.sharding import PartitionSpec as P

import jax_moe as jm
from jax_moe import stages
from jax_moe.kernels import choice, hopper

from . import lessons as taught
from .layers import MODES, PLAIN, RICH, SHARED, num_shards, real_rows, sharded, tokens

ROWS = 4
WEIGHT_IN = dataclasses.replace(
    SHARED, gate_up_layout="interleaved", router=jm.RouterConfig(source="ids", weight_on_input=True)
)
NARROW = dataclasses.replace(RICH, dtype="bfloat16")
CASES = {
    "one rank": (RICH, MODES["one rank"]),
    "tp2": (RICH, MODES["tp2"]),
    "tp4, ids, weight on input, interleaved": (WEIGHT_IN, jm.ParallelConfig(tp=4)),
    "dp2.ep, bfloat16": (NARROW, MODES["dp2.ep"]),
    "dp2.tp2.ep": (RICH, MODES["dp2.tp2.ep"]),
    "dp2.tp2.ep.nosp": (SHARED, MODES["dp2.tp2.ep.nosp"]),
    "dp2.tp2.ep.native, ids": (WEIGHT_IN, MODES["dp2.tp2.ep.native"]),
    "ragged, 2 nodes, drops": (
        RICH,
        jm.ParallelConfig(dp=4, expert_parallel=True, transport="ragged", nodes=2, max_rows=4),
    ),
    "padded, drops": (RICH, jm.ParallelConfig(dp=4, expert_parallel=True, transport="padded", capacity_factor=0.5)),
}
# Which stages read what a stage hands on; "y" is the output.
READERS = {
    "logits": {"topk_weights"},
    "topk_weights": {"combine"},
    "latent_in": {"dispatch"},
    "dispatch": {"gate_up"},
    "gate_up": {"activation"},
    "activation": {"down"},
    "down": {"combine"},
    "combine": {"y"},
    "latent_out": {"y"},
    "shared": {"y"},
}


def readers(name, config):
    if name == "topk_weights" and config.router.weight_on_input:
        return {"dispatch"}
    if name == "combine" and config.latent_size:
        return {"latent_out"}
    return READERS[name]


class Case:
    """One program, its inputs, and how it runs freely."""

    def __init__(self, config, parallel):
        self.config, self.parallel = config, parallel
        params, mesh = sharded(config, parallel)
        counts = np.array([[ROWS, 0, 1, ROWS - 1][i % 4] for i in range(num_shards(parallel))], np.int32)
        if num_shards(parallel) == 1:
            counts[0] = ROWS - 1
        real = real_rows(counts, ROWS)
        x = tokens(len(real), 16, config.dtype)
        x[~real] = np.nan
        given, self.tokens, self.real = {"counts": counts}, int(counts.sum()), real
        self.x, self.given = x, given
        if config.router.source == "ids":
            rng = np.random.default_rng(3)
            given["topk_ids"] = np.array([rng.permutation(8)[:3] for _ in real], np.int32)
            given["topk_weights"] = rng.standard_normal((len(real), 3)).astype(np.float32)

        @jax.jit
        def step(x, given, lessons):
            return jm.moe(params, x, config=config, parallel=parallel, mesh=mesh, trace=True, lessons=lessons, **given)

        self._step = lambda lessons: step(x, given, lessons)
        self.free = self.run(taught.blank(config, self.tokens, on=False))
        self.programs = step._cache_size

    def run(self, lessons):
        """Every stage's result for all tokens, y as "y", and the trace as it is."""
        y, trace = self._step(lessons)
        dense = taught.together(trace, self.config, self.parallel, self.tokens)
        y = np.asarray(y, np.float32)
        assert (y[~self.real] == 0).all()
        return {**dense, "y": y[self.real]}, trace

    def lessons(self):
        """Its own results."""
        return taught.lessons({name: value for name, value in self.free[0].items() if name != "y"})


@functools.cache
def case(name):
    return Case(*CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_taught_its_own_results_the_layer_does_as_it_did(name):
    it = case(name)
    again, trace = it.run(it.lessons())
    for stage, values in it.free[0].items():
        # Sums over tp are divided otherwise between ranks, so their last bit may differ.
        partial = stages.summands(it.parallel, stage) > 1 or stage in ("latent_out", "y")
        tolerance = 1e-6 if partial and it.parallel.tp > 1 and not it.parallel.sp else 0
        np.testing.assert_allclose(again[stage], values, rtol=tolerance, atol=tolerance, err_msg=stage)
    jax.tree.map(np.testing.assert_array_equal, trace.row_token, it.free[1].row_token)
    if "drops" in name:
        assert trace.dropped.sum() > 0
        assert np.isnan(again["down"]).any()
    assert it.programs() == 1


@pytest.mark.parametrize("name", CASES)
def test_a_lesson_reaches_the_stages_that_read_it_and_no_other(name):
    it = case(name)
    before, _ = it.run(it.lessons())
    for stage in READERS:
        if stage not in before:
            continue
        own = it.lessons()
        lesson = np.array(getattr(own, stage))
        each = it.config.top_k if stage in stages.BY_ROW else 1
        # Of the first token, enough to be seen past any rounding, and too little to change which experts it chose.
        lesson[:each] = lesson[:each] * 1.001 if stage == "logits" else lesson[:each] + 1
        after, _ = it.run(dataclasses.replace(own, **{stage: lesson}))
        for other, values in before.items():
            each = it.config.top_k if other in stages.BY_ROW else 1
            here = ~np.isnan(values[:each].astype(np.float64))
            changed = (after[other][:each] != values[:each])[here]
            assert changed.any() == (other in readers(stage, it.config)), (stage, other)
            np.testing.assert_array_equal(after[other][each:], values[each:], err_msg=f"{stage} {other}")


@pytest.mark.parametrize("name", ["one rank", "tp2", "dp2.tp2.ep"])
def test_a_taught_choice_moves_the_rows(name):
    it = case(name)
    own = it.lessons()
    ids = np.array(own.topk_ids)
    free = set(range(8)) - set(ids[0].tolist())
    ids[0, 1] = free.pop()
    after, trace = it.run(dataclasses.replace(own, topk_ids=ids))
    before = it.free[0]
    np.testing.assert_array_equal(after["topk_ids"], before["topk_ids"])
    # Over tp every rank has a part of each expert; over ep each has its own.
    np.testing.assert_array_equal(np.asarray(trace.group_sizes)[:8], np.bincount(ids.reshape(-1), minlength=8))
    # A row that changed its place may be multiplied in another block: its last bit may differ.
    assert np.flatnonzero((np.abs(after["gate_up"] - before["gate_up"]) > 1e-4).any(axis=1)).tolist() == [1]
    np.testing.assert_allclose(after["combine"], before["combine"], rtol=1e-5, atol=1e-5)


def test_a_single_lesson_is_felt_by_all_later_stages_and_by_no_earlier_one():
    config, parallel = RICH, MODES["one rank"]
    params, mesh = sharded(config, parallel)
    x = tokens(3, 16)

    @jax.jit
    def step(lessons):
        return jm.moe(params, x, config=config, parallel=parallel, mesh=mesh, trace=True, lessons=lessons)

    lesson = np.ones((9, 10), np.float32)
    (free, before), (y, after) = (step(jm.Lessons(on=on, dispatch=lesson)) for on in (False, True))
    for field in dataclasses.fields(jm.Stages):
        same = np.array_equal(getattr(before.stages, field.name), getattr(after.stages, field.name))
        assert same == (field.name in ("latent_in", "dispatch", "shared")), field.name
    assert not np.array_equal(free, y)
    np.testing.assert_array_equal(before.topk_weights, after.topk_weights)


@pytest.mark.parametrize("name", ["tp2", "dp2.tp2.ep"])
def test_lessons_in_a_shard_map_of_ones_own_are_those_of_moe(name):
    it = case(name)
    config, parallel = CASES[name]
    params, mesh = sharded(config, parallel)
    rows = P(parallel.token_axes)
    lessons, routing = it.lessons(), {key: rows for key in it.given if key != "counts"}

    def body(params, x, given, counts, lessons):
        return jm.moe_local(
            params, x, config=config, parallel=parallel, counts=counts, trace=True, lessons=lessons, **given
        )

    specs = (jm.param_specs(config, parallel), rows, routing, P(), P())
    each = rows, P(parallel.mesh_axes)
    step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=each))
    y, trace = step(params, it.x, {key: it.given[key] for key in routing}, it.given["counts"], lessons)
    expected, _ = it.run(lessons)
    np.testing.assert_allclose(y[it.real], expected["y"], rtol=1e-6, atol=1e-6)
    for stage, values in taught.together(trace, config, parallel, it.tokens).items():
        np.testing.assert_allclose(values, expected[stage], rtol=1e-6, atol=1e-6, err_msg=stage)


def equations(jaxpr):
    """All of them, those of inner programs included."""
    return [str(e.primitive) for e in jaxpr.eqns] + [
        name for e in jaxpr.eqns for inner in jaxprs_in_params(e.params) for name in equations(inner)
    ]


@pytest.mark.parametrize("name", ["tp2", "dp2.tp2.ep", "ragged, 2 nodes, drops"])
def test_without_a_trace_nothing_is_added_to_the_program(name):
    config, parallel = CASES[name]
    params, mesh = sharded(config, parallel)
    x = tokens(ROWS * num_shards(parallel), 16)

    def program(trace):
        layer = functools.partial(jm.moe, config=config, parallel=parallel, mesh=mesh, trace=trace)
        whole = jax.make_jaxpr(lambda params, x: layer(params, x))(params, x).jaxpr
        for_y, _ = pe.dce_jaxpr(whole, [True] + [False] * (len(whole.outvars) - 1))
        return equations(whole), equations(for_y)

    (off, off_for_y), (on, on_for_y) = program(False), program(True)
    assert off_for_y == on_for_y
    assert len(off) < len(on)


def test_a_layer_shows_just_the_stages_it_has():
    def shown(config):
        parallel = MODES["one rank"]
        params, mesh = sharded(config, parallel)
        layer = functools.partial(jm.moe, config=config, parallel=parallel, mesh=mesh, trace=True)
        _, trace = jax.eval_shape(layer, params, tokens(2, 16))
        return {field.name for field in dataclasses.fields(jm.Stages) if getattr(trace.stages, field.name) is not None}

    routed = {"dispatch", "gate_up", "activation", "down", "combine"}
    assert shown(PLAIN) == routed
    assert shown(RICH) == routed | {"latent_in", "latent_out", "shared"}


def test_lessons_that_do_not_fit_are_refused():
    params, mesh = sharded(PLAIN, MODES["one rank"])
    layer = functools.partial(jm.moe, params, tokens(2, 16), config=PLAIN, parallel=MODES["one rank"], mesh=mesh)
    with pytest.raises(ValueError, match=r"lessons are given without trace: expected trace=True"):
        layer(lessons=jm.Lessons(on=True))
    narrow = jm.Lessons(on=True, logits=np.zeros((2, 8)), down=np.zeros((6, 15)))
    with pytest.raises(ValueError, match=r"lessons.down has shape \(6, 15\): expected \(6, 16\)"):
        layer(trace=True, lessons=narrow)
    short = jm.Lessons(on=True, combine=np.zeros((2, 16)), gate_up=np.zeros((5, 16)))
    with pytest.raises(ValueError, match=r"lessons\.\w+ has shape .* tokens"):
        layer(trace=True, lessons=short)


def test_on_a_hopper_gpu_the_first_product_is_not_to_be_seen_and_all_else_is(monkeypatch):
    monkeypatch.setattr(choice, "runs_on_hopper", lambda: True)
    # Triton kernels move rows and choose experts; from 0.11 on JAX lowers them where there is a GPU alone.
    monkeypatch.setattr(hopper, "no_triton", lambda: "left out")
    config = jm.MoEConfig(num_experts=8, top_k=3, hidden_size=64, intermediate_size=64, num_shared_experts=1)
    parallel = jm.ParallelConfig(dp=2, expert_parallel=True, transport="padded")
    params, mesh = sharded(config, parallel)
    specs = (jm.param_specs(config, parallel), P("dp"), P())

    def run(params, x, lessons):
        return jm.moe_local(params, x, config=config, parallel=parallel, trace=True, lessons=lessons)

    step = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("dp"), check_vma=False)
    traced = jax.jit(step).trace(params, tokens(2, 64, "bfloat16"), taught.blank(config, 2, on=True))
    _, trace = traced.out_info
    assert trace.stages.gate_up is None
    shown = {field.name for field in dataclasses.fields(jm.Stages) if getattr(trace.stages, field.name) is not None}
    assert shown == {"dispatch", "activation", "down", "combine", "shared"}
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "moe_gate_up" in program
    assert "moe_grouped_matmul" in program
