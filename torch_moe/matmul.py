"""Products with weights as checkpoints store them, `x @ w.T`, accumulated in float32, and their gradients.

Shapes: `t` tokens, `R` rows sorted by expert, `e` experts here, `M` columns in, `N` columns out.

How bfloat16 is multiplied depends on the device. On CUDA the tensor cores accumulate in float32. On a CPU both operands
are raised to float32 first, which is exact, and several times faster than the CPU's bfloat16 product. float32 is always
true float32: settings that would let a backend use TF32 or bfloat16 for it are suspended around each product.
"""

# The decorator that forbids a second derivative hides the signature of `backward`.
# pyright: reportIncompatibleMethodOverride=false

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from torch_moe._typing import Float, Float32, Int32, Tensor

# grouped_mm reads through descriptors whose strides are whole multiples of this many bytes.
GROUPED_MM_ALIGNMENT = 16


@contextlib.contextmanager
def true_float32() -> Iterator[None]:
    """Products of float32 inside are float32: no TF32 on CUDA, no reduced precision on the CPU."""
    # Only what is really reduced is touched: the setting is global, and most programs never change it.
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    reduced = [(each, each.fp32_precision) for each in settings if each.fp32_precision not in ("none", "ieee")]
    try:
        for each, _ in reduced:
            each.fp32_precision = "ieee"
        yield
    finally:
        for each, precision in reduced:
            each.fp32_precision = precision


def _product(a: Tensor, b: Tensor, *, tensor_cores: bool) -> Tensor:
    """a @ b in float32, through bfloat16 tensor cores where that is asked for and there are some."""
    if tensor_cores and a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    with true_float32():
        return a.float() @ b.float()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_tM: Tensor, w_NM: Tensor, tensor_cores: bool) -> Tensor:
        ctx.save_for_backward(x_tM, w_NM)
        ctx.tensor_cores = tensor_cores
        return _product(x_tM, w_NM.T, tensor_cores=tensor_cores)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_tN: Tensor):
        x_tM, w_NM = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.tensor_cores and grad_tN.is_cuda:
            grad_tN = grad_tN.to(x_tM.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad_tN, w_NM, tensor_cores=ctx.tensor_cores).to(x_tM.dtype)
        if ctx.needs_input_grad[1]:
            grad_w = _product(grad_tN.T, x_tM, tensor_cores=ctx.tensor_cores).to(w_NM.dtype)
        return grad_x, grad_w, None


def linear(x_tM: Float[Tensor, "t M"], w_NM: Float[Tensor, "N M"], *, tensor_cores: bool) -> Float32[Tensor, "t N"]:
    """x @ w.T, accumulated in float32 and not rounded.

    Args:
        x_tM: (t, M), bfloat16 or float32.
        w_NM: (N, M).
        tensor_cores: whether bfloat16 operands may go to CUDA's tensor cores. The router says no: it wants the product
            of a float32 kernel.

    Returns:
        (t, N) float32.
    """
    return _Linear.apply(x_tM, w_NM, tensor_cores)


def grouped_mm_fits(x_RM: Tensor, w_eNM: Tensor) -> bool:
    """Whether `torch.nn.functional.grouped_mm` takes these operands: bfloat16 on CUDA, rows of whole 16 bytes."""
    aligned = all(size * x_RM.element_size() % GROUPED_MM_ALIGNMENT == 0 for size in w_eNM.shape[1:])
    return x_RM.is_cuda and x_RM.dtype == w_eNM.dtype == torch.bfloat16 and aligned


def _forward_by_expert(x_RM: Tensor, w_eNM: Tensor, sizes: list[int]) -> Tensor:
    out_RN = x_RM.new_zeros(x_RM.shape[0], w_eNM.shape[1], dtype=torch.float32)
    start = 0
    with true_float32():
        for expert, size in enumerate(sizes):
            if size:
                rows = slice(start, start + size)
                torch.mm(x_RM[rows].float(), w_eNM[expert].float().T, out=out_RN[rows])
            start += size
    return out_RN


def _backward_by_expert(grad_RN: Tensor, x_RM: Tensor, w_eNM: Tensor, sizes: list[int], needs: tuple[bool, ...]):
    grad_x = torch.zeros_like(x_RM) if needs[0] else None
    grad_w = torch.zeros_like(w_eNM) if needs[1] else None
    start = 0
    with true_float32():
        for expert, size in enumerate(sizes):
            rows = slice(start, start + size)
            start += size
            if size and grad_x is not None:
                grad_x[rows] = grad_RN[rows] @ w_eNM[expert].float()
            if size and grad_w is not None:
                grad_w[expert] = grad_RN[rows].T @ x_RM[rows].float()
    return grad_x, grad_w


