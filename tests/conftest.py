"""Settings of the whole suite that must be made before JAX is imported anywhere."""

import os

import pytest
from hypothesis import settings

settings.register_profile("steady", deadline=None)  # a busy machine is no failure
settings.load_profile("steady")


def pytest_configure(config: pytest.Config) -> None:
    """JAX on eight CPU devices, or, where `-m gpu` asks for tests of a card, on the card beside PyTorch."""
    if "gpu" in config.getoption("markexpr").replace("not gpu", ""):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        flags = [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_force_host_platform_device_count=8",
            # XLA ends a process whose devices wait longer than 40 s for each other; a busy machine may be that slow.
            "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        ]
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()
