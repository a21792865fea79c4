"""Configurations check themselves and derive what was left out."""

import dataclasses

import pytest

import jax_moe as jm

SMALL = {"num_experts": 8, "top_k": 2, "hidden_size": 16, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("dp", "tp", "ep", "sp", "transport"),
    [
        (1, 1, False, False, "local"),
        (2, 2, False, False, "local"),
        (1, 1, True, False, "local"),
        (4, 1, True, False, "allgather"),
        (1, 4, True, False, "allgather"),
        (2, 2, True, True, "allgather"),
    ],
)
def test_sequence_parallel_and_transport_are_derived(dp, tp, ep, sp, transport):
    parallel = jm.ParallelConfig(dp=dp, tp=tp, expert_parallel=ep)
    assert (parallel.sequence_parallel, parallel.sp, parallel.transport) == (sp, sp, transport)
    assert parallel.ep == (dp * tp if ep else 1)
    assert parallel.world == dp * tp


def test_an_explicit_value_overrides_the_derived_one():
    assert not jm.ParallelConfig(dp=2, tp=2, expert_parallel=True, sequence_parallel=False).sp
    assert jm.ParallelConfig(tp=2, expert_parallel=True, sequence_parallel=True).sp


def test_a_resolved_parallel_config_equals_the_explicit_one():
    explicit = jm.ParallelConfig(dp=2, tp=2, expert_parallel=True, sequence_parallel=True, transport="allgather")
    derived = jm.ParallelConfig(dp=2, tp=2, expert_parallel=True)
    assert derived == explicit
    assert hash(derived) == hash(explicit)
    assert dataclasses.replace(derived) == derived


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dp": 0}, "dp = 0"),
        ({"tp": True}, "tp = True"),
        ({"sequence_parallel": True, "tp": 2}, "sequence_parallel = True"),
        ({"sequence_parallel": True, "dp": 2, "expert_parallel": True}, "tp = 1"),
        ({"token_layout": "dp_tp", "dp": 2}, "token_layout = 'dp_tp'"),
        ({"token_layout": "tp"}, "one of 'dp', 'dp_tp'"),
        ({"transport": "allgather", "dp": 2}, "transport = 'allgather'"),
        ({"transport": "local", "dp": 2, "expert_parallel": True}, "transport = 'local'"),
        ({"transport": "pigeon"}, "one of 'local', 'allgather'"),
    ],
)
def test_a_contradiction_in_the_parallel_config_names_field_and_value(fields, message):
    with pytest.raises(ValueError, match=message):
        jm.ParallelConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0}, "num_experts = 0"),
        ({"top_k": 9}, "top_k = 9"),
        ({"hidden_size": 1.5}, "hidden_size = 1.5"),
        ({"activation": "relu2"}, "one of 'silu', 'gelu', 'gelu_tanh', 'swigluoai'"),
        ({"activation": "swigluoai", "gated": False}, "one of 'silu', 'gelu', 'relu2'"),
        ({"gate_up_layout": "striped"}, "gate_up_layout = 'striped'"),
        ({"dtype": "float8"}, "dtype = 'float8': expected one of 'bfloat16', 'float16', 'float32'"),
        ({"quantization": "fp8"}, "quantization = 'fp8'"),
        ({"shared_gate": True}, "shared_gate = True"),
        ({"latent_size": 0}, "latent_size = 0"),
        ({"router": jm.RouterConfig(num_groups=3)}, "num_groups = 3"),
        ({"router": jm.RouterConfig(num_groups=8, groups_kept=1)}, "top_k = 2"),
    ],
)
def test_a_wrong_layer_names_field_and_value(fields, message):
    with pytest.raises(ValueError, match=message):
        jm.MoEConfig(**{**SMALL, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "oracle"}, "source = 'oracle'"),
        ({"scoring": "max"}, "scoring = 'max'"),
        ({"num_groups": 2, "groups_kept": 3}, "groups_kept = 3"),
        ({"renormalize": 1}, "renormalize = 1"),
        ({"scaling_factor": float("nan")}, "scaling_factor = nan"),
    ],
)
def test_a_wrong_router_names_field_and_value(fields, message):
    with pytest.raises(ValueError, match=message):
        jm.RouterConfig(**fields)


@pytest.mark.parametrize(
    ("config", "parallel", "message"),
    [
        ({"num_experts": 6}, {"dp": 4, "expert_parallel": True}, "num_experts = 6"),
        ({"intermediate_size": 9}, {"tp": 2}, "intermediate_size = 9"),
        ({"shared_intermediate_size": 9}, {"tp": 2}, "shared width = 9"),
        (
            {"shared_intermediate_size": 9},
            {"dp": 2, "tp": 2, "expert_parallel": True, "sequence_parallel": False},
            "shared width = 9",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused(config, parallel, message):
    with pytest.raises(ValueError, match=message):
        jm.check(jm.MoEConfig(**{**SMALL, **config}), jm.ParallelConfig(**parallel))


def test_expert_parallelism_splits_neither_expert_nor_shared_width_under_sp():
    odd = jm.MoEConfig(**{**SMALL, "intermediate_size": 7}, shared_intermediate_size=9)
    jm.check(odd, jm.ParallelConfig(dp=2, tp=2, expert_parallel=True))


def test_shared_width_comes_from_a_count_or_is_given():
    assert jm.MoEConfig(**SMALL).shared_width == 0
    assert jm.MoEConfig(**SMALL, num_shared_experts=2).shared_width == 16
    assert jm.MoEConfig(**SMALL, shared_intermediate_size=5).shared_width == 5
    assert jm.MoEConfig(**SMALL, num_shared_experts=2, shared_intermediate_size=5).shared_width == 5


def test_expert_width_is_the_latent_size_if_there_is_one():
    assert jm.MoEConfig(**SMALL).expert_width == 16
    assert jm.MoEConfig(**SMALL, latent_size=4).expert_width == 4
