"""The hashed generator of certificates: `jax.random` takes its keys, and draws look random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from growjax import draws


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
