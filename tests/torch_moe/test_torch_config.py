"""Configurations validate themselves, derive what is left open, and say what is allowed."""

import dataclasses
import pickle

import numpy as np
import pytest

from torch_moe import MoEConfig, ParallelConfig, RouterConfig, check

SIZES = {"num_experts": 8, "top_k": 2, "hidden_size": 16, "intermediate_size": 24}


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"num_experts": 0}, "num_experts", "0"),
        ({"num_experts": 8.0}, "num_experts", "8.0"),
        ({"hidden_size": True}, "hidden_size", "True"),
        ({"top_k": 9}, "top_k", "9"),
        ({"activation": "relu"}, "activation", "'relu'"),
        ({"activation": "relu2"}, "activation", "'relu2'"),
        ({"activation": "swigluoai", "gated": False}, "activation", "'swigluoai'"),
        ({"activation": "gelu_tanh", "gated": False}, "activation", "'gelu_tanh'"),
        ({"gated": 2}, "gated", "2"),
        ({"gate_up_layout": "stacked"}, "gate_up_layout", "'stacked'"),
        ({"swiglu_limit": 0.0}, "swiglu_limit", "0.0"),
        ({"swiglu_alpha": float("nan")}, "swiglu_alpha", "nan"),
        ({"num_shared_experts": -1}, "num_shared_experts", "-1"),
        ({"shared_intermediate_size": 0}, "shared_intermediate_size", "0"),
        ({"shared_gate": True}, "shared_gate", "True"),
        ({"latent_size": 0}, "latent_size", "0"),
        ({"dtype": "float16"}, "dtype", "'float16'"),
        ({"quantization": "fp8"}, "quantization", "'fp8'"),
        ({"router": None}, "router", "None"),
        ({"router": RouterConfig(num_groups=3)}, "num_groups", "3"),
        ({"top_k": 3, "router": RouterConfig(num_groups=4, groups_kept=1)}, "top_k", "3"),
    ],
)
def test_a_wrong_layer_field_is_named_with_its_value_and_what_is_allowed(changes, field, value):
    with pytest.raises(ValueError, match=f"{field}={value}: allowed"):
        MoEConfig(**{**SIZES, **changes})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"source": "tokens"}, "source"),
        ({"scoring": "tanh"}, "scoring"),
        ({"renormalize": "yes"}, "renormalize"),
        ({"num_groups": 0}, "num_groups"),
        ({"num_groups": 2, "groups_kept": 3}, "groups_kept"),
        ({"scaling_factor": float("inf")}, "scaling_factor"),
    ],
)
def test_a_wrong_router_field_is_named_with_its_value_and_what_is_allowed(changes, field):
    with pytest.raises(ValueError, match=f"{field}=.*: allowed"):
        RouterConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dp": 0}, "dp=0: allowed"),
        ({"tp": 2, "sequence_parallel": True}, "sequence_parallel=True: allowed only with expert_parallel"),
        ({"dp": 2, "expert_parallel": True, "sequence_parallel": True}, "sequence_parallel=True: .* tp=1"),
        ({"token_layout": "tp"}, "token_layout='tp': allowed are 'dp', 'dp_tp'"),
        ({"tp": 2, "token_layout": "dp_tp"}, "token_layout='dp_tp': allowed only with sequence parallelism"),
        ({"dp": 2, "transport": "allgather"}, "transport='allgather' in mode 'DP': allowed is 'local'$"),
        (
            {"dp": 2, "expert_parallel": True, "transport": "local"},
            "transport='local' in mode 'DP.EP': allowed is 'allgather', 'ragged', 'padded'",
        ),
        ({"transport": "ring"}, "transport='ring': allowed are 'local', 'allgather', 'ragged', 'padded'"),
        ({"transport": "ragged"}, "transport='ragged' in mode 'single': allowed is 'local'$"),
        ({"tp": 2, "transport": "padded"}, "transport='padded' in mode 'TP': allowed is 'local'$"),
        (
            {"tp": 2, "expert_parallel": True, "transport": "ragged"},
            "transport='ragged' in mode 'EP, SP off': allowed is 'allgather'; 'ragged' needs sequence_parallel=True",
        ),
        ({"dp": 2, "expert_parallel": True, "nodes": 2}, "nodes=2 with transport='allgather' in mode 'DP.EP': allowed"),
        (
            {"dp": 2, "nodes": 2},
            "nodes=2 with transport='local' in mode 'DP': allowed transports are 'padded', 'ragged'",
        ),
        (
            {"dp": 4, "expert_parallel": True, "transport": "ragged", "nodes": 3},
            "nodes=3: allowed are divisors of dp=4",
        ),
        ({"dp": 4, "expert_parallel": True, "transport": "ragged", "nodes": 0}, "nodes=0: allowed"),
        (
            {"dp": 2, "expert_parallel": True, "transport": "ragged", "capacity_factor": 1.0},
            "capacity_factor=1.0 with transport='ragged' in mode 'DP.EP': allowed is transport='padded'",
        ),
        ({"max_rows": 4}, "max_rows=4 with transport='local' in mode 'single': allowed is transport='ragged'"),
        (
            {"dp": 2, "expert_parallel": True, "transport": "padded", "capacity_factor": 0.0},
            "capacity_factor=0.0: allowed is a finite positive number",
        ),
        (
            {"dp": 2, "expert_parallel": True, "transport": "ragged", "max_rows": 0},
            "max_rows=0: allowed is a whole number of at least 1",
        ),
    ],
)
def test_a_contradiction_between_parallel_fields_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**changes)


