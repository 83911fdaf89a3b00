"""Update rules: optax chains whose update takes the learning rate as an argument."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from growjax.axes import get, put
from growjax.optim.age import Ages, born, by_youngest


class Rule(NamedTuple):
    """An optax transformation whose update takes the learning rate as an argument.

    - `init(params) -> state`
    - `update(gradient, state, params, *, rate, curvature=None, labels=1) -> (updates, state)`: the
      updates are added to the parameters. `curvature` is a second gradient, for rules that need one, and
      `labels` the number of labels that it is the mean over (see `growjax.optim.scale_by_sophia`). If
      parts of the model decay at different rates, it gets `decays` too, for
      `growjax.optim.decayed_weights`.
    - `judged(params, state) -> params`: the parameters to evaluate, for rules that average the trained
      ones; None for all other rules.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    judged: Callable[[Any, Any], Any] | None = None

    def evaluated(self, params: Any, state: Any) -> Any:
        """The parameters to evaluate, to return and to save at the end of a run."""
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
    """The state of `schedule_free`.

    - `offset`: the base rule's own parameters minus the trained ones; as the parameters.
    - `total`, `weights`: the sum of squared rates since the start, and since each coordinate's birth.
    - `base`: the state of the base rule.
    """

    offset: Any
    total: Float[Array, ""]
    weights: Ages
    base: Any


def schedule_free(base: Rule, b1: float = 0.9) -> Rule:
    """Average the parameters of `base` instead of decaying its rate: Schedule-Free learning.

        z <- z + update of base, from the gradient at y
        x <- x + (rate^2 / sum of rate^2) (z - x)            evaluated
        y  = b1 x + (1 - b1) z                               trained

    `b1` (above 0) takes the place of the momentum, so `base` should have none. The rate should warm up
    and then stay constant; a rate of 0 moves nothing. As long as the rate does not fall, the updates are
    those of `optax.contrib.schedule_free`.

    The state stores `z - y` instead of `z`. A coordinate that growth adds starts with `x = y = z`, at its
    initial weight, and with a sum of squared rates of its own: divided by the sum since the start of
    training, its `x` would hardly move. Defazio et al. (2024), "The Road Less Scheduled",
    arXiv:2405.15682.

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
            # y moves by (1 - b1) times the move of z plus b1 times that of x, and z - x = d / b1
            out[slot.steps] = (1 - b1 + b1 * share) * u + share * d
            offset[slot.steps] = d + u - out[slot.steps]
        moved = AveragedState(put(state.offset, offset), total, weights, inner)
        return put(step, out), moved

    def judged(params, state: AveragedState):
        behind = (1 - b1) / b1
        return jax.tree.map(lambda y, d: y - behind * d, params, state.offset)

    return Rule(init, update, judged)
