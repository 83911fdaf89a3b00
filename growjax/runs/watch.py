"""Who is told of a run while it runs: the terminal, the journal, and trackers if asked for."""

import contextlib
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
from growjax.runs.records import Begin, Record, Step
from growjax.values import to_dict


class Tracker(Protocol):
    """Something that takes numbers by name."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of one step."""
        ...

    def close(self) -> None:
        """Write what is not written yet."""
        ...


class TensorBoard:
    """Numbers as TensorBoard event files; needs `tensorboardX`."""

    def __init__(self, run: Path, plan: Plan):
        del plan
        self.writer = _library("tensorboardX").SummaryWriter(str(run / "tensorboard"))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Numbers to Weights & Biases, under the name of the plan; needs `wandb`."""

    def __init__(self, run: Path, plan: Plan):
        options = {"name": plan.name, "dir": str(run), "config": to_dict(plan), "id": run.name}
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
    """Pass on the records of `train`, and on the way show them, keep them and send them to trackers.

    **Arguments**

    - `run`: the folder of the journal, `metrics.jsonl`; None keeps none.
    - `console`: where the progress is drawn (or printed, if it is no terminal); None shows none.
    - `trackers`: of "tensorboard" and "wandb".

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
        # Rich redraws in a thread, and may then meet a module that is half imported: large imports that
        # a run makes when it begins (Orbax, Grain) come before the display starts
        for name in ("growjax.data.pipeline", *(["growjax.runs.saves"] if run is not None else [])):
            importlib.import_module(name)
    with contextlib.ExitStack() as stack:
        progress = None
        if console is not None and first:
            progress = stack.enter_context(Progress(plan, console, run, _doing(records)))
        journal: Journal | None = None
        sinks: list[Tracker] = []
        devices, rates = 1, Rates(plan)
        opened = run is None or not first
        for record in records:
            if not opened:
                # Only now is the folder known to be this run's, and locked
                opened = True
                begin = record if isinstance(record, Begin) else None
                journal = stack.enter_context(Journal(Path(run or ""), begin))
                for name in trackers:
                    sinks.append(TRACKERS[name](Path(run or ""), plan))
                    stack.callback(sinks[-1].close)
            if isinstance(record, Begin):
                devices = record.devices
            if isinstance(record, Step):
                rates.add(record)
            row = as_row(record, rates.of(devices))
            if journal is not None:
                journal.add(row)
            if isinstance(record, Step):
                numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
                numbers |= {f"scores/{k}": v for k, v in (record.scores or {}).items()}
                for sink in sinks:
                    sink.write(record.step, numbers)
            if progress is not None:
                progress.show(record, row)
            yield record


def _doing(records: Any) -> Any:
    """What says what a run does between its records, if it says so."""
    return getattr(records, "doing", None)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrainingError(f"{name} is not installed: pip install {name}") from error
