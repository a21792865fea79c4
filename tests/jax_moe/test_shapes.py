"""The shapes and dtypes that signatures promise hold at every stage, in every mode, as the layer is traced."""

import dataclasses
import inspect

import jax
import numpy as np
import pytest

import jax_moe as jm
from jax_moe import activation, experts, kernels, layer, linear, plan, router, tokens, transport
from jax_moe.transport import base

from .layers import MODES, RICH, SHARED, arrays, num_shards

STAGES = {
    activation: ("apply", "split_gate_up"),
    experts: ("activate", "gate_up", "down"),
    kernels: ("grouped_matmul", "gather_rows", "combine_rows", "choose_experts", "plan_rows"),
    layer: ("scatter_sequence", "gather_sequence", "shared_expert", "reduce_partial"),
    linear: ("operand", "contract"),
    plan: ("make_plan",),
    kernels.reference: ("keep_groups",),
    router: ("compute_logits", "route"),
    tokens: ("real_counts", "dense_index"),
    transport.local: ("dispatch", "combine"),
    transport.allgather: ("dispatch", "combine"),
    base: ("take_rows", "sum_rows"),
}


@pytest.fixture
def checked(monkeypatch):
    jaxtyping = pytest.importorskip("jaxtyping", reason="shapes are checked by jaxtyping")
    beartype = pytest.importorskip("beartype", reason="shapes are checked by beartype")
    called = set()

    def watch(name, function):
        checking = jaxtyping.jaxtyped(function, typechecker=beartype.beartype)

        def watched(*args, **kwargs):
            called.add(name)
            return checking(*args, **kwargs)

        return watched

    for module, names in STAGES.items():
        for name in names:
            function = getattr(module, name)
            assert inspect.isfunction(function)
            monkeypatch.setattr(module, name, watch(f"{module.__name__}.{name}", function))
    jax.clear_caches()
    yield called
    jax.clear_caches()


def trace(config, parallel):
    mesh = jm.make_mesh(parallel)
    whole = jm.from_mapping({name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays(config).items()})
    laid_out = jax.tree.structure(jm.param_specs(config, parallel))
    params = jax.tree.unflatten(laid_out, jax.tree.leaves(whole))
    x = jax.ShapeDtypeStruct((5 * num_shards(parallel), config.hidden_size), config.dtype)
    counts = np.full(num_shards(parallel), 3)
    return jax.eval_shape(
        lambda params, x: jm.moe(params, x, config=config, parallel=parallel, mesh=mesh, counts=counts, trace=True),
        params,
        x,
    )


def test_signatures_hold_in_every_mode(checked):
    for parallel in MODES.values():
        for config in (RICH, SHARED, dataclasses.replace(SHARED, gate_up_layout="interleaved", dtype="bfloat16")):
            y, decided = trace(config, parallel)
            assert y.dtype == config.dtype
            assert decided.topk_weights.dtype == np.float32
    assert checked == {f"{module.__name__}.{name}" for module, names in STAGES.items() for name in names}


def test_the_check_can_fail(checked):
    with pytest.raises(Exception, match="apply"):
        activation.apply(np.zeros((2, 4), np.int32), activation.Activation(name="silu"))
