"""The state of a run between two records, and what moves it on: a step, a growth, a checkpoint.

Every step of a stage is a program compiled before it runs, once for every sub-network size. The level
of a ramp and the learning rate are arguments, and a compiled program refuses shapes it was not made
for, so nothing recompiles unnoticed. Losses are read one step late: the host never waits for the step
it has just started.

A ramp that is over leaves its gates in place, at 1, until the next growth (or the end) drops them. The
function is the same and open gates cost next to nothing, but dropping them changes the program: at a
boundary, which has a new one anyway, that is free; in the middle of a stage it is not.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from growjax.axes import sizes
from growjax.gates import opened, ungated
from growjax.parallel import from_host
from growjax.plan.plan import Plan
from growjax.plan.stages import Span
from growjax.programs.ahead import Ahead, Need
from growjax.programs.step import Controls, Programs, State
from growjax.runs import hosts
from growjax.runs.doing import Doing
from growjax.runs.feed import Feed
from growjax.runs.records import Begin, Crossing, End, Growth, HeldOut, Saved, Step
from growjax.train.judge import Judge
from growjax.train.late import Late
from growjax.train.options import Options
from growjax.train.stop import Stop, Stopped
from growjax.train.stopwatch import Clock
from growjax.train.transition import cross
from growjax.values import to_dict


class Session:
    """One process's part of a run, from a birth or a checkpoint to a stop or the end.

    **Arguments**

    - `saves`: where checkpoints go (`growjax.runs.saves.Saves`); None saves nothing.

    `span` and `step` are the stage that the state is in and the step that it stands before.
    """

    def __init__(
        self,
        plan: Plan,
        feed: Feed,
        saves: Any,
        options: Options,
        programs: Programs,
        ahead: Ahead,
        clock: Clock,
        stop: Stop,
        doing: Doing,
    ):
        self.plan, self.feed, self.saves, self.options = plan, feed, saves, options
        self.programs, self.ahead, self.clock = programs, ahead, clock
        self.stop, self.doing = stop, doing
        self.judge = Judge(plan, feed, programs.mesh, options.hooks)
        self.span, self.step = plan.spans[0], 0
        self.spent, self.flops = 0, 0
        self.moved = False  # whether the state is other than what it began as
        self.profiling = False
        self.late: Late | None = None
        self.forked: str | None = None
        self.timer = SaveTimer(options.save_minutes, clock)

    # The beginning ----------------------------------------------------------------------------

    def begin(self) -> Begin:
        """Find the state: of the last checkpoint, of the model that the plan starts from, or born."""
        resumed = None
        if self.saves is not None:
            last = self.saves.run.last()
            with self.doing("looking for a checkpoint" if last is None else f"restoring {last}"):
                with self.clock.apart("birth"):
                    resumed = self.saves.resume(self.programs, self.feed.digest)
        if resumed is not None:
            self._continue(resumed)
        elif self.plan.fork is not None:
            with self.doing(f"reading {self.plan.fork.run}"), self.clock.apart("birth"):
                resumed = self._fork(self.plan)
            self._continue(resumed)
            self.forked = str(Path(resumed.path).parent.parent)
        elif self.plan.start is not None:
            with self.doing(f"reading {self.plan.start.folder}"), self.clock.apart("birth"):
                self.state = self._started()
        else:
            with self.clock.apart("birth"):
                born = self._get(("birth", 0, None), "the birth of the model")
                self.state = born(np.int32(self.plan.seed))
        self.ahead.start(self.span.index)
        self.timer.restart(self.step)
        self.resumed = resumed is not None
        notes = tuple(self.saves.notes) if self.saves is not None else ()
        path = None if resumed is None else resumed.path
        windows = self.options.held_out
        devices = self.programs.mesh.size
        return Begin(self.span.index, self.step, path, devices, notes, windows, self.forked)

    def _continue(self, resumed: Any) -> None:
        """Take the state of a checkpoint, of this run or of the one that it forks from."""
        self.state = resumed.state
        self.span, self.step = self.plan.spans[resumed.stage], resumed.step
        done = self.step - self.span.start
        self.spent = self.span.spent + sum(self.span.costs[:done])
        self.flops, self.clock.before = resumed.flops, resumed.seconds

    def _fork(self, plan: Plan) -> Any:
        """The state before a step of another run."""
        from growjax.runs.fork import read_fork

        resumed, trunk = read_fork(plan, self.programs, self.feed.digest)
        if self.saves is not None:
            self.saves.fork, self.saves.start = trunk.record, trunk.lineage["start"]
            for change in trunk.changes:
                self.saves.notes.append(
                    f"before step {resumed.step} it was not this plan: {change}"
                )
        return resumed

    def _started(self) -> State:
        """The state of a trained model that the plan starts from."""
        from growjax.runs.start import read_start

        model, origin = read_start(self.plan, self.programs.mesh)
        if self.saves is not None:
            self.saves.start = origin
        return self.programs.start(model)

    # One step ---------------------------------------------------------------------------------

    def train(self, i: int, stream: Any) -> Iterator[Step | Saved]:
        """The stage's step `i`, and what is due after it; reports the step before."""
        plan, span, options = self.plan, self.span, self.options
        work, step, cost = span.works[i], span.start + i, span.costs[i]
        level, rate = span.stage.level(i), plan.learning_rate(self.spent + cost / 2)
        controls = Controls(
            np.float32(level), np.float32(rate), np.int32(step), np.int32(plan.seed)
        )
        program = self._compiled(("step", span.index, work), "a training step")
        select = span.stage.select
        reference = self.ahead.reference if select is not None and select.compares else None
        waited = stream.waited
        _, rows = next(stream)
        batch = from_host(rows, self.programs.mesh)
        if self.saves is not None and options.profile and step == options.profile[0]:
            jax.profiler.start_trace(str(self.saves.run.folder / "profile"))
            self.profiling = True
        self.state, report = program(self.state, batch, controls, reference)
        self.moved = True

        yield from self.flush()  # the step before, now that this one is on its way
        self.step = step + 1
        self.spent += cost
        self.flops += span.flops[i]
        waited = stream.waited - waited
        self.late = Late(plan, span, i, self.spent, self.flops, rate, level, waited, report)
        yield from self._mark(level, cost)
        if self.profiling and options.profile and step == options.profile[1]:
            yield from self.flush()
            jax.profiler.stop_trace()
            self.profiling = False
        if i + 1 < span.steps and self._save_is_due():
            yield from self.flush()  # what is saved is known to be finite
            yield from self.save()

    def flush(self, held_out: float | None = None) -> Iterator[Step]:
        """Wait for the step that is on its way, and report it."""
        if self.late is not None:
            late, self.late = self.late, None
            yield late.read(self.clock, self._last, held_out)

    def _last(self) -> Path | None:
        return None if self.saves is None else self.saves.last()

    def _mark(self, level: float, cost: int) -> Iterator[Step]:
        """Judge the model, if this step crossed a mark or is the last one."""
        every = self.options.evaluate_every
        crossed = self.spent // every > (self.spent - cost) // every
        if not crossed and self.step != self.plan.steps:
            return
        found = self._held_out(level, self.options.held_out)
        for step in self.flush(found.loss):
            if self.options.hooks:
                with self.clock.apart("hooks", self.state), self.doing("asking the hooks"):
                    scores = self.judge.scores(self._judged(level), step)
                step = dataclasses.replace(step, scores=scores)
            yield step

    def _held_out(self, level: float, windows: int) -> HeldOut:
        program = self._compiled(("evaluate", self.span.index, None), "the evaluation")
        with self.clock.apart("held_out", self.state), self.doing("evaluating"):
            return self.judge.held_out(
                program, self.state, level, windows=windows, batch=self.span.batch
            )

    def _judged(self, level: float) -> Any:
        """The model that is evaluated, its gates at a level."""
        return opened(self.programs.judged(self.state), level)

    # Between stages ---------------------------------------------------------------------------

    def enter(self, span: Span) -> Iterator[Growth | Saved]:
        """Grow into a stage, if it grows, and put the grown state on record before it trains."""
        if span.stage.grow is None:
            # Gates of the stage before are open by now; without them the function is the same
            self.state = self.state._replace(rest=ungated(self.state.rest))
            self.span = span
            self.ahead.start(span.index)
            return
        start, waited = self.clock.now(), self.ahead.waited
        with self.clock.apart("grow"):
            self.state, crossing = cross(
                self.plan, span, self.state, self._growing, self._probe_of(span)
            )
        self.span, self.moved = span, True
        saved = list(self.save(crossing))
        stopped = None
        with self.clock.apart("grow"):
            try:
                self._get(("step", span.index, span.works[0]), "a training step")
            except Stopped as error:
                # The growth is on record already, and is reported first
                stopped = error
        compile_wait = self.ahead.waited - waited
        stall = self.clock.now() - start
        self.ahead.start(span.index)
        old, new = sizes(self.plan.before(span.index)), span.sizes
        grew = {a: (old.get(a, 0), n) for a, n in new.items() if n != old.get(a)}
        yield Growth(span.index, span.start, self.flops, grew, crossing, stall, compile_wait)
        yield from saved
        if stopped is not None:
            raise stopped

    def _growing(self, need: Need) -> Any:
        return self._get(need, f"the growth into stage {need[1]}")

    def _probe_of(self, span: Span) -> Any:
        def probe(program: Any, state: State, level: float) -> tuple[np.ndarray, np.ndarray]:
            return self.judge.probe(program, state, level, span.batch)

        return probe

    # Programs ---------------------------------------------------------------------------------

    def _compiled(self, need: Need, words: str) -> Any:
        # Steps that still run are training; a program that is not there yet is not
        with self.clock.apart("compile", () if self.ahead.ready(need) else self.state):
            return self._get(need, words)

    def _get(self, need: Need, words: str) -> Any:
        """A compiled program; raises `Stopped` if the run is asked to stop while it waits for it."""
        if self.ahead.ready(need):
            return self.ahead.get(need)
        with self.doing(f"compiling {words}"):
            return self.ahead.get(need, meanwhile=self.stop.check)

    # Checkpoints ------------------------------------------------------------------------------

    def save(self, crossing: Crossing | None = None) -> Iterator[Saved]:
        """Write a checkpoint, unless there is none to write or it is there from an earlier session."""
        if self.saves is None:
            return
        self.timer.restart(self.step)
        span, done = self.span, self.step - self.span.start
        # Also while the run stops: without this program nothing can be saved
        with self.clock.apart("compile", self.state), self.doing("saving"):
            seal = self.ahead.get(("seal", span.index, None))
        with self.clock.apart("save", self.state), self.doing("saving"):
            path: Path | None = self.saves.save(
                span,
                self.step,
                self.state,
                seal,
                level=span.stage.level(done - 1) if done else 0.0,
                flops=self.flops,
                seconds=self.clock.training(),
                data=self.feed.digest,
                crossing=crossing,
            )
        if path is not None:
            yield Saved(span.index, self.step, str(path))

    def _save_is_due(self) -> bool:
        if self.saves is None:
            return False
        every = self.options.save_every
        due = every is not None and self.step % every == 0
        due = due or self.step in self.options.save_at
        # Asked in any case: all hosts must ask alike
        return self.timer.due(self.step) or due

    # The end ----------------------------------------------------------------------------------

    def stopped(self) -> Iterator[Step | Saved | End]:
        """Save where the run stands, and end the session."""
        with self.doing("stopping: the state is saved; a second signal ends at once"):
            yield from self.flush()
            if self.moved:
                yield from self.save()
            yield self._end(finished=False)

    def finished(self) -> End:
        """The end of the run, with the losses on all windows of the fixed set."""
        return self._end(finished=True)

    def _end(self, *, finished: bool) -> End:
        if self.saves is not None:
            with self.doing("writing the last checkpoint"):
                self.saves.wait()
        done = self.step - self.span.start
        level = self.span.stage.level(done - 1) if done else 0.0
        held_out = self._held_out_at_the_end(level) if finished else None
        model = self._judged(level)
        seconds = self.clock.spent
        return End(
            model=ungated(model) if finished else model,
            finished=finished,
            programs=self.ahead.compiled,
            compile_seconds=sum(seconds.get(of, 0.0) for of in ("compile", "grow", "birth")),
            held_out_seconds=seconds.get("held_out", 0.0),
            hook_seconds=seconds.get("hooks", 0.0),
            step=self.step,
            held_out=held_out,
            signal=self.stop.signal,
        )

    def _held_out_at_the_end(self, level: float) -> HeldOut | None:
        """Measured, or read from the folder where an earlier session left it; kept there."""
        windows = self.options.held_out_end
        if not windows:
            return None
        about: Mapping[str, Any] = {
            "step": self.step,
            "data": self.feed.digest,
            "objective": to_dict(self.plan.objective),
            "windows": windows,
        }
        if self.saves is not None:
            kept = hosts.from_first(lambda: self._kept(about))
            if kept is not None:
                return HeldOut(*(np.array(values) for values in kept))
        found = self._held_out(level, windows)
        if self.saves is not None and jax.process_index() == 0:
            self.saves.run.save_held_out(found, dict(about))
        return found

    def _kept(self, about: Mapping[str, Any]) -> list[list[float]] | None:
        kept = self.saves.run.held_out()
        if kept is None or kept[1] != about:
            return None
        return [kept[0].sums.tolist(), kept[0].weights.tolist()]


