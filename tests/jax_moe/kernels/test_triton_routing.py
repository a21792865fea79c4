"""The Triton kernels for routing and rows, run by Pallas's interpreter, against what they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jax_moe.kernels import hopper, reference, schedule, triton_routing, triton_rows
from tests.jax_moe.kernels import triton_module
from tests.jax_moe.kernels.problems import CARDS, card


@pytest.fixture(autouse=True)
def pallas_call(monkeypatch):
    """Pallas calls run in plain JAX; the parameters for a GPU's compiler are dropped. Returns the call as it was."""
    call = pl.pallas_call

    def interpret(*args, compiler_params=None, **options):
        return call(*args, interpret=True, **options)

    monkeypatch.setattr(pl, "pallas_call", interpret)
    return call


def ids_of(tokens, top_k, experts, seed=0):
    """Distinct ids within a token, the sentinel among them."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.stack([rng.permutation(experts + 1)[:top_k] for _ in range(tokens)]), jnp.int32)


BLOCK = triton_routing.BLOCK
PLANS = {  # ids, first expert, experts held
    "one token": (ids_of(1, 8, 128), 0, 128),
    "one pair": (ids_of(1, 1, 4), 0, 4),
    "a rank's part": (ids_of(37, 6, 60), 20, 20),
    "fewer experts than a token chooses": (ids_of(75, 6, 12), 4, 3),
    "five blocks": (ids_of(5 * BLOCK // 4 - 1, 4, 24), 8, 8),
    "blocks and a part of a word": (ids_of(3 * BLOCK + 7, 1, 9), 0, 9),
    "a pair less than a block": (ids_of(BLOCK - 1, 1, 5), 0, 5),
    "a block": (ids_of(BLOCK // 2, 2, 64), 0, 64),
    "a pair more than a block": (ids_of(BLOCK + 1, 1, 5), 1, 4),
    "one expert": (ids_of(BLOCK + 40, 1, 1), 0, 1),
    "experts past a power of two": (ids_of(90, 3, 257), 0, 257),
    "every token in one expert": (jnp.full((2 * BLOCK + 3, 1), 5, jnp.int32), 3, 4),
    "nobody here": (jnp.full((BLOCK + 3, 2), 16, jnp.int32), 0, 16),
    "ids that no rank has": (jnp.asarray([[-1, 2**31 - 1], [-(2**31), 3], [2, -5]], jnp.int32), 2, 2),
}


@pytest.fixture(params=["one pass", "three passes"])
def passes(request, monkeypatch):
    one = request.param == "one pass"
    monkeypatch.setattr(triton_routing, "SMALL", 10**6 if one else 0)
    return 1 if one else 3


@pytest.mark.parametrize("kind", PLANS)
def test_pairs_get_the_rows_of_a_stable_sort(passes, kind):
    ids, first, held = PLANS[kind]
    got = jax.jit(functools.partial(triton_routing.plan_pairs, experts=held))(ids, first)
    for a, b in zip(got, reference.plan_rows(ids, first, held), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("kind", PLANS)
def test_the_modules_a_card_would_get_make_the_same_plan(monkeypatch, pallas_call, triton_modules, passes, kind):
    monkeypatch.setattr(pl, "pallas_call", pallas_call)
    ids, first, held = PLANS[kind]
    plan = functools.partial(triton_routing.plan_pairs, experts=held)
    with card(CARDS["H100"]):
        jax.jit(plan).trace(ids, first).lower(lowering_platforms=("cuda",))
    *count_and_scan, place = triton_modules
    assert len(triton_modules) == passes

    want = [np.asarray(a).reshape(-1) for a in reference.plan_rows(ids, first, held)]
    given = [ids.reshape(-1), jnp.asarray([first], jnp.int32)]
    if not count_and_scan:
        got = triton_module.run(place, given, want)
    else:
        blocks, (count, scan) = pl.cdiv(ids.size, BLOCK), count_and_scan
        position, sizes, pair = want
        table = lambda experts: jax.ShapeDtypeStruct((experts, blocks), np.dtype(np.int32))  # noqa: E731
        (up_to,) = triton_module.run(count, given, [table(held)])
        first_row, sizes = triton_module.run(scan, [up_to], [table(held + 1), sizes])
        position, pair = triton_module.run(place, [*given, first_row], [position, pair])
        got = position, sizes, pair
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_batch_of_plans_is_the_plan_of_each():
    ids = jnp.stack([ids_of(30, 4, 12, seed) for seed in range(3)])
    got = jax.vmap(functools.partial(hopper.plan_rows, num_local_experts=3), (0, None))(ids, 6)
    for i in range(3):
        for a, b in zip(got, reference.plan_rows(ids[i], 6, 3), strict=True):
            np.testing.assert_array_equal(a[i], b)


# Experts, experts a token, groups, groups kept: no power of two, all experts, groups of one, odd groups, DeepSeek's.
RULES = [(60, 6, 1, 1), (128, 8, 1, 1), (5, 5, 1, 1), (8, 2, 8, 3), (40, 6, 8, 3), (12, 4, 4, 2), (256, 8, 8, 4)]


def draws(tokens, experts, seed=1):
    """Logits with rows of ties, and (bias, logits) pairs: none; a drawn one; zeros, under which groups tie as well."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((tokens, experts)).astype(np.float32)
    logits[-1] = 0.0  # all equal: the lowest indices
    coarse = np.round(logits)
    bias = jnp.asarray(rng.standard_normal(experts) / 8, jnp.float32)
    return [(jnp.asarray(a), b) for a, b in ((logits, None), (logits, bias), (coarse, None), (coarse, 0 * bias))]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_choice_of_experts_is_the_reference_s(scoring, rule):
    experts, top_k, num_groups, kept = rule
    options = {"num_groups": num_groups, "groups_kept": kept}
    for logits, bias in draws(17, experts):
        ids, weights = triton_routing.choose_experts(
            logits, bias, top_k=top_k, scoring=scoring, renormalize=True, scaling=2.5, **options
        )
        want_ids, want_weights = reference.choose_experts(logits, bias, top_k, scoring, True, 2.5, **options)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_allclose(weights, want_weights, rtol=2e-6)


