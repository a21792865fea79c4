"""What a framework has to offer to be compared: the interface behind entry point group `parity.backends`.

A backend is one class with two sides. The *command's side* runs in the process of the command `parity`, which imports
no framework: it says where the framework can run, which cases it refuses, and how many processes serve a case. The
*worker's side* (`setup`, `run`) runs in those processes, and only there is the framework imported.

To plug one in, subclass `Backend` in a package of your own, point an entry point at the class, and name it on the
command line:

    [project.entry-points."parity.backends"]
    mine = "my_package.my_backend:MyBackend"

    parity run --frameworks torch,mine

docs/extending.md has a whole one in forty lines.
"""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from parity.arrays import ArrayRef
from parity.backends import gpu
from parity.case import FORMATS, MODES, TRANSPORTS, Case
from parity.results import RankResult

PLATFORMS = ("cpu", "gpu")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks of every backend."""

    platform: str = "cpu"
    jax_processes: bool = False
    """JAX as one process a rank instead of one process for all."""
    repeat: int = 2
    """How often the layer runs on the same inputs, to be held to giving the same bits."""
    ranks_per_gpu: int = 1
    """How many ranks share a GPU; more than one are a process each in every framework, and need `nccl_library`."""
    nccl_library: str | None = None
    """Path of the NCCL that is loaded in place of the frameworks' own (`parity.backends.nccl`)."""
    launched: int | None = None
    """How many ranks a cluster's launcher has started, perhaps on several hosts (`parity worker`); None: the ranks are
    this command's own processes."""


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
    address: str = "127.0.0.1"
    """An address of process 0's host at which the others reach it."""
    local_index: int | None = None
    """Which of its host's processes this one is; None: all are on one host."""

    @property
    def device_index(self) -> int:
        """The GPU of its host that this process works on."""
        index = self.index if self.local_index is None else self.local_index
        return gpu.of_rank(index, self.options.ranks_per_gpu)


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Which cases a backend can express. The default is all of them."""

    formats: tuple[str, ...] = FORMATS
    modes: tuple[str, ...] = MODES
    transports: tuple[str, ...] = TRANSPORTS
    options: frozenset[str] | None = None
    """Flags of a case id that it knows, by their names without numbers (`Case.options`); None: all."""
    needs: frozenset[str] = frozenset()
    """Flags whose part of the layer it always has, so that a case without them is not its."""

    def missing(self, case: Case) -> str | None:
        """The first thing a case asks for that is not here, in words; None if there is none."""
        for what, value, known in (
            ("format", case.format, self.formats),
            ("parallel mode", case.mode, self.modes),
            ("transport", case.transport, self.transports),
        ):
            if value not in known:
                return f"it has no {what} {value!r}; it has {', '.join(known)}"
        unknown = sorted(case.options - self.options) if self.options is not None else []
        if unknown:
            return f"it has no {' and no '.join(map(repr, unknown))}"
        absent = sorted(self.needs - case.options)
        return f"it always has {' and '.join(map(repr, absent))}, and the case does not" if absent else None


class Backend(ABC):
    """One framework. Construct it with the command's options; keep the constructor free of framework imports."""

    name: str
    """The name on the command line and in results: that of the entry point."""
    capabilities = Capabilities()
    """What it can express. What no table can say is for `unsupported` to add."""
    blame_layer: bool = False
    """Whose fault an output with too few rows or with NaN is: the layer's, so that the case fails at gate `sane`, or
    (as long as nobody has shown that this class hands on faithfully what the layer returned) the backend's own, so
    that the case is an error."""
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
        if reason := self.capabilities.missing(case):
            return reason
        if self.options.launched is not None:
            few = case.world > self.options.launched
            return f"{case.world} ranks are needed; {self.options.launched} were launched" if few else None
        return gpu.too_few(case.world, self.options.ranks_per_gpu) if self.options.platform == "gpu" else None

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
        """Run the layer, every process together; with lessons, once more, stage by stage.

        Run it `self.options.repeat` times on the same inputs if it is to be held to giving the same bits
        (`RankResult.repeat_equal`).

        Args:
          case: the configuration.
          arrays: parameters in checkpoint layout, `x` (T, D) over real tokens in rank order, and `router_logits`
            (T, E) or `topk_ids` and `topk_weights` (T, K) where the case gives them.
          lessons: the oracle's result of each stage (`parity.stages`), to go on with in place of the layer's own in
            another run, whose results go to `RankResult.taught`. A backend without stages leaves it be.

        Returns:
          The result of each rank this process holds, by rank; every rank of the case is held by one process. The
          output alone will do: what is not there is not checked, and listed so. `parity.backends.layout` has helpers:
          `token_blocks` cuts the inputs into each rank's block, `hand_out` cuts an answer for all tokens.
        """

    def release(self) -> bool:
        """Give the device's memory back after a case, since other processes use the same device.

        Returns:
          Whether so much is held that only the end of this process would give it back; another is then started.
        """
        return False


def cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
