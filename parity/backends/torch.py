"""torch_moe as a backend: one process a rank, gloo on CPU and NCCL on GPUs, met through a TCPStore."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.arrays import ArrayRef
from parity.backends import gpu, nccl
from parity.backends.base import Backend, Member, cores
from parity.backends.layout import (
    STAGE_FIELDS,
    TAUGHT_FIELDS,
    TRACE_FIELDS,
    block_of_rank,
    decisions,
    layer_options,
    parameters,
    token_blocks,
)
from parity.case import Case
from parity.results import RankResult

if TYPE_CHECKING:
    import torch


class TorchBackend(Backend):
    """The PyTorch layer."""

    name = "torch"
    platforms = ("cpu", "gpu")
    packages = ("torch", "torch_moe")
    install = "pip install 'moe-parity[torch]'"
    blame_layer = True
    collective_frames = ("torch/distributed",)

    def environment(self, case: Case) -> dict[str, str]:
        out = {"OMP_NUM_THREADS": str(max(1, cores() // case.world))}
        if sys.platform in ("linux", "darwin") and self.options.launched is None:
            out["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
        if self.options.platform == "gpu":
            out |= gpu.socket_interface(self.options.launched)
            if self.options.nccl_library:
                out |= nccl.environment(Path(self.options.nccl_library))
        return out

    def setup(self, member: Member) -> dict[str, str]:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self.rank, self.gpu = member.index, member.options.platform == "gpu"
        self.device = torch.device("cpu")
        if self.gpu:
            self.device = torch.device("cuda", member.device_index)
            if torch.cuda.device_count() <= self.device.index:
                raise RuntimeError(f"torch sees {torch.cuda.device_count()} GPUs; rank {member.index} needs another")
            torch.cuda.set_device(self.device)
            torch.cuda.set_per_process_memory_fraction(gpu.memory_fraction(member.options.ranks_per_gpu), self.device)
        # Process 0 binds a port of the system's choice and the others are told: no port is guessed free and then lost.
        if member.index == 0:
            store = dist.TCPStore(member.address, 0, is_master=True, wait_for_workers=False)
            member.publish(str(store.port))
        else:
            store = dist.TCPStore(member.address, int(member.receive()), is_master=False)
        dist.init_process_group(
            "nccl" if self.gpu else "gloo", store=store, rank=member.index, world_size=member.processes
        )
        import torch_moe

        self.house, self.meshes = torch_moe, {}
        versions = {"torch": torch.__version__, "numpy": np.__version__, "python": sys.version.split()[0]}
        if self.gpu:
            versions |= {"cuda": str(torch.version.cuda), "nccl": self._nccl(torch)}
        return versions

    def _nccl(self, torch: Any) -> str:
        """Version of the NCCL that is loaded; PyTorch itself tells the one it was built with."""
        if self.options.nccl_library:
            return nccl.words(nccl.version_of(self.options.nccl_library)[0])
        return ".".join(map(str, torch.cuda.nccl.version()))

    def release(self) -> bool:
        import torch

        if self.gpu:
            torch.cuda.empty_cache()
        return False

    def run(
        self, case: Case, arrays: Mapping[str, ArrayRef], lessons: Mapping[str, ArrayRef] | None = None
    ) -> dict[int, RankResult]:
        import torch

        device = self.device
        layer = self._layer(case, arrays, device)
        blocks = token_blocks(case, arrays)
        block = block_of_rank(case, self.rank)
        inputs = {
            name: _tensor(values[block], blocks.dtypes[name]).to(device) for name, values in blocks.blocks.items()
        }
        x = inputs.pop("x")
        with torch.inference_mode():
            y, trace = layer(x, **inputs, counts=blocks.counts, trace=True)
            equal = True
            for _ in range(self.options.repeat - 1):
                again = layer(x, **inputs, counts=blocks.counts)
                equal &= torch.equal(y.view(torch.uint8), again.view(torch.uint8))
        stages, taught = {}, {}
        if lessons is not None:
            stages = _stages(trace)
            taught = self._taught(layer, x, inputs, blocks.counts, lessons)
        traced = {name: value.cpu().numpy() for name in TRACE_FIELDS if (value := getattr(trace, name)) is not None}
        result = RankResult(
            y=_array(y),
            y_dtype=str(y.dtype).removeprefix("torch."),
            decisions=decisions(traced, int(trace.dropped)),
            repeat_equal=equal,
            stages=stages,
            taught=taught,
        )
        return {self.rank: result}

    def _taught(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        inputs: Mapping[str, torch.Tensor],
        counts: tuple[int, ...] | None,
        lessons: Mapping[str, ArrayRef],
    ) -> dict[str, np.ndarray]:
        """What each stage makes of the lessons of those before it."""
        import torch

        # Only rows of tokens that reach this rank are read, so lessons stay on disk until the layer picks them.
        given = {name: _tensor(ref.open(), ref.dtype).to(x.device) for name, ref in lessons.items()}
        with torch.inference_mode():
            y, trace = layer(x, **inputs, counts=counts, trace=True, lessons=self.house.Lessons(on=True, **given))
        decided = ((ours, getattr(trace, theirs)) for theirs, ours in TAUGHT_FIELDS.items())
        return {
            "y": _array(y),
            **{name: value.cpu().numpy() for name, value in decided if value is not None},
            **_stages(trace),
        }

    def _layer(self, case: Case, arrays: Mapping[str, ArrayRef], device: torch.device) -> torch.nn.Module:
        moe, router, parallel = layer_options(case)
        house = self.house
        config = house.MoEConfig(**moe, router=house.RouterConfig(**router))
        parallel = house.ParallelConfig(**parallel)
        layer = house.MoE(config, parallel, self._mesh(parallel, device), device=device)
        layer.load_params(LazyTensors(parameters(arrays)))
        return layer

    def _mesh(self, parallel: Any, device: torch.device) -> Any:
        """One mesh a shape for the life of the process: its groups hold sockets."""
        if parallel.world == 1:
            return None
        shape = (parallel.dp, parallel.tp, parallel.nodes)
        if shape not in self.meshes:
            self.meshes[shape] = self.house.make_mesh(parallel, device.type)
        return self.meshes[shape]


class LazyTensors(Mapping[str, "torch.Tensor"]):
    """Parameters by name, mapped from disk when asked for: a rank touches only the slice it copies."""

    def __init__(self, refs: Mapping[str, ArrayRef]) -> None:
        self._refs = refs

    def __getitem__(self, name: str) -> torch.Tensor:
        ref = self._refs[name]
        return _tensor(ref.open(), ref.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)


def _stages(trace: Any) -> dict[str, np.ndarray]:
    """What a trace has of each stage, float32."""
    results = ((name, getattr(trace.stages, name)) for name in STAGE_FIELDS)
    return {name: _array(value) for name, value in results if value is not None}


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def _tensor(values: np.ndarray, dtype: str) -> torch.Tensor:
    """A tensor over NumPy memory; bfloat16 from its bits."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")  # parameters are read, never written
        if dtype == "bfloat16":
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(values)
