"""The journal of a run: a line of JSON for every record, appended to a file.

A resumed run repeats the steps after its checkpoint, so the file may hold a step twice; `read_journal`
returns each step once. The last field of each line, "crc", is a checksum of the rest.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax

from growjax.errors import DataError, TrainingError
from growjax.plan.plan import Plan
from growjax.runs.records import Begin, End, Record, Step


NAME = "metrics.jsonl"
# Dense bfloat16 FLOPs a second of one device, from the makers' data sheets, by the beginning of JAX's
# name of the device. The longest name that matches counts.
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
    matches = [name for name in PEAK if kind.startswith(name)]
    return PEAK[max(matches, key=len)] if matches else None


class Rates:
    """The speed of training over the last seconds, in tokens and FLOPs a second.

    **Arguments**

    - `plan`: the plan of the steps.
    - `window`: seconds of training that the speed is averaged over; longer if one step takes longer.

    The time of a single step is not reliable: it is measured when the host reads the step's numbers,
    which may be late for one step and early for the next. The sum over some seconds is right.
    """

    def __init__(self, plan: Plan, window: float = 10.0):
        self.plan, self.window = plan, window
        # (seconds, tokens, FLOPs) of each step in the window, and their sums
        self._laps: collections.deque[tuple[float, int, int]] = collections.deque()
        self._seconds, self._tokens, self._flops = 0.0, 0, 0

    def add(self, step: Step) -> None:
        """Add a step to the window, and drop those that are too old."""
        span = self.plan.spans[step.stage]
        self._count((step.took, span.step_tokens, span.flops[step.step - span.start]), 1)
        while len(self._laps) > 1 and self._seconds - self._laps[0][0] >= self.window:
            self._count(self._laps[0], -1)

    def _count(self, lap: tuple[float, int, int], sign: int) -> None:
        """Append a lap (sign 1), or remove the oldest one (sign -1)."""
        self._seconds += sign * lap[0]
        self._tokens += sign * lap[1]
        self._flops += sign * lap[2]
        if sign > 0:
            self._laps.append(lap)
        else:
            self._laps.popleft()

    def of(self, devices: int) -> dict[str, float]:
        """Tokens and FLOPs a second and, where a device's peak is known, MFU; empty if no time passed."""
        # The running sum of an empty window may differ from 0 by rounding
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
    """A record as a row of the journal: a dict with its `kind`.

    A step's row includes the rates; the end's has no model, and of the held-out losses only the mean.
    """
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
    """The journal of one run, opened for appending; use it in a `with`.

    A last line that was cut off by a kill is removed first, since its step is repeated. Raises
    `TrainingError` if the file cannot be written.

    `begin` is the first record of the session. If the run was forked, a new journal starts with the rows
    of the other run before the fork, each with a field `inherited` that names that run.
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
        """Append one row."""
        try:
            self._file.write(line_of(row))
            self._file.flush()
        except OSError as error:
            # Closed here, since `__exit__` would try to flush again, and hide this error by its own
            with contextlib.suppress(OSError):
                self._file.close()
            raise self._fault(error) from error

    def _fault(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"{self.path}: could not be written: {error.strerror}. The checkpoints are whole; once the "
            "file can be written, the same command goes on from the last one"
        )


# A line, and its checksum: the CRC-32 of the same line without that field
_CHECKED = re.compile(r'(.*), "crc": "([0-9a-f]{8})"}', re.DOTALL)


def line_of(row: dict[str, Any]) -> str:
    """The line of a row, which has at least one field."""
    text = json.dumps(row)
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'


def mend(path: Path) -> None:
    """Truncate a journal after its last line break, if a kill has cut off its last line.

    Raises `DataError` if that line is whole and its line break is not.
    """
    if not path.is_file():
        return
    with open(path, "r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        # Read backwards in blocks of 64 KiB up to the last line break; without one, `end` becomes 0
        while end > 0:
            start = max(end - 65536, 0)
            file.seek(start)
            position = file.read(end - start).rfind(b"\n")
            if position >= 0:
                end = start + position + 1
                break
            end = start
        if end < size:
            file.seek(end)
            _refuse_whole(file.read().decode(errors="replace"), path)
            file.truncate(end)


def _refuse_whole(tail: str, path: Path) -> None:
    """Raise `DataError` if what stands after the last line break is more than a part of a line."""
    if _CHECKED.match(tail) and not _CHECKED.fullmatch(tail):
        raise DataError(
            f"{path}: expected a line break at the end, got {tail[-8:]!r}; put one in place of what "
            "follows the last }"
        )


def inherit(path: Path, trunk: str, begin: Begin) -> None:
    """Start the journal of a fork with the rows of the run `trunk` before the fork.

    Does nothing if that run has no journal. The file is written in one step.
    """
    if not (Path(trunk) / NAME).exists():
        return
    rows = [
        row | {"inherited": trunk}
        for row in read_journal(trunk)
        if row["kind"] in ("begin", "step", "growth", "ended")
        and _stays(row, begin.step, begin.stage)
    ]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(map(line_of, rows)), encoding="utf-8")
    os.replace(partial, path)


class Row(dict[str, Any]):
    """A record of a journal, or a part of one; a field that it lacks is a `DataError` with the line."""

    def __init__(self, fields: dict[str, Any], where: str):
        super().__init__(fields)
        self.where = where

    def __missing__(self, name: str) -> Any:
        raise DataError(f"{self.where}: expected a record with {name!r}; remove that line")


_KINDS = tuple(kind.__name__.lower() for kind in get_args(Record))


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a journal in the order of the file; a last line that was cut off is left out.

    Raises `DataError` for a file that cannot be read, and for a line that is not a record or was changed
    after it was written; and so does a row for a field that it lacks. Lines of earlier versions have no
    checksum.
    """
    try:
        text = path.read_bytes().decode(errors="replace")
    except OSError as error:
        raise DataError(f"{path}: no journal of a run: {error.strerror}") from error
    *lines, tail = text.split("\n")
    _refuse_whole(tail, path)
    for n, line in enumerate(lines):
        where = f"{path}:{n + 1}"
        checked = _CHECKED.fullmatch(line)
        if checked:
            line = checked[1] + "}"
            if zlib.crc32(line.encode()) != int(checked[2], 16):
                raise DataError(
                    f"{where}: this record was changed after it was written: its checksum is not "
                    f"{checked[2]}; remove that line, or its field 'crc' if the rest is right"
                )
        try:
            row = json.loads(line, object_hook=functools.partial(Row, where=where))
        except ValueError:
            row = None
        if not isinstance(row, Row) or row.get("kind") not in _KINDS:
            raise DataError(
                f"{where}: expected a record in JSON, got {line[:60]!r}; remove that line"
            )
        yield row


