"""Adam with an age for every coordinate: a new one starts its bias correction anew.

Adam divides its moments by `1 - b^t`. The moments of a new coordinate are zero; divided by the `1 - b^t`
of an old step count, they would move it by up to 6.6 learning rates (b2 = 0.999). So `t` is counted for
every coordinate of every axis. An entry of a leaf is as old as the youngest of its coordinates, so these
ages take one small vector per axis.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from growjax.algebra import AxisMap
from growjax.axes import Slot, axes_of, put
from growjax.growth.births import over_entries
from growjax.optim.divided import decayed_weights


class Ages(eqx.Module):
    """The number of updates of each coordinate, or another sum over them: `{axis: [size]}`."""

    of: dict[str, Num[Array, " size"]]


class Since(eqx.Module):
    """The number of updates since each coordinate was born, and since the last growth (`last`).

    It starts from 0 for every copy, whereas the age of a copy may be that of its source.
    """

    of: dict[str, Num[Array, " size"]]
    last: Num[Array, ""]


class AgedAdamState(NamedTuple):
    """First moments (None if `b1` is 0), second moments, both as the parameters, and ages."""

    mu: Any
    nu: Any
    ages: Ages


class AgedAdEMAMixState(NamedTuple):
    """Fast and slow first moments, second moments, all as the parameters, and ages."""

    m1: Any
    m2: Any
    nu: Any
    ages: Ages


def grown_age(age: Num[Array, " old"], move: AxisMap, *, keep: bool) -> Num[Array, " new"]:
    """Ages along the axis of a map after it: 0 if new; if `keep`, copies are as old as the source."""
    if not age.shape[0]:  # the axis of a stack without layers
        return jnp.zeros(move.length, age.dtype)
    young = move.is_new() if not keep else move.source < 0
    return jnp.where(young, 0, age[np.maximum(move.source, 0)])


def born(params: Any, dtype: Any = jnp.int32) -> Ages:
    """An age of 0 for every coordinate of every axis; and of `""`, which has one, if all are stacks.

    A stack may be empty, before it grows and after: then the model itself still has an age.
    """
    table = axes_of(params)
    sizes = table.sizes
    if not any(size for axis, size in sizes.items() if "stack" not in table.roles(axis)):
        sizes = {**sizes, "": 1}
    return Ages({axis: jnp.zeros(size, dtype) for axis, size in sizes.items()})


def just_born(params: Any) -> Since:
    """0 updates since the birth of every coordinate of every axis."""
    zeros = {axis: jnp.zeros(size, jnp.int32) for axis, size in axes_of(params).sizes.items()}
    return Since(zeros, jnp.zeros((), jnp.int32))


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, nesterov: bool = False
) -> Any:
    """Adam's rescaling with bias correction by age; an `optax.GradientTransformation`.

    The same updates as `optax.scale_by_adam` until the model grows (see `growjax.carry`). The
    parameters must carry axes: give it the first half of `gj.partition(model)`.
    """
    import optax

    def init(params):
        # With b1 = 0 the first moment is the gradient itself
        mu = jax.tree.map(jnp.zeros_like, params) if b1 else None
        return AgedAdamState(mu, jax.tree.map(jnp.zeros_like, params), born(params))

    def update(updates, state: AgedAdamState, params=None):
        del params
        ages = older(state.ages)
        mu = _averaged(state.mu, updates, b1) if b1 else updates
        nu = _averaged_squares(state.nu, updates, b2)
        first = _debiased(mu, ages, b1)
        if nesterov:
            ahead, now = _debiased(mu, older(ages), b1), _debiased(updates, ages, b1)
            first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, ahead, now)
        out = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), first, _debiased(nu, ages, b2))
        return out, AgedAdamState(mu if b1 else None, nu, ages)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def scale_by_ademamix(
    b1: float = 0.9, b2: float = 0.999, b3: float = 0.9999, alpha: float = 5.0, eps: float = 1e-8
) -> Any:
    """Adam with a second, slow average of gradients; an `optax.GradientTransformation`.

    `(m1 + alpha * m2) / (sqrt(v) + eps)`, where `m2` decays by `b3` and has no bias correction: it rises
    slowly from zero, and does so again for every coordinate that growth adds. The same updates as
    `optax.contrib.scale_by_ademamix` until the model grows. Pagliardini et al. (2024), "The AdEMAMix
    Optimizer: Better, Faster, Older", arXiv:2409.03137.
    """
    import optax

    def init(params):
        blank = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return AgedAdEMAMixState(blank(), blank(), blank(), born(params))

    def update(updates, state: AgedAdEMAMixState, params=None):
        del params
        ages = older(state.ages)
        m1 = _averaged(state.m1, updates, b1)
        m2 = _averaged(state.m2, updates, b3)
        nu = _averaged_squares(state.nu, updates, b2)
        out = jax.tree.map(
            lambda fast, slow, v: (fast + alpha * slow) / (jnp.sqrt(v) + eps),
            _debiased(m1, ages, b1),
            m2,
            _debiased(nu, ages, b2),
        )
        return out, AgedAdEMAMixState(m1, m2, nu, ages)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _averaged(moments: Any, updates: Any, decay: float) -> Any:
    return jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, moments, updates)


def _averaged_squares(moments: Any, updates: Any, decay: float) -> Any:
    return jax.tree.map(lambda v, g: decay * v + (1 - decay) * g * g, moments, updates)


def older(ages: Ages) -> Ages:
    """The ages one update later."""
    return Ages({axis: age + 1 for axis, age in ages.of.items()})


def _debiased(moments: Any, ages: Ages, decay: float) -> Any:
    """Moments divided by `1 - decay^t`, where `t` is the age of each entry."""
    log_decay = math.log(decay) if decay else -math.inf
    # 1 - decay^t, the total weight of the gradients in an average that started from zero
    weights = {axis: -jnp.expm1(age.astype(float) * log_decay) for axis, age in ages.of.items()}
    return put(
        moments,
        {
            slot.steps: slot.value / weight.astype(slot.value.dtype)
            for slot, weight in by_youngest(moments, weights, oldest(weights))
        },
    )


def oldest(vectors: Mapping[str, Array]) -> Array:
    """The largest number of any coordinate: that of a leaf without axes, which is as old as the model."""
    return functools.reduce(jnp.maximum, [jnp.max(x) for x in vectors.values() if x.size])


def by_youngest(tree: Any, vectors: Mapping[str, Array], top: Any) -> Iterator[tuple[Slot, Array]]:
    """Pairs of the slot of every array in a tree like the parameters, and its `youngest` array."""
    table = axes_of(tree)
    for slot in table.params():
        yield slot, youngest(slot, vectors, table.sizes, top)


def youngest(slot: Slot, vectors: Mapping[str, Array], sizes: Mapping[str, int], top: Any) -> Array:
    """The minimum over each entry's coordinates, broadcastable to the leaf; `top` if it has no axes.

    `vectors` holds a number for every coordinate of every axis: an age, or a quantity that rises with it.
    """
    return over_entries(slot, vectors, sizes, jnp.minimum, jnp.asarray(top))


def matrices(params) -> Any:
    """A mask: True at the matrices of a model, which usually decay; False at gains and biases."""
    mask = jax.tree.map(lambda _: False, params)
    slots = axes_of(params).of_kind("param")
    return put(mask, {s.steps: s.init == "normal" for s in slots if s.value is not None})


def not_biases(params) -> Any:
    """A mask: True at matrices and at the gains of norms, which some trainers decay as well."""
    mask = jax.tree.map(lambda _: False, params)
    slots = axes_of(params).of_kind("param")
    return put(mask, {s.steps: s.init != "zeros" for s in slots if s.value is not None})


def adamw(
    learning_rate: float | Callable[[Any], Any],
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Callable[[Any], Any] = matrices,
):
    """AdamW with a bias correction by the age of every coordinate; an `optax` transformation.

    The parameters must carry axes: give it the first half of `gj.partition(model)`. `mask` chooses the
    leaves that decay.

    **Example**

        tx = growjax.optim.adamw(1e-3, weight_decay=0.1)
        state = tx.init(gj.partition(model)[0])
    """
    import optax

    return optax.chain(
        scale_by_adam(b1, b2, eps),
        decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
