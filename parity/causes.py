"""What lies behind a framework's error, in words: their own messages name a call and not what to do."""

from __future__ import annotations

# The first line whose marks are all in the text names the cause; marks are in lower case.
CAUSES = (
    (("duplicate gpu detected",), "NCCL refuses several ranks on one GPU: give a newer one with --nccl-library"),
    (
        ("resource_exhausted", "host"),
        "ran out of host memory",
    ),
    (
        ("resource_exhausted",),
        "ran out of GPU memory: use fewer ranks a GPU, more GPUs, or a smaller case",
    ),
    (
        ("out of memory", "cuda"),
        "ran out of GPU memory: use fewer ranks a GPU, more GPUs, or a smaller case",
    ),
    (("defaultcpuallocator", "allocate memory"), "ran out of host memory"),
    (("address already in use",), "a port is taken by another program"),
    (("address in use",), "a port is taken by another program"),
    (("failed to add port to server",), "a port is taken by another program"),
    (("failed to start rpc server",), "a port is taken by another program"),
    (("remote process exited",), "a peer is gone"),
    (("connection closed by peer",), "a peer is gone"),
    (("connection reset by peer",), "a peer is gone"),
    (("nccl", "invalid usage"), "NCCL was used in a way it refuses (NCCL_DEBUG=WARN in the environment tells more)"),
    (("nccl", "unhandled"), "NCCL failed (NCCL_DEBUG=WARN in the environment tells more)"),
    (("no kernel image is available",), "a library on board was not built for this GPU"),
    (("insufficient driver",), "the NVIDIA driver is older than this CUDA needs"),
)


def cause(text: str) -> str | None:
    """The cause of an error, from its message; None where the message must speak for itself."""
    low = text.lower()
    return next((words for marks, words in CAUSES if all(mark in low for mark in marks)), None)
