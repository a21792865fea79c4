"""Fixtures for the tests of `torch_moe`, whose stages are imported with their shape annotations checked."""

import jaxtyping
import pytest

# Not the configurations, the layer and its input checks: their own errors are what is tested there.
STAGES = ("activation", "collectives", "experts", "layout", "matmul", "plan", "router", "rows", "trace", "transport")
jaxtyping.install_import_hook([f"torch_moe.{stage}" for stage in STAGES], "beartype.beartype")

import torch  # noqa: E402
from torch_ranks import RankPool  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def deterministic():
    """Ops that may race raise, and memory that nobody wrote is NaN, in this process as in every rank of a pool."""
    on_cpu = not torch.cuda.is_available()  # On CUDA this also forbids what is deterministic here but not in general.
    torch.use_deterministic_algorithms(on_cpu)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def pool():
    ranks = RankPool(4)
    yield ranks
    ranks.stop()
