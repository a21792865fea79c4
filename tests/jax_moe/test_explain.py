"""The explanation says what the program does."""

import pytest

import jax_moe as jm

from .layers import MODES, PLAIN, RICH, SHARED


@pytest.mark.parametrize("parallel", MODES.values(), ids=MODES)
def test_every_mode_can_be_explained_with_and_without_a_mesh(parallel):
    text = str(jm.explain(RICH, parallel))
    assert text == str(jm.explain(RICH, parallel, jm.make_mesh(parallel)))
    assert [line.split()[0] for line in text.splitlines()] == [
        "mode",
        "sizes",
        "transport",
        "moves",
        "kernels",
        "reductions",
    ]
    assert "reference" in text


def test_the_words_are_those_of_the_mode():
    said = jm.explain(SHARED, MODES["dp2.tp2.ep.nosp"])
    assert said.mode.startswith("EP 4 (dp 2 x tp 2)")
    assert "SP off" in said.mode
    assert "2 of 8 experts" in said.sizes
    assert "shared expert 8 of width 16" in said.sizes
    assert said.transport.startswith("allgather over dp:")
    assert "inside combine over dp, then over tp by the layer" in said.reductions
    assert "in one sum with the routed" in said.reductions
    assert "in one sum" not in jm.explain(RICH, MODES["dp2.tp2.ep.nosp"]).reductions
    assert "nothing moves" in jm.explain(PLAIN, MODES["tp2"]).transport


def test_what_cannot_run_is_not_explained():
    with pytest.raises(ValueError, match="num_experts = 8"):
        jm.explain(PLAIN, jm.ParallelConfig(dp=3, expert_parallel=True))
    with pytest.raises(ValueError, match="mesh has axes"):
        jm.explain(PLAIN, MODES["dp2"], jm.make_mesh(MODES["tp2"]))
