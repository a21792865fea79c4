"""The oracle against loops over tokens, experts and columns that a reader can check line by line."""

import math

import numpy as np
import pytest

from parity.arrays import values
from parity.tolerance import ErrorModel


def scalar_activation(gate, up, flags):
    sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    if flags.activation == "swigluoai":
        gate, up = min(gate, flags.limit), max(-flags.limit, min(up, flags.limit))
        return gate * sigmoid(flags.alpha * gate) * (up + 1)
    h = {
        "silu": lambda z: z * sigmoid(z),
        "gelu": lambda z: z * (1 + math.erf(z / 2**0.5)) / 2,
        "gelu_tanh": lambda z: z / 2 * (1 + math.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))),
        "relu2": lambda z: max(z, 0) ** 2,
    }[flags.activation](gate)
    return h if up is None else h * up


def expert(row, gate_up, down, bias1, bias2, case):
    pre = [math.fsum(a * b for a, b in zip(row, w, strict=True)) for w in gate_up]
    pre = [p + b for p, b in zip(pre, bias1, strict=True)]
    width = down.shape[1]
    pair = lambda f: (pre[2 * f], pre[2 * f + 1]) if case.flags.interleaved else (pre[f], pre[width + f])  # noqa: E731
    h = [scalar_activation(*(pair(f) if case.gated else (pre[f], None)), case.flags) for f in range(width)]
    return [math.fsum(a * b for a, b in zip(h, w, strict=True)) + c for w, c in zip(down, bias2, strict=True)]