class SaveTimer:
    """When the next checkpoint by time is due, before the same step on all hosts.

    One process looks at its clock. With many, process 0 does, and tells the others at steps that all of
    them know: at each it says how many steps later they meet again, so that it costs next to nothing.
    """

    def __init__(self, minutes: float | None, clock: Clock):
        self.seconds = None if minutes is None else 60 * minutes
        self.clock = clock
        self.start, self.first, self.meeting = clock.now(), 0, 0

    def restart(self, step: int) -> None:
        """Count from now on: a checkpoint of this step is there, or the run begins."""
        self.start, self.first, self.meeting = self.clock.now(), step, step + 8

    def due(self, step: int) -> bool:
        """Whether to save before `step`."""
        if self.seconds is None:
            return False
        if jax.process_count() == 1:
            return self._left() <= 0
        if step < self.meeting:
            return False
        wait = hosts.number_of_first(self._steps_left(step))
        self.meeting = step + wait
        return wait == 0

    def _left(self) -> float:
        assert self.seconds is not None
        return self.seconds - (self.clock.now() - self.start)

    def _steps_left(self, step: int) -> int:
        """Half of the steps until the time is up, at this speed; 0 if it is up."""
        left = self._left()
        if left <= 0:
            return 0
        each = max(self.clock.now() - self.start, 1e-3) / max(step - self.first, 1)
        return int(min(max(left / each / 2, 1), 4096))
