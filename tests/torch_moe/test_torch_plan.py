"""The sort by expert, exactly."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import torch

from torch_moe.plan import make_plan

settings = hypothesis.settings(max_examples=80, deadline=None)


@st.composite
def placements(draw):
    experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, experts))
    tokens = draw(st.integers(0, 9))
    first = draw(st.integers(0, experts - 1))
    held = draw(st.integers(1, experts - first))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.array([rng.permutation(experts)[:top_k] for _ in range(tokens)], np.int32).reshape(tokens, top_k)
    padding = rng.random(tokens) < draw(st.sampled_from([0.0, 0.4]))
    ids[padding] = experts
    return ids, experts, first, held


@settings
@hypothesis.given(placements())
def test_rows_are_sorted_by_expert_then_token_then_slot(placement):
    ids, experts, first, held = placement
    tokens, top_k = ids.shape
    plan = make_plan(torch.from_numpy(ids), num_experts=experts, first_expert=first, local_experts=held)
    pairs = sorted(
        (ids[token, slot] - first, token, slot)
        for token in range(tokens)
        for slot in range(top_k)
        if first <= ids[token, slot] < first + held
    )
    bound = tokens * min(top_k, held)
    past = [-1] * (bound - len(pairs))
    assert plan.row_token.tolist() == [token for _, token, _ in pairs] + past
    assert plan.row_slot.tolist() == [slot for _, _, slot in pairs] + past
    assert plan.group_sizes.tolist() == [sum(expert == g for expert, _, _ in pairs) for g in range(held)]
    expected = np.full((tokens, top_k), -1)
    for row, (_, token, slot) in enumerate(pairs):
        expected[token, slot] = row
    np.testing.assert_array_equal(plan.position, expected)
    assert {part.dtype for part in (plan.row_token, plan.row_slot, plan.group_sizes, plan.position)} == {torch.int32}


@settings
@hypothesis.given(placements(), st.integers(1, 4))
def test_the_ranks_of_a_partition_share_all_pairs_out_once(placement, ranks):
    ids, experts, _, _ = placement
    ids = np.where(ids == experts, experts * ranks, ids)
    plans = [
        make_plan(
            torch.from_numpy(ids), num_experts=experts * ranks, first_expert=rank * experts, local_experts=experts
        )
        for rank in range(ranks)
    ]
    taken = sum((plan.position >= 0).int() for plan in plans)
    np.testing.assert_array_equal(taken, ids < experts * ranks)


def test_ids_outside_the_experts_are_routed_nowhere():
    ids = torch.tensor([[-1, 0], [4, 3], [2**30, -(2**30)]])
    plan = make_plan(ids, num_experts=4, first_expert=0, local_experts=4)
    assert plan.group_sizes.tolist() == [1, 0, 0, 1]
    assert plan.position.tolist() == [[-1, 0], [-1, 1], [-1, -1]]


def test_the_sentinel_of_one_rank_is_no_expert_of_the_last_rank():
    ids = torch.tensor([[8, 7]])
    plan = make_plan(ids, num_experts=8, first_expert=6, local_experts=2)
    assert plan.group_sizes.tolist() == [0, 1]


def test_the_worked_example_of_the_module():
    ids = torch.tensor([[2, 0], [1, 3], [3, 2]])
    plan = make_plan(ids, num_experts=4, first_expert=2, local_experts=2)
    assert plan.row_token.tolist() == [0, 2, 1, 2, -1, -1]
    assert plan.row_slot.tolist() == [0, 1, 1, 0, -1, -1]
    assert plan.group_sizes.tolist() == [2, 2]
    assert plan.position.tolist() == [[0, -1], [-1, 2], [3, 1]]
