"""From one stage to the next: grown, checked, and only then kept.

`cross` is a transaction, after which either the new state is certified or nothing has changed.
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


# The largest mean change of a loss (nats) that rounding explains, by the type of the activations.
_ROUNDING = {"float64": 1e-9, "float32": 2e-4, "float16": 1e-2, "bfloat16": 4e-2}


def cross(
    plan: Plan,
    span: Span,
    state: State,
    get: Callable[[Need], Any],
    probe: Callable[[Any, State, float], tuple[np.ndarray, np.ndarray]],
) -> tuple[State, Crossing]:
    """Grow a state into the stage `span`, certify it, and let the old one go.

    `get` gives compiled programs, `probe` the losses and weights that an evaluation program finds on
    tokens that stay the same. Raises `TrainingError` if an operator that promises to change nothing
    changed the loss; the checkpoint from before the growth stands.
    """
    op = span.stage.grow
    assert op is not None
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    grow = get(("grow", span.index, None))
    evaluations = [get((kind, span.index, None)) for kind in ("before", "evaluate")]
    lap()
    old = probe(evaluations[0], state, 1.0)
    seconds = lap()
    grown = jax.block_until_ready(grow(state, np.int32(plan.seed)))
    grow_seconds = lap()
    new = probe(evaluations[1], grown, 0.0)
    certify_seconds = seconds + lap()

    weights = old[1].sum()
    before, after = (float((losses * w).sum() / weights) for losses, w in (old, new))
    change = float((np.abs(new[0] - old[0]) * old[1]).sum() / weights)
    dtype = plan.activations
    limit = None if op.exactness == "approximate" else _ROUNDING[dtype]
    crossing = Crossing(
        str(op), op.exactness, before, after, change, limit, grow_seconds, certify_seconds
    )
    # `not <=`: a change that is not a number is not a small one
    if limit is not None and not change <= limit:
        raise TrainingError(
            f"plan {plan.name!r}: {op} promises to be {op.exactness}, and changed the loss of a token "
            f"by {change:.3g} nats on average ({before:.6g} -> {after:.6g}), where {dtype} rounding "
            f"explains {limit:g}. The state before the growth is in the last checkpoint"
        )
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return grown, crossing
