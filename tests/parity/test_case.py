import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity.case import ACTIVATIONS, FORMATS, Case, CaseError, Flags


@pytest.mark.parametrize(
    "text",
    [
        "dp2.tp2.ep/allgather/bf16/t222.d2048.f1024/e64.k6/shared+gate",
        "dp1.tp1/local/f32/t1.d8.f8/e1.k1",
        "dp3.tp1.ep/allgather/bf16/t5-0-7.d64.f32/e21.k1/shared2+sharedgate+gate+latent24",
        "dp2.tp4.ep.nosp/allgather/f32/t5.d64.f32/e56.k3/sigmoid+renorm+groups8-4+bias+scale2.5",
        "dp1.tp4.ep.sp/allgather/f32/t5.d64.f32/e8.k8/ids+weightin+swigluoai+interleaved+alpha1.5+limit3",
        "dp2.tp2.ep.native/allgather/bf16/t5-0.d64.f32/e8.k2/gelu+ungated+expertbias+mean+hot+seed7",
        "dp1.tp1/local/bf16/t5.d64.f32/e8.k2/mean+ties+seed7",
        "dp1.tp1/local/bf16/t5.d64.f32/e8.k2/gate+sigmoid+groups4-2+bias+nearties",
    ],
)
def test_a_canonical_id_prints_as_it_was_typed(text):
    assert str(Case.parse(text)) == text


@given(st.data())
def test_every_case_that_can_be_built_survives_printing_and_parsing(data):
    dp, tp = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    ep = data.draw(st.booleans())
    local = data.draw(st.integers(1, 12))
    experts = local * (dp * tp if ep else 1)
    sp = data.draw(st.sampled_from([None, "nosp"] + (["sp", "native"] if ep and tp > 1 else [])))
    flags = data.draw(
        st.builds(
            Flags,
            shared=st.integers(0, 3),
            gate=st.booleans(),
            latent=st.sampled_from([0, -1, 24]),
            sigmoid=st.booleans(),
            renorm=st.booleans(),
            scale=st.sampled_from([1.0, 2.5, 0.001]),
            activation=st.sampled_from(ACTIVATIONS),
            expertbias=st.booleans(),
            seed=st.integers(0, 99),
        )
    )
    tokens = tuple(data.draw(st.lists(st.integers(0, 300), min_size=dp, max_size=dp)))
    case = Case(
        dp=dp, tp=tp, ep=ep, sp=sp,
        transport="allgather" if ep else "local", format=data.draw(st.sampled_from(FORMATS)),
        tokens=(tokens[0] + 1, *tokens[1:]), hidden=data.draw(st.integers(1, 4096)),
        intermediate=tp * data.draw(st.integers(1, 512)), experts=experts,
        top_k=data.draw(st.integers(1, experts)), flags=flags,
    )  # fmt: skip
    assert Case.parse(str(case)) == case


def test_order_of_flags_does_not_matter():
    shuffled = Case.parse("dp1.tp1/local/bf16/t1.d8.f8/e4.k2/seed3+gate+shared")
    assert str(shuffled).endswith("/shared+gate+seed3")


