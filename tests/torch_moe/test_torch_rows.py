"""Rows move exactly, absent ones are zeros, and gradients are those of plain indexing."""

import pytest
import torch

from torch_moe.plan import make_plan
from torch_moe.rows import combine_rows, gather_rows, gather_weights


def plan_of(tokens=6, experts=5, top_k=3, first=1, held=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    return make_plan(ids, num_experts=experts, first_expert=first, local_experts=held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_rows_are_the_tokens_and_zeros_past_the_last(dtype):
    plan = plan_of()
    x = torch.randn(6, 4).to(dtype)
    rows = gather_rows(x, plan.row_token, plan.position)
    assert rows.dtype == dtype
    for row, token in enumerate(plan.row_token.tolist()):
        assert torch.equal(rows[row], x[token] if token >= 0 else torch.zeros(4, dtype=dtype)), f"row {row}"


def test_absent_rows_bring_nothing_even_where_row_zero_is_infinite():
    plan = plan_of()
    x = torch.full((6, 4), float("inf"))
    assert not gather_rows(x, plan.row_token, plan.position)[plan.row_token < 0].any()
    y = torch.full((plan.row_token.shape[0], 4), float("nan"))
    total = combine_rows(y, torch.ones(6, 3), plan.row_token, plan.row_slot, torch.full_like(plan.position, -1))
    assert torch.equal(total, torch.zeros(6, 4))


def test_a_weight_without_a_row_may_be_anything():
    plan = plan_of()
    weights = torch.where(plan.position >= 0, 1.0, float("nan"))
    y = torch.ones(plan.row_token.shape[0], 4)
    total = combine_rows(y, weights, plan.row_token, plan.row_slot, plan.position)
    assert torch.equal(total[:, 0], (plan.position >= 0).sum(-1).float())


def test_combined_rows_are_the_weighted_sum_slot_after_slot():
    plan = plan_of()
    y, weights = torch.randn(plan.row_token.shape[0], 4), torch.randn(6, 3)
    found = combine_rows(y, weights, plan.row_token, plan.row_slot, plan.position)
    for token in range(6):
        expected = torch.zeros(4)
        for slot, row in enumerate(plan.position[token].tolist()):
            if row >= 0:
                expected = expected + y[row] * weights[token, slot]
        assert torch.equal(found[token], expected), f"token {token}"


def test_no_tokens_and_no_rows_are_fine():
    none = torch.empty(0, 2, dtype=torch.int32)
    plan = make_plan(none, num_experts=3, first_expert=0, local_experts=3)
    assert gather_rows(torch.empty(0, 4), plan.row_token, plan.position).shape == (0, 4)
    assert combine_rows(torch.empty(0, 4), torch.empty(0, 2), plan.row_token, plan.row_slot, plan.position).shape == (
        0,
        4,
    )
    nowhere = make_plan(torch.full((5, 2), 3), num_experts=3, first_expert=0, local_experts=3).trimmed(0)
    total = combine_rows(torch.empty(0, 4), torch.ones(5, 2), nowhere.row_token, nowhere.row_slot, nowhere.position)
    assert torch.equal(total, torch.zeros(5, 4))


def test_gradients_are_those_of_plain_indexing():
    plan = plan_of()
    used = plan.trimmed(int(plan.group_sizes.sum()))
    x, weights = torch.randn(6, 4, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    token, slot = used.row_token.long(), used.row_slot.long()
    seed = torch.randn(6, 4)

    def ours():
        rows = gather_rows(x, used.row_token, used.position)
        rows = rows * gather_weights(weights, used.row_token, used.row_slot, used.position)[:, None]
        return combine_rows(rows.sin(), weights, used.row_token, used.row_slot, used.position)

    def plain():
        rows = x[token] * weights[token, slot][:, None]
        return torch.zeros(6, 4).index_add(0, token, rows.sin() * weights[token, slot][:, None])

    torch.testing.assert_close(ours(), plain())
    expected = torch.autograd.grad(plain(), (x, weights), seed)
    for found, wanted in zip(torch.autograd.grad(ours(), (x, weights), seed), expected, strict=True):
        torch.testing.assert_close(found, wanted)
