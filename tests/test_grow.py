"""`gj.grow` under every transformation of JAX: what the operator is outside of them."""

import collections
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


class Twice(gj.Operator):
    """An operator whose call does what its maps do not say."""

    exactness = "approximate"

    def maps(self, axes):
        return []

    def __call__(self, model, *, key=None):
        return jax.tree.map(lambda x: 2 * x, model)


class Plain(eqx.Module):
    up: Array = gj.param("embed -> mlp")


def test_what_a_call_of_ones_own_changes_is_not_undone():
    small = Plain(jnp.ones((2, 3)))
    assert (np.asarray(gj.grow(Twice(), small).up) == 2).all()


class Sized(eqx.Module):
    """A module that keeps a size as a number."""

    up: Array
    width: int = eqx.field(static=True)


def test_annotated_modules_inside_others_keep_their_sizes_up_to_date():
    inner = gj.annotate(
        Sized(jnp.ones((2, 3)), 3), {"up": "embed -> mlp"}, statics={"width": "mlp"}
    )
    big = gj.grow(gj.growth.given({"a.up": np.ones((2, 1))}, mlp=4), {"a": inner})
    assert big["a"].model.width == 4 and big["a"].model.up.shape == (2, 4)


def test_dicts_keep_their_class_and_order():
    small = collections.OrderedDict(z=jnp.ones((2, 3)), a=jnp.ones((3, 2)))
    model = gj.annotate(small, {"z": "embed -> mlp", "a": "mlp -> embed"})
    big = gj.grow(gj.copy(mlp=4), model).model
    assert type(big) is collections.OrderedDict and list(big) == ["z", "a"]


class Temperature(eqx.Module):
    up: Array = gj.param("embed -> mlp")
    heat: float = gj.param("")


def test_a_number_that_is_no_array_is_not_trained_silently():
    with pytest.raises(AxisError, match="no arrays; give jnp.asarray.*\n.*heat"):
        gj.partition(Temperature(jnp.ones((2, 3)), 1.0))
