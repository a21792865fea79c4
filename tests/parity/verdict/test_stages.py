"""Stages against answers that are right by construction, and against the same answers spoiled in one stage."""

import dataclasses

import numpy as np
import pytest

from parity.arrays import float32_of_bits
from parity.stages import NAMES
from parity.verdict import judge
from parity.verdict.tally import INFINITE
from tests.parity.simulated import simulate

EP = "dp2.tp2.ep/allgather/bf16/t13-6.d64.f64/e8.k2/shared+gate+latent"
TP = "dp1.tp2/local/bf16/t24.d64.f64/e8.k2/shared+gate"
MODES = [
    EP,
    TP,
    "dp2.tp2/local/f32/t24-3.d64.f64/e8.k2/shared+latent+expertbias",
    "dp1.tp2/local/bf16/t6.d64.f48/e8.k3/gelu+interleaved+shared+weightin",
    "dp2.tp2.ep.nosp/allgather/bf16/t13-6.d64.f64/e8.k2/ids+shared",
    "dp2.tp2.ep.native/allgather/bf16/t13-0.d64.f64/e8.k2/relu2",
    "dp1.tp1/local/f32/t5.d16.f16/e4.k2",
]
SOME = {"logits": EP, "choice": EP, "latent_in": EP, "dispatch": EP, "gate_up": TP, "activation": TP, "down": TP,
        "combine": TP, "latent_out": EP, "shared": TP, "reduce": EP}  # fmt: skip


def judged(teacher, text, change=lambda case, ranks: ranks):
    case, _, reference = teacher(text)
    return judge(case, reference, {"one": change(case, simulate(case, reference))})


def table(judgement):
    return {line["stage"]: line for line in judgement.metrics["frameworks"]["one"]["stages"]}


def failed(judgement):
    return [gate for gate in judgement.gates if gate.gate == "stages" and not gate.passed]


def everywhere(ranks, change):
    """Every rank's stages, free and taught, changed: `change(rank, results)`."""
    return [
        dataclasses.replace(result, stages=change(rank, dict(result.stages)), taught=change(rank, dict(result.taught)))
        for rank, result in enumerate(ranks)
    ]


def alter(stage, how):
    """Change one stage where it is, on every rank."""

    def change(case, ranks):
        def one(rank, found):
            return found | ({stage: how(rank, found[stage])} if stage in found else {})

        return everywhere(ranks, one)

    return change


@pytest.mark.parametrize("text", MODES)
def test_a_right_answer_passes_stage_by_stage_in_every_mode(teacher, text):
    judgement = judged(teacher, text)
    assert judgement.verdict == "pass", judgement.reason
    lines = table(judgement)
    assert list(lines) == [name for name in NAMES if name in lines]
    assert {"choice", "dispatch", "gate_up", "activation", "down", "combine", "reduce"} <= set(lines)
    for line in lines.values():
        assert line["state"] == "ok"
        assert 0 <= line["taught"] < 1
        assert 0 <= line["free"] < 1


@pytest.mark.parametrize("stage", SOME)
def test_an_error_is_found_in_the_stage_it_is_born_in(teacher, stage):
    key = {"choice": "topk_weights", "reduce": "y"}.get(stage, stage)

    def change(case, ranks):
        ranks = alter(key, lambda rank, values: values * np.float32(1.1))(case, ranks)
        if stage == "reduce":
            return [dataclasses.replace(result, y=result.y * np.float32(1.1)) for result in ranks]
        if stage in ("logits", "choice"):
            name = "router_logits" if stage == "logits" else key
            return [dataclasses.replace(r, decisions=dataclasses.replace(
                r.decisions, **{name: getattr(r.decisions, name) * np.float32(1.1)})) for r in ranks]  # fmt: skip
        return ranks

    judgement = judged(teacher, SOME[stage], change)
    assert [gate.stage for gate in failed(judgement)] == [stage]
    lines = table(judgement)
    assert {name for name, line in lines.items() if line["state"] != "ok"} == {stage}
    assert lines[stage]["state"] == "born"
    assert min(lines[stage]["taught"], lines[stage]["free"]) > 5
    assert judgement.verdict == "fail"


