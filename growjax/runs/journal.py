"""What a run shows and keeps: a line of progress, a journal in JSON lines, and trackers if asked for.

The journal is only ever added to. A resumed run goes over the steps after its checkpoint again; whoever
reads a journal with `read_journal` sees each step once.
"""

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from growjax.errors import DataError, TrainingError
from growjax.plan.files import to_dict
from growjax.plan.plan import Plan
from growjax.runs.records import Begin, End, Growth, Record, Step


# Dense bfloat16 FLOPs a second of one device, by the beginning of the name that JAX gives it: makers'
# data sheets. The longest match counts.
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(kind: str) -> float | None:
    """The bfloat16 FLOPs a second of a device of this kind; None for one that is not in the table."""
    known = [name for name in PEAK if kind.startswith(name)]
    return PEAK[max(known, key=len)] if known else None


class Tracker(Protocol):
    """Something that takes numbers by name."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
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

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Numbers to Weights & Biases, under the name of the plan; needs `wandb`."""

    def __init__(self, run: Path, plan: Plan):
        options = {"name": plan.name, "dir": str(run), "config": to_dict(plan), "id": run.name}
        self.run = _library("wandb").init(project="growjax", resume="allow", **options)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

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
    - `console`: where the progress is drawn; None draws none.
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
    with contextlib.ExitStack() as stack:
        sinks = [TRACKERS[n](Path(run), plan) for n in trackers if run is not None and first]
        for sink in sinks:
            stack.callback(sink.close)
        journal = None
        if run is not None and first:
            Path(run).mkdir(parents=True, exist_ok=True)
            journal = stack.enter_context(open(Path(run) / "metrics.jsonl", "a", encoding="utf-8"))
        bars = stack.enter_context(_Bars(plan, console)) if console is not None and first else None
        devices = 1
        for record in records:
            if isinstance(record, Begin):
                devices = record.devices
            row = as_row(record, plan, devices)
            if journal is not None:
                _write(journal, row)
            if isinstance(record, Step):
                numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
                numbers |= {f"scores/{k}": v for k, v in (record.scores or {}).items()}
                for sink in sinks:
                    sink.write(record.step, numbers)
            if bars is not None:
                bars.show(record, row)
            yield record


def _write(journal: IO[str], row: dict[str, Any]) -> None:
    try:
        journal.write(json.dumps(row) + "\n")
        journal.flush()
    except OSError as error:
        # Else closing it would try once more, and hide what happened
        with contextlib.suppress(OSError):
            journal.close()
        raise TrainingError(
            f"{journal.name}: could not be written: {error.strerror}. Its checkpoints are whole; make "
            "room, and the same command goes on from the last one"
        ) from error


def as_row(record: Record, plan: Plan, devices: int) -> dict[str, Any]:
    """A record as a plain dict with its `kind`; steps get tokens/s, FLOPs/s and, if known, MFU."""
    if isinstance(record, End):
        fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        return {"kind": "end"} | {k: v for k, v in fields.items() if k != "model"}
    row = {"kind": type(record).__name__.lower(), **dataclasses.asdict(record)}
    if isinstance(record, Step) and record.took > 0:
        span = plan.spans[record.stage]
        speed = span.flops[record.step - span.start] / record.took
        row |= {"tokens_per_second": span.step_tokens / record.took, "flops_per_second": speed}
        peak = peak_flops(jax.devices()[0].device_kind)
        if peak is not None:
            row["mfu"] = speed / (peak * devices)
    return row


def read_journal(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a run, each step once: those that a later session went over again are left out.

    A last line that was cut off by a kill is left out as well. Raises `DataError` for a folder without
    a journal, or one with anything else in it.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: no journal of a run: {error.strerror}") from error
    rows: list[dict[str, Any]] = []
    for n, line in enumerate(lines):
        try:
            row = json.loads(line)
            kind = row["kind"]
        except (ValueError, KeyError, TypeError) as error:
            if n == len(lines) - 1:
                break
            raise DataError(
                f"{path}:{n + 1}: expected a record in JSON, got {line[:60]!r}"
            ) from error
        if kind == "begin":
            # Everything from there on is gone over again; a growth at that step belongs to its stage.
            here = row["step"], row["stage"]
            rows = [r for r in rows if "step" not in r or _before(r, *here)]
        rows.append(row)
    return rows


def _before(row: dict[str, Any], step: int, stage: int) -> bool:
    if row["kind"] == "growth":
        return row["stage"] <= stage
    return row["step"] < step or row["kind"] in ("begin", "saved")


class _Bars:
    """One bar a stage, and a line for what is not a step."""

    def __init__(self, plan: Plan, console: Console):
        self.plan, self.console = plan, console
        self.progress = Progress(
            TextColumn("{task.description:14.14}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}  {task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=60,
        )
        self.held_out = ""

    def __enter__(self) -> "_Bars":
        self.progress.start()
        self.tasks = [
            self.progress.add_task(
                s.stage.name or f"stage {s.index}", total=s.steps, start=False, text=""
            )
            for s in self.plan.spans
        ]
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, record: Record, row: dict[str, Any]) -> None:
        """Move a bar, or print a line."""
        if isinstance(record, Step):
            if record.held_out is not None:
                self.held_out = f"  held-out {record.held_out:.4f}"
            speed = (
                f"  {row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else ""
            )
            mfu = f"  MFU {row['mfu']:.0%}" if "mfu" in row else ""
            span, task = self.plan.spans[record.stage], self.tasks[record.stage]
            self.progress.start_task(task)
            text = f"loss {record.loss:.4f}{self.held_out}{speed}{mfu}"
            self.progress.update(task, completed=record.step - span.start + 1, text=text)
        elif isinstance(record, Begin) and record.resumed:
            for span in self.plan.spans[: record.stage]:
                self.progress.update(self.tasks[span.index], completed=span.steps)
            here = record.step - self.plan.spans[record.stage].start
            self.progress.update(self.tasks[record.stage], completed=here)
            self.progress.print(f"going on from {record.resumed}, before step {record.step}")
        elif isinstance(record, Growth):
            grew = ", ".join(f"{axis} {a} to {b}" for axis, (a, b) in record.grew.items())
            c = record.crossing
            self.progress.print(
                f"before step {record.step}: {grew} by {c.operator} ({c.exactness}); loss {c.before:.5f} "
                f"to {c.after:.5f}; stood still for {record.stall:.2f} s, {record.compile_wait:.2f} of "
                "them compiling"
            )
        elif isinstance(record, End) and not record.finished:
            self.progress.print("asked to stop: saved, and the same command goes on from here")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrainingError(f"{name} is not installed: pip install {name}") from error
