"""The JAX layer over several devices: the whole, its stages as programs of their own, and plain collectives.

Inside a stage's program all values are one rank's. Between two programs they lie stacked by rank, (ranks, ...), which
costs nothing: every rank keeps its own. All programs of a spread are compiled side by side, from shapes alone.

Shape suffixes: T tokens of all ranks, t of one, c that a rank routes, D hidden, E experts, F intermediate, N ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_moe as jm
from jax_moe import experts, layer, router, transport
from parity.backends.layout import layer_options
from parity.bench import draws, reference, timing
from parity.bench.candidates import jax_lab
from parity.bench.shapes import Shape
from parity.case import Case

SETS = 2
THREADS = 8
SIZES = {"gpu": tuple(1 << power for power in range(15, 31, 3)), "cpu": (1 << 12, 1 << 15)}
"""Of plain collectives, in bytes, as NCCL's own tests count them."""
MEETING = ("whole", "dispatch", "combine")
"""Programs in which ranks wait for each other."""


def run(lab: jax_lab.Lab, what: str, shape: Shape, parallel_text: str, repeat: int) -> dict[str, object]:
    """Time one spread of one layer, or plain collectives.

    Args:
      lab: of JAX's first device; the mesh takes as many as the spread has ranks.
      what: "mesh", the layer and its stages; "shared", the layer with and without a shared expert; "collectives".
      shape: its tokens are those of all DP ranks together, rounded up to a multiple of their number.
      parallel_text: parallel mode and transport of a case id, `dp4.tp1.ep/padded`; for collectives the mode alone.
      repeat: calls that the median is taken of.

    Returns:
      The row: see the functions below.

    Raises:
      ValueError: no such spread, or more ranks than devices.
    """
    if what == "collectives":
        return collectives(lab, parallel_text, repeat)
    case = case_of(parallel_text, shape, "+shared" if what == "shared" else "")
    if case.world > len(jax.devices()):
        raise ValueError(f"{parallel_text} has {case.world} ranks, and there are {len(jax.devices())} devices")
    shape = replace(shape, tokens=case.total_tokens)
    if what == "shared":
        return shared_expert(lab, case, case_of(parallel_text, shape), shape, repeat)
    return stages(lab, case, shape, repeat)


def case_of(parallel_text: str, shape: Shape, flags: str = "") -> Case:
    """The case that stands for a shape on a spread, its tokens divided evenly over DP ranks."""
    sizes = f"d{shape.hidden}.f{shape.intermediate}/e{shape.experts}.k{shape.top_k}/gate+renorm{flags}"
    dp = Case.parse(f"{parallel_text}/bf16/t1.{sizes}").dp
    return Case.parse(f"{parallel_text}/bf16/t{-(-shape.tokens // dp)}.{sizes}")


def stages(lab: jax_lab.Lab, case: Case, shape: Shape, repeat: int) -> dict[str, object]:
    """The whole layer and each stage, fed with what the one before it made.

    Returns:
      Milliseconds of each, bytes that a rank sends to others in dispatch and in combine, and those over the time.
    """
    bench = _Mesh(case)
    with ThreadPoolExecutor(THREADS) as pool:
        making, drawing = pool.submit(bench.params, shape), pool.submit(bench.tokens, shape, SETS)
        traced = bench.traced(shape)
        programs = dict(zip(traced, pool.map(lab.compile, traced.values()), strict=True))
        params, xs = making.result(), drawing.result()
    calls = {name: program.call for name, program in programs.items()}
    routed = [calls["route"](params.router.gate, x) for x in xs]
    sent = [calls["dispatch"](*each) for each in routed]
    back = [(calls["experts"](params.experts, *each), each[1]) for each in sent]
    inputs: dict[str, list[tuple]] = {
        "whole": [(params, x) for x in xs],
        "route": [(params.router.gate, x) for x in xs],
        "dispatch": routed,
        "experts": [(params.experts, *each) for each in sent],
        "combine": back,
    }
    timed = {
        name: lab.time(programs[name], sets, repeat, meeting=name in MEETING) for name, sets in inputs.items()
    }  # fmt: skip
    whole = timed["whole"]
    error = _error(lab, case, shape, params, xs[0], whole.result)
    out = {
        "status": "ok" if error <= reference.bound("layer") else "wrong",
        "error": error,
        "ranks": case.world,
        "tokens_per_rank": case.rows_per_rank,
        "clock": whole.clock,
        "wall_ms": whole.wall_ms,
        "compile_s": whole.compile_s,
        "peak_bytes": whole.peak_bytes,
        "spread": whole.spread,
        **{f"{name}_ms": each.device_ms for name, each in timed.items()},
        **_exchange(whole),
    }
    for name, sent_bytes in moved(bench, case).items():
        out |= {f"{name}_bytes": sent_bytes, f"{name}_gbps": sent_bytes / timed[name].device_ms / 1e6}
    return out


