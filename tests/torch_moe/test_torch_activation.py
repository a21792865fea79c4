"""Activations against their formulas, in both column layouts."""

import numpy as np
import pytest
import torch
import torch_dense as dense

from torch_moe import MoEConfig
from torch_moe.activation import Activation, apply

SIZES = {"num_experts": 2, "top_k": 1, "hidden_size": 4, "intermediate_size": 6}
GATED = [
    (name, True, layout)
    for name in ("silu", "gelu", "gelu_tanh", "swigluoai")
    for layout in ("concatenated", "interleaved")
]
UNGATED = [(name, False, "concatenated") for name in ("silu", "gelu", "relu2")]


@pytest.mark.parametrize(("name", "gated", "layout"), GATED + UNGATED)
def test_an_activation_is_its_formula(name, gated, layout):
    x = np.random.default_rng(0).standard_normal((9, 12)) * 4
    config = MoEConfig(**SIZES, activation=name, gated=gated, gate_up_layout=layout)
    found = apply(torch.from_numpy(x).float(), Activation(name=name, gated=gated, layout=layout))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, dense.activate(x, config), rtol=2e-5, atol=1e-6)


def test_interleaved_and_concatenated_columns_hold_the_same_function():
    gate, up = torch.randn(3, 5), torch.randn(3, 5)
    for name in ("silu", "swigluoai"):
        together = apply(torch.cat([gate, up], -1), Activation(name=name))
        in_turns = apply(torch.stack([gate, up], -1).flatten(-2), Activation(name=name, layout="interleaved"))
        assert torch.equal(together, in_turns)


def test_swigluoai_clamps_the_gate_from_above_only_and_up_on_both_sides():
    activation = Activation(name="swigluoai", alpha=1.702, limit=7.0)

    def at(gate, up):
        return float(apply(torch.tensor([[gate, up]]), activation))

    assert at(100.0, 0.5) == at(7.0, 0.5)
    assert at(7.0, 100.0) == at(7.0, 7.0)
    assert at(7.0, -100.0) == at(7.0, -7.0) != 0
    assert at(-8.0, 1.0) != at(-7.0, 1.0)
    assert at(2.0, -1.0) == 0.0


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="activation='mish': allowed are 'silu'"):
        apply(torch.zeros(1, 2), Activation(name="mish"))
