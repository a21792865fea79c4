"""jax_moe as a backend: one process for all devices of this host, or one process a rank."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.arrays import ArrayRef
from parity.backends import gpu, nccl
from parity.backends.base import Backend, Member
from parity.backends.layout import (
    STAGE_FIELDS,
    TAUGHT_FIELDS,
    TRACE_FIELDS,
    decisions,
    layer_options,
    parameters,
    token_blocks,
)
from parity.case import Case
from parity.results import RankResult

if TYPE_CHECKING:
    import jax

LEAST_DEVICES = 8
"""CPU devices of the single process: enough for most worlds, so that one process serves them all."""
STUCK_SECONDS = 600
"""XLA ends a process whose devices wait longer than 40 s for each other; a busy machine may be that slow."""

GPU_FLAGS = "--xla_gpu_autotune_level=0"
"""Timing alternatives costs more than such programs run, on a GPU that several processes keep busy."""


class JaxBackend(Backend):
    """The JAX layer."""

    name = "jax"
    platforms = ("cpu", "gpu")
    packages = ("jax", "jax_moe")
    install = "pip install moe-parity"
    blame_layer = True
    collective_frames = ("jax/_src/distributed.py",)

    def unsupported(self, case: Case) -> str | None:
        reason = super().unsupported(case)
        if reason is None and case.transport == "one_sided" and case.world > 1:
            if self.options.platform != "gpu":
                return "its transport 'one_sided' stores into the memory of GPUs; they are there with --platform gpu"
            if self.processes(case) > 1:
                return "its transport 'one_sided' takes one process over all GPUs"
            return _no_one_sided()
        return reason

    def processes(self, case: Case) -> int:
        # a process drives each of its GPUs as one rank, so ranks that share one are a process each
        return case.world if self.options.jax_processes or self.options.ranks_per_gpu > 1 else 1

    def environment(self, case: Case) -> dict[str, str]:
        if self.options.platform == "gpu":
            return self._gpu_environment()
        devices = 1 if self.options.jax_processes else max(LEAST_DEVICES, case.world)
        flags = [
            os.environ.get("XLA_FLAGS", ""),
            f"--xla_force_host_platform_device_count={devices}",
            f"--xla_cpu_collective_call_terminate_timeout_seconds={STUCK_SECONDS}",
            # programs of small cases are compiled more cheaply in one piece
            "--xla_cpu_parallel_codegen_split_count=1",
        ]
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags).strip(), "JAX_ENABLE_X64": "0"}

    def _gpu_environment(self) -> dict[str, str]:
        out = {
            "JAX_PLATFORMS": "cuda",
            # other ranks, and the other framework's, use the same memory: grow as needed, and not past a fair share
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": str(gpu.memory_fraction(self.options.ranks_per_gpu)),
            # ours first: of a flag given twice XLA takes the last
            "XLA_FLAGS": f"{GPU_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip(),
            **gpu.socket_interface(self.options.launched),
        }
        if self.options.nccl_library:
            out |= nccl.environment(Path(self.options.nccl_library))
        return out

    def setup(self, member: Member) -> dict[str, str]:
        import jax
        import jaxlib

        self.gpu = member.options.platform == "gpu"
        if member.processes > 1:
            if not self.gpu:
                jax.config.update("jax_cpu_collectives_implementation", "gloo")
            if member.index == 0:
                address = _free_address(member.address)
                member.publish(address)
            else:
                address = member.receive()
            jax.distributed.initialize(
                address,
                num_processes=member.processes,
                process_id=member.index,
                cluster_detection_method="deactivate",
                coordinator_bind_address=address,  # this one only; the default binds every interface
                local_device_ids=[member.device_index] if self.gpu else None,
            )
        jax.devices()
        import jax_moe

        self.house = jax_moe
        versions = {
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "numpy": np.__version__,
            "python": sys.version.split()[0],
        }
        return versions | ({"gpu": jax.devices()[0].device_kind} if self.gpu else {})

    def release(self) -> bool:
        """JAX keeps what it has taken from a GPU: past half of its share the process had better end."""
        if not self.gpu:
            return False
        import jax

        held = [(stats.get("pool_bytes", 0), stats.get("bytes_limit", 0)) for stats in self._memory(jax)]
        return any(2 * pool > limit > 0 for pool, limit in held)

    @staticmethod
    def _memory(jax: Any) -> list[dict]:
        return [device.memory_stats() or {} for device in jax.local_devices()]

    def run(
        self, case: Case, arrays: Mapping[str, ArrayRef], lessons: Mapping[str, ArrayRef] | None = None
    ) -> dict[int, RankResult]:
        import jax

        house = self.house
        moe, router, parallel = layer_options(case)
        config = house.MoEConfig(**moe, router=house.RouterConfig(**router))
        parallel = house.ParallelConfig(**parallel)
        mesh = house.make_mesh(parallel, jax.devices()[: case.world])
        try:
            return self._run(case, arrays, lessons, config, parallel, mesh)
        finally:
            # compiled programs pile up over hundreds of cases, and one compiled around a planted bug must not live on
            jax.clear_caches()

    def _run(
        self,
        case: Case,
        arrays: Mapping[str, ArrayRef],
        lessons: Mapping[str, ArrayRef] | None,
        config: Any,
        parallel: Any,
        mesh: jax.sharding.Mesh,
    ) -> dict[int, RankResult]:
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        house = self.house
        params = house.shard(_params(house, parameters(arrays)), config, parallel, mesh)
        blocks = token_blocks(case, arrays)
        split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(parallel.token_axes), PartitionSpec()))

        def place(values: np.ndarray, sharding: NamedSharding = split) -> jax.Array:
            return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

        inputs = {
            name: place(_native(values.reshape(-1, *values.shape[2:]), blocks.dtypes[name]))
            for name, values in blocks.blocks.items()
        }
        if blocks.counts is not None:
            inputs["counts"] = place(np.array(blocks.counts, np.int32))
        x = inputs.pop("x")
        given = {name: place(_native(ref.open(), ref.dtype), whole) for name, ref in (lessons or {}).items()}

        @jax.jit
        def step(params: Any, x: jax.Array, inputs: dict, given: dict, on: jax.Array | None) -> Any:
            taught = None if on is None else house.Lessons(on=on, **given)
            y, trace = house.moe(
                params, x, config=config, parallel=parallel, mesh=mesh, trace=True, lessons=taught, **inputs
            )
            # what nobody asks for is not computed
            return y, trace if taught is not None else dataclasses.replace(trace, stages=None)

        # one program runs free and taught
        off, on = (None, None) if lessons is None else (place(np.array(taught), whole) for taught in (False, True))
        y, trace = jax.block_until_ready(step(params, x, inputs, given, off))
        first, y_dtype = _by_rank(y, mesh), str(y.dtype)
        traced = _fields(trace, {name: name for name in TRACE_FIELDS}, mesh)
        dropped = _by_rank(trace.dropped, mesh)
        stages = _fields(trace.stages, {name: name for name in STAGE_FIELDS}, mesh)
        del y, trace
        equal = dict.fromkeys(first, True)
        for _ in range(self.options.repeat - 1):
            for rank, values in _by_rank(jax.block_until_ready(step(params, x, inputs, given, off))[0], mesh).items():
                equal[rank] &= values.tobytes() == first[rank].tobytes()
        taught: dict[int, dict[str, np.ndarray]] = {}
        if on is not None:
            y, trace = jax.block_until_ready(step(params, x, inputs, given, on))
            decided = _fields(trace, TAUGHT_FIELDS, mesh)
            results = _fields(trace.stages, {name: name for name in STAGE_FIELDS}, mesh)
            for rank, values in _by_rank(y, mesh).items():
                taught[rank] = {"y": values.astype(np.float32), **decided[rank], **results[rank]}
        return {
            rank: RankResult(
                y=values.astype(np.float32),
                y_dtype=y_dtype,
                decisions=decisions(traced[rank], int(dropped[rank][0])),
                repeat_equal=equal[rank],
                stages=stages.get(rank, {}),
                taught=taught.get(rank, {}),
            )
            for rank, values in first.items()
        }


def _no_one_sided() -> str | None:
    """Why `jax_moe` has no kernel for `one_sided` on the cards or with the JAX of this machine; None: it has."""
    older = [card.capability for card in gpu.cards() if card.capability not in ("", "9.0")]
    if older:
        return f"its transport 'one_sided' needs Hopper GPUs, of compute capability 9.0; here is {older[0]}"
    version = importlib.metadata.version("jax")
    if tuple(map(int, version.split(".")[:2])) < (0, 11):
        return f"its transport 'one_sided' needs JAX 0.11 or newer; here is {version}"
    return None


def _fields(owner: Any, names: Mapping[str, str], mesh: jax.sharding.Mesh) -> dict[int, dict[str, np.ndarray]]:
    """Fields of a trace that are there, by rank and by the name they get; float32 where they are no integers."""
    out: dict[int, dict[str, np.ndarray]] = {}
    for theirs, ours in names.items():
        if (value := getattr(owner, theirs, None)) is None:
            continue
        for rank, part in _by_rank(value, mesh).items():
            kept = part if np.issubdtype(part.dtype, np.integer) else part.astype(np.float32)
            out.setdefault(rank, {})[ours] = kept
    return out


def _by_rank(array: jax.Array, mesh: jax.sharding.Mesh) -> dict[int, np.ndarray]:
    """What lies on each rank's own device, by rank: copies that should be equal are not assumed to be."""
    ranks = {device: rank for rank, device in enumerate(mesh.devices.flat)}
    return {ranks[shard.device]: np.asarray(shard.data) for shard in array.addressable_shards}


def _params(house: Any, refs: Mapping[str, ArrayRef]) -> Any:
    """The house's parameters over arrays mapped from disk."""
    values = {name: _native(ref.open(), ref.dtype) for name, ref in refs.items()}

    def group(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}

    shared, latent = group("shared."), group("latent.")
    return house.MoEParams(
        experts=house.ExpertParams(**group("experts.")),
        router=house.RouterParams(**group("router.")),
        shared=house.SharedParams(**shared) if shared else None,
        latent=house.LatentParams(**latent) if latent else None,
    )


def _native(values: np.ndarray, dtype: str) -> np.ndarray:
    """The array in a dtype JAX understands; bfloat16 from its bits."""
    if dtype != "bfloat16":
        return values
    import ml_dtypes

    return values.view(ml_dtypes.bfloat16)


def _free_address(host: str) -> str:
    """A port that was free a moment ago; if another process takes it, the pool is started once more."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return f"[{host}]:{probe.getsockname()[1]}" if ":" in host else f"{host}:{probe.getsockname()[1]}"
