"""What a framework has to offer to be compared: the interface behind entry point group `parity.backends`.

A backend is one class with two sides. The *command's side* runs in the process of the command `parity`, which imports
no framework: it says where the framework can run, which cases it refuses, and how many processes serve a case. The
*worker's side* (`setup`, `run`) runs in those processes, and only there is the framework imported.

To plug one in, subclass `Backend` in a package of your own, point an entry point at the class, and name it on the
command line:

    [project.entry-points."parity.backends"]
    mine = "my_package.my_backend:MyBackend"

    parity run --backend mine --backend torch
"""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from parity.arrays import ArrayRef
from parity.backends import gpu
from parity.case import Case
from parity.results import RankResult

PLATFORMS = ("cpu", "gpu")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks of every backend."""

    platform: str = "cpu"
    jax_processes: bool = False
    """JAX as one process a rank instead of one process for all."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A worker process's place among the processes that serve a case together."""

    index: int
    processes: int
    options: Options
    publish: Callable[[str], None]
    """Process 0 calls this once, with whatever the others need to find it (a port, say)."""
    receive: Callable[[], str]
    """The other processes call this to wait for what process 0 published."""


class Backend(ABC):
    """One framework. Construct it with the command's options; keep the constructor free of framework imports."""

    name: str
    """The name on the command line and in results."""
    platforms: tuple[str, ...] = ("cpu",)
    packages: tuple[str, ...] = ()
    """Importable modules the worker needs; a missing one is reported before anything is launched."""
    install: str = ""
    """The command that installs them, for that message."""
    collective_frames: tuple[str, ...] = ()
    """Parts of file names in a Python stack that mean: this rank waits for the others, so a hang is not its doing."""

    def __init__(self, options: Options) -> None:
        self.options = options

    # The command's side.
    def missing(self) -> str | None:
        """Why this backend cannot run here at all, and how to mend it; None if it can."""
        if self.options.platform not in self.platforms:
            return f"backend {self.name!r} runs on {', '.join(self.platforms)}, not on {self.options.platform!r}"
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                how = f"; install it with: {self.install}" if self.install else ""
                return f"backend {self.name!r} needs the package {package!r}, which is not installed{how}"
        return None

    def unsupported(self, case: Case) -> str | None:
        """Why this backend refuses the case, naming the missing capability; None if it takes it."""
        if self.options.platform == "gpu" and case.world > gpu.count():
            return f"{case.world} ranks need as many GPUs; this machine has {gpu.count()}"
        return None

    def processes(self, case: Case) -> int:
        """How many processes serve the case together: usually one a rank."""
        return case.world

    def environment(self, case: Case) -> dict[str, str]:
        """Environment variables of those processes. Cases with equal answers share living processes."""
        return {}

    # The worker's side.
    @abstractmethod
    def setup(self, member: Member) -> dict[str, str]:
        """Import the framework and meet the other processes.

        Returns:
          Versions, by package name.
        """

    @abstractmethod
    def run(
        self, case: Case, arrays: Mapping[str, ArrayRef], lessons: Mapping[str, ArrayRef] | None = None
    ) -> dict[int, RankResult]:
        """Run the layer twice on the same inputs, every process together; with lessons, once more, stage by stage.

        Args:
          case: the configuration.
          arrays: parameters in checkpoint layout, `x` (T, D) over real tokens in rank order, and `router_logits`
            (T, E) or `topk_ids` and `topk_weights` (T, K) where the case gives them.
          lessons: the oracle's result of each stage (`parity.stages`), to go on with in place of the layer's own in
            the third run, whose results go to `RankResult.taught`. A backend without stages leaves it be.

        Returns:
          The result of each rank this process holds, by rank.
        """


def cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
