"""The Triton kernels for routing and rows, run by Pallas's interpreter, against what they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jax_moe.kernels import reference, schedule, triton_routing, triton_rows


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Pallas calls run in plain JAX; the parameters for a GPU's compiler are dropped."""
    call = pl.pallas_call

    def interpret(*args, compiler_params=None, **options):
        return call(*args, interpret=True, **options)

    monkeypatch.setattr(pl, "pallas_call", interpret)


def ids_of(tokens, top_k, experts, seed=0):
    """Distinct ids within a token, the sentinel among them."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.stack([rng.permutation(experts + 1)[:top_k] for _ in range(tokens)]), jnp.int32)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "first", "held"),
    [(1, 8, 128, 0, 128), (37, 6, 60, 20, 20), (600, 4, 24, 8, 8)],
    ids=["one token", "a rank's part", "more pairs than one pass counts"],
)
def test_pairs_get_the_rows_of_a_stable_sort(tokens, top_k, experts, first, held):
    ids = ids_of(tokens, top_k, experts)
    position, sizes = jax.jit(functools.partial(triton_routing.plan_pairs, experts=held))(ids, first)
    want_position, want_sizes = reference.plan_rows(ids, first, held)
    np.testing.assert_array_equal(position, want_position)
    np.testing.assert_array_equal(sizes, want_sizes)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("experts", "top_k"), [(60, 6), (128, 8)])
def test_the_choice_of_experts_is_the_reference_s(scoring, experts, top_k):
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((17, experts)).astype(np.float32)
    logits[3] = 0.0  # all equal: the lowest indices
    bias = jnp.asarray(rng.standard_normal(experts) / 8, jnp.float32)
    for b in (None, bias):
        ids, weights = triton_routing.choose_experts(
            jnp.asarray(logits), b, top_k=top_k, scoring=scoring, renormalize=True, scaling=2.5
        )
        want_ids, want_weights = reference.choose_experts(jnp.asarray(logits), b, top_k, scoring, True, 2.5)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_allclose(weights, want_weights, rtol=2e-6)


@pytest.mark.parametrize("sizes", [[5, 0, 3, 0, 300], [0, 0, 0], [1] * 40])
def test_one_launch_makes_the_same_schedule(sizes):
    sizes, rows = jnp.asarray(sizes, jnp.int32), sum(sizes) + 130
    got = triton_routing.make_schedule(sizes, rows=rows, tile=128).reshape(-1, schedule.FIELDS)
    want = schedule.make_schedule(sizes, rows=rows, tile=128).reshape(-1, schedule.FIELDS)
    total = int(want[0, 5])
    np.testing.assert_array_equal(got[:total, :6], want[:total, :6])


def test_rows_are_spread_gathered_and_combined_as_the_reference_does():
    ids = ids_of(13, 4, 10)
    position, sizes = reference.plan_rows(ids, 2, 5)
    rows, width = 13 * 4, 72
    x = jax.random.normal(jax.random.key(0), (13, width), jnp.bfloat16)
    pair = jnp.arange(rows, dtype=jnp.int32)
    index = (
        jnp.full((rows,), -1, jnp.int32)
        .at[jnp.where(position >= 0, position, rows).reshape(-1)]
        .set(pair // 4, mode="drop")
    )
    want = reference.gather_rows(x, index)
    np.testing.assert_array_equal(triton_rows.spread_rows(x, position, sizes, rows=rows, chunk=64), want)
    np.testing.assert_array_equal(triton_rows.gather_rows(x, index, chunk=64), want)
    weights = jnp.where(position >= 0, jax.random.normal(jax.random.key(1), (13, 4)), jnp.nan)
    got = triton_rows.combine_rows(want, position, weights, chunk=64)
    np.testing.assert_allclose(got, reference.combine_rows(want, position, weights), rtol=1e-6, atol=1e-6)
