"""The table of what each transport serves, walked cell by cell: what it allows runs, the rest is refused at once."""

import dataclasses
import itertools
import re

import pytest
import torch
import torch_dense as dense
from test_torch_parallel import SMALL, check, run
from torch_modes import holders

from torch_moe import ACROSS_NODES, CAPABILITIES, TRANSPORT_DTYPES, MoE, ParallelConfig
from torch_moe import check as check_config

FOUR_RANKS = {
    "DP": {"dp": 4},
    "TP": {"tp": 4},
    "DP+TP": {"dp": 2, "tp": 2},
    "DP+EP": {"dp": 4, "expert_parallel": True},
    "EP+SP": {"dp": 2, "tp": 2, "expert_parallel": True},
    "EP+SP native": {"dp": 2, "tp": 2, "expert_parallel": True, "token_layout": "dp_tp"},
    "EP, SP off": {"dp": 2, "tp": 2, "expert_parallel": True, "sequence_parallel": False},
}
MODES = {"single": {}, **FOUR_RANKS}


def test_the_table_knows_every_transport_and_mode():
    assert set(CAPABILITIES) == set(TRANSPORT_DTYPES) == {"local", "allgather", "ragged", "padded", "one_sided"}
    assert set().union(*CAPABILITIES.values()) == set(MODES)
    assert set(CAPABILITIES) > ACROSS_NODES
    for mode, fields in MODES.items():
        assert ParallelConfig(**fields).mode == mode


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transport", CAPABILITIES)
def test_what_the_table_allows_runs_and_the_rest_is_refused(pool, transport, mode, dtype):
    fields = MODES[mode]
    if mode not in CAPABILITIES[transport]:
        allowed = ", ".join(repr(name) for name, modes in CAPABILITIES.items() if mode in modes)
        with pytest.raises(
            ValueError, match=re.escape(f"transport={transport!r} in mode {mode!r}: allowed is {allowed}")
        ):
            ParallelConfig(**fields, transport=transport)
        return
    config = dataclasses.replace(SMALL, dtype=dtype)
    assert dtype in TRANSPORT_DTYPES[transport]
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    for nodes in (1, 2):
        if nodes > 1 and transport not in ACROSS_NODES:
            with pytest.raises(
                ValueError, match=f"nodes=2 with transport='{transport}' in mode .*: allowed transports"
            ):
                ParallelConfig(**fields, transport=transport, nodes=nodes)
            continue
        parallel = ParallelConfig(**fields, transport=transport, nodes=nodes)
        if parallel.world == 1:
            moe = MoE(config, parallel)
            moe.load_params(dense.random_params(config))
            assert moe(torch.randn(3, 16).to(getattr(torch, dtype))).isfinite().all()
            continue
        found, _, expected = run(pool, config, parallel, [4, 0, 3, 5][: holders(parallel)])
        check(found, expected, parallel, tolerance)


@pytest.mark.parametrize("transport", CAPABILITIES)
def test_expert_parallelism_on_one_rank_runs_over_any_transport(transport):
    parallel = ParallelConfig(expert_parallel=True, transport=transport)
    assert parallel.mode == "DP+EP"
    x = torch.randn(5, 16)
    expected, _ = MoE_of(ParallelConfig())(x, trace=True)
    y, trace = MoE_of(parallel)(x, trace=True)
    torch.testing.assert_close(y, expected)
    assert trace.row_token[: int(trace.group_sizes.sum())].min() == 0


def MoE_of(parallel):
    moe = MoE(SMALL, parallel)
    moe.load_params(dense.random_params(SMALL))
    return moe


def test_a_dtype_outside_the_table_is_refused_by_name(monkeypatch):
    for transport, mode in itertools.product(("ragged", "padded"), ("DP+EP", "EP+SP")):
        monkeypatch.setitem(TRANSPORT_DTYPES, transport, frozenset({"bfloat16"}))
        parallel = ParallelConfig(**MODES[mode], transport=transport)
        wanted = re.escape(f"dtype='float32' with transport={transport!r} in mode {mode!r}: allowed are 'bfloat16'")
        with pytest.raises(ValueError, match=wanted):
            check_config(SMALL, parallel)
