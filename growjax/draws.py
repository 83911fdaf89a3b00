"""Random keys whose programs compile in no time, for numbers of which any will do.

The default generator is twenty rounds of mixing, which a compiler unrolls for every array that is drawn:
most of the time that it takes to compile a growth. This one hashes a counter (by the finaliser of
MurmurHash3), which is enough for weights that a certificate draws and throws away.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl
from jaxtyping import Array, PRNGKeyArray


_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio, an odd number without short cycles


def _mixed(x: Array) -> Array:
    """A hash of every number in a uint32 array, one to one."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _seed(seed: Array) -> Array:
    return jnp.stack([_mixed(seed.astype(jnp.uint32)), jnp.uint32(_GOLDEN)])


def _fold_in(key: Array, data: Any) -> Array:
    a = _mixed(key[0] ^ jnp.asarray(data, jnp.uint32))
    return jnp.stack([a, _mixed(key[1] + a * jnp.uint32(_GOLDEN))])


def _bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    counter = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    bits = _mixed(counter * jnp.uint32(_GOLDEN) + key[0]) ^ key[1]
    if bit_width < 64:
        return bits.astype(f"uint{bit_width}")
    # The lower half of a mantissa follows the upper one, at the price of one product
    return (bits.astype("uint64") << 32) | (bits * jnp.uint32(_GOLDEN)).astype("uint64")


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    numbers = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    fold: Any = lambda n: _fold_in(key, ~n)  # noqa: E731
    for _ in shape:
        fold = jax.vmap(fold)
    return fold(numbers)


_HASHED = define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_bits,
    fold_in=_fold_in,
    name="growjax_hashed",
    tag="hash",
)


def key(seed: int) -> PRNGKeyArray:
    """A key of the hashed generator, which every function of `jax.random` takes."""
    data: Any = np.array([_GOLDEN, seed], np.uint32)
    return jax.random.wrap_key_data(data, impl=_HASHED)
