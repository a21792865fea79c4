"""Every array of a case, made from its id alone, so that all frameworks and every machine get the same bits.

Sizes are chosen so that a bug shows: unit-RMS activations, experts whose parts of the output are of one size, a shared
expert of the routed part's size, top-k choices that no rounding can swap (`MARGIN`), every expert and rank in use.

Large arrays (expert weights) depend on few parts of the id and are shared between cases; they lie in a cache folder.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np

from parity import tied_tokens
from parity.arrays import DTYPE, STORED_AS, ArrayRef, bits_of_float32, float32_of_bits
from parity.case import Case
from parity.oracle.activation import activate, split
from parity.oracle.router import Routing, route
from parity.tied_tokens import MARGIN

SMALLEST_SHARE = 0.1
"""Preferred least weight of a chosen expert, over the norm of the token's weights."""
OUTPUT_GAIN = 2.0
"""Scale of the down projection: gated activations halve the RMS of unit inputs."""
CACHE_BYTES = 4 << 30


def build(case: Case, cache: Path) -> dict[str, ArrayRef]:
    """The case's arrays on disk, made now or found in the cache.

    Args:
      case: its `logical_id` decides every bit.
      cache: a folder; files in it are shared between cases and processes, and dropped oldest first past CACHE_BYTES.

    Returns:
      name -> array, for "x" (T, D) over the real tokens in rank order, "router_logits" (T, E) float32 or "topk_ids"
      (T, K) int32 and "topk_weights" (T, K) float32 when they are given, and every parameter in checkpoint layout.

    Raises:
      OSError: the folder cannot be written (no space left, say).
    """
    cache.mkdir(parents=True, exist_ok=True)
    refs = {}
    for name, shape, scale in _expert_arrays(case):
        refs[f"experts.{name}"] = _large(case, cache, name, shape, scale)
    folder = cache / f"case-{_digest(case.logical_id)}"
    for name, values in _small_arrays(case).items() if not (folder / "done").exists() else ():
        folder.mkdir(exist_ok=True)
        _write(folder / name, values)
    if not (folder / "done").exists():
        (folder / "done").touch()
    for path in sorted(folder.iterdir()):
        if path.name != "done":
            name, dtype, *shape = path.name.split(",")
            refs[name] = ArrayRef(str(path), dtype, tuple(map(int, shape)))
    _trim(cache, keep={Path(ref.path) for ref in refs.values()})
    return refs


def _expert_arrays(case: Case) -> Iterator[tuple[str, tuple[int, ...], float]]:
    rows = (2 if case.gated else 1) * case.intermediate
    yield "gate_up", (case.experts, rows, case.expert_width), case.expert_width**-0.5
    yield "down", (case.experts, case.expert_width, case.intermediate), OUTPUT_GAIN * case.intermediate**-0.5
    if case.flags.expertbias:
        yield "gate_up_bias", (case.experts, rows), 0.5
        yield "down_bias", (case.experts, case.expert_width), 0.5


def _large(case: Case, cache: Path, name: str, shape: tuple[int, ...], scale: float) -> ArrayRef:
    """One stacked array of all experts, written expert by expert."""
    mean = case.flags.mean and name == "gate_up"
    dtype = DTYPE[case.format]
    path = cache / f"{name}-{dtype}-{'x'.join(map(str, shape))}-{case.flags.seed}{'-mean' * mean}"
    ref = ArrayRef(str(path), dtype, shape)
    if path.exists():
        os.utime(path)  # the cache drops what was not used for longest
        return ref
    rng = _rng(case, name, *shape)

    def experts() -> Iterator[np.ndarray]:
        for _ in range(shape[0]):
            part = rng.standard_normal(shape[1:], np.float32) * np.float32(scale)
            yield part + np.float32(2 / shape[-1]) if mean else part

    _atomically(path, lambda file: [file.write(_stored(part, dtype).data) for part in experts()])
    return ref


