"""The compiled program has exactly the collectives its parallel mode calls for, and the trace adds nothing when off."""

import collections
import re

import jax
import pytest

import jax_moe as jm

from .layers import MODES, RICH, SHARED, num_shards, sharded, tokens

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

# Gathers: tokens and routing in dispatch, one more for the sequence. Reductions: routed and shared in one sum, where
# both are partial over the same axes.
EXPECTED = {
    "one rank": {},
    "one rank, ep": {},
    "tp2": {"all-reduce": 1},
    "dp2": {},
    "dp2.tp2": {"all-reduce": 1},
    "dp2.ep": {"all-gather": 2, "reduce-scatter": 1},
    "tp2.ep": {"all-reduce": 1},
    "tp2.ep.sp": {"all-gather": 3, "reduce-scatter": 1},
    "tp4.ep.native": {"all-gather": 2, "reduce-scatter": 1},
    "dp2.tp2.ep": {"all-gather": 3, "reduce-scatter": 1},
    "dp2.tp2.ep.nosp": {"all-gather": 2, "reduce-scatter": 1, "all-reduce": 1},
    "dp2.tp2.ep.native": {"all-gather": 2, "reduce-scatter": 1},
    "dp2.tp4.ep": {"all-gather": 3, "reduce-scatter": 1},
}


def program(config, parallel, **options):
    params, mesh = sharded(config, parallel)
    rows = jax.sharding.PartitionSpec(("dp", "tp") if parallel.native else "dp")
    x = jax.device_put(tokens(4 * num_shards(parallel), 16), jax.sharding.NamedSharding(mesh, rows))
    step = jax.jit(lambda params, x: jm.moe(params, x, config=config, parallel=parallel, mesh=mesh, **options))
    return step.lower(params, x)


def collectives(config, parallel):
    text = program(config, parallel).compile().as_text()
    found = collections.Counter(re.findall(rf" ({'|'.join(KINDS)})(?:-start)?\(", text))
    return dict(found)


@pytest.mark.parametrize("mode", EXPECTED)
def test_collectives_are_those_of_the_mode(mode):
    assert collectives(SHARED, MODES[mode]) == EXPECTED[mode]


def test_out_of_the_latent_the_routed_sum_is_completed_apart_from_the_shared_one():
    # Counted before XLA compiles, which may well send two sums in one collective.
    assert program(RICH, MODES["dp2.tp2"]).as_text().count("stablehlo.all_reduce") == 2
    assert program(SHARED, MODES["dp2.tp2"]).as_text().count("stablehlo.all_reduce") == 1


def test_without_a_trace_the_program_is_the_one_that_knows_none():
    parallel = MODES["dp2.tp2.ep"]
    off, on = program(SHARED, parallel, trace=False).as_text(), program(SHARED, parallel, trace=True).as_text()
    assert off == program(SHARED, parallel).as_text()
    assert len(on) > len(off)
