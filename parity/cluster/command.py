"""What `parity worker` does, on rank 0 and on the others."""

from __future__ import annotations

import os
from collections.abc import Callable

from parity.cluster import agent, place
from parity.cluster.head import Head
from parity.launch import InfrastructureError


def main(
    here: place.Place, bind: str | None, seconds: float, say: Callable[[str], None], run: Callable[[Head], int]
) -> int:
    """Be a rank of a launch.

    Args:
      here: which rank.
      bind: the address rank 0 listens on, if not the one the others are told.
      seconds: how long ranks wait for each other.
      say: prints a line.
      run: runs and judges the cases, on rank 0.

    Returns:
      The run's exit status, the same on all ranks.

    Raises:
      InfrastructureError: ranks are missing, do not fit together, or are gone.
    """
    if here.rank:
        return agent.main(here, seconds)
    with Head(here, bind, seconds, say) as head:
        hosts = head.hosts()
        say(f"{here.ranks} ranks on {len(hosts)} host{'s' * (len(hosts) > 1)}: "
            + ", ".join(f"{name} ({len(ranks)})" for name, ranks in hosts.items()))  # fmt: skip
        head.status = run(head)
        try:
            head.check()
        except InfrastructureError as error:
            head.reason = str(error)
        return head.status


def find(
    rank: int | None, ranks: int | None, local_rank: int | None, host: str | None, port: int | None
) -> place.Place:
    """This process's place, from the environment and what the command line says."""
    return place.find(os.environ, rank=rank, ranks=ranks, local_rank=local_rank, host=host, port=port)
