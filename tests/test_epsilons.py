"""Epsilons that are arrays: what `gj.infer` prints of norms written by hand."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import growjax as gj
from growjax.errors import GrowthError
from tests import zoo
from tests.test_inference import TOKENS


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


class OwnNorm(eqx.Module):
    """A norm written by hand, whose epsilon is an array."""

    gain: Array
    eps: Array
    normed: Any = eqx.field(static=True)

    def __init__(self, normed):
        self.gain, self.eps, self.normed = jnp.ones(4), jnp.zeros(()), normed

    def __call__(self, x):
        return self.gain * self.normed(x, self.eps)


class OwnNormed(eqx.Module):
    """Norms of one's own in a list, between a table and a head."""

    table: eqx.nn.Embedding
    norms: list[OwnNorm]
    head: eqx.nn.Linear

    def __init__(self, normed):
        self.table = eqx.nn.Embedding(11, 4, key=zoo.KEY)
        self.norms = [OwnNorm(normed) for _ in range(2)]
        self.head = eqx.nn.Linear(4, 2, key=zoo.KEY)

    def __call__(self, tokens):
        x = jax.vmap(self.table)(tokens)
        return jax.vmap(lambda row: self.head(self.norms[0](row) + self.norms[1](row)))(x)


def centred(x):
    return x - jnp.mean(x)


# How a norm takes its epsilon, and its spec: empty where growth by zeros could not correct it
EPSILONS = {
    "mean square": (lambda x, e: x * jax.lax.rsqrt(jnp.mean(x**2) + e), "<embed>"),
    "of one dimension": (lambda x, e: x * jax.lax.rsqrt(jnp.mean(x**2) + e), "1 <embed>"),
    "product": (lambda x, e: x / jnp.sqrt(e + x @ x / len(x)), "<embed>"),
    "variance": (lambda x, e: centred(x) / jnp.sqrt(jnp.var(x) + e), "<~embed>"),
    "centred": (lambda x, e: (y := centred(x)) / jnp.sqrt(jnp.mean(y * y) + e), "<~embed>"),
    "square of it": (lambda x, e: x * jax.lax.rsqrt(jnp.mean(x**2) + e**2), ""),
    "outside the root": (lambda x, e: x / (jnp.sqrt(jnp.mean(x**2)) + e), ""),
    "multiplied": (lambda x, e: x * jnp.sqrt(jnp.mean(x**2) + e), ""),
    "added again": (lambda x, e: x / jnp.sqrt(jnp.mean(x**2) + e) + e, ""),
    "a factor, too": (lambda x, e: e * (x / jnp.sqrt(jnp.mean(x**2) + e)), ""),
    "mean square, centred": (lambda x, e: centred(x) / jnp.sqrt(jnp.mean(x**2) + e), ""),
    "variance, not centred": (lambda x, e: x / jnp.sqrt(jnp.var(x) + e), ""),
}


@pytest.mark.parametrize("form", EPSILONS)
def test_an_epsilon_that_is_an_array_is_printed_as_one(form):
    normed, expected = EPSILONS[form]
    model = zoo.build(lambda: OwnNormed(normed))
    shape = (1,) if expected.startswith("1") else ()
    epsilons = [jnp.full(shape, 0.3), jnp.full(shape, 0.5)]
    model = eqx.tree_at(lambda m: [norm.eps for norm in m.norms], model, epsilons)
    small = gj.infer(model, TOKENS)
    specs = dict(small.specs)
    assert specs["norms.*.gain"].spec == "~embed" and specs["norms.*.eps"].spec == expected
    assert specs["norms.*.eps"].kind == ("buffer" if expected else "param")
    assert eval(str(small), {"gj": gj, "model": model}).specs == small.specs
    if "<embed>" not in expected:
        with pytest.raises(
            GrowthError, match="an RMS norm with a gain and its epsilon as a buffer"
        ):
            gj.zeros(embed=6)(small, key=zoo.KEY)
        return
    grown = gj.zeros(embed=6)(small, key=zoo.KEY)
    epsilons = np.ravel([norm.eps for norm in grown.model.norms])
    np.testing.assert_allclose(epsilons, [0.3 * 4 / 6, 0.5 * 4 / 6])
    outputs = jax.jit(jax.vmap(lambda tokens: (small(tokens), grown(tokens))))(TOKENS)
    np.testing.assert_allclose(*outputs, rtol=1e-11, atol=1e-11)
