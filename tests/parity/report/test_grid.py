import io

import pytest
from rich.console import Console

from parity import report
from parity.records import Outcome
from parity.report.grid import UNREADABLE, grid, margin
from tests.parity.report import made_up


def outcome(text, verdict="pass", **metrics):
    return Outcome(case=text, verdict=verdict, metrics=metrics, reason="[bold]why[/]")


IDS = [
    "dp2.tp2.ep/allgather/bf16/t3.d8.f8/e4.k2",
    "dp2.tp2.ep/allgather/bf16/t4.d8.f8/e4.k2",
    "dp2.tp2.ep/allgather/bf16/t5.d8.f8/e4.k2",
    "dp2.tp2.ep/ragged/f32/t3.d8.f8/e4.k2",
    "dp1.tp1/local/f32/t3.d8.f8/e4.k2",
    "from/another/parity",
]
FOUND = [
    outcome(IDS[0], "fail", margin=3.5),
    outcome(IDS[1], margin=0.25),
    outcome(IDS[3], "skip"),
    outcome(IDS[4], margin=0.5),
    outcome(IDS[5], "error"),
]


def test_cases_are_sorted_by_mode_transport_and_format():
    formats, rows = grid(IDS, {found.case: found for found in FOUND})
    assert formats == ["bf16", "f32", "?"]
    assert [(row.mode, row.transport, list(row.cells)) for row in rows] == [
        ("single", "local", ["f32"]),
        ("EP+SP", "allgather", ["bf16"]),
        ("EP+SP", "ragged", ["f32"]),
        (UNREADABLE, "?", ["?"]),
    ]
    cell = rows[1].cells["bf16"]
    assert (cell.passed, cell.total, cell.margin, cell.state) == (1, 3, 3.5, "fail")
    assert cell.words == "1 fail, 1 not run"
    assert [row.cells[next(iter(row.cells))].state for row in rows] == ["pass", "fail", "skip", "error"]


def test_every_case_of_a_grid_has_one_cell():
    found = made_up.outcomes()
    ids = [entry.case for entry in found]
    _, rows = grid(ids, {entry.case: entry for entry in found})
    assert sorted(text for row in rows for cell in row.cells.values() for text in cell.cases) == sorted(ids)


@pytest.mark.parametrize(("value", "expected"), [(0.5, 0.5), (3, 3.0), (None, None), ("0.5", None), (True, None)])
def test_a_margin_is_a_number_or_nothing(value, expected):
    assert margin(Outcome(case="a", verdict="pass", metrics={"margin": value})) == expected


def printed(width, *arguments):
    console = Console(width=width, record=True, file=io.StringIO())
    report.final_table(console, *arguments)
    return console.export_text()


def test_the_terminal_shows_the_grid_and_what_did_not_pass():
    text = printed(200, IDS, {found.case: found for found in FOUND}, False)
    assert [cell.strip() for cell in next(x for x in text.splitlines() if "allgather" in x and "1/3" in x).split("│")][
        1:5
    ] == ["EP+SP", "allgather", "1/3", "3.50"]
    assert "[bold]why[/]" in text  # a reason is no markup
    assert "2 pass, 1 fail, 1 error, 1 skip, 1 not run" in text
    assert IDS[1] not in text
    assert IDS[1] in printed(200, IDS, {found.case: found for found in FOUND}, True)


def test_the_grid_fits_a_terminal_of_eighty_columns():
    found = {entry.case: entry for entry in made_up.outcomes("transports")}
    text = printed(80, list(found), found, False)
    assert "…" not in text.split("passed of total")[1]