def _small_arrays(case: Case) -> dict[str, tuple[str, np.ndarray]]:
    """Tokens, routing, shared expert, latent projections: name -> (dtype, values)."""
    dtype, flags = DTYPE[case.format], case.flags
    rounded = _rounder(dtype)
    out: dict[str, tuple[str, np.ndarray]] = {}
    bias = None
    if flags.bias:
        spread = 0.05 if flags.sigmoid else 0.3 / case.experts
        bias = (_rng(case, "bias").standard_normal(case.experts) * spread).astype(np.float32)
        if flags.ties:
            bias = tied_tokens.tied_bias(bias, _classes(case), spread, grouped=flags.groups[0] > 1)
        out["router.bias"] = ("float32", bias)

    x, gate, logits, routing = _tokens(case, rounded, bias)
    out["x"] = (dtype, x)
    if flags.gate:
        out["router.gate"] = (dtype, gate)
    elif flags.ids:
        out["topk_ids"] = ("int32", routing.ids.astype(np.int32))
        out["topk_weights"] = ("float32", routing.weights.astype(np.float32))
    else:
        out["router_logits"] = ("float32", logits)

    if flags.latent:
        width, rng = flags.latent, _rng(case, "latent")
        out["latent.down"] = (dtype, rng.standard_normal((width, case.hidden), np.float32) * case.hidden**-0.5)
        out["latent.up"] = (dtype, rng.standard_normal((case.hidden, width), np.float32) * width**-0.5)
    if flags.shared:
        width, rng = case.shared_width, _rng(case, "shared")
        rows = (2 if case.gated else 1) * width
        gain = _routed_rms(case, routing) / _activation_rms(case, 1.0)
        out["shared.gate_up"] = (dtype, rng.standard_normal((rows, case.hidden), np.float32) * case.hidden**-0.5)
        out["shared.down"] = (dtype, rng.standard_normal((case.hidden, width), np.float32) * (gain * width**-0.5))
        if flags.sharedgate:
            out["shared.gate"] = (dtype, rng.standard_normal((1, case.hidden), np.float32) * case.hidden**-0.5)
    return out


def _tokens(
    case: Case, rounded: Callable[[np.ndarray], np.ndarray], bias: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Routing]:
    """x (T, D), the router's gate (E, D), logits (T, E) and routing of T tokens picked from a pool of candidates.

    Picked are tokens whose choice has a margin, none of whose experts weighs next to nothing, first those that hit
    experts not hit before.
    """
    wanted, rng = case.total_tokens, _rng(case, "tokens")
    planted = case.flags.ties or case.flags.nearties
    pool = (4 if planted else 2) * wanted + 64
    x = rng.standard_normal((pool, case.hidden), np.float32)
    # a weight on the input enters an expert twice or more (gate times up), so the chosen weights must be closer
    logit_rms = 0.3 if case.flags.weightin else 1.0
    gate = rng.standard_normal((case.experts, case.hidden), np.float32) * (logit_rms * case.hidden**-0.5)
    logits = rng.standard_normal((pool, case.experts), np.float32) * np.float32(logit_rms)
    if case.flags.mean:
        x += np.float32(0.5)
    if case.flags.hot:  # K experts that every token prefers by far
        logits[:, : case.top_k] += 8
        along = rng.standard_normal(case.hidden, np.float32)
        along /= np.linalg.norm(along)
        x += (math.sqrt(case.hidden) - x @ along)[:, None] * along
        gate -= (gate @ along)[:, None] * along  # the common direction favours those K alone
        gate[: case.top_k] += 8 * case.hidden**-0.5 * along
    x, gate = rounded(x), rounded(gate)
    of = np.zeros(pool, int)
    if case.flags.ties:
        x, gate, logits, of = tied_tokens.tie(x, gate, logits, _classes(case), computed=case.flags.gate)
    elif case.flags.nearties:
        x, gate, logits, of = tied_tokens.near(case, _rng(case, "near"), x, gate, logits, bias, rounded)
    elif case.flags.gate:
        logits = tied_tokens.products(x, gate).astype(np.float32)
    routing = route(logits, bias, top_k=case.top_k, flags=case.flags)
    if planted:
        choices = tied_tokens.choices(case, x, gate, logits, bias)
        safe = tied_tokens.settled(choices, of, exact=case.flags.ties)
    else:
        last = np.take_along_axis(routing.selection, routing.ids[:, -1:], axis=1)[:, 0]
        safe = routing.gap > MARGIN * np.abs(last)
    share = routing.weights.min(axis=1) / np.linalg.norm(routing.weights, axis=1)
    order = np.lexsort((np.arange(pool), -np.minimum(share, SMALLEST_SHARE), ~safe))
    hit, first, rest = np.zeros(case.experts, bool), [], []
    for token in order:
        fresh = not hit.all() and safe[token] and not hit[routing.ids[token]].all()
        (first if fresh else rest).append(token)
        hit[routing.ids[token]] |= fresh
    order = np.array(first + rest)
    picked = order[tied_tokens.in_turn(of[order], ~safe[order])][:wanted] if planted else order[:wanted]
    rng.shuffle(picked)
    chosen = Routing(**{field.name: getattr(routing, field.name)[picked] for field in fields(Routing)})
    return x[picked], gate, logits[picked], chosen


