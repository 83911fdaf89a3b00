"""Sophia-G: updates of at most the learning rate, smaller where the curvature of the loss is large."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class SophiaState(NamedTuple):
    """The mean gradient and the mean curvature, both as the parameters."""

    m: Any
    h: Any


def scale_by_sophia(b1: float = 0.965, b2: float = 0.99, rho: float = 0.04) -> Any:
    """Sophia-G's rescaling; an `optax.GradientTransformationExtraArgs`.

        m <- b1 m + (1 - b1) g
        h <- b2 h + (1 - b2) labels * curvature^2            in steps with a `curvature`
        update = sign(m) min(1, |m| / (rho h + 1e-15))

    `update(..., curvature=, labels=)`: `curvature` is the gradient of the mean loss on labels drawn from
    the model's own predictions, and `labels` the number of labels drawn. `labels * curvature^2` is an
    unbiased estimate of the diagonal of the Gauss-Newton matrix, so `rho` has the same effect at every
    batch size. Only `rho * labels` matters: without `labels` (1), `rho` is the `rho * bs` of the paper.
    In steps without `curvature` (most steps) `h` stays unchanged, bit by bit; in the others the update
    uses the new `h`.

    Moments have no bias correction. A coordinate with zero `h`, such as a new one, takes steps of plus or
    minus 1. Liu et al. (2023), "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
    Pre-training", arXiv:2305.14342.

    **Example**

        tx = growjax.optim.scale_by_sophia()
        updates, state = tx.update(gradient, state, curvature=drawn, labels=batch * length)
    """
    import optax

    def init(params):
        return SophiaState(*(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(updates, state: SophiaState, params=None, *, curvature=None, labels=1.0, **_):
        del params
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.m, updates)
        h = state.h
        if curvature is not None:

            def refreshed(h, g):
                return b2 * h + (1 - b2) * jnp.asarray(labels, g.dtype) * g * g

            h = jax.tree.map(refreshed, h, curvature)
        out = jax.tree.map(
            lambda m, h: jnp.sign(m) * jnp.minimum(1, jnp.abs(m) / (rho * h + 1e-15)), m, h
        )
        return out, SophiaState(m, h)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]
