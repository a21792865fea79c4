"""Every Triton module that a test here lowers is verified, as the compiler on a machine with a card would do first."""

import pytest
from jax._src.pallas.triton import lowering


@pytest.fixture(autouse=True)
def triton_modules(monkeypatch):
    """The results of lowering Pallas kernels to Triton, in order. Lowering alone does not look at what it made."""
    lower, results = lowering.lower_jaxpr_to_triton_module, []

    def verified(*args, **options):
        result = lower(*args, **options)
        assert result.module.operation.verify()
        results.append(result)
        return result

    monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", verified)
    return results