def moved(bench: _Mesh, case: Case) -> dict[str, float]:
    """Bytes that a rank sends to others in dispatch and combine, those of the layer's own sums and gathers included.

    A sum of S bytes over n ranks is 2 S (n - 1) / n, a gather of S bytes in all S (n - 1) / n: what the best algorithms
    send, and what NCCL's tests divide by the time for their bus bandwidth.
    """
    if case.world == 1:
        return {}
    cost = jm.estimate(bench.config, bench.parallel, case.rows_per_rank)
    dispatch, combine = cost.dispatch_bytes, cost.combine_bytes
    others = (case.tp - 1) / case.tp
    if layer.routed_partial_over(bench.parallel):
        combine += 2 * others * 4 * case.tokens[0] * case.hidden
    if bench.cuts:
        combine += others * 2 * case.rows_per_rank * case.tp * case.hidden
    return {name: sent for name, sent in (("dispatch", dispatch), ("combine", combine)) if sent}


def shared_expert(lab: jax_lab.Lab, case: Case, without_it: Case, shape: Shape, repeat: int) -> dict[str, object]:
    """How much of a shared expert's time the layer hides: with it, without it, and the expert alone.

    Returns:
      `whole_ms`, `without_ms`, `shared_ms`, and `overlap`: (without + shared - whole) / shared. 1: it costs nothing;
      0: as much as alone.
    """
    bench, plain = _Mesh(case), _Mesh(without_it)
    with ThreadPoolExecutor(THREADS) as pool:
        making, drawing = pool.submit(bench.params, shape), pool.submit(bench.tokens, shape, SETS)
        params_like, x_like = bench.like(shape)
        traced = {
            "whole": jax.jit(bench.whole).trace(params_like, x_like),
            "without": jax.jit(plain.whole).trace(replace(params_like, shared=None), x_like),
            "shared": jax.jit(bench.shared).trace(params_like.shared, x_like),
        }
        programs = dict(zip(traced, pool.map(lab.compile, traced.values()), strict=True))
        params, xs = making.result(), drawing.result()
    bare = replace(params, shared=None)
    whole = lab.time(programs["whole"], [(params, x) for x in xs], repeat)
    without = lab.time(programs["without"], [(bare, x) for x in xs], repeat)
    alone = lab.time(programs["shared"], [(params.shared, x) for x in xs], repeat, meeting=False)
    index = reference.spread(reference.SAMPLES, shape.tokens)
    parts = lab.rows(without.result, index) + lab.rows(bench.complete(alone.result), index)
    error = max(
        reference.worst(lab.rows(whole.result, index), parts),
        _error(lab, case, shape, bare, xs[0], without.result),
    )
    hidden = without.device_ms + alone.device_ms - whole.device_ms
    return {
        "status": "ok" if error <= reference.bound("layer") else "wrong",
        "error": error,
        "ranks": case.world,
        "tokens_per_rank": case.rows_per_rank,
        "clock": whole.clock,
        "whole_ms": whole.device_ms,
        "without_ms": without.device_ms,
        "shared_ms": alone.device_ms,
        "overlap": hidden / alone.device_ms,
        "wall_ms": whole.wall_ms,
        "spread": max(each.spread for each in (whole, without, alone)),
        **_exchange(whole),
    }


def _exchange(timed: timing.Timing) -> dict[str, object]:
    if timed.exchange is None:
        return {}
    found = timed.exchange
    return {"exchange_ms": found.ms, "exchange_hidden": found.hidden, "exchange_kernels": list(found.kernels)}


