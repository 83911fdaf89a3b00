"""Operators that are learned from data: a short fit before growth, whose cost is counted.

A fit makes an ordinary operator of one that needs data, with the numbers that it has learned inside, and
says what it cost. In a plan the trainer does this when the growth is due.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from growjax.cost import flops
from growjax.errors import GrowthError, raise_all
from growjax.growth import Fit, Operator
from growjax.values import check_key


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """An operator that was learned, the loss at every step of the fit, and its cost.

    `flops` are the model FLOPs of all steps, three times those forward through the large model and its
    making: training that is compared with other training has to pay for them.
    """

    operator: Operator
    losses: np.ndarray
    flops: int


def fit(
    op: Fit,
    model: Any,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Array],
    *,
    key: PRNGKeyArray,
) -> Fitted:
    """Fit an operator to batches, and make an ordinary one with its numbers inside, for this model.

    **Arguments**

    - `op`: `gj.growth.ligo(...)`, `gj.growth.gradmax(...)`, or a `Fit` of your own.
    - `batches`, `loss`: as many batches as `op.batches`, and `(model, batch) -> scalar`.
    - `key`: for what is drawn.

    Raises `GrowthError` for too few batches, and as the operator does.

    **Example**

        fitted = gj.fitting.fit(gj.growth.ligo(embed=768, layers=12), small, batches, loss, key=key)
        big = gj.grow(fitted.operator, small)
        left = budget - fitted.flops
    """
    if not isinstance(op, Fit):
        raise GrowthError(
            f"op: expected an operator that is fitted, such as gj.growth.ligo(mlp=48), got {op}"
        )
    check_key(key, GrowthError)
    faults = []
    if key is None:
        faults.append("key: expected one key such as jax.random.key(0), got None")
    if not callable(loss):
        faults.append(f"loss: expected a function (model, batch) -> scalar, got {loss!r}")
    if not isinstance(batches, Iterable):
        faults.append(f"batches: expected {op.batches} of them, got {batches!r}")
    raise_all(GrowthError, f"{op} cannot be fitted so:", faults)

    @eqx.filter_jit
    def improved(numbers, model, batch):
        def measure(make, x):
            return jax.value_and_grad(lambda x: loss(make(x), batch))(x)

        return op.improved(numbers, model, measure)

    numbers = eqx.filter_jit(op.start)(model, key=key)
    losses, cost = [], 0
    for batch in itertools.islice(batches, op.batches):
        cost += fit_flops(op, model, batch, loss)
        numbers, number = improved(numbers, model, batch)
        losses.append(float(number))
    if len(losses) < op.batches:
        raise GrowthError(f"batches: {op} is fitted to {op.batches} batches, got {len(losses)}")
    numbers = jax.device_get(numbers)
    raise_all(GrowthError, f"{op} must not grow this model:", list(op.faults(numbers)))
    return Fitted(op.frozen(numbers), np.asarray(losses), cost)


def fit_flops(op: Fit, model: Any, batch: Any, loss: Callable[[Any, Any], Array]) -> int:
    """Model FLOPs of fitting an operator to one batch; the model and the batch may be shapes.

    Three times the products of a forward pass, as for a training step.
    """

    def forward(numbers, model, batch):
        def measure(make, x):
            return loss(make(x), batch), jax.tree.map(jnp.zeros_like, x)

        return op.improved(numbers, model, measure)

    numbers = eqx.filter_eval_shape(op.start, model, key=jax.random.key(0))
    return 3 * flops(forward, numbers, model, batch)
