"""Each rank's part of the parameters: together the parts are the whole, and each holds what its rank needs."""

import itertools

import pytest
import torch

from torch_moe import MoEConfig, ParallelConfig, RouterConfig, init
from torch_moe.params import allocate, check_full, local_part, specs

FULL = MoEConfig(
    num_experts=8,
    top_k=2,
    hidden_size=6,
    intermediate_size=4,
    expert_bias=True,
    num_shared_experts=2,
    shared_gate=True,
    latent_size=5,
    dtype="float32",
    router=RouterConfig(score_correction_bias=True),
)


def test_names_and_shapes_are_the_checkpoints():
    assert {name: spec.shape for name, spec in specs(FULL).items()} == {
        "experts.gate_up": (8, 8, 5),
        "experts.down": (8, 5, 4),
        "experts.gate_up_bias": (8, 8),
        "experts.down_bias": (8, 5),
        "router.gate": (8, 6),
        "router.bias": (8,),
        "shared.gate_up": (16, 6),
        "shared.down": (6, 8),
        "shared.gate": (1, 6),
        "latent.down": (5, 6),
        "latent.up": (6, 5),
    }


def test_an_ungated_layer_has_no_up_rows_and_a_routed_one_no_gate():
    config = MoEConfig(
        num_experts=4,
        top_k=1,
        hidden_size=6,
        intermediate_size=3,
        gated=False,
        shared_intermediate_size=2,
        router=RouterConfig(source="ids"),
    )
    assert {name: spec.shape for name, spec in specs(config).items()} == {
        "experts.gate_up": (4, 3, 6),
        "experts.down": (4, 6, 3),
        "shared.gate_up": (2, 6),
        "shared.down": (6, 2),
    }


def test_only_the_score_correction_is_float32_in_a_bfloat16_layer():
    config = MoEConfig(
        num_experts=4, top_k=1, hidden_size=6, intermediate_size=3, router=RouterConfig(score_correction_bias=True)
    )
    float32 = {name for name, tensor in init(config).items() if tensor.dtype == torch.float32}
    assert float32 == {"router.bias"}


def parts_of(name, full, parallel, config=FULL):
    return [
        local_part(name, full, config, parallel, dp_index=dp, tp_index=tp)
        for dp, tp in itertools.product(range(parallel.dp), range(parallel.tp))
    ]


@pytest.mark.parametrize("name", ["experts.gate_up", "experts.down", "experts.gate_up_bias", "experts.down_bias"])
def test_expert_parallel_ranks_hold_contiguous_blocks_of_experts(name):
    parallel = ParallelConfig(dp=2, tp=2, expert_parallel=True)
    full = torch.randn(specs(FULL)[name].shape)
    assert torch.equal(torch.cat(parts_of(name, full, parallel)), full)


@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("prefix", ["experts", "shared"])
def test_tensor_parallel_parts_have_matching_gate_up_and_down_columns(prefix, layout):
    config = MoEConfig(
        num_experts=2,
        top_k=1,
        hidden_size=3,
        intermediate_size=4,
        gate_up_layout=layout,
        shared_intermediate_size=4,
        dtype="float32",
    )
    gate, up = torch.arange(4.0), 10 + torch.arange(4.0)
    rows = torch.cat([gate, up]) if layout == "concatenated" else torch.stack([gate, up], -1).flatten()
    gate_up, down = rows[:, None].expand(8, 3), gate[None].expand(3, 4)
    if prefix == "experts":
        gate_up, down = gate_up.expand(2, 8, 3), down.expand(2, 3, 4)
    parallel = ParallelConfig(tp=2)
    for index, (first, second) in enumerate(
        zip(
            parts_of(f"{prefix}.gate_up", gate_up, parallel, config),
            parts_of(f"{prefix}.down", down, parallel, config),
            strict=True,
        )
    ):
        own = torch.tensor([2.0 * index, 2.0 * index + 1])
        expected = (
            torch.cat([own, own + 10]) if layout == "concatenated" else torch.stack([own, own + 10], -1).flatten()
        )
        assert first[..., 0].reshape(-1, 4).unique(dim=0).tolist() == [expected.tolist()]
        assert second.reshape(-1, 2).unique(dim=0).tolist() == [own.tolist()]


def test_a_part_is_a_view_or_a_copy_of_just_its_slice():
    full = torch.randn(8, 8, 5)
    part = local_part("experts.gate_up", full, FULL, ParallelConfig(dp=4, expert_parallel=True), dp_index=1, tp_index=0)
    assert part.data_ptr() == full[2:].data_ptr()
    part = local_part("experts.gate_up", full, FULL, ParallelConfig(tp=2), dp_index=0, tp_index=1)
    assert part.untyped_storage().nbytes() == full.untyped_storage().nbytes() // 2


def test_the_shared_expert_is_split_only_where_tp_ranks_hold_the_same_tokens():
    def rows(**parallel):
        parts = allocate(FULL, ParallelConfig(**parallel), dp_index=0, tp_index=0, device=None)
        return parts["shared.gate_up"].shape[0]

    assert rows(tp=2) == 8
    assert rows(tp=2, expert_parallel=True) == 8
    assert rows(dp=2, tp=2, expert_parallel=True) == 16
    assert rows(dp=2, expert_parallel=True) == 16


def test_unloaded_parameters_are_nan():
    assert all(
        part.isnan().all() for part in allocate(FULL, ParallelConfig(), dp_index=0, tp_index=0, device=None).values()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda full: full.pop("latent.up"), r"missing: \['latent.up'\]"),
        (lambda full: full.update(extra=torch.zeros(1)), r"not expected: \['extra'\]"),
        (
            lambda full: full.update({"latent.up": torch.zeros(5, 6)}),
            r"latent.up is \(5, 6\) torch.float32: allowed is \(6, 5\) torch.float32",
        ),
        (lambda full: full.update({"latent.up": full["latent.up"].bfloat16()}), "latent.up is .* torch.bfloat16"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error(change, message):
    full = init(FULL)
    check_full(full, FULL)
    change(full)
    with pytest.raises(ValueError, match=message):
        check_full(full, FULL)


def test_random_parameters_repeat_with_the_generator():
    first, second = (init(FULL, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.keys() == specs(FULL).keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
