"""Grouped and plain products: values, tails, empty groups, gradients, and true float32."""

import pytest
import torch

from torch_moe.matmul import grouped_linear, grouped_mm_fits, linear, true_float32

SIZES = [
    pytest.param([3, 0, 4, 1], 8, id="an empty group"),
    pytest.param([8, 0, 8, 0], 16, id="every other group empty"),
    pytest.param([0, 0, 0, 0], 5, id="all groups empty"),
    pytest.param([2, 1, 0, 3], 11, id="rows past the last group"),
    pytest.param([0, 0, 0, 0], 0, id="no rows"),
]


def operands(rows, dtype, *, inner=8, outer=6, experts=4):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inner, generator=generator).to(dtype)
    w = torch.randn(experts, outer, inner, generator=generator).to(dtype)
    bias = torch.randn(experts, outer, generator=generator).to(dtype)
    return x, w, bias


def expert_of_row(sizes):
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("sizes", "rows"), SIZES)
def test_each_group_is_multiplied_by_its_own_weights_and_the_tail_is_zeros(sizes, rows, with_bias, dtype):
    x, w, bias = operands(rows, dtype)
    used = sum(sizes)
    x[used:] = float("nan")
    bias = bias if with_bias else None
    found = grouped_linear(x, w, torch.tensor(sizes, dtype=torch.int32), bias_eN=bias)
    expert = expert_of_row(sizes)
    expected = torch.einsum("rm,rnm->rn", x[:used].double(), w[expert].double())
    if bias is not None:
        expected = expected + bias[expert].double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:used].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[used:], torch.zeros(rows - used, 6))


@pytest.mark.parametrize(("sizes", "rows"), SIZES)
def test_gradients_are_those_of_the_dense_product(sizes, rows):
    x, w, bias = (value.requires_grad_() for value in operands(rows, torch.float32))
    used, expert = sum(sizes), expert_of_row(sizes)
    seed = torch.randn(rows, 6)

    def dense():
        part = torch.einsum("rm,rnm->rn", x[:used], w[expert]) + bias[expert]
        return torch.cat([part, torch.zeros(rows - used, 6)])

    expected = torch.autograd.grad(dense(), (x, w, bias), seed)
    ours = grouped_linear(x, w, torch.tensor(sizes, dtype=torch.int32), bias_eN=bias)
    for found, wanted in zip(torch.autograd.grad(ours, (x, w, bias), seed), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_of_bfloat16_operands_are_rounded_once():
    x, w, _ = (value.requires_grad_() for value in operands(8, torch.bfloat16))
    seed = torch.randn(8, 6)
    found = torch.autograd.grad(grouped_linear(x, w, torch.tensor([3, 0, 4, 1], dtype=torch.int32)), (x, w), seed)
    x32, w32 = x.detach().float().requires_grad_(), w.detach().float().requires_grad_()
    exact = torch.autograd.grad(
        grouped_linear(x32, w32, torch.tensor([3, 0, 4, 1], dtype=torch.int32)), (x32, w32), seed
    )
    for rounded, value in zip(found, exact, strict=True):
        assert torch.equal(rounded, value.bfloat16())


def test_a_plain_product_and_its_gradients_are_unrounded_float32():
    x, w = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    seed = torch.randn(5, 3)
    torch.testing.assert_close(linear(x, w, tensor_cores=True), x @ w.T)
    expected = torch.autograd.grad(x @ w.T, (x, w), seed)
    for found, wanted in zip(torch.autograd.grad(linear(x, w, tensor_cores=True), (x, w), seed), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert linear(x.bfloat16(), w.bfloat16(), tensor_cores=True).dtype == torch.float32


def test_a_cpu_never_goes_through_grouped_mm():
    assert not grouped_mm_fits(torch.zeros(8, 8, dtype=torch.bfloat16), torch.zeros(2, 8, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_reduced_float32_precision_is_suspended_and_restored(precision):
    before = torch.get_float32_matmul_precision()
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    try:
        torch.set_float32_matmul_precision(precision)
        outside = [each.fp32_precision for each in settings]
        with true_float32():
            assert {each.fp32_precision for each in settings} <= {"ieee", "none"}
        assert [each.fp32_precision for each in settings] == outside
        with pytest.raises(KeyError), true_float32():
            raise KeyError
        assert [each.fp32_precision for each in settings] == outside
    finally:
        torch.set_float32_matmul_precision(before)


def test_float32_products_stay_float32_when_the_program_asks_for_less():
    x, w = torch.randn(64, 512), torch.randn(64, 512)
    exact = x.double() @ w.double().T
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        plain = linear(x, w, tensor_cores=True)
        grouped = grouped_linear(x, w[None], torch.tensor([64], dtype=torch.int32))
    finally:
        torch.set_float32_matmul_precision(before)
    for found in (plain, grouped):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