@pytest.mark.parametrize(
    ("dp", "tp", "expert_parallel", "ep", "sp", "transport"),
    [
        (1, 1, False, 1, False, "local"),
        (1, 1, True, 1, False, "local"),
        (4, 1, False, 1, False, "local"),
        (2, 2, False, 1, False, "local"),
        (4, 1, True, 4, False, "allgather"),
        (1, 4, True, 4, False, "allgather"),
        (2, 2, True, 4, True, "allgather"),
    ],
)
def test_what_is_left_open_is_derived(dp, tp, expert_parallel, ep, sp, transport):
    parallel = ParallelConfig(dp=dp, tp=tp, expert_parallel=expert_parallel)
    assert (parallel.ep, parallel.sp, parallel.transport, parallel.world) == (ep, sp, transport, dp * tp)
    assert parallel.sequence_parallel is sp


def test_resolved_fields_survive_replace_and_pickle():
    parallel = ParallelConfig(dp=2, tp=2, expert_parallel=True, sequence_parallel=False)
    assert dataclasses.replace(parallel) == parallel
    assert pickle.loads(pickle.dumps(parallel)) == parallel


def test_whole_numbers_from_numpy_make_an_equal_and_hashable_configuration():
    config = MoEConfig(**{name: np.int64(value) for name, value in SIZES.items()})
    assert config == MoEConfig(**SIZES)
    assert hash(config) == hash(MoEConfig(**SIZES))


def test_shared_width_comes_from_the_count_or_the_size():
    assert MoEConfig(**SIZES).shared_width == 0
    assert MoEConfig(**SIZES, num_shared_experts=2).shared_width == 48
    assert MoEConfig(**SIZES, num_shared_experts=2, shared_intermediate_size=10).shared_width == 10
    assert MoEConfig(**SIZES, shared_intermediate_size=10).shared_width == 10


def test_expert_width_is_the_latent_where_there_is_one():
    assert MoEConfig(**SIZES).expert_width == 16
    assert MoEConfig(**SIZES, latent_size=4).expert_width == 4


@pytest.mark.parametrize(
    ("config", "parallel", "message"),
    [
        ({"num_experts": 6}, {"dp": 4, "expert_parallel": True}, "num_experts=6: allowed are multiples of ep=4"),
        ({"intermediate_size": 25}, {"tp": 2}, "intermediate_size=25: allowed are multiples of tp=2"),
        ({"shared_intermediate_size": 5}, {"tp": 2}, "shared_width=5: allowed are multiples of tp=2"),
        (
            {"shared_intermediate_size": 5},
            {"tp": 2, "expert_parallel": True},
            "shared_width=5: allowed are multiples of tp=2",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_errors(config, parallel, message):
    with pytest.raises(ValueError, match=message):
        check(MoEConfig(**{**SIZES, **config}), ParallelConfig(**parallel))


def test_sizes_that_are_not_split_need_not_divide():
    odd = MoEConfig(**{**SIZES, "intermediate_size": 25}, shared_intermediate_size=5)
    check(odd, ParallelConfig(dp=2, tp=2, expert_parallel=True))
    check(odd, ParallelConfig(dp=3))
