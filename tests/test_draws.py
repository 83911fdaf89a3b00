"""How new weights are drawn: a slice at a time, and by the hashed generator of certificates.

`jax.random` takes the keys of that generator, and its draws look random.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import growjax as gj
from growjax import draws
from growjax.algebra import NONE, AxisMap
from growjax.maps import apply


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
def test_draws_are_normal_and_independent_of_each_other(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        keys = fold(jax.random.fold_in(draws.key(0), 7), jnp.arange(64))
        x = np.asarray(jax.vmap(lambda k: jax.random.normal(k, (512,), dtype))(keys), float)
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    assert abs((np.abs(x) > 2).mean() - 0.0455) < 0.005
    # Neither rows (other keys) nor columns (other counters) nor differences resemble each other more
    # than those of NumPy do
    other = np.random.default_rng(0).normal(size=x.shape)
    for view in (lambda x: x, lambda x: x.T[:64], lambda x: np.diff(x, axis=1)):
        most, usual = (np.abs(np.corrcoef(view(each)) - np.eye(64)).max() for each in (x, other))
        assert most < 1.5 * usual
    assert len(np.unique(x)) > 0.98 * x.size


def test_keys_are_told_apart_and_split():
    a, b = draws.key(0), draws.key(1)
    keys = [a, b, *jax.random.split(a, 3), jax.random.fold_in(a, 1), jax.random.fold_in(b, 1)]
    bits = {int(jax.random.bits(key, (), "uint32")) for key in keys}
    assert len(bits) == len(keys)
    assert jax.random.split(a, (2, 3)).shape == (2, 3)
    assert jax.random.bits(a, (3,), "uint8").dtype == np.uint8
    assert {int(i) for i in jax.random.randint(a, (64,), 0, 4)} == {0, 1, 2, 3}


class Drawn(eqx.Module):
    """Arrays that grow along one axis: a matrix, and a square, which does along both of its own."""

    matrix: Array = gj.param("embed -> mlp")
    square: Array = gj.param("mlp -> mlp")


def operations(jaxpr):
    """The operations of a program, those inside of its calls and loops included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from operations(inner)


def test_new_weights_are_drawn_a_slice_at_a_time():
    """All slices at once take compilers minutes; constants need no loop, and are made row by row."""
    model = Drawn(jnp.ones((3, 4)), jnp.ones((4, 4)))

    def of(init):
        move = AxisMap("mlp", [0, 1, 2, 3, NONE, NONE], init=init)
        program = jax.make_jaxpr(lambda m, k: apply(move, m, k))(model, jax.random.key(0))
        return list(operations(program.jaxpr))

    drawn = [e.outvars[0].aval for e in of("normal") if e.primitive.name == "random_bits"]
    # Of the square, every entry of a row: where new rows and old columns cross is drawn, too
    assert [math.prod(aval.shape) for aval in drawn] == [3, 6]
    assert not {"scan", "while"} & {e.primitive.name for e in of("zeros")}
