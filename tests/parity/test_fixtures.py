from pathlib import Path

import numpy as np
import pytest

from parity import fixtures
from parity.arrays import ArrayRef, bits_of_float32, float32_of_bits, values
from parity.case import Case
from parity.verdict import judge

BASE = "dp1.tp1/local/bf16/t24.d32.f16/e8.k2"


def test_the_same_id_gives_the_same_bits_in_another_folder(tmp_path):
    case = Case.parse(BASE + "/shared+gate+latent+expertbias")
    one, two = fixtures.build(case, tmp_path / "a"), fixtures.build(case, tmp_path / "b")
    assert one.keys() == two.keys()
    for name in one:
        assert np.array_equal(one[name].open(), two[name].open()), name


def test_a_seed_draws_every_array_anew(cache):
    one, two = (fixtures.build(Case.parse(BASE + f"/shared+gate+seed{seed}"), cache) for seed in (1, 2))
    assert all(not np.array_equal(one[name].open(), two[name].open()) for name in one)


def test_arrays_have_checkpoint_shapes(cache):
    refs = fixtures.build(
        Case.parse("dp1.tp1/local/f32/t5.d32.f16/e8.k2/shared2+sharedgate+gate+latent24+expertbias+bias"), cache
    )
    assert {name: ref.shape for name, ref in refs.items()} == {
        "x": (5, 32), "router.gate": (8, 32), "router.bias": (8,), "experts.gate_up": (8, 32, 24),
        "experts.down": (8, 24, 16), "experts.gate_up_bias": (8, 32), "experts.down_bias": (8, 24),
        "latent.down": (24, 32), "latent.up": (32, 24), "shared.gate_up": (64, 32), "shared.down": (32, 32),
        "shared.gate": (1, 32),
    }  # fmt: skip
    assert refs["router.bias"].dtype == "float32"


def test_weights_are_shared_between_cases_that_differ_only_in_tokens_and_routing(cache):
    one = fixtures.build(Case.parse(BASE), cache)["experts.down"]
    two = fixtures.build(Case.parse("dp2.tp1.ep/allgather/bf16/t7.d32.f16/e8.k3/gate+sigmoid"), cache)["experts.down"]
    assert one == two


@pytest.mark.parametrize("flags", ["", "/gate", "/sigmoid+bias+groups4-2", "/gate+sigmoid+renorm", "/ids"])
def test_every_expert_is_hit_and_no_choice_is_within_rounding(oracle, flags):
    case, _, reference = oracle(BASE + flags)
    assert len(np.unique(reference.ids)) == case.experts
    if reference.routing is not None:
        last = np.take_along_axis(reference.routing.selection, reference.ids[:, -1:], 1)[:, 0]
        assert (reference.routing.gap > 1e-4 * np.abs(last)).all()


def test_a_hot_case_sends_every_token_to_the_same_experts(oracle):
    for flags in ("/hot", "/hot+gate"):
        _, _, reference = oracle(BASE + flags)
        assert np.array_equal(np.sort(reference.ids, axis=1), np.tile([0, 1], (24, 1)))


def test_shared_and_routed_parts_are_of_one_size(oracle):
    for flags in ("shared", "shared+renorm", "shared+weightin", "shared+relu2", "shared+swigluoai"):
        _, _, routed = oracle(
            f"dp1.tp1/local/f32/t64.d64.f64/e8.k2/{flags}".replace("shared+", "").replace("/shared", "")
        )
        _, _, both = oracle(f"dp1.tp1/local/f32/t64.d64.f64/e8.k2/{flags}")
        ratio = np.sqrt(np.mean(both.y**2)) / np.linalg.norm(both.slot_norm) * np.sqrt(both.y.size)
        assert 1 < ratio < 3, (flags, ratio)
        assert routed.y.shape == both.y.shape


@pytest.mark.parametrize("text", ["e16.k4/weightin", "e64.k6/weightin+gate", "e8.k8/sigmoid", "e64.k6/shared", "e8.k8"])
def test_no_experts_part_is_lost_in_rounding(oracle, text):
    case, _, reference = oracle(f"dp1.tp1/local/bf16/t32.d256.f128/{text}")
    assert judge(case, reference, {}).verdict == "pass"


def test_bfloat16_bits_round_to_nearest_even():
    exact = np.array([1.0, 1.00390625, 1.01171875, -1.00390625, 0.0], np.float32)
    assert float32_of_bits(bits_of_float32(exact)).tolist() == [1.0, 1.0, 1.015625, -1.0, 0.0]


def test_an_array_without_elements_can_be_opened(tmp_path):
    assert ArrayRef(str(tmp_path / "none"), "bfloat16", (0, 4)).open().shape == (0, 4)
    assert values(ArrayRef(str(tmp_path / "none"), "float32", (0, 4))).dtype == np.float32


def test_the_cache_drops_what_was_not_used_for_longest(tmp_path, monkeypatch):
    monkeypatch.setattr(fixtures, "CACHE_BYTES", 2 * 8 * 32 * 32 * 2)
    paths = []
    for seed in (1, 2, 3):
        refs = fixtures.build(Case.parse(f"{BASE}/seed{seed}"), tmp_path)
        paths.append(Path(refs["experts.gate_up"].path))
    assert not paths[0].exists()
    assert paths[2].exists()
