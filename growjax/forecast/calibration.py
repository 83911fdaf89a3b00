"""A reference clock of this machine: the measured time of every operation of some plans.

Each operation is timed by the compiled program of a run, on a batch that is on the device already, so
that reading data, the host and the compiler have no influence. As in training, the host does not wait
for each step: it waits at the end of a block of steps. Measure once, on the reference machine; charge
runs anywhere. Whether a run on this machine would wait for its data is measured as well and reported,
but not charged.
"""

import datetime
import functools
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from growjax.budget import MeasuredClock, Op, Timing
from growjax.data import ByteTokenizer, Objective
from growjax.data.objectives import Window
from growjax.errors import BudgetError, raise_all
from growjax.gates import ungated
from growjax.growth import Fit
from growjax.parallel import from_host
from growjax.plan.losses import Loss
from growjax.plan.plan import Plan
from growjax.plan.stages import Span
from growjax.programs.ahead import lower
from growjax.programs.step import Controls, Programs, State
from growjax.runs.feed import Feed


def calibrate(
    *plans: Plan,
    name: str,
    warmup: int = 50,
    steps: int = 1000,
    blocks: int = 20,
    feeds: Sequence[Feed | None] = (),
    loss: Loss | None = None,
    devices: list[Any] | None = None,
    seen: Callable[[Op, Timing], None] | None = None,
) -> MeasuredClock:
    """Measure every operation of some plans on this machine: the clock that charges them.

    **Arguments**

    - `plans`: plans that contain every operation to measure. Their clocks and the lengths of their stages
      do not matter.
    - `name`: the name of the machine; only results under the same clock are comparable.
    - `warmup`, `steps`, `blocks`: for each operation, the steps before the measurement, the measured
      steps, and the number of blocks they are divided into. The clock charges the mean;
      `clock.faults()` lists the means that are not reliable.
    - `feeds`: the data of each plan, or none at all. With data, training steps are timed on them too, in
      turns with steps on a batch on the device, and `clock.faults()` lists those that take 2% longer.
      Stages that select from a larger batch are left out.
    - `loss`, `devices`: as in `train`.
    - `seen`: called with each operation once it is timed.

    An operation that several plans share is timed once, with the optimizer of the first: as in No Train
    No Gain, the clock has no prices for different update rules. Raises `BudgetError` if plans that share
    an operation run it in different ways.

    **Example**

        save_clock(calibrate(scratch, grown, name="one H100"), "clocks/h100.json")
    """
    raise_all(BudgetError, "this cannot be measured:", _faults(plans, warmup, steps, blocks, feeds))
    timings: dict[Op, Timing] = {}
    for plan, feed in zip(plans, feeds or [None] * len(plans), strict=True):
        mesh = plan.layout.mesh(devices)
        programs = Programs.of(plan, mesh, loss)
        for op, step, span, i in _operations(plan, programs, timings):
            timing = _timed(step, warmup, steps, blocks)
            # The stream of a stage with a selector has more rows than this step takes
            if feed is not None and op.kind == "train" and span.stage.select is None:
                with feed.stream(span, i) as stream:
                    fed = functools.partial(_fed, step, stream, mesh)
                    timing = timing._replace(fed=_ratio(fed, step, steps, blocks))
            if op.kind == "curvature":
                # Timed was a training step with a second gradient; the operation is the gradient alone
                timing = _without(timing, timings[op._replace(kind="train")])
            timings[op] = timing
            if seen is not None:
                seen(op, timing)
    # Nanoseconds; a difference of two measurements may be below 0
    entries = tuple((op, max(round(timing.mean), 0)) for op, timing in timings.items())
    provenance = _provenance(plans, mesh, f"{steps} steps in {blocks} blocks, after {warmup}")
    return MeasuredClock(name, entries, provenance, tuple(timings.values()))


def _operations(
    plan: Plan, programs: Programs, timed: Mapping[Op, Any]
) -> Iterator[tuple[Op, Callable[[], Any], Span, int]]:
    """The operations of a plan that are not timed yet, in the order of its stages.

    Each comes with a function that runs it once, its stage, and the first step of the stage that needs
    it. Time it before asking for the next one: both share the state, which a training step donates.
    """
    seed = np.int32(plan.seed)
    state = lower(plan, programs, ("birth", 0, None)).compile()(seed)
    for span in plan.spans:
        if span.stage.grow is not None:
            more = ()
            if isinstance(span.stage.grow, Fit):
                # Prices do not depend on weights, so the numbers need not be fitted
                more = (
                    lower(plan, programs, ("numbers", span.index, None)).compile()(state, seed),
                )
            state = lower(plan, programs, ("grow", span.index, None)).compile()(state, seed, *more)
        else:
            state = state._replace(rest=ungated(state.rest))
        shapes = programs.shapes(span.model)
        for (op, _), i in zip(span.ops, span.firsts, strict=True):
            if op in timed:
                continue
            batch = from_host(
                _rows(span.objective, op.rows, span.sizes.get("vocab", 2)), programs.mesh
            )
            if op.kind == "forward":
                level = np.float32(span.stage.level(i))
                yield op, functools.partial(programs.evaluate(shapes), state, batch, level), span, i
                continue
            work = span.works[i]._replace(curvature=op.kind == "curvature")
            program = programs.step(shapes, work, None, span.births, span.grown_at)
            step = _Training(plan, span, i, program, state, batch)
            yield op, step, span, i
            state = step.state


