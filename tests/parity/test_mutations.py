"""Planted bugs: the catalogue, planting and taking out, and what the selftest makes of them."""

import io
import json

import pytest
from rich.console import Console

from parity import backends, mutations, selftest
from parity.backends.base import Options
from parity.case import Case
from parity.mutations import Mutation
from parity.mutations.plant import replaced
from parity.selftest import Finding
from parity.stages import NAMES
from parity.verdict import GATES, Gate, Judgement

CATALOG = {mutation.name: mutation for mutation in mutations.CATALOG}
REQUIRED = {
    "zero_output", "dropped_slot", "dropped_expert", "lost_rank", "swapped_experts", "double_reduction",
    "renorm_skipped", "gate_up_swapped", "sp_trimmed", "shared_times_n", "nan_padding",
}  # fmt: skip


def test_the_catalogue_has_what_every_harness_must_catch():
    assert set(CATALOG) >= REQUIRED
    assert len(CATALOG) == len(mutations.CATALOG)


def test_every_bug_has_a_case_and_gates_of_the_verdict():
    for mutation in mutations.CATALOG:
        assert str(Case.parse(mutation.case)) == mutation.case
        assert mutation.gates
        assert mutation.stage in NAMES
        assert set(mutation.gates) <= set(GATES)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_every_bug_is_written_for_every_framework_and_leaves_no_trace(framework):
    planting = mutations.planter(framework)
    module = __import__(f"parity.mutations.{framework}", fromlist=["BUGS"])
    assert set(module.BUGS) == set(CATALOG)
    for name, bug in module.BUGS.items():
        before = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in bug()]
        with planting(name):
            assert all(getattr(owner, attribute) is not value for owner, attribute, value in before)
        assert all(getattr(owner, attribute) is value for owner, attribute, value in before)


def test_every_stage_has_a_bug():
    assert {mutation.stage for mutation in mutations.CATALOG} == set(NAMES)


def _verdict(*gates):
    return Judgement("fail" if gates else "pass", "because", [Gate(*gate) for gate in gates])


OFF = ("oracle", "jax", False, "", 9.0, "")


@pytest.mark.parametrize(
    ("gates", "outcome", "words"),
    [
        ((), "survived", "because"),
        ((("stages", "jax", False, "", 7.0, "down"), OFF), "caught", "because"),
        ((OFF,), "vague", "stages passed"),
        ((("stages", "jax", False, "", 7.0, "gate_up"), OFF), "vague", "gate_up is named, it sits in down"),
        ((("stages", "torch", False, "", 7.0, "down"), OFF), "vague", "no stage is named"),
        ((("stages", "jax", False, "", 1.2, "down"), OFF), "vague", "only 1.2 times the bound, wanted 5"),
        (
            (("stages", "jax", False, "", 7.0, "down"), ("exact", "jax", False, "", None, "choice"), OFF),
            "vague",
            "choice",
        ),
    ],
)
def test_a_bug_is_caught_where_it_sits_and_by_a_margin_or_not_at_all(gates, outcome, words):
    bug = Mutation("name", "what", "case", "down", ("stages", "oracle"))
    found = selftest._found(bug, "jax", _verdict(*gates))
    assert found[0] == outcome
    assert words in found[-1]


def test_what_allows_nothing_has_the_largest_margin():
    verdict = _verdict(("exact", "jax", False, "", None, "choice"), ("stages", "jax", False, "", 7.0, "choice"))
    assert verdict.blamed("jax") == ("choice", 1e9)
    assert verdict.blamed("torch") == ("", 0.0)


def test_an_unknown_bug_or_backend_is_named():
    with pytest.raises(LookupError, match=r"unknown bug 'nosuch'; allowed: zero_output"):
        mutations.planter("torch")("nosuch")
    with pytest.raises(LookupError, match="no bugs are known for backend 'fake'"):
        mutations.planter("fake")


def test_replacing_what_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="nosuch"), replaced([(selftest, "nosuch", print)]):
        pass


def test_a_replacement_is_undone_when_the_case_raises():
    original = selftest.table
    with pytest.raises(ZeroDivisionError), replaced([(selftest, "table", print)]):
        raise ZeroDivisionError
    assert selftest.table is original


@pytest.fixture
def findings(monkeypatch):
    """Replace what the selftest finds."""

    def give(*found):
        monkeypatch.setattr(selftest, "run", lambda live, catalog: iter(found))

    return give


def _main(as_json=False):
    out, said = io.StringIO(), []
    status = selftest.main([], 1.0, "zero_output", as_json, Console(file=out, width=200), said.append)
    return status, out.getvalue(), said


def _finding(framework, outcome, gates=()):
    stage, margin = ("reduce", 40.0) if outcome == "caught" else ("", None)
    return Finding("zero_output" if framework else "", framework, "case", outcome, gates, stage, margin, "because", 0.1)


def test_the_table_names_the_gates_and_the_status_is_0_when_all_are_caught(findings):
    findings(_finding("", "passed"), _finding("jax", "caught", ("oracle",)), _finding("torch", "caught", ("sane",)))
    status, text, _ = _main()
    assert status == 0
    assert "2 of 2 planted bugs caught" in text
    assert "reduce 40x, by oracle" in text


@pytest.mark.parametrize("outcome", ["survived", "crashed", "vague"])
def test_a_bug_that_is_not_caught_is_a_failure(findings, outcome):
    findings(_finding("", "passed"), _finding("jax", outcome))
    status, text, _ = _main()
    assert status == 1
    assert outcome.upper() in text
    assert "0 of 1 planted bugs caught" in text


def test_a_case_that_fails_without_a_bug_is_a_failure(findings):
    findings(_finding("", "failed"), _finding("jax", "caught", ("oracle",)))
    status, _, said = _main(as_json=True)
    assert status == 1
    assert json.loads(said[0])["passed"] is False


def _caught(catalog):
    with selftest.session([backends.load(name, Options()) for name in backends.DEFAULT], 180.0) as live:
        return list(selftest.run(live, catalog))


def _assert_caught(findings):
    for finding in findings:
        assert finding.good, finding
        if finding.mutation:
            assert set(CATALOG[finding.mutation].gates) <= set(finding.gates), finding
            assert finding.stage == CATALOG[finding.mutation].stage, finding
            assert finding.margin >= 5, finding


def test_bugs_planted_in_either_framework_are_caught_by_the_gates_that_should():
    _assert_caught(_caught([CATALOG["reduction_skipped"], CATALOG["double_reduction"]]))


@pytest.mark.slow
def test_every_bug_in_either_framework_is_caught_by_the_gates_that_should():
    _assert_caught(_caught(mutations.CATALOG))