def collectives(lab: jax_lab.Lab, parallel_text: str, repeat: int) -> dict[str, object]:
    """Plain collectives of several sizes, sizes and bus bandwidth counted as NCCL's tests do.

    Size S is what every rank ends up with in an all-gather, what it sends in an all-to-all, its own included, and what
    it brings to a reduce-scatter or an all-reduce.

    Returns:
      `collectives`: for each a list of size, milliseconds and bus bandwidth in GB/s, which is the bytes that a rank
      must send to others over the time; and `kernels`, the device's names for what ran.
    """
    case = Case.parse(f"{parallel_text}.ep/allgather/bf16/t1.d8.f8/e{math.prod(parallel_sizes(parallel_text))}.k1")
    if case.world > len(jax.devices()):
        raise ValueError(f"{parallel_text} has {case.world} ranks, and there are {len(jax.devices())} devices")
    bench, ranks = _Mesh(case), case.world
    axes, own = bench.parallel.mesh_axes, bench.own
    functions: dict[str, tuple[Callable[[jax.Array], jax.Array], Any, int, float]] = {
        "all_gather": (lambda v: jax.lax.all_gather(v, axes, tiled=True), jnp.bfloat16, 1, 1.0),
        "all_to_all": (lambda v: jax.lax.all_to_all(v, axes, 0, 0, tiled=True), jnp.bfloat16, ranks, 1.0),
        "reduce_scatter": (lambda v: jax.lax.psum_scatter(v, axes, tiled=True), jnp.float32, ranks, 1.0),
        "all_reduce": (lambda v: jax.lax.psum(v, axes), jnp.float32, ranks, 2.0),
    }
    kind = "gpu" if lab.on_gpu else "cpu"
    jobs = [(name, size) for name in functions for size in SIZES[kind]]

    def build(job: tuple[str, int]) -> tuple[jax_lab.Program, jax.Array]:
        function, dtype, rows, _ = functions[job[0]]
        sizes = (ranks * rows, max(1, job[1] // ranks // jnp.dtype(dtype).itemsize))
        like = jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(bench.mesh, own))
        program = lab.compile(jax.jit(bench.mapped(function, (own,), own)).trace(like))
        return program, bench.place(lambda: jnp.ones(sizes, dtype), own)

    with ThreadPoolExecutor(THREADS) as pool:
        built = list(pool.map(build, jobs))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in functions}
    kernels: dict[str, set[str]] = {name: set() for name in functions}
    for (name, size), (program, values) in zip(jobs, built, strict=True):
        factor = functions[name][3]
        timed = lab.time(program, [(values,)], repeat)
        busbw = factor * size * (ranks - 1) / ranks / timed.device_ms / 1e6
        found[name].append({"size": size, "ms": timed.device_ms, "busbw": busbw, "wall_ms": timed.wall_ms})
        kernels[name] |= set(timed.exchange.kernels if timed.exchange else ())
        clock = timed.clock
    return {
        "status": "ok",
        "ranks": ranks,
        "clock": clock,
        "collectives": found,
        "kernels": {name: sorted(names) for name, names in kernels.items()},
    }


def parallel_sizes(parallel_text: str) -> tuple[int, int]:
    """dp and tp of `dp4.tp2`."""
    dp, tp = parallel_text.split(".")[:2]
    return int(dp.removeprefix("dp")), int(tp.removeprefix("tp"))


def _error(lab: jax_lab.Lab, case: Case, shape: Shape, params: jm.MoEParams, x: jax.Array, result: jax.Array) -> float:
    """How far some rows of the layer's result are off."""
    arguments = (x, params.router.gate, params.experts.gate_up, params.experts.down)
    reader = _Reader(lab, params.experts.tp_blocks)
    return reference.error("layer", shape, reader, "stored", arguments, result, draws.Routing(shape))


class _Reader:
    """The lab's reading side for experts' weights that lie on several devices: each part is multiplied where it is."""

    def __init__(self, lab: jax_lab.Lab, blocks: int) -> None:
        self.lab, self.blocks = lab, blocks
        self.rows, self.finite = lab.rows, lab.finite

    def product(self, weights: jax.Array, expert: int, x: np.ndarray, layout: str) -> np.ndarray:
        parts: dict[tuple[int, int], np.ndarray] = {}
        for shard in weights.addressable_shards:
            first, row, column = (part.start or 0 for part in shard.index)
            if first <= expert < first + shard.data.shape[0] and (row, column) not in parts:
                inside = x[:, column : column + shard.data.shape[2]]
                parts[row, column] = self.lab.product(shard.data, expert - first, inside, layout)
        columns = {column for _, column in parts}
        if len(columns) > 1:  # each has a part of the depth
            return np.sum(list(parts.values()), axis=0)
        out = np.concatenate([parts[key] for key in sorted(parts)], axis=1)
        if out.shape[1] == weights.shape[1] and self.blocks > 1:  # gate and up of one rank after those of another
            return out.reshape(len(x), self.blocks, 2, -1).swapaxes(1, 2).reshape(len(x), -1)
        return out


