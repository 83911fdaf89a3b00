"""Trained multipliers of residual branches, and layers that start with 0 in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax import testing
from growjax.errors import AxisError


def test_trained_multipliers_start_new_layers_from_zero_with_all_their_weights(tmp_path):
    """ReZero as growth: the numbers learn at the first step, the weights behind them at the second."""
    architecture = testing.Architecture("GPT", (("multipliers", True),))
    op = gj.stack(layers=4, order="insert", branch="zero")
    with jax.enable_x64(True):
        small, batch = architecture.model(), architecture.batch()
        big = gj.grow(op, small)
        block = big.blocks.block
        for multiplier in (block.attention_multiplier, block.mlp_multiplier):
            assert (np.asarray(multiplier.weight) == 0).tolist() == [False, True, False, True]
        for array in (block.attention.o, block.mlp.down, block.mlp.down_bias):
            np.testing.assert_array_equal(array[1::2], array[::2])
        testing.assert_contract(op, small, batch)
        gradient = jax.grad(lambda m: jnp.sum(jnp.sin(jax.vmap(m)(batch))))(big).blocks.block
        assert np.asarray(gradient.mlp_multiplier.weight).all()
        assert not np.asarray(gradient.mlp.down)[1::2].any()
        gj.hf.save(big, tmp_path / "big")
        again = gj.hf.load(tmp_path / "big")
        np.testing.assert_allclose(jax.vmap(again)(batch), jax.vmap(big)(batch), rtol=1e-10)
    with pytest.raises(AxisError, match="plain pre-LN branches"):
        testing.Architecture("GPT", (("multipliers", True), ("post_norm", True))).model()
