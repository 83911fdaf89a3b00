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
from growjax.train.stopwatch import Stopwatch


class Training(Iterator[Record]):
    """The iterator over the records of a run; `doing` is the current activity between two of them.

    Closing it (or deleting it) ends the session, after a checkpoint that is being written is whole.
    """

    def __init__(self, records: Callable[[Doing], Iterator[Record]]):
        self.doing = Doing()
        self._records: Any = records(self.doing)

    def __next__(self) -> Record:
        return next(self._records)

    def close(self) -> None:
        """End the session, without further records."""
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
    """Run a plan, or resume it: yields `Begin`; `Step`, `Growth` and `Saved` as they happen; and `End`.

    **Arguments**

    - `feed`: the data; None reads the data that the plan names.
    - `run`: the folder of the run, locked while it trains. If it has checkpoints, the run goes on from
      the last one, with the same batches, draws and numbers as if it had never stopped. None saves
      nothing.
    - `loss`: the loss to minimise, instead of the plan's.
    - `reference`: the second model that `RhoLoss` compares with.
    - `cache`: a dict through which runs that follow each other share compiled programs.
    - `devices`: the devices of the mesh (all, by default).

    On SIGTERM or SIGINT a run with a folder finishes its step, saves and ends; on a second one it ends
    at once. Raises `TrainingError` at the first loss or gradient that is not finite, and for a growth
    that breaks its promise; `CheckpointError` if the folder holds another run, is locked by another
    process, or cannot be written to; `DamagedError` if its last checkpoint is not whole; `DataError` for
    missing or damaged data.

    **Example**

        for record in train(plan, run="runs/first", options=Options(save_every=500)):
            print(record)
    """

    options = Options() if options is None else options

    def records(doing: Doing) -> Iterator[Record]:
        with contextlib.ExitStack() as stack:
            mesh = plan.layout.mesh(devices)
            programs = Programs.of(plan, mesh, loss)
            second = _second_model(plan, reference, programs)
            folder = None if run is None else Run(run)
            lock, notes = (None, []) if folder is None else _locked(folder, stack)
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
            if folder is not None:
                saves = _saves(plan, folder, options, ahead.reference, lock)
                saves.notes += notes
            stop = Stop(enabled=run is not None)
            session = Session(plan, data, saves, options, programs, ahead, Stopwatch(), stop, doing)
            yield from _guarded(plan, session, stop)

    return Training(records)


def _run(session: Session, stop: Stop) -> Iterator[Record]:
    """A session from its beginning to its end, or until it is asked to stop."""
    yield session.begin()
    plan, saves = session.plan, session.saves
    # Signals are caught from here on; before the first record, a stopped run loses nothing
    with stop:
        try:
            born = not session.resumed
            if session.forked:
                # From here on the run needs nothing of the one that it was forked from
                yield from session.save()
            if born and plan.start is not None and plan.stages[0].grow is None:
                # The trained model, as the run's first checkpoint. A stage that grows saves after it.
                yield from session.save()
            for span in plan.spans[session.span.index :]:
                entered = span is session.span
                # The first stage of a new run may grow as well
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


def _guarded(plan: Plan, session: Session, stop: Stop) -> Iterator[Record]:
    """The records of a session. On an error, a checkpoint that is being written is waited for.

    An error of the JAX runtime becomes a `TrainingError` that names the run and the process.
    """
    try:
        yield from _run(session, stop)
    except (GrowjaxError, GeneratorExit):
        # `GeneratorExit`: the caller closed the iterator
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
    """Put the model that selectors compare with on the mesh; None if they need none.

    Raises `PlanError` if it does not fit the plan, or is missing.
    """
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
    """Lock a run's folder until the session ends: the lock, which process 0 holds, and notes about it."""
    lock = folder.lock()

    def take() -> list[str]:
        refuse_folder(folder.folder)
        stack.enter_context(lock)
        return [] if lock.note is None else [f"{folder}: {lock.note}"]

    return lock, hosts.from_first(take)


def _saves(plan: Plan, folder: Run, options: Options, reference: Any, lock: Any) -> Any:
    """The checkpoints of a plan in the folder of its run."""
    # Orbax takes a second to import, and a run that saves nothing does not need it
    from growjax.runs.lineage import digest_of
    from growjax.runs.saves import Saves

    return Saves(
        plan,
        folder,
        lock,
        keep_last=options.keep_last,
        keep_every=options.keep_every,
        keep=options.save_at,
        fall_back=options.fall_back,
        reference=None if reference is None else digest_of(eqx.filter(reference, eqx.is_array)),
    )