class _Mesh:
    """The layer of a case on its mesh, and the programs of its stages."""

    def __init__(self, case: Case) -> None:
        moe, routing, parallel = layer_options(case)
        self.config = jm.MoEConfig(**moe, router=jm.RouterConfig(**routing))
        self.parallel = jm.ParallelConfig(**parallel)
        self.mesh: Mesh = jm.make_mesh(self.parallel, jax.devices()[: case.world])
        self.cuts = self.parallel.sp and not self.parallel.native
        self.mover: ModuleType = getattr(transport, str(self.parallel.transport))
        self.activation = jm.Activation(name="silu", gated=True, layout="concatenated")
        self.array_rows = case.tokens[0]
        # each rank's own, the tokens that a rank routes, and those that it is given
        self.own = PartitionSpec(self.parallel.mesh_axes)
        self.routing = PartitionSpec(layer.token_axes(self.parallel))
        self.given = PartitionSpec(self.parallel.token_axes)

    def mapped(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def place(self, make: Callable[[], Any], specs: Any) -> Any:
        """Arrays made on the devices, each of which makes its part."""
        return jax.jit(make, out_shardings=self._shardings(specs))()

    def _shardings(self, specs: Any) -> Any:
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec)
        )

    def _make(self, shape: Shape) -> jm.MoEParams:
        """The parameters by formula, rows of first projections in the order of the mesh."""
        D, F, E, S = shape.hidden, shape.intermediate, shape.experts, self.config.shared_width
        scale = draws.deviations(shape)

        def stacked(name: str, count: int, sizes: tuple[int, int], deviation: float, blocks: int = 1) -> jax.Array:
            seeds = jnp.array([draws.seed(name, part) for part in range(count)], jnp.uint32)
            return jax_lab.stacked(seeds, sizes, draws.factor(deviation), "stored", blocks)

        shared = None
        if S:
            blocks = self.parallel.shared_tp
            shared = jm.SharedParams(
                gate_up=stacked("shared_gate_up", 1, (2 * S, D), D**-0.5, blocks)[0],
                down=stacked("shared_down", 1, (D, S), S**-0.5)[0],
                tp_blocks=blocks,
            )
        blocks = self.parallel.expert_tp
        return jm.MoEParams(
            experts=jm.ExpertParams(
                gate_up=stacked("gate_up", E, (2 * F, D), scale["gate_up"], blocks),
                down=stacked("down", E, (D, F), scale["down"]),
                tp_blocks=blocks,
            ),
            router=jm.RouterParams(
                gate=jax_lab.normal(jnp.uint32(draws.seed("gate")), (E, D), draws.factor(scale["gate"]))
            ),
            shared=shared,
        )

    def params(self, shape: Shape) -> jm.MoEParams:
        return self.place(lambda: self._make(shape), jm.param_specs(self.config, self.parallel))

    def tokens(self, shape: Shape, sets: int) -> list[jax.Array]:
        sizes = (shape.tokens, shape.hidden)

        def make() -> list[jax.Array]:
            return [
                jax_lab.normal(jnp.uint32(draws.seed("x", part)), sizes, draws.factor(1.0)) for part in range(sets)
            ]  # fmt: skip

        return self.place(make, [self.given] * sets)

    def like(self, shape: Shape) -> tuple[jm.MoEParams, jax.ShapeDtypeStruct]:
        """Shapes, types and places of parameters and tokens."""
        params = jax.eval_shape(lambda: self._make(shape))
        x = jax.ShapeDtypeStruct((shape.tokens, shape.hidden), jnp.bfloat16)
        return self._placed(params, jm.param_specs(self.config, self.parallel)), self._placed(x, self.given)

    def _placed(self, tree: Any, specs: Any) -> Any:
        """Shapes with a place: a spec for each of them, or one for all."""
        if isinstance(specs, PartitionSpec):
            specs = jax.tree.map(lambda _: specs, tree)
        return jax.tree.map(
            lambda like, sharding: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding),
            tree,
            self._shardings(specs),
        )

    def traced(self, shape: Shape) -> dict[str, Any]:
        """The whole layer and its stages, traced for what the stages before them hand on."""
        params, x = self.like(shape)
        whole = jax.jit(self.whole).trace(params, x)
        route = jax.jit(self.routed).trace(params.router.gate, x)
        dispatch = jax.jit(self.dispatch).trace(*self._placed(route.out_info, self.routing))
        rows, handle = self._placed(dispatch.out_info, self.own)
        multiply = jax.jit(self.experts).trace(params.experts, rows, handle)
        combine = jax.jit(self.combine).trace(self._placed(multiply.out_info, self.own), handle)
        return {"whole": whole, "route": route, "dispatch": dispatch, "experts": multiply, "combine": combine}

    def whole(self, params: jm.MoEParams, x_TD: jax.Array) -> jax.Array:
        return jm.moe(params, x_TD, config=self.config, parallel=self.parallel, mesh=self.mesh)

    def routed(self, gate_ED: jax.Array, x_TD: jax.Array) -> tuple[jax.Array, ...]:
        """What dispatch takes: the tokens that each rank routes, their ids and weights."""

        def local(gate_ED: jax.Array, x_tD: jax.Array) -> tuple[jax.Array, ...]:
            x_cD = layer.scatter_sequence(x_tD, self.parallel.tp) if self.cuts else x_tD
            logits = router.compute_logits(x_cD, gate_ED)
            ids, weights = router.route(logits, None, router=self.config.router, top_k=self.config.top_k)
            real = jnp.ones(x_cD.shape[0], bool)
            if self.cuts:  # rows past the last token go nowhere
                real = jax.lax.axis_index("tp") * x_cD.shape[0] + jnp.arange(x_cD.shape[0]) < x_tD.shape[0]
            ids = jnp.where(real[:, None], ids, self.config.num_experts)
            return x_cD, ids, jnp.where(real[:, None], weights, 0.0)

        return self.mapped(local, (PartitionSpec(), self.given), self.routing)(gate_ED, x_TD)

    def dispatch(self, x: jax.Array, ids: jax.Array, weights: jax.Array) -> Any:
        local_experts = self.config.num_experts // self.parallel.ep

        def local(*arguments: jax.Array) -> Any:
            first: Any = 0
            if self.parallel.expert_parallel:
                first = (jax.lax.axis_index(self.parallel.mesh_axes) * local_experts).astype(jnp.int32)
            sent = self.mover.dispatch(
                *arguments,
                **layer.transport_options(self.parallel),
                first_expert=first,
                num_local_experts=local_experts,
            )
            return _stack(sent)

        return self.mapped(local, (self.routing,) * 3, self.own)(x, ids, weights)

    def experts(self, params: jm.ExpertParams, rows: jax.Array, handle: Any) -> Any:
        def local(params: jm.ExpertParams, rows: jax.Array, handle: Any) -> Any:
            rows, handle = _unstack((rows, handle))
            sizes = handle.plan.group_sizes_e
            h = experts.gate_up(rows, params, sizes, activation=self.activation)
            return _stack(experts.down(h, params, sizes))

        specs = (jm.param_specs(self.config, self.parallel).experts, self.own, self.own)
        return self.mapped(local, specs, self.own)(params, rows, handle)

    def combine(self, y: jax.Array, handle: Any) -> jax.Array:
        """From experts' rows to the layer's result, its sum and gather over tp included."""

        def local(y: jax.Array, handle: Any) -> jax.Array:
            y_cD = self.mover.combine(*_unstack((y, handle)))
            y_cD = layer.reduce_partial(y_cD, layer.routed_partial_over(self.parallel)).astype(jnp.bfloat16)
            return layer.gather_sequence(y_cD, self.array_rows) if self.cuts else y_cD

        return self.mapped(local, (self.own, self.own), self.given)(y, handle)

    def shared(self, params: jm.SharedParams, x_TD: jax.Array) -> jax.Array:
        """The shared expert of each rank, (N, c, D) float32: of its own tokens, or its part of those of all."""

        def local(params: jm.SharedParams, x_tD: jax.Array) -> jax.Array:
            x_cD = layer.scatter_sequence(x_tD, self.parallel.tp) if self.cuts else x_tD
            return _stack(layer.shared_expert(params, x_cD, self.activation))

        specs: Any = jm.param_specs(self.config, self.parallel)
        return self.mapped(local, (specs.shared, self.given), self.own)(params, x_TD)

    def complete(self, y_NcD: jax.Array) -> jax.Array:
        """What `shared` gave as the layer would add it, (T, D)."""

        def local(y: jax.Array) -> jax.Array:
            y_cD = layer.reduce_partial(_unstack(y), ("tp",) if self.parallel.shared_tp > 1 else ())
            return layer.gather_sequence(y_cD, self.array_rows) if self.cuts else y_cD

        return jax.jit(self.mapped(local, (self.own,), self.given))(y_NcD)


def _stack(tree: Any) -> Any:
    return jax.tree.map(lambda value: value[None], tree)


def _unstack(tree: Any) -> Any:
    return jax.tree.map(lambda value: value[0], tree)
