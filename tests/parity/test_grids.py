import itertools

import pytest

from parity import grids
from parity.case import CAPABILITIES, FLAGS, TRANSPORTS, Case


def test_smoke_has_every_mode_dtype_and_flag():
    cases = grids.load("smoke")
    assert {case.mode for case in cases} == {
        "single", "DP", "TP", "DP+TP", "DP+EP", "EP+SP", "EP+SP native", "EP, SP off",
    }  # fmt: skip
    for mode in {case.mode for case in cases}:
        assert {case.format for case in cases if case.mode == mode} == {"bf16", "f32"}
    used = "+".join(str(case).rpartition("/")[2] for case in cases)
    for flag in itertools.chain.from_iterable(key.split(",") for key in FLAGS):
        stem = flag.strip().rstrip("XNGK-")
        assert stem in used, f"no smoke case has the flag {flag.strip()!r}"


def test_smoke_has_uneven_and_empty_ranks_in_every_transport():
    cases = grids.load("smoke")
    for transport in TRANSPORTS:
        assert any(0 in case.tokens for case in cases if case.transport == transport)
    assert any(len(set(case.tokens)) > 1 and case.sequence_parallel for case in cases)
    assert any(0 in case.rank_counts and case.native for case in cases)


def test_vllm_grid_is_the_product_it_says():
    cases = grids.load("vllm")
    assert len(cases) == 6 * 72 + 2 * 3 * 24 + 6 * 2 * 2
    cells = {(name, mode) for name, modes in CAPABILITIES.items() for mode in modes if name != "one_sided"}
    assert {(case.transport, case.mode) for case in cases} == cells
    assert {case.transport for case in cases if case.ep} == {"allgather", "ragged", "padded"}
    assert {(case.tokens[0], case.intermediate, case.hidden) for case in cases} == {
        (1, 128, 256), (32, 512, 512), (222, 1024, 2048),
    }  # fmt: skip
    assert {(case.experts, case.top_k) for case in cases} == {(8, 2), (8, 6), (64, 2), (64, 6)}
    flags = {(bool(case.flags.shared), case.flags.gate, bool(case.flags.latent)) for case in cases}
    assert flags == {(False, False, False), (False, True, False), (True, False, False), (True, False, True),
                     (True, True, False), (True, True, True)}  # fmt: skip


def test_transports_grid_has_every_transport_on_every_kind_of_mesh():
    cases = grids.load("transports")
    for transport in ("allgather", "ragged", "padded"):
        mine = [case for case in cases if case.transport == transport]
        assert {case.world for case in mine} == {2, 3, 4, 8}
        assert {case.experts // case.world for case in mine} >= {1, 3, 12}
        assert any(case.top_k == case.experts for case in mine)
        assert any(case.flags.hot for case in mine)
        assert any(case.total_tokens == 1 for case in mine)
    assert {case.transport for case in cases if case.nodes > 1} == {"ragged", "padded"}
    assert {case.transport for case in cases if case.drops} == {"ragged", "padded", "one_sided"}
    assert {case.world for case in cases if case.transport == "one_sided"} == {2, 3, 4, 8}


@pytest.mark.parametrize("name", ["smoke", "vllm", "transports", "huggingface"])
def test_cases_that_share_expert_weights_and_the_oracles_answer_are_neighbours(name):
    cases = grids.load(name)
    for key in (grids._weights_key, lambda case: (grids._weights_key(case), case.logical_id)):
        runs = [group for group, _ in itertools.groupby(map(key, cases))]
        assert len(runs) == len(set(runs))


def test_order_drops_duplicates():
    case = Case.parse("dp1.tp1/local/f32/t3.d8.f8/e4.k2")
    assert grids.order([case, case]) == [case]


def test_select_wants_every_word_in_any_order_and_case():
    cases = grids.load("smoke")
    chosen = grids.select(cases, "NATIVE f32")
    assert chosen
    assert all("native" in str(case) and "/f32/" in str(case) for case in chosen)
    assert grids.select(cases, None) == cases


def test_select_says_when_nothing_matches():
    with pytest.raises(grids.GridError, match="-k 'nosuch' matches none of 2 cases"):
        grids.select(grids.load("smoke")[:2], "nosuch")


def test_unknown_grid_suggests_a_near_one():
    with pytest.raises(grids.GridError, match=r"unknown grid 'vlm' \(did you mean 'vllm'\?\).*allowed: smoke, vllm"):
        grids.load("vlm")


GRID = """
cases = ["dp1.tp1/local/bf16/t3.d8.f8/e4.k2/gate"]

[[product]]
parallel = ["dp2.tp1.ep", "dp1.tp2"]
format = ["bf16", "f32"]
sizes = ["t7.d8.f8"]
routing = ["e8.k2", "e8.k3"]
flags = ["", "shared+gate"]
"""


def test_toml_file_lists_ids_and_products_and_derives_the_transport(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GRID)
    cases = grids.load(str(path))
    assert len(cases) == 1 + 2 * 2 * 2 * 2
    assert {(case.ep, case.transport) for case in cases} == {(True, "allgather"), (False, "local")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cases = [", "is not TOML"),
        ("case = []", r"unknown key 'case' at the top \(did you mean 'cases'\?\); allowed: cases, product"),
        ("cases = 'a'", "cases must be a list of strings, not 'a'"),
        ("cases = ['x/y']", r"cases\[0\]: case 'x/y' has 2 parts"),
        ("", "has no cases"),
        ("product = 3", r"'product' must be tables, written \[\[product\]\]"),
        ("[[product]]\nparalel = ['dp1.tp1']", r"unknown key 'paralel' in product\[0\] \(did you mean 'parallel'\?\)"),
        ("[[product]]\nparallel = ['dp1.tp1']", r"product\[0\] lacks the key 'format'"),
        (GRID.replace('["e8.k2", "e8.k3"]', "[]"), r"product\[0\].routing is empty"),
        (GRID.replace("e8.k3", "e7.k3"), r"product\[0\]: case .*7 experts do not divide over 2 EP ranks"),
    ],
)
def test_a_bad_toml_file_is_named_with_its_key(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(grids.GridError, match=message) as caught:
        grids.load(str(path))
    assert "bad.toml" in str(caught.value)


def test_a_missing_toml_file_is_named():
    with pytest.raises(grids.GridError, match=r"nosuch.toml' cannot be read: No such file"):
        grids.load("nosuch.toml")
