"""This rank's place in the mesh, and the groups it talks to."""

import dataclasses
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torch_moe.config import ParallelConfig


def mesh_axes(parallel: ParallelConfig) -> dict[str, int]:
    """The mesh's axes and their sizes, all always there; ranks count through the last one first.

    With nodes the pair ("node", "local") takes the place of "dp".
    """
    if parallel.nodes == 1:
        return {"dp": parallel.dp, "tp": parallel.tp}
    return {"node": parallel.nodes, "local": parallel.dp // parallel.nodes, "tp": parallel.tp}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """One level of ranks that tokens are exchanged along.

    Attributes:
        group: the ranks, or None for this one alone.
        ranks: how many.
        index: this rank's place among them.
    """

    group: ProcessGroup | None
    ranks: int
    index: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """This rank's indices, and the groups it talks to; a group of one rank is None.

    Attributes:
        dp_index: this rank's index along dp.
        tp_index: this rank's index along tp.
        dp: the ranks with this tp index.
        tp: the ranks with this dp index.
        world: all ranks of the mesh, dp-major.
        levels: from the outermost: all ranks; or with nodes, those with this rank's place on each node and then those
            of this node.
    """

    dp_index: int
    tp_index: int
    dp: ProcessGroup | None
    tp: ProcessGroup | None
    world: ProcessGroup | None
    levels: tuple[Axis, ...]

    def over(self, axis: str) -> ProcessGroup | None:
        """The group along one mesh axis."""
        return {"dp": self.dp, "tp": self.tp}[axis]


def make_mesh(parallel: ParallelConfig, device_type: str = "cpu") -> DeviceMesh | None:
    """A mesh over all ranks of the default process group, or None for one rank without one.

    Its axes are ("dp", "tp"), or with nodes ("node", "local", "tp").

    Args:
        parallel: the sizes.
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: the process group has another number of ranks.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else None
    if ranks is None and parallel.world == 1:
        return None
    if ranks != parallel.world:
        found = "no process group" if ranks is None else f"a process group of {ranks}"
        raise ValueError(f"dp={parallel.dp}, tp={parallel.tp}: allowed is dp * tp ranks, not {found}")
    axes = mesh_axes(parallel)
    return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def _joined(mesh: DeviceMesh, axes: Sequence[str]) -> ProcessGroup | None:
    """The group over several axes. Made once per mesh: a second layer on the same mesh finds the same group."""
    names = tuple(name for name in axes if mesh[name].size() > 1)
    if len(names) < 2:
        return mesh.get_group(names[0]) if names else None
    part = mesh if names == mesh.mesh_dim_names else mesh[names]
    return part._flatten("_".join(names)).get_group()


def find_ranks(parallel: ParallelConfig, mesh: DeviceMesh | None) -> Ranks:
    """This rank's place.

    Raises:
        ValueError: no mesh for several ranks, or one of another shape, with other axes, or not in ascending order.
    """
    axes = mesh_axes(parallel)
    allowed = f"{tuple(axes.values())} with axes {tuple(axes)}"
    if mesh is None:
        if parallel.world > 1:
            raise ValueError(f"device_mesh=None: allowed is a mesh of {allowed}")
        alone = (Axis(group=None, ranks=1, index=0),)
        return Ranks(dp_index=0, tp_index=0, dp=None, tp=None, world=None, levels=alone)
    shape, names = tuple(mesh.shape), tuple(axes)
    if shape != tuple(axes.values()) or mesh.mesh_dim_names != names:
        raise ValueError(f"device_mesh of shape {shape} with axes {mesh.mesh_dim_names}: allowed is {allowed}")
    world = _joined(mesh, names)
    # A group orders its ranks by number, so only then is a place in the group dp_index * tp + tp_index.
    if world is not None and dist.get_process_group_ranks(world) != mesh.mesh.flatten().tolist():
        raise ValueError(f"device_mesh over ranks {mesh.mesh.tolist()}: allowed are ranks in ascending order")
    dp_index, tp_index = 0, mesh.get_local_rank("tp")
    for name in names[:-1]:
        dp_index = dp_index * axes[name] + mesh.get_local_rank(name)
    levels = []
    per_node = parallel.world // parallel.nodes
    node, place = divmod(dp_index * parallel.tp + tp_index, per_node)
    if parallel.nodes > 1:
        levels.append(Axis(group=_joined(mesh, ("node",)), ranks=parallel.nodes, index=node))
    inside = names if parallel.nodes == 1 else names[1:]
    levels.append(Axis(group=_joined(mesh, inside), ranks=per_node, index=place))
    return Ranks(
        dp_index=dp_index,
        tp_index=tp_index,
        dp=_joined(mesh, names[:-1]),
        tp=_joined(mesh, names[-1:]),
        world=world,
        levels=tuple(levels),
    )
