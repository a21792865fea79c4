"""Transports move rows exactly, agree with each other, and weigh in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_moe as jm
from jax_moe import transport

EXPERTS, WIDTH, TOP_K = 8, 4, 3


def tokens(count, seed=0):
    """Whole numbers, which every sum here holds exactly; ids distinct, some tokens padding; weights powers of two."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-8, 9, (count, WIDTH)).astype(np.float32)
    ids = np.array([rng.permutation(EXPERTS)[:TOP_K] for _ in range(count)], np.int32)
    weights = 2.0 ** -rng.integers(0, 3, (count, TOP_K)).astype(np.float32)
    padding = rng.random(count) < 0.3
    ids[padding], weights[padding] = EXPERTS, 0
    return x, ids, weights


def expected(x, ids, weights):
    """Expert e multiplies its rows by e + 1."""
    return np.einsum("tk,tk,td->td", weights * (ids < EXPERTS), ids + 1.0, x)


def apply_experts(rows, handle, first):
    expert = jnp.repeat(
        jnp.arange(len(handle.plan.group_sizes_e)), handle.plan.group_sizes_e, total_repeat_length=len(rows)
    )
    return rows * (first + expert + 1.0)[:, None]


@pytest.mark.parametrize("weight_on_input", [False, True])
def test_local_brings_rows_and_takes_back_sums_exactly(weight_on_input):
    x, ids, weights = tokens(9)
    rows, handle = transport.local.dispatch(
        jnp.asarray(x),
        jnp.asarray(ids),
        jnp.asarray(weights),
        num_local_experts=EXPERTS,
        weight_on_input=weight_on_input,
    )
    plan = handle.plan
    for r, (token, slot) in enumerate(zip(plan.row_token_R.tolist(), plan.row_slot_R.tolist(), strict=True)):
        weight = weights[token, slot] if weight_on_input else 1.0
        np.testing.assert_array_equal(rows[r], x[token] * weight if token >= 0 else np.zeros(WIDTH), err_msg=f"row {r}")
    np.testing.assert_array_equal(
        transport.local.combine(apply_experts(rows, handle, 0), handle), expected(x, ids, weights)
    )


@pytest.mark.parametrize(("dp", "tp", "axes"), [(4, 1, ("dp",)), (2, 2, ("dp", "tp")), (1, 2, ("tp",))])
def test_allgather_gives_every_rank_the_rows_of_its_experts_and_every_token_its_sum(dp, tp, axes):
    mesh = jm.make_mesh(jm.ParallelConfig(dp=dp, tp=tp))
    ranks, local = dp * tp, EXPERTS // (dp * tp)
    x, ids, weights = tokens(5 * ranks)

    def step(x, ids, weights):
        first = (jax.lax.axis_index("dp") * tp + jax.lax.axis_index("tp")) * local
        rows, handle = transport.allgather.dispatch(
            x, ids, weights, axes=axes, first_expert=first, num_local_experts=local
        )
        return rows, handle.plan, transport.allgather.combine(apply_experts(rows, handle, first), handle)

    spec = P(("dp", "tp"))
    rows, plan, y = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(spec, spec, spec), out_specs=(spec, spec, spec), check_vma=False)
    )(x, ids, weights)
    np.testing.assert_array_equal(y, expected(x, ids, weights))
    wanted = sorted((e, t) for t, row in enumerate(ids) for e in row if e < EXPERTS)
    row_token = np.asarray(plan.row_token_R).reshape(ranks, -1)
    for rank in range(ranks):
        mine = [t for e, t in wanted if e // local == rank]
        assert row_token[rank].tolist() == mine + [-1] * (row_token.shape[1] - len(mine))
    real = row_token.reshape(-1) >= 0
    np.testing.assert_array_equal(np.asarray(rows)[real], x[row_token.reshape(-1)[real]])
    assert not np.asarray(rows)[~real].any()


def test_a_weighted_input_row_is_rounded_once_from_float32():
    x = jnp.asarray([[1.0 + 2**-7, 3.0]], jnp.bfloat16)
    weights = jnp.asarray([[0.3]], jnp.float32)
    rows, handle = transport.local.dispatch(x, jnp.array([[0]]), weights, num_local_experts=1, weight_on_input=True)
    np.testing.assert_array_equal(rows, (x.astype(jnp.float32) * 0.3).astype(jnp.bfloat16))
    assert handle.weights_nK.tolist() == [[1.0]]


def test_with_one_rank_allgather_is_local():
    x, ids, weights = (jnp.asarray(a) for a in tokens(6))
    one, _ = transport.local.dispatch(x, ids, weights, num_local_experts=EXPERTS)
    other, handle = transport.allgather.dispatch(x, ids, weights, axes=(), first_expert=0, num_local_experts=EXPERTS)
    np.testing.assert_array_equal(one, other)
    assert handle.axes == ()
