"""The recipients of a run's records: the terminal, the journal, and trackers on request."""

import contextlib
import hashlib
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from rich.console import Console

from growjax.errors import TrainingError
from growjax.plan.plan import Plan
from growjax.runs.journal import Journal, Rates, as_row
from growjax.runs.progress import Progress
from growjax.runs.records import Begin, Ended, Record, Step
from growjax.values import to_dict


class Tracker(Protocol):
    """A service that stores numbers by name, such as TensorBoard."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Store the numbers of one step."""
        ...

    def close(self) -> None:
        """Write the numbers that are still buffered, and end."""
        ...


class TensorBoard:
    """Numbers as TensorBoard event files; needs `tensorboardX`."""

    def __init__(self, run: Path, plan: Plan):
        del plan
        self.folder, self.library = str(run / "tensorboard"), _library("tensorboardX")
        self.writer: Any = None

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self.writer is None:
            # From here on, this session repeats what an earlier one may have written
            self.writer = self.library.SummaryWriter(self.folder, purge_step=step)
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WandB:
    """Numbers to Weights & Biases, under the name of the plan; needs `wandb`."""

    def __init__(self, run: Path, plan: Plan):
        # Runs of one name in two folders are two runs there as well
        place = hashlib.sha256(str(run.absolute()).encode(errors="surrogateescape")).hexdigest()[:8]
        options = {"name": plan.name, "dir": str(run), "config": to_dict(plan)}
        options["id"] = f"{run.name}-{place}"
        self.run = _library("wandb").init(project="growjax", resume="allow", **options)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
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
        opened: list[Tracker] = []
        devices, rates = 1, Rates(plan)
        for record in records:
            if run is not None and first and journal is None:
                # Opened with the first record: only then is the folder locked, and known to be this run's
                begin = record if isinstance(record, Begin) else None
                journal = stack.enter_context(Journal(Path(run), begin))
                for name in trackers:
                    opened.append(TRACKERS[name](Path(run), plan))
                    stack.callback(opened[-1].close)
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
            if journal is not None:
                journal.add(row)
            if isinstance(record, Step):
                numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
                numbers |= {f"scores/{k}": v for k, v in (record.scores or {}).items()}
                for tracker in opened:
                    tracker.write(record.step, numbers)
            if progress is not None:
                progress.show(record, row)
            yield record


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
        raise TrainingError(f"{name} is not installed: pip install {name}") from error
