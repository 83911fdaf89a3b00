"""Contractions in the dtype of the activations, and how fresh matrices are drawn."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray


def affine(equation: str, x: Array, weight: Array, bias: Array | None = None) -> Array:
    """`einsum(equation, x, weight) + bias` in `x`'s dtype: parameters are cast where they are used.

    Casting here keeps float32 parameters under bfloat16 compute without a second copy of them.
    """
    y = jnp.einsum(equation, x, weight.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype)


def normal(key: PRNGKeyArray, shape: Sequence[int], fan_in: int) -> Array:
    """A matrix with variance 1 / `fan_in`."""
    return jax.random.normal(key, tuple(shape)) * fan_in**-0.5
