"""A reference clock of this machine: what every operation of some plans takes here.

Each operation is timed by the program that trains with it, on a batch that is on the device already: no
data, no host and no compiler have a say. The device is waited for at the end of a block of steps, and
not at each, as in training. Compute on the machine that is the reference, once; charge anywhere. Whether
a run there would wait for its data is measured next to it, and said; it is not charged.
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

    - `plans`: on any clock; how long their stages are does not matter, but that each step they may take
      is among them.
    - `name`: of the machine; results compare under one clock only.
    - `warmup`, `steps`, `blocks`: steps of each operation that are not timed, that are, and in how many
      blocks. The clock charges the mean; `clock.faults()` says which means are not to be trusted.
    - `feeds`: the data of each plan, or none at all. Steps of training are then timed on them as well, in
      turns with the steps that wait for nothing, and `clock.faults()` says which take 2% longer. Stages
      that choose among more rows are left out.
    - `loss`, `devices`: as in `train`.
    - `seen`: called with each operation once it is timed.

    Training is timed with the plan's own optimizer, and an operation that several steps or plans take
    where it is met first: what a second rule of updates takes is not in this clock, as in No Train No
    Gain. Raises `BudgetError` if plans that share an operation run it in different ways.

    **Example**

        save_clock(calibrate(scratch, grown, name="one H100"), "clocks/h100.json")
    """
    raise_all(BudgetError, "this cannot be measured:", _faults(plans, warmup, steps, blocks, feeds))
    known: dict[Op, Timing] = {}
    for plan, feed in zip(plans, feeds or [None] * len(plans), strict=True):
        mesh = plan.layout.mesh(devices)
        programs = Programs(
            plan.optimizer.build(), loss or plan.loss, mesh, plan.layout, plan.accumulate
        )
        for op, step, span, i in _operations(plan, programs, known):
            known[op] = _timed(step, warmup, steps, blocks)
            # A stage that chooses offers more rows than these, and looks at them while data come
            if feed is not None and op.kind == "train" and span.stage.select is None:
                with feed.stream(span, i) as stream:
                    fed = functools.partial(_fed, step, stream, mesh)
                    known[op] = known[op]._replace(fed=_ratio(fed, step, steps, blocks))
            if op.kind == "curvature":
                known[op] = _without(known[op], known[op._replace(kind="train")])
            if seen is not None:
                seen(op, known[op])
    entries = tuple((op, max(round(timing.mean), 0)) for op, timing in known.items())
    said = _provenance(plans, mesh, f"{steps} steps in {blocks} blocks, after {warmup}")
    return MeasuredClock(name, entries, said, tuple(known.values()))


def _operations(
    plan: Plan, programs: Programs, known: Mapping[Op, Any]
) -> Iterator[tuple[Op, Callable[[], Any], Span, int]]:
    """What is not known yet, a function that does it once, and which step of which stage that is.

    Each is done with before the next.
    """
    seed = np.int32(plan.seed)
    state = lower(plan, programs, ("birth", 0, None)).compile()(seed)
    for span in plan.spans:
        if span.stage.grow is not None:
            state = lower(plan, programs, ("grow", span.index, None)).compile()(state, seed)
        else:
            state = state._replace(rest=ungated(state.rest))
        shapes = programs.shapes(span.model)
        for (op, _), i in zip(span.ops, span.firsts, strict=True):
            if op in known:
                continue
            batch = from_host(
                _rows(span.objective, op.rows, span.sizes.get("vocab", 2)), programs.mesh
            )
            if op.kind == "forward":
                forward, level = programs.evaluate(shapes), np.float32(span.stage.level(i))
                yield op, lambda f=forward, s=state, b=batch, o=level: f(s, b, o), span, i
                continue
            work = span.works[i]._replace(curvature=op.kind == "curvature")
            step = _Training(plan, span, i, programs.step(shapes, work), state, batch)
            yield op, step, span, i
            state = step.state


