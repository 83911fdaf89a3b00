"""Probe and choose: train each candidate of a probe for some steps, and keep the best."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from growjax.errors import PlanError, TrainingError
from growjax.plan.plan import Plan
from growjax.plan.probe import Decision, Probe, lowest
from growjax.runs import hosts
from growjax.runs.feed import Feed
from growjax.runs.journal import Journal, as_row
from growjax.runs.records import Decided, Saved
from growjax.runs.run import Run
from growjax.runs.watch import watch
from growjax.train.loop import train
from growjax.train.options import Options
from growjax.values import read, write


class TrialStopped(TrainingError):
    """A signal asked a trial to stop; the same call goes on.

    - `signal`: its name, such as "SIGTERM"; None if the trial ended before its steps for another reason.
    """

    def __init__(self, message: str, signal: str | None):
        super().__init__(message)
        self.signal = signal


def choose(
    probe: Probe,
    run: str | Path,
    feed: Callable[[Plan], Feed] | None = None,
    *,
    options: Options | None = None,
    allow: tuple[str, ...] = (),
    console: Console | None = None,
    **more: Any,
) -> Decision:
    """Train every candidate of a probe for its trial, and decide for the one with the lowest loss.

    The candidates' runs are the folders `0`, `1`, ... of `run`; the first one also trains the stages
    before, and the others fork from it, so that all start from the same bits. The decision is written to
    `decision.json` and, with its numbers, to the journal of the run that is kept, which goes on from the
    end of its trial:

        decision = choose(probe, "runs/probe")
        for record in watch(train(decision.plan, run=decision.run), decision.plan, run=decision.run):
            ...

    Killed at any point, the same call goes on where it was, and takes the decision that it would have.

    **Arguments**

    - `run`: the folder of the probe.
    - `feed`: the data of a plan; None reads the data that it names.
    - `options`, and any more: as for `growjax.train.train`. Losses are those of the whole model on
      `options.held_out` windows after the last step of a trial.
    - `console`: where the progress of the trials is shown; None for no display.
    - `allow`: packages whose classes a decision that is read may use.

    Raises `PlanError` if `run` holds the decision of another probe, `TrialStopped` if a signal stops a
    trial or comes while one ends, and whatever training raises.
    """
    options, folder = options or Options(), Path(run)
    file = folder / "decision.json"
    if hosts.from_first(file.exists):
        decision = read(file, Decision, allow=allow, error=PlanError)
        if decision.probe != probe:
            raise PlanError(f"{file}: it is the decision of another probe; choose another folder")
        return decision
    end = probe.start + probe.steps
    losses = list[float | None]()
    for number in range(len(probe.candidates)):
        plan, trial = probe.trial(number, folder), Run(folder / str(number))
        if hosts.from_first(lambda trial=trial: _loss_after(trial, end)) is None:
            data = None if feed is None else feed(plan)
            signal = _train(
                plan, trial, data, end, _of_trial(options, probe.start, end), console, more
            )
            if signal is not None or hosts.from_first(
                lambda trial=trial: _loss_after(trial, end) is None
            ):
                raise TrialStopped(
                    f"{trial}: stopped by {signal or 'request'} during the trials; the same call goes on",
                    signal,
                )
        loss = hosts.from_first(lambda trial=trial: _loss_after(trial, end))
        assert loss is not None
        losses.append(loss if math.isfinite(loss) else None)
    chosen = lowest(losses)
    if chosen is None:
        raise TrainingError(
            f"{folder}: the held-out loss of no candidate is finite after its trial; lower the learning "
            "rate, or try other candidates in another folder"
        )
    winner = Run(folder / str(chosen))
    decision = Decision(probe, tuple(losses), options.held_out, chosen, str(winner))
    hosts.from_first(lambda: _log(decision, winner, end, file))
    return decision


def _of_trial(options: Options, start: int, end: int) -> Options:
    """The options of a trial: it saves where others fork from it, and is judged and saved at its end."""
    return dataclasses.replace(
        options,
        save_at=(*options.save_at, start, end),
        evaluate_at=(*options.evaluate_at, end),
    )


def _train(
    plan: Plan,
    run: Run,
    feed: Feed | None,
    end: int,
    options: Options,
    console: Console | None,
    more: dict[str, Any],
) -> str | None:
    """Train a candidate up to the end of its trial, and save it there; returns the signal that came."""
    training = train(plan, feed, run=run.folder, options=options, **more)
    # Closing waits for the checkpoint that is being written
    with contextlib.closing(training):
        for record in watch(training, plan, run=run.folder, console=console):
            if isinstance(record, Saved) and record.step == end:
                break
    # One that came while the trial ended asks as much; all hosts go on, or none does
    return hosts.from_first(lambda: training.signal)


def _loss_after(run: Run, step: int) -> float | None:
    """The held-out loss in a run's journal after so many steps; None before it is there."""
    rows = run.rows() if run.journal_file.exists() else []
    losses = [r["held_out"] for r in rows if r["kind"] == "step" and r["step"] == step - 1]
    return losses[-1] if losses else None


def _log(decision: Decision, run: Run, end: int, file: Path) -> None:
    """Write a decision to the journal of the run that is kept, once, and then to its file."""
    probe = decision.probe
    record = Decided(
        stage=probe.stage,
        step=end - 1,
        candidates=tuple(stage.name or str(stage.grow) for stage in probe.candidates),
        losses=decision.losses,
        costs=tuple(cost / probe.plan.clock.per_unit for cost in probe.costs),
        chosen=decision.chosen,
    )
    if not any(row["kind"] == "decided" for row in run.rows()):
        with Journal(run.folder) as journal:
            journal.add(as_row(record, {}))
    try:
        write(decision, file, error=PlanError)
    except OSError as error:
        raise TrainingError(f"{file}: could not be written: {error.strerror}") from error