def layer(case, arrays):
    get = lambda name: values(arrays[name]).astype(float) if name in arrays else None  # noqa: E731
    x, out = get("x"), []
    for t, row in enumerate(x):
        if case.flags.ids:
            ids, weights = get("topk_ids")[t].astype(int), get("topk_weights")[t]
        else:
            logits = get("router.gate") @ row if case.flags.gate else get("router_logits")[t]
            scores = 1 / (1 + np.exp(-logits)) if case.flags.sigmoid else np.exp(logits) / np.exp(logits).sum()
            biased = scores + (0 if get("router.bias") is None else get("router.bias"))
            groups, kept = case.flags.groups
            size = case.experts // groups
            top = lambda part: sorted(part)[::-1]  # noqa: E731
            rank = [sum(top(biased[g * size : (g + 1) * size])[: 2 if case.flags.bias else 1]) for g in range(groups)]
            keep = sorted(range(groups), key=lambda g: -rank[g])[:kept]
            allowed = [e for e in range(case.experts) if e // size in keep]
            ids = sorted(allowed, key=lambda e: -biased[e])[: case.top_k]
            weights = scores[ids] / (scores[ids].sum() if case.flags.renorm else 1) * case.flags.scale
        into = get("latent.down") @ row if case.flags.latent else row
        total = np.zeros(case.expert_width)
        for e, w in zip(ids, weights, strict=True):
            bias1 = (
                get("experts.gate_up_bias")[e]
                if case.flags.expertbias
                else np.zeros(arrays["experts.gate_up"].shape[1])
            )
            bias2 = get("experts.down_bias")[e] if case.flags.expertbias else np.zeros(case.expert_width)
            before, after = (w, 1) if case.flags.weightin else (1, w)
            part = expert(into * before, get("experts.gate_up")[e], get("experts.down")[e], bias1, bias2, case)
            total += after * np.array(part)
        y = get("latent.up") @ total if case.flags.latent else total
        if case.flags.shared:
            none = np.zeros(10**4)
            up, down = get("shared.gate_up"), get("shared.down")
            part = np.array(expert(row, up, down, none[: len(up)], none[: len(down)], case))
            y = y + part * (1 / (1 + math.exp(-(get("shared.gate")[0] @ row))) if case.flags.sharedgate else 1)
        out.append(y)
    return np.array(out)


@pytest.mark.parametrize(
    "flags",
    [
        "gate",
        "shared+gate+latent",
        "shared2+sharedgate",
        "sigmoid+renorm+groups4-2+bias+scale2.5",
        "groups4-2+gate",
        "ids+weightin",
        "gelu+expertbias",
        "gelu_tanh+interleaved",
        "swigluoai+interleaved+expertbias+alpha1.5+limit0.5",
        "swigluoai+shared",
        "relu2+latent5",
        "ungated",
        "gelu+ungated+shared",
        "mean+hot",
    ],
)
def test_the_oracle_equals_plain_loops(oracle, flags):
    case, arrays, reference = oracle(f"dp2.tp1.ep/allgather/f32/t3-2.d6.f4/e8.k2/{flags}")
    np.testing.assert_allclose(reference.y, layer(case, arrays), rtol=1e-12, atol=1e-14)


def test_a_slot_norm_is_what_leaving_out_that_expert_changes(oracle):
    case, arrays, reference = oracle("dp1.tp1/local/f32/t4.d16.f8/e8.k3/ids+latent+shared")
    from parity.oracle.layer import reference as evaluate

    token, slot = 2, 1
    weights = np.array(arrays["topk_weights"].open())
    weights[token, slot] = 0
    path = arrays["topk_weights"].path + "-without"
    weights.tofile(path)
    changed = arrays | {"topk_weights": type(arrays["topk_weights"])(path, "float32", weights.shape)}
    moved = np.linalg.norm(evaluate(case, changed).y - reference.y, axis=1)
    assert moved[token] == pytest.approx(reference.slot_norm[token, slot])
    assert np.delete(moved, token).max() == 0


def test_a_replayed_choice_takes_its_own_scores(oracle):
    case, _, reference = oracle("dp1.tp1/local/f32/t4.d16.f8/e8.k2/renorm")
    other = (reference.ids + 1) % case.experts
    replayed = reference.replay(other)
    scores = np.take_along_axis(reference.routing.scores, other, axis=1)
    np.testing.assert_allclose(replayed.weights, scores / scores.sum(1, keepdims=True))
    assert np.array_equal(reference.replay(reference.ids).y, reference.y)


@pytest.mark.parametrize(
    "flags", ["", "shared+gate", "latent+shared", "weightin+renorm", "gelu+expertbias", "swigluoai"]
)
@pytest.mark.parametrize("width", [32, 256])
def test_the_variance_predicts_the_error_of_rounded_arithmetic(oracle, flags, width):
    """bfloat16 with one rounding where the model says one: the observed RMS error is the predicted one."""
    case, arrays, reference = oracle(f"dp1.tp1/local/bf16/t64.d{width}.f{width}/e8.k2" + (f"/{flags}" if flags else ""))
    error = rounded_layer(case, arrays, reference) - reference.y
    predicted = ErrorModel("bf16").unit * np.sqrt(reference.variance.sum())
    assert np.linalg.norm(error) / predicted == pytest.approx(1, abs=0.2 if width == 32 else 0.06)


def rounded_layer(case, arrays, reference):
    from parity.arrays import bits_of_float32, float32_of_bits
    from parity.oracle.activation import activate, sigmoid, split

    rounded = lambda v: float32_of_bits(bits_of_float32(v.astype(np.float32))).astype(float)  # noqa: E731
    get = lambda name: values(arrays[name]).astype(float)  # noqa: E731
    x = get("x")

    def network(rows, owner, index=...):
        pre = rows @ get(f"{owner}.gate_up")[index].T
        if owner == "experts" and case.flags.expertbias:
            pre = pre + get("experts.gate_up_bias")[index]
        gate, up = split(rounded(pre), gated=case.gated, interleaved=case.flags.interleaved)
        y = rounded(activate(gate, up, case.flags)) @ get(f"{owner}.down")[index].T
        return y + get("experts.down_bias")[index] if owner == "experts" and case.flags.expertbias else y

    rows = rounded(x @ get("latent.down").T) if case.flags.latent else x
    total = np.zeros((len(x), case.expert_width))
    for t in range(len(x)):
        for e, w in zip(reference.ids[t], reference.weights[t], strict=True):
            row = rounded(rows[t : t + 1] * w) if case.flags.weightin else rows[t : t + 1]
            total[t] += (1 if case.flags.weightin else w) * rounded(network(row, "experts", e))[0]
    y = rounded(total) @ get("latent.up").T if case.flags.latent else total
    if case.flags.shared:
        part = network(x, "shared")
        y = y + (part * sigmoid(x @ get("shared.gate").T) if case.flags.sharedgate else part)
    return rounded(y)


STAGED = "dp2.tp1.ep/allgather/bf16/t9-4.d32.f24/e8.k2"


@pytest.mark.parametrize("flags", ["shared+gate+latent", "weightin+expertbias", "ids", "relu2+renorm"])
def test_stages_follow_from_each_other(teacher, flags):
    """Free: each stage from the one before. Taught: each from the lesson of the one before."""
    from parity.oracle.activation import activate, split

    case, arrays, free = teacher(f"{STAGED}/{flags}")
    taught = free.taught()
    get = lambda name: values(arrays[name]).astype(float)  # noqa: E731
    lesson = lambda name: rounded(free.stages[name].exact)  # noqa: E731
    k = case.top_k
    expert = free.ids.reshape(-1)
    token = np.repeat(np.arange(case.total_tokens), k)
    copies = np.repeat(free.stages["inputs"].exact, k, axis=0)

    for answer, read in ((free, lambda name: free.stages[name].exact), (taught, lesson)):
        stages = {name: value.exact for name, value in answer.stages.items()}
        rows = read("dispatch") if case.flags.weightin else copies if answer is free else rounded(copies)
        bias1 = get("experts.gate_up_bias")[expert] if case.flags.expertbias else 0
        bias2 = get("experts.down_bias")[expert] if case.flags.expertbias else 0
        pre = np.einsum("rmw,rw->rm", get("experts.gate_up")[expert], rows) + bias1
        np.testing.assert_allclose(stages["gate_up"], pre, rtol=1e-9, atol=1e-12)
        halves = split(read("gate_up"), gated=case.gated, interleaved=case.flags.interleaved)
        np.testing.assert_allclose(stages["activation"], activate(*halves, case.flags), rtol=1e-9, atol=1e-12)
        y = np.einsum("rwf,rf->rw", get("experts.down")[expert], read("activation")) + bias2
        np.testing.assert_allclose(stages["down"], y, rtol=1e-9, atol=1e-12)
        weights = np.ones_like(free.weights) if case.flags.weightin else free.weights
        total = np.zeros((case.total_tokens, case.expert_width))
        np.add.at(total, token, weights.reshape(-1, 1) * read("down"))
        np.testing.assert_allclose(stages["combine"], total, rtol=1e-6, atol=1e-6)  # taught weights are float32
    if case.flags.latent:
        routed = np.float32(free.stages["combine"].exact).astype(float) @ get("latent.up").T
        np.testing.assert_allclose(taught.stages["latent_out"].exact, routed, rtol=1e-9, atol=1e-12)
    assert np.array_equal(free.y, free.stages["reduce"].exact)


def rounded(values):
    from parity.arrays import bits_of_float32, float32_of_bits

    return float32_of_bits(bits_of_float32(np.float32(values))).astype(float)


def test_lessons_are_rounded_where_the_layer_rounds_and_float32_elsewhere(cache):
    from parity import fixtures
    from parity.case import Case
    from parity.oracle import teach

    case = Case.parse(f"{STAGED}/shared+gate+latent+seed2")
    free, lessons = teach(case, fixtures.build(case, cache), cache.parent / "lessons-rounded")
    dtypes = {name: ref.dtype for name, ref in lessons.items()}
    narrow = {"latent_in", "dispatch", "gate_up", "activation", "down"}
    assert {name for name, dtype in dtypes.items() if dtype == "bfloat16"} == narrow
    assert dtypes.pop("topk_ids") == "int32"
    assert set(dtypes) - narrow == {"logits", "topk_weights", "combine", "latent_out", "shared"}
    assert lessons["gate_up"].shape == (case.total_tokens * case.top_k, 2 * case.intermediate)
    np.testing.assert_array_equal(values(lessons["down"]), rounded(free.stages["down"].exact))
    np.testing.assert_array_equal(values(lessons["combine"]), np.float32(free.stages["combine"].exact))
    np.testing.assert_array_equal(
        values(lessons["dispatch"]), np.repeat(values(lessons["latent_in"]), case.top_k, axis=0)
    )


def test_what_is_dropped_is_in_no_lesson_and_in_no_sum(teacher):
    _, _, free = teacher("dp4.tp1.ep/padded/bf16/t9.d32.f24/e8.k2/hot+capacity0.5")
    lost = np.flatnonzero(~free.kept.reshape(-1))
    assert len(lost)
    assert not free.stages["down"].exact[lost].any()
    kept = (free.kept * free.weights)[..., None] * free.stages["down"].exact.reshape(*free.kept.shape, -1)
    np.testing.assert_allclose(free.stages["combine"].exact, kept.sum(axis=1), rtol=1e-9, atol=1e-12)


def test_a_taught_stage_has_its_own_error_alone(teacher):
    _, _, free = teacher(f"{STAGED}/shared+gate+latent")
    taught = free.taught()
    for name in ("gate_up", "activation", "down", "combine"):
        assert (taught.stages[name].before < free.stages[name].before + 1e-30).all(), name
    assert taught.choice_variance.max() == 0 < taught.logit_variance.max()


def test_what_is_taught_is_computed_once(teacher):
    _, _, free = teacher(f"{STAGED}/shared+gate+latent")
    assert free.taught() is free.taught(frozenset())
    assert free.taught(frozenset({"gate_up"})) is not free.taught()
