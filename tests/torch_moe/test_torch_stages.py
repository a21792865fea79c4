"""What stages show, and what they make of lessons, on four ranks in every mode and over every transport."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
import torch_dense as dense
from torch.utils._python_dispatch import TorchDispatchMode
from torch_lessons import BY_ROW, as_lessons, dense_results, run_on_rank, shares
from torch_modes import MODES, TRANSPORTS, holders, random_tokens

from torch_moe import Lessons, MoE, MoEConfig, ParallelConfig, RouterConfig, Stages
from torch_moe.trace import Recorder

PLAIN = MoEConfig(num_experts=8, top_k=3, hidden_size=16, intermediate_size=24, dtype="float32")
RICH = dataclasses.replace(
    PLAIN,
    expert_bias=True,
    shared_intermediate_size=8,
    shared_gate=True,
    latent_size=12,
    router=RouterConfig(scoring="sigmoid", renormalize=True, num_groups=4, groups_kept=2, score_correction_bias=True),
)
GIVEN = dataclasses.replace(
    PLAIN,
    expert_bias=True,
    num_shared_experts=1,
    gate_up_layout="interleaved",
    router=RouterConfig(source="ids", weight_on_input=True),
)
CASES = {
    **{mode: (RICH, MODES[mode]) for mode in ("dp2.tp2", "tp4", "dp4.ep", "dp2.tp2.ep", "dp2.tp2.ep.nosp")},
    "tp4, ids, weight on input, interleaved": (GIVEN, MODES["tp4"]),
    "native, ids, weight on input, interleaved": (GIVEN, MODES["dp2.tp2.ep.native"]),
    "dp2.tp2.ep, bfloat16": (dataclasses.replace(PLAIN, dtype="bfloat16", num_shared_experts=1), MODES["dp2.tp2.ep"]),
    "ragged": (RICH, TRANSPORTS["dp2.tp2.ep/ragged"]),
    "ragged, drops, two nodes": (RICH, dataclasses.replace(TRANSPORTS["dp4.ep.nodes2/ragged"], max_rows=4)),
    "padded, drops": (RICH, dataclasses.replace(TRANSPORTS["dp4.ep/padded"], capacity_factor=0.5)),
    "padded, two nodes": (RICH, TRANSPORTS["dp4.ep.nodes2/padded"]),
}
# What reads a stage's result when all others are lessons.
READER = {
    "logits": "topk_weights",
    "topk_weights": "combine",
    "latent_in": "dispatch",
    "dispatch": "gate_up",
    "gate_up": "activation",
    "activation": "down",
    "down": "combine",
    "combine": "y",
    "latent_out": "y",
    "shared": "y",
}


def reader(stage, config):
    if stage == "topk_weights" and config.router.weight_on_input:
        return "dispatch"
    if stage == "combine" and config.latent_size is not None:
        return "latent_out"
    return READER[stage]


class Run:
    """One case on all ranks: sizes that differ, an empty rank, NaN in padding."""

    def __init__(self, pool, config, parallel):
        self.pool, self.config, self.parallel = pool, config, parallel
        self.counts, sizes = [3, 6, 0, 5][: holders(parallel)], [6, 6, 4, 9][: holders(parallel)]
        self.arrays = random_tokens(config, sizes)
        for x, count in zip(self.arrays, self.counts, strict=True):
            x[count:] = np.nan
        self.given = {}
        if config.router.source == "ids":
            rng = np.random.default_rng(8)
            ids = [rng.permuted(np.tile(np.arange(8), (size, 1)), axis=1)[:, :3].copy() for size in sizes]
            weights = [rng.standard_normal((size, 3)).astype(np.float32) for size in sizes]
            self.given = {"topk_ids": ids, "topk_weights": weights}

    def __call__(self, *lessons):
        """Every stage's result, free and then for each of the lessons: dense, with y as ranks have it, and traces."""
        args = self.config, self.parallel, self.arrays, self.counts, self.given, list(lessons)
        runs = zip(*self.pool.run(run_on_rank, *args), strict=True)
        out = []
        for ranks in runs:
            traces = [trace for _, trace in ranks]
            found = dense_results(traces, self.config, self.parallel, sum(self.counts))
            step = 1 if self.parallel.token_layout == "dp_tp" else self.parallel.tp
            blocks = [y for y, _ in ranks][::step]
            real = [y[:count] for y, count in zip(blocks, self.counts, strict=True)]
            out.append(({**found, "y": np.concatenate(real)}, traces))
        return out


