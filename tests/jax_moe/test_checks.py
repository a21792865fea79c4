"""What does not fit is refused before anything is launched, with its value and what was expected."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_moe as jm

from .layers import MODES, PLAIN, RICH, arrays, sharded, tokens

LOGITS = dataclasses.replace(PLAIN, router=jm.RouterConfig(source="logits"))
IDS = dataclasses.replace(PLAIN, router=jm.RouterConfig(source="ids"))


def call(x, config=PLAIN, mode="dp2", params=None, mesh=None, **given):
    placed, own = sharded(config, MODES[mode])
    return jm.moe(params or placed, x, config=config, parallel=MODES[mode], mesh=mesh or own, **given)


X = tokens(4, 16)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (tokens(4, 15), r"x has shape \(4, 15\): expected \(rows, 16\)"),
        (X[None], r"x has shape \(1, 4, 16\)"),
        (tokens(4, 16, "bfloat16"), "x is bfloat16: expected config.dtype = float32"),
        (tokens(3, 16), "x has 3 rows: expected a multiple of the 2"),
    ],
)
def test_x(x, message):
    with pytest.raises(ValueError, match=message):
        call(x)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (LOGITS, {}, "router_logits is missing: with router source 'logits' expected router_logits"),
        (PLAIN, {"router_logits": tokens(4, 8)}, "router_logits is given: with router source 'gate' expected none"),
        (IDS, {"topk_ids": np.zeros((4, 3), np.int32)}, "topk_weights is missing"),
        (LOGITS, {"router_logits": tokens(4, 7)}, r"router_logits has shape \(4, 7\): expected \(4, 8\)"),
        (LOGITS, {"router_logits": tokens(2, 8)}, r"router_logits has shape \(2, 8\): expected \(4, 8\)"),
        (IDS, {"topk_ids": tokens(4, 3), "topk_weights": tokens(4, 3)}, "topk_ids is float32: expected integer"),
        (
            IDS,
            {"topk_ids": np.zeros((4, 3), np.int32), "topk_weights": np.zeros((4, 3), np.int32)},
            "topk_weights is int32: expected floating",
        ),
    ],
)
def test_what_is_given_for_the_router(config, given, message):
    with pytest.raises(ValueError, match=message):
        call(X, config, **given)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.array([1, 2, 3]), r"shape \(3,\) and dtype int64: expected \(2,\) integers"),
        (np.array([1.0, 2.0]), "dtype float64"),
        (np.array([1, 3]), r"counts = \[1, 3\]: expected each in \[0, 2\]"),
        (jnp.array([-1, 2]), r"counts = \[-1, 2\]"),
    ],
)
def test_counts(counts, message):
    with pytest.raises(ValueError, match=message):
        call(X, counts=counts)


def test_native_counts_are_one_for_each_rank():
    with pytest.raises(ValueError, match=r"expected \(4,\) integers"):
        call(X, mode="dp2.tp2.ep.native", counts=np.array([1, 1]))


def test_traced_counts_past_the_array_are_clipped():
    placed, mesh = sharded(PLAIN, MODES["dp2"])

    @jax.jit
    def step(x, counts):
        return jm.moe(placed, x, config=PLAIN, parallel=MODES["dp2"], mesh=mesh, counts=counts)

    np.testing.assert_array_equal(step(X, np.array([9, 9])), step(X, np.array([2, 2])))


def test_parameters_of_another_layer_or_another_tp():
    with pytest.raises(ValueError, match="laid out for tp_blocks = 1: expected 2; see shard"):
        call(X, mode="tp2", params=jm.from_mapping(arrays(PLAIN)))
    with pytest.raises(ValueError, match=r"missing none, not used by this config \['experts.down_bias'"):
        call(X, params=jm.from_mapping(arrays(RICH)))
    wrong = jm.from_mapping({**arrays(PLAIN), "experts.down": np.zeros((8, 16, 9), np.float32)})
    with pytest.raises(ValueError, match=r"experts.down: \(8, 16, 9\) float32: expected \(8, 16, 8\) float32"):
        call(X, params=wrong)


def test_a_mesh_of_another_size():
    with pytest.raises(ValueError, match=r"{'dp': 4, 'tp': 1}: expected {'dp': 2, 'tp': 1}"):
        call(X, mesh=jm.make_mesh(jm.ParallelConfig(dp=4)))


def test_an_unknown_implementation():
    with pytest.raises(ValueError, match=r"implementation = 'cuda': expected None or one of 'reference'"):
        call(X, implementation="cuda")


def test_moe_local_outside_of_a_shard_map():
    with pytest.raises(ValueError, match="no mesh axis 'dp' here"):
        jm.moe_local(jm.from_mapping(arrays(PLAIN)), X, config=PLAIN, parallel=MODES["one rank"])


@pytest.mark.parametrize("mode", ["dp2", "dp2.tp2.ep"])
def test_moe_local_in_a_mesh_of_another_size_or_with_whole_parameters(mode):
    mesh = jm.make_mesh(MODES[mode])

    def body(params, x, parallel):
        return jm.moe_local(params, x, config=PLAIN, parallel=parallel)

    def trace(parallel):
        mapped = jax.shard_map(
            lambda p, x: body(p, x, parallel), mesh=mesh, in_specs=(P(), P("dp")), out_specs=P("dp"), check_vma=False
        )
        jax.eval_shape(mapped, jm.from_mapping(arrays(PLAIN)), X)

    with pytest.raises(ValueError, match=r"mesh axis 'dp' has size 2: expected parallel.dp = 4"):
        trace(jm.ParallelConfig(dp=4))
    if MODES[mode].expert_parallel:
        with pytest.raises(ValueError, match=r"experts.gate_up: \(8, 16, 16\) .* expected \(2, 16, 16\) .* each rank"):
            trace(MODES[mode])
