import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def gradients_stay_on_for_other_tests():
    """PyTorch's lab turns them off for its process, which here is that of all tests."""
    before = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(before)
