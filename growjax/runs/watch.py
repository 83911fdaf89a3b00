"""The recipients of a run's records: the terminal, the journal, and trackers on request."""

import contextlib
import hashlib
import importlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from rich.console import Console

from growjax.errors import GrowjaxError, TrainingError
from growjax.plan.plan import Plan
from growjax.runs.journal import Journal, Rates, as_row, read_journal
from growjax.runs.progress import Progress
from growjax.runs.records import Begin, End, Ended, Record, Step
from growjax.values import to_dict


_FLUSH = 30.0  # seconds of numbers that TensorBoard may not show yet


class Tracker(Protocol):
    """A service that stores numbers by name, such as TensorBoard.

    - `has`: the number of steps of earlier sessions that it surely has. What a session that was killed
      had not written yet is sent again, from the journal.
    """

    has: int

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Store the numbers of one step."""
        ...

    def close(self) -> None:
        """Write the numbers that are still buffered, and end."""
        ...


class TensorBoard:
    """Numbers as TensorBoard event files; needs `tensorboardX`.

    They are written in this thread: that of its `SummaryWriter` ends when the disk is full, and whoever
    writes then waits for it for ever.
    """

    def __init__(self, run: Path, plan: Plan):
        del plan
        self.folder = run / "tensorboard"
        self.files = _library("tensorboardX.event_file_writer")
        self.summary = _library("tensorboardX.summary")
        self.messages = _library("tensorboardX.proto.event_pb2")
        self.writer: Any = None
        self.steps = 0  # the last one written, and one
        self.flushed = time.monotonic()
        # Written when a session closes its file, after which nothing of it can be lost. The journal does
        # not tell: sessions that had no tracker, or another one, are in it as well.
        self.closed = self.folder / "steps"
        self.has = _number_in(self.closed)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self.writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Files of one second would have one name
            self.writer = self.files.EventsWriter(str(self.folder / "events"), f".{time.time_ns()}")
            # From here on, this session repeats what an earlier one may have written
            log = self.messages.SessionLog
            self._add(step, session_log=log(status=log.START))
        self.steps = step + 1
        for name, value in numbers.items():
            self._add(step, summary=self.summary.scalar(name, value))
        if time.monotonic() - self.flushed > _FLUSH:
            self.writer.flush()
            self.flushed = time.monotonic()

    def _add(self, step: int, **content: Any) -> None:
        self.writer.write_event(self.messages.Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.closed.write_text(f"{self.steps}\n")


def _number_in(file: Path) -> int:
    """The number that a file holds; 0 without the file, and for one that was cut off."""
    text = file.read_text(errors="replace").strip() if file.is_file() else ""
    return int(text) if text.isdecimal() else 0


# What an id of W&B may not have
_NOT_IN_IDS = re.compile(r"[:;,#?/'\\%]")


class WandB:
    """Numbers to Weights & Biases, under the name of the plan; needs `wandb`."""

    def __init__(self, run: Path, plan: Plan):
        # Runs of one name in two folders are two runs there as well
        place = hashlib.sha256(str(run.absolute()).encode(errors="surrogateescape")).hexdigest()[:8]
        options = {"name": plan.name, "dir": str(run), "config": to_dict(plan)}
        options["id"] = f"{_NOT_IN_IDS.sub('-', run.name)}-{place}"
        self.run = _library("wandb").init(project="growjax", resume="allow", **options)
        # What its server has of the run; nothing without a connection, where each session has all
        self.has = self.run.step

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        # It takes no step twice. A session repeats those after its checkpoint, with the same numbers.
        if step >= self.has:
            self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}


def watch(
    records: Iterable[Record],
    plan: Plan,
    *,
    run: str | Path | None = None,
    console: Console | None = None,
    trackers: Sequence[str] = (),
) -> Iterator[Record]:
    """Yield the records of `train`, and show them, write them to the journal and send them to trackers.

    **Arguments**

    - `run`: the folder of the journal, `metrics.jsonl`; None for no journal.
    - `console`: where the progress is shown: bars on a terminal, lines elsewhere; None for no display.
    - `trackers`: names of trackers, "tensorboard" or "wandb".

    **Example**

        for record in watch(train(plan, run=run), plan, run=run, console=Console()):
            ...
    """
    first = jax.process_index() == 0
    unknown = [name for name in trackers if name not in TRACKERS]
    if unknown or (trackers and run is None):
        raise TrainingError(
            f"trackers: expected some of {', '.join(TRACKERS)} and a run folder, got {trackers}"
        )
    if console is not None and first:
        # Rich redraws in a thread, which may run into a module that the main thread is importing. So the
        # large imports of a run (Orbax, Grain) come before the display starts.
        for name in ("growjax.data.pipeline", *(["growjax.runs.saves"] if run is not None else [])):
            importlib.import_module(name)
    with contextlib.ExitStack() as stack:
        progress = None
        if console is not None and first:
            progress = stack.enter_context(Progress(plan, console, run, _doing(records)))
        journal: Journal | None = None
        opened: list[_Reported] = []
        devices, rates = 1, Rates(plan)
        for record in records:
            if run is not None and first and journal is None:
                # Opened with the first record: only then is the folder locked, and known to be this run's
                begin = record if isinstance(record, Begin) else None
                journal = stack.enter_context(Journal(Path(run), begin))
                begins = record.step if isinstance(record, Begin) else 0
                for name in trackers:
                    opened.append(stack.enter_context(_opened(name, Path(run), plan, begins)))
            if isinstance(record, Begin):
                devices = record.devices
                for stage, steps in record.ended:
                    plan = plan.ended(stage, steps)
                    _follow(plan, rates, progress)
            if isinstance(record, Ended):
                plan = plan.ended(record.stage, record.steps)
                _follow(plan, rates, progress)
            if isinstance(record, Step):
                rates.add(record)
            row = as_row(record, rates.of(devices))
            if isinstance(record, End):
                # Before the journal says that this session came to its end
                for tracker in opened:
                    tracker.close()
                opened.clear()
            if journal is not None:
                journal.add(row)
            if isinstance(record, Step):
                for tracker in opened:
                    tracker.write(record.step, _numbers(row))
            if progress is not None:
                progress.show(record, row)
            yield record


@contextlib.contextmanager
def _opened(name: str, run: Path, plan: Plan, begins: int) -> Iterator["_Reported"]:
    """A tracker, for a session that begins before the step `begins`, with all that was before."""
    tracker = _Reported(name, run, plan)
    try:
        tracker.catch_up(run, begins)
        yield tracker
    except BaseException:
        # The error that ends the run is the one to tell
        with contextlib.suppress(TrainingError):
            tracker.close()
        raise
    tracker.close()


class _Reported:
    """A tracker whose errors are `TrainingError`s that name it."""

    def __init__(self, name: str, run: Path, plan: Plan):
        self.name, self.closed = name, False
        with self._named():
            self.tracker: Tracker = TRACKERS[name](run, plan)

    def catch_up(self, run: Path, begins: int) -> None:
        """Send what the journal has of the steps before `begins` and the tracker may lack."""
        if self.tracker.has >= begins:
            return
        for row in read_journal(run):
            if row["kind"] == "step" and self.tracker.has <= row["step"] < begins:
                self.write(row["step"], _numbers(row))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        with self._named():
            self.tracker.write(step, numbers)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            with self._named():
                self.tracker.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except GrowjaxError:
            raise
        except Exception as error:
            # Of a full disk, or what a service raises that cannot be reached
            raise TrainingError(
                f"tracker {self.name}: {error or type(error).__name__}. The checkpoints are whole; the "
                "same command goes on from the last one, with this tracker or without"
            ) from error


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step, from its row in the journal."""
    numbers: dict[str, float] = {k: v for k, v in row.items() if isinstance(v, int | float)}
    return numbers | {f"scores/{k}": v for k, v in (row.get("scores") or {}).items()}


def _follow(plan: Plan, rates: Rates, progress: Progress | None) -> None:
    """Show a plan of which a trigger has ended a stage."""
    rates.plan = plan
    if progress is not None:
        progress.follow(plan)


def _doing(records: Any) -> Any:
    """The current activity (`Doing`) of the run that yields these records; None if it has none."""
    return getattr(records, "doing", None)


def _library(name: str) -> Any:
    """Import the library of a tracker; raises `TrainingError` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise TrainingError(f"{package} is not installed: pip install {package}") from error
