"""The cause behind a framework's message."""

import pytest

from parity.causes import cause

# As the frameworks print them.
MESSAGES = {
    "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.": (
        "ran out of GPU memory"
    ),
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB.": ("ran out of GPU memory"),
    "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, invalid usage (run with "
    "NCCL_DEBUG=WARN for details), NCCL version 2.28.9 ncclInvalidUsage: This usually reflects invalid usage of NCCL "
    "library. Last error: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 8000": "--nccl-library",
    "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port: "
    "29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use": "a port is taken",
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2781": (
        "a peer is gone"
    ),
    "torch.distributed.DistBackendError: NCCL error: remote process exited or there was a network error": (
        "a peer is gone"
    ),
}


@pytest.mark.parametrize("message", MESSAGES, ids=lambda text: text.split(":")[0])
def test_a_known_message_has_its_cause_in_words(message):
    assert MESSAGES[message] in str(cause(message))


def test_an_unknown_message_speaks_for_itself():
    assert cause("ValueError: shapes (3, 4) and (5,) do not fit") is None
