"""Fixtures for the tests of `torch_moe`."""

import pytest
import torch
from torch_ranks import RankPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool():
    ranks = RankPool(4)
    yield ranks
    ranks.stop()