def test_an_explicit_word_for_what_is_derived_is_the_same_case():
    assert Case.parse("dp2.tp2.ep.sp/allgather/bf16/t1.d8.f8/e4.k2") == Case.parse(
        "dp2.tp2.ep/allgather/bf16/t1.d8.f8/e4.k2"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x", ["1 parts", "parallel/transport"]),
        ("dp2.tp2.ep/allgathr/bf16/t1.d8.f8/e4.k2", ["'allgathr'", "did you mean 'allgather'", "local, allgather"]),
        ("dp2.tp2.ep/allgather/fp7/t1.d8.f8/e4.k2", ["'fp7'", "bf16, f32"]),
        ("dp2.tp1.ep/allgather/bf16/t1.d8.f8/e4.k2/shard", ["'shard'", "'shared'"]),
        ("dp2.tp1.ep/allgather/bf16/t1.d8.f8/e4.k5", ["top-k is 5 of 4", "1 to 4"]),
        ("dp2.tp2.ep/allgather/bf16/t1.d8.f8/e6.k2", ["6 experts", "4 EP ranks"]),
        ("dp2.tp1.ep.sp/allgather/bf16/t1.d8.f8/e4.k2", ["tp must be > 1"]),
        ("dp2.tp2.sp/local/bf16/t1.d8.f8/e4.k2", ["needs expert parallelism"]),
        ("dp2.tp1.ep/local/bf16/t1.d8.f8/e4.k2", ["'local'", "'DP+EP'", "allgather"]),
        ("dp2.tp1/allgather/bf16/t1.d8.f8/e4.k2", ["needs expert parallelism"]),
        ("dp2.tp1/local/bf16/t1-2-3.d8.f8/e4.k2", ["3 token counts for 2 DP ranks"]),
        ("dp2.tp1/local/bf16/t0.d8.f8/e4.k2", ["no rank has a token"]),
        ("dp1.tp3/local/bf16/t1.d8.f8/e4.k2", ["intermediate size 8", "3 TP ranks"]),
        ("dp0.tp1/local/bf16/t1.d8.f8/e4.k2", ["at least 1"]),
        ("dp1.tp1/local/bf16/t1.d8.f8/e4.k2/gate+ids", ["exclude each other"]),
        ("dp1.tp1/local/bf16/t1.d8.f8/e4.k2/groups3-1", ["3 groups"]),
        ("dp1.tp1/local/bf16/t1.d8.f8/e8.k4/groups4-1", ["leaves 2 experts for a top-k of 4"]),
        ("dp1.tp1/local/bf16/t1.d8.f8/e8.k4/gate+gate", ["second time"]),
        ("dp1.tp1/local/bf16/t1.d8.f8/e8.k4/relu2+interleaved", ["interleaved"]),
        ("dp1.tp1/local/bf16/t1.d8/e8.k4", ["'t1.d8'", "tT.dD.fF"]),
        ("dp1.tp1/local/bf16/t1.d8.f8/e8.k4/ties+nearties", ["exclude each other"]),
        ("dp1.tp1/local/bf16/t1.d8.f8/e8.k4/ties+ids", ["'ties'", "'ids' has none"]),
        ("dp1.tp1/local/bf16/t1.d8.f8/e8.k4/nearties+hot", ["'nearties'", "'hot' makes all alike"]),
        ("dp1.tp1/local/bf16/t1.d8.f8/e4.k4/ties", ["experts that are not chosen", "4 of 4"]),
        ("dp1.tp1/local/bf16/t1.d4.f8/e4.k2/ties+gate", ["hidden size of 8 or more, not 4"]),
        ("dp1.tp1/local/bf16/t1.d0.f8/e8.k4", ["hidden is 0", "at least 1"]),
    ],
)
def test_a_wrong_id_is_told_what_is_wrong_and_what_is_allowed(text, words):
    with pytest.raises(CaseError) as error:
        Case.parse(text)
    assert all(word in str(error.value) for word in words), error.value


def test_sequence_parallel_is_derived_as_vllm_derives_it():
    for parallel, expected in [
        ("dp2.tp2.ep", True),
        ("dp1.tp4.ep", False),
        ("dp4.tp1.ep", False),
        ("dp1.tp4.ep.sp", True),
    ]:
        assert Case.parse(f"{parallel}/allgather/bf16/t3.d8.f8/e8.k2").sequence_parallel is expected


def test_sequence_parallel_chunks_cover_each_dp_rank_in_order():
    case = Case.parse("dp2.tp4.ep/allgather/bf16/t5-2.d8.f8/e8.k2")
    assert case.rank_counts == (2, 2, 1, 0, 2, 0, 0, 0)
    native = Case.parse("dp2.tp4.ep.native/allgather/bf16/t5-2.d8.f8/e8.k2")
    assert native.rank_counts == (2, 2, 1, 0, 1, 1, 0, 0)


def test_cases_on_different_meshes_with_equal_tokens_share_the_oracle():
    a = Case.parse("dp2.tp2.ep/allgather/bf16/t3.d8.f8/e8.k2")
    b = Case.parse("dp2.tp1/local/bf16/t3.d8.f8/e8.k2")
    assert a.logical_id == b.logical_id != dataclasses.replace(a, format="f32").logical_id
