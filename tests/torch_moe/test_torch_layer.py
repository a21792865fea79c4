"""The layer on one rank against the dense formula: every option, gradients, inputs that do not fit."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch_dense as dense

from torch_moe import MoE, MoEConfig, ParallelConfig, RouterConfig, Trace, make_mesh

SIZES = {"num_experts": 8, "top_k": 3, "hidden_size": 16, "intermediate_size": 24}
EVERYTHING = {
    "expert_bias": True,
    "num_shared_experts": 2,
    "shared_gate": True,
    "latent_size": 12,
    "router": RouterConfig(
        scoring="sigmoid",
        renormalize=True,
        num_groups=4,
        groups_kept=2,
        score_correction_bias=True,
        scaling_factor=2.5,
    ),
}
OPTIONS = {
    "plain": {},
    "renormalized": {"router": RouterConfig(renormalize=True)},
    "sigmoid with groups and bias": {"router": EVERYTHING["router"]},
    "weight on input": {"router": RouterConfig(weight_on_input=True), "expert_bias": True},
    "gelu": {"activation": "gelu"},
    "gelu_tanh interleaved": {"activation": "gelu_tanh", "gate_up_layout": "interleaved"},
    "swigluoai interleaved": {"activation": "swigluoai", "gate_up_layout": "interleaved", "expert_bias": True},
    "ungated relu2": {"activation": "relu2", "gated": False, "expert_bias": True, "num_shared_experts": 1},
    "shared": {"shared_intermediate_size": 10},
    "shared with gate": {"num_shared_experts": 1, "shared_gate": True},
    "latent": {"latent_size": 12},
    "latent and shared": {"latent_size": 12, "num_shared_experts": 1},
    "one expert": {"num_experts": 1, "top_k": 1},
    "every expert": {"top_k": 8},
    "everything": EVERYTHING,
}


def build(dtype="float32", **options):
    config = MoEConfig(**{**SIZES, "dtype": dtype, **options})
    params = dense.random_params(config)
    moe = MoE(config)
    moe.load_params(params)
    return config, params, moe


def tokens(count, config, seed=5):
    x = torch.randn(count, config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return x.to(getattr(torch, config.dtype))


@pytest.mark.parametrize("option", OPTIONS)
def test_the_layer_is_the_dense_formula(option):
    config, params, moe = build(**OPTIONS[option])
    x = tokens(13, config)
    expected = dense.moe(dense.to_numpy(params), x.numpy(), config)
    y = moe(x)
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.detach(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("option", ["plain", "everything", "swigluoai interleaved", "weight on input"])
def test_in_bfloat16_every_token_is_within_its_roundings(option):
    config, params, moe = build(dtype="bfloat16", **OPTIONS[option])
    x = tokens(40, config)
    y, trace = moe(x, trace=True)
    assert y.dtype == torch.bfloat16
    ids, weights = trace.topk_ids.numpy(), trace.topk_weights.detach().numpy()
    expected = dense.moe(dense.to_numpy(params), x.double().numpy(), config, topk_ids=ids, topk_weights=weights)
    error = np.linalg.norm(y.detach().double().numpy() - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    # Row, activation, down's input, result, and the latent's two: at most six roundings of about 0.4 * 2^-8 RMS each,
    # with room for tokens whose experts nearly cancel.
    assert error.max() < 4 * 0.4 * 2**-8 * 6**0.5, f"token {error.argmax()}: {error.max()}"


def test_given_logits_are_routed_as_the_gates_own():
    config, params, moe = build()
    given = MoE(MoEConfig(**SIZES, dtype="float32", router=RouterConfig(source="logits")))
    given.load_params({name: value for name, value in params.items() if name != "router.gate"})
    x = tokens(9, config)
    y, trace = moe(x, trace=True)
    assert torch.equal(given(x, router_logits=trace.router_logits), y)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_given_ids_and_weights_are_taken_as_they_are(dtype):
    config, params, moe = build(router=RouterConfig(source="ids", renormalize=True, scaling_factor=3.0))
    x = tokens(9, config)
    ids = torch.stack([torch.randperm(8)[:3] for _ in range(9)]).to(dtype)
    weights = torch.randn(9, 3)
    expected = dense.moe(dense.to_numpy(params), x.numpy(), config, topk_ids=ids.numpy(), topk_weights=weights.numpy())
    y, trace = moe(x, topk_ids=ids, topk_weights=weights, trace=True)
    np.testing.assert_allclose(y.detach(), expected, rtol=1e-4, atol=1e-5)
    assert trace.router_logits is None
    assert torch.equal(trace.topk_weights, weights)


@pytest.mark.parametrize("option", ["plain", "everything", "weight on input"])
def test_a_repeated_run_is_bitwise_equal_gradients_included(option):
    config, _, moe = build(dtype="bfloat16", **OPTIONS[option])
    x = tokens(50, config).requires_grad_()
    seed = torch.randn(50, 16).bfloat16()

    def once():
        y = moe(x)
        return [y, *torch.autograd.grad(y, [x, *moe.parameters()], seed)]

    assert all(torch.equal(first, second) for first, second in zip(once(), once(), strict=True))


@pytest.mark.parametrize("option", ["plain", "everything"])
def test_no_tokens_give_no_tokens_and_zero_gradients(option):
    config, _, moe = build(**OPTIONS[option])
    x = tokens(0, config).requires_grad_()
    y, trace = moe(x, trace=True)
    assert y.shape == (0, 16)
    assert trace.expert_load.tolist() == [0] * 8
    y.sum().backward()
    assert all(not parameter.grad.any() for parameter in moe.parameters())


@pytest.mark.parametrize("option", ["plain", "everything", "weight on input"])
def test_nan_in_padding_reaches_no_real_row_no_load_and_no_gradient(option):
    config, _, moe = build(**OPTIONS[option])
    x = tokens(7, config)
    alone, trace_alone = moe(x, trace=True)
    expected = torch.autograd.grad(alone.sum(), list(moe.parameters()))
    padded = torch.cat([x, torch.full((4, 16), float("nan"))]).requires_grad_()
    y, trace = moe(padded, counts=[7], trace=True)
    assert torch.equal(y[:7], alone)
    assert torch.equal(y[7:], torch.zeros(4, 16))
    assert torch.equal(trace.expert_load, trace_alone.expert_load)
    found = torch.autograd.grad(y.sum(), [padded, *moe.parameters()])
    assert not found[0][7:].any()
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(found[1:], expected, strict=True))


def test_a_trace_tells_the_routing_and_the_sort():
    config, _, moe = build()
    x = tokens(6, config)
    y, trace = moe(x, counts=[5], trace=True)
    assert isinstance(trace, Trace)
    assert y.shape == x.shape
    assert trace.token_index.tolist() == [0, 1, 2, 3, 4, -1]
    assert trace.router_logits.shape == (6, 8)
    assert trace.topk_ids[5].tolist() == [8, 8, 8]
    assert trace.topk_weights[5].tolist() == [0, 0, 0]
    assert torch.equal(trace.group_sizes, trace.expert_load)
    assert int(trace.expert_load.sum()) == 15
    used = trace.row_token >= 0
    chosen = trace.topk_ids[trace.row_token[used].long(), trace.row_slot[used].long()]
    assert torch.equal(chosen.long(), torch.repeat_interleave(torch.arange(8), trace.group_sizes))
    integers = (
        trace.token_index,
        trace.topk_ids,
        trace.group_sizes,
        trace.row_token,
        trace.row_slot,
        trace.expert_load,
    )
    assert {value.dtype for value in integers} == {torch.int32}


TINY = {"num_experts": 4, "top_k": 2, "hidden_size": 4, "intermediate_size": 3, "dtype": "float32"}
DIFFERENTIATED = {
    "plain": {},
    "weight on input, ungated": {
        "router": RouterConfig(weight_on_input=True, renormalize=True),
        "gated": False,
        "activation": "gelu",
        "expert_bias": True,
    },
    "everything": {**EVERYTHING, "latent_size": 3, "activation": "swigluoai", "gate_up_layout": "interleaved"},
}


@pytest.mark.parametrize("option", DIFFERENTIATED)
def test_every_gradient_is_the_slope_of_the_dense_formula(option):
    config = MoEConfig(**{**TINY, **DIFFERENTIATED[option]})
    params = dense.random_params(config, seed=2)
    moe = MoE(config)
    moe.load_params(params)
    x = tokens(5, config).requires_grad_()
    seed = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    (moe(x) * seed).sum().backward()
    values = {**dense.to_numpy(params), "x": x.detach().double().numpy()}

    def loss():
        return (dense.moe({n: v for n, v in values.items() if n != "x"}, values["x"], config) * seed.numpy()).sum()

    found = {name: parameter.grad for name, parameter in moe.named_parameters()} | {"x": x.grad}
    for name, gradient in found.items():
        slope = np.zeros(values[name].shape)
        for index in np.ndindex(slope.shape):
            kept = values[name][index]
            sides = []
            for step in (1e-5, -1e-5):
                values[name][index] = kept + step
                sides.append(loss())
            values[name][index] = kept
            slope[index] = (sides[0] - sides[1]) / 2e-5
        np.testing.assert_allclose(gradient, slope, rtol=2e-3, atol=2e-4 * np.abs(slope).max(), err_msg=name)


def test_given_weights_and_logits_receive_gradients():
    config, _, moe = build(router=RouterConfig(source="ids"))
    weights = torch.rand(4, 3, requires_grad=True)
    ids = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 2, 3]])
    moe(tokens(4, config), topk_ids=ids, topk_weights=weights).sum().backward()
    assert weights.grad.abs().min() > 0
    config, _, moe = build(router=RouterConfig(source="logits"))
    logits = torch.randn(4, 8, requires_grad=True)
    moe(tokens(4, config), router_logits=logits).sum().backward()
    assert logits.grad.abs().sum() > 0


def test_unloaded_parameters_cannot_go_unnoticed():
    config = MoEConfig(**SIZES, dtype="float32")
    assert MoE(config)(tokens(3, config)).isnan().all()


IDS = torch.tensor([[0, 1, 2]] * 4)


@pytest.mark.parametrize(
    ("source", "x", "given", "message"),
    [
        ("gate", torch.zeros(4, 15), {}, r"x of shape \(4, 15\): allowed is \(t, 16\)"),
        ("gate", torch.zeros(2, 4, 16), {}, r"x of shape \(2, 4, 16\): allowed is \(t, 16\)"),
        ("gate", torch.zeros(4, 16).bfloat16(), {}, "x of dtype torch.bfloat16: allowed is torch.float32"),
        ("gate", torch.zeros(4, 16), {"counts": [4, 4]}, r"counts=\(4, 4\): allowed is one per DP rank, 1 of them"),
        ("gate", torch.zeros(4, 16), {"counts": [5]}, r"counts\[0\]=5: allowed is at most 4"),
        ("gate", torch.zeros(4, 16), {"counts": [-1]}, "counts of at least 0"),
        ("gate", torch.zeros(4, 16), {"router_logits": torch.zeros(4, 8)}, "router_logits=a tensor: .* 'gate' is None"),
        ("gate", torch.zeros(4, 16), {"topk_ids": IDS}, "topk_ids=a tensor"),
        ("logits", torch.zeros(4, 16), {}, "router_logits=None: allowed with router source 'logits' is a tensor"),
        ("logits", torch.zeros(4, 16), {"router_logits": torch.zeros(4, 7)}, r"router_logits of shape \(4, 7\)"),
        (
            "logits",
            torch.zeros(4, 16),
            {"router_logits": torch.zeros(4, 8).int()},
            "router_logits of dtype torch.int32",
        ),
        ("ids", torch.zeros(4, 16), {"topk_ids": IDS}, "topk_weights=None"),
        ("ids", torch.zeros(4, 16), {"topk_weights": torch.zeros(4, 3)}, "topk_ids=None"),
        ("ids", torch.zeros(4, 16), {"topk_ids": IDS.float(), "topk_weights": torch.zeros(4, 3)}, "topk_ids of dtype"),
        ("ids", torch.zeros(4, 16), {"topk_ids": IDS, "topk_weights": IDS}, "topk_weights of dtype torch.int64"),
        ("ids", torch.zeros(4, 16), {"topk_ids": IDS[:3], "topk_weights": torch.zeros(4, 3)}, "topk_ids of shape"),
        (
            "ids",
            torch.zeros(4, 16),
            {"topk_ids": torch.tensor([[0, 1, 2]] * 3 + [[5, 1, 8]]), "topk_weights": torch.zeros(4, 3)},
            r"topk_ids of token 3 are \[5, 1, 8\]: allowed are distinct ids from 0 to 7",
        ),
        (
            "ids",
            torch.zeros(4, 16),
            {"topk_ids": torch.tensor([[0, 1, 2], [4, 3, 4]] * 2), "topk_weights": torch.zeros(4, 3)},
            r"topk_ids of token 1 are \[4, 3, 4\]",
        ),
    ],
)
def test_an_input_that_does_not_fit_is_an_error_with_its_value_and_what_is_allowed(source, x, given, message):
    _, _, moe = build(router=RouterConfig(source=source))
    with pytest.raises(ValueError, match=message):
        moe(x, **given)


def test_ids_of_padding_may_be_anything():
    config, _, moe = build(router=RouterConfig(source="ids"))
    ids = torch.tensor([[0, 1, 2], [99, 99, -7]])
    weights = torch.tensor([[1.0, 1.0, 1.0], [float("nan")] * 3])
    y = moe(tokens(2, config), topk_ids=ids, topk_weights=weights, counts=[1])
    assert y[0].isfinite().all()
    assert not y[1].any()


def test_several_ranks_without_a_mesh_are_an_error():
    config = MoEConfig(**SIZES)
    with pytest.raises(ValueError, match=r"device_mesh=None: allowed is a mesh of \(1, 2\)"):
        MoE(config, ParallelConfig(tp=2))
    with pytest.raises(ValueError, match=r"dp=2, tp=1: allowed is dp \* tp ranks, not no process group"):
        make_mesh(ParallelConfig(dp=2))
    assert make_mesh(ParallelConfig()) is None


def test_expert_parallel_on_one_rank_is_the_layer_itself():
    config, params, moe = build()
    x = tokens(5, config)
    for transport in ("local", "allgather"):
        alone = MoE(config, ParallelConfig(expert_parallel=True, transport=transport))
        alone.load_params(params)
        assert torch.equal(alone(x), moe(x))


def test_a_state_dict_has_the_checkpoints_names():
    _, params, moe = build(**EVERYTHING)
    assert set(moe.state_dict()) == set(params)
    assert "router.bias" not in dict(moe.named_parameters())


def test_the_package_imports_with_torch_and_numpy_alone():
    program = """
import sys

class Only:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "jaxtyping", "jax_moe", "parity", "scipy", "beartype", "ml_dtypes"):
            raise ImportError(name)

sys.meta_path.insert(0, Only())
import torch, torch_moe
config = torch_moe.MoEConfig(num_experts=4, top_k=2, hidden_size=8, intermediate_size=8, dtype="float32")
moe = torch_moe.MoE(config)
moe.load_params(torch_moe.init(config))
assert moe(torch.randn(3, 8)).isfinite().all()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
