"""Running cases, what a run leaves behind, going on after an interruption."""

import errno
import json
import os
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from parity import backends, fixtures, oracle, records, runner, verdict
from parity.backends.base import Options
from parity.case import Case
from parity.launch import InfrastructureError
from parity.records import Folder, Outcome, OutError
from parity.runner import Harness, session
from tests.parity import plugin as trouble
from tests.parity.plugin import case_id
from tests.parity.plugin import plugin as plugin

FINE = [Case.parse(case_id(seed)) for seed in (1, 2, 3)]


@dataclass
class Live:
    """A session that only answers."""

    answers: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)

    def ran(self, case, then=None):
        self.asked.append(str(case))
        answer = self.answers.get(str(case), "pass")
        if isinstance(answer, BaseException):
            raise answer
        reason = "" if answer == "pass" else "because"
        return lambda: Outcome(case=str(case), verdict=answer, reason=reason, seconds=0.5)


def _folder(path, cases=FINE, resume=False):
    return Folder(path, resume, {str(case) for case in cases})


def _lines(path):
    header, *lines = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    assert (header["format"], header["version"]) == ("parity-results", records.VERSION)
    return lines


def test_each_case_is_a_line_as_soon_as_it_is_judged(tmp_path):
    seen = []
    with _folder(tmp_path) as folder:
        runner.run(FINE, Live(), folder, watch=lambda outcome, left, s: seen.append((left, len(_lines(tmp_path)))))
    assert seen == [(2, 1), (1, 2), (0, 3)]
    assert set(_lines(tmp_path)[0]) == {"case", "verdict", "reason", "metrics", "seconds"}


def test_a_case_is_judged_while_the_next_one_runs_and_told_in_order(tmp_path):
    started = [threading.Event() for _ in FINE]

    class Busy(Live):
        def ran(self, case, then=None):
            at = FINE.index(case)
            judge = super().ran(case, then)
            started[at].set()

            def judged():
                assert at + 1 == len(FINE) or started[at + 1].wait(30), "the next case has not begun"
                return judge()

            return judged

    with _folder(tmp_path) as folder:
        outcomes = runner.run(FINE, Busy(), folder)
    assert [outcome.case for outcome in outcomes] == [line["case"] for line in _lines(tmp_path)] == list(map(str, FINE))


def test_trouble_in_telling_ends_the_run(tmp_path):
    def watch(*_):
        raise OSError("no room")

    live = Live()
    with _folder(tmp_path) as folder, pytest.raises(OSError, match="no room"):
        runner.run(FINE, live, folder, watch=watch)
    assert len(live.asked) <= 2


def test_an_interruption_keeps_what_is_done_and_resume_goes_on(tmp_path):
    first, second, third = map(str, FINE)
    with _folder(tmp_path) as folder, pytest.raises(KeyboardInterrupt):
        runner.run(FINE, Live({second: KeyboardInterrupt()}), folder)
    live = Live()
    with _folder(tmp_path, resume=True) as folder:
        runner.run(FINE, live, folder)
        assert set(folder.done) == {first, second, third}
    assert live.asked == [second, third]
    assert [line["case"] for line in _lines(tmp_path)] == [first, second, third]


def test_resume_survives_a_torn_last_line_and_runs_errors_again(tmp_path):
    first, second, third = map(str, FINE)
    with _folder(tmp_path) as folder:
        runner.run(FINE, Live({second: "error"}), folder)
    text = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(text[: text.rindex('"metrics"')])
    live = Live()
    with _folder(tmp_path, resume=True) as folder:
        runner.run(FINE, live, folder)
    assert live.asked == [second, third]
    assert sorted(line["case"] for line in _lines(tmp_path)) == [first, second, third]


