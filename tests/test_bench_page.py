"""The page of a benchmark, made from the JSON that it left."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

from parity.bench.shapes import TINY

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "bench_page.py"
TIMES = {"status": "ok", "clock": "profile", "error": 1e-3, "seconds": 3.0, "shape": asdict(TINY), "name": "tiny"}
LAYER = TIMES | {
    "candidate": "jax_moe", "what": "layer", "device_ms": 2.0, "wall_ms": 2.5, "compile_s": 1.0, "peak_bytes": 10,
    "temporary_bytes": None, "note": "",
}  # fmt: skip
SPREAD = TIMES | {
    "candidate": "jax_moe", "what": "mesh", "parallel": "dp2.tp1.ep/padded", "ranks": 2, "tokens_per_rank": 12,
    "whole_ms": 4.0, "route_ms": 0.5, "dispatch_ms": 1.0, "experts_ms": 2.0, "combine_ms": 0.25,
}  # fmt: skip
POINT = {"size": 65536, "ms": 0.5, "busbw": 7.0}


def document(rows, rates, words):
    return {
        "parity": "0.1.0",
        "began": "2026-01-02T10:00:00+00:00",
        "repeat": 10,
        "rates_by_candidate": rates,
        "versions": {"jax_moe": {"jax": "0.11.2", "device": "NVIDIA H100"}},
        "command": ["parity", "bench", *words, "--json", "/secret/b.json"],
        "rows": rows,
    }


def test_the_page_states_date_card_command_and_all_tables(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("bench_page", SCRIPT)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    plain = {**SPREAD, "what": "collectives", "collectives": {"all_to_all": [POINT]}}
    gone = {**SPREAD, "status": "stopped", "reason": "stopped after 9 s", "parallel": "dp2.tp1.ep/ragged"}
    files = {
        "one": document([LAYER], {"jax_moe": {"tflops": 800.0, "gbps": 3000.0}}, []),
        "two": document([SPREAD, plain, gone], {}, ["--parallel", "all", "--ranks", "2"]),
    }
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    assert page.main(["Timed", *(str(tmp_path / f"{name}.json") for name in files)]) == 0
    text = capsys.readouterr().out
    for words in (
        "# Timed\n\nMade by `python docs/bench_page.py Timed one.json two.json`.",
        "| date | 2026-01-02 |",
        "| card | NVIDIA H100 |",
        "jax 0.11.2, parity 0.1.0",
        "| floors from | 800 TFLOP/s, 3000 GB/s |",
        "| tiny | layer | jax_moe | 2 | 2.5 |",
        "$ parity bench --parallel all --ranks 2 --json b.json\n",
        "| tiny | dp2.tp1.ep/padded | 12 | 4 | 0.5 | 1 | 2 | 0.25 | 3.75 |",
        "| 2 | 65,536 | 7 (500) |",
        "mesh: stopped: stopped after 9 s",
    ):
        assert words in text, words
    assert "/secret" not in text
