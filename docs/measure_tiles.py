"""Tiles of the Hopper kernels, timed beside each other and a product of cuBLAS, for `jax_moe/kernels/tiles.py`.

    python docs/measure_tiles.py                    every class, on one Hopper GPU: minutes
    python docs/measure_tiles.py --only gpt_oss     one of the classes; may be given again
    python docs/measure_tiles.py --json FILE        also keep every round
    python docs/measure_tiles.py --list             print the classes and their candidates
    python docs/measure_tiles.py --rehearse         all of it without a GPU: tiny sizes, the reference for the kernels

A class is a layer of `parity bench`, with as many tokens as there and groups drawn at random as there. Its candidates
run in a process of their own, each as a loop of calls inside of one program, in turns; what a candidate computed is
held to the reference before it is timed. A process that dies or does not end is started again without the candidate it
was at.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_moe.activation import Activation
from jax_moe.kernels import choice, hopper, reference, tiles
from jax_moe.kernels import mosaic_gpu_any_height as any_height
from jax_moe.kernels import mosaic_gpu_grouped_matmul as wide
from jax_moe.kernels import mosaic_gpu_small_groups as small
from jax_moe.kernels.schedule import make_schedule
from parity.bench import draws
from parity.bench.shapes import SHAPES, Shape

SILU = Activation(name="silu")
GATE_UP, DOWN = "gate_up", "down"
CUBLAS = "cuBLAS, 8192^3"
ROUNDS = 9
LOOP_SECONDS = 0.012  # of calls, in one program
ATTEMPTS = 3
NO_BETTER = 0.99  # a tile that needs more than this of what today's needs is not worth a change


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A tile of one of the kernels."""

    tile: tiles.Tile

    @property
    def name(self) -> str:
        """As one would write it in tiles.py."""
        mine, plain = (dataclasses.asdict(tile) for tile in (self.tile, type(self.tile)()))
        words = [f"{name}={value}" for name, value in mine.items() if name == "rows" or value != plain[name]]
        return f"{tiles.kernel_of(self.tile)}.Tile({', '.join(words)})"


def _candidates(*found: Any) -> list[Candidate]:
    return [Candidate(tile=tile) for tile in found]


W, A = wide.Tile, any_height.Tile
FEW = _candidates(*(small.Tile(rows=rows) for rows in (8, 16, 32, 64)), A(rows=64))

# name -> (shape, candidates); the shapes' sizes are those of docs/kernels.md
CLASSES: dict[str, tuple[Shape, list[Candidate]]] = {
    "qwen3": (
        SHAPES["prefill_qwen3_30b"],
        _candidates(W(), A(rows=136), A(rows=136, lower=2), A(rows=144, lower=2), A(rows=176, lower=3)),
    ),
    "gpt_oss": (
        SHAPES["prefill_gpt_oss_120b"],
        _candidates(W(), A(rows=144), A(rows=144, lower=2), A(rows=144, lower=4, step=8), A(rows=160, lower=3)),
    ),
    "deepseek_v3": (
        SHAPES["prefill_deepseek_v3"],
        _candidates(
            W(), A(rows=144), A(rows=144, together=2), A(rows=128, together=2), A(rows=160, together=2)
        ),
    ),
    "mixtral": (SHAPES["prefill_mixtral"], _candidates(W(), A(rows=152), A(rows=176))),
    "120b": (SHAPES["prefill_120b"], _candidates(W(), A(rows=160), A(rows=160, lower=1), A(rows=176, stages=3))),
    "qwen3, few": (SHAPES["decode64_qwen3_30b"], FEW),
    "qwen3, more": (SHAPES["decode256_qwen3_30b"], FEW),
    "deepseek_v3, few": (SHAPES["decode64_deepseek_v3"], FEW),
}  # fmt: skip


def shape_of(name: str, rehearse: bool) -> Shape:
    shape = CLASSES[name][0]
    if not rehearse:
        return shape
    return dataclasses.replace(shape, tokens=96, hidden=64, intermediate=64, experts=8, top_k=2)