def _classes(case: Case) -> np.ndarray:
    """(E,) which experts tie."""
    return tied_tokens.classes(case, _rng(case, "ties"))


def _activation_rms(case: Case, sigma: float) -> float:
    """RMS of an expert's output for unit-RMS inputs scaled by `sigma`, as its weights are drawn here."""
    pre = np.random.default_rng(0).standard_normal((2048, 2)) * sigma
    gate, up = split(pre, gated=case.gated, interleaved=False)
    return OUTPUT_GAIN * float(np.sqrt(np.mean(activate(gate, up, case.flags) ** 2)))


def _routed_rms(case: Case, routing: Routing) -> float:
    weights = np.sqrt(np.mean(np.sum(routing.weights**2, axis=1)))
    if case.flags.weightin:
        typical = float(weights / math.sqrt(case.top_k))
        return math.sqrt(case.top_k) * _activation_rms(case, typical)
    return float(weights) * _activation_rms(case, 1.0)


def _rng(case: Case, name: str, *sizes: int) -> np.random.Generator:
    seed = hashlib.sha256(f"{name}/{sizes or case.logical_id}/{case.flags.seed}".encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(seed[:16], "little")))


def _rounder(dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    return (lambda v: float32_of_bits(bits_of_float32(v))) if dtype == "bfloat16" else (lambda v: v)


def _stored(values: np.ndarray, dtype: str) -> np.ndarray:
    return bits_of_float32(values) if dtype == "bfloat16" else np.ascontiguousarray(values, STORED_AS[dtype])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _write(path: Path, array: tuple[str, np.ndarray]) -> None:
    """Write an array under a name that says its dtype and shape."""
    dtype, values = array
    named = path.with_name(",".join([path.name, dtype, *map(str, values.shape)]))
    _atomically(named, lambda file: file.write(_stored(values, dtype).tobytes()))


def _atomically(path: Path, write: Callable) -> None:
    """Write a file so that others see all of it or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _trim(cache: Path, keep: set[Path]) -> None:
    """Drop the large arrays that were not used for longest, down to CACHE_BYTES."""
    files = [path for path in cache.iterdir() if path.is_file()]
    used = sum(path.stat().st_size for path in files)
    for path in sorted(files, key=lambda path: path.stat().st_mtime):
        if used <= CACHE_BYTES:
            break
        if path not in keep:
            used -= path.stat().st_size
            path.unlink(missing_ok=True)
