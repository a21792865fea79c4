"""The verdict against answers that are right by construction, and against the same answers spoiled."""

import dataclasses

import numpy as np
import pytest

from parity.case import Case
from parity.tolerance import ErrorModel
from parity.verdict import judge
from parity.verdict.layout import holdings
from tests.parity.simulated import rounded, simulate, spoiled

SP = "dp2.tp2.ep/allgather/bf16/t13-6.d64.f64/e8.k2"
MODES = [
    "dp1.tp1/local/f32/t5.d16.f16/e4.k2",
    "dp2.tp2/local/bf16/t24-3.d64.f64/e8.k2/shared+gate",
    "dp3.tp1.ep/allgather/f32/t5-0-7.d32.f32/e9.k1/latent",
    SP,
    "dp2.tp2.ep.nosp/allgather/bf16/t13-6.d64.f64/e8.k2/ids",
    "dp2.tp2.ep.native/allgather/bf16/t13-0.d64.f64/e8.k2",
]


def spoil(ranks, rank, **changes):
    out = list(ranks)
    out[rank] = spoiled(out[rank], **changes)
    return out


def everywhere(ranks, change):
    return [dataclasses.replace(r, y=change(i, r)) for i, r in enumerate(ranks)]


@pytest.mark.parametrize("text", MODES)
def test_a_right_answer_passes_in_every_mode(oracle, text):
    case, _, reference = oracle(text)
    judgement = judge(case, reference, {"one": simulate(case, reference), "two": simulate(case, reference, padding=0)})
    assert judgement.verdict == "pass", judgement.reason
    assert 0 < judgement.metrics["margin"] < 1
    assert judgement.metrics["frameworks"]["one"]["exemptions"] == 0


def fails(oracle, text, gate, words, change):
    case, _, reference = oracle(text)
    judgement = judge(
        case, reference, {"good": simulate(case, reference), "bad": change(case, simulate(case, reference))}
    )
    assert judgement.verdict == "fail"
    failed = [g for g in judgement.gates if not g.passed]
    assert gate in {g.gate for g in failed if "bad" in g.framework}, failed
    assert not any(g.framework == "good" for g in failed)
    assert words in " ".join(g.detail for g in failed if g.gate == gate), failed


def test_zeros_fail(oracle):
    fails(oracle, SP, "oracle", "19 of 19 tokens", lambda c, r: everywhere(r, lambda i, x: 0 * x.y))


def test_five_percent_of_rows_zeroed_fail(oracle):
    def drop(case, ranks):
        return everywhere(ranks, lambda i, r: np.where(np.arange(len(r.y))[:, None] % 20 == 3, 0, r.y))

    fails(oracle, "dp1.tp1/local/bf16/t100.d64.f64/e8.k2", "oracle", "5 of 100 tokens are off", drop)


def test_one_lost_slot_fails_and_the_token_is_named(oracle):
    _, _, reference = oracle(SP)

    def drop(case, ranks):
        def change(rank, result):
            start, count = holdings(case)[rank]
            y = result.y.copy()
            if start <= 9 < start + count:
                direction = y[9 - start] / np.linalg.norm(y[9 - start])
                y[9 - start] -= rounded(direction * reference.slot_norm[9, 1], case)
            return y

        return everywhere(ranks, change)

    fails(oracle, SP, "oracle", "token 9 (DP rank 0, row 9", drop)


def test_one_lost_rank_is_named(oracle):
    def drop(case, ranks):
        return everywhere(ranks, lambda i, r: 0 * r.y if i >= 2 else r.y)

    fails(oracle, SP, "oracle", "all on rank 2", drop)


def test_nan_in_one_row_fails_and_is_placed(oracle):
    def poison(case, ranks):
        return spoil(ranks, 1, y=lambda y: np.where(np.arange(len(y))[:, None] == 4, np.nan, y))

    fails(oracle, SP, "sane", "rank 1: y is nan at row 4, column 0", poison)


