"""GPUs, found without importing a framework, and which rank works on which."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parity.backends.base import Options

JAX_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
MEMORY_SHARE = 0.9
"""Of a card's memory that ranks may take together; contexts and NCCL's buffers need the rest."""


@dataclass(frozen=True)
class Card:
    """One NVIDIA GPU, as the driver describes it."""

    name: str
    memory_mib: int
    capability: str
    driver: str


@functools.cache
def cards() -> tuple[Card, ...]:
    """The NVIDIA GPUs that `CUDA_VISIBLE_DEVICES` leaves to this process, as nvidia-smi lists them."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return ()
    query = [tool, "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = []
    for line in listed.stdout.splitlines() if listed.returncode == 0 else ():
        name, memory, capability, driver = (*(part.strip() for part in line.split(",")), "", "", "")[:4]
        found.append(Card(name, int(memory) if memory.isdigit() else 0, capability, driver))
    return tuple(found[: _visible(len(found))])


@functools.cache
def count() -> int:
    """How many NVIDIA GPUs ranks may use."""
    if found := cards():
        return len(found)
    paths = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()]
    return _visible(len(paths))


def _visible(found: int) -> int:
    """How many of the GPUs found `CUDA_VISIBLE_DEVICES` leaves; an entry of -1 ends the list, as CUDA has it."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return found
    entries = [entry.strip() for entry in chosen.split(",")]
    stop = next((i for i, entry in enumerate(entries) if not entry or entry == "-1"), len(entries))
    return min(found, stop)


def of_rank(rank: int, ranks_per_gpu: int) -> int:
    """The GPU a rank works on: with two ranks on each, ranks 0 to 4 lie on GPUs 0, 0, 1, 1, 2."""
    return rank // ranks_per_gpu


def socket_interface(launched: int | None) -> dict[str, str]:
    """The variable that has NCCL meet on loopback, where all ranks are this command's and nobody has set another.

    Ranks that a launcher has started find their interface on their own host (`parity.cluster.agent`).
    """
    name = "NCCL_SOCKET_IFNAME"
    return {} if launched is not None else {name: os.environ.get(name, "lo")}


def memory_fraction(ranks_per_gpu: int, frameworks: int = 2) -> float:
    """The part of a card that one rank of one framework may take, so that all ranks of all frameworks fit."""
    return round(MEMORY_SHARE / (ranks_per_gpu * frameworks), 4)


def why_no_gpu() -> str | None:
    """What is missing on this machine to run on GPUs, and what to do about it; None if nothing is."""
    if not count():
        return (
            "--platform gpu needs an NVIDIA GPU and its driver; none is visible (nvidia-smi lists none, and there is "
            "no /dev/nvidia0, or CUDA_VISIBLE_DEVICES hides it). Run on a machine that has one, or with --platform cpu"
        )
    if not any(importlib.util.find_spec(name) for name in JAX_PLUGINS):
        return (
            "--platform gpu needs JAX's CUDA plugin, which is not installed; install it with: "
            "pip install 'moe-parity[cuda12]' (or 'moe-parity[cuda13]')"
        )
    return None


def too_few(world: int, ranks_per_gpu: int) -> str | None:
    """Why a case of this many ranks finds no room on the GPUs here; None if it does."""
    gpus = count()
    if world <= gpus * ranks_per_gpu:
        return None
    if ranks_per_gpu == 1:
        return (
            f"{world} ranks need as many GPUs; this machine has {gpus} (--ranks-per-gpu {-(-world // max(gpus, 1))} "
            "would share them)"
        )
    return f"{world} ranks at {ranks_per_gpu} a GPU need {-(-world // ranks_per_gpu)} GPUs; this machine has {gpus}"


def describe(options: Options) -> dict:
    """What a run's summary says about the devices."""
    if options.platform != "gpu":
        return {"devices": options.platform}
    return {
        "devices": options.platform,
        "gpus": [card.name for card in cards()] or [f"{count()} GPUs"],
        "driver": next((card.driver for card in cards()), ""),
        "ranks_per_gpu": options.ranks_per_gpu,
        "nccl_library": options.nccl_library,
    }
