"""Results that no framework gave: every verdict, every gate, and text that wants to be markup."""

import dataclasses
import json

import numpy as np

from parity.case import Case
from parity.grids import load
from parity.records import Folder, Outcome
from parity.stages import STAGES

HOSTILE = "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'>&amp;\"'"
MESHES = (
    "dp1.tp1/local", "dp1.tp2/local", "dp2.tp1/local", "dp2.tp2/local", "dp2.tp2.ep.nosp/allgather",
    *(f"{mesh}/{transport}" for mesh in ("dp2.tp1.ep", "dp2.tp2.ep", "dp2.tp2.ep.native")
      for transport in ("allgather", "ragged", "padded")),
)  # fmt: skip
CASES = [f"{mesh}/{fmt}/t{t}.d64.f48/e8.k2/gate" for mesh in MESHES for fmt in ("bf16", "f32") for t in (5, 7)]
NOT_RUN = "dp1.tp1/local/bf16/t13.d64.f48/e8.k2/gate+seed77"
SEP = "dp2.tp2.ep/allgather/bf16/t13-6.d64.f48/e8.k2/shared+gate"


def stages(rng, born=None):
    """Every stage; with `born`, the error is born there and comes into those after it."""
    rows, seen = [], False
    for stage in STAGES:
        here = stage.name == born
        state = "born" if here else "came in" if seen else "ok"
        seen |= here
        taught = round(float(rng.uniform(0.2, 0.7)) * (90 if here else 1), 4)
        row = {
            "stage": stage.name, "title": stage.title, "free": taught * (1 if not seen or here else 80),
            "taught": None if stage.name == "gate_up" else taught, "observed_over_model": float(rng.uniform(0.6, 1)),
            "state": state,
            "worst": {"token": 5, "slot": 1, "experts": [3, 7], "expert": 7, "rank": 1, "column": 12,
                      "value": 1.25, "expected": 1.2434},
        }  # fmt: skip
        rows.append(row)
    return rows


def framework(case, rng, scale=1.0, born=None):
    margins = lambda n: [None if i == 0 and n > 4 else float(rng.uniform(0.1, 0.7) * scale) for i in range(n)]  # noqa: E731
    rows = sorted(rng.uniform(0.1, 0.6, min(10, case.total_tokens)) * scale, reverse=True)
    return {
        "max_abs": 0.0123 * scale, "relative_frobenius": 0.0031 * scale, "worst_token_relative": 0.0042 * scale,
        "signed_bias": -0.02, "observed_over_model": 0.78 * scale,
        "ulps": {"<=0.5": 9000, "<=1": 700, "<=2": 40, "<=4": 3, "<=8": 0, "<=inf": int(scale > 1)},
        "exemptions": 0, "exemptions_possible": 0,
        "worst": {"token": 3, "column": 7, "place": "DP rank 0, row 3", "experts": [1, 4], "ranks": [0, 2],
                  "value": 0.52, "expected": 0.5172},
        "by_rank": margins(case.dp), "by_expert": margins(case.experts),
        **({"by_rank_and_expert": [margins(case.experts) for _ in range(case.dp)]} if case.dp > 1 else {}),
        "worst_rows": [{"token": i, "rank": 0, "row": i, "experts": [1, 4], "margin": float(m), "relative": 0.003}
                       for i, m in enumerate(rows)],
        "stages": stages(rng, born),
    }  # fmt: skip


def passing(case, rng):
    jax, torch = framework(case, rng), framework(case, rng)
    margin = max(m for m in (*jax["by_expert"], *torch["by_expert"]) if m is not None)
    metrics = {
        "frameworks": {"jax": jax, "torch": torch}, "sensitivity": 0.08, "margin": margin, "failed_gates": [],
        "jax vs torch": {"error_ratio": 1.07, "error_ratio_usual": True, "bitwise_equal": 0.91},
    }  # fmt: skip
    return Outcome(case=str(case), verdict="pass", metrics=metrics, seconds=1.5)


