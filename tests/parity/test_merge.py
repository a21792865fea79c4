"""Parts of a grid, run apart and joined."""

import json

import pytest
from rich.console import Console

from parity import grids, merge, records
from parity.records import Folder, Outcome, OutError

SMOKE = grids.load("smoke")


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_are_all_cases_once_and_about_equal(parts):
    shares = [grids.shard(SMOKE, f"{part}/{parts}") for part in range(1, parts + 1)]
    assert sorted(str(case) for share in shares for case in share) == sorted(map(str, SMOKE))
    costs = [sum(map(grids.cost, share)) for share in shares]
    assert max(costs) - min(costs) < 10


def test_cases_that_share_the_oracles_answer_are_in_one_part():
    cases = grids.load("vllm")
    shares = [{case.logical_id for case in grids.shard(cases, f"{part}/3")} for part in (1, 2, 3)]
    assert sum(map(len, shares)) == len(set.union(*shares))
    costs = [sum(map(grids.cost, grids.shard(cases, f"{part}/3"))) for part in (1, 2, 3)]
    assert max(costs) < 1.1 * min(costs)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_a_part_that_does_not_exist_is_refused(text):
    with pytest.raises(grids.GridError, match="is not I/N"):
        grids.shard(SMOKE, text)


def test_more_parts_than_cases_leave_empty_ones_which_are_refused():
    with pytest.raises(grids.GridError, match="is empty"):
        grids.shard(SMOKE[:1], "2/2")


def _run(path, outcomes, **summary):
    facts = {"cases": len(outcomes), "not_run": 0, "seconds": 10.0, "finished": "2026-01-01T10:00:10+00:00",
             "versions": {"jax": "1"}, "platform": {"machine": "x"}, "command": ["parity", "run"]}  # fmt: skip
    with Folder(path, False, set()) as folder:
        for case, verdict, margin in outcomes:
            folder.add(Outcome(case=str(case), verdict=verdict, metrics={"margin": margin}))
        folder.summarize(facts | summary)
    return path


def _merge(folders, out):
    return merge.main(folders, out, Console(quiet=True))


def test_joined_results_have_every_case_and_one_summary(tmp_path):
    first = _run(tmp_path / "1", [(SMOKE[0], "pass", 0.5), (SMOKE[1], "pass", 0.7)])
    second = _run(tmp_path / "2", [(SMOKE[2], "pass", 0.6)], finished="2026-01-01T10:00:30+00:00", seconds=25.0)
    assert _merge([first, second], tmp_path / "out") == 0
    joined = records.read(tmp_path / "out" / records.RESULTS)
    assert set(joined) == {str(case) for case in SMOKE[:3]}
    summary = json.loads((tmp_path / "out" / records.SUMMARY).read_text())
    assert summary["counts"]["pass"] == summary["cases"] == 3
    assert summary["seconds"] == 30.0  # from the first start, 10:00:00, to the last end
    assert [entry["margin"] for entry in summary["worst_margins"]] == [0.7, 0.6, 0.5]
    assert summary["versions"] == {"jax": "1"}
    assert "versions_differ" not in summary


def test_a_failure_in_any_part_is_the_exit_status(tmp_path):
    first = _run(tmp_path / "1", [(SMOKE[0], "pass", 0.5)])
    second = _run(tmp_path / "2", [(SMOKE[1], "fail", 3.0)], versions={"jax": "2"})
    assert _merge([first, second], tmp_path / "out") == 1
    summary = json.loads((tmp_path / "out" / records.SUMMARY).read_text())
    assert summary["versions_differ"] == [{"jax": "1"}, {"jax": "2"}]


def test_contradictions_and_empty_folders_are_refused(tmp_path):
    first = _run(tmp_path / "1", [(SMOKE[0], "pass", 0.5)])
    second = _run(tmp_path / "2", [(SMOKE[0], "fail", 2.0)])
    with pytest.raises(OutError, match="pass in one folder, fail in"):
        _merge([first, second], tmp_path / "out")
    with pytest.raises(OutError, match="holds no results"):
        _merge([tmp_path / "nothing"], tmp_path / "out")
    with pytest.raises(OutError, match="one of the folders to join"):
        _merge([first], first)
