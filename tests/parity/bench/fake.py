"""A candidate and a lab in plain NumPy, which misbehave as the number of tokens tells them to."""

import os
import signal
import sys
import time

import numpy as np

from parity.bench import draws, reference, timing
from parity.bench.candidates.base import Candidate
from parity.bench.floors import Rates

RAISES, DIES, HANGS, WRONG, STARVES, NAN, NOISY = range(101, 108)


class Lab:
    on_gpu = False

    def __init__(self, where="cpu"):
        self.versions = {"fake": "1", "device": "none"}

    def normal(self, seed, shape, deviation):
        return draws.normal(seed, shape, deviation)

    def stacked(self, seeds, sizes, deviation, layout):
        out = np.stack([draws.normal(seed, sizes, deviation) for seed in seeds])
        return out.transpose(0, 2, 1) if layout == "transposed" else out

    def put(self, values):
        return values

    def rows(self, array, index):
        return np.asarray(array[index], np.float32)

    def product(self, weights, expert, x, layout):
        return x @ (weights[expert] if layout == "transposed" else weights[expert].T)

    def checksum(self, array):
        return draws.checksum(array)

    def finite(self, array):
        return bool(np.isfinite(array).all())

    def rates(self):
        return Rates(1.0, 10.0)

    def measure(self, function, sets, repeat):
        result = function(*sets[0])
        return timing.Timing(
            device_ms=2.0,
            spread=0.0,
            wall_ms=2.5,
            clock="wall",
            compile_s=0.1,
            peak_bytes=10,
            temporary_bytes=1,
            result=result,
        )


class Fake(Candidate):
    def operation(self, what, shape):
        assert what == "layer"

        def layer(x, gate, gate_up, down):
            if shape.tokens == RAISES:
                raise ZeroDivisionError("it\ndoes not add up")
            if shape.tokens == DIES:
                os.kill(os.getpid(), signal.SIGKILL)
            if shape.tokens == HANGS:
                time.sleep(600)
            if shape.tokens == STARVES:
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 256 GB")
            if shape.tokens == NOISY:
                print("what a library says", flush=True)
                print("and complains", file=sys.stderr, flush=True)
            ids, weights, _ = reference.route(x, gate, shape.top_k)
            named = {"gate_up": gate_up, "down": down}
            out = reference.layer(x, ids, weights, lambda name, expert, rows: rows @ named[name][expert].T)
            if shape.tokens == WRONG:
                out = out * np.float32(1.05)
            if shape.tokens == NAN:
                out[0, 0] = np.nan
            return out

        return layer


CANDIDATE = Fake
