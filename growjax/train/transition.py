"""The transition into a stage that grows: fit, grow, certify, and only then give up the old state.

`fit_operator` finds the numbers of an operator that has none yet, and changes no state. `cross` is a
transaction: it returns a certified new state, or raises and leaves the old one unchanged.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from growjax.errors import TrainingError, raise_all
from growjax.growth import Fit
from growjax.plan.plan import Plan
from growjax.plan.stages import Span
from growjax.programs.ahead import Need
from growjax.programs.step import State
from growjax.runs.records import Crossing, Fitting


# The largest mean change of a loss (nats) that rounding explains, by the dtype of the activations
_ROUNDING = {"float64": 1e-9, "float32": 2e-4, "float16": 1e-2, "bfloat16": 4e-2}


def fit_operator(
    plan: Plan,
    span: Span,
    state: State,
    get: Callable[[Need], Any],
    batches: Iterator[Any],
    check: Callable[[], None],
) -> tuple[Any, tuple[float, ...]]:
    """Fit the operator of a stage: its numbers, and the loss on each batch.

    - `get`: returns a compiled program.
    - `batches`: the batches of the stage, on the mesh.
    - `check`: called before each batch; raises to stop.

    Raises `TrainingError` for a loss that is not finite, and for numbers that the operator refuses.
    """
    op = span.stage.grow
    assert isinstance(op, Fit)
    begin, improve = get(("numbers", span.index, None)), get(("fit", span.index, None))
    numbers, losses = begin(state, np.int32(plan.seed)), []
    for _ in range(op.batches):
        check()
        numbers, loss = improve(numbers, state, next(batches))
        losses.append(loss)
    # Read at the end, so that the host does not wait for each
    losses = tuple(float(loss) for loss in jax.device_get(losses))
    bad = next((n for n, loss in enumerate(losses) if not math.isfinite(loss)), None)
    where = f"plan {plan.name!r}: stage {span.index} {span.stage.name!r}: {op}"
    if bad is not None:
        raise TrainingError(
            f"{where}: its fit has a loss of {losses[bad]} on batch {bad}; lower its rate. The state "
            "before the growth is in the last checkpoint"
        )
    faults = op.faults(jax.device_get(numbers))
    raise_all(TrainingError, f"{where} must not grow this model:", list(faults))
    return numbers, losses


def cross(
    plan: Plan,
    span: Span,
    state: State,
    get: Callable[[Need], Any],
    probe: Callable[[Any, State, float], Callable[[], tuple[np.ndarray, np.ndarray]]],
    fit: tuple[Any, tuple[float, ...]] | None = None,
) -> tuple[State, Crossing]:
    """Grow a state into the stage `span`, certify the growth, and free the old state.

    - `get`: returns a compiled program.
    - `probe`: (evaluation program, state, level of the gates) to a function that waits for losses and
      weights `[batch, T]`, on the same tokens at every call.
    - `fit`: the numbers of an operator that was fitted, and the losses of its fit.

    Raises `TrainingError` if an operator that promises to change nothing changed the loss.
    """
    op = span.stage.grow
    assert op is not None
    times = [time.perf_counter()]

    def lap() -> float:
        """Seconds since the last call."""
        times.append(time.perf_counter())
        return times[-1] - times[-2]

    grow = get(("grow", span.index, None))
    evaluate_before = get(("before", span.index, None))
    evaluate_after = get(("evaluate", span.index, None))
    lap()
    # All three programs are started before the first is waited for, so that none waits for this process.
    # Gates of the stage before are open by now, and new ones are still closed.
    before_it = probe(evaluate_before, state, 1.0)
    numbers = () if fit is None else fit[:1]
    grown = grow(state, np.int32(plan.seed), *numbers)
    after_it = probe(evaluate_after, grown, 0.0)
    old_losses, weights = before_it()
    certify_seconds = lap()
    jax.block_until_ready(grown)
    grow_seconds = lap()
    new_losses, new_weights = after_it()
    certify_seconds += lap()

    total = weights.sum()
    before = float((old_losses * weights).sum() / total)
    after = float((new_losses * new_weights).sum() / total)
    change = float((np.abs(new_losses - old_losses) * weights).sum() / total)
    dtype = plan.activations
    limit = None if op.exactness == "approximate" else _ROUNDING[dtype]
    record = None
    if span.fit_flops:
        losses = () if fit is None else fit[1]
        cost = span.fit_cost / plan.clock.per_unit
        record = Fitting(len(losses), losses, span.fit_flops, span.fit_tokens, cost)
    crossing = Crossing(
        str(op),
        op.exactness,
        before,
        after,
        change,
        limit,
        grow_seconds,
        certify_seconds,
        record,
    )
    # Not `change > limit`, which is False for NaN
    if limit is not None and not change <= limit:
        raise TrainingError(
            f"plan {plan.name!r}: {op} promises to be {op.exactness}, and changed the loss of a token "
            f"by {change:.3g} nats on average ({before:.6g} -> {after:.6g}), where {dtype} rounding "
            f"explains {limit:g}. The state before the growth is in the last checkpoint"
        )
    # Free the device's memory now; a caller may still hold the old state
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return grown, crossing
