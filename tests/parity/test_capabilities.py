"""The capability table: the command and both packages have the same one, and it is true."""

import importlib
import itertools

import pytest

from parity.case import ACROSS_NODES, CAPABILITIES, CARRIES, MODES, TRANSPORTS, Case, CaseError
from parity.fixtures import DTYPE

PARALLEL = {
    "single": "dp1.tp1", "DP": "dp2.tp1", "TP": "dp1.tp2", "DP+TP": "dp2.tp2", "DP+EP": "dp2.tp1.ep",
    "EP+SP": "dp2.tp2.ep", "EP+SP native": "dp2.tp2.ep.native", "EP, SP off": "dp2.tp2.ep.nosp",
}  # fmt: skip


@pytest.mark.parametrize("house", ["jax_moe", "torch_moe"])
def test_each_package_has_the_same_table(house):
    package = importlib.import_module(house)
    assert {name: frozenset(modes) for name, modes in package.CAPABILITIES.items()} == CAPABILITIES
    assert frozenset(package.ACROSS_NODES) == ACROSS_NODES
    carried = {name: frozenset(DTYPE[fmt] for fmt in formats) for name, formats in CARRIES.items()}
    # Cases have no float16, which jax_moe moves too.
    moved = {name: frozenset(dtypes) - {"float16"} for name, dtypes in package.TRANSPORT_DTYPES.items()}
    assert moved == carried


@pytest.mark.parametrize(("transport", "mode"), list(itertools.product(TRANSPORTS, MODES)))
def test_a_case_can_be_named_exactly_where_the_table_allows(transport, mode):
    text = f"{PARALLEL[mode]}/{transport}/bf16/t4.d8.f8/e4.k2"
    if mode in CAPABILITIES[transport]:
        assert Case.parse(text).mode == mode
    else:
        with pytest.raises(CaseError, match="cannot serve mode"):
            Case.parse(text)


@pytest.mark.parametrize("house", ["jax_moe", "torch_moe"])
@pytest.mark.parametrize(("transport", "mode"), list(itertools.product(TRANSPORTS, MODES)))
def test_each_package_refuses_what_the_table_forbids_before_anything_runs(house, transport, mode):
    package = importlib.import_module(house)
    case = Case.parse(f"{PARALLEL[mode]}/{next(t for t in TRANSPORTS if mode in CAPABILITIES[t])}/bf16/t4.d8.f8/e4.k2")
    fields = {
        "dp": case.dp, "tp": case.tp, "expert_parallel": case.ep, "transport": transport,
        "sequence_parallel": case.sequence_parallel, "token_layout": "dp_tp" if case.native else "dp",
    }  # fmt: skip
    if mode in CAPABILITIES[transport]:
        assert package.ParallelConfig(**fields).transport == transport
    else:
        with pytest.raises(ValueError, match=transport):
            package.ParallelConfig(**fields)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nodes_are_for_transports_that_cross_them(transport):
    text = f"dp4.tp1.ep.nodes2/{transport}/bf16/t4.d8.f8/e4.k2"
    if transport in ACROSS_NODES:
        assert Case.parse(text).nodes == 2
    else:
        with pytest.raises(CaseError):
            Case.parse(text)
