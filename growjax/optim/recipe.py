"""An optimizer as data: what a plan says, and the optax chain that it means."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from growjax.axes import axes_of, get, put
from growjax.errors import PlanError, raise_all
from growjax.optim.age import Ages, matrices, scale_by_adam, youngest


Name = Literal["adamw", "lion", "sgd"]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How gradients become updates, apart from the learning rate.

    **Fields**

    - `name`: "adamw" (with an age for every coordinate), "lion" or "sgd" (with momentum `b1`).
    - `b1`, `b2`, `eps`: its memories of gradients and of their squares; short runs want a short `b2`.
    - `weight_decay`: of the matrices, per unit of learning rate.
    - `clip`: the largest norm of the whole gradient; None does not clip.
    - `new_rate`, `new_steps`: coordinates younger than `new_steps` steps that were not there at birth
      move at this multiple of the learning rate.

    Raises `PlanError` that lists every field out of range.

    **Example**

        Optimizer(b2=0.95, weight_decay=0.1).build().init(gj.partition(model)[0])
    """

    name: Name = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0
    new_rate: float = 1.0
    new_steps: int = 0

    def __post_init__(self):
        positive = self.clip is None or self.clip > 0
        checks = [
            ("name", f"one of {', '.join(get_args(Name))}", self.name, self.name in get_args(Name)),
            ("b1", "a rate from 0 to below 1", self.b1, 0 <= self.b1 < 1),
            ("b2", "a rate from 0 to below 1", self.b2, 0 <= self.b2 < 1),
            ("eps", "a positive number", self.eps, self.eps > 0),
            ("weight_decay", "0 or more", self.weight_decay, self.weight_decay >= 0),
            ("clip", "a positive norm, or None", self.clip, positive),
            ("new_rate", "0 or more", self.new_rate, self.new_rate >= 0),
            ("new_steps", "0 or more", self.new_steps, self.new_steps >= 0),
        ]
        faults = [
            f"{name}: expected {what}, got {got!r}" for name, what, got, ok in checks if not ok
        ]
        if not faults and (self.new_rate != 1) != (self.new_steps > 0):
            faults.append(
                "new_rate, new_steps: one says how much and the other how long; give both"
            )
        raise_all(PlanError, "this optimizer cannot be used:", faults)

    @property
    def curvature_every(self) -> int | None:
        """Every how many steps it wants the gradient of a loss on labels of the model's own drawing."""
        return None

    def build(self) -> "Rule":
        """The rule of one update; the learning rate is an argument of each."""
        rescale = {
            "adamw": lambda: scale_by_adam(self.b1, self.b2, self.eps),
            "lion": lambda: optax.scale_by_lion(self.b1, self.b2),
            "sgd": lambda: optax.trace(self.b1),
        }[self.name]()
        parts = [] if self.clip is None else [optax.clip_by_global_norm(self.clip)]
        parts += [rescale, optax.add_decayed_weights(self.weight_decay, matrices)]
        if self.new_steps:
            parts.append(scale_new(self.new_rate, self.new_steps))
        return rule(optax.chain(*parts))


class Rule(NamedTuple):
    """How parameters are updated: an optax transformation to which the learning rate is given.

    - `init(params) -> state`
    - `update(gradient, state, params, *, rate, curvature=None) -> (updates, state)`: what to add to the
      parameters. `curvature` is a second gradient, for rules that asked for one.
    - `judged(params, state) -> params`: what is evaluated; not what is trained for rules that average.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    judged: Callable[[Any, Any], Any] = lambda params, state: params


def rule(tx: optax.GradientTransformation) -> Rule:
    """The rule of an optax chain without learning rate and sign.

    **Example**

        rule(optax.scale_by_adam()).update(gradient, state, params, rate=1e-3)
    """
    tx = optax.with_extra_args_support(tx)

    def update(gradient, state, params, *, rate, curvature=None):
        more = {} if curvature is None else {"curvature": curvature}
        updates, state = tx.update(gradient, state, params, **more)
        return jax.tree.map(lambda u: u * -jnp.asarray(rate, u.dtype), updates), state

    return Rule(tx.init, update)


class NewState(NamedTuple):
    """Steps so far, and the age of every coordinate."""

    count: Int[Array, ""]
    ages: Ages


def scale_new(rate: float, steps: int) -> Any:
    """Multiply the updates of coordinates that growth added by `rate`, for their first `steps` steps.

    An entry of a leaf is as young as the youngest of its coordinates; what was there at birth is not
    new. An `optax.GradientTransformation`, for parameters that carry axes.
    """

    def init(params):
        table = axes_of(params)
        ages = {axis: jnp.zeros(size, jnp.int32) for axis, size in table.sizes.items()}
        return NewState(jnp.zeros((), jnp.int32), Ages(ages))

    def update(updates, state: NewState, params=None):
        del params
        table = axes_of(updates)
        out = {}
        for slot in table.of_kind("param"):
            if slot.value is not None:
                age = youngest(slot, state.ages.of, table.sizes, state.count)
                factor = jnp.where((age < state.count) & (age < steps), rate, 1.0)
                update = get(updates, slot.steps)
                out[slot.steps] = update * factor.astype(update.dtype)
        ages = {axis: age + 1 for axis, age in state.ages.of.items()}
        return put(updates, out), NewState(state.count + 1, Ages(ages))

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
