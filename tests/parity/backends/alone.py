"""A backend in this process, without workers: one process that holds every rank it can."""

import contextlib

from parity import backends
from parity.backends.base import Member, Options


@contextlib.contextmanager
def alone(name, options=None):
    """A backend that is set up, and taken down again."""
    import torch

    options, threads = options or Options(), torch.get_num_threads()
    backend = backends.load(name, options)
    backend.setup(Member(index=0, processes=1, options=options, publish=lambda value: None, receive=lambda: ""))
    try:
        yield backend
    finally:
        if name == "torch":
            torch.distributed.destroy_process_group()
            torch.set_num_threads(threads)
