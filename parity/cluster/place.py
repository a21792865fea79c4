"""Which rank this process is and where rank 0 is, from the variables that launchers set.

| | torchrun, Kubeflow, by hand | Slurm | Kubernetes indexed Job |
|---|---|---|---|
| rank | RANK | SLURM_PROCID | JOB_COMPLETION_INDEX |
| ranks | WORLD_SIZE | SLURM_NTASKS | WORLD_SIZE |
| rank on its host | LOCAL_RANK | SLURM_LOCALID | 0 |
| host of rank 0 | MASTER_ADDR | MASTER_ADDR, or the first of the step's nodes | MASTER_ADDR |
| port | MASTER_PORT + 1 | MASTER_PORT + 1, or from the job's number | MASTER_PORT + 1 |

What the command line says wins over all of it, and a column over those right of it.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

TOKEN = "PARITY_TOKEN"
DEFAULT_PORT = 29500
"""Of MASTER_PORT, as torchrun has it."""
SLURM_PORTS = 20000
"""Jobs get this and the last four digits of their number, so that two jobs on a node differ."""


class PlaceError(ValueError):
    """The environment and the options do not say which rank this is, or where rank 0 is."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One launched process among all."""

    rank: int
    ranks: int
    local_rank: int
    host: str
    """Where rank 0 is, by name or address."""
    port: int
    """Where rank 0 listens for the agents of all ranks."""
    token: str = field(repr=False)
    """What every rank of a launch knows, and programs that wander by do not."""
    source: str = "options"
    """Whose variables said which rank this is."""

    @property
    def where(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def find(
    environment: Mapping[str, str],
    *,
    rank: int | None = None,
    ranks: int | None = None,
    local_rank: int | None = None,
    host: str | None = None,
    port: int | None = None,
) -> Place:
    """This process's place.

    Args:
      environment: its variables.
      rank, ranks, local_rank, host, port: what the command line says; None where it says nothing.

    Raises:
      PlaceError: something is missing, no number, or contradicts the rest; the message names the variable.
    """
    names = _names(environment)
    # only a rank that is on its own on a host may leave out which of it it is
    found = {
        "rank": _number(environment, names[0], rank, "--rank"),
        "ranks": _number(environment, names[1], ranks, "--ranks"),
        "local_rank": _number(environment, names[2], local_rank, "--local-rank", default=0),
    }
    if not 0 <= found["rank"] < found["ranks"]:
        raise PlaceError(f"rank {found['rank']} of {found['ranks']}; ranks are counted from 0 ({names[0]}, {names[1]})")
    host = host or environment.get("MASTER_ADDR") or _slurm_host(environment)
    if not host:
        raise PlaceError("where rank 0 is nobody says: set MASTER_ADDR, or give --master-addr")
    if port is None:
        port = _number(environment, "MASTER_PORT", None, "--port", default=_port(environment)) + 1
    if not 0 < port < 65536:
        raise PlaceError(f"port {port}: it must be 1 to 65535 (--port, or MASTER_PORT and 1)")
    return Place(**found, host=host, port=port, token=_token(environment, host), source=names[0])


def _names(environment: Mapping[str, str]) -> tuple[str, str, str]:
    """The variables of the launcher that is at work; torchrun inside of a Slurm job counts."""
    if "RANK" in environment:
        return "RANK", "WORLD_SIZE", "LOCAL_RANK"
    if "SLURM_PROCID" in environment:
        return "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"
    if "JOB_COMPLETION_INDEX" in environment:
        return "JOB_COMPLETION_INDEX", "WORLD_SIZE", "LOCAL_RANK"
    return "RANK", "WORLD_SIZE", "LOCAL_RANK"


def _number(
    environment: Mapping[str, str], name: str, given: int | None, option: str, default: int | None = None
) -> int:
    if given is not None:
        return given
    text = environment.get(name)
    if text is None:
        if default is not None:
            return default
        raise PlaceError(
            f"{name} is not set: start this command under torchrun, srun or with RANK, WORLD_SIZE, LOCAL_RANK, "
            f"MASTER_ADDR and MASTER_PORT in the environment, or give {option}"
        )
    if not re.fullmatch(r"\d{1,9}", text.strip()):
        raise PlaceError(f"{name}={text!r} is no number")
    return int(text)


def _slurm_host(environment: Mapping[str, str]) -> str | None:
    """The node of task 0: the first of the step's, which is not always the one where srun was called."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if nodes := environment.get(name):
            return first_node(nodes)
    return environment.get("SLURM_LAUNCH_NODE_IPADDR")


def first_node(nodes: str) -> str:
    """The first host of a list as Slurm writes it: "gpu[007-009,12],login" gives "gpu007"."""
    first = re.match(r"[^,\[]*(\[[^\]]*\][^,\[]*)*", nodes.strip())
    assert first is not None  # it matches the empty text
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def _port(environment: Mapping[str, str]) -> int:
    job = environment.get("SLURM_JOB_ID", "")
    if "SLURM_PROCID" in environment and job.isdigit():
        return SLURM_PORTS + int(job) % 10000
    return DEFAULT_PORT


def _token(environment: Mapping[str, str], host: str) -> str:
    """The secret of this launch, or, without one, what tells it from other launches."""
    if token := environment.get(TOKEN):
        return token
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID")
    job = [environment[name] for name in names if environment.get(name, "none") != "none"]
    if not job and not _loopback(host):
        raise PlaceError(
            f"ranks on several hosts must know each other: set {TOKEN} to the same text, which nobody else knows, on "
            "all of them"
        )
    return "job " + hashlib.sha256(" ".join(job).encode()).hexdigest()


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == socket.gethostname()