def test_a_padding_row_that_is_not_zero_fails(oracle):
    def leak(case, ranks):
        return spoil(ranks, 3, y=lambda y: np.where(np.arange(len(y))[:, None] == 7, 1.0, y))

    fails(oracle, SP, "sane", "padding row 7 is not zero", leak)


def test_a_wrong_dtype_or_shape_fails(oracle):
    fails(oracle, SP, "sane", "float32, expected bfloat16", lambda c, r: spoil(r, 0, y_dtype=lambda _: "float32"))
    fails(oracle, SP, "sane", "expected (13 or more, 64)", lambda c, r: spoil(r, 0, y=lambda y: y[:3]))
    fails(oracle, SP, "sane", "3 ranks answered", lambda c, r: r[:3])


def test_replicas_and_repeats_must_agree_bit_for_bit(oracle):
    nudge = lambda y: np.where((np.arange(len(y))[:, None] == 2) & (np.arange(64) == 5), y * (1 + 2**-7), y)  # noqa: E731
    fails(oracle, SP, "exact", "tp replica's at row 2, column 5", lambda c, r: spoil(r, 1, y=nudge))
    fails(oracle, SP, "exact", "repeated run", lambda c, r: spoil(r, 2, repeat_equal=lambda _: False))


def test_structure_is_compared_exactly(oracle):
    def swapped(values):
        values = values.copy()
        values[[0, 1]] = values[[1, 0]]
        return values

    fails(oracle, SP, "exact", "routes token", lambda c, r: spoil(r, 0, token_index=swapped))
    fails(oracle, SP, "exact", "rank 2: row 0 holds", lambda c, r: spoil(r, 2, row_token=swapped))
    fails(
        oracle, SP, "exact", "rows for expert", lambda c, r: spoil(r, 3, group_sizes=lambda s: np.add(s[::-1], [1, 0]))
    )
    fails(oracle, SP, "exact", "counts", lambda c, r: spoil(r, 3, expert_load=lambda s: s + 1))


def test_a_choice_that_is_not_within_rounding_fails(oracle):
    def other(case, ranks):
        return spoil(ranks, 0, topk_ids=lambda ids: np.where(np.arange(len(ids))[:, None] == 3, (ids + 1) % 8, ids))

    fails(oracle, SP, "exact", "token 3", other)


def test_a_choice_within_rounding_is_exempt_counted_and_replayed(oracle):
    case, arrays, _ = oracle("dp1.tp1/local/bf16/t24.d32.f16/e8.k2/seed5")
    logits = np.array(arrays["router_logits"].open())
    order = np.argsort(-logits[4])
    logits[4, order[2]] = np.nextafter(logits[4, order[1]], np.float32(-9))  # the second and third of token 4
    path = arrays["router_logits"].path + "-tied"
    logits.tofile(path)
    tied = arrays | {"router_logits": dataclasses.replace(arrays["router_logits"], path=path)}
    from parity.oracle import reference as evaluate

    reference = evaluate(case, tied)
    assert set(reference.ids[4]) == set(order[:2])
    ids = reference.ids.copy()
    ids[4, 1] = order[1] + order[2] - ids[4, 1]
    replayed = reference.replay(ids)
    judgement = judge(case, reference, {"low": simulate(case, reference), "high": simulate(case, replayed)})
    assert judgement.verdict == "pass", judgement.reason
    high = judgement.metrics["frameworks"]["high"]
    assert (high["exemptions"], high["exemptions_possible"]) == (1, 1)


def test_weights_and_logits_have_gates_of_their_own(oracle):
    fails(
        oracle, SP, "router", "weight of token", lambda c, r: spoil(r, 0, topk_weights=lambda w: w * np.float32(1.001))
    )
    fails(
        oracle, SP, "router", "logit of token", lambda c, r: spoil(r, 0, router_logits=lambda v: v + np.float32(1e-3))
    )


