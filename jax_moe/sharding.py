"""Where parameters lie on the mesh, and how they get there and back.

Shape suffixes: E experts, D hidden size, W expert width, F expert intermediate size, M rows of the first projection
(2F gated, F not), S shared intermediate size, n tensor-parallel ranks.

Ranks are numbered dp_index * tp + tp_index. Under expert parallelism rank r has experts [r * E/ep, (r + 1) * E/ep).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_moe import params as parameters
from jax_moe._typing import Array
from jax_moe.config import MoEConfig, ParallelConfig, check
from jax_moe.params import MoEParams


def make_mesh(parallel: ParallelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh the layer runs on, axes `parallel.mesh_axes`.

    Args:
      parallel: sizes of the axes.
      devices: at least dp * tp devices, of which the first are used, in order; None: all there are.

    Raises:
      ValueError: too few devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < parallel.world:
        need = f"dp * tp = {parallel.dp} * {parallel.tp} = {parallel.world}"
        raise ValueError(f"make_mesh: {len(devices)} devices: expected at least {need}")
    grid = np.array(devices[: parallel.world]).reshape(tuple(parallel.axis_sizes.values()))
    return Mesh(grid, parallel.mesh_axes, axis_types=(AxisType.Auto,) * grid.ndim)


def param_specs(config: MoEConfig, parallel: ParallelConfig) -> MoEParams:
    """PartitionSpec of every parameter, as a pytree of the structure that `shard` returns.

    Raises:
      ValueError: sizes that do not divide (see `config.check`).
    """
    check(config, parallel)
    split = {}
    if parallel.expert_parallel:
        split = {name: PartitionSpec(parallel.mesh_axes) for name in ("gate_up", "down", "gate_up_bias", "down_bias")}
        split = {f"experts.{name}": spec for name, spec in split.items()}
    elif parallel.expert_tp > 1:
        split["experts.gate_up"] = PartitionSpec(None, "tp")
        split["experts.gate_up_bias"] = PartitionSpec(None, "tp")
        split["experts.down"] = PartitionSpec(None, None, "tp")
    if parallel.shared_tp > 1:
        split["shared.gate_up"] = PartitionSpec("tp")
        split["shared.down"] = PartitionSpec(None, "tp")
    names = parameters.shapes(config)
    specs = parameters.from_mapping({name: split.get(name, PartitionSpec()) for name in names})
    return _with_blocks(specs, parallel.expert_tp, parallel.shared_tp)


def shard(params: MoEParams, config: MoEConfig, parallel: ParallelConfig, mesh: Mesh) -> MoEParams:
    """Lays parameters out for a mesh: reorders rows where tensor parallelism asks for it, and places them.

    Args:
      params: the whole layer in checkpoint layout (tp_blocks = 1). NumPy arrays, or JAX arrays whose data this process
        can read, are placed slice by slice; with several processes each gives the same values. Arrays already spread
        over the processes are moved by a compiled program.
      config, parallel: the layer and its spread.
      mesh: from `make_mesh`.

    Returns:
      Parameters that `moe` takes for this config, parallel and mesh.

    Raises:
      ValueError: parameters that are not the config's, or are laid out already; a mesh of another size.
    """
    check_mesh(parallel, mesh)
    specs = param_specs(config, parallel)
    check_params(params, config, ParallelConfig())
    ordered = _reorder(params, config, parallel.expert_tp, parallel.shared_tp, undo=False)

    def place(array: Any, spec: PartitionSpec) -> Array:
        sharding = NamedSharding(mesh, spec)
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return jax.jit(lambda a: a, out_shardings=sharding)(array)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, ordered, specs)


def unshard(params: MoEParams, config: MoEConfig) -> MoEParams:
    """Undoes `shard`: the whole layer in checkpoint layout, as NumPy arrays in every process.

    Args:
      params: as `shard` returned them (or after training steps on them).
      config: the layer.
    """

    def whole(array: Any) -> np.ndarray:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            assert isinstance(array.sharding, NamedSharding), array.sharding
            everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
            array = jax.jit(lambda a: a, out_shardings=everywhere)(array).addressable_data(0)
        return np.asarray(array)

    expert_blocks = params.experts.tp_blocks
    shared_blocks = params.shared.tp_blocks if params.shared is not None else 1
    return _reorder(jax.tree.map(whole, params), config, expert_blocks, shared_blocks, undo=True)


def check_mesh(parallel: ParallelConfig, mesh: Mesh) -> None:
    """Raises ValueError unless the mesh has the axes of `parallel`, of its sizes."""
    sizes = dict(mesh.shape)
    if sizes != parallel.axis_sizes:
        raise ValueError(f"mesh has axes {sizes}: expected {parallel.axis_sizes}; see make_mesh")


def check_params(params: MoEParams, config: MoEConfig, parallel: ParallelConfig, *, local: bool = False) -> None:
    """Checks names, shapes, dtypes and row order of parameters.

    Args:
      params: for `moe` (global shapes) or `moe_local` (one rank's shapes).
      config, parallel: what they are for.
      local: shapes are those of one rank.

    Raises:
      ValueError: names the parameter, what it is and what was expected.
    """
    expected, given = parameters.shapes(config), parameters.to_mapping(params)
    if set(expected) != set(given):
        missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
        raise ValueError(f"params: missing {missing or 'none'}, not used by this config {extra or 'none'}")
    specs = parameters.to_mapping(param_specs(config, parallel))
    sizes = parallel.axis_sizes
    for name, (shape, dtype) in expected.items():
        if local:
            shape = _local_shape(shape, specs[name], sizes)
        if tuple(given[name].shape) != shape or given[name].dtype != dtype:
            actual = f"{tuple(given[name].shape)} {given[name].dtype}"
            raise ValueError(f"params {name}: {actual}: expected {shape} {dtype}{' on each rank' if local else ''}")
    for name, part, blocks in (
        ("experts", params.experts, parallel.expert_tp),
        ("shared", params.shared, parallel.shared_tp),
    ):
        if part is not None and part.tp_blocks != blocks:
            raise ValueError(f"params {name}: laid out for tp_blocks = {part.tp_blocks}: expected {blocks}; see shard")


def _local_shape(shape: tuple[int, ...], spec: PartitionSpec, sizes: dict[str, int]) -> tuple[int, ...]:
    local = list(shape)
    for axis, names in enumerate(spec):
        for name in (names,) if isinstance(names, str) else names or ():
            local[axis] //= sizes[name]
    return tuple(local)


def _with_blocks(params: MoEParams, expert_blocks: int, shared_blocks: int) -> MoEParams:
    experts = dataclasses.replace(params.experts, tp_blocks=expert_blocks)
    shared = params.shared and dataclasses.replace(params.shared, tp_blocks=shared_blocks)
    return dataclasses.replace(params, experts=experts, shared=shared)


def _reorder(params: MoEParams, config: MoEConfig, expert_blocks: int, shared_blocks: int, *, undo: bool) -> MoEParams:
    """Brings the rows of the first projections from checkpoint order into blocks, or back."""
    # Interleaved pairs, and rows without a gate, already split evenly into parts of their own.
    if config.gated and config.gate_up_layout == "concatenated":
        experts, shared = params.experts, params.shared
        bias = experts.gate_up_bias
        experts = dataclasses.replace(
            experts,
            gate_up=_swap_blocks(experts.gate_up, 1, expert_blocks, undo),
            gate_up_bias=bias if bias is None else _swap_blocks(bias, 1, expert_blocks, undo),
        )
        if shared is not None:
            shared = dataclasses.replace(shared, gate_up=_swap_blocks(shared.gate_up, 0, shared_blocks, undo))
        params = dataclasses.replace(params, experts=experts, shared=shared)
    return _with_blocks(params, 1, 1) if undo else _with_blocks(params, expert_blocks, shared_blocks)


def _swap_blocks(array: Any, axis: int, blocks: int, undo: bool) -> Any:
    """[gate; up] of 2F rows as 2 x n blocks of F/n rows becomes n x 2 of them, or back."""
    if blocks == 1:
        return array
    shape = array.shape
    grid = (blocks, 2) if undo else (2, blocks)
    array = array.reshape(*shape[:axis], *grid, shape[axis] // (2 * blocks), *shape[axis + 1 :])
    return array.swapaxes(axis, axis + 1).reshape(shape)
