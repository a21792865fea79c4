import numpy as np
import pytest

from parity.arrays import bits_of_float32, float32_of_bits
from parity.case import Case
from parity.oracle.network import activation
from parity.oracle.value import Value
from parity.tolerance import RMS, SIGMAS, SLACK, ErrorModel, Errors, bound, element_bound


def test_one_rounding_costs_what_the_constant_says():
    values = np.exp2(np.random.default_rng(0).uniform(0, 8, 200_000)).astype(np.float32)
    relative = (float32_of_bits(bits_of_float32(values)) - values) / values
    assert np.sqrt(np.mean(relative.astype(float) ** 2)) / ErrorModel("bf16").u == pytest.approx(RMS, rel=0.02)


def equal(count, freedom=None):
    """Errors of `count` equal variances, in one row."""
    return Errors.of(np.ones((1, count)), freedom or count)


@pytest.mark.parametrize("count", [1, 4, 32, 256, 4096])
def test_a_bound_covers_chance_and_narrows_with_numbers(count):
    if count <= 256:
        draws = np.random.default_rng(1).standard_normal((20_000, count))
        assert (draws**2).sum(axis=1).max() < equal(count).most()[0]
    assert equal(4 * count).most()[0] / 4 < equal(count).most()[0]
    assert equal(10**7).most()[0] == pytest.approx(10**7, rel=0.02)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_one_large_error_among_many_strays_as_one_and_not_as_many(share):
    variance = np.full((1, 512), (1 - share) / 511)
    variance[0, 0] = share
    draws = np.random.default_rng(1).standard_normal((200_000, 512), dtype=np.float32) ** 2 @ variance[0]
    errors = Errors.of(variance, 512)
    assert equal(512).most()[0] / 512 < draws.max() < errors.most()[0]
    # a rounding is off by u at most, 1 / RMS of what is expected of it
    assert errors.most()[0] > share / RMS**2


def test_errors_that_share_their_causes_are_no_more_than_their_causes():
    assert equal(512, freedom=8).most()[0] == pytest.approx(64 * equal(8).most()[0])


def test_rows_together_are_the_errors_of_all():
    variance = np.random.default_rng(2).random((6, 32))
    whole, parts = Errors.of(variance.reshape(1, -1), 192), Errors.of(variance, 32)
    apart = parts[np.arange(2)].together().joined(parts[np.arange(2, 6)].together())
    for one in (parts.together(), apart):
        assert one.most() == pytest.approx(whole.most()[0], rel=1e-12)


@pytest.mark.parametrize("depth", [64, 1024])
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_a_running_float32_sum_errs_as_the_model_says(depth, mean):
    rng = np.random.default_rng(2)
    a = (rng.standard_normal((200, depth)) + mean).astype(np.float32)
    b = (rng.standard_normal(depth) + mean).astype(np.float32)
    total = np.zeros(200, np.float32)
    for i in range(depth):
        total = total + a[:, i] * b[i]
    exact = a.astype(float) @ b.astype(float)
    model = ErrorModel("f32")
    variance = model.matmul((a.astype(float) ** 2).sum(1, keepdims=True), np.array([(b.astype(float) ** 2).sum()]),
                            exact[:, None], depth)  # fmt: skip
    ratio = np.sqrt(((total - exact) ** 2).sum() / variance.sum()) / model.unit
    assert 0.3 < ratio < 1.1


@pytest.mark.parametrize("depth", [32, 256, 2048])
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_a_running_sum_of_bfloat16_products_rounds_less_often_and_the_model_knows(depth, mean):
    rng = np.random.default_rng(3)
    a, b = (float32_of_bits(bits_of_float32(rng.standard_normal(shape).astype(np.float32) + np.float32(mean)))
            for shape in ((400, depth), (depth,)))  # fmt: skip
    total = np.zeros(400, np.float32)
    for i in range(depth):
        total = total + a[:, i] * b[i]
    exact = a.astype(float) @ b.astype(float)
    model = ErrorModel("bf16")
    variance = model.matmul((a.astype(float) ** 2).sum(1, keepdims=True), np.array([(b.astype(float) ** 2).sum()]),
                            exact[:, None], depth)  # fmt: skip
    ratio = np.sqrt(((total - exact) ** 2).sum() / variance.sum()) / model.unit
    assert 0.3 < ratio < 1.1