def test_resume_keeps_failures_and_the_lines_of_other_grids(tmp_path):
    with _folder(tmp_path) as folder:
        runner.run(FINE, Live({str(FINE[0]): "fail"}), folder)
    with _folder(tmp_path, FINE[:1], resume=True) as folder:
        assert {outcome.verdict for outcome in folder.done.values()} == {"fail"}
        assert len(folder.done) == 1
    assert len(_lines(tmp_path)) == 3


def test_without_resume_earlier_results_are_set_aside(tmp_path):
    with _folder(tmp_path) as folder:
        runner.run(FINE, Live(), folder)
    with _folder(tmp_path) as folder:
        assert not folder.done
    assert _lines(tmp_path) == []
    previous = (tmp_path / "results.previous.jsonl").read_text()
    assert len(previous.splitlines()) == 4
    with _folder(tmp_path):  # an empty run sets nothing aside
        pass
    assert (tmp_path / "results.previous.jsonl").read_text() == previous


def _without_header(path):
    results = path / "results.jsonl"
    results.write_text("".join(results.read_text().splitlines(keepends=True)[1:]))


def _of_version(path, version):
    results = path / "results.jsonl"
    results.write_text(results.read_text().replace(f'"version": {records.VERSION}', f'"version": {version}', 1))


@pytest.mark.parametrize(("change", "said"), [(_without_header, 1), (lambda path: _of_version(path, 99), 99)])
def test_results_of_another_version_are_refused_and_left_alone(tmp_path, change, said):
    with _folder(tmp_path) as folder:
        runner.run(FINE, Live(), folder)
    change(tmp_path)
    before = (tmp_path / "results.jsonl").read_text()
    for _ in range(2):  # the lock is given back
        with pytest.raises(OutError, match=rf"is of version {said} of the format .* version {records.VERSION}"):
            _folder(tmp_path, resume=True)
    assert (tmp_path / "results.jsonl").read_text() == before
    with _folder(tmp_path) as folder:  # without --resume it is set aside
        assert not folder.done
    assert (tmp_path / "results.previous.jsonl").read_text() == before


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"format": "something else", "version": 2}\n')
    with pytest.raises(OutError, match="is of format 'something else', not 'parity-results'"):
        _folder(tmp_path, resume=True)


def test_fail_fast_stops_at_the_first_that_does_not_pass(tmp_path):
    live = Live({str(FINE[0]): "skip", str(FINE[1]): "error"})
    with _folder(tmp_path) as folder:
        runner.run(FINE, live, folder, fail_fast=True)
    assert live.asked == [str(FINE[0]), str(FINE[1])]


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    with _folder(tmp_path), pytest.raises(OutError, match="another run is writing"):
        _folder(tmp_path)
    with _folder(tmp_path):
        pass


def test_a_file_cannot_be_the_out_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutError, match=r"--out '.*file' cannot be written: .*exists"):
        _folder(tmp_path / "file")


def test_a_full_disk_is_infrastructure_and_says_what_to_do(tmp_path):
    with _folder(tmp_path) as folder:
        folder._file.close()
        folder._file = open("/dev/full", "w")  # noqa: SIM115 - the folder closes it
        with pytest.raises(InfrastructureError, match=r"No space left on device; free some space.*--resume"):
            folder.add(Outcome(case="a", verdict="pass"))


def test_metrics_are_plain_json():
    value = {"a": np.float32(1.5), "b": [np.int64(2), float("nan")], "c": (float("inf"), True, None, "x")}
    assert json.loads(json.dumps(records.plain(value))) == {"a": 1.5, "b": [2, None], "c": [None, True, None, "x"]}


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [("pass pass", 0), ("pass skip", 0), ("pass fail error", 1), ("pass error", 3), ("skip", 3), ("", 3)],
)
def test_exit_status_tells_failures_from_errors(verdicts, status):
    outcomes = [Outcome(case=str(i), verdict=name) for i, name in enumerate(verdicts.split())]
    assert records.exit_code(outcomes) == status


