"""One training run, from top to bottom: stages, steps, growth, checkpoints, and how it all resumes."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from growjax.errors import CheckpointError, GrowjaxError, PlanError, TrainingError, raise_all
from growjax.parallel import replicated
from growjax.plan.losses import Loss
from growjax.plan.plan import Plan, reference_faults
from growjax.programs.ahead import Ahead
from growjax.programs.step import Programs
from growjax.runs import hosts
from growjax.runs.doing import Doing
from growjax.runs.feed import CorpusFeed, Feed
from growjax.runs.records import Record
from growjax.runs.run import Run, refuse_folder
from growjax.train.options import Options
from growjax.train.session import Session
from growjax.train.stop import Stop, Stopped
from growjax.train.stopwatch import Clock


class Training(Iterator[Record]):
    """The records of a run, as they come; `doing` says what happens between two of them.

    Closing it (or dropping it) ends the session as it stands: what is being written is waited for.
    """

    def __init__(self, records: Callable[[Doing], Iterator[Record]]):
        self.doing = Doing()
        self._records: Any = records(self.doing)

    def __next__(self) -> Record:
        return next(self._records)

    def close(self) -> None:
        """End the session without another record."""
        self._records.close()


def train(
    plan: Plan,
    feed: Feed | None = None,
    *,
    run: str | Path | None = None,
    options: Options | None = None,
    loss: Loss | None = None,
    reference: Any = None,
    cache: dict[str, Any] | None = None,
    devices: list[Any] | None = None,
) -> Training:
    """Run a plan, or go on with it: yields `Begin`, a `Step`, `Growth` or `Saved` for each, and `End`.

    **Arguments**

    - `feed`: its data; None reads what the plan names.
    - `run`: the folder of its checkpoints, locked for as long as it runs. If there are some, the run goes
      on from the last one, with the same batches, draws and numbers as if it had never stopped. None
      saves nothing.
    - `loss`: what is minimised instead of the plan's `loss`.
    - `reference`: the second model that `RhoLoss` compares with.
    - `cache`: a dict through which runs that follow each other share what they compiled.
    - `devices`: what the mesh is made of (all, by default).

    On SIGTERM or SIGINT a run with a folder finishes its step, saves and ends; on a second one it ends
    at once. Raises `TrainingError` with the step of the first loss or gradient that is not finite, and
    for a growth that breaks its promise; `CheckpointError` if the folder holds another run, is locked by
    another process, or cannot be written to; `DamagedError` if its last checkpoint is not whole;
    `DataError`.

    **Example**

        for record in train(plan, run="runs/first", options=Options(save_every=500)):
            print(record)
    """

    options = Options() if options is None else options

    def records(doing: Doing) -> Iterator[Record]:
        with contextlib.ExitStack() as stack:
            mesh = plan.layout.mesh(devices)
            programs = Programs(
                plan.optimizer.build(), loss or plan.loss, mesh, plan.layout, plan.accumulate
            )
            second = _second_model(plan, reference, programs)
            folder = None if run is None else Run(run)
            locked = None if folder is None else _locked(folder, stack)
            with doing("reading the text, and tokenising it if it is new"):
                data = feed or CorpusFeed.of(plan, Path(run or "runs/_").parent / "cache")
            ahead = Ahead(
                plan,
                programs,
                cache=cache,
                background=options.background,
                seal=run is not None,
                reference=second,
            )
            stack.enter_context(contextlib.closing(ahead))
            saves = None
            if folder is not None and locked is not None:
                saves = _saves(plan, folder, options, ahead.reference, locked)
            stop = Stop(enabled=run is not None)
            session = Session(plan, data, saves, options, programs, ahead, Clock(), stop, doing)
            yield from _ended_well(plan, session, stop)

    return Training(records)


def _run(session: Session, stop: Stop) -> Iterator[Record]:
    """A session from its beginning to its end, or until it is asked to stop."""
    yield session.begin()
    plan, saves = session.plan, session.saves
    # Until here nothing can be lost, and signals do what they always did
    with stop:
        try:
            born = not session.resumed
            if session.forked:
                # From here on the run needs nothing of the one that it was forked from
                yield from session.save()
            if born and plan.start is not None and plan.stages[0].grow is None:
                yield from session.save()
            for span in plan.spans[session.span.index :]:
                entered = span is session.span
                if not entered or (born and span.index == 0 and span.stage.grow is not None):
                    yield from session.enter(span)
                first = session.step - span.start
                with session.feed.stream(span, first) as stream:
                    for i in range(first, span.steps):
                        if stop.before(span.start + i):
                            raise Stopped
                        if saves is not None:
                            saves.check()
                        yield from session.train(i, stream)
                yield from session.flush()
                yield from session.save()
            end = session.finished()
        except Stopped:
            yield from session.stopped()
            return
    yield end


def _ended_well(plan: Plan, session: Session, stop: Stop) -> Iterator[Record]:
    """The records of a session; what is being written gets its time, and errors name their run."""
    try:
        yield from _run(session, stop)
    except (GrowjaxError, GeneratorExit):
        if session.saves is not None:
            with contextlib.suppress(CheckpointError):
                session.saves.wait()
        raise
    except jax.errors.JaxRuntimeError as error:
        raise TrainingError(
            f"plan {plan.name!r}: process {jax.process_index()} of {jax.process_count()} cannot go "
            f"on: {str(error).splitlines()[0][:300]}. If another host is lost or out of memory, "
            "start all of them again with the same command"
        ) from error


def _second_model(plan: Plan, reference: Any, programs: Programs) -> Any:
    """The model that selectors compare with, on the mesh; raises `PlanError` if it does not fit."""
    if reference is not None:
        headline = f"plan {plan.name!r} cannot choose by this second model:"
        raise_all(PlanError, headline, reference_faults(plan, reference))
        return jax.device_put(reference, replicated(programs.mesh))
    if any(s.stage.select is not None and s.stage.select.compares for s in plan.spans):
        raise PlanError(
            f"plan {plan.name!r}: reference: a stage's selector compares with a second model; give it "
            "one (`--reference FOLDER` on the command line)"
        )
    return None


def _locked(folder: Run, stack: contextlib.ExitStack) -> tuple[Any, list[str]]:
    """Lock a run's folder until the session ends; process 0 holds it for all."""
    lock = folder.lock()

    def take() -> list[str]:
        refuse_folder(folder.folder)
        stack.enter_context(lock)
        return [] if lock.note is None else [f"{folder}: {lock.note}"]

    return lock, hosts.from_first(take)


def _saves(
    plan: Plan, folder: Run, options: Options, reference: Any, locked: tuple[Any, list[str]]
) -> Any:
    # Orbax takes a second to import, and a run that saves nothing does not need it
    from growjax.runs.lineage import digest_of
    from growjax.runs.saves import Saves

    saves = Saves(
        plan,
        folder,
        locked[0],
        keep_last=options.keep_last,
        keep_every=options.keep_every,
        keep=options.save_at,
        fall_back=options.fall_back,
        reference=None if reference is None else digest_of(eqx.filter(reference, eqx.is_array)),
    )
    saves.notes += locked[1]
    return saves
