"""Faults in the way of the real frameworks: an import that never ends in one rank, a port that another program has.

As `sitecustomize` of a folder on PYTHONPATH: Python imports it in every process that it starts.
"""

import os
import sys

FAULT = "PARITY_TEST_FAULT"


class _NeverEnds:
    """Finds one package, and takes forever."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name == self.package:
            import time

            time.sleep(600)


def plant():
    """Plant what the environment asks for, in workers only."""
    fault, _, value = os.environ.get(FAULT, "").partition(":")
    arguments = sys.orig_argv
    if "parity.worker" not in arguments:
        return
    if fault == "hangs" and arguments[arguments.index("--index") + 1] == "1":
        sys.meta_path.insert(0, _NeverEnds(value))
    if fault == "port":
        _give(int(value))


def _give(port):
    """Have every search for a free port find this one."""
    import socket

    original = socket.socket.getsockname

    class Socket(socket.socket):
        def getsockname(self):
            return original(self)[0], port

    socket.socket = Socket
