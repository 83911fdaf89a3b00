"""Operators that are learned from data: a short fit before growth, whose cost is counted.

A fit returns an ordinary operator, with the numbers that it has learned inside, and what it cost.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from growjax import maps
from growjax.axes import axes_of
from growjax.cost import flops
from growjax.errors import GrowthError, raise_all
from growjax.growth import Operator, learned, resolve
from growjax.growth.mixtures import depth_map, width_map


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """An operator that was learned, the loss at every step of the fit, and its cost.

    `flops` are those of all steps, forward and backward through the large model and its making: training
    that is compared with other training has to pay for them.
    """

    operator: Operator
    losses: np.ndarray
    flops: int


def ligo(
    model: Any,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Array],
    *,
    key: PRNGKeyArray,
    stack: str = "layers",
    rate: float = 2e-3,
    noise: float = 0.03,
    **sizes: int,
) -> Fitted:
    """Learn how to grow: a matrix for each side of an axis, and for the layers of each array (LiGO).

    Only the matrices are trained, for one step of Adam a batch, on the loss of the large model that they
    make of the small one, which stays as it is; the paper takes 100 batches. They start from copies in
    turn, with what consumes copies divided by their number: the paper's do not divide, and so begin with
    another function.

    **Arguments**

    - `batches`, `loss`: as many steps as there are batches; `(model, batch) -> scalar`.
    - `key`: for the noise that parts copies.
    - `stack`: the axis whose growth is in depth.
    - `rate`: the learning rate.
    - `noise`: the largest number that is added to a row before it is divided by its sum.
    - the sizes to reach, such as `embed=768, mlp=3072, layers=12`.

    Raises `GrowthError` without batches, and for axes that no matrix can grow: tables, `head_dim` under
    rotary positions.

    **Example**

        fitted = gj.fitting.ligo(small, batches, loss, key=key, embed=768, mlp=3072, layers=12)
        big = gj.grow(fitted.operator, small)
        left = budget - fitted.flops
    """
    table = axes_of(model)
    wanted = resolve(table, sizes)
    raise_all(
        GrowthError,
        "no matrix grows these axes:",
        [
            axis
            for axis in wanted
            if table.roles(axis) & {"lookup"} or ("stack" in table.roles(axis) and axis != stack)
        ],
    )
    weights = _start(table, wanted, stack, noise, key)
    grow = lambda weights, model: _made(weights, model, stack, wanted)  # noqa: E731
    if noise < 0 or rate <= 0:
        raise GrowthError(
            f"expected a positive rate and a noise of 0 or more, got {rate} and {noise}"
        )
    tx = optax.adam(rate)

    def value(weights, model, batch):
        return loss(grow(weights, model), batch)

    @eqx.filter_jit
    def step(weights, state, model, batch):
        number, gradient = jax.value_and_grad(value)(weights, model, batch)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(weights, updates), state, number

    state, losses, cost = tx.init(weights), [], 0
    for batch in batches:
        cost += flops(jax.value_and_grad(value), weights, model, batch)
        weights, state, number = step(weights, state, model, batch)
        losses.append(float(number))
    if not losses:
        raise GrowthError("batches: expected at least one batch, got none")
    produced, consumed, depth = jax.device_get(weights)
    operator = learned(produced=produced, consumed=consumed, depth=depth, stack=stack)
    return Fitted(operator, np.asarray(losses), cost)


def _start(table, wanted: dict[str, int], stack: str, noise: float, key) -> tuple[dict, dict, dict]:
    """Copies in turn: `({axis: P}, {axis: C}, {path: W})`, each row of P and W with noise and sum 1."""

    def rows(name: str, old: int, new: int) -> tuple[Any, np.ndarray]:
        source = np.arange(new) % old
        draws = jax.random.uniform(maps.fold_in_name(key, name), (new, old), maxval=noise or 1.0)
        matrix = np.eye(old)[source] + (draws if noise else 0)
        return matrix / jnp.sum(matrix, 1, keepdims=True), source

    produced, consumed, depth = {}, {}, {}
    for axis, new in wanted.items():
        old = table.size(axis)
        if axis == stack:
            for slot in table.having(axis, "param"):
                if slot.arrays():
                    depth[slot.path] = rows(slot.path, old, new)[0]
            continue
        produced[axis], source = rows(axis, old, new)
        counts = np.bincount(source, minlength=old)
        consumed[axis] = jnp.asarray(np.eye(old)[source] / counts[source][:, None])
    return produced, consumed, depth


def _made(weights: tuple[dict, dict, dict], model: Any, stack: str, wanted: dict[str, int]) -> Any:
    """The large model that some matrices make of the small one."""
    produced, consumed, depth = weights
    for axis, matrix in produced.items():
        model = maps.apply(width_map(axis, matrix, consumed[axis]), model, None)
    if depth:
        move = depth_map(stack, axes_of(model).size(stack), wanted[stack], tuple(depth.items()))
        model = maps.apply(move, model, None)
    return model
