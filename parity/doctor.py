"""What this machine can run, what is missing for the rest, and how to get it.

Frameworks are imported in processes of their own, with a time limit: one that crashes or hangs is a finding, and the
other findings stand.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.markup import escape

from parity import grids
from parity.backends import available, gpu, nccl
from parity.backends.base import cores
from parity.launch import worker_environment

PROBE_SECONDS = 120.0
SHARED = 4
"""Ranks a GPU in the mode that shares them: what the built-in grids need at most, the one of 8 ranks aside."""
LAUNCHERS = ("torchrun", "srun", "kubectl")

# What a framework says of itself, as JSON on the last line. NCCL is asked in the framework's process, where the library
# that its collectives use is the one that is found.
_NCCL = """
def nccl():
    import ctypes, os, re
    path = "libnccl.so.2"
    if os.path.exists("/proc/self/maps"):
        loaded = re.findall(r"(/\\S*libnccl\\S*)", open("/proc/self/maps").read())
        path = loaded[0] if loaded else path
    try:
        version = ctypes.c_int()
        ctypes.CDLL(path).ncclGetVersion(ctypes.byref(version))
        return version.value
    except (OSError, AttributeError):
        return 0
"""
PROBES = {
    "jax": _NCCL
    + """
import json, sys
import jax, jaxlib
import jax_moe
try:
    devices, trouble = [str(d.device_kind) for d in jax.devices()], ""
except Exception as error:
    devices, trouble = [], str(error).splitlines()[0]
cuda = ""
try:
    from jax._src.lib import cuda_versions
    if cuda_versions is not None:
        number = cuda_versions.cuda_runtime_get_version()
        cuda = f"{number // 1000}.{number % 1000 // 10}"
except Exception:
    pass
print(json.dumps({"version": jax.__version__, "jaxlib": jaxlib.__version__, "platform": jax.default_backend(),
                  "devices": devices, "cuda": cuda, "nccl": nccl(), "trouble": trouble}))
""",
    "torch": _NCCL
    + """