# With workers.
@pytest.fixture
def live(plugin, tmp_path):
    harness = Harness(fixtures.build, oracle.reference, verdict.judge)
    with session([backends.load("fake", Options())], 30.0, tmp_path / "logs", harness) as living:
        yield living


def test_a_right_answer_passes_and_a_wrong_one_fails_with_its_gates(live):
    assert live.outcome(FINE[0]).verdict == "pass"
    outcome = live.outcome(Case.parse(case_id(trouble.WRONG)))
    assert outcome.verdict == "fail"
    assert outcome.metrics["failed_gates"][0]["gate"] == "oracle"


@pytest.mark.parametrize(
    ("seed", "reason"),
    [
        (trouble.KILLED, "killed by SIGKILL"),
        (trouble.RAISES, "raised ValueError: bad shard"),
        (trouble.HANGS, "finish"),
    ],
)
def test_trouble_in_a_rank_is_the_cases_error_and_the_next_case_runs(live, seed, reason):
    live.timeout = 2.0
    outcome = live.outcome(Case.parse(case_id(seed)))
    assert outcome.verdict == "error"
    assert "fake rank 1 of 2" in outcome.reason
    assert reason in outcome.reason
    assert outcome.metrics["log_tail"]
    live.timeout = 30.0
    assert live.outcome(FINE[1]).verdict == "pass"


def test_workers_that_never_start_end_the_run_at_the_second_try(live, monkeypatch):
    monkeypatch.setenv("FAKE_SETUP", "die")
    assert live.outcome(FINE[0]).verdict == "error"
    with pytest.raises(InfrastructureError, match="workers do not start: fake rank 1 of 2"):
        live.outcome(FINE[1])


def test_a_setup_that_raises_ends_the_run(live, monkeypatch):
    monkeypatch.setenv("FAKE_SETUP", "raise")
    with pytest.raises(InfrastructureError, match="cannot start: RuntimeError: no such device"):
        live.outcome(FINE[0])


def test_no_room_for_arrays_is_infrastructure(live):
    def build(case, cache):
        raise OSError(errno.ENOSPC, "No space left on device")

    live.harness = Harness(build, oracle.reference, verdict.judge)
    with pytest.raises(InfrastructureError, match=r"no room for arrays in '.*': No space left.*TMPDIR"):
        live.outcome(FINE[0])


def test_a_fault_of_the_harness_is_an_error_of_the_case(live):
    def judge(*_):
        raise ZeroDivisionError("by zero")

    live.harness = Harness(fixtures.build, oracle.reference, judge)
    outcome = live.outcome(FINE[0])
    assert (outcome.verdict, outcome.reason) == ("error", "the harness raised ZeroDivisionError: by zero")


def test_a_backend_may_refuse_a_case(live):
    live.backends[0].unsupported = lambda case: "no transport 'local'"
    outcome = live.outcome(FINE[0])
    assert (outcome.verdict, outcome.reason) == ("skip", "fake: no transport 'local'")


class Refuses:
    """A framework that takes no case, and must never be asked for one."""

    def __init__(self, name, reason):
        self.name, self.reason = name, reason

    def unsupported(self, case):
        return self.reason


def test_a_case_runs_in_the_frameworks_that_take_it_and_says_so_if_that_is_one(live):
    gate = "it has no 'gate'"
    live.backends += [Refuses("small", gate), Refuses("old", gate), Refuses("odd", "no f32")]
    outcome = live.outcome(FINE[0])
    assert outcome.verdict == "pass"
    assert outcome.reason == (
        "only fake took the case, held to the oracle alone; small, old: it has no 'gate'; odd: no f32"
    )
    assert outcome.metrics["skipped"] == {"small": gate, "old": gate, "odd": "no f32"}
    assert set(outcome.metrics["frameworks"]) == {"fake"}
    del live.backends[0]
    outcome = live.outcome(FINE[0])
    assert (outcome.verdict, outcome.reason) == ("skip", "small, old: it has no 'gate'; odd: no f32")


