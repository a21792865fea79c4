"""Parameters: names, shapes, pytrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moe as jm

from .layers import PLAIN, RICH, SHARED, arrays


@pytest.mark.parametrize("config", [PLAIN, RICH, SHARED])
def test_init_makes_every_parameter_in_its_shape_and_dtype(config):
    params = jm.to_mapping(jax.eval_shape(lambda: jm.init(jax.random.key(0), config)))
    expected = jm.params.shapes(config)
    assert {name: (array.shape, array.dtype) for name, array in params.items()} == expected


def test_init_scales_by_the_input_width_and_zeroes_biases():
    config = jm.MoEConfig(num_experts=4, top_k=1, hidden_size=64, intermediate_size=256, expert_bias=True)
    params = jm.init(jax.random.key(0), config)
    assert params.experts.gate_up.dtype == jnp.bfloat16
    assert float(jnp.std(params.experts.gate_up.astype(jnp.float32))) == pytest.approx(1 / 8, rel=0.05)
    assert float(jnp.std(params.experts.down.astype(jnp.float32))) == pytest.approx(1 / 16, rel=0.05)
    assert not params.experts.gate_up_bias.any()


def test_mapping_and_pytree_are_the_same_arrays():
    given = arrays(RICH)
    back = jm.to_mapping(jm.from_mapping(given))
    assert set(back) == set(given)
    assert all(back[name] is given[name] for name in given)


def test_tp_blocks_is_structure_and_not_a_leaf():
    one = jm.from_mapping(arrays(PLAIN))
    two = jm.ExpertParams(gate_up=one.experts.gate_up, down=one.experts.down, tp_blocks=2)
    assert len(jax.tree.leaves(two)) == 2
    assert jax.tree.structure(one.experts) != jax.tree.structure(two)


@pytest.mark.parametrize("name", ["experts.middle", "expert.down", "gate", "experts.tp_blocks"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=name):
        jm.from_mapping({**arrays(PLAIN), name: np.zeros(3)})


@pytest.mark.parametrize("name", ["experts.down", "shared.down", "latent.up"])
def test_a_part_given_in_part_is_refused(name):
    given = dict(arrays(RICH))
    del given[name]
    with pytest.raises(ValueError, match=f"{name} missing"):
        jm.from_mapping(given)


def test_given_logits_or_ids_need_no_gate():
    for source in ("logits", "ids"):
        config = jm.MoEConfig(
            num_experts=4, top_k=1, hidden_size=8, intermediate_size=8, router=jm.RouterConfig(source=source)
        )
        assert jax.eval_shape(lambda config=config: jm.init(jax.random.key(0), config)).router.gate is None