def today(shape: Shape) -> dict[str, str]:
    """Product -> the name of the tile that tiles.py has for it."""
    gates = {GATE_UP: True, DOWN: False}
    picks = {product: tiles.choose_tile(shape.rows, shape.experts, gated=gated) for product, gated in gates.items()}
    return {product: Candidate(tile=pick.tile).name for product, pick in picks.items()}


# In the process of a class


def inputs(shape: Shape) -> dict[str, jax.Array]:
    """Rows sorted by expert, activated rows, weights, and group sizes; of bfloat16 and int32 alone."""
    routing, keys = draws.Routing(shape), iter(jax.random.split(jax.random.key(0), 4))
    T, D, F, E = shape.tokens, shape.hidden, shape.intermediate, shape.experts

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key: jax.Array, rows: int, columns: int, scale: float = 1.0) -> jax.Array:
        return (jax.random.normal(key, (rows, columns), jnp.bfloat16) * scale).astype(jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def stacked(key: jax.Array, rows: int, columns: int) -> jax.Array:  # one at a time: all of them are many GB
        return jax.lax.map(lambda key: normal(key, rows, columns, columns**-0.5), jax.random.split(key, E))

    return {
        "rows": normal(next(keys), T, D)[jnp.asarray(routing.row_token)],
        "h": normal(next(keys), shape.rows, F),
        "w_gate_up": stacked(next(keys), 2 * F, D),
        "w_down": stacked(next(keys), D, F),
        "sizes": jnp.asarray(routing.sizes),
    }


def abstract(shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    """What `inputs` gives, without the arrays."""
    D, F, E, R = shape.hidden, shape.intermediate, shape.experts, shape.rows
    floats = {"rows": (R, D), "h": (R, F), "w_gate_up": (E, 2 * F, D), "w_down": (E, D, F)}
    given = {name: jax.ShapeDtypeStruct(size, jnp.bfloat16) for name, size in floats.items()}
    return given | {"sizes": jax.ShapeDtypeStruct((E,), jnp.int32)}


def arguments(given: dict, product: str) -> dict:
    """Of `given`, what a program takes; the schedule comes on top."""
    return {"x": given["h" if product == DOWN else "rows"], "w": given[f"w_{product}"], "sizes": given["sizes"]}


def multiply(candidate: Candidate, product: str, rehearse: bool) -> Callable[[dict], jax.Array]:
    """One call, of a dict as `arguments` makes it."""
    activation = SILU if product == GATE_UP else None

    def kernel(given: dict) -> jax.Array:
        run = tiles.KERNELS[tiles.kernel_of(candidate.tile)].grouped_matmul
        return run(given["x"], given["w"], given["schedule"], activation=activation, tile=candidate.tile)

    return functools.partial(formula, product) if rehearse else kernel


def formula(product: str, given: dict) -> jax.Array:
    """The reference."""
    if product == DOWN:
        return reference.grouped_matmul(given["x"], given["w"], given["sizes"], None, given["x"].dtype)
    return reference.gate_up(given["x"], given["w"], given["sizes"], SILU, None)


def repeated(call: Callable[[dict], jax.Array], calls: int) -> Callable[[dict], jax.Array]:
    """The last of as many calls. Each takes its sizes from the one before: no compiler may merge or move them."""

    def run(given: dict) -> jax.Array:
        def again(zero: jax.Array) -> jax.Array:
            return call(given | {name: given[name] + zero for name in {"sizes", "schedule"} & set(given)})

        def body(_: Any, zero: jax.Array) -> jax.Array:
            return jnp.isnan(again(zero)[0, 0]).astype(jnp.int32)

        return again(jax.lax.fori_loop(0, calls - 1, body, jnp.int32(0)))

    return run


def flops(shape: Shape, product: str) -> float:
    return {GATE_UP: 4.0, DOWN: 2.0}[product] * shape.rows * shape.hidden * shape.intermediate


def calls_of(shape: Shape, product: str) -> int:
    """As many as take about LOOP_SECONDS at 600 TFLOP/s and 2.5 TB/s."""
    weights = shape.hidden * shape.intermediate * min(shape.experts, shape.rows)
    moved = {GATE_UP: 4.0, DOWN: 2.0}[product] * weights
    seconds = max(flops(shape, product) / 6e14, moved / 2.5e12, 1e-5)
    return max(2, min(50, math.ceil(LOOP_SECONDS / seconds)))


def jobs(name: str, without: Iterable[str] = ()) -> list[tuple[str, Candidate, str]]:
    """(name, candidate, product) of everything that is timed for a class."""
    found = [(candidate.name, candidate, product) for candidate in CLASSES[name][1] for product in (GATE_UP, DOWN)]
    return [job for job in found if f"{job[0]}|{job[2]}" not in set(without)]


def traced(shape: Shape, candidate: Candidate, product: str, rehearse: bool) -> Any:
    """The program that is timed, with abstract operands; raises where the kernels could not take these."""
    given: dict = arguments(abstract(shape), product)
    x, w = given["x"], given["w"]
    reason = hopper.no_gate_up(x, w, None, SILU, None) if product == GATE_UP else (
        hopper.no_grouped_matmul(x, w, None, None, x.dtype))  # fmt: skip
    assert reason is None, reason
    make = functools.partial(make_schedule, rows=shape.rows, tile=candidate.tile.rows)
    given["schedule"] = jax.eval_shape(make, given["sizes"])
    return jax.jit(repeated(multiply(candidate, product, rehearse), calls_of(shape, product))).trace(given)


def work(name: str, rehearse: bool, without: list[str]) -> None:
    """Everything of one class; a line of JSON for whatever happens. Waits for a line on stdin, then takes the card."""
    out = sys.stdout
    sys.stdout = sys.stderr

    def say(**event: Any) -> None:
        print(json.dumps(event), file=out, flush=True)

    shape, compiled = shape_of(name, rehearse), {}
    with ThreadPoolExecutor(4) as pool:
        found = {}
        for label, candidate, product in jobs(name, without):
            key = f"{label}|{product}"
            try:
                found[key] = (
                    candidate,
                    product,
                    pool.submit(traced(shape, candidate, product, rehearse).lower().compile),
                )
            except Exception as error:
                say(event="left out", key=key, reason=f"{type(error).__name__}: {error}"[:300])
        for key, (candidate, product, future) in found.items():
            try:
                compiled[key] = candidate, product, future.result()
            except Exception as error:
                say(event="left out", key=key, reason=f"{type(error).__name__}: {error}"[:300])
    say(event="ready")
    sys.stdin.readline()

    given = inputs(shape)
    for array, expected in zip(given.values(), abstract(shape).values(), strict=True):
        assert (array.shape, array.dtype) == (expected.shape, expected.dtype), (array.shape, array.dtype, expected)
    side = 128 if rehearse else 8192
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    pairs = 3  # two products in a turn: the second writes where the first has read
    chain = jax.jit(lambda a, b: jax.lax.fori_loop(0, pairs, lambda _, a: (a @ b) @ b, a))
    chain = chain.lower(square, square).compile()
    shrunk = (square * side**-0.5).astype(jnp.bfloat16)
    say(event="card", card=jax.devices()[0].device_kind, jax=jax.__version__)

    programs: dict[str, tuple[Callable, tuple, int]] = {f"{CUBLAS}|": (chain, (square, shrunk), 2 * pairs)}
    want: dict[str, jax.Array] = {}
    worst = jax.jit(_worst_row)
    for key, (candidate, product, program) in compiled.items():
        operands = arguments(given, product)
        make = jax.jit(functools.partial(make_schedule, rows=shape.rows, tile=candidate.tile.rows))
        operands["schedule"] = make(given["sizes"])
        if product not in want:
            plain = jax.jit(functools.partial(formula, product))
            want[product] = jax.block_until_ready(plain(arguments(given, product)))
        say(event="trying", key=key)
        error = float(worst(program(operands), want[product]))
        if not error < float(jnp.finfo(jnp.bfloat16).eps) / 2:
            say(event="left out", key=key, reason=f"wrong: a row is off by {error:.1e} of its norm")
            continue
        say(event="right", key=key, error=error)
        programs[key] = program, (operands,), calls_of(shape, product)
    want.clear()
    for program, operands, _ in programs.values():
        jax.block_until_ready(program(*operands))
    for _ in range(2 if rehearse else ROUNDS):
        times = {}
        for key, (program, operands, calls) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*operands))
            times[key] = (time.perf_counter() - began) * 1e3 / calls
        say(event="round", times=times)
    say(event="done")


