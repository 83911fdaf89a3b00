"""Optimizers that see whole matrices, on models of other people: carried as a fresh run, or refused.

Also parameters and optimizers that are out of the ordinary: without axes, without a hash.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import growjax as gj
from growjax import optim
from growjax.errors import StateError
from growjax.plan.optimizer import Optimizer
from tests import zoo
from tests.conftest import DEEP
from tests.test_inference import ZOO


STEPS = 2


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def shampoo(both: bool) -> optax.GradientTransformation:
    """The sums of `G G^T` of Shampoo (and of `G^T G`), which are matrices of other shapes than `G`."""

    def squares(g):
        g = g.reshape(len(g), -1) if g.ndim else g.reshape(1, 1)
        return {"left": g @ g.T, "right": g.T @ g} if both else g @ g.T

    def update(updates, state, params=None):
        return updates, jax.tree.map(jnp.add, state, jax.tree.map(squares, updates))

    return optax.GradientTransformation(
        lambda params: jax.tree.map(lambda x: squares(jnp.zeros_like(x)), params), update
    )


CARRIED = {
    "growjax muon": lambda: Optimizer("muon", clip=None).build(),
    "scale_by_muon": lambda: optax.chain(optim.scale_by_muon(), optax.scale(-0.01)),
    "optax muon": lambda: optax.contrib.muon(1e-2),
}
REFUSED = {
    "shampoo": lambda: shampoo(True),
    "one side of shampoo": lambda: shampoo(False),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "sm3": lambda: optax.sm3(1e-2),
}
QUICK = ("optax muon", "shampoo")
# Fused queries, keys and values; a list of blocks around eqx.nn's attention; MLPs over two dimensions
MODELS = ["fused", "vision transformer", "mixer", "tower"]


def run(tx, weights, gradients):
    """The state after some updates."""
    state = tx.init(weights[0])
    for model, gradient in zip(weights, gradients, strict=True):
        more = {"rate": 0.01} if isinstance(tx, optim.Rule) else {}
        state = tx.update(gradient, state, model, **more)[1]
    return state


@pytest.mark.parametrize("name", MODELS)
def test_state_of_matrices_is_that_of_a_fresh_run_or_refused(name):
    """In the quick profile for one model and two rules: each takes some seconds to compile."""
    if not DEEP and name != "tower":
        pytest.skip("the deep profile has it")
    make, batch, specs, options, sizes = ZOO[name]
    small = gj.annotate(zoo.build(make), specs, **options)
    op = gj.copy(**sizes, shares="random")
    trained, rest = gj.partition(small)
    rng = np.random.default_rng(0)
    weights = [
        jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), trained) for _ in range(STEPS)
    ]
    grown = [op(eqx.combine(w, rest), key=zoo.KEY) for w in weights]
    grown_rest = gj.partition(grown[0])[1]

    def loss(trained, rest):
        """Large, so that the small constants of optimizers are small next to its gradients."""
        out = jax.vmap(eqx.combine(trained, rest))(batch)
        return 1e3 * jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(out.size)).reshape(out.shape))

    @eqx.filter_jit
    def gradients(weights, rest):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *weights)
        return jax.vmap(lambda w: jax.grad(loss)(w, rest))(stacked)

    def by_step(weights, rest):
        stacked = gradients(weights, rest)
        return [jax.tree.map(lambda x, t=t: x[t], stacked) for t in range(STEPS)]

    old, large = by_step(weights, rest), [gj.partition(model)[0] for model in grown]
    new = by_step(large, grown_rest)
    rules = CARRIED | REFUSED
    for rule, factory in (rules if DEEP else {rule: rules[rule] for rule in QUICK}).items():
        tx = factory()
        state, last = run(tx, weights, old), eqx.combine(weights[-1], rest)
        if rule in REFUSED:
            with pytest.raises(StateError, match="cannot be carried through copy"):
                gj.carry(op, state, last, optimizer=tx, key=zoo.KEY)
            continue
        carried = gj.carry(op, state, last, optimizer=tx, key=zoo.KEY)
        close = lambda a, b: np.testing.assert_allclose(  # noqa: E731
            a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max(initial=0)
        )
        jax.tree.map(close, carried, run(tx, large, new))


class Scaled(eqx.Module):
    scale: jax.Array = gj.param("")
    up: jax.Array | None = gj.param("embed -> mlp")


@pytest.mark.parametrize("alone", [False, True], ids=["beside axes", "alone"])
def test_a_leaf_without_axes_is_as_old_as_the_model(alone):
    params = Scaled(jnp.ones(()), None if alone else jnp.ones((3, 4)))
    ours: Any = optim.scale_by_adam()
    theirs: Any = optax.scale_by_adam()
    left, right = ours.init(params), theirs.init(params)
    gradient = lambda tree: jax.tree.map(lambda x: jnp.full_like(x, 0.5), tree)  # noqa: E731
    for _ in range(2):
        a, left = ours.update(gradient(params), left)
        b, right = theirs.update(gradient(params), right)
        np.testing.assert_allclose(a.scale, b.scale, rtol=1e-12)
    if alone:
        return
    # New coordinates of other leaves are young, this one is not
    op = gj.growth.given({"up": np.ones((3, 2))}, mlp=6)
    carried, grown = gj.carry(op, left, params, optimizer=ours), gj.grow(op, params)
    a, _ = ours.update(gradient(grown), carried)
    b, _ = theirs.update(gradient(params), right)
    np.testing.assert_allclose(a.scale, b.scale, rtol=1e-12)


@dataclasses.dataclass
class Momentum:
    """An optimizer of one's own, which has no hash."""

    decay: float

    def init(self, params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, updates, state, params=None):
        state = jax.tree.map(lambda m, g: self.decay * m + g, state, updates)
        return jax.tree.map(lambda m: -0.1 * m, state), state


def test_an_optimizer_without_a_hash_is_carried():
    model, tx = Scaled(jnp.ones(()), jnp.ones((3, 4))), Momentum(0.9)
    state = jax.tree.map(jnp.ones_like, model)
    op = gj.growth.given({"up": np.ones((3, 2))}, mlp=6)
    carried = gj.carry(op, state, model, optimizer=tx)
    np.testing.assert_array_equal(carried.up, np.repeat([[1, 1, 1, 1, 0, 0]], 3, axis=0))


class Stacked(eqx.Module):
    """A model whose only axis is a stack, beside a leaf that is of none."""

    gains: jax.Array = gj.param("layers: 3")
    scale: jax.Array = gj.param("3")


def test_a_stack_that_was_empty_grows_in_a_model_that_keeps_its_age():
    tx, model = optim.scale_by_adam(), Stacked(jnp.ones((0, 3)), jnp.ones(3))
    params = gj.partition(model)[0]
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(jax.tree.map(jnp.ones_like, params), state)
    op = gj.fresh(layers=2)
    state = gj.carry(op, state, model, optimizer=tx, key=jax.random.key(0))
    assert state.ages.of[""].tolist() == [2] and state.ages.of["layers"].tolist() == [0, 0]
    grown = gj.partition(gj.grow(op, model, key=jax.random.key(0)))[0]
    first, _ = tx.update(jax.tree.map(jnp.ones_like, grown), state)
    for update in jax.tree.leaves(first):  # of equal gradients, whatever the age
        np.testing.assert_allclose(update, 1, rtol=1e-5)
