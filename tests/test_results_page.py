"""The page of a run, made from what the run left."""

import importlib.util
from pathlib import Path

from parity import grids
from parity.records import Folder, Outcome, counts

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "results_page.py"
SUMMARY = {
    "cases": 3, "not_run": 1, "seconds": 61.4, "finished": "2026-01-02T10:00:00+00:00",
    "versions": {"jax": "0.11.2", "torch": "2.11.0", "nccl": "2.31.2"},
    "platform": {"machine": "x86_64", "cores": 16, "gpus": ["H100"], "driver": "580.1", "ranks_per_gpu": 4},
    "command": ["parity", "run", "--nccl-library", "/secret/libnccl.so.2", "--out", "/tmp/x/smoke"],
}  # fmt: skip


def test_the_page_states_date_card_versions_counts_margins_seconds_and_command(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("results_page", SCRIPT)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    first, second = grids.load("smoke")[:2]
    outcomes = [
        Outcome(case=str(first), verdict="pass", metrics={"margin": 0.62}),
        Outcome(case=str(second), verdict="error", reason="jax rank 1 of 2 was killed by SIGKILL\nmore"),
    ]
    with Folder(tmp_path / "smoke", False, set()) as folder:
        for outcome in outcomes:
            folder.add(outcome)
        folder.summarize(SUMMARY | {"counts": counts(outcomes)})
    assert page.main(["Smoke, one H100", str(tmp_path / "smoke")]) == 0
    text = capsys.readouterr().out
    for words in (
        "# Smoke, one H100",
        "Made by `python docs/results_page.py 'Smoke, one H100' smoke`.",
        "| date | 2026-01-02 |",
        "| devices | H100, driver 580.1, 4 ranks a GPU |",
        "jax 0.11.2, torch 2.11.0, nccl 2.31.2",
        "| cases | 1 pass, 1 error, 1 not run |",
        "| seconds | 61 |",
        "$ parity run --nccl-library PATH --out smoke\n",
        f"| 0.62 | `{first}` |",
        f"| `{second}` | error: jax rank 1 of 2 was killed by SIGKILL |",
    ):
        assert words in text, words
    assert "/secret" not in text
    assert str(tmp_path) not in text
