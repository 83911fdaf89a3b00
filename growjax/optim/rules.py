"""The rule of one update: an optax chain to which the learning rate is given, and what is judged."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from growjax.axes import get, put
from growjax.optim.age import Ages, born, by_youngest


class Rule(NamedTuple):
    """How parameters are updated: an optax transformation to which the learning rate is given.

    - `init(params) -> state`
    - `update(gradient, state, params, *, rate, curvature=None, labels=1) -> (updates, state)`: what to
      add to the parameters. `curvature` is a second gradient, for rules that asked for one, and `labels`
      how many it is the mean over (see `growjax.optim.scale_by_sophia`). Where parts decay each in its
      own way it is given `decays` too, for `growjax.optim.decayed_weights`.
    - `judged(params, state) -> params`: what is evaluated if that is not what is trained, as in rules
      that average; None in all others.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    judged: Callable[[Any, Any], Any] | None = None

    def evaluated(self, params: Any, state: Any) -> Any:
        """The parameters to evaluate, to hand out and to keep in the end."""
        return params if self.judged is None else self.judged(params, state)


def rule(tx: Any) -> Rule:
    """The rule of an optax chain without learning rate and sign.

    **Example**

        rule(optax.scale_by_adam()).update(gradient, state, params, rate=1e-3)
    """
    import optax

    tx = optax.with_extra_args_support(tx)

    def update(gradient, state, params, *, rate, curvature=None, labels=1.0, **more):
        if curvature is not None:
            more |= {"curvature": curvature, "labels": labels}
        updates, state = tx.update(gradient, state, params, **more)
        return jax.tree.map(lambda u: u * -jnp.asarray(rate, u.dtype), updates), state

    return Rule(tx.init, update)


class AveragedState(NamedTuple):
    """What `schedule_free` keeps.

    - `offset`: the base rule's own parameters minus the trained ones; as the parameters.
    - `total`, `weights`: the sum of squared rates since birth, and since each coordinate was new.
    - `base`: the state of the base rule.
    """

    offset: Any
    total: Float[Array, ""]
    weights: Ages
    base: Any


def schedule_free(base: Rule, b1: float = 0.9) -> Rule:
    """Average what `base` does instead of decaying its rate: Schedule-Free learning.

        z <- z + update of base, from the gradient at y
        x <- x + (rate^2 / sum of rate^2) (z - x)            judged
        y  = b1 x + (1 - b1) z                               trained

    `b1` takes the place of the momentum, so `base` should have none; it is above 0. The rate is to be
    warmed up and then constant; at a rate of 0 nothing moves. At a rate that never falls these are the
    updates of `optax.contrib.schedule_free`.

    Instead of `z`, its distance from `y` is kept. A coordinate that growth added starts with
    `x = y = z`, wherever it was drawn, and an average of its own: under the sum of all the past it
    would hardly move. Defazio et al. (2024), "The Road Less Scheduled", arXiv:2405.15682.

    **Example**

        moves = schedule_free(rule(growjax.optim.scale_by_adam(b1=0.0)))
    """

    def init(params):
        offset = jax.tree.map(jnp.zeros_like, params)
        return AveragedState(offset, jnp.zeros(()), born(params, float), base.init(params))

    def update(gradient, state: AveragedState, params, *, rate, **more):
        step, inner = base.update(gradient, state.base, params, rate=rate, **more)
        weight = jnp.square(jnp.asarray(rate, float))
        total = state.total + weight
        weights = Ages({axis: seen + weight for axis, seen in state.weights.of.items()})
        out, offset = {}, {}
        for slot, seen in by_youngest(step, weights.of, total):
            u, d = slot.value, get(state.offset, slot.steps)
            share = jnp.where(seen > 0, weight / jnp.where(seen > 0, seen, 1), 0).astype(u.dtype)
            # y moves by (1 - b1) of what z does and b1 of what x does, and x is d / b1 behind z
            out[slot.steps] = (1 - b1 + b1 * share) * u + share * d
            offset[slot.steps] = d + u - out[slot.steps]
        moved = AveragedState(put(state.offset, offset), total, weights, inner)
        return put(step, out), moved

    def judged(params, state: AveragedState):
        behind = (1 - b1) / b1
        return jax.tree.map(lambda y, d: y - behind * d, params, state.offset)

    return Rule(init, update, judged)
