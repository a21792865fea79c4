"""The process of one candidate: jobs come as JSON lines on standard input, answers go as JSON lines to standard output.

    job      {"what": "layer", "shape": {...}, "repeat": 10}; with "parallel" it is one of `mesh_jax`
    answer   {"ready": versions, and rates or null}, then one object a job: "status" and what was measured, or "reason"

Whatever a framework prints goes to standard error, which is a log.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import sys
import traceback
from dataclasses import asdict
from typing import Any

import numpy as np

from parity.bench import draws, reference, timing
from parity.bench.candidates.base import Candidate, Inputs
from parity.bench.floors import active_experts, work
from parity.bench.shapes import Shape
from parity.worker import die_with_parent

FEW_TOKENS = 1024
"""Up to which the experts that they choose are counted for the floor."""
OUT_OF_MEMORY = ("out of memory", "resource_exhausted", "outofmemory")


class Bench:
    """A candidate, its lab, and the weights of the model it was asked for last."""

    def __init__(self, candidate: Candidate, lab: Any) -> None:
        self.candidate, self.lab = candidate, lab
        self._inputs: Inputs | None = None

    def run(self, what: str, shape: Shape, repeat: int) -> dict[str, object]:
        """Time one kind of work at one shape, and hold the result against the reference."""
        candidate, lab = self.candidate, self.lab
        if self._inputs is not None and self._inputs.shape.model == shape.model:
            inputs = self._inputs.keep(shape)
        else:
            self._inputs = None  # weights of another model give way before new ones are made
            self._release()
            inputs = Inputs(lab, shape, candidate.layout)
        self._inputs = inputs
        operation = candidate.operation(what, shape)
        plain, prepared, routings = [], [], []
        for part in range(timing.sets_of(work(what, shape).bytes, lab.on_gpu)):
            routing = draws.Routing(shape, part)
            plain.append(inputs.arguments(what, part, routing))
            prepared.append(candidate.prepare(what, shape, plain[-1], routing))
            routings.append(routing)
        measured = lab.measure(operation, prepared, repeat)
        error = reference.error(what, shape, lab, candidate.layout, plain[0], measured.result, routings[0])
        answer = {name: value for name, value in vars(measured).items() if name not in ("result", "exchange")}
        wrong = not error <= reference.bound(what)
        return answer | {
            "status": "wrong" if wrong else "ok",
            "error": error,
            "checksum": sum(lab.checksum(array) for array in plain[0][: 4 if what == "layer" else 1]) & draws.MASK,
            "sets": len(prepared),
            "active": self._active(what, shape, plain, routings),
            "note": candidate.note(),
        }

    def _active(self, what: str, shape: Shape, plain: list[tuple], routings: list[draws.Routing]) -> float:
        """Experts that a call's tokens chose, the mean of its sets of inputs; with many tokens all are."""
        if what == "layer" and shape.tokens <= FEW_TOKENS:
            token = np.arange(shape.tokens)
            gate = self.lab.rows(plain[0][1], np.arange(shape.experts))
            chosen = [reference.route(self.lab.rows(given[0], token), gate, shape.top_k)[0] for given in plain]
            return float(np.mean([len(np.unique(ids)) for ids in chosen]))
        if what == "layer":
            return active_experts(shape)
        return float(np.mean([np.count_nonzero(routing.sizes) for routing in routings]))

    def _release(self) -> None:
        gc.collect()
        if "torch" in sys.modules and self.lab.on_gpu:
            sys.modules["torch"].cuda.empty_cache()


def answer(bench: Bench, job: dict) -> dict[str, object]:
    """Do a job; what goes wrong is an answer too."""
    try:
        if "parallel" in job:
            mesh = importlib.import_module("parity.bench.mesh_jax")
            return mesh.run(bench.lab, job["what"], Shape(**job["shape"]), job["parallel"], job["repeat"])
        return bench.run(job["what"], Shape(**job["shape"]), job["repeat"])
    except Exception as error:
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        memory = isinstance(error, MemoryError) or any(word in text.lower() for word in OUT_OF_MEMORY)
        if isinstance(error, MemoryError):
            text = str(error)
        return {"status": "memory" if memory else "failed", "reason": text[:300]}


def main() -> None:
    parser = argparse.ArgumentParser(description="One candidate of `parity bench`.")
    parser.add_argument("--module", required=True)
    parser.add_argument("--lab", required=True)
    parser.add_argument("--platform", required=True, choices=("cpu", "gpu"))
    parser.add_argument("--peers", action="append", default=[])
    parser.add_argument("--unrated", action="store_true", help="measure no rates")
    given = parser.parse_args()
    die_with_parent()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # prints of frameworks belong into the log
    sys.path.extend(given.peers)

    def send(**values: object) -> None:
        channel.write(json.dumps(values) + "\n")
        channel.flush()

    try:
        lab = importlib.import_module(given.lab).Lab(given.platform)
        candidate = importlib.import_module(given.module).CANDIDATE()
        ready = {"versions": lab.versions, "rates": None if given.unrated else asdict(lab.rates())}
    except Exception as error:
        traceback.print_exc()
        send(failed=" ".join(f"{type(error).__name__}: {error}".split())[:300])
        return
    send(ready=ready)
    bench = Bench(candidate, lab)
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            send(**answer(bench, json.loads(line)))
            gc.collect()


if __name__ == "__main__":
    main()