def test_a_router_that_is_wrong_about_every_token_is_found_too(teacher):
    def wrong(ids):
        first = [min(set(range(8)) - set(row)) for row in ids.tolist()]
        return np.where((ids < 8).all(axis=1)[:, None], np.column_stack([first, ids[:, 1:]]), ids).astype(ids.dtype)

    def change(case, ranks):
        ranks = alter("topk_ids", lambda rank, ids: wrong(ids))(case, ranks)
        return [
            dataclasses.replace(r, decisions=dataclasses.replace(r.decisions, topk_ids=wrong(r.decisions.topk_ids)))
            for r in ranks
        ]

    judgement = judged(teacher, EP, change)
    assert "choice" in [gate.stage for gate in failed(judgement)]
    assert table(judgement)["choice"]["state"] == "born"


def test_what_came_in_is_told_from_what_was_born(teacher):
    def change(case, ranks):
        ranks = alter("gate_up", lambda rank, values: values * np.float32(1.1))(case, ranks)
        spoiled = [r.stages["activation"] * 1.1 for r in ranks]
        return [
            dataclasses.replace(r, stages=dict(r.stages) | {"activation": h})
            for r, h in zip(ranks, spoiled, strict=True)
        ]

    lines = table(judged(teacher, TP, change))
    assert (lines["gate_up"]["state"], lines["activation"]["state"]) == ("born", "came in")
    assert lines["activation"]["taught"] < 1 < lines["activation"]["free"]