def _worst_row(got: jax.Array, want: jax.Array) -> jax.Array:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    error = jnp.linalg.norm(got - want, axis=1) / jnp.maximum(jnp.linalg.norm(want, axis=1), 1e-30)
    return jnp.max(jnp.where(jnp.isnan(error), jnp.inf, error))


# In the process that starts them


class Worker:
    """The process of a class, and the lines it has printed."""

    def __init__(self, name: str, rehearse: bool, without: list[str], folder: Path) -> None:
        self.events: list[dict] = []
        self._log = open(folder / f"{name}.log", "a+b")  # noqa: SIM115
        command = [sys.executable, __file__, "--work", name] + ["--rehearse"] * rehearse
        command += [word for key in without for word in ("--without", key)]
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        env = os.environ | {"PYTHONPATH": path}
        env |= {"JAX_PLATFORMS": "cpu"} if rehearse else {}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=env, text=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def go(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `until` finds out
            self._process.stdin.write("go\n")
            self._process.stdin.flush()

    def until(self, event: str, seconds: float) -> str | None:
        """Reads up to this event; None, or why it will not come. The process is gone then."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                self.close()
                return f"did not end within {seconds:.0f} s"
            if line is None:
                status = self._process.wait()
                self._log.seek(0)
                last = self._log.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
                self.close()
                return f"its process ended with status {status}: {last[:300]}"
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == event:
                return None

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def measure(
    names: list[str], rehearse: bool, limit: float, compile_limit: float, keep: Path | None = None
) -> dict[str, dict]:
    """Class -> what its process said, also kept in a file. All compile at once; then one at a time has the card."""
    out: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        workers = {name: Worker(name, rehearse, [], Path(folder)) for name in names}
        try:
            reasons = {name: worker.until("ready", compile_limit) for name, worker in workers.items()}
            for name in names:
                left_out: dict[str, str] = {}
                for attempt in range(ATTEMPTS):
                    worker, reason = workers[name], reasons.pop(name, None)
                    if attempt:
                        workers[name] = worker = Worker(name, rehearse, list(left_out), Path(folder))
                        reason = worker.until("ready", compile_limit)
                    if reason is None:
                        worker.go()
                        reason = worker.until("done", limit)
                    out[name] = summary(name, rehearse, worker.events, left_out, reason)
                    tried = [event["key"] for event in worker.events if event["event"] == "trying"]
                    if reason is None or out[name]["rounds"] or not tried:
                        break
                    left_out[tried[-1]] = reason
                worker.close()
                print("\n".join(table(name, out[name])) + "\n", flush=True)
                if keep:
                    keep.write_text(json.dumps(out) + "\n", encoding="utf-8")
        finally:
            for worker in workers.values():
                worker.close()
    return out


def summary(name: str, rehearse: bool, events: list[dict], left_out: dict[str, str], reason: str | None) -> dict:
    """Medians of what one process said."""
    shape = shape_of(name, rehearse)
    rounds = [event["times"] for event in events if event["event"] == "round"]
    found: dict[str, dict] = {}
    for key in rounds[0] if rounds else ():
        ms = statistics.median(times[key] for times in rounds)
        label, product = key.split("|")
        work = flops(shape, product) if product else 2.0 * (128 if rehearse else 8192) ** 3
        best = min(times[key] for times in rounds)
        found[key] = {"name": label, "product": product, "ms": ms, "best_ms": best, "tflops": work / ms / 1e9}
    card = next((event for event in events if event["event"] == "card"), {})
    gone = left_out | {event["key"]: event["reason"] for event in events if event["event"] == "left out"}
    return {"shape": dataclasses.asdict(shape), "today": today(CLASSES[name][0]), "card": card.get("card"),
            "jax": card.get("jax"), "ended": reason, "left_out": gone, "times": found, "rounds": rounds}  # fmt: skip


def suggestion(name: str, product: str, found: dict) -> str:
    """The choice for tiles.py: the tile that is fastest in this product, if it is faster than today's."""
    shape = CLASSES[name][0]
    mean = shape.rows / shape.experts
    ms = {key.split("|")[0]: each["ms"] for key, each in found["times"].items() if key.endswith(f"|{product}")}
    if not ms:
        return "no tile was timed: no suggestion"
    was = found["today"][product]
    best, base = min(ms, key=ms.__getitem__), ms.get(was)
    if base is not None and ms[best] > NO_BETTER * base:
        return f"at {mean:g} rows an expert {was} stays: {base:.3f} ms, the best {ms[best]:.3f} ms ({best})"
    choice = f'Choice({best}, "{found["card"]}, {datetime.date.today().isoformat()}: {mean:g}")'
    return f"{choice}: {ms[best]:.3f} ms, " + (f"{was} {base:.3f} ms" if base else "today's was not timed")


def table(name: str, found: dict) -> list[str]:
    """Markdown: a line a candidate, and what follows for tiles.py."""
    sizes, times = found["shape"], found["times"]
    words = ", ".join(str(sizes[field]) for field in ("tokens", "hidden", "intermediate", "experts", "top_k"))
    lines = [f"### {name}: {words}; {found['card']}, JAX {found['jax']}"]
    if found["ended"]:
        lines.append(f"Ended early: {found['ended']}")
    lines += [f"Left out: {key.replace('|', ', ')}: {reason}" for key, reason in found["left_out"].items()]
    if not times:
        return [*lines, "Nothing was timed."]
    ruler = times[f"{CUBLAS}|"]
    lines.append(f"{CUBLAS}: {ruler['tflops']:.0f} TFLOP/s beside these")
    lines += ["", "| tile | gate, up: ms | TFLOP/s | down: ms | TFLOP/s |", "|---|---|---|---|---|"]
    for candidate in CLASSES[name][1]:
        cells = []
        for product in (GATE_UP, DOWN):
            each = times.get(f"{candidate.name}|{product}")
            mark = " (today)" * (candidate.name == found["today"][product])
            cells += [f"{each['ms']:.3f}{mark}", f"{each['tflops']:.0f}"] if each else ["", ""]
        if any(cells):
            lines.append(f"| `{candidate.name}` | {' | '.join(cells)} |")
    return [*lines, "", *(f"tiles.py, {product}: {suggestion(name, product, found)}" for product in (GATE_UP, DOWN))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CLASSES, action="append")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds a class may have the card")
    parser.add_argument("--compile-limit", type=float, default=240.0, help="seconds in which all have compiled")
    parser.add_argument("--work", choices=CLASSES, help=argparse.SUPPRESS)
    parser.add_argument("--without", action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work(args.work, args.rehearse, args.without)
        return 0
    names = args.only or list(CLASSES)
    if args.list:
        for name in names:
            print("\n".join([name, *(f"    {label}, {product}" for label, _, product in jobs(name))]))
        return 0
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # looking at the card must not take its memory
    if not args.rehearse and not choice.runs_on_hopper():
        print("needs a GPU of compute capability 9.0; --rehearse runs all of it without one", file=sys.stderr)
        return 2
    found = measure(names, args.rehearse, args.limit, args.compile_limit, args.json)
    return 0 if all(each["rounds"] and not each["ended"] for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
