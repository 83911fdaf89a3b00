"""The state of a run between two records, and the actions on it: a step, a growth, a checkpoint.

Every step runs a program that was compiled before, one for each `Work` of a stage. The level of the
gates and the learning rate are arguments, and a compiled program refuses other shapes, so nothing is
recompiled unnoticed. Losses are read one step late, so that the host never waits for the step that it
has just started.

When a ramp is over, its gates stay in the model, at 1, until the next stage (or the end) drops them.
Open gates cost next to nothing, but dropping them changes the program; a new stage compiles one anyway.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from growjax.axes import sizes
from growjax.errors import StateError, TrainingError, raise_all
from growjax.gates import opened, ungated
from growjax.growth import Fit
from growjax.parallel import from_host
from growjax.plan.stages import Span
from growjax.programs.ahead import Ahead, Need
from growjax.programs.carried import carry_faults
from growjax.programs.step import Controls, Report, State
from growjax.runs import hosts
from growjax.runs.doing import Doing
from growjax.runs.feed import CorpusFeed, Feed
from growjax.runs.records import Begin, Crossing, End, Ended, Growth, HeldOut, Saved, Step
from growjax.train.judge import Judge
from growjax.train.options import Options
from growjax.train.stop import Stop, Stopped
from growjax.train.stopwatch import SaveTimer, Stopwatch
from growjax.train.transition import cross, fit_operator
from growjax.values import to_dict


# The numbers of a step that are read later
_UNREAD = dict.fromkeys(("seconds", "loss", "gradient_norm", "parameter_norm", "took"), math.nan)


class Session:
    """One session of a run in one process, from a birth or a checkpoint to a stop or the end.

    **Arguments**

    - `ahead`: the plan and its programs.
    - `saves`: the checkpoints of the run (`growjax.runs.saves.Saves`); None saves nothing.
    - `stop`: it is asked between steps whether to stop.

    `span` and `step` are the stage of the state, and the next step. `spent` (in the smallest unit of the
    plan's clock) and `flops` are the totals of the run so far.
    """

    def __init__(
        self, ahead: Ahead, feed: Feed, saves: Any, options: Options, doing: Doing, stop: Stop
    ):
        self.ahead, self.feed, self.saves, self.options = ahead, feed, saves, options
        self.plan, self.programs, self.doing = ahead.plan, ahead.programs, doing
        self.stopwatch, self.stop = Stopwatch(), stop
        self.judge = Judge(self.plan, feed, self.programs.mesh, options.hooks)
        self.span, self.step = self.plan.spans[0], 0
        self.spent, self.flops = self.span.spent, 0
        self.moved = False  # whether the state has changed in this session
        self.profiling = False
        # The last step without its numbers, and these while they are still on the device
        self.late: tuple[Step, Report] | None = None
        self.resumed = False  # whether the state was a checkpoint, of this run or of its trunk
        self.forked: str | None = None  # the folder of the run that this one was forked from
        self.timer = SaveTimer(options.save_minutes, self.stopwatch)
        self.losses: list[float] = []  # the latest losses of the stage, if its trigger reads them
        self.recorded: set[int] = set()  # the stages whose end by a trigger is on record

    # The beginning ----------------------------------------------------------------------------

    def begin(self) -> Begin:
        """Make the state: from the last checkpoint, from a trained model, or by a birth."""
        resumed = None
        if self.saves is not None:
            last = self.saves.run.last()
            with self.doing("looking for a checkpoint" if last is None else f"restoring {last}"):
                with self.stopwatch.apart("birth"):
                    resumed = self.saves.resume(self.programs, self.feed.digest)
        if resumed is None:
            # Before the first step, and not after all those of the stages before a growth
            headline = f"plan {self.plan.name!r} cannot be trained to its end:"
            with self.doing("checking the optimizer"), self.stopwatch.apart("birth"):
                raise_all(StateError, headline, list(carry_faults(self.plan)))
        if resumed is not None:
            self._continue(resumed)
        elif self.plan.fork is not None:
            with self.doing(f"reading {self.plan.fork.run}"), self.stopwatch.apart("birth"):
                resumed = self._from_trunk()
            self._continue(resumed)
            self.forked = str(Path(resumed.path).parent.parent)
        elif self.plan.start is not None:
            with self.doing(f"reading {self.plan.start.folder}"), self.stopwatch.apart("birth"):
                self.state = self._started()
        else:
            with self.stopwatch.apart("birth"):
                born = self._get(("birth", 0, None), "the birth of the model")
                self.state = born(np.int32(self.plan.seed))
        self.ahead.start(self.span.index)
        self.timer.restart(self.step)
        self.resumed = resumed is not None
        notes = tuple(self.saves.notes) if self.saves is not None else ()
        path = None if resumed is None else resumed.path
        windows = self.options.held_out
        devices = self.programs.mesh.size
        return Begin(
            self.span.index,
            self.step,
            path,
            devices,
            notes,
            windows,
            self.forked,
            self.plan.ends,
        )

    def _continue(self, resumed: Any) -> None:
        """Take the state of a checkpoint, of this run or of the one that it forks from."""
        self.state = resumed.state
        self.span, self.step = self.plan.spans[resumed.stage], resumed.step
        done = self.step - self.span.start
        # The cost follows from the plan; FLOPs and seconds are in the lineage
        self.spent = self.span.spent + sum(self.span.costs[:done])
        self.flops, self.stopwatch.earlier = resumed.flops, resumed.seconds
        self.losses = list(resumed.losses) if done else []
        self.recorded = set(resumed.ended)

    def _from_trunk(self) -> Any:
        """The state of another run before a step, of which the plan is a fork."""
        # Imports Orbax, which takes a second
        from growjax.runs.fork import read_fork

        loss = None if self.saves is None else self.saves.loss
        resumed, trunk = read_fork(self.plan, self.programs, self.feed.digest, loss)
        if self.saves is not None:
            self.saves.fork, self.saves.start = trunk.record, trunk.lineage["start"]
            for change in trunk.changes:
                self.saves.notes.append(
                    f"before step {resumed.step}, training differed from this plan: {change}"
                )
        return resumed

    def _started(self) -> State:
        """The state of the trained model that the plan starts from."""
        # Imports Orbax, which takes a second
        from growjax.runs.start import read_start

        model, origin = read_start(self.plan, self.programs.mesh)
        if self.saves is not None:
            self.saves.start = origin
        return self.programs.start(model)

    # One step ---------------------------------------------------------------------------------

    def train(self, i: int, stream: Any) -> Iterator[Step | Saved]:
        """Run the stage's step `i`, evaluate and save if it is due; yields the step before."""
        plan, span, options = self.plan, self.span, self.options
        work, step, cost = span.works[i], span.start + i, span.costs[i]
        # The learning rate in the middle of the step
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

        # Read the step before, now that this one runs
        yield from self.flush()
        self.step = step + 1
        self.spent += cost
        self.flops += span.flops[i]
        waited = stream.waited - waited
        late = Step(
            stage=span.index,
            step=step,
            tokens=span.tokens + (i + 1) * span.step_tokens,
            flops=self.flops,
            spent=self.spent / plan.clock.per_unit,
            rate=rate,
            level=level,
            waited=waited,
            **_UNREAD,
        )
        self.late = late, report
        yield from self._evaluate_if_due(level, cost)
        if self.profiling and options.profile and step == options.profile[1]:
            yield from self.flush()
            jax.profiler.stop_trace()
            self.profiling = False
        # After the stage's last step, the loop saves; if that of the run, it is evaluated first
        if i + 1 < span.steps and not self.over(i + 1) and self._save_is_due():
            # Raises if the step is not finite, so that only finite states are saved
            yield from self.flush()
            yield from self.save()

    def flush(self, held_out: float | None = None) -> Iterator[Step]:
        """Wait for the last step, if its numbers have not been read, and yield its record.

        Raises `TrainingError` unless they are finite.
        """
        if self.late is None:
            return
        (step, report), self.late = self.late, None
        loss, gradient_norm, parameter_norm = (float(x) for x in jax.device_get(report))
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            last = None if self.saves is None else self.saves.last()
            span = self.span
            raise TrainingError(
                f"plan {self.plan.name!r}: step {step.step} (stage {span.index} {span.stage.name!r}, "
                f"learning rate {step.rate:.3g}) has a loss of {loss} and a gradient of norm "
                f"{gradient_norm}; lower the peak, lengthen the warmup or look at the batch. Last good "
                f"checkpoint: {last or 'none'}"
            )
        self._remember(loss)
        yield dataclasses.replace(
            step,
            loss=loss,
            gradient_norm=gradient_norm,
            parameter_norm=parameter_norm,
            seconds=self.stopwatch.training(),
            took=self.stopwatch.lap(),
            held_out=held_out,
        )

    def _evaluate_if_due(self, level: float, cost: int) -> Iterator[Step]:
        """Evaluate after the last step, after those asked for, and every `evaluate_every` of the cost."""
        every = self.options.evaluate_every
        passed = self.spent // every > (self.spent - cost) // every
        if not passed and self.step not in (self.plan.steps, *self.options.evaluate_at):
            return
        held_out = self._held_out(level, self.options.held_out)
        sources = self.judge.by_source(held_out, self.options.held_out)
        for step in self.flush(held_out.loss):
            scores = None
            if self.options.hooks:
                with self.stopwatch.apart("hooks", self.state), self.doing("running the hooks"):
                    scores = self.judge.scores(self._judged(level), step)
            if sources or scores is not None:
                step = dataclasses.replace(step, scores={**sources, **(scores or {})})
            yield step

    def _held_out(self, level: float, windows: int) -> HeldOut:
        """The held-out losses of the state, with its gates at a level."""
        # A step that is counted must be evaluated too: a run that goes on does not come back to it
        need: Need = ("evaluate", self.span.index, None)
        program = self._compiled(need, "the evaluation", stops=False)
        with self.stopwatch.apart("held_out", self.state), self.doing("evaluating"):
            return self.judge.held_out(
                program, self.state, level, windows=windows, batch=self.span.batch
            )

    def _judged(self, level: float) -> Any:
        """The model to evaluate (the average, if the optimizer averages), with its gates at a level."""
        return opened(self.programs.judged(self.state), level)

    # Triggers ---------------------------------------------------------------------------------

    def _remember(self, loss: float) -> None:
        """Keep the latest losses that the stage's trigger reads, and one more for the next step."""
        until = self.span.stage.until
        if until is not None:
            self.losses = [*self.losses, loss][-until.reads - 1 :]

    def over(self, i: int) -> bool:
        """Whether the trigger ends the stage before its step `i`.

        The loss of step i - 1 is never read, whether it is known already or not.
        """
        stage = self.span.stage
        if stage.until is None or stage.ended is not None:
            return False
        fitted_to = stage.grow.batches if isinstance(stage.grow, Fit) else 0
        if i < max(stage.ramp, fitted_to, 2) or self.plan.rises(self.spent, self.span.index):
            return False
        known = self.losses if self.late is not None else self.losses[:-1]
        return stage.until.fires(known[-stage.until.reads :], i - 1) is not None

    def end_stage(self, i: int) -> Iterator[Step]:
        """End the stage after `i` steps: from here on, the plan is one whose stage has this length."""
        index = self.span.index
        self.plan = self.plan.ended(index, i)
        self.span = self.plan.spans[index]
        self.ahead.change(self.plan, index)
        self.ahead.start(index)
        self.judge.plan = self.plan
        if isinstance(self.feed, CorpusFeed):
            self.feed = dataclasses.replace(self.feed, plan=self.plan)
            self.judge.feed = self.feed
        if self.saves is not None:
            self.saves.change(self.plan)
        if self.late is not None and self.step == self.plan.steps:
            # The run ends here, and its last step is evaluated
            yield from self._evaluate_if_due(self.span.stage.level(i - 1), self.span.costs[-1])

    def ended(self) -> Iterator[Ended]:
        """The record of the end of a stage that its trigger has ended, after all of its steps.

        It comes before the state is saved as that of an ended stage, so a run that is killed in between
        yields it when it goes on.
        """
        index, stage = self.span.index, self.span.stage
        if stage.until is None or stage.ended is None or index in self.recorded:
            return
        self.recorded.add(index)
        numbers = stage.until.fires(self.losses[:-1][-stage.until.reads :], stage.ended - 1)
        # None if a user stated `ended` without a trigger that fires there
        if numbers is not None:
            # A trigger of one's own may give numbers of NumPy, which no journal takes
            numbers = {name: float(x) for name, x in numbers.items()}
            yield Ended(index, self.step - 1, stage.ended, str(stage.until), numbers)

    # Between stages ---------------------------------------------------------------------------

    def enter(self, span: Span) -> Iterator[Growth | Saved]:
        """Enter a stage; if it grows, grow the state, certify the growth and save."""
        if span.stage.grow is None:
            # Gates of the stage before are open by now, so the function is the same without them
            self.state = self.state._replace(rest=ungated(self.state.rest))
            self.span, self.spent, self.losses = span, span.spent, []
            self.ahead.start(span.index)
            return
        fit = self._fitted(span) if isinstance(span.stage.grow, Fit) else None
        start, waited = self.stopwatch.now(), self.ahead.waited
        probe = functools.partial(self.judge.probe, batch=span.batch)
        with self.stopwatch.apart("grow"):
            self.state, crossing = cross(self.plan, span, self.state, self._growing, probe, fit)
        self.span, self.spent, self.moved = span, span.spent, True
        self.flops, self.losses = self.flops + span.fit_flops, []
        saved = list(self.save(crossing))
        stopped = None
        # Wait for the first step's program here, so that the wait is part of the growth's stall
        with self.stopwatch.apart("grow"):
            try:
                self._get(("step", span.index, span.works[0]), "a training step")
            except Stopped as error:
                # The growth is saved already, so its record is yielded before the run stops
                stopped = error
        compile_wait = self.ahead.waited - waited
        stall = self.stopwatch.now() - start
        self.ahead.start(span.index)
        old, new = sizes(self.plan.model_before(span.index)), span.sizes
        grew = {axis: (old.get(axis, 0), n) for axis, n in new.items() if n != old.get(axis)}
        yield Growth(span.index, span.start, self.flops, grew, crossing, stall, compile_wait)
        yield from saved
        if stopped is not None:
            raise stopped

    def _fitted(self, span: Span) -> tuple[Any, tuple[float, ...]]:
        """The numbers of the operator of a stage, and the losses of its fit, which is training time."""

        def get(need: Need) -> Any:
            with self.stopwatch.apart("compile"):
                return self._growing(need)

        with self.doing(f"fitting {span.stage.grow}"), self.feed.stream(span, 0) as stream:
            batches = (from_host(rows, self.programs.mesh) for _, rows in stream)
            return fit_operator(self.plan, span, self.state, get, batches, self.stop.check)

    def _growing(self, need: Need) -> Any:
        """A compiled program of a growth."""
        return self._get(need, f"the growth into stage {need[1]}")

    # Programs ---------------------------------------------------------------------------------

    def _compiled(self, need: Need, name: str, *, stops: bool = True) -> Any:
        """A compiled program, as `_get` has it; waiting for it is not counted as training."""
        # If the program is not ready, wait for the steps that still run first: their time is training
        with self.stopwatch.apart("compile", () if self.ahead.ready(need) else self.state):
            return self._get(need, name, stops=stops)

    def _get(self, need: Need, name: str, *, stops: bool = True) -> Any:
        """A compiled program; with `stops`, raises `Stopped` if the run is asked to stop meanwhile."""
        if self.ahead.ready(need):
            return self.ahead.get(need)
        with self.doing(f"compiling {name}"):
            return self.ahead.get(need, meanwhile=self.stop.check if stops else None)

    # Checkpoints ------------------------------------------------------------------------------

    def save(self, crossing: Crossing | None = None) -> Iterator[Saved]:
        """Start to write a checkpoint, unless the run saves nothing or an earlier session wrote it."""
        if self.saves is None:
            return
        self.timer.restart(self.step)
        span, done = self.span, self.step - self.span.start
        # A run that stops must save
        seal = self._compiled(("seal", span.index, None), "the checksums", stops=False)
        with self.stopwatch.apart("save", self.state), self.doing("saving"):
            path: Path | None = self.saves.save(
                span,
                self.step,
                self.state,
                seal,
                level=span.stage.level(done - 1) if done else 0.0,
                flops=self.flops,
                seconds=self.stopwatch.training(),
                data=self.feed.digest,
                crossing=crossing,
                losses=self.losses,
            )
        if path is not None:
            yield Saved(span.index, self.step, str(path))

    def _save_is_due(self) -> bool:
        if self.saves is None:
            return False
        every = self.options.save_every
        due = every is not None and self.step % every == 0
        due = due or self.step in self.options.save_at
        # The timer first: all hosts must call it at the same steps
        return self.timer.due(self.step) or due

    # The end ----------------------------------------------------------------------------------

    def stopped(self) -> Iterator[Step | Ended | Saved | End]:
        """Save the state, and end the session."""
        with self.doing("stopping: the state is saved; a second signal ends at once"):
            yield from self.flush()
            if self.step == self.span.start + self.span.steps:
                # Stopped after its trigger had ended the stage, and before that was yielded
                yield from self.ended()
            if self.moved:
                yield from self.save()
            yield self.end(finished=False)

    def end(self, *, finished: bool) -> End:
        """The end of the session; if the run is `finished`, with the losses on `held_out_end` windows."""
        if self.saves is not None:
            with self.doing("writing the last checkpoint"):
                self.saves.wait()
        done = self.step - self.span.start
        level = self.span.stage.level(done - 1) if done else 0.0
        held_out = self._held_out_at_the_end(level) if finished else None
        model = self._judged(level)
        seconds = self.stopwatch.spent
        return End(
            model=ungated(model) if finished else model,
            finished=finished,
            programs=self.ahead.compiled,
            compile_seconds=sum(seconds.get(name, 0.0) for name in ("compile", "grow", "birth")),
            held_out_seconds=seconds.get("held_out", 0.0),
            hook_seconds=seconds.get("hooks", 0.0),
            step=self.step,
            held_out=held_out,
            signal=self.stop.signal,
        )

    def _held_out_at_the_end(self, level: float) -> HeldOut | None:
        """The losses on `held_out_end` windows: measured and saved, or read if a session saved them."""
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
            saved = hosts.from_first(lambda: self._saved_held_out(about))
            if saved is not None:
                return HeldOut(*(np.array(values) for values in saved))
        held_out = self._held_out(level, windows)
        if self.saves is not None and jax.process_index() == 0:
            self.saves.run.save_held_out(held_out, dict(about))
        return held_out

    def _saved_held_out(self, about: Mapping[str, Any]) -> list[list[float]] | None:
        """The sums and weights in the run's folder, as lists, if they are those of `about`."""
        saved = self.saves.run.held_out()
        if saved is None or saved[1] != about:
            return None
        return [saved[0].sums.tolist(), saved[0].weights.tolist()]