@pytest.mark.parametrize(("rule", "tokens"), [*zip(RULES, (1, 16, 2, 5, 16, 11, 3), strict=True)], ids=str)
def test_one_launch_routes_few_tokens(rule, tokens):
    experts, top_k, num_groups, kept = rule
    options = {"top_k": top_k, "scoring": "sigmoid", "renormalize": True, "num_groups": num_groups, "groups_kept": kept}
    for logits, bias in draws(tokens, experts, seed=tokens)[1::2]:
        ids, weights, position, work = triton_routing.route(logits, bias, **options)
        want_ids, want_weights = reference.choose_experts(logits, bias, scaling=1.0, **options)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_allclose(weights, want_weights, rtol=2e-6)
        want_position, sizes, _ = (np.asarray(a) for a in reference.plan_rows(want_ids, 0, experts))
        np.testing.assert_array_equal(position, want_position)
        busy, start = np.flatnonzero(sizes), np.cumsum(sizes) - sizes
        bits = [sum(1 << int(t) for t in np.flatnonzero((np.asarray(want_ids) == e).any(axis=1))) for e in busy]
        want = [[e, i, 1, start[e], sizes[e], len(busy), bits[i], 0] for i, e in enumerate(busy)]
        np.testing.assert_array_equal(work.reshape(-1, schedule.FIELDS)[: len(busy)], want)


def test_keys_are_in_the_order_of_their_values_and_any_nan_is_the_highest():
    values = np.float32([-np.inf, -2, -1, -1e-40, 0, 1e-40, 1, np.inf])
    keys = np.asarray(triton_routing._ordered(jnp.asarray(values)))
    assert (np.diff(keys) > 0).all()
    assert keys[0] > triton_routing.LOWEST
    nans = np.uint32([0x7FC00000, 0xFFC00000, 0xFFFFFFFF]).view(np.float32)
    assert (np.asarray(triton_routing._ordered(jnp.asarray(nans))) == triton_routing.HIGHEST).all()


def test_a_row_of_nan_chooses_distinct_experts_and_leaves_the_other_rows_alone():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, 12)), jnp.float32)
    options = {"top_k": 4, "scoring": "softmax"}
    want = triton_routing.route(logits, None, **options)
    got = triton_routing.route(logits.at[1].set(jnp.nan), None, **options)
    np.testing.assert_array_equal(got[0][1], [0, 1, 2, 3])
    for a, b in zip(got[:2], want[:2], strict=True):
        np.testing.assert_array_equal(a[::2], b[::2])


@pytest.mark.parametrize("sizes", [[5, 0, 3, 0, 300], [0, 0, 0], [1] * 40])
def test_one_launch_makes_the_same_schedule(sizes):
    sizes, rows = jnp.asarray(sizes, jnp.int32), sum(sizes) + 130
    got = triton_routing.make_schedule(sizes, rows=rows, tile=128).reshape(-1, schedule.FIELDS)
    want = schedule.make_schedule(sizes, rows=rows, tile=128).reshape(-1, schedule.FIELDS)
    total = int(want[0, 5])
    np.testing.assert_array_equal(got[:total, :6], want[:total, :6])


def test_rows_are_spread_gathered_and_combined_as_the_reference_does():
    ids = ids_of(13, 4, 10)
    position, sizes, pair = reference.plan_rows(ids, 2, 5)
    rows, width = 13 * 4, 72
    x = jax.random.normal(jax.random.key(0), (13, width), jnp.bfloat16)
    index = jnp.where(pair < 0, -1, pair // 4)
    want = reference.gather_rows(x, index)
    np.testing.assert_array_equal(triton_rows.spread_rows(x, position, sizes, rows=rows, chunk=64), want)
    np.testing.assert_array_equal(triton_rows.gather_rows(x, index, chunk=64), want)
    weights = jnp.where(position >= 0, jax.random.normal(jax.random.key(1), (13, 4)), jnp.nan)
    got = triton_rows.combine_rows(want, position, weights, chunk=64)
    np.testing.assert_allclose(got, reference.combine_rows(want, position, weights), rtol=1e-6, atol=1e-6)
