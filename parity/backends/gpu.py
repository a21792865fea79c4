"""GPUs, found without importing a framework."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
from pathlib import Path

JAX_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


@functools.cache
def count() -> int:
    """How many NVIDIA GPUs the driver shows."""
    tool = shutil.which("nvidia-smi")
    if tool:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60, check=False)
        if listed.returncode == 0:
            return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()])


def why_no_gpu() -> str | None:
    """What is missing on this machine to run on GPUs, and what to do about it; None if nothing is."""
    if not count():
        return (
            "--platform gpu needs an NVIDIA GPU and its driver; none is visible (nvidia-smi lists none, and there is "
            "no /dev/nvidia0). Run on a machine that has one, or with --platform cpu"
        )
    if not any(importlib.util.find_spec(name) for name in JAX_PLUGINS):
        return (
            "--platform gpu needs JAX's CUDA plugin, which is not installed; install it with: "
            "pip install 'moe-parity[cuda12]' (or 'moe-parity[cuda13]')"
        )
    return None