class _Training:
    """One step over and over again, at a learning rate of 0: the model stays what it is."""

    def __init__(self, plan: Plan, span: Span, i: int, program: Any, state: State, batch: Any):
        level, n = np.float32(span.stage.level(i)), np.int32(span.start + i)
        self.controls = Controls(level, np.float32(0), n, np.int32(plan.seed))
        self.program, self.state, self.batch = program, state, batch

    def __call__(self) -> Any:
        self.state, report = self.program(self.state, self.batch, self.controls, None)
        return self.state, report


def _rows(objective: Objective, rows: int, words: int) -> dict[str, np.ndarray]:
    """This host's rows of a batch that is like any other, but for what it says."""
    draw, vocabulary = (
        np.random.default_rng(0),
        ByteTokenizer(sentinels=objective.sentinels).vocabulary,
    )
    length = objective.raw_length + objective.lookahead
    examples = [
        objective(
            Window(draw.integers(0, min(words, 256), length, np.int32), np.zeros(length, np.int32)),
            vocabulary,
            draw,
        )
        for _ in range(rows)
    ]
    each = rows // jax.process_count()
    mine = examples[jax.process_index() * each :][:each]
    return {name: np.stack([example[name] for example in mine]) for name in mine[0]}


def _timed(step: Callable[[], Any], warmup: int, steps: int, blocks: int) -> Timing:
    for _ in range(warmup):
        done = step()
    jax.block_until_ready(done)
    counts = _counts(steps, blocks)
    took = np.asarray([_block(step, count) for count in counts])
    p5, median, p95 = np.percentile(took / counts, [5, 50, 95])
    return Timing(steps, float(took.sum() / steps), float(median), float(p5), float(p95))


def _ratio(a: Callable[[], Any], b: Callable[[], Any], steps: int, blocks: int) -> float:
    """What one step takes over what another does: blocks of them in turns, and the median."""
    return float(np.median([_block(a, n) / _block(b, n) for n in _counts(steps, blocks)]))


def _counts(steps: int, blocks: int) -> list[int]:
    return [len(part) for part in np.array_split(np.arange(steps), blocks)]


def _block(step: Callable[[], Any], count: int) -> int:
    """Nanoseconds of so many steps, and of waiting for the last of them."""
    start = time.perf_counter_ns()
    for _ in range(count):
        done = step()
    jax.block_until_ready(done)
    return time.perf_counter_ns() - start


def _fed(step: Any, stream: Any, mesh: Any) -> Any:
    """A step on the next batch of a run."""
    _, rows = next(stream)
    step.batch = from_host(rows, mesh)
    return step()


def _without(timing: Timing, step: Timing) -> Timing:
    """What a second gradient takes, of steps that take one."""
    return timing._replace(
        **{name: getattr(timing, name) - step.mean for name in ("mean", "median", "p5", "p95")}
    )


def _conditions(plan: Plan) -> dict[str, Any]:
    """What changes how long an operation takes, and is not a part of it."""
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
    first: dict[Op, Plan] = {}
    for plan in plans:
        ops = [op for span in plan.spans for op, _ in span.ops]
        others = {id(first.setdefault(op, plan)): first[op] for op in ops}
        for other in others.values():
            pairs = zip(_conditions(other).items(), _conditions(plan).values(), strict=True)
            for (field, was), now in pairs:
                if was != now:
                    yield (
                        f"{field}: plans {other.name!r} and {plan.name!r} share operations and have "
                        f"{was!r} and {now!r}; measure a clock for each"
                    )


def _provenance(plans: tuple[Plan, ...], mesh: Any, how: str) -> str:
    device = jax.devices()[0]
    said = {
        "measured": f"{how}, of {', '.join(plan.name for plan in plans)}",
        "on": f"{mesh.size} x {device.device_kind} ({device.platform}), {os.cpu_count()} CPU cores",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").strip() or "none",
        "x64": jax.config.read("jax_enable_x64"),
    } | _conditions(plans[0])
    return "; ".join(f"{key}: {value}" for key, value in said.items())
