"""A pool of rank processes that run named functions together, one process group for all of them.

Starting four torch processes takes seconds, so one pool serves a whole test session. A function runs as
`function(rank, *args)` on every rank; the results come back in rank order. If a rank fails, its traceback is the
test's, and the pool is replaced, since the other ranks may be waiting for the one that is gone.
"""

import contextlib
import datetime
import traceback
import warnings
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)
CALL_TIMEOUT_S = 120


def _serve(rank: int, world: int, backend: str, port: int, connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(backend == "gloo")
    warnings.simplefilter("error")
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=COLLECTIVE_TIMEOUT)
    if backend == "nccl":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT)
    connection.send("ready")
    while True:
        try:
            call = connection.recv()
        except EOFError:
            break
        if call is None:
            break
        function, args = call
        try:
            connection.send((True, function(rank, *args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


class RankError(AssertionError):
    """A rank failed; the message holds its traceback."""


class RankPool:
    """`world` processes that stay alive between calls."""

    def __init__(self, world: int, backend: str = "gloo") -> None:
        self.world = world
        self.backend = backend
        self._processes: list = []
        self._connections: list = []
        self._store = None

    def _start(self) -> None:
        # The server imports torch once and every rank is forked from it, which saves seconds for each.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "torch._inductor.config"])
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            args = (rank, self.world, self.backend, self._store.port, theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        assert self._collect() == ["ready"] * self.world

    def _collect(self) -> list:
        replies: dict[int, object] = {}
        while len(replies) < self.world:
            waiting = {self._connections[rank]: rank for rank in range(self.world) if rank not in replies}
            ready = wait(list(waiting), timeout=CALL_TIMEOUT_S)
            if not ready:
                raise RankError(f"ranks {sorted(waiting.values())} did not answer within {CALL_TIMEOUT_S} s")
            for connection in ready:
                rank = waiting[connection]
                try:
                    replies[rank] = connection.recv()
                except EOFError:
                    code = self._processes[rank].exitcode
                    raise RankError(f"rank {rank} ended without an answer, exit code {code}") from None
                if isinstance(replies[rank], tuple) and not replies[rank][0]:
                    raise RankError(f"rank {rank} of {self.world} failed:\n{replies[rank][1]}")
        return [replies[rank] for rank in range(self.world)]

    def run(self, function, *args) -> list:
        """`function(rank, *args)` on every rank; results in rank order."""
        try:
            if not self._processes:
                self._start()
            for connection in self._connections:
                connection.send((function, args))
            return [reply[1] for reply in self._collect()]
        except BaseException:
            self._kill()
            raise

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._forget()

    def _forget(self) -> None:
        for connection in self._connections:
            connection.close()
        self._processes, self._connections, self._store = [], [], None

    def stop(self) -> None:
        """Ends the ranks in order."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
        self._forget()
