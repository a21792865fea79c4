"""This rank's place in a (dp, tp) mesh, and the groups it talks to."""

import dataclasses

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torch_moe.config import ParallelConfig

MESH_AXES = ("dp", "tp")
"""Names of the mesh's axes, both always there; rank = dp_index * tp + tp_index."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """This rank's indices, and the groups it talks to; a group of one rank is None.

    Attributes:
        dp_index: this rank's index along dp.
        tp_index: this rank's index along tp.
        dp: the ranks with this tp index.
        tp: the ranks with this dp index.
        world: all ranks of the mesh, dp-major.
    """

    dp_index: int
    tp_index: int
    dp: ProcessGroup | None
    tp: ProcessGroup | None
    world: ProcessGroup | None

    def over(self, axis: str) -> ProcessGroup | None:
        """The group along one mesh axis."""
        return {"dp": self.dp, "tp": self.tp}[axis]


def make_mesh(parallel: ParallelConfig, device_type: str = "cpu") -> DeviceMesh | None:
    """A (dp, tp) mesh over all ranks of the default process group, or None for one rank without one.

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
    return init_device_mesh(device_type, (parallel.dp, parallel.tp), mesh_dim_names=MESH_AXES)


def find_ranks(parallel: ParallelConfig, mesh: DeviceMesh | None) -> Ranks:
    """This rank's place.

    Raises:
        ValueError: no mesh for several ranks, or one of another shape, with other axes, or not in ascending order.
    """
    allowed = f"({parallel.dp}, {parallel.tp}) with axes {MESH_AXES}"
    if mesh is None:
        if parallel.world > 1:
            raise ValueError(f"device_mesh=None: allowed is a mesh of {allowed}")
        return Ranks(dp_index=0, tp_index=0, dp=None, tp=None, world=None)
    shape, names = tuple(mesh.shape), mesh.mesh_dim_names
    if shape != (parallel.dp, parallel.tp) or names != MESH_AXES:
        raise ValueError(f"device_mesh of shape {shape} with axes {names}: allowed is {allowed}")
    dp = mesh.get_group("dp") if parallel.dp > 1 else None
    tp = mesh.get_group("tp") if parallel.tp > 1 else None
    world = dp or tp
    if dp is not None and tp is not None:
        # Made once per mesh: a second layer on the same mesh finds the same group.
        world = mesh._flatten("dp_tp").get_group()
    # A group orders its ranks by number, so only then is a place in the group dp_index * tp + tp_index.
    if world is not None and dist.get_process_group_ranks(world) != mesh.mesh.flatten().tolist():
        raise ValueError(f"device_mesh over ranks {mesh.mesh.tolist()}: allowed are ranks in ascending order")
    return Ranks(dp_index=mesh.get_local_rank("dp"), tp_index=mesh.get_local_rank("tp"), dp=dp, tp=tp, world=world)