def test_two_frameworks_on_opposite_sides_of_the_bound_disagree(oracle):
    case, _, reference = oracle("dp1.tp1/local/bf16/t24.d64.f64/e8.k2")
    off = 0.9 * ErrorModel("bf16").unit * 1.25 * np.sqrt(reference.variance.sum(1) / (reference.y**2).sum(1))[:, None]
    up, down = (simulate(case, dataclasses.replace(reference, y=reference.y * (1 + s * off))) for s in (1.5, -1.5))
    judgement = judge(case, reference, {"up": up, "down": down})
    assert any(g.gate == "frameworks" and not g.passed for g in judgement.gates)


def test_a_case_that_could_hide_a_lost_expert_is_insensitive(oracle):
    case, _, reference = oracle("dp1.tp1/local/bf16/t24.d64.f64/e8.k2/ids")
    faint = dataclasses.replace(reference, slot_norm=reference.slot_norm * 1e-3)
    judgement = judge(case, faint, {"one": simulate(case, reference)})
    assert judgement.reason.startswith("sensitive: oracle: token")


def test_an_expert_that_adds_exactly_nothing_has_nothing_to_lose(oracle):
    case, _, reference = oracle("dp1.tp1/local/f32/t500.d16.f4/e3.k2/relu2")
    assert (reference.slot_norm == 0).any()
    assert judge(case, reference, {"one": simulate(case, reference)}).verdict == "pass"


def test_a_trivial_reference_fails(oracle):
    case, _, reference = oracle("dp1.tp1/local/bf16/t24.d64.f64/e8.k2/ids")
    faint = dataclasses.replace(reference, y=reference.y * 1e-6, variance=reference.variance * 1e-12)
    assert "trivial" in judge(case, faint, {"one": simulate(case, faint)}).reason


def test_metrics_are_plain_json(oracle):
    import json

    case, _, reference = oracle(SP)
    metrics = judge(case, reference, {"one": simulate(case, reference), "two": simulate(case, reference)}).metrics
    again = json.loads(json.dumps(metrics))
    assert sum(again["frameworks"]["one"]["ulps"].values()) == reference.y.size
    assert again["one vs two"]["bitwise_equal"] == 1.0


# Frameworks that show less.
def bare(ranks):
    return [dataclasses.replace(result, decisions=None, repeat_equal=None) for result in ranks]


def chosen_only(ranks):
    return [
        dataclasses.replace(r, decisions=dataclasses.replace(r.decisions, rows=None, router_logits=None)) for r in ranks
    ]


@pytest.mark.parametrize("text", MODES)
def test_an_output_alone_is_held_to_the_oracle_and_what_it_leaves_open_is_listed(oracle, text):
    case, _, reference = oracle(text)
    right = simulate(case, reference)
    judgement = judge(case, reference, {"bare": bare(right), "full": right, "chosen": chosen_only(right)})
    assert judgement.verdict == "pass", judgement.reason
    logits = ["router logits"] if reference.logits is not None else []
    sides = judgement.metrics["frameworks"]
    assert sides["full"]["not_checked"] == []
    assert sides["chosen"]["not_checked"] == [*logits, "rows, loads and drops"]
    assert sides["bare"]["not_checked"] == ["experts and weights", *logits, "rows, loads and drops", "repeated run"]
    assert {gate.framework for gate in judgement.gates if gate.gate == "frameworks"} == {
        "bare vs full", "bare vs chosen", "full vs chosen",
    }  # fmt: skip
    assert not any(gate.gate == "router" and gate.framework == "bare" for gate in judgement.gates)


def test_an_output_alone_can_fail_every_gate_that_sees_outputs(oracle):
    fails(oracle, SP, "oracle", "19 of 19 tokens", lambda c, r: bare(everywhere(r, lambda i, x: 1.1 * x.y)))
    fails(oracle, SP, "frameworks", "differ by", lambda c, r: bare(everywhere(r, lambda i, x: 1.1 * x.y)))
    nudge = lambda y: np.where((np.arange(len(y))[:, None] == 2) & (np.arange(64) == 5), y * (1 + 2**-7), y)  # noqa: E731
    fails(oracle, SP, "exact", "tp replica's at row 2, column 5", lambda c, r: bare(spoil(r, 1, y=nudge)))
    fails(oracle, SP, "sane", "padding row", lambda c, r: bare(everywhere(r, lambda i, x: x.y + np.float32(1))))


