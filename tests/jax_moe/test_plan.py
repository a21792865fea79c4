"""The sort by expert, checked exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_moe import plan
from jax_moe.kernels.schedule import rows_bound

make = functools.partial(jax.jit, static_argnames="num_local_experts")(plan.make_plan)


def naive(ids, first, local):
    """Rows as a sorted list of (expert, token, slot)."""
    return sorted(
        (expert - first, token, slot)
        for token, row in enumerate(ids)
        for slot, expert in enumerate(row)
        if first <= expert < first + local
    )


def check(ids, first, local):
    ids = np.asarray(ids, np.int32)
    made = jax.tree.map(np.asarray, make(ids, first_expert=first, num_local_experts=local))
    rows, bound = naive(ids.tolist(), first, local), len(ids) * min(ids.shape[1], local)
    pad = [-1] * (bound - len(rows))
    assert made.row_token_R.tolist() == [token for _, token, _ in rows] + pad
    assert made.row_slot_R.tolist() == [slot for _, _, slot in rows] + pad
    assert made.group_sizes_e.tolist() == [sum(row[0] == e for row in rows) for e in range(local)]
    position = np.full(ids.shape, -1)
    for number, (_, token, slot) in enumerate(rows):
        position[token, slot] = number
    assert made.position_tK.tolist() == position.tolist()
    assert {array.dtype for array in jax.tree.leaves(made)} == {np.dtype(np.int32)}


def test_the_documented_example_holds():
    made = plan.make_plan(jnp.array([[5, 0], [4, 5], [8, 8]]), first_expert=4, num_local_experts=2)
    assert made.group_sizes_e.tolist() == [1, 2]
    assert made.row_token_R.tolist() == [1, 0, 1, -1, -1, -1]
    assert made.row_slot_R.tolist() == [0, 0, 1, -1, -1, -1]
    assert made.position_tK.tolist() == [[1, -1], [0, 2], [-1, -1]]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), first=st.sampled_from([0, 2, 6]), padding=st.integers(0, 7))
def test_every_pair_has_its_row(seed, first, padding):
    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(8)[:3] for _ in range(7)])
    ids[rng.permutation(7)[:padding]] = 8
    check(ids, first, 2)


@pytest.mark.parametrize("local", [1, 3, 8])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_any_number_of_tokens_and_local_experts(tokens, local):
    rng = np.random.default_rng(tokens)
    check(np.array([rng.permutation(8)[:4] for _ in range(tokens)]).reshape(tokens, 4), 0, local)


def test_all_tokens_may_want_one_expert():
    check([[3, 0], [3, 1], [3, 2], [3, 4]], 3, 1)


def test_the_sentinel_and_negative_ids_have_no_row():
    check([[8, -1], [-1, 8], [0, 8]], 0, 8)


def test_a_bound_holds_every_row():
    assert rows_bound(5, 3, 8) == 15
    assert rows_bound(5, 3, 2) == 10
