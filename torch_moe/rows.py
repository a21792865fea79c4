"""Moving rows between tokens and experts, both ways, with gradients that never race.

Shapes: `t` tokens, `R` rows, `K` slots of a token, `W` width. Each direction's gradient is a gather with the other's
index, so nothing is ever scattered with atomics and a repeated run is bitwise equal.

Worked example, t=3, K=2, this rank's rows:

    row       0  1  2          position  slot 0  slot 1
    token     0  2  1          token 0      0      -1      (its other expert lives elsewhere)
    slot      0  1  1          token 1     -1       2
                               token 2     -1       1
"""

# The decorator that forbids a second derivative hides the signature of `backward`.
# pyright: reportIncompatibleMethodOverride=false

import torch
from torch.autograd.function import once_differentiable

from torch_moe._typing import Float, Float32, Int32, Tensor


def _take(x_tW: Tensor, index_R: Tensor) -> Tensor:
    """x[index], zeros where the index is -1."""
    if x_tW.shape[0] == 0:
        return x_tW.new_zeros(index_R.shape[0], *x_tW.shape[1:])
    absent_R = (index_R < 0).view(-1, *[1] * (x_tW.dim() - 1))
    return x_tW.index_select(0, index_R.clamp(min=0)).masked_fill_(absent_R, 0)


def _sum_slots(rows_RW: Tensor, position_tK: Tensor, weight_tK: Tensor | None) -> Tensor:
    """(t, W) float32: each token's rows, weighted, added slot after slot."""
    total_tW = rows_RW.new_zeros(position_tK.shape[0], *rows_RW.shape[1:], dtype=torch.float32)
    for slot in range(position_tK.shape[1]):
        part_tW = _take(rows_RW, position_tK[:, slot]).float()
        if weight_tK is None:
            total_tW += part_tW
        else:
            # A weight without a row may be anything; its product with the zero row must still be zero.
            here_t = position_tK[:, slot] >= 0
            total_tW += part_tW * torch.where(here_t, weight_tK[:, slot], 0.0)[:, None]
    return total_tW


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_tW: Tensor, row_token_R: Tensor, position_tK: Tensor) -> Tensor:
        ctx.save_for_backward(position_tK)
        ctx.dtype = x_tW.dtype
        return _take(x_tW, row_token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RW: Tensor):
        (position_tK,) = ctx.saved_tensors
        return _sum_slots(grad_RW, position_tK, None).to(ctx.dtype), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RW: Tensor, row_token_R: Tensor, position_tK: Tensor) -> Tensor:
        ctx.save_for_backward(row_token_R)
        ctx.dtype = rows_RW.dtype
        return _sum_slots(rows_RW, position_tK, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_tW: Tensor):
        (row_token_R,) = ctx.saved_tensors
        return _take(grad_tW, row_token_R).to(ctx.dtype), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RW, weight_tK, row_token_R, row_slot_R, position_tK) -> Tensor:
        ctx.save_for_backward(y_RW, weight_tK, row_token_R, row_slot_R, position_tK)
        return _sum_slots(y_RW, position_tK, weight_tK)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_tW: Tensor):
        y_RW, weight_tK, row_token_R, row_slot_R, position_tK = ctx.saved_tensors
        grad_row_RW = _take(grad_tW, row_token_R)
        grad_y = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight_R = (grad_row_RW * y_RW.float()).sum(-1)
            grad_weight = _take(grad_weight_R, position_tK.flatten()).view_as(weight_tK)
        if ctx.needs_input_grad[0]:
            grad_y = (grad_row_RW * pick_weights(weight_tK, row_token_R, row_slot_R)[:, None]).to(y_RW.dtype)
        return grad_y, grad_weight, None, None, None


class _PickWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_tK, row_token_R, row_slot_R, position_tK) -> Tensor:
        ctx.save_for_backward(position_tK)
        return pick_weights(weight_tK, row_token_R, row_slot_R)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_R: Tensor):
        (position_tK,) = ctx.saved_tensors
        return _take(grad_R, position_tK.flatten()).view_as(position_tK), None, None, None


def pick_weights(weight_tK: Tensor, row_token_R: Tensor, row_slot_R: Tensor) -> Tensor:
    """(R,) the weight of each row's token and slot, 0 past the last row."""
    flat_R = torch.where(row_token_R >= 0, row_token_R * weight_tK.shape[1] + row_slot_R, -1)
    return _take(weight_tK.reshape(-1), flat_R)


def gather_rows(x_tW: Tensor, row_token_R: Int32[Tensor, " R"], position_tK: Int32[Tensor, "t K"]) -> Tensor:
    """The row of each token-expert pair.

    Args:
        x_tW: (t, W) tokens, or any value of each: (t, ...) of any dtype.
        row_token_R: (R,) int32, the token of each row, -1 for none.
        position_tK: (t, K) int32, the inverse: the row of each token's slot, -1 for none. The gradient uses it.

    Returns:
        (R, W) in the dtype of x; zeros where there is no token.
    """
    return _Gather.apply(x_tW, row_token_R, position_tK)


def sum_rows(
    rows_RW: Float[Tensor, "R W"], row_token_R: Int32[Tensor, " R"], position_tK: Int32[Tensor, "t K"]
) -> Float32[Tensor, "t W"]:
    """Adds up each token's rows in float32, slot 0 first: `combine_rows` with weights of one.

    Args:
        rows_RW: (R, W).
        row_token_R: (R,) int32, -1 for none. The gradient uses it.
        position_tK: (t, K) int32, -1 where a slot has no row.

    Returns:
        (t, W) float32; a token without rows gets zeros.
    """
    return _Sum.apply(rows_RW, row_token_R, position_tK)


def gather_weights(
    weight_tK: Float32[Tensor, "t K"],
    row_token_R: Int32[Tensor, " R"],
    row_slot_R: Int32[Tensor, " R"],
    position_tK: Int32[Tensor, "t K"],
) -> Float32[Tensor, " R"]:
    """The router's weight of each row, 0 past the last row."""
    return _PickWeights.apply(weight_tK, row_token_R, row_slot_R, position_tK)


def combine_rows(
    y_RW: Float[Tensor, "R W"],
    weight_tK: Float32[Tensor, "t K"],
    row_token_R: Int32[Tensor, " R"],
    row_slot_R: Int32[Tensor, " R"],
    position_tK: Int32[Tensor, "t K"],
) -> Float32[Tensor, "t W"]:
    """Adds up each token's rows by the router's weights, in float32, slot 0 first.

    Args:
        y_RW: (R, W) results, row by row.
        weight_tK: (t, K) float32.
        row_token_R: (R,) int32, -1 for none.
        row_slot_R: (R,) int32.
        position_tK: (t, K) int32, -1 where a slot has no row here.

    Returns:
        (t, W) float32; a token without rows gets zeros.
    """
    return _Combine.apply(y_RW, weight_tK, row_token_R, row_slot_R, position_tK)
