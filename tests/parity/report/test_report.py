"""`parity report` from what lies in a folder, without a browser."""

import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from parity import selftest
from parity.case import Flags
from parity.grids import load as load_grid
from parity.records import OutError
from parity.report.command import main
from parity.report.folder import load
from parity.report.html import clean, data, histogram, kept_options, kill_matrix, number, overview, render
from parity.report.words import words
from tests.parity.report import made_up


def text_of(folder, **options):
    console = Console(width=200, file=io.StringIO())
    main(folder, options.get("out"), options.get("text", False), console)
    return console.file.getvalue()


class Parts(HTMLParser):
    """Elements of a page, and the text of its scripts."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.scripts, self.inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.scripts[-1] += text


def test_the_page_is_one_file_that_needs_nothing_else(page):
    text = page.read_text()
    parts = Parts(text)
    assert {"img", "iframe", "object"} & set(parts.tags) == set()
    for name, value in parts.attributes:
        if name in ("src", "href", "action", "poster"):
            assert value.startswith("#") or value == "data:,", (name, value)
        assert not name.startswith("on")
        assert name != "style"  # the policy forbids it
    assert not re.search(r"url\(|@import|@font-face", text)


def test_hostile_results_change_no_markup(page, tmp_path):
    calm = made_up.outcomes()
    replaced = json.loads(
        json.dumps([outcome.to_json() for outcome in calm]).replace(json.dumps(made_up.HOSTILE)[1:-1], "x")
    )
    calm = [dataclasses.replace(outcome, **entry) for outcome, entry in zip(calm, replaced, strict=True)]
    text_of(made_up.folder(tmp_path, calm))
    quiet = Parts((tmp_path / "report.html").read_text())
    hostile = Parts(page.read_text())
    assert hostile.tags == quiet.tags
    assert len(hostile.scripts) == len(quiet.scripts) == 2
    found = json.loads(hostile.scripts[0])
    assert any(made_up.HOSTILE in case.get("reason", "") for case in found["cases"])
    assert hostile.scripts[1] == quiet.scripts[1]


def test_the_data_of_the_page_is_that_of_the_results(page):
    run = load(page.parent)
    found = data(run)
    assert found == json.loads(json.dumps(found))  # plain
    cases = {case["id"]: case for case in found["cases"]}
    assert list(cases) == [*(outcome.case for outcome in made_up.outcomes()), made_up.NOT_RUN]
    assert cases[made_up.NOT_RUN]["verdict"] == "not run"
    case = cases[made_up.SEP]
    assert [gate["gate"] for gate in case["failed"]] == ["oracle", "exact"]
    torch = case["frameworks"]["torch"]
    assert [len(stage) for stage in torch["stages"]] == [5] * 5 + [6] * 6  # where it went wrong is told
    assert torch["stages"][5][4:] == [
        "born",
        run.outcomes[made_up.SEP].metrics["frameworks"]["torch"]["stages"][5]["worst"],
    ]
    assert len(torch["by_rank_and_expert"]) == 2
    assert torch["worst_rows"][0][:4] == [0, 0, 0, [1, 4]]
    error = next(case for case in found["cases"] if case["verdict"] == "error")
    assert error["log"][1] == "died"
    assert "red \n" not in error["log"][3]
    assert "\x1b" not in error["log"][3]


def test_the_report_has_the_grid_as_the_terminal_prints_it(page):
    printed = text_of(page.parent, text=True)
    assert re.search(r"EP\+SP +│ allgather +│ +2/4 │ +41\.50", printed)
    assert "56 pass, 2 fail, 1 error, 1 skip, 1 not run" in printed
    assert "report.html" not in printed


def test_the_page_goes_where_it_is_told(tmp_path):
    folder = made_up.folder(tmp_path / "run")
    said = text_of(folder, out=tmp_path / "site" / "index.html")
    assert said == f"{len(made_up.outcomes()) + 1} cases in {tmp_path / 'site' / 'index.html'}\n"
    assert (tmp_path / "site" / "index.html").read_text().startswith("<!doctype html>")
    with pytest.raises(OutError, match=r"--out '.*' cannot be written: Is a directory; give a file"):
        text_of(folder, out=tmp_path)


def _version(path, name, old, new):
    file = path / name
    file.write_text(file.read_text().replace(f'"version": {old}', f'"version": {new}', 1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: (path / "results.jsonl").unlink(),
            r"has no results\.jsonl: it is no folder of results; 'parity run",
        ),
        (lambda path: (path / "results.jsonl").write_text(""), r"has no result yet: no case has ended"),
        (
            lambda path: _version(path, "results.jsonl", 2, 3),
            r"is of version 3 of the format 'parity-results'; this parity",
        ),
        (lambda path: _version(path, "selftest.json", 1, 7), r"is of version 7 of the format 'parity-selftest'"),
        (lambda path: (path / "selftest.json").write_text("[]"), r"selftest\.json' cannot be read: it holds no object"),
        (lambda path: (path / "summary.json").write_text("{"), r"summary\.json' cannot be read: "),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_with_a_clear_word(tmp_path, spoil, message):
    folder = made_up.folder(tmp_path)
    spoil(folder)
    with pytest.raises(OutError, match=message):
        text_of(folder)
    assert not (folder / "report.html").exists()


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(OutError, match="is not there; 'parity run --out DIR' makes one"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutError, match="is no folder"):
        load(tmp_path / "file")


def test_a_run_that_was_killed_can_be_reported(tmp_path):
    folder = made_up.folder(tmp_path, with_summary=False, with_kills=False)
    with open(folder / "results.jsonl", "a") as file:
        file.write('{"case": "dp1.tp1/loc')  # torn
    run = load(folder)
    assert len(run.ids) == len(made_up.outcomes())
    text = render(run)
    assert "no summary: the run goes on, or was killed" in text
    assert 'id="kills"' not in text


def test_joined_runs_say_where_they_differ_and_what_they_were(tmp_path):
    folder = made_up.folder(tmp_path)
    summary = made_up.summary(made_up.outcomes())
    summary["versions_differ"] = [{"jax": "0.10.2", "torch": "2.13"}, {"jax": "0.11.2", "torch": "2.13"}]
    summary["parts"] = [
        {"folder": "a", "command": ["parity", "run", "--shard", "1/2"]},
        {"folder": "b", "command": None},
    ]
    (folder / "summary.json").write_text(json.dumps(summary))
    shown = overview(load(folder))
    assert shown["environment"][:2] == [("jax", "0.10.2; 0.11.2"), ("torch", "2.13")]
    assert ("gpus", "H100, H200") in shown["environment"]
    assert shown["parts"] == [("a", "parity run --shard 1/2"), ("b", "")]
    assert "parity run --shard 1/2" in render(load(folder))


def test_what_the_verdicts_do_not_say_is_on_the_first_view(tmp_path):
    half = made_up.outcomes()[0]
    half.metrics["frameworks"]["torch"]["not_checked"] = ["repeated run", made_up.HOSTILE]
    half.metrics["skipped"] = {"mine": "no padded transport"}
    text = render(load(made_up.folder(tmp_path, [half])))
    assert "mine skipped 1 of 1 cases: no padded transport" in text
    assert "torch was not checked for: repeated run; &lt;/script&gt;" in text


# Planted bugs.
def _finding(**values):
    """A finding with what matters; whatever else there is to say is empty."""
    empty = {field.name: "" for field in dataclasses.fields(selftest.Finding)} | {"margin": None}
    return selftest.Finding(**empty | values)


def test_the_selftest_leaves_what_the_report_shows(tmp_path, monkeypatch):
    found = [
        _finding(case=made_up.SEP, outcome="passed", gates=(), seconds=1.0),
        _finding(
            mutation="zero_output", framework="jax", case=made_up.SEP, outcome="caught", gates=("oracle",), seconds=1.0
        ),
        _finding(
            mutation="zero_output", framework="torch", case=made_up.SEP, outcome="survived", gates=(), seconds=1.0
        ),
    ]
    monkeypatch.setattr(selftest, "run", lambda live, catalog: iter(found))
    console = Console(file=io.StringIO())
    assert selftest.main([], 1.0, "zero_output", False, console, out=tmp_path / "new") == 1
    made_up.folder(tmp_path / "new", with_kills=False)
    run = load(tmp_path / "new")
    assert run.selftest["passed"] is False
    kills = kill_matrix(run.selftest)
    assert (kills["caught"], kills["planted"], kills["clean"], kills["broken"]) == (1, 2, 1, [])
    assert kills["frameworks"] == ["jax", "torch"]
    row = kills["rows"]["zero_output"]
    assert row["cases"] == [made_up.SEP]
    assert row["what"] == "the output is all zeros"
    assert (row["found"]["jax"]["good"], row["found"]["jax"]["gates"]) == (True, ["oracle"])
    assert row["found"]["torch"]["outcome"] == "survived"
    assert "1 of 2" in render(run)


# Words.
def test_a_case_in_words():
    said = dict(words("dp2.tp2.ep/allgather/bf16/t13-6.d64.f48/e8.k2/shared+gate+sigmoid+renorm+scale2.5"))
    assert said["mesh"] == "2 DP ranks × 2 TP ranks: 4 ranks"
    assert said["tokens"] == "13, 6 on DP ranks 0 to 1; 19 in all"
    assert said["experts"] == "8, 2 on each of 4 ranks; a token goes to 2"
    assert said["router"] == "logits computed by the layer, sigmoid, renormalized, scaled by 2.5"
    assert said["shared expert"] == "width 48"
    assert words("from/another/parity") == []


def test_two_cases_of_a_grid_never_have_the_same_words():
    for name in ("smoke", "transports", "vllm"):
        said = [tuple(words(str(case))) for case in load_grid(name)]
        assert len(set(said)) == len(said)


def test_no_flag_is_left_unsaid():
    base = "dp1.tp1/local/bf16/t8.d8.f8/e8.k2"
    switches = [field.name for field in dataclasses.fields(Flags) if field.type == "bool"]
    assert "renorm" in switches
    for flag in (*switches, "shared", "latent", "groups4-2", "scale2", "gelu", "swigluoai+limit2", "seed3"):
        pair = (base + "/shared", base + "/shared+sharedgate") if flag == "sharedgate" else (base, f"{base}/{flag}")
        assert words(pair[0]) != words(pair[1]), flag


# Numbers.
def test_margins_are_binned_against_the_bound():
    found = histogram([0.0, 0.049, 0.05, 0.999, 1.0, 1.001, 40.0])
    assert [(i, count) for i, count, _ in found["bars"]] == [(0, 2), (1, 1), (19, 2), (20, 2)]
    assert (found["median"], found["largest"], found["beyond"], found["most"]) == (0.999, 40.0, 2, 2)
    assert histogram([]) is None


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.5, "0.50"), (41.5, "41.50"), (1234.5, "1,234"), (2e8, "2.0e+08"), (1e9, "∞")]
)
def test_a_margin_as_people_read_it(value, text):
    assert number(value) == text


def test_the_command_that_runs_a_case_again_keeps_what_decides_how_it_runs():
    command = ["parity", "run", "--grid", "vllm", "-k", "x", "--platform", "gpu", "--jax-processes",
               "--frameworks", "jax", "--out", "o", "--timeout=9", "--resume"]  # fmt: skip
    assert kept_options(command) == "--platform gpu --jax-processes --frameworks jax --timeout=9"
    assert kept_options(["parity", "run", "--frameworks", "a; rm"]) == "--frameworks 'a; rm'"
    assert kept_options(None) == ""


def test_terminal_colours_and_control_characters_go():
    assert clean("a\x1b[31;1mred\x1b[0m\x00\x07b\r\nc\td\ud800\x9be") == "aredb\nc\tde"
