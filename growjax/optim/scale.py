"""Multipliers of updates: by the size of the tensor, and for coordinates that growth has just added."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from growjax.axes import axes_of, get, put
from growjax.growth import Births
from growjax.growth.births import entry_births
from growjax.optim.age import Since, just_born, youngest


def scale_by_parameter(floor: float = 1e-3) -> Any:
    """Multiply the update of each tensor by the root mean square of its entries, or `floor` if larger.

    Every layer in a stacked leaf is a tensor of its own. With Adam this is the AdamWScale of T5's
    trainers. Shazeer & Stern (2018), "Adafactor", section 8. An `optax.GradientTransformation`, for
    parameters that carry axes.
    """
    import optax

    def scaled(updates, params):
        out = {}
        for slot in axes_of(updates).params():
            # Stack axes lead, and share no dimension with others.
            within = [i for i, dim in enumerate(slot.dims) if dim.role != "stack"]
            dimensions = tuple(range(len(slot.dims) - len(within), len(slot.spec.groups)))
            square = jnp.square(get(params, slot.steps))
            size = jnp.sqrt(jnp.mean(square, dimensions, keepdims=True))
            out[slot.steps] = slot.value * jnp.maximum(size, floor)
        return put(updates, out)

    return optax.stateless(scaled)


class NewState(NamedTuple):
    """The births of coordinates, and the updates since each.

    Not their ages: a copy may be as old as its source, and a layer that does not run grows no older.
    """

    births: Births
    since: Since


def scale_new(rate: float, steps: int) -> Any:
    """Multiply the updates of coordinates that growth added by `rate`, for their first `steps` steps.

    An entry of a leaf is as young as the youngest of its coordinates. The coordinates of the initial
    model do not count as new. An `optax.GradientTransformation`, for parameters that carry axes.
    """
    import optax

    def init(params):
        return NewState(jax.tree.map(jnp.asarray, Births.original(params)), just_born(params))

    def update(updates, state: NewState, params=None):
        del params
        table, out = axes_of(updates), {}
        for slot in table.params():
            added = entry_births(slot, state.births.of, table.sizes) > 0
            age = youngest(slot, state.since.of, table.sizes, steps)
            factor = jnp.where(added & (age < steps), rate, 1.0)
            out[slot.steps] = slot.value * factor.astype(slot.value.dtype)
        since = jax.tree.map(lambda count: count + 1, state.since)
        return put(updates, out), NewState(state.births, since)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
