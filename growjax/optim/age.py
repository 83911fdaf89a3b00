"""Adam with an age for every coordinate, so that new ones are neither kicked nor starved.

Adam divides its moments by `1 - b^t`. A new coordinate has empty moments; under the old `t` it would
move by up to 6.6 learning rates (b2 = 0.999). Here `t` is counted per coordinate of each axis: a few
small vectors, since an entry of a leaf is as old as the youngest of its coordinates.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from growjax.axes import Slot, axes_of, get, put
from growjax.maps import NONE, AxisMap


class Ages(eqx.Module):
    """How many updates each coordinate of each axis has seen: `{axis: [size]}`."""

    of: dict[str, Int[Array, " size"]]


class AgedAdamState(NamedTuple):
    """First moments, second moments (both as the parameters) and ages."""

    mu: Any
    nu: Any
    ages: Ages


def grown_ages(ages: Ages, move: AxisMap, *, keep: bool) -> Ages:
    """Ages after one map: fresh coordinates are 0, copies as old as their source if `keep`."""
    if move.axis not in ages.of:
        return ages
    old = ages.of[move.axis]
    young = move.is_new() if not keep else move.source == NONE
    new = jnp.where(young, 0, old[np.maximum(move.source, 0)])
    return Ages({**ages.of, move.axis: new})


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8):
    """Adam's rescaling with bias correction by age; an `optax.GradientTransformation`.

    The same updates as `optax.scale_by_adam` until the model grows (see `growjax.carry`). The
    parameters must carry axes: give it the first half of `gj.partition(model)`.
    """
    import optax

    def init(params):
        table = axes_of(params)
        ages = {axis: jnp.zeros(size, jnp.int32) for axis, size in table.sizes.items()}
        return AgedAdamState(
            jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params), Ages(ages)
        )

    def update(updates, state: AgedAdamState, params=None):
        del params
        table = axes_of(updates)
        ages = {axis: age + 1 for axis, age in state.ages.of.items()}
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        first, second = _debias(ages, b1), _debias(ages, b2)
        out = {}
        for slot in table.of_kind("param"):
            if slot.value is not None:
                m, v = get(mu, slot.steps), get(nu, slot.steps)
                m = m / youngest(slot, first, table.sizes, 1.0).astype(m.dtype)
                v = v / youngest(slot, second, table.sizes, 1.0).astype(v.dtype)
                out[slot.steps] = m / (jnp.sqrt(v) + eps)
        return put(updates, out), AgedAdamState(mu, nu, Ages(ages))

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def youngest(slot: Slot, vectors: Mapping[str, Array], sizes: Mapping[str, int], top: Any) -> Array:
    """The least of each entry's coordinates, shaped to broadcast to the leaf; `top` if it has none.

    `vectors` holds a number for every coordinate of every axis: an age, or something that rises with it.
    """
    least = jnp.full((1,) * len(slot.dims), top)
    for i, dim in enumerate(slot.dims):
        vector = vectors[dim.axis].reshape((-1,) + (1,) * (len(slot.dims) - i - 1))
        least = jnp.minimum(least, vector)
    if all(count == 1 for count in slot.spec.groups):
        return least
    return slot.join(jnp.broadcast_to(least, [sizes[dim.axis] for dim in slot.dims]))


def _debias(ages: Mapping[str, Array], decay: float) -> dict[str, Array]:
    """`1 - decay^t` for every coordinate of every axis."""
    log_decay = math.log(decay) if decay else -math.inf
    return {axis: -jnp.expm1(age.astype(float) * log_decay) for axis, age in ages.items()}


def matrices(params) -> Any:
    """True at the matrices of a model: what weight decay is usually meant for (not gains, biases)."""
    mask = jax.tree.map(lambda _: False, params)
    slots = axes_of(params).of_kind("param")
    return put(mask, {s.steps: s.init == "normal" for s in slots if s.value is not None})


def adamw(
    learning_rate: float | Callable[[Any], Any],
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Callable[[Any], Any] = matrices,
):
    """AdamW whose bias correction knows how old every coordinate is; an `optax` transformation.

    **Example**

        tx = growjax.optim.adamw(1e-3, weight_decay=0.1)
        state = tx.init(gj.partition(model)[0])
    """
    import optax

    return optax.chain(
        scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
