"""Training in phases: each trains a part of the network, or grows it first and goes on."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

import growjax as gj


class Task(Protocol):
    """What is learned. A task is a pytree, so that one program serves every seed."""

    def draw(self, key: PRNGKeyArray) -> Any:
        """A batch of fresh examples."""
        ...

    def loss(self, model: Any, batch: Any) -> Array:
        """The mean loss of a batch."""
        ...


class Phase(NamedTuple):
    """Some steps of a part of the network, after it has grown."""

    steps: int
    subnet: gj.Subnet | None = None
    grow: gj.Operator | None = None


def staged(schedule: Any) -> list[Phase]:
    """The phases of a `gj.path_schedule`; the whole network is no path, so that its program is shared."""
    return [
        Phase(part.stop - part.start, None if part.path.length == schedule.layers else part.path)
        for part in schedule.stages
    ]


@functools.cache
def adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam that warms up over a twentieth of the run, at a constant rate after that."""
    warmup = optax.linear_schedule(rate / 10, rate, max(steps // 20, 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(warmup))


def fit(
    model: Any, phases: Sequence[Phase], task: Task, *, rate: float, every: int, seed: int
) -> Iterator[tuple[int, Any]]:
    """Train, and give `(steps so far, whole model)` after every `every` steps of each phase."""
    tx = adam(rate, sum(phase.steps for phase in phases))
    state, step = tx.init(gj.partition(model)[0]), 0
    for n, phase in enumerate(phases):
        if phase.grow is not None:
            key = jax.random.fold_in(jax.random.key(seed), n)
            state = gj.carry(phase.grow, state, model, optimizer=tx, key=key)
            model = gj.grow(phase.grow, model, key=key)
        end = step + phase.steps
        while step < end:
            count = min(every, end - step)
            model, state = _steps(
                model, state, task, phase.subnet, jnp.asarray(seed), jnp.asarray(step), count, tx
            )
            step += count
            yield step, model


@eqx.filter_jit
def _steps(model, state, task, subnet, seed, first, count: int, tx):
    """`count` steps in one program."""
    trained, rest = gj.partition(model)

    def step(carry, i):
        trained, state = carry
        key = gj.step_key(seed, i)
        batch = task.draw(jax.random.fold_in(key, 1))

        def loss(trained):
            whole = eqx.combine(trained, rest)
            return task.loss(whole if subnet is None else subnet(whole, key=key, step=i), batch)

        updates, state = tx.update(jax.grad(loss)(trained), state, trained)
        return (optax.apply_updates(trained, updates), state), None

    (trained, state), _ = jax.lax.scan(step, (trained, state), first + jnp.arange(count))
    return eqx.combine(trained, rest), state
