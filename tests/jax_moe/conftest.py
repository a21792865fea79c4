"""Settings of these tests: programs are many and small, so compiling costs more than running."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def compile_quickly():
    """Leaves out LLVM's optimizations, a third of the suite's time; the passes over the program itself all run."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
