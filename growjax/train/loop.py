"""One training run, from top to bottom: stages, steps, growth, checkpoints, and how it all resumes."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from growjax.data import Progress
from growjax.errors import TrainingError
from growjax.plan.losses import Loss
from growjax.plan.plan import Plan
from growjax.programs.ahead import Ahead
from growjax.programs.step import Programs
from growjax.runs.doing import Doing
from growjax.runs.feed import CorpusFeed, Feed
from growjax.runs.records import Record
from growjax.runs.run import Run, settled
from growjax.train.options import Options
from growjax.train.session import Session
from growjax.train.stop import Stop, Stopped


class Training(Iterator[Record]):
    """The iterator over the records of a run; `doing` is the current activity between two of them.

    Closing it (or deleting it) ends the session, after a checkpoint that is being written is whole.
    """

    def __init__(self, records: Callable[[Doing, Stop], Iterator[Record]], stop: Stop):
        # The generator has these and not the iterator: in a cycle with it, a loop that was left would
        # keep its lock and its signals until garbage is collected
        self.doing, self._stop = Doing(), stop
        self._records: Any = records(self.doing, stop)

    @property
    def signal(self) -> str | None:
        """The name of the signal that asked this run to stop, or None.

        It may have come when nothing was left to do. Whoever has more to do after this run stops then.
        """
        return self._stop.signal

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
    """Run a plan, or resume it: yields `Begin`; `Step`, `Growth`, `Ended`, `Saved` as they happen; `End`.

    **Arguments**

    - `feed`: the data; None reads the data that the plan names.
    - `run`: the folder of the run, locked while it trains. If it has checkpoints, the run goes on from
      the last one, with the same batches, draws and numbers as if it had never stopped. None saves
      nothing.
    - `loss`: the loss to minimise, instead of the plan's.
    - `reference`: the second model that `RhoLoss` compares with.
    - `cache`: a dict through which runs that follow each other share compiled programs.
    - `devices`: the devices of the mesh (all, by default).

    On SIGTERM, SIGINT or SIGHUP a run with a folder finishes its step, saves and ends; on a second one
    it ends at once. Raises `TrainingError` at the first loss or gradient that is not finite, and for a
    growth that breaks its promise; `CheckpointError` if the folder holds another run, is locked by
    another process, or cannot be written to; `DamagedError` if its last checkpoint is not whole;
    `DataError` for missing or damaged data.

    **Example**

        for record in train(plan, run="runs/first", options=Options(save_every=500)):
            print(record)
    """

    options = Options() if options is None else options

    def records(doing: Doing, stop: Stop) -> Iterator[Record]:
        def detail(progress: Progress) -> None:
            doing.detail = str(progress)

        with _runtime_errors(plan), contextlib.ExitStack() as stack:
            # Signals are given back last: a run that is over stays so while its programs and its lock
            # are closed. A run that saves nothing has nothing to finish, and leaves them alone.
            stack.enter_context(stop)
            programs = Programs.of(plan, plan.layout.mesh(devices), loss)
            current = plan
            if run is not None and plan.fork is not None:
                # Imports Orbax, which takes a second
                from growjax.runs.fork import pinned

                current = pinned(plan, Run(run))
            current = settled(current, None if run is None else Run(run))
            ahead = Ahead(
                current,
                programs,
                cache=cache,
                background=options.background,
                seal=run is not None,
                reference=reference,
            )
            stack.enter_context(contextlib.closing(ahead))
            saves = None
            if run is not None:
                # Orbax takes a second to import, and a run that saves nothing does not need it
                from growjax.runs.saves import locked

                saves = stack.enter_context(
                    locked(
                        current,
                        Run(run),
                        reference=ahead.reference,
                        loss=None if loss is None else _name_of(loss),
                        keep_last=options.keep_last,
                        keep_every=options.keep_every,
                        keep=options.save_at,
                        fall_back=options.fall_back,
                    )
                )
            with doing("reading the text, and tokenising it if it is new"):
                folder = Path(run or "runs/_").parent / "cache"
                data = feed or CorpusFeed.of(current, folder, detail)
            if current.ends and isinstance(data, CorpusFeed):
                data = dataclasses.replace(data, plan=current)
            yield from _run(Session(ahead, data, saves, options, doing, stop))

    return Training(records, Stop(enabled=run is not None))


def _name_of(loss: Loss) -> str:
    """The name by which a resumed run knows a loss again: that of a function, or of an object's type."""
    known = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{known.__module__}:{known.__qualname__}"


def _run(session: Session) -> Iterator[Record]:
    """A session from its beginning to its end, or until it is asked to stop."""
    begin = session.begin()
    plan, saves, stop = session.plan, session.saves, session.stop
    # Before the first record, a run that is ended by a signal loses nothing
    stop.catch()
    try:
        # A tracker that starts takes seconds, and no step is running yet
        with session.stopwatch.apart("birth"):
            yield begin
        born = not session.resumed
        if session.forked:
            # From here on the run needs nothing of the one that it was forked from
            yield from session.save()
        if born and plan.start is not None and plan.stages[0].grow is None:
            # The trained model, as the run's first checkpoint. A stage that grows saves after it.
            yield from session.save()
        # A trigger may change the plan on the way
        for index in range(session.span.index, len(plan.stages)):
            span = session.plan.spans[index]
            entered = index == session.span.index
            # The first stage of a new run may grow as well
            if not entered or (born and span.index == 0 and span.stage.grow is not None):
                yield from session.enter(span)
            first = session.step - span.start
            with session.feed.stream(span, first) as stream:
                for i in range(first, span.steps):
                    if session.over(i):
                        yield from session.end_stage(i)
                        break
                    if stop.before(span.start + i):
                        raise Stopped
                    if saves is not None:
                        saves.check()
                    yield from session.train(i, stream)
            yield from session.flush()
            yield from session.ended()
            yield from session.save()
        end = session.end(finished=True)
    except Stopped:
        yield from session.stopped()
        return
    yield end


@contextlib.contextmanager
def _runtime_errors(plan: Plan) -> Iterator[None]:
    """Make an error of the JAX runtime a `TrainingError` that names the run and the process."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise TrainingError(
            f"plan {plan.name!r}: process {jax.process_index()} of {jax.process_count()} cannot go "
            f"on: {str(error).splitlines()[0][:300]}. If another host is lost or out of memory, "
            "start all of them again with the same command"
        ) from error