def failing(case, rng, reason):
    outcome = passing(case, rng)
    outcome.metrics["frameworks"]["torch"] = framework(case, rng, scale=40.0, born="activation")
    outcome.metrics["margin"] = 41.5
    outcome.metrics["failed_gates"] = [
        {"gate": "oracle", "framework": "torch", "passed": False, "detail": reason, "margin": 41.5},
        {"gate": "exact", "framework": "torch", "passed": False, "detail": "rank 1: row 3", "margin": None},
    ]
    return dataclasses.replace(outcome, verdict="fail", reason=f"oracle: torch: {reason}")


def outcomes(grid=None):
    """One outcome a case: a failure, an error, a skip and one with markup in every text; CASES, or a grid's, pass."""
    rng = np.random.default_rng(0)
    cases = load(grid) if grid else map(Case.parse, CASES)
    found = [passing(case, rng) for case in cases]
    sep = Case.parse(SEP)
    found.append(failing(sep, rng, "token 22 (DP rank 1, row 9; experts 0, 3, on ranks 0, 1) is off by 41.5 times its "
                         "bound; 7 of 19 tokens are off, all of them use expert 0"))  # fmt: skip
    hostile = failing(dataclasses.replace(sep, tokens=(9, 2)), rng, HOSTILE)
    hostile.metrics["frameworks"][HOSTILE] = framework(sep, rng)
    hostile.metrics["frameworks"]["torch"]["worst"]["place"] = HOSTILE
    found.append(hostile)
    error = {"ranks": "torch rank 1 of 2", "kind": "died", "log": "parity-out/logs/torch-1.log",
             "log_tail": f"Traceback\n  \x1b[31mred\x1b[0m\x00 {HOSTILE}\nRuntimeError: connection reset"}  # fmt: skip
    found.append(Outcome(case="dp2.tp1.ep/padded/bf16/t5.d64.f48/e8.k2/gate+seed3", verdict="error", seconds=13.4,
                         reason="torch rank 1 of 2 (pid 15422) was killed by SIGKILL", metrics=error))  # fmt: skip
    found.append(Outcome(case="dp2.tp1.ep/ragged/f32/t5.d64.f48/e8.k2/gate+seed4", verdict="skip",
                         reason="torch: no room \ud800"))  # fmt: skip
    return found


def summary(found):
    return {
        "counts": {}, "cases": len(found) + 1, "not_run": 1, "cases_not_run": [NOT_RUN], "exit_status": 1,
        "interrupted": False, "trouble": "", "seconds": 95.25, "finished": "2026-11-24T19:08:45+00:00",
        "versions": {"parity": "0.1.0", "python": "3.11.7", "jax": "0.10.2", "torch": "2.13.0+cpu", "x": HOSTILE},
        "platform": {"system": "Linux-6.1-x86_64", "machine": "x86_64", "cores": 2, "gpus": ["H100", "H200"]},
        "command": ["parity", "run", "--grid", "smoke", "--platform", "cpu", "--jax-processes", HOSTILE],
    }  # fmt: skip


def kills():
    finding = {"mutation": "", "what": "", "framework": "", "case": SEP, "outcome": "passed", "gates": [],
               "stage": None, "margin": 0.5, "reason": "", "seconds": 2.0}  # fmt: skip
    rows = [finding]
    for i, name in enumerate(("dropped_expert", "gate_up_swapped", "router_in_bf16")):
        for house in ("jax", "torch"):
            survived = (name, house) == ("router_in_bf16", "torch")
            rows.append(finding | {"mutation": name, "what": f"what {name} does", "framework": house,
                                   "outcome": "survived" if survived else "caught", "stage": "activation",
                                   "gates": [] if survived else ["oracle", "frameworks"], "margin": 20.0 + i,
                                   "reason": HOSTILE})  # fmt: skip
    return {"format": "parity-selftest", "version": 1, "passed": False, "seconds": 32.0,
            "finished": "2026-11-24T19:10:00+00:00", "versions": {"jax": "0.10.2"}, "findings": rows}  # fmt: skip


def folder(path, found=None, with_summary=True, with_kills=True):
    """A results folder as `parity run` and `parity selftest --out` leave it."""
    found = outcomes() if found is None else found
    with Folder(path, resume=False, cases={outcome.case for outcome in found}) as out:
        for outcome in found:
            out.add(outcome)
        if with_summary:
            out.summarize(summary(found))
    if with_kills:
        (path / "selftest.json").write_text(json.dumps(kills()))
    return path
