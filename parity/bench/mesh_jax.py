"""The JAX layer over several devices: the whole, its stages as programs of their own, and plain collectives beside it.

Inside a stage's program all values are one rank's. Between two programs they lie stacked by rank, (ranks, ...), which
costs nothing: every rank keeps its own.

Shape suffixes: T tokens of all ranks, D hidden, E experts, F intermediate, N ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_moe as jm
from jax_moe import experts, layer, router, transport
from parity.backends.layout import layer_options
from parity.bench import draws, reference
from parity.bench.candidates import jax_lab
from parity.bench.shapes import Shape
from parity.case import Case

SETS = 2


def run(lab: jax_lab.Lab, shape: Shape, parallel_text: str, repeat: int) -> dict[str, object]:
    """Time one spread of one layer.

    Args:
      lab: of JAX's first device; the mesh takes as many as the spread has ranks.
      shape: its tokens are those of all DP ranks together, rounded up to a multiple of their number.
      parallel_text: parallel mode and transport of a case id, `dp4.tp1.ep/padded`.
      repeat: calls that the median is taken of.

    Returns:
      Milliseconds of the whole and of each stage, bytes that a rank sends in them, GB/s of each, and of plain
      collectives that send the same.

    Raises:
      ValueError: no such spread, or more ranks than devices.
    """
    dp = Case.parse(f"{parallel_text}/bf16/t1.d8.f8/e{shape.experts}.k{shape.top_k}").dp
    case = Case.parse(
        f"{parallel_text}/bf16/t{-(-shape.tokens // dp)}.d{shape.hidden}.f{shape.intermediate}"
        f"/e{shape.experts}.k{shape.top_k}/gate+renorm"
    )
    if case.world > len(jax.devices()):
        raise ValueError(f"{parallel_text} has {case.world} ranks, and there are {len(jax.devices())} devices")
    if case.world > 1 and not case.ep:
        raise ValueError(f"{parallel_text} moves no tokens between ranks: add '.ep' and a transport")
    bench = _Mesh(case)
    shape = replace(shape, tokens=case.total_tokens)
    params = bench.params(shape)
    sets = [(params, bench.tokens(shape, part)) for part in range(SETS)]
    whole = lab.measure(bench.whole, sets, repeat)
    gate_up, down = params.experts.gate_up, params.experts.down
    arguments = (sets[0][1], params.router.gate, gate_up, down)
    error = reference.error("layer", shape, lab, "stored", arguments, whole.result, draws.Routing(shape))
    out: dict[str, object] = {
        "status": "ok" if error <= reference.bound("layer") else "wrong",
        "error": error,
        "ranks": case.world,
        "tokens_per_rank": case.rows_per_rank,
        "clock": whole.clock,
        "whole_ms": whole.device_ms,
        "wall_ms": whole.wall_ms,
        "compile_s": whole.compile_s,
        "peak_bytes": whole.peak_bytes,
    }
    out |= _stages(lab, bench, params, [x for _, x in sets], repeat)
    if case.world > 1:
        cost = jm.estimate(bench.config, bench.parallel, case.rows_per_rank)
        for name, sent in (("dispatch", cost.dispatch_bytes), ("combine", cost.combine_bytes)):
            out |= {f"{name}_bytes": sent, f"{name}_gbps": sent / out[f"{name}_ms"] / 1e6}  # type: ignore[operator]
        out |= _collectives(lab, bench, cost.dispatch_bytes, repeat)
    return out


def _stages(lab: jax_lab.Lab, bench: _Mesh, params: jm.MoEParams, xs: list[jax.Array], repeat: int) -> dict:
    """Milliseconds of dispatch, experts and combine, each fed with what the one before it made."""
    routed = [jax.jit(bench.routed)(params.router.gate, x) for x in xs]
    dispatch = lab.measure(bench.dispatch, routed, repeat)
    sent = [jax.jit(bench.dispatch)(*each) for each in routed]
    multiply = lab.measure(bench.experts, [(params.experts, *each) for each in sent], repeat)
    made = [(jax.jit(bench.experts)(params.experts, *each), each[1]) for each in sent]
    combine = lab.measure(bench.combine, made, repeat)
    return {"dispatch_ms": dispatch.device_ms, "experts_ms": multiply.device_ms, "combine_ms": combine.device_ms}


def _collectives(lab: jax_lab.Lab, bench: _Mesh, sent: float, repeat: int) -> dict[str, float]:
    """GB/s of an all-to-all and of an all-gather in which every rank sends the bytes that dispatch sends.

    Counted as for the stages: what a rank sends to others, over the time. Of 4 ranks that send 3 MB each, all-to-all
    has 1 MB for each pair, and all-gather 1 MB from each rank, which goes to three.
    """
    axes, ranks = bench.parallel.mesh_axes, bench.mesh.size
    each = max(1, math.ceil(sent / (ranks - 1) / 2))
    own = PartitionSpec(axes)

    def all_to_all(values: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(values, axes, 0, 0, tiled=True)

    def all_gather(values: jax.Array) -> jax.Array:
        return jax.lax.all_gather(values, axes, tiled=True)

    out = {}
    for name, function, rows in (("all_to_all", all_to_all, ranks), ("all_gather", all_gather, 1)):
        values = bench.place(lambda rows=rows: jnp.ones((ranks * rows, each), jnp.bfloat16), own)
        timed = lab.measure(bench.mapped(function, (own,), own), [(values,)], repeat)
        out |= {f"{name}_ms": timed.device_ms, f"{name}_gbps": 2 * each * (ranks - 1) / timed.device_ms / 1e6}
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
        # each rank's own, and the tokens that a rank routes
        self.own = PartitionSpec(self.parallel.mesh_axes)
        self.routing = PartitionSpec(layer.token_axes(self.parallel))

    def mapped(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def place(self, make: Callable[[], jax.Array], spec: PartitionSpec) -> jax.Array:
        """An array made on the devices, each of which makes its part."""
        return jax.jit(make, out_shardings=NamedSharding(self.mesh, spec))()

    def params(self, shape: Shape) -> jm.MoEParams:
        scale = draws.deviations(shape)
        specs: Any = jm.param_specs(self.config, self.parallel)
        D, F, E = shape.hidden, shape.intermediate, shape.experts

        def stacked(name: str, sizes: tuple[int, int], spec: PartitionSpec) -> jax.Array:
            seeds = jnp.array([draws.seed(name, expert) for expert in range(E)], jnp.uint32)
            return self.place(lambda: jax_lab.stacked(seeds, sizes, draws.factor(scale[name]), "stored"), spec)

        gate = self.place(
            lambda: jax_lab.normal(jnp.uint32(draws.seed("gate")), (E, D), draws.factor(scale["gate"])),
            specs.router.gate,
        )
        return jm.MoEParams(
            experts=jm.ExpertParams(
                gate_up=stacked("gate_up", (2 * F, D), specs.experts.gate_up),
                down=stacked("down", (D, F), specs.experts.down),
            ),
            router=jm.RouterParams(gate=gate),
        )

    def tokens(self, shape: Shape, part: int) -> jax.Array:
        seed, sizes = jnp.uint32(draws.seed("x", part)), (shape.tokens, shape.hidden)
        spec = PartitionSpec(self.parallel.token_axes)
        return self.place(lambda: jax_lab.normal(seed, sizes, draws.factor(1.0)), spec)

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

        specs = (PartitionSpec(), PartitionSpec(self.parallel.token_axes))
        return self.mapped(local, specs, self.routing)(gate_ED, x_TD)

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
        activation = jm.Activation(name="silu", gated=True, layout="concatenated")

        def local(params: jm.ExpertParams, rows: jax.Array, handle: Any) -> Any:
            rows, handle = _unstack((rows, handle))
            sizes = handle.plan.group_sizes_e
            h = experts.gate_up(rows, params, sizes, activation=activation)
            return _stack(experts.down(h, params, sizes))

        specs = (jm.param_specs(self.config, self.parallel).experts, self.own, self.own)
        return self.mapped(local, specs, self.own)(params, rows, handle)

    def combine(self, y: jax.Array, handle: Any) -> jax.Array:
        def local(y: jax.Array, handle: Any) -> Any:
            return _stack(self.mover.combine(*_unstack((y, handle))))

        return self.mapped(local, (self.own, self.own), self.own)(y, handle)


def _stack(tree: Any) -> Any:
    return jax.tree.map(lambda value: value[None], tree)


def _unstack(tree: Any) -> Any:
    return jax.tree.map(lambda value: value[0], tree)
