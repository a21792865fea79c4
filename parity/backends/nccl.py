"""The NCCL that several ranks on one GPU need: found, checked, and put in front of the frameworks' own.

NCCL refuses two ranks on one GPU with "Duplicate GPU detected", up to 2.29. From 2.30 on it takes them when
NCCL_MULTI_RANK_GPU_ENABLE=1. Frameworks bring older ones along, so a newer library is preloaded into each rank's
process, where both frameworks then find it in place of their own.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

VARIABLE = "PARITY_NCCL_LIBRARY"
LEAST = 23000
"""Version 2.30.0, as `ncclGetVersion` counts: 10000 * major + 100 * minor + patch."""
FILE = "libnccl.so.2"
CHECK_SECONDS = 120
# In a process of its own: a library that is not what it should be may crash whoever loads it.
_PROBE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_LOCAL)
try:
    get_version = library.ncclGetVersion
except AttributeError:
    sys.exit("it has no ncclGetVersion, so it is not NCCL")
version = ctypes.c_int()
status = get_version(ctypes.byref(version))
sys.exit(f"ncclGetVersion failed with status {status}") if status else print(version.value)
"""
CHANNELS = 2
"""NCCL's channels between ranks that share a card."""


class NcclError(ValueError):
    """No usable library; the message says which was tried, what is wrong with it, and how to get one."""


def words(version: int) -> str:
    """23102 as 2.31.2."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


@functools.cache
def version_of(path: str) -> tuple[int, str]:
    """A library's version, and "" or what is wrong with it (version 0)."""
    if not os.path.isfile(path):
        return 0, "there is no such file"
    if path.endswith((".xz", ".gz", ".zip", ".whl")):
        return 0, f"it is packed; unpack it, and give the path of {FILE}"
    command = [sys.executable, "-c", _PROBE, path]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CHECK_SECONDS, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return 0, f"loading it did not end within {CHECK_SECONDS} s"
    if done.returncode == 0 and done.stdout.strip().isdigit():
        return int(done.stdout), ""
    if done.returncode < 0:
        return 0, f"the process that loaded it was killed by signal {-done.returncode}"
    said = (done.stderr.strip().splitlines() or ["it cannot be loaded"])[-1]
    return 0, said.removeprefix("OSError: ")


def installed() -> Path | None:
    """The library of the package `nvidia-nccl`, which PyTorch and JAX bring along; None where there is none."""
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return None
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "lib" / FILE
        if path.is_file():
            return path
    return None


def how_to_get(cuda: str = "13") -> str:
    """In words, for messages."""
    return (
        f"get one with: pip install --no-deps --target nccl 'nvidia-nccl-cu{cuda}>=2.30', and give "
        f"--nccl-library nccl/nvidia/nccl/lib/{FILE} (or {VARIABLE})"
    )


def find(given: str | None = None) -> Path:
    """A library that lets several ranks share a GPU.

    Args:
      given: from the command line; else the environment variable is asked, then the installed package.

    Returns:
      Its absolute path.

    Raises:
      NcclError: none, or one that is unusable or too old.
    """
    asked, source = (given, "--nccl-library") if given else (os.environ.get(VARIABLE), VARIABLE)
    if asked:
        path = Path(asked)
        path = (path / FILE if path.is_dir() else path).resolve()
        version, trouble = version_of(str(path))
        if trouble:
            raise NcclError(f"{source} {asked!r} cannot be used: {trouble}; {how_to_get()}")
        if version < LEAST:
            raise NcclError(
                f"{source} {asked!r} is NCCL {words(version)}; several ranks on one GPU need 2.30 or newer; "
                f"{how_to_get()}"
            )
        return path
    path = installed()
    version = version_of(str(path))[0] if path else 0
    if path and version >= LEAST:
        return path
    have = f"installed is NCCL {words(version)}" if version else "none is installed"
    raise NcclError(
        "several ranks on one GPU (--ranks-per-gpu) need NCCL 2.30 or newer, since older ones refuse them with "
        f"'Duplicate GPU detected'; {have}; {how_to_get()}"
    )


def environment(library: Path) -> dict[str, str]:
    """Variables that make a process load this library first and let it share its GPU."""
    before = os.environ.get("LD_PRELOAD")
    return {
        "LD_PRELOAD": str(library) + (f":{before}" if before else ""),
        "NCCL_MULTI_RANK_GPU_ENABLE": "1",
        # multicast between GPUs is of no use inside one
        "NCCL_NVLS_ENABLE": "0",
        # A channel has 12 MB of buffers for each peer, in each communicator, of which there is one for each set of
        # mesh axes; with the usual two dozen of them the ranks of one card fill it.
        **{name: os.environ.get(name, str(CHANNELS)) for name in ("NCCL_MAX_NCHANNELS", "NCCL_MAX_P2P_NCHANNELS")},
    }
