"""One training run, from top to bottom: stages, steps, growth, checkpoints, and how it all resumes.

Every step of a stage is a program compiled before it runs, once for every sub-network size. The level
of a ramp and the learning rate are arguments, and a compiled program refuses shapes it was not made
for, so nothing recompiles unnoticed. Losses are read one step late: the host never waits for the step
it has just started.

A ramp that is over leaves its gates in place, at 1, until the next growth (or the end) drops them. The
function is the same and open gates cost next to nothing, but dropping them changes the program: at a
boundary, which has a new one anyway, that is free; in the middle of a stage it is not.
"""

import contextlib
import dataclasses
import functools
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.experimental import multihost_utils

from growjax.axes import sizes
from growjax.errors import CheckpointError, GrowjaxError, PlanError, TrainingError, raise_all
from growjax.gates import opened, ungated
from growjax.parallel import from_host, replicated
from growjax.plan.losses import Loss, cross_entropy
from growjax.plan.plan import Plan, reference_faults
from growjax.plan.stages import Span
from growjax.programs.ahead import Ahead
from growjax.programs.step import Controls, Programs, State
from growjax.runs.feed import CorpusFeed, Feed
from growjax.runs.records import Begin, End, Growth, Record, Saved, Step
from growjax.train.stopwatch import Clock
from growjax.train.transition import cross


