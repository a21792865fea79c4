"""One process a candidate: whatever it does, the run goes on and a row says what it did."""

import io
import json
import subprocess

import psutil
import pytest
from rich.console import Console

from parity.bench import driver, plot, report
from parity.bench.catalog import CATALOG, Entry
from parity.bench.driver import Job, Options, Run
from parity.bench.shapes import Shape
from tests.parity.bench import fake

MODULE = "tests.parity.bench.fake"
FAKE = Entry(name="fake", module=MODULE, framework=MODULE, needs=("json",), whats=("layer",))
TINY = Shape(name="tiny", tokens=4, hidden=16, intermediate=8, experts=4, top_k=2)


def layers(entry, *tokens):
    return [Job(entry=entry, what="layer", shape=TINY.with_tokens(count)) for count in tokens]


def run(jobs, tmp_path, **options):
    out = Run()
    driver.run(jobs, Options(**options), tmp_path / "log", lambda row: None, out)
    return out


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("troubled")
    tokens = (4, fake.RAISES, fake.STARVES, fake.WRONG, fake.NAN, fake.NOISY, fake.DIES, fake.HANGS, 5)
    out = run(layers(FAKE, *tokens), tmp_path, limit=6.0)
    rows = report.rows(out)
    return dict(zip(tokens, rows, strict=True)), out, (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("tokens", "status", "reason"),
    [
        (fake.RAISES, "failed", "ZeroDivisionError: it does not add up"),
        (fake.STARVES, "memory", "256 GB"),
        (fake.DIES, "failed", "SIGKILL"),
        (fake.HANGS, "stopped", "6 s"),
    ],
)
def test_a_failure_is_a_row_that_says_what_happened(troubled, tokens, status, reason):
    row = troubled[0][tokens]
    assert row["status"] == status
    assert reason in row["reason"]


def test_the_run_goes_on_in_a_new_process(troubled):
    assert [troubled[0][tokens]["status"] for tokens in (4, fake.NOISY, 5)] == ["ok"] * 3


def test_a_result_that_is_wrong_or_no_number_is_marked(troubled):
    assert troubled[0][fake.WRONG]["status"] == "wrong"
    assert troubled[0][fake.WRONG]["error"] == pytest.approx(0.05, rel=0.01)
    assert troubled[0][fake.NAN]["status"] == "wrong"


def test_what_a_library_prints_goes_to_the_log(troubled):
    assert "what a library says\nand complains" in troubled[2]


def test_every_measured_row_has_its_floor_and_speed(troubled):
    row = troubled[0][4]
    # 1 TFLOP/s and 10 GB/s: the weights, 3 x 16 x 8 of each expert that was chosen, bound by memory
    assert row["bound"] == "memory"
    assert 2 <= row["active"] <= 4
    numbers = row["active"] * 3 * 16 * 8 + 4 * 16 + 2 * 4 * 16
    assert row["floor_ms"] == pytest.approx(2 * numbers / 10e9 * 1e3)
    assert row["of_floor"] == pytest.approx(row["floor_ms"] / 2.0)
    assert row["gbps"] == pytest.approx(2 * numbers / 2e-3 / 1e9)


def test_json_of_a_run_has_all_rows_and_no_infinity(troubled, tmp_path):
    report.write(tmp_path / "b.json", report.document(troubled[1], {"finished": True}))
    found = json.loads((tmp_path / "b.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (found["format"], found["version"], len(found["rows"])) == ("parity-bench", 1, 9)
    assert found["rates"] == {"tflops": 1.0, "gbps": 10.0}
    assert found["rows"][4]["error"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


def test_the_picture_has_each_candidate_and_the_floor(troubled, tmp_path):
    plot.draw(troubled[1], tmp_path / "b.svg", "nowhere")
    text = (tmp_path / "b.svg").read_text()
    assert text.lstrip().startswith("<?xml")
    for word in ("fake", "floor", "d16.f8/e4.k2: layer", "tokens", "nowhere"):
        assert f">{word}<" in text
    (points,) = plot.panels(troubled[1])["d16.f8/e4.k2", "layer"].values()
    assert points == sorted(points)


def test_the_table_says_what_was_wrong_and_why_something_is_missing(troubled):
    out = io.StringIO()
    Console(width=250, file=out).print(report.table(troubled[1]))
    text = out.getvalue()
    assert "WRONG" in text
    assert "stopped: stopped after 6 s" in text
    assert "memory: RuntimeError: RESOURCE_EXHAUSTED" in text


def test_other_inputs_than_the_first_candidates_are_wrong():
    row = {
        "what": "layer",
        "shape": vars(TINY),
        "status": "ok",
        "device_ms": 1.0,
        "name": "tiny",
        "candidate": "a",
        "checksum": 1,
    }
    out = Run(rows=[row, row | {"candidate": "b", "checksum": 2}], rates={"a": fake.Lab().rates()})
    first, second = report.rows(out)
    assert first["status"] == "ok"
    assert second["status"] == "wrong"
    assert "other bits" in second["reason"]


def test_nothing_is_begun_when_the_time_is_over(tmp_path):
    (row,) = run(layers(FAKE, 4), tmp_path, budget=-1.0).rows
    assert (row["status"], row["reason"]) == ("not run", "no time was left")


def test_a_candidate_that_is_not_there_is_a_row_and_starts_nothing(tmp_path):
    absent = Entry(name="absent", module=MODULE, framework=MODULE, needs=("no_such_module",), whats=("layer",))
    card = Entry(name="card", module=MODULE, framework=MODULE, needs=("json",), whats=("layer",), platforms=("gpu",))
    out = run([*layers(absent, 4), *layers(card, 4)], tmp_path)
    assert [row["status"] for row in out.rows] == ["absent"] * 2
    assert "no_such_module cannot be imported" in out.rows[0]["reason"]
    assert "runs on gpu alone" in out.rows[1]["reason"]
    assert not out.rates


def test_a_candidate_that_cannot_start_fails_all_its_rows_at_once(tmp_path):
    broken = Entry(name="broken", module="no.such.candidate", framework=MODULE, needs=("json",), whats=("layer",))
    out = run(layers(broken, 4, 5), tmp_path)
    assert [row["status"] for row in out.rows] == ["failed"] * 2
    assert all("could not start: ModuleNotFoundError" in row["reason"] for row in out.rows)


def test_peers_are_found_in_their_folder_only(tmp_path):
    vllm = next(entry for entry in CATALOG if entry.name == "vllm")
    (tmp_path / "vllm_kernel.py").touch()
    assert "cannot be imported" in vllm.missing("gpu", [])
    assert vllm.missing("gpu", [tmp_path]) is None


def test_an_interrupted_run_leaves_its_rows_and_no_process(tmp_path):
    out, children = Run(), []

    def watch(row):
        children.extend(psutil.Process().children())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        driver.run(layers(FAKE, 4, 5), Options(), tmp_path / "log", watch, out)
    assert len(out.rows) == 1
    assert children
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_a_worker_whose_command_is_gone_ends(tmp_path):
    with open(tmp_path / "log", "wb") as log:
        process = driver.Process(FAKE, Options(), log)
        process.listen(60)
        process._process.stdin.close()
        try:
            assert process._process.wait(20) == 0
        except subprocess.TimeoutExpired:
            pytest.fail("it lives on")
        finally:
            process._process.stdin = None
            process.close()