def test_ids_and_weights_without_rows_are_held_to_the_oracles(oracle):
    def other(case, ranks):
        swap = lambda ids: np.where(np.arange(len(ids))[:, None] == 3, (ids + 1) % 8, ids)  # noqa: E731
        return chosen_only(spoil(ranks, 0, topk_ids=swap))

    fails(oracle, SP, "exact", "token 3", other)
    heavier = lambda c, r: chosen_only(spoil(r, 0, topk_weights=lambda w: w * np.float32(1.001)))  # noqa: E731
    fails(oracle, SP, "router", "weight of token", heavier)


# Where the errors are.
def scaled(oracle, text, factor):
    """Numbers of a framework whose output is multiplied by `factor`, (T,), token by token."""
    case, _, reference = oracle(text)
    y = reference.y * np.asarray(factor)[:, None]
    ranks = simulate(case, dataclasses.replace(reference, y=y))
    return case, reference, judge(case, reference, {"one": ranks}).metrics["frameworks"]["one"]


@pytest.mark.parametrize("text", MODES)
def test_errors_are_laid_out_by_rank_and_by_expert(oracle, text):
    case, reference, found = scaled(oracle, text, np.ones(Case.parse(text).total_tokens))
    load = np.bincount(reference.ids.ravel(), minlength=case.experts)
    assert [margin is None for margin in found["by_expert"]] == (load == 0).tolist()
    assert [margin is None for margin in found["by_rank"]] == [count == 0 for count in case.tokens]
    assert all(0 <= margin < 1 for margin in (*found["by_expert"], *found["by_rank"]) if margin is not None)
    if case.dp > 1:
        ends = np.cumsum(case.tokens)
        for rank, row in enumerate(found["by_rank_and_expert"]):
            here = reference.ids[ends[rank] - case.tokens[rank] : ends[rank]]
            assert [margin is not None for margin in row] == [bool((here == e).any()) for e in range(case.experts)]
    else:
        assert "by_rank_and_expert" not in found


def test_the_rank_and_the_experts_of_a_wrong_token_stand_out(oracle):
    case, _, reference = oracle(SP)
    token = 15  # the third row of DP rank 1
    case, reference, found = scaled(oracle, SP, 1 + 0.5 * (np.arange(case.total_tokens) == token))
    assert found["by_rank"][1] > 1 > found["by_rank"][0]
    beyond = {expert for expert, margin in enumerate(found["by_expert"]) if margin > 1}
    assert beyond == set(reference.ids[token].tolist())
    both = found["by_rank_and_expert"]
    assert {(r, e) for r in range(2) for e in range(8) if (both[r][e] or 0) > 1} == {(1, e) for e in beyond}
    worst, *others = found["worst_rows"]
    assert (worst["token"], worst["rank"], worst["row"]) == (token, 1, token - 13)
    assert worst["experts"] == reference.ids[token].tolist()
    assert worst["relative"] == pytest.approx(0.5, rel=0.02)
    margins = [row["margin"] for row in found["worst_rows"]]
    assert margins == sorted(margins, reverse=True)
    assert len(others) == 9
    assert others[0]["margin"] < 1


def test_a_margin_without_limit_is_a_number_in_the_lists(oracle):
    case, _, reference = oracle("dp1.tp1/local/bf16/t24.d64.f64/e8.k2/ids")
    users = (reference.ids == 2).any(axis=1)
    exact = dataclasses.replace(reference, variance=reference.variance * ~users[:, None])  # they may be off by nothing
    found = judge(case, exact, {"one": simulate(case, reference)}).metrics["frameworks"]["one"]
    assert [expert for expert, margin in enumerate(found["by_expert"]) if margin == 1e9] == [2]
    assert found["worst_rows"][0]["margin"] == 1e9