import json, sys
import torch, torch_moe
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
devices = [torch.cuda.get_device_name(i) for i in range(count)] or ["cpu"]
print(json.dumps({"version": torch.__version__, "platform": "gpu" if count else "cpu", "devices": devices,
                  "cuda": torch.version.cuda or "", "nccl": nccl() if torch.version.cuda else 0, "trouble": "",
                  "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available()}))
""",
}
INSTALL = {"jax": "pip install moe-parity", "torch": "pip install 'moe-parity[torch]'"}


def probe(name: str, seconds: float) -> dict[str, Any]:
    """What a framework says of itself, or, under "trouble", why it does not."""
    if importlib.util.find_spec(name) is None:
        return {"version": "", "trouble": f"not installed; {INSTALL[name]}"}
    environment = worker_environment({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    command = [sys.executable, "-c", PROBES[name]]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"version": "", "trouble": f"importing it did not end within {seconds:g} s"}
    if done.returncode < 0:
        return {"version": "", "trouble": f"importing it crashed: killed by signal {-done.returncode}"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"version": "", "trouble": f"importing it failed: {last}"}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {"version": "", "trouble": "it imports, but says nothing that can be read"}


def examine(version: str, seconds: float = PROBE_SECONDS) -> dict[str, Any]:
    """Everything that the command prints, as JSON has it.

    Args:
      version: of this package.
      seconds: how long a framework may take to be imported and to find its devices.
    """
    with ThreadPoolExecutor() as threads:
        asked = {name: threads.submit(probe, name, seconds) for name in PROBES}
        frameworks = {name: future.result() for name, future in asked.items()}
    library, library_trouble = None, ""
    try:
        library = str(nccl.find())
    except nccl.NcclError as error:
        library_trouble = str(error)
    own = nccl.installed()
    return {
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "cores": cores(),
            "gpus": [vars(card) for card in gpu.cards()],
            "launchers": [name for name in LAUNCHERS if shutil.which(name)],
        },
        "parity": version,
        "frameworks": frameworks,
        "nccl": {
            "for_shared_gpus": library and {"path": library, "version": nccl.words(nccl.version_of(library)[0])},
            "installed": own and {"path": str(own), "version": nccl.words(nccl.version_of(str(own))[0])},
            "trouble": library_trouble,
        },
        "backends": sorted(available()),
        "modes": _modes(frameworks, library_trouble),
    }


def _modes(frameworks: dict[str, dict], library_trouble: str) -> list[dict[str, Any]]:
    """Each way to run, the command for it, how much of each grid it takes, and what is missing."""
    broken = [f"{name}: {facts['trouble']}" for name, facts in frameworks.items() if not facts["version"]]
    blind = [
        f"{name} sees no GPU{': ' + facts['trouble'] if facts['trouble'] else ''}; {_with_cuda(name)}"
        for name, facts in frameworks.items()
        if facts["version"] and facts.get("platform") != "gpu"
    ]
    gpus = gpu.count()
    no_gpu = [reason] if (reason := gpu.why_no_gpu()) else blind
    few = [f"{gpus} GPU here: cases of more ranks need more, or ranks that share one"] if gpus == 1 else []
    return [
        _mode("CPU devices", "parity run", broken, lambda world: True),
        _mode("GPUs, one rank each", "parity run --platform gpu", broken + no_gpu, lambda world: world <= gpus, few),
        _mode(
            f"GPUs, {SHARED} ranks each",
            f"parity run --platform gpu --ranks-per-gpu {SHARED}",
            broken + no_gpu + ([library_trouble] if library_trouble else []),
            lambda world: world <= SHARED * gpus,
        ),
        _mode("several hosts", "parity worker (docs/cluster.md)", broken, lambda world: True),
    ]


def _mode(
    name: str, command: str, missing: Sequence[str], fits: Callable[[int], bool], notes: Sequence[str] = ()
) -> dict[str, Any]:
    cases = {grid: grids.load(grid) for grid in grids.BUILT_IN}
    possible = {grid: 0 if missing else sum(fits(case.world) for case in each) for grid, each in cases.items()}
    return {
        "mode": name,
        "command": command,
        "possible": not missing and any(possible.values()),
        "grids": {grid: {"possible": possible[grid], "cases": len(each)} for grid, each in cases.items()},
        "missing": list(missing),
        "notes": list(notes),
    }


def _with_cuda(name: str) -> str:
    return "pip install 'moe-parity[cuda13]'" if name == "jax" else "install the build of PyTorch for CUDA"


def lines(facts: dict[str, Any]) -> list[str]:
    """The screen, as rich markup."""
    machine = facts["machine"]
    out = [f"parity {facts['parity']}, Python {machine['python']}, {machine['system']}, {machine['cores']} cores"]
    for card in machine["gpus"]:
        out.append(
            f"GPU     {card['name']}, {card['memory_mib'] / 1024:.0f} GiB, capability {card['capability']}, "
            f"driver {card['driver']}"
        )
    if not machine["gpus"]:
        out.append("GPU     none that the driver shows")
    for name, found in facts["frameworks"].items():
        if not found["version"]:
            out.append(f"{name:7} [red]{escape(found['trouble'])}[/]")
            continue
        parts = [found["version"]] + ([f"jaxlib {found['jaxlib']}"] if "jaxlib" in found else [])
        parts += [f"CUDA {found['cuda']}"] * bool(found["cuda"])
        parts += [f"NCCL {nccl.words(found['nccl'])}"] * bool(found["nccl"])
        parts.append(f"{len(found['devices'])} x {found['devices'][0]}" if found["devices"] else "no device")
        if found["trouble"]:
            parts.append(f"[red]{escape(found['trouble'])}[/]")
        out.append(f"{name:7} {', '.join(parts)}")
    shared = facts["nccl"]["for_shared_gpus"]
    if shared:
        out.append(f"NCCL    {shared['version']} for ranks that share a GPU: {escape(shared['path'])}")
    launchers = ", ".join(machine["launchers"]) or "none"
    out += [f"others  backends {', '.join(facts['backends'])}; launchers {launchers}", ""]
    for mode in facts["modes"]:
        mark = "[green]yes[/]" if mode["possible"] else "[red]no[/] "
        counts = ", ".join(f"{grid} {n['possible']}/{n['cases']}" for grid, n in mode["grids"].items())
        out.append(f"{mark}  {mode['mode']:20} {mode['command']:44} {counts}")
        out += [f"       - {escape(text)}" for text in [*mode["missing"], *mode["notes"]]]
    return out


def main(as_json: bool, console: Console, version: str, seconds: float = PROBE_SECONDS) -> None:
    """Print the findings."""
    facts = examine(version, seconds)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for line in lines(facts):
        console.print(line, highlight=False, soft_wrap=True)
