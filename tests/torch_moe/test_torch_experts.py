"""An expert's arithmetic on sorted rows: the two halves together are the dense feed-forward."""

import numpy as np
import pytest
import torch
import torch_dense as dense

from torch_moe import MoEConfig, experts
from torch_moe.activation import Activation


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("swigluoai", True), ("relu2", False)])
def test_gate_up_and_down_are_the_feed_forward_of_each_rows_expert(activation, gated, dtype):
    config = MoEConfig(
        num_experts=4,
        top_k=1,
        hidden_size=16,
        intermediate_size=24,
        activation=activation,
        gated=gated,
        expert_bias=True,
        dtype=dtype,
    )
    params = dense.random_params(config)
    sizes = torch.tensor([3, 0, 5, 1], dtype=torch.int32)
    rows = torch.randn(12, 16, generator=torch.Generator().manual_seed(1)).to(params["experts.down"].dtype)
    h = experts.gate_up(
        rows,
        params["experts.gate_up"],
        sizes,
        activation=Activation(name=activation, gated=gated),
        bias_eM=params["experts.gate_up_bias"],
    )
    y = experts.down(h, params["experts.down"], sizes, bias_eW=params["experts.down_bias"])
    assert h.dtype == rows.dtype
    assert y.dtype == torch.float32
    exact = dense.to_numpy(params)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for row, expert in enumerate(torch.repeat_interleave(torch.arange(4), sizes).tolist()):
        expected = dense.ffn(
            rows[row].double().numpy(),
            exact["experts.gate_up"][expert],
            exact["experts.down"][expert],
            config,
            exact["experts.gate_up_bias"][expert],
            exact["experts.down_bias"][expert],
        )
        error = np.linalg.norm(y[row].numpy() - expected) / np.linalg.norm(expected)
        assert error < tolerance, f"row {row}: {error}"
    assert torch.equal(h[9:], torch.zeros_like(h[9:]))
    assert torch.equal(y[9:], torch.zeros_like(y[9:]))


def test_the_activation_between_the_products_is_looked_up_when_it_runs(monkeypatch):
    monkeypatch.setattr(experts, "activate", lambda product, *, activation: product[:, :2] * 0 + 7)
    h = experts.gate_up(
        torch.ones(1, 4), torch.ones(1, 4, 4), torch.tensor([1], dtype=torch.int32), activation=Activation(name="silu")
    )
    assert h.tolist() == [[7, 7]]
