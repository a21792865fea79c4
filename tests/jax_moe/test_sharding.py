"""Meshes, specs, and parameters on their way to the devices and back."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_moe as jm
from jax_moe import sharding

from .layers import MODES, PLAIN, RICH, SHARED, arrays, sharded

INTERLEAVED = dataclasses.replace(SHARED, gate_up_layout="interleaved")
UNGATED = dataclasses.replace(SHARED, gated=False, activation="relu2")


def test_rank_is_dp_index_times_tp_plus_tp_index():
    mesh = jm.make_mesh(jm.ParallelConfig(dp=2, tp=4))
    assert mesh.axis_names == ("dp", "tp")
    assert list(mesh.devices.flat) == jax.devices()[:8]


def test_a_mesh_needs_enough_devices():
    with pytest.raises(ValueError, match=r"3 devices: expected at least dp \* tp = 2 \* 2 = 4"):
        jm.make_mesh(jm.ParallelConfig(dp=2, tp=2), jax.devices()[:3])


@pytest.mark.parametrize(
    "config", [RICH, SHARED, INTERLEAVED, UNGATED], ids=["rich", "shared", "interleaved", "ungated"]
)
@pytest.mark.parametrize("parallel", MODES.values(), ids=MODES)
def test_unshard_undoes_shard_exactly(config, parallel):
    given = arrays(config)
    params, _ = sharded(config, parallel)
    back = jm.unshard(params, config)
    assert back.experts.tp_blocks == 1
    for name, array in jm.to_mapping(back).items():
        np.testing.assert_array_equal(array, given[name], err_msg=name)


@pytest.mark.parametrize("config", [SHARED, INTERLEAVED, UNGATED], ids=["concatenated", "interleaved", "ungated"])
def test_each_tp_rank_gets_the_rows_of_its_own_gate_and_up(config):
    parallel = MODES["tp2"]
    params, mesh = sharded(config, parallel)
    full, f, half = arrays(config), config.intermediate_size, config.intermediate_size // 2
    for rank, device in enumerate(mesh.devices.flat):
        shard = next(s for s in params.experts.gate_up.addressable_shards if s.device == device)
        mine = range(rank * half, (rank + 1) * half)
        if not config.gated:
            rows = list(mine)
        elif config.gate_up_layout == "concatenated":
            rows = [*mine, *(f + i for i in mine)]
        else:
            rows = [row for i in mine for row in (2 * i, 2 * i + 1)]
        np.testing.assert_array_equal(shard.data, full["experts.gate_up"][:, rows])
        bias = next(s for s in params.experts.gate_up_bias.addressable_shards if s.device == device)
        np.testing.assert_array_equal(bias.data, full["experts.gate_up_bias"][:, rows])


def test_the_documented_example_of_row_blocks_holds():
    rows = np.array(["g0", "g1", "g2", "g3", "u0", "u1", "u2", "u3"])
    blocks = sharding._swap_blocks(rows, 0, 2, undo=False)
    assert blocks.tolist() == ["g0", "g1", "u0", "u1", "g2", "g3", "u2", "u3"]
    assert sharding._swap_blocks(blocks, 0, 2, undo=True).tolist() == rows.tolist()


def test_expert_parallel_ranks_get_their_block_of_experts_and_all_that_is_local_to_it():
    params, mesh = sharded(SHARED, MODES["dp2.tp2.ep"])
    full = arrays(SHARED)
    for field in ("gate_up", "down", "gate_up_bias", "down_bias"):
        for rank, device in enumerate(mesh.devices.flat):
            array = getattr(params.experts, field)
            shard = next(s for s in array.addressable_shards if s.device == device)
            np.testing.assert_array_equal(shard.data, full[f"experts.{field}"][2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("parallel", MODES.values(), ids=MODES)
def test_specs_have_the_structure_of_what_shard_returns(parallel):
    params, mesh = sharded(RICH, parallel)
    specs = jm.param_specs(RICH, parallel)
    assert jax.tree.structure(specs) == jax.tree.structure(params)
    for array, spec in zip(jax.tree.leaves(params), jax.tree.leaves(specs), strict=True):
        assert array.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), array.ndim)


def test_the_shared_expert_is_split_only_where_its_tokens_are_equal_over_tp():
    assert jm.param_specs(SHARED, MODES["dp2.tp2.ep.nosp"]).shared.gate_up == P("tp")
    assert jm.param_specs(SHARED, MODES["dp2.tp2.ep"]).shared.gate_up == P()


def test_parameters_laid_out_already_are_not_laid_out_again():
    params, mesh = sharded(PLAIN, MODES["tp2"])
    with pytest.raises(ValueError, match="tp_blocks = 2: expected 1"):
        jm.shard(params, PLAIN, MODES["tp2"], mesh)


def test_shard_moves_jax_arrays_of_one_device_too():
    params = jax.tree.map(jax.numpy.asarray, jm.from_mapping(arrays(PLAIN)))
    placed = jm.shard(params, PLAIN, MODES["dp2.ep"], jm.make_mesh(MODES["dp2.ep"]))
    assert len(placed.experts.down.sharding.device_set) == 2
    np.testing.assert_array_equal(placed.experts.down, arrays(PLAIN)["experts.down"])
