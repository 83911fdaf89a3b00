"""`gj.grow` under every transformation of JAX: what the operator is outside of them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import growjax as gj
from growjax.axes import put
from growjax.errors import AxisError, GrowthError
from growjax.gates import Gate


class Tiny(eqx.Module):
    up: Array = gj.param("layers: embed -> mlp")
    down: Array = gj.param("layers: mlp -> embed")
    bias: Array = gj.param("-> embed")
    gate: Gate | None = gj.gate("mlp")


def tiny():
    rng = np.random.default_rng(0)
    shape = [(3, 4, 6), (3, 6, 4), (4,)]
    arrays: list[Any] = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shape]
    return Tiny(*arrays)


def transformed(grow, model, key):
    """What growth is under every transformation, of the arrays that it makes."""

    def up(model, key=key):
        return grow(model, key=key).up

    keys = jax.random.split(key)
    models = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), model)
    return {
        "outside": up(model),
        "jit": eqx.filter_jit(up)(model),
        "jit of a key": jax.jit(lambda key: up(model, key))(key),
        "vmap of a key": jax.vmap(lambda key: up(model, key))(keys),
        "an ensemble": eqx.filter_vmap(up)(models),
        "an ensemble under jit": eqx.filter_jit(eqx.filter_vmap(up))(models),
        "scan": jax.lax.scan(lambda _, key: (0, up(model, key)), 0, keys)[1],
        "grad": eqx.filter_grad(lambda model: jnp.sum(up(model) ** 2))(model).up,
        "shapes": eqx.filter_eval_shape(up, model).shape,
        "of shapes": up(eqx.filter_eval_shape(lambda m: m, model)).shape,
    }


def uniform(key, shape, dtype):
    return (jax.random.bits(key, shape) >> 8).astype(dtype) / 2**24


def test_growth_is_the_operator_under_every_transformation(key):
    for op in (gj.msg(mlp=8, init=uniform), gj.copy(mlp=9)):
        called = transformed(op, tiny(), key)
        through = transformed(lambda m, key, op=op: gj.grow(op, m, key=key), tiny(), key)
        for name, value in called.items():
            np.testing.assert_array_equal(value, through[name], name)
        for name in ("jit", "jit of a key"):
            np.testing.assert_array_equal(called[name], called["outside"], name)
        np.testing.assert_array_equal(called["an ensemble"], called["an ensemble under jit"])
        np.testing.assert_array_equal(called["an ensemble"][0], called["outside"])
        np.testing.assert_array_equal(called["scan"], called["vmap of a key"])
        assert called["shapes"] == called["of shapes"] == called["outside"].shape


def test_values_are_looked_at_where_there_are_any(key):
    broken = put(tiny(), {("bias",): jnp.full(4, np.nan)})
    with pytest.raises(GrowthError, match="not finite.*\n.*bias"):
        gj.grow(gj.copy(mlp=9), broken)
    assert eqx.filter_jit(lambda m: gj.grow(gj.copy(mlp=9), m))(broken).up.shape == (3, 4, 9)
    models = jax.tree.map(lambda x: jnp.stack([x, x]), tiny())
    with pytest.raises(AxisError, match="a stack of models grows under eqx.filter_vmap"):
        gj.grow(gj.copy(mlp=9), models)