def read_journal(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a run, each step once: a step that a later session repeated has the later row only.

    A last line that was cut off by a kill is left out. Raises `DataError` for a folder without a
    journal, or for a line that is not a record or was changed.
    """
    rows: list[dict[str, Any]] = []
    for row in lines_of(Path(run) / NAME):
        if row["kind"] == "begin":
            # A session repeats everything from its first step on
            step, stage = row["step"], row["stage"]
            rows = [r for r in rows if r["kind"] == "end" or _stays(r, step, stage)]
        if row["kind"] in ("ended", "growth"):
            # A session that goes on from the last step of a stage may yield its end again, and a line may
            # have been copied
            kind, stage = row["kind"], row["stage"]
            rows = [r for r in rows if r["kind"] != kind or r["stage"] != stage]
        rows.append(row)
    latest = {row["step"]: row for row in rows if row["kind"] == "step"}
    return [row for row in rows if row["kind"] != "step" or latest[row["step"]] is row]


def _stays(row: dict[str, Any], step: int, stage: int) -> bool:
    """Whether a row is not repeated by a session that begins in `stage`, before `step`."""
    if row["kind"] == "growth":
        # A growth has the step of the checkpoint that it is saved in
        return row["stage"] <= stage
    return row["step"] < step or row["kind"] in ("begin", "saved")