# The model that is judged and the record of the step it was judged after, to numbers by name
Hook = Callable[[Any, Step], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Options:
    """How a plan is run. None of it changes what is computed.

    **Fields**

    - `evaluate_every`: what is spent between looks at the held-out loss, in the whole numbers of the
      plan's clock (a twentieth of `plan.cost`, say); after the last step anyway.
    - `held_out`: how many sequences that is taken over.
    - `hooks`: what else to know of the model whenever the held-out loss is looked at: functions of the
      model and of that step's record to numbers by name, which become its `scores`. The model is the one
      that is judged (the average, if the optimizer averages), its gates as open as they are; its arrays
      are the run's own, and gone after the next step. Nobody is charged for it, in cost or in seconds.
    - `save_every`: steps between checkpoints, besides those on both sides of every growth.
    - `keep_last`, `keep_every`: how many of the latest checkpoints stay, and which others.
    - `background`: compile the next stage while this one trains.
    - `profile`: first and last step of which a profile is written, into the run's folder.
    """

    evaluate_every: float = math.inf
    held_out: int = 64
    hooks: Sequence[Hook] = ()
    save_every: int | None = None
    keep_last: int = 2
    keep_every: int | None = None
    background: bool = True
    profile: tuple[int, int] | None = None


def train(
    plan: Plan,
    feed: Feed | None = None,
    *,
    run: str | Path | None = None,
    options: Options = Options(),
    loss: Loss = cross_entropy,
    reference: Any = None,
    cache: dict[str, Any] | None = None,
    devices: list[Any] | None = None,
) -> Iterator[Record]:
    """Run a plan, or go on with it: yields `Begin`, a `Step`, `Growth` or `Saved` for each, and `End`.

    **Arguments**

    - `feed`: its data; None reads what the plan names.
    - `run`: the folder of its checkpoints. If there are some, the run goes on from the last one, with the
      same batches, draws and numbers as if it had never stopped. None saves nothing.
    - `loss`: what is minimised, see `cross_entropy`.
    - `reference`: the second model that `RhoLoss` compares with.
    - `cache`: a dict through which runs that follow each other share what they compiled.
    - `devices`: what the mesh is made of (all, by default).

    On SIGTERM the run saves and ends; on a second one it ends at once. Raises `TrainingError` with the
    step of the first loss or gradient that is not finite, and for a growth that breaks its promise;
    `CheckpointError` if the folder holds another run, or one that is not whole; `DataError`.

    **Example**

        for record in train(plan, run="runs/first", options=Options(save_every=500)):
            print(record)
    """
    mesh = plan.layout.mesh(devices)
    programs = Programs(plan.optimizer.build(), loss, mesh, plan.layout, plan.accumulate)
    if reference is not None:
        headline = f"plan {plan.name!r} cannot choose by this second model:"
        raise_all(PlanError, headline, reference_faults(plan, reference))
        reference = jax.device_put(reference, replicated(mesh))
    elif any(s.stage.select is not None and s.stage.select.compares for s in plan.spans):
        raise PlanError(
            f"plan {plan.name!r}: reference: a stage's selector compares with a second model; give it "
            "one (`--reference FOLDER` on the command line)"
        )
    ahead = Ahead(
        plan,
        programs,
        cache=cache,
        background=options.background,
        seal=run is not None,
        reference=reference,
    )
    with contextlib.closing(ahead), _stop_signal(run is not None) as asked_to_stop:
        loop = _Loop(plan, feed, run, options, programs, ahead, asked_to_stop)
        try:
            yield from loop.records()
        except (GrowjaxError, GeneratorExit, KeyboardInterrupt):
            # What is being written gets its time, whoever ended the run
            if loop.saves:
                with contextlib.suppress(CheckpointError):
                    loop.saves.wait()
            raise
        except jax.errors.JaxRuntimeError as error:
            raise TrainingError(
                f"plan {plan.name!r}: process {jax.process_index()} of {jax.process_count()} cannot go "
                f"on: {str(error).splitlines()[0][:300]}. If another host is lost or out of memory, "
                "start all of them again with the same command"
            ) from error


class _Loop:
    """The state of a run between two records."""

    def __init__(
        self,
        plan: Plan,
        feed: Feed | None,
        run: str | Path | None,
        options: Options,
        programs: Programs,
        ahead: Ahead,
        asked_to_stop: Callable[[int], bool],
    ):
        self.plan, self.options, self.programs, self.ahead = plan, options, programs, ahead
        self.asked_to_stop = asked_to_stop
        self.clock = Clock()
        self.saves = None
        if run is not None:
            # Orbax takes a second to import, and a run that saves nothing does not need it
            from growjax.runs.lineage import Saves, digest_of

            second = eqx.filter(ahead.reference, eqx.is_array)
            self.saves = Saves(
                plan,
                Path(run),
                keep_last=options.keep_last,
                keep_every=options.keep_every,
                reference=None if ahead.reference is None else digest_of(second),
            )
        self.feed = feed or CorpusFeed.of(plan, Path(run or "runs/_").parent / "cache")
        self.spent, self.flops, self.profiling = 0, 0, False
        self.late: Callable[..., Step] | None = None
        self.held_out: dict[Any, Any] = {}

    def records(self) -> Iterator[Record]:
        plan = self.plan
        found = self.saves.resume(self.programs, self.feed.digest) if self.saves else None
        stage, step = (found.stage, found.step) if found else (0, 0)
        with self.clock.apart("birth"):
            if found is not None:
                self.state = found.state
            elif plan.start is None:
                self.state = self.ahead.get(("birth", 0, None))(np.int32(plan.seed))
            else:
                self.state = self._started()
        self.ahead.start(stage)
        if found:
            span = plan.spans[stage]
            self.spent = span.spent + sum(span.costs[: step - span.start])
            self.flops, self.clock.before = found.flops, found.seconds
        yield Begin(stage, step, found and found.path, self.programs.mesh.size)

        if found is None and plan.start is not None and plan.stages[0].grow is None:
            yield from self._save(plan.spans[0], 0)
        for span in plan.spans[stage:]:
            if span.index > stage or (found is None and span.stage.grow is not None):
                yield from self._enter(span)
            with self.feed.stream(span, step - span.start) as stream:
                for i in range(step - span.start, span.steps):
                    if self.asked_to_stop(span.start + i):
                        yield from self._flush()
                        yield from self._save(span, span.start + i)
                        yield self._end(span, i, finished=False)
                        return
                    yield from self._step(span, i, stream)
            step = span.start + span.steps
            yield from self._flush()
            if span is not plan.spans[-1]:
                yield from self._save(span, step)
        yield from self._save(plan.spans[-1], step)
        yield self._end(plan.spans[-1], plan.spans[-1].steps, finished=True)

    def _started(self) -> State:
        """The state of a trained model that the plan starts from."""
        from growjax.runs.start import read_start

        model, said = read_start(self.plan, self.programs.mesh)
        if self.saves:
            self.saves.start = said
        return self.programs.start(model)

    # One step ---------------------------------------------------------------------------------

    def _step(self, span: Span, i: int, stream: Any) -> Iterator[Record]:
        plan, options = self.plan, self.options
        work, n, cost = span.works[i], span.start + i, span.costs[i]
        level, rate = span.stage.level(i), plan.learning_rate(self.spent + cost / 2)
        controls = Controls(np.float32(level), np.float32(rate), np.int32(n), np.int32(plan.seed))
        program = self._compiled("step", span, work)
        select = span.stage.select
        second = self.ahead.reference if select is not None and select.compares else None
        waited = stream.waited
        _, rows = next(stream)
        batch = from_host(rows, self.programs.mesh)
        if self.saves and options.profile and n == options.profile[0]:
            jax.profiler.start_trace(str(self.saves.run / "profile"))
            self.profiling = True
        self.state, report = program(self.state, batch, controls, second)

        yield from self._flush()  # the step before, now that this one is on its way
        self.spent += cost
        self.flops += span.flops[i]
        spent = self.spent, self.flops
        self.late = functools.partial(
            self._read, span, i, spent, rate, level, report, stream.waited - waited
        )
        every, last = options.evaluate_every, n == plan.steps - 1
        if last or self.spent // every > (self.spent - cost) // every:
            for step in self._flush(self._held_out_loss(span, level)):
                yield self._scored(step) if options.hooks else step
        if self.profiling and options.profile and n == options.profile[1]:
            yield from self._flush()
            jax.profiler.stop_trace()
            self.profiling = False
        due = options.save_every and (n + 1) % options.save_every == 0
        if due and i + 1 < span.steps:
            yield from self._flush()  # what is saved is known to be finite
            yield from self._save(span, n + 1)

    def _flush(self, held_out: float | None = None) -> Iterator[Step]:
        if self.late is not None:
            late, self.late = self.late, None
            yield late(held_out)

    def _read(
        self,
        span: Span,
        i: int,
        spent: tuple[int, int],
        rate: float,
        level: float,
        report: Any,
        waited: float,
        held_out: float | None = None,
    ) -> Step:
        """Wait for a step's numbers and report them, unless they are not numbers."""
        loss, gradient_norm, parameter_norm = (float(x) for x in jax.device_get(report))
        n = span.start + i
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            last = self.saves and self.saves.last()
            raise TrainingError(
                f"plan {self.plan.name!r}: step {n} (stage {span.index} {span.stage.name!r}, learning "
                f"rate {rate:.3g}) has a loss of {loss} and a gradient of norm {gradient_norm}; lower "
                "the peak, lengthen the warmup or look at the batch. Last good checkpoint: "
                f"{last or 'none'}"
            )
        tokens = span.tokens + (i + 1) * span.step_tokens
        seconds = self.clock.training()
        took = self.clock.lap()
        return Step(
            span.index,
            n,
            tokens,
            spent[1],
            spent[0] / self.plan.clock.per_unit,
            seconds,
            rate,
            level,
            loss,
            gradient_norm,
            parameter_norm,
            took,
            waited,
            held_out,
        )

    def _scored(self, step: Step) -> Step:
        """The record of a step with what the hooks say of the model."""
        scores: dict[str, float] = {}
        with self.clock.apart("hooks", self.state):
            model = self._judged(step.level)
            for hook in self.options.hooks:
                name = getattr(hook, "__name__", type(hook).__name__)
                where = f"plan {self.plan.name!r}: hook {name}, after step {step.step}"
                try:
                    said = {key: float(value) for key, value in hook(model, step).items()}
                except GrowjaxError:
                    raise
                except Exception as error:
                    raise TrainingError(
                        f"{where}: expected numbers by name, got {type(error).__name__}: {error}"
                    ) from error
                twice = sorted(said.keys() & scores.keys())
                raise_all(TrainingError, f"{where}: another hook says these, too:", twice)
                scores |= said
        return dataclasses.replace(step, scores=scores)

    def _judged(self, level: float) -> Any:
        """The model that is evaluated, its gates at a level."""
        return opened(self.programs.judged(self.state), level)

    # Between stages ---------------------------------------------------------------------------

    def _enter(self, span: Span) -> Iterator[Record]:
        """Grow into a stage, if it grows, and put the grown state on record before it trains."""
        if span.stage.grow is None:
            # Gates of the stage before are open by now; without them the function is the same.
            self.state = self.state._replace(rest=ungated(self.state.rest))
            self.ahead.start(span.index)
            return
        start, waited = self.clock.now(), self.ahead.waited
        with self.clock.apart("grow"):
            self.state, crossing = cross(
                self.plan, span, self.state, self.ahead.get, functools.partial(self._probe, span)
            )
            self.ahead.get(("step", span.index, span.works[0]))
        compile_wait = self.ahead.waited - waited
        saved = list(self._save(span, span.start, crossing))
        stall = self.clock.now() - start
        self.ahead.start(span.index)
        old, new = sizes(self.plan.before(span.index)), span.sizes
        grew = {a: (old.get(a, 0), n) for a, n in new.items() if n != old.get(a)}
        yield Growth(span.index, span.start, self.flops, grew, crossing, stall, compile_wait)
        yield from saved

    def _probe(self, span: Span, program: Any, state: State, level: float):
        """The losses of one held-out batch, seen through the objective of the stage to come."""
        rows = self._examples(span, span.batch)
        return jax.device_get(program(state, rows, np.float32(level)))

    def _held_out_loss(self, span: Span, level: float) -> float:
        program = self._compiled("evaluate", span, None)
        with self.clock.apart("held_out", self.state):
            rows = -(-self.options.held_out // span.batch) * span.batch
            total = count = 0.0
            for start in range(0, rows, span.batch):
                batch = self._examples(span, rows, start)
                losses, weights = jax.device_get(program(self.state, batch, np.float32(level)))
                # Rows past the number asked for only fill the last batch.
                real = np.arange(start, start + span.batch) < self.options.held_out
                weights = weights * real[:, None]
                total, count = total + (losses * weights).sum(), count + weights.sum()
        return float(total / count)

    def _examples(self, span: Span, rows: int, start: int = 0) -> Any:
        """One batch of the held-out examples, on the mesh."""
        key = span.objective, rows
        if key not in self.held_out:
            self.held_out[key] = self.feed.held_out(span.objective, rows)
        each = span.batch // jax.process_count()
        first = start + jax.process_index() * each
        mine = {k: v[first : first + each] for k, v in self.held_out[key].items()}
        return from_host(mine, self.programs.mesh)

    def _compiled(self, kind: Any, span: Span, work: Any) -> Any:
        need = kind, span.index, work
        # Steps that still run are training; a program that is not there yet is not.
        with self.clock.apart("compile", () if self.ahead.ready(need) else self.state):
            return self.ahead.get(need)

    def _save(self, span: Span, step: int, crossing: Any = None) -> Iterator[Saved]:
        """Write a checkpoint, unless there is none to write or it is there from an earlier session."""
        if self.saves is None:
            return
        seal = self._compiled("seal", span, None)
        with self.clock.apart("save", self.state):
            path = self.saves.save(
                span,
                step,
                self.state,
                seal,
                level=span.stage.level(step - span.start - 1) if step > span.start else 0.0,
                flops=self.flops,
                seconds=self.clock.training(),
                data=self.feed.digest,
                crossing=crossing,
            )
        if path is not None:
            yield Saved(span.index, step, str(path))

    def _end(self, span: Span, i: int, *, finished: bool) -> End:
        if self.saves:
            self.saves.wait()
        model = self._judged(span.stage.level(i - 1) if i else 0.0)
        spent = self.clock.spent
        return End(
            ungated(model) if finished else model,
            finished,
            self.ahead.compiled,
            spent.get("compile", 0.0) + spent.get("grow", 0.0) + spent.get("birth", 0.0),
            spent.get("held_out", 0.0),
            spent.get("hooks", 0.0),
        )


@contextlib.contextmanager
def _stop_signal(enabled: bool) -> Iterator[Callable[[int], bool]]:
    """A question that becomes true after SIGTERM, on every host at the same step.

    With many hosts JAX's own service listens, so that all of them stop together. Otherwise the first
    signal is caught, and a second one does what it always did.
    """
    many = jax.process_count() > 1
    if many or not enabled or threading.current_thread() is not threading.main_thread():
        yield multihost_utils.reached_preemption_sync_point if many else lambda step: False
        return
    received = []

    def once(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGTERM, usual)

    usual = signal.signal(signal.SIGTERM, once)
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, usual)