@pytest.mark.parametrize("case", CASES)
def test_a_lesson_reaches_the_stage_that_reads_it_and_no_other(pool, case):
    config, parallel = CASES[case]
    run = Run(pool, config, parallel)
    [(free, traces)] = run()
    own = as_lessons({name: value for name, value in free.items() if name != "y"})
    changes = {}
    for stage in own.keys() - {"topk_ids"}:
        lines = config.top_k if stage in BY_ROW else 1
        lesson = own[stage].copy()
        # Of the first token: plain to see after any rounding, and no reason for the router to choose other experts.
        lesson[:lines] = lesson[:lines] * 1.001 if stage == "logits" else lesson[:lines] + 1
        changes[stage] = {**own, stage: lesson}
    _, (taught, again), *others = run(own, *changes.values())

    # Taught its own results the layer does as it did, but for sums that ranks share otherwise.
    shared = parallel.tp > 1 and not parallel.sp
    for stage, value in free.items():
        loose = shared and stage in ("down", "combine", "latent_out", "shared", "y")
        np.testing.assert_allclose(taught[stage], value, rtol=0, atol=2e-6 if loose else 0, err_msg=stage)
    assert [trace["row_token"].tolist() for trace in again] == [trace["row_token"].tolist() for trace in traces]
    if "drops" in case:
        assert sum(trace["dropped"] for trace in traces) > 0
        assert np.isnan(taught["down"]).any()

    for stage, (after, _) in zip(changes, others, strict=True):
        for name, before in taught.items():
            lines = config.top_k if name in BY_ROW else 1
            here = ~np.isnan(before[:lines].astype(np.float64))
            changed = (after[name][:lines] != before[:lines])[here].any()
            assert changed == (name == reader(stage, config)), f"{stage} changes {name}: {changed}"
            np.testing.assert_array_equal(after[name][lines:], before[lines:], err_msg=f"{stage}, {name}")