class _Training:
    """Repeats one training step, at a learning rate of 0, so that the parameters do not change."""

    def __init__(self, plan: Plan, span: Span, i: int, program: Any, state: State, batch: Any):
        level, n = np.float32(span.stage.level(i)), np.int32(span.start + i)
        self.controls = Controls(level, np.float32(0), n, np.int32(plan.seed))
        self.program, self.state, self.batch = program, state, batch

    def __call__(self) -> Any:
        self.state, report = self.program(self.state, self.batch, self.controls, None)
        return self.state, report


def _rows(objective: Objective, rows: int, words: int) -> dict[str, np.ndarray]:
    """This host's rows of a random batch with the shapes of a real one; `words`: the vocabulary size."""
    rng = np.random.default_rng(0)
    vocabulary = ByteTokenizer(sentinels=objective.sentinels).vocabulary
    length = objective.raw_length + objective.lookahead
    examples = []
    for _ in range(rows):
        tokens = rng.integers(0, min(words, 256), length, np.int32)
        # All tokens are of document 0
        window = Window(tokens, np.zeros(length, np.int32))
        examples.append(objective(window, vocabulary, rng))
    per_host = rows // jax.process_count()
    mine = examples[jax.process_index() * per_host :][:per_host]
    return {name: np.stack([example[name] for example in mine]) for name in mine[0]}


def _timed(step: Callable[[], Any], warmup: int, steps: int, blocks: int) -> Timing:
    """The times of one step, in nanoseconds: the mean over all steps, and quantiles over blocks."""
    for _ in range(warmup):
        done = step()
    jax.block_until_ready(done)
    counts = _counts(steps, blocks)
    nanoseconds = np.asarray([_block(step, count) for count in counts])
    p5, median, p95 = np.percentile(nanoseconds / counts, [5, 50, 95])
    return Timing(steps, float(nanoseconds.sum() / steps), float(median), float(p5), float(p95))


def _ratio(a: Callable[[], Any], b: Callable[[], Any], steps: int, blocks: int) -> float:
    """The time of step `a` over the time of step `b`: the median over blocks, run in turns.

    In turns, so that a slow drift of the machine's speed changes both.
    """
    return float(np.median([_block(a, n) / _block(b, n) for n in _counts(steps, blocks)]))


def _counts(steps: int, blocks: int) -> list[int]:
    """The number of steps in each block, as equal as possible."""
    return [len(part) for part in np.array_split(np.arange(steps), blocks)]


def _block(step: Callable[[], Any], count: int) -> int:
    """Nanoseconds from the start of `count` steps to the end of the last one on the device."""
    start = time.perf_counter_ns()
    for _ in range(count):
        done = step()
    jax.block_until_ready(done)
    return time.perf_counter_ns() - start


def _fed(step: Any, stream: Any, mesh: Any) -> Any:
    """Run a step on the next batch of a stream."""
    _, rows = next(stream)
    step.batch = from_host(rows, mesh)
    return step()


def _without(timing: Timing, step: Timing) -> Timing:
    """The timing of a second gradient: that of steps with one, less the mean of steps without."""
    return timing._replace(
        **{name: getattr(timing, name) - step.mean for name in ("mean", "median", "p5", "p95")}
    )


def _conditions(plan: Plan) -> dict[str, Any]:
    """The settings of a plan that change an operation's time, but are not part of an `Op`."""
    return {
        "model.dtype": getattr(plan.model, "dtype", None),
        "model.remat": getattr(plan.model, "remat", None),
        "accumulate": plan.accumulate,
        "layout": plan.layout,
    }


def _faults(
    plans: tuple[Plan, ...], warmup: int, steps: int, blocks: int, feeds: Sequence[Feed | None]
) -> Iterator[str]:
    if not plans:
        yield "plans: expected at least one"
    if feeds and len(feeds) != len(plans):
        yield f"feeds: expected none, or one for each of {len(plans)} plans, got {len(feeds)}"
    if warmup < 1:
        yield f"warmup: expected 1 step or more, since the first one compiles, got {warmup}"
    if not 1 <= blocks <= steps:
        yield f"blocks: expected from 1 to the {steps} steps, got {blocks}"
    first: dict[Op, Plan] = {}  # the first plan with each operation
    for plan in plans:
        # The earlier plans that share an operation with this one, each once. By identity: a plan with
        # values of the user's own need not be hashable
        others: dict[int, Plan] = {}
        for span in plan.spans:
            for op, _ in span.ops:
                other = first.setdefault(op, plan)
                others[id(other)] = other
        for other in others.values():
            theirs, ours = _conditions(other), _conditions(plan)
            for field in ours:
                if theirs[field] != ours[field]:
                    yield (
                        f"{field}: plans {other.name!r} and {plan.name!r} share operations and have "
                        f"{theirs[field]!r} and {ours[field]!r}; measure a clock for each"
                    )


def _provenance(plans: tuple[Plan, ...], mesh: Any, method: str) -> str:
    """How, where and when a clock was measured, as one line of text."""
    device = jax.devices()[0]
    facts = {
        "measured": f"{method}, of {', '.join(plan.name for plan in plans)}",
        "on": f"{mesh.size} x {device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").strip() or "none",
        "x64": jax.config.read("jax_enable_x64"),
    } | _conditions(plans[0])
    return "; ".join(f"{key}: {value}" for key, value in facts.items())