@pytest.mark.parametrize("seed", trouble.NO_ANSWER)
def test_what_cannot_be_judged_is_an_error_that_names_the_backend_the_rank_and_what_was_expected(live, seed):
    outcome = live.outcome(Case.parse(case_id(seed)))
    assert outcome.verdict == "error"
    assert outcome.reason == f"backend 'fake' gave no answer that can be judged: {trouble.NO_ANSWER[seed]}"
    assert outcome.metrics["kind"] == "answered"
    assert live.outcome(FINE[1]).verdict == "pass"


def test_the_oracle_is_asked_once_for_cases_that_share_its_answer(live):
    asked = []

    def reference(case, arrays):
        asked.append(case.logical_id)
        return oracle.reference(case, arrays)

    live.harness = Harness(fixtures.build, reference, verdict.judge)
    for text in ("dp2.tp1/local", "dp2.tp1.ep/allgather"):
        assert live.outcome(Case.parse(f"{text}/f32/t5.d16.f16/e4.k2")).verdict == "pass"
    assert len(asked) == 1


# Stages: the oracle goes first, and looks ahead.
@dataclass
class Teacher:
    """Counts what the oracle is asked, and can fail."""

    asked: list = field(default_factory=list)
    fails: str = ""

    def teach(self, case, arrays, folder):
        self.asked.append(str(case))
        if str(case) == self.fails:
            raise ZeroDivisionError("by zero")
        return oracle.teach(case, arrays, folder)


@pytest.fixture
def teaching(plugin, tmp_path):
    teacher = Teacher()
    harness = Harness(fixtures.build, oracle.reference, verdict.judge, teacher.teach)
    with session([backends.load("fake", Options())], 30.0, tmp_path / "logs", harness) as living:
        yield living, teacher


def test_lessons_reach_the_frameworks_and_their_stages_are_judged(teaching):
    live, _ = teaching
    outcome = live.outcome(Case.parse(case_id(trouble.SHOWS_STAGES)))
    assert outcome.verdict == "pass", outcome.reason
    stages = outcome.metrics["frameworks"]["fake"]["stages"]
    assert "down" in [line["stage"] for line in stages]
    assert all(line["taught"] < 1 for line in stages)


def test_the_oracle_gets_to_the_next_case_while_frameworks_are_busy(teaching):
    live, teacher = teaching
    assert live.outcome(FINE[0], FINE[1]).verdict == "pass"
    assert teacher.asked == [str(FINE[0]), str(FINE[1])]
    assert live.outcome(FINE[1]).verdict == "pass"
    assert len(teacher.asked) == 2


def test_what_goes_wrong_ahead_is_told_when_its_turn_comes(teaching):
    live, teacher = teaching
    teacher.fails = str(FINE[1])
    assert live.outcome(FINE[0], FINE[1]).verdict == "pass"
    assert live.outcome(FINE[1]).reason == "the harness raised ZeroDivisionError: by zero"


def test_lessons_of_answers_that_are_dropped_are_deleted(teaching, monkeypatch):
    live, _ = teaching
    monkeypatch.setattr(runner, "ANSWERS_BYTES", 0)
    for case in [*FINE, Case.parse(case_id(4))]:
        assert live.outcome(case).verdict == "pass"
    assert len(list((live.scratch / "lessons").iterdir())) == 3


def test_scratch_space_is_removed_with_what_killed_runs_left(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stale = tmp_path / f"{runner.SCRATCH_PREFIX}stale"
    stale.mkdir()
    (stale / ".lock").touch()
    with runner.scratch_folder():
        assert stale.exists()  # it may be that of a run that has just begun
    os.utime(stale, (1, 1))
    with runner.scratch_folder() as mine:
        assert not stale.exists()
        with runner.scratch_folder() as other:
            assert mine.exists()
            assert other != mine
    assert list(Path(tmp_path).iterdir()) == []
