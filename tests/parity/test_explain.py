"""`parity explain`: what it says of a case, and that it finds where a planted bug sits."""

import io
import json

import pytest
from rich.console import Console

from parity import backends, explain, mutations
from parity.backends.base import Options
from parity.case import Case
from parity.grids import GridError
from parity.records import Outcome
from parity.runner import session

CASE = "dp2.tp2.ep/allgather/bf16/t13.d64.f48/e8.k2/shared+gate+renorm"
WORST = {
    "token": 18,
    "experts": [3, 0],
    "rank": 0,
    "column": 6,
    "value": 0.0,
    "expected": -1.25,
    "slot": 1,
    "expert": 0,
}


def line(stage, free=0.5, taught=0.5, state="ok", worst=None):
    return {"stage": stage, "title": f"the {stage}", "free": free, "taught": taught, "observed_over_model": 0.7,
            "state": state, "worst": worst}  # fmt: skip


def outcome(*stages, gates=()):
    failed = [{"gate": gate, "framework": "jax", "detail": detail, "stage": stage} for gate, detail, stage in gates]
    verdict = "fail" if failed else "pass"
    return Outcome(
        case=CASE, verdict=verdict, metrics={"frameworks": {"jax": {"stages": stages}}, "failed_gates": failed}
    )


def said(found):
    return "\n".join(explain.words(Case.parse(CASE), found, "jax"))


def test_where_an_error_is_born_is_said_with_its_place():
    found = outcome(
        line("activation"),
        line("down", 88.0, 400.0, "born", WORST),
        line("combine", 7.0, 0.5, "came in"),
        line("reduce", 3.0, 1.5, "born"),
        gates=[("stages", "down", "down"), ("oracle", "y", "")],
    )
    text = said(found)
    assert "jax: the error is born in the down" in text
    assert "token 18 (DP rank 1, row 5; experts 3, 0, on ranks 0, 1), slot 1 (expert 0), on rank 0, column 6" in text
    assert "0, expected -1.25; 400 times its bound" in text
    assert "born too in: the reduce" in text
    assert "what came in: the combine" in text
    assert explain.named_stage(found, "jax") == "down"


def test_an_error_that_only_comes_in_is_told_from_one_that_is_born():
    text = said(outcome(line("activation"), line("combine", 7.0, 0.5, "came in", WORST), gates=[("oracle", "y", "")]))
    assert "the error comes in in the combine" in text
    assert "computes rightly from the oracle's inputs" in text
    assert "7 times its bound" in text


def test_what_is_exact_and_what_is_within_bounds_is_said():
    text = said(outcome(line("down"), gates=[("sane", "padding row 3 is not zero", "reduce")]))
    assert "every stage is within its bound" in text
    assert "sane: padding row 3 is not zero" in text
    assert explain.named_stage(outcome(line("down"), gates=[("sane", "", "reduce")]), "jax") == "reduce"
    assert "shows no stages" in said(outcome())
    assert explain.named_stage(outcome(), "jax") is None


def test_the_table_has_a_line_a_stage():
    out = io.StringIO()
    stages = [line("logits", 0.0, 0.0), line("gate_up", None, None), line("down", 1e9, 250.0, "born", WORST)]
    Console(file=out, width=120).print(explain.table("jax", stages))
    text = out.getvalue()
    assert all(word in text for word in ("the logits", "exact", "not shown", "not exact", "2.5e+02", "born"))


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (("zero_output", None), "go together"),
        (("zero_outptu", "jax"), "unknown bug 'zero_outptu'; allowed: zero_output"),
        (("zero_output", "trch"), "--in 'trch' does not run; allowed: jax, torch"),
    ],
)
def test_a_bug_that_cannot_be_planted_is_wrong_usage(planted, message):
    chosen = [backends.load(name, Options()) for name in backends.DEFAULT]
    with pytest.raises(GridError, match=message):
        explain.check(planted, chosen)
    assert explain.check((None, None), chosen) is None


def test_a_planted_bug_is_explained_and_the_other_framework_is_clean():
    chosen, said, out = [backends.load(name, Options()) for name in backends.DEFAULT], [], io.StringIO()
    status = explain.main(
        Case.parse(CASE), chosen, 180.0, ("dropped_expert", "torch"), True, Console(file=out), said.append
    )
    data = json.loads(said[0])
    assert status == 1
    assert data["named"] == {"jax": None, "torch": "down"}
    assert data["planted"] == {"bug": "dropped_expert", "framework": "torch"}
    stages = {line["stage"]: line for line in data["metrics"]["frameworks"]["torch"]["stages"]}
    assert (stages["down"]["state"], stages["combine"]["state"]) == ("born", "came in")
    assert stages["down"]["worst"]["value"] == 0


@pytest.mark.slow
def test_the_stage_of_every_planted_bug_is_found_in_either_framework():
    chosen = [backends.load(name, Options()) for name in backends.DEFAULT]
    with session(chosen, 180.0) as live:
        for bug in mutations.CATALOG:
            for name in backends.DEFAULT:
                found = live.outcome(Case.parse(bug.case), planted=(bug.name, name))
                other = next(each for each in backends.DEFAULT if each != name)
                assert explain.named_stage(found, name) == bug.stage, (bug.name, name, found.reason)
                assert explain.named_stage(found, other) is None, (bug.name, other, found.reason)
