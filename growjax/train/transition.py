"""The transition into a stage that grows: grow, certify, and only then give up the old state.

`cross` is a transaction: it returns a certified new state, or raises and leaves the old one unchanged.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from growjax.errors import TrainingError
from growjax.plan.plan import Plan
from growjax.plan.stages import Span
from growjax.programs.ahead import Need
from growjax.programs.step import State
from growjax.runs.records import Crossing


# The largest mean change of a loss (nats) that rounding explains, by the dtype of the activations
_ROUNDING = {"float64": 1e-9, "float32": 2e-4, "float16": 1e-2, "bfloat16": 4e-2}


def cross(
    plan: Plan,
    span: Span,
    state: State,
    get: Callable[[Need], Any],
    probe: Callable[[Any, State, float], tuple[np.ndarray, np.ndarray]],
) -> tuple[State, Crossing]:
    """Grow a state into the stage `span`, certify the growth, and free the old state.

    - `get`: returns a compiled program.
    - `probe`: (evaluation program, state, level of the gates) to losses and weights `[batch, T]`, on the
      same tokens at every call.

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
    # Gates of the stage before are open by now, and new ones are still closed
    old_losses, weights = probe(evaluate_before, state, 1.0)
    certify_seconds = lap()
    grown = jax.block_until_ready(grow(state, np.int32(plan.seed)))
    grow_seconds = lap()
    new_losses, new_weights = probe(evaluate_after, grown, 0.0)
    certify_seconds += lap()

    total = weights.sum()
    before = float((old_losses * weights).sum() / total)
    after = float((new_losses * new_weights).sum() / total)
    change = float((np.abs(new_losses - old_losses) * weights).sum() / total)
    dtype = plan.activations
    limit = None if op.exactness == "approximate" else _ROUNDING[dtype]
    crossing = Crossing(
        str(op), op.exactness, before, after, change, limit, grow_seconds, certify_seconds
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
