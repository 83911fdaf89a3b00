"""The journal of a run: a line of JSON for every record, only ever added to.

A resumed run goes over the steps after its checkpoint again; whoever reads a journal with `read_journal`
sees each step once.
"""

import collections
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from growjax.errors import DataError, TrainingError
from growjax.plan.plan import Plan
from growjax.runs.records import Begin, End, Record, Step


NAME = "metrics.jsonl"
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


class Rates:
    """How fast a run trains, over the last seconds of training: one step's lap says little.

    **Arguments**

    - `plan`: whose steps they are.
    - `window`: seconds of training that a rate is taken over; longer if one step takes longer.

    A step's lap is the time until its numbers came, which is later for one and sooner for the next; their
    sum over some seconds is right.
    """

    def __init__(self, plan: Plan, window: float = 10.0):
        self.plan, self.window = plan, window
        # Seconds, tokens and FLOPs of each step in the window, and their sums
        self._laps: collections.deque[tuple[float, int, int]] = collections.deque()
        self._seconds, self._tokens, self._flops = 0.0, 0, 0

    def add(self, step: Step) -> None:
        """Count a step."""
        span = self.plan.spans[step.stage]
        self._count((step.took, span.step_tokens, span.flops[step.step - span.start]), 1)
        while len(self._laps) > 1 and self._seconds - self._laps[0][0] >= self.window:
            self._count(self._laps[0], -1)

    def _count(self, lap: tuple[float, int, int], sign: int) -> None:
        """Add the newest lap, or take the oldest one out."""
        self._seconds += sign * lap[0]
        self._tokens += sign * lap[1]
        self._flops += sign * lap[2]
        if sign > 0:
            self._laps.append(lap)
        else:
            self._laps.popleft()

    def of(self, devices: int) -> dict[str, float]:
        """Tokens and FLOPs a second and, where a device's peak is known, MFU; empty if no time passed."""
        # Sums of seconds are rounded: what is left of an empty window is no time
        if self._seconds <= 1e-9:
            return {}
        flops = self._flops / self._seconds
        rates = {
            "tokens_per_second": self._tokens / self._seconds,
            "flops_per_second": flops,
        }
        peak = peak_flops(jax.devices()[0].device_kind)
        return rates if peak is None else rates | {"mfu": flops / (peak * devices)}


def as_row(record: Record, rates: dict[str, float]) -> dict[str, Any]:
    """A record as a plain dict with its `kind`; steps get their rates, the end only its loss."""
    row = {"kind": type(record).__name__.lower()}
    if isinstance(record, End):
        fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        del fields["model"]
        held_out = record.held_out
        if held_out is not None:
            fields["held_out"] = {"loss": held_out.loss, "windows": held_out.windows}
        return row | fields
    row |= dataclasses.asdict(record)
    return row | rates if isinstance(record, Step) else row


class Journal:
    """The journal of one run, open for more; use it in a `with`.

    A last line that a kill cut off is removed first, since what it said is done again. Raises
    `TrainingError` if it cannot be written.

    With `begin`, the first record of a run that was forked, a new journal begins with that run's rows
    before the fork, each with a field `inherited` that names it.
    """

    def __init__(self, run: Path, begin: Begin | None = None):
        self.path = run / NAME
        self.begin = begin

    def __enter__(self) -> "Journal":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            mend(self.path)
            if self.begin is not None and self.begin.forked and not self.path.exists():
                inherit(self.path, self.begin.forked, self.begin)
            self._file = open(self.path, "a", encoding="utf-8")
        except OSError as error:
            raise self._fault(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: dict[str, Any]) -> None:
        """Write one row."""
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            # Else closing it would try once more, and hide what happened
            with contextlib.suppress(OSError):
                self._file.close()
            raise self._fault(error) from error

    def _fault(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"{self.path}: could not be written: {error.strerror}. Its checkpoints are whole; make "
            "room, and the same command goes on from the last one"
        )


def mend(path: Path) -> None:
    """Remove what stands behind the last whole line of a journal; nothing to do if it ends with one."""
    if not path.is_file():
        return
    with open(path, "r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        # From the end backwards, block by block, to the last line break
        while end > 0:
            start = max(end - 65536, 0)
            file.seek(start)
            position = file.read(end - start).rfind(b"\n")
            if position >= 0:
                end = start + position + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def inherit(path: Path, trunk: str, begin: Begin) -> None:
    """Begin a journal with the rows of the run that it was forked from; the file is whole or not there.

    A run without a journal (nobody watched it) has nothing to hand on.
    """
    if not (Path(trunk) / NAME).exists():
        return
    rows = [
        row | {"inherited": trunk}
        for row in read_journal(trunk)
        if row["kind"] in ("begin", "step", "growth") and _before(row, begin.step, begin.stage)
    ]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a journal as they were written; a last one that was cut off is left out.

    Raises `DataError` for a file that cannot be read, or with anything else in it.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"{path}: no journal of a run: {error.strerror}") from error
    for n, line in enumerate(lines):
        try:
            row = json.loads(line)
            row["kind"]
        except (ValueError, KeyError, TypeError) as error:
            if n == len(lines) - 1:
                return
            raise DataError(
                f"{path}:{n + 1}: expected a record in JSON, got {line[:60]!r}; remove that line"
            ) from error
        yield row


def read_journal(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a run, each step once: those that a later session went over again are left out.

    A last line that was cut off by a kill is left out as well. Raises `DataError` for a folder without
    a journal, or one with anything else in it.
    """
    rows: list[dict[str, Any]] = []
    for row in lines_of(Path(run) / NAME):
        if row["kind"] == "begin":
            # Everything from there on is gone over again; a growth at that step belongs to its stage
            step, stage = row["step"], row["stage"]
            rows = [r for r in rows if r["kind"] == "end" or _before(r, step, stage)]
        rows.append(row)
    return rows


def _before(row: dict[str, Any], step: int, stage: int) -> bool:
    if row["kind"] == "growth":
        return row["stage"] <= stage
    return row["step"] < step or row["kind"] in ("begin", "saved")
