"""Products of tokens and a weight on CPUs: the rows of one matrix, and the gradients of an einsum."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from growjax.nn.linear import product
from growjax.nn.place import Place, running_on


# Several axes of the weight are contracted, or left, or the contracted one is its last
CASES = {
    "te,ekd->tkd": ((3, 5, 4), (4, 2, 6)),
    "tkd,kde->te": ((3, 5, 2, 6), (2, 6, 4)),
    "te,ve->tv": ((3, 5, 4), (7, 4)),
}


def arrays(equation: str, dtype: Any = np.float64) -> tuple[jax.Array, jax.Array]:
    """Tokens of three sequences, and a weight."""
    draw = np.random.default_rng(0)
    tokens, weight = CASES[equation]
    return jnp.asarray(draw.normal(size=tokens), dtype), jnp.asarray(
        draw.normal(size=weight), dtype
    )


def bent(equation: str, multiply=product):
    """The sum of the sines of the products of all sequences."""

    def total(x, weight):
        return jnp.sin(jax.vmap(lambda x: multiply(equation, x, weight))(x)).sum()

    return total


@pytest.mark.parametrize("equation", CASES)
def test_gradients_are_those_of_an_einsum(equation):
    with jax.enable_x64():
        x, weight = arrays(equation)
        one, other = bent(equation), bent(equation, jnp.einsum)
        expected = jax.jit(jax.grad(other, (0, 1)))(x, weight)
        for ours in (
            jax.jit(jax.grad(one, (0, 1)))(x, weight),
            jax.grad(one, (0, 1))(x[:], weight),
        ):
            for a, b in zip(ours, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)

        # Each sequence has a gradient of its own, and forward mode and second derivatives are there
        def alone(x):
            return jax.grad(lambda w: one(x[None], w))(weight)

        np.testing.assert_allclose(jax.vmap(alone)(x).sum(0), expected[1], rtol=0, atol=1e-12)
        along = [jax.jvp(f, (x, weight), (x, weight))[1] for f in (one, other)]
        np.testing.assert_allclose(*along, rtol=1e-12)
        along = [jax.jvp(jax.grad(f, 1), (x, weight), (x, weight))[1] for f in (one, other)]
        np.testing.assert_allclose(*along, rtol=0, atol=1e-11)


@pytest.mark.parametrize("equation", CASES)
def test_all_sequences_are_rows_of_one_matrix(equation):
    program = jax.make_jaxpr(jax.grad(bent(equation), (0, 1)))(*arrays(equation, np.float32))
    products = [e for e in program.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 3
    assert {v.aval.ndim for e in products for v in e.invars} == {2}


def test_a_program_for_a_tpu_has_the_einsum():
    arguments = arrays("te,ve->tv", np.float32)
    with running_on(Place("tpu")):
        ours, plain = (
            jax.make_jaxpr(bent("te,ve->tv", f))(*arguments) for f in (product, jnp.einsum)
        )
    assert str(ours) == str(plain)


def test_a_bfloat16_product_has_the_dtype_that_is_asked_for():
    x, weight = arrays("te,ve->tv", jnp.bfloat16)
    wide = lambda w: jax.vmap(lambda x: product("te,ve->tv", x, w, jnp.float32))(x)  # noqa: E731
    y, pull = jax.vjp(wide, weight)
    (gradient,) = pull(y)
    assert (y.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    expected = jnp.einsum("bte,btv->ve", x.astype(jnp.float32), y)
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected, rtol=2**-7, atol=2**-5)