def test_an_elements_bound_is_its_rounding_and_what_came_before():
    value = np.array([[1.0, 2.0]])
    model = ErrorModel("bf16")
    assert element_bound(value**2, value, model).tolist() == [[model.u, 2 * model.u]]
    assert (element_bound(value**2 + 1, value, model) > element_bound(value**2, value, model)).all()


def test_a_bound_scales_with_the_error_it_bounds():
    model = ErrorModel("bf16")
    variance = np.ones((1, 100))
    assert bound(Errors.of(4 * variance, 100), model) == pytest.approx(2 * bound(Errors.of(variance, 100), model))


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_a_gelu_of_a_negative_gate_errs_by_roundings_of_what_cancels_in_it(name):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    case = Case.parse(f"dp1.tp1/local/f32/t5.d8.f4096/e2.k1/{name}")
    model = ErrorModel("f32")
    gate = np.random.default_rng(0).uniform(-4, -2, (1, case.intermediate)).astype(np.float32)
    pre = np.concatenate([gate, np.ones_like(gate)], axis=1).astype(np.float64)
    value = activation(Value(pre), case, model)
    how = "tanh" if name == "gelu_tanh" else "none"
    found = torch.nn.functional.gelu(torch.from_numpy(gate), approximate=how).numpy()
    observed = np.sqrt(np.mean((found - value.exact) ** 2))
    assert 0.1 < observed / (model.unit * np.sqrt(np.mean(value.variance))) < 1.5
    of_its_own_size = model.unit * np.sqrt(np.mean(model.activation(value.exact)))
    assert observed > 3 * of_its_own_size


@pytest.mark.parametrize("count", [1, 2, 3, 6, 16])
def test_a_weighted_sum_added_best_first_errs_as_the_model_says(count):
    rng = np.random.default_rng(4)
    weights = np.sort(rng.random((4000, count)).astype(np.float32))[:, ::-1]
    rows = rng.standard_normal((4000, count)).astype(np.float32)
    total = np.zeros(4000, np.float32)
    for slot in range(count):
        total = total + weights[:, slot] * rows[:, slot]
    terms = weights.astype(float) * rows.astype(float)
    model = ErrorModel("f32")
    inside = (terms**2 * model.partial_sums(np.arange(count), count)).sum(axis=1)
    whole = terms.sum(axis=1) ** 2 if count > 1 else 0.0
    variance = model.combine((terms**2).sum(axis=1), inside + whole)
    assert np.sqrt(((total - terms.sum(axis=1)) ** 2).sum() / variance.sum()) / model.unit == pytest.approx(1, abs=0.1)


def test_single_elements_of_short_products_stay_within_the_tail_of_few_roundings():
    model, depth = ErrorModel("bf16"), 48
    rng = np.random.default_rng(0)

    def narrow(values):
        return float32_of_bits(bits_of_float32(values))

    gate, up = rng.standard_normal((2, 1500, depth))
    a = narrow(gate / (1 + np.exp(-gate)) * up)  # heavy tails, as activations have
    b = narrow(rng.standard_normal((1500, depth)))
    total = np.zeros((len(a), len(b)), np.float32)
    for k in range(depth):
        total += np.outer(a[:, k], b[:, k])
    exact = a.astype(float) @ b.T.astype(float)
    variance = model.matmul((a.astype(float) ** 2).sum(1, keepdims=True), (b.astype(float) ** 2).sum(1), exact, depth)
    error = np.abs(total - exact) / (SLACK * SIGMAS * model.unit * np.sqrt(variance))
    assert error.max() > 1  # so a Gaussian's tail is too short
    assert 0.3 < error.max() / model.tail(depth) < 1
