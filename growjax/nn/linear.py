"""Contractions in the dtype of the activations, and how fresh matrices are drawn."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray

from growjax.nn.place import current


def affine(equation: str, x: Array, weight: Array, bias: Array | None = None) -> Array:
    """`einsum(equation, x, weight) + bias` in `x`'s dtype: parameters are cast where they are used.

    Casting here keeps float32 parameters under bfloat16 compute without a second copy of them.
    """
    y = product(equation, x, weight.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype)


def normal(key: PRNGKeyArray, shape: Sequence[int], fan_in: int) -> Array:
    """A matrix with variance 1 / `fan_in`."""
    return jax.random.normal(key, tuple(shape)) * fan_in**-0.5


# Products on CPUs ----------------------------------------------------------------------------------


def product(equation: str, x: Array, weight: Array, dtype: DTypeLike | None = None) -> Array:
    """`einsum(equation, x, weight)` of tokens and a weight, with a result of this dtype.

    `x` ends with what is contracted, and the result has the rest of `x` and then that of `weight`.

    On a CPU, the tokens of all sequences under `vmap` are the rows of one matrix, and the gradient of
    the weight moves the smaller of two matrices and no other. XLA's own choice, of a sequence's tokens
    as a dimension of its own, copies the larger one element by element: that was a fifth of a step.
    """
    place = current()
    # Under `shard_map` and explicit sharding, rows of several devices are no one matrix
    on_one = jax.sharding.get_abstract_mesh().empty
    if place is None or place.platform != "cpu" or place.mesh is not None or not on_one:
        return jnp.einsum(equation, x, weight, preferred_element_type=dtype)
    mine, its = equation.split("->")[0].split(",")
    contracted = [letter for letter in mine if letter in its]
    rest = [letter for letter in its if letter not in mine]
    weight = weight.transpose([its.index(letter) for letter in contracted + rest])
    return _bind(x, weight, len(contracted), dtype)


def _bind(x: Array, weight: Array, count: int, dtype: DTypeLike | None) -> Array:
    dims = tuple(range(x.ndim - count, x.ndim)), tuple(range(count))
    return _product.bind(x, weight, dimension_numbers=(dims, ((), ())), dtype=dtype)


def _plain(x: Array, weight: Array, *, dimension_numbers: Any, dtype: DTypeLike | None) -> Array:
    return jax.lax.dot_general(x, weight, dimension_numbers, preferred_element_type=dtype)


def _shape(x: Any, weight: Any, *, dimension_numbers: Any, dtype: DTypeLike | None) -> Any:
    count = len(dimension_numbers[0][1])
    return ShapedArray(x.shape[:-count] + weight.shape[count:], dtype or x.dtype)


def _matrices(x: Array, weight: Array, count: int) -> tuple[Array, Array]:
    """Both as matrices: `[tokens, contracted]` and `[contracted, rest]`."""
    size = math.prod(weight.shape[:count])
    return x.reshape(-1, size), weight.reshape(size, -1)


def _batched(args: Any, dims: Any, *, dimension_numbers: Any, dtype: Any) -> tuple[Array, int]:
    """Of sequences that share a weight, one product of all their tokens."""
    (x, weight), (dim, shared) = args, dims
    if dim is None or shared is not None:
        plain = lambda x, w: _plain(x, w, dimension_numbers=dimension_numbers, dtype=dtype)  # noqa: E731
        return jax.vmap(plain, in_axes=dims)(x, weight), 0
    count, x = len(dimension_numbers[0][1]), jnp.moveaxis(x, dim, 0)
    y = _bind(*_matrices(x, weight, count), 1, dtype)
    return y.reshape(x.shape[:-count] + weight.shape[count:]), 0


def _along(primals: Any, tangents: Any, **params: Any) -> tuple[Array, Any]:
    """The value, which policies of `jax.checkpoint` see as a product, and its derivative."""
    (x, weight), (dx, dw) = primals, tangents
    terms = []
    if type(dx) is not ad.Zero:
        terms.append(_plain(dx, weight, **params))
    if type(dw) is not ad.Zero:
        terms.append(_product.bind(x, dw, **params))
    return _plain(x, weight, **params), sum(terms[1:], terms[0])


def _back(gradient: Any, x: Array, weight: Any, *, dimension_numbers: Any, dtype: Any) -> list:
    """The gradient of the weight; `x` is a constant of this product.

    Barriers keep XLA from folding a transpose into the product, whose kernel for it is slow.
    """
    if type(gradient) is ad.Zero:
        return [None, gradient]
    apart, shape = jax.lax.optimization_barrier, weight.aval.shape
    size = math.prod(shape[: len(dimension_numbers[0][1])])
    rows = x.reshape(-1, size).astype(gradient.dtype)
    gradient = gradient.reshape(-1, math.prod(shape) // size)
    if size <= gradient.shape[1]:
        total = apart(apart(rows.T) @ gradient)
    else:
        total = apart(apart(gradient.T) @ rows).T
    return [None, total.reshape(shape).astype(weight.aval.dtype)]


# It has the name and the dimensions of JAX's own product: those who read a program see that
_product = Primitive("dot_general")
_product.def_impl(jax.jit(_plain, static_argnames=("dimension_numbers", "dtype")))
_product.def_abstract_eval(_shape)
mlir.register_lowering(_product, mlir.lower_fun(_plain, multiple_results=False))
batching.primitive_batchers[_product] = _batched
ad.primitive_jvps[_product] = _along
ad.primitive_transposes[_product] = _back
