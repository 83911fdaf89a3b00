"""Multipliers of updates: by the size of the tensor, and by the age of a coordinate."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from growjax.axes import axes_of, get, put
from growjax.optim.age import Ages, born, by_youngest, older


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
    """The number of updates so far, and the age of every coordinate."""

    count: Int[Array, ""]
    ages: Ages


def scale_new(rate: float, steps: int) -> Any:
    """Multiply the updates of coordinates that growth added by `rate`, for their first `steps` steps.

    An entry of a leaf is as young as the youngest of its coordinates. The coordinates of the initial
    model do not count as new. An `optax.GradientTransformation`, for parameters that carry axes.
    """
    import optax

    def init(params):
        return NewState(jnp.zeros((), jnp.int32), born(params))

    def update(updates, state: NewState, params=None):
        del params
        out = {}
        for slot, age in by_youngest(updates, state.ages.of, state.count):
            factor = jnp.where((age < state.count) & (age < steps), rate, 1.0)
            out[slot.steps] = slot.value * factor.astype(slot.value.dtype)
        return put(updates, out), NewState(state.count + 1, older(state.ages))

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