def test_the_worst_place_is_named(teacher):
    case, _, reference = teacher(EP)
    token, slot = 9, 1
    expert = int(reference.ids[token, slot])

    def change(case, ranks):
        def spoil(rank, found):
            row = (ranks[rank].decisions.rows.row_token == token) & (ranks[rank].decisions.rows.row_slot == slot)
            down = found["down"].copy()
            down[row, 7] += 3
            return found | {"down": down}

        return everywhere(ranks, spoil)

    judgement = judge(case, reference, {"one": change(case, simulate(case, reference))})
    worst = table(judgement)["down"]["worst"]
    where = {"token": token, "slot": slot, "expert": expert, "rank": expert // 2, "column": 7}
    assert {key: worst[key] for key in where} == where
    assert worst["value"] == pytest.approx(worst["expected"] + 3, rel=1e-2)
    words = failed(judgement)[0].detail
    assert f"down, taught: token {token} for expert {expert} on rank {expert // 2}" in words
    assert "column 7" in words


@pytest.mark.parametrize("stage", ["latent_in", "activation", "down", "reduce"])
def test_rounding_towards_zero_leans(teacher, stage):
    def cut(rank, values):
        # below the rounded value by its last place, as often as truncation would be
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16
        lower = np.random.default_rng(rank).random(bits.shape) < 0.5
        return float32_of_bits((bits - (lower & (values != 0))).astype(np.uint16))

    key = "y" if stage == "reduce" else stage
    judgement = judged(teacher, "dp1.tp1/local/bf16/t64.d64.f64/e8.k2/latent", alter(key, cut))
    words = [gate.detail for gate in failed(judgement) if gate.stage == stage]
    assert words
    assert table(judgement)[stage]["taught"] > 5
    assert "lean towards zero" in words[0]


def test_what_is_kept_in_float32_is_held_to_float32(teacher):
    noise = np.float32(2.0**-12)
    judgement = judged(teacher, TP, alter("gate_up", lambda rank, values: values * (1 + noise)))
    assert table(judgement)["gate_up"]["taught"] > 5
    rounded = judged(teacher, TP, alter("gate_up", lambda rank, values: _bf16(values)))
    assert rounded.verdict == "pass", rounded.reason
    assert 0.2 < table(rounded)["gate_up"]["taught"] < 1


BIASED = ["dp1.tp2/local/bf16/t24.d64.f64/e8.k2/expertbias", "dp2.tp1.ep/allgather/bf16/t9.d64.f64/e8.k2/expertbias"]


@pytest.mark.parametrize("text", BIASED)
@pytest.mark.parametrize("stage", ["gate_up", "down"])
def test_a_product_may_be_rounded_before_its_bias_or_after_and_not_twice(teacher, text, stage):
    _, _, reference = teacher(text)
    own = reference.taught()

    def rounding(times):
        """Each rank's product rounded before the bias is added in float32; twice: once more, and further off."""

        def change(case, ranks):
            out = []
            for rank, result in enumerate(ranks):
                rows = result.decisions.rows
                real = rows.row_token >= 0
                found = []
                for answer, values in ((reference, result.stages), (own, result.taught)):
                    at = rows.row_token * case.top_k + rows.row_slot
                    bias, whole = answer.stages[stage].bias[at], answer.stages[stage].exact[at] * real[:, None]
                    values = dict(values)
                    bias = bias * real[:, None]
                    if case.tp > 1 and stage == "gate_up":
                        half = values[stage].shape[1] // 2
                        gate, up = np.split(bias, 2, axis=1)
                        bias = np.hstack([part[:, rank * half : (rank + 1) * half] for part in (gate, up)])
                    elif case.tp > 1:
                        bias = bias * (rank == 0)
                    whole = whole if case.tp == 1 else values[stage].astype(np.float64)
                    product = _bf16(whole - bias) * np.float32(1 + (times - 1) * 2.0**-7)
                    values[stage] = product + bias.astype(np.float32)
                    found.append(values)
                out.append(dataclasses.replace(result, stages=found[0], taught=found[1]))
            return out

        return change

    once = judged(teacher, text, rounding(1))
    assert once.verdict == "pass", once.reason
    assert 0.2 < table(once)[stage]["taught"] < 1
    assert table(judged(teacher, text, rounding(2)))[stage]["state"] == "born"


def test_sums_that_a_tensor_core_cuts_off_may_lean_a_little(teacher):
    def cut(last_places):
        """Towards zero by some of a float32's last places."""

        def lower(rank, values):
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            return (bits - np.where(values == 0, 0, last_places).astype(np.uint32)).view(np.float32)

        return alter("gate_up", lower)

    little = judged(teacher, "dp1.tp1/local/bf16/t64.d64.f64/e8.k2", cut(1))
    assert little.verdict == "pass", little.reason
    # off together by more than chance allows, and by less than 512 / 8 cuts come to
    deep = judged(teacher, "dp1.tp1/local/bf16/t16.d512.f64/e8.k2", cut(20))
    assert deep.verdict == "pass", deep.reason
    assert table(deep)["gate_up"]["observed_over_model"] > 2
    deeper = judged(teacher, "dp1.tp1/local/bf16/t16.d512.f64/e8.k2", cut(2**9))
    assert table(deeper)["gate_up"]["state"] == "born"
    much = judged(teacher, "dp1.tp1/local/bf16/t64.d64.f64/e8.k2", cut(2**7))
    assert table(much)["gate_up"]["state"] == "born"


def _bf16(values):
    from parity.arrays import bits_of_float32

    return float32_of_bits(bits_of_float32(values))


def test_sums_are_never_rounded(teacher):
    judgement = judged(teacher, TP, alter("shared", lambda rank, values: _bf16(values * (1 + np.float32(2.0**-7)))))
    assert table(judgement)["shared"]["state"] == "born"


def test_a_rank_that_takes_anothers_share_shows(teacher):
    def change(case, ranks):
        taught = [dict(result.taught) for result in ranks]
        taught[0]["down"], taught[1]["down"] = taught[1]["down"], taught[1]["down"]
        return [dataclasses.replace(r, taught=t) for r, t in zip(ranks, taught, strict=True)]

    case, _, reference = teacher("dp1.tp4/local/bf16/t24.d64.f64/e8.k2")
    ranks = simulate(case, reference)
    assert judge(case, reference, {"one": ranks}).verdict == "pass"
    assert table(judge(case, reference, {"one": change(case, ranks)}))["down"]["state"] == "born"


def test_a_framework_without_stages_is_judged_without_them(teacher):
    def bare(case, ranks):
        return [dataclasses.replace(result, stages={}, taught={}) for result in ranks]

    judgement = judged(teacher, EP, bare)
    assert judgement.verdict == "pass"
    assert judgement.metrics["frameworks"]["one"]["stages"] == []
    assert "stages" not in {gate.gate for gate in judgement.gates}


def test_without_teaching_the_first_stage_that_is_off_is_where_it_is_born(teacher):
    def change(case, ranks):
        spoiled = ("activation", "down")
        return [
            dataclasses.replace(r, taught={}, stages={k: v * 1.1 if k in spoiled else v for k, v in r.stages.items()})
            for r in ranks
        ]

    lines = table(judged(teacher, TP, change))
    assert all(line["taught"] is None for line in lines.values())
    assert [name for name, line in lines.items() if line["state"] != "ok"] == ["activation", "down"]
    assert (lines["activation"]["state"], lines["down"]["state"]) == ("born", "came in")


def test_a_fused_kernel_is_judged_from_dispatch_to_activation(teacher):
    case, _, reference = teacher("dp1.tp1/local/bf16/t24.d64.f64/e8.k2/weightin")
    fused = reference.taught(frozenset({"gate_up"}))

    def change(case, ranks):
        found = simulate(case, dataclasses.replace(reference, taught=lambda *_: fused))
        return [
            dataclasses.replace(r, **{name: {k: v for k, v in getattr(r, name).items() if k != "gate_up"}
                                      for name in ("stages", "taught")})
            for r in found
        ]  # fmt: skip

    judgement = judge(case, reference, {"one": change(case, None)})
    assert judgement.verdict == "pass", judgement.reason
    line = table(judgement)["gate_up"]
    assert (line["free"], line["taught"], line["state"]) == (None, None, "ok")
    assert 0.2 < table(judgement)["activation"]["taught"] < 1


@pytest.mark.parametrize(
    ("words", "how"),
    [
        ("down has shape", lambda rank, values: values[:, :-1]),
        ("down has shape", lambda rank, values: values[:-1]),
        ("token 9", lambda rank, values: np.where(np.arange(len(values))[:, None] == -1, 0, values * np.nan)),
    ],
)
def test_results_of_the_wrong_shape_or_kind_are_the_stages_fault(teacher, words, how):
    judgement = judged(teacher, EP, alter("down", how))
    lines = table(judgement)
    assert lines["down"]["state"] == "born"
    assert lines["down"]["taught"] == INFINITE
    assert failed(judgement)[0].stage == "down"
    assert words.split()[0] in failed(judgement)[0].detail


def test_a_row_that_no_rank_has_is_missed(teacher):
    def lose(case, ranks):
        def change(rank, found):
            if "row_token" not in found:
                found["row_token"] = ranks[rank].decisions.rows.row_token.copy()
                found["row_slot"] = ranks[rank].decisions.rows.row_slot
            found["row_token"][found["row_token"] == 4] = -1
            return found

        return [dataclasses.replace(r, taught=change(rank, dict(r.taught))) for rank, r in enumerate(ranks)]

    judgement = judged(teacher, EP, lose)
    assert table(judgement)["dispatch"]["taught"] == INFINITE
    assert "no rank has a row of token 4" in failed(judgement)[0].detail


def test_a_wrong_choice_is_the_choices_fault(teacher):
    def change(case, ranks):
        def other(ids):
            return np.where(np.arange(len(ids))[:, None] == 2, (ids + 1) % 8, ids)

        return [
            dataclasses.replace(r, taught=dict(r.taught) | {"topk_ids": other(r.taught["topk_ids"])}) for r in ranks
        ]

    lines = table(judged(teacher, TP, change))
    assert lines["choice"]["taught"] == INFINITE
    assert lines["choice"]["worst"]["token"] == 2
    assert lines["dispatch"]["taught"] == 0


def test_a_choice_within_rounding_is_replayed_in_the_free_run(cache):
    from parity import fixtures
    from parity.case import Case
    from parity.oracle import teach

    case = Case.parse("dp1.tp1/local/bf16/t24.d32.f16/e8.k2/seed5")
    arrays = fixtures.build(case, cache)
    logits = np.array(arrays["router_logits"].open())
    order = np.argsort(-logits[4])
    logits[4, order[2]] = np.nextafter(logits[4, order[1]], np.float32(-9))  # the second and third of token 4
    path = str(cache.parent / "tied-stages")
    logits.tofile(path)
    tied = arrays | {"router_logits": dataclasses.replace(arrays["router_logits"], path=path)}
    reference, _ = teach(case, tied, cache.parent / "lessons-tied")
    ids = reference.ids.copy()
    ids[4, 1] = order[1] + order[2] - ids[4, 1]
    replayed = dataclasses.replace(reference.replay(ids), taught=reference.taught)
    found = simulate(case, replayed)
    judgement = judge(case, reference, {"one": [dataclasses.replace(r, taught={}) for r in found]})
    assert judgement.verdict == "pass", judgement.reason
    assert all(line["free"] < 1 for line in table(judgement).values())