@pytest.mark.parametrize("case", ["tp4", "dp2.tp2.ep", "ragged"])
def test_a_taught_choice_moves_the_rows(pool, case):
    run = Run(pool, *CASES[case])
    [(free, _)] = run()
    own = as_lessons({name: value for name, value in free.items() if name != "y"})
    ids = own["topk_ids"].copy()
    ids[0, 1] = min(set(range(8)) - set(ids[0].tolist()))
    _, (taught, traces) = run({**own, "topk_ids": ids})
    np.testing.assert_array_equal(taught["topk_ids"], free["topk_ids"])
    experts = np.concatenate([trace["group_sizes"] for trace in traces[: 1 if case == "tp4" else None]])
    np.testing.assert_array_equal(experts, np.bincount(ids.flatten(), minlength=8))
    # A row that changed its place among an expert's may differ in the last bit.
    assert np.flatnonzero((np.abs(taught["gate_up"] - free["gate_up"]) > 1e-4).any(axis=1)).tolist() == [1]
    np.testing.assert_allclose(taught["combine"], free["combine"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["dp2.tp2", "dp2.tp2.ep", "dp2.tp2.ep.native"])
def test_without_any_tokens_stages_have_their_shapes(pool, mode):
    parallel = MODES[mode]
    arrays = random_tokens(RICH, [0] * holders(parallel))
    traces = [trace for [(_, trace)] in pool.run(run_on_rank, RICH, parallel, arrays, None, {}, [])]
    lessons = as_lessons(dense_results(traces, RICH, parallel, tokens=0))
    for found in pool.run(run_on_rank, RICH, parallel, arrays, None, {}, [lessons]):
        split = parallel.tp if mode == "dp2.tp2" else 1
        widths = {"latent_in": 12, "dispatch": 12, "gate_up": 48 // split, "activation": 24 // split, "down": 12}
        widths |= {"combine": 12, "latent_out": 16, "shared": 16}
        for _, trace in found:
            assert {name: value.shape for name, value in trace["stages"].items()} == {
                name: (0, width) for name, width in widths.items()
            }


def one_rank(config):
    moe = MoE(config)
    moe.load_params(dense.random_params(config))
    return moe, torch.randn(4, 16, generator=torch.Generator().manual_seed(5)).to(getattr(torch, config.dtype))


def test_a_single_lesson_is_felt_by_all_later_stages_and_by_no_earlier_one():
    moe, x = one_rank(RICH)
    lesson = torch.ones(12, 12)
    with torch.no_grad():
        (_, before), (_, off), (y, after) = (
            moe(x, trace=True, lessons=lessons)
            for lessons in (None, Lessons(on=False, dispatch=lesson), Lessons(on=True, dispatch=lesson))
        )
    for field in dataclasses.fields(Stages):
        free, idle, taught = (getattr(trace.stages, field.name) for trace in (before, off, after))
        assert torch.equal(free, idle)
        assert torch.equal(free, taught) == (field.name in ("latent_in", "dispatch", "shared")), field.name
    assert not torch.equal(y, moe(x))


def test_a_layer_shows_just_the_stages_it_has_in_the_dtypes_it_computes_them_in():
    for config in (PLAIN, dataclasses.replace(RICH, dtype="bfloat16")):
        moe, x = one_rank(config)
        stages = moe(x, trace=True)[1].stages
        found = {field.name: getattr(stages, field.name) for field in dataclasses.fields(Stages)}
        dtypes = {name: value.dtype for name, value in found.items() if value is not None}
        narrow, wide = getattr(torch, config.dtype), torch.float32
        expected = {"dispatch": narrow, "gate_up": wide, "activation": narrow, "down": wide, "combine": wide}
        if config.latent_size is not None:
            expected |= {"latent_in": narrow, "latent_out": wide, "shared": wide}
        assert dtypes == expected
        assert not any(value.requires_grad for value in found.values() if value is not None)


class Operations(TorchDispatchMode):
    """The operations that are run, but for those in a recorder."""

    def __init__(self):
        super().__init__()
        self.seen, self.counts = [], True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.counts:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def paused(self):
        before, self.counts = self.counts, False
        yield
        self.counts = before


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(), ParallelConfig(expert_parallel=True)], ids=lambda p: p.transport
)
def test_whatever_a_trace_adds_is_in_the_recorder_alone(monkeypatch, parallel):
    moe = MoE(RICH, parallel)
    moe.load_params(dense.random_params(RICH))
    x = torch.randn(4, 16)

    def operations(trace):
        with Operations() as seen, torch.no_grad():
            for name in ("__init__", "arrived", "by_token", "by_row", "count_choices", "trace"):
                original = vars(Recorder)[name]

                def quiet(*args, original=original):
                    with seen.paused():
                        return original(*args)

                monkeypatch.setattr(Recorder, name, quiet)
            moe(x, trace=trace)
        monkeypatch.undo()
        return seen.seen

    assert operations(trace=False) == operations(trace=True)


def test_lessons_that_do_not_fit_are_refused():
    moe, x = one_rank(PLAIN)
    with pytest.raises(ValueError, match=r"lessons with trace=False: allowed is trace=True"):
        moe(x, lessons=Lessons(on=True))
    with pytest.raises(ValueError, match=r"lessons.down of shape \(12, 15\): allowed is \(12, 16\), for 4 tokens"):
        moe(x, trace=True, lessons=Lessons(on=True, logits=torch.zeros(4, 8), down=torch.zeros(12, 15)))
    with pytest.raises(ValueError, match=r"lessons.gate_up of shape \(11, 48\): allowed is \(12, 48\), for 4 tokens"):
        moe(x, trace=True, lessons=Lessons(on=True, combine=torch.zeros(4, 16), gate_up=torch.zeros(11, 48)))


@pytest.mark.parametrize("tp", [1, 2, 3, 8])
def test_shares_are_powers_of_two_that_add_up_to_one(tp):
    assert sum(shares(tp)) == 1
    assert all(np.log2(part) % 1 == 0 for part in shares(tp))
    assert len(set(shares(tp))) == max(1, tp - 1)