def _backward_grouped(grad_RN: Tensor, x_RM: Tensor, w_eNM: Tensor, ends_e: Tensor, needs: tuple[bool, ...]):
    grad_RN = grad_RN.to(x_RM.dtype).contiguous()
    grad_x = F.grouped_mm(grad_RN, w_eNM, offs=ends_e) if needs[0] else None
    # The ragged dimension is the one that is summed over: both operands are read along rows, so that any group may
    # start at any row without breaking the alignment.
    grad_w = F.grouped_mm(grad_RN.T, x_RM, offs=ends_e) if needs[1] else None
    return grad_x, grad_w


def _expert_of_row(ends_e: Tensor, rows: int) -> Tensor:
    """(R,) which expert each row belongs to; rows past the last group get e."""
    return torch.searchsorted(ends_e, torch.arange(rows, device=ends_e.device, dtype=ends_e.dtype), right=True)


def _clear_past(out_RN: Tensor, ends_e: Tensor, num_rows: int | None) -> None:
    """Zeros in rows past the last group, whose end the host may not know."""
    if num_rows is not None:
        out_RN[num_rows:].zero_()
        return
    row_R = torch.arange(out_RN.shape[0], device=ends_e.device, dtype=ends_e.dtype)
    out_RN.masked_fill_((row_R >= ends_e[-1])[:, None], 0)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RM: Tensor, w_eNM: Tensor, bias_eN: Tensor | None, group_sizes_e: Tensor, num_rows: int | None):
        ends_e = group_sizes_e.cumsum(0, dtype=torch.int32)
        ctx.grouped = grouped_mm_fits(x_RM, w_eNM) and x_RM.shape[0] > 0
        if ctx.grouped:
            out_RN = F.grouped_mm(x_RM.contiguous(), w_eNM.transpose(1, 2), offs=ends_e).float()
        else:
            # Rows that are ordinary matrices to any backend, at the price of knowing the group sizes on the host.
            ctx.sizes = group_sizes_e.tolist()
            num_rows = sum(ctx.sizes)
            out_RN = _forward_by_expert(x_RM, w_eNM, ctx.sizes)
        if bias_eN is not None:
            expert_R = _expert_of_row(ends_e, x_RM.shape[0]).clamp_(max=bias_eN.shape[0] - 1)
            out_RN += bias_eN.float()[expert_R]
        _clear_past(out_RN, ends_e, num_rows)
        ctx.num_rows = num_rows
        ctx.save_for_backward(x_RM, w_eNM, ends_e)
        ctx.bias = None if bias_eN is None else (bias_eN.shape[0], bias_eN.dtype)
        return out_RN

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RN: Tensor):
        x_RM, w_eNM, ends_e = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if ctx.grouped:
            grad_x, grad_w = _backward_grouped(grad_RN, x_RM, w_eNM, ends_e, needs[:2])
            if grad_x is not None:
                _clear_past(grad_x, ends_e, ctx.num_rows)
        else:
            grad_x, grad_w = _backward_by_expert(grad_RN, x_RM, w_eNM, ctx.sizes, needs[:2])
        grad_bias = None
        if ctx.bias is not None and needs[2]:
            experts, dtype = ctx.bias
            # A product with the one-hot membership sums in a fixed order, where a scatter-add would race.
            member_Re = F.one_hot(_expert_of_row(ends_e, grad_RN.shape[0]).long(), experts + 1)[:, :experts]
            with true_float32():
                grad_bias = (member_Re.T.float() @ grad_RN).to(dtype)
        return grad_x, grad_w, grad_bias, None, None


def grouped_linear(
    x_RM: Float[Tensor, "R M"],
    w_eNM: Float[Tensor, "e N M"],
    group_sizes_e: Int32[Tensor, " e"],
    *,
    bias_eN: Float[Tensor, "e N"] | None = None,
    num_rows: int | None = None,
) -> Float32[Tensor, "R N"]:
    """Each run of rows times its own expert's weights: x[rows of g] @ w[g].T + bias[g].

    bfloat16 on CUDA goes through `torch.nn.functional.grouped_mm`, which hands back bfloat16; everything else, and
    sizes that `grouped_mm_fits` refuses, is multiplied expert by expert and comes back unrounded.

    Args:
        x_RM: (R, M) rows sorted by expert.
        w_eNM: (e, N, M).
        group_sizes_e: (e,) int32, rows of each expert, in order, from row 0 on.
        bias_eN: (e, N), added in float32.
        num_rows: the sum of `group_sizes_e` where the host knows it; with None it stays on the device.

    Returns:
        (R, N) float32. Rows past the last group are zeros, whatever `x_RM` holds there.
    """
    return _GroupedLinear.apply(x_RM, w_eNM, bias_eN, group_sizes_e, num_rows)
