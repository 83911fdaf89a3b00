"""The folder of one run, for everybody who reads it or writes to it.

    RUN/plan.json         the plan
    RUN/checkpoints/      `STEP-STAGE` each, and nothing else
    RUN/metrics.jsonl     the journal: a line of JSON for every record, only ever added to
    RUN/held_out.npz      the held-out losses of the trained model, window by window
    RUN/lock              who trains in it

Nothing here imports Orbax, which takes a second: what reads and writes arrays is in `checkpoint`.
"""

import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from growjax.errors import CheckpointError
from growjax.plan.files import load_plan
from growjax.plan.plan import Plan
from growjax.runs import journal
from growjax.runs.lock import Lock
from growjax.runs.records import HeldOut


_NAME = re.compile(r"(\d{8})-(\d{2})")
# Every checkpoint that Orbax finished has this file at its top
METADATA = "_CHECKPOINT_METADATA"


class Session(NamedTuple):
    """One process's part of a run: where it began, what it went on from, and how it ended.

    `resumed` is a checkpoint's path, or None at the birth; `finished` is None for a session that was
    killed, and False for one that was asked to stop.
    """

    step: int
    stage: int
    resumed: str | None
    finished: bool | None


class Run:
    """The folder of a run.

    **Arguments**

    - `folder`: it need not exist yet.

    **Example**

        Run("runs/first").last()      # runs/first/checkpoints/00000400-01
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.checkpoints_folder = self.folder / "checkpoints"
        self.plan_file = self.folder / "plan.json"
        self.journal_file = self.folder / journal.NAME
        self.held_out_file = self.folder / "held_out.npz"

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    def plan(self) -> Plan:
        """The plan; raises `PlanError` if there is none, or one that cannot be read."""
        return load_plan(self.plan_file)

    def lock(self) -> Lock:
        """The lock that whoever trains here holds."""
        return Lock(self.folder / "lock")

    # Checkpoints ------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """The checkpoints that were written to their end, oldest first."""
        return checkpoints_in(self.checkpoints_folder)

    def last(self) -> Path | None:
        """The newest checkpoint, or None."""
        whole = self.checkpoints()
        return whole[-1] if whole else None

    def checkpoint(self) -> Path:
        """The newest checkpoint; raises `CheckpointError` if there is none."""
        last = self.last()
        if last is None:
            raise CheckpointError(f"{self.folder}: a run without a whole checkpoint")
        return last

    # The journal ------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """The records of the run, each step once; raises `DataError`, see `read_journal`."""
        return journal.read_journal(self.folder)

    def sessions(self) -> list[Session]:
        """The sessions of the run in their order; raises `DataError`, see `read_journal`."""
        found: list[Session] = []
        for row in journal.lines_of(self.journal_file):
            if "inherited" in row:
                continue  # of the run that this one was forked from
            if row["kind"] == "begin":
                found.append(Session(row["step"], row["stage"], row.get("resumed"), None))
            elif row["kind"] == "end" and found:
                found[-1] = found[-1]._replace(finished=bool(row["finished"]))
        return found

    @property
    def finished(self) -> bool:
        """Whether the last session reached the end of the plan, by the journal."""
        sessions = self.sessions() if self.journal_file.exists() else []
        return bool(sessions) and sessions[-1].finished is True

    # The held-out losses of the end --------------------------------------------------------------

    def save_held_out(self, held_out: HeldOut, about: dict[str, Any]) -> None:
        """Write the losses of the windows, all at once; `about` says what they are of.

        Raises `CheckpointError` if the folder cannot be written to.
        """
        partial = self.held_out_file.with_name("held_out.npz.partial")
        try:
            with open(partial, "wb") as file:
                np.savez_compressed(
                    file, sums=held_out.sums, weights=held_out.weights, about=json.dumps(about)
                )
            os.replace(partial, self.held_out_file)
        except OSError as error:
            raise CheckpointError(
                f"{self.held_out_file}: could not be written: {error.strerror}"
            ) from error

    def held_out(self) -> tuple[HeldOut, dict[str, Any]] | None:
        """The losses of the windows and what they are of; None if the run has not ended.

        Raises `CheckpointError` if the file is damaged.

        **Example**

            found, about = Run("runs/first").held_out()
            (found.sums / found.weights).std(), about["step"]
        """
        if not self.held_out_file.exists():
            return None
        try:
            with np.load(self.held_out_file, allow_pickle=False) as file:
                sums, weights = file["sums"], file["weights"]
                about = json.loads(str(file["about"]))
            if sums.ndim != 1 or sums.shape != weights.shape or not isinstance(about, dict):
                raise ValueError(f"shapes {sums.shape} and {weights.shape}")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{self.held_out_file} is damaged ({error}); remove it, and `growjax train` with the "
                "same arguments measures the finished model again"
            ) from error
        return HeldOut(sums, weights), about


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder of them, oldest first: names sort by step, then by stage."""
    try:
        return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def step_of(checkpoint: Path) -> tuple[int, int]:
    """The step that a checkpoint stands before, and its stage, by its name."""
    step, stage = checkpoint.name.split("-")
    return int(step), int(stage)


def checkpoint_in(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that a path means: itself, or the newest one of a run.

    Raises `CheckpointError` if it is neither.

    **Example**

        checkpoint_in("runs/first")                             # .../checkpoints/00000400-01
        checkpoint_in("runs/first/checkpoints/00000200-00")     # itself
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        return Run(path).checkpoint()
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: expected the folder of a run or of a checkpoint, and there is no such folder"
        )
    if not (path / METADATA).exists() and (path / "plan.json").exists():
        raise CheckpointError(f"{path}: a run without a whole checkpoint")
    return path


def refuse_pattern(path: Path) -> None:
    """Raise `CheckpointError` for a path that no checkpoint may have.

    Orbax looks for the files that it puts together by a pattern of the whole path, finds none if there
    are brackets in it, and leaves a checkpoint without its arrays behind, without an error.
    """
    if any(sign in str(path.absolute()) for sign in "[]*?"):
        raise CheckpointError(
            f"{path.absolute()}: expected a path without [, ], * and ?: Orbax reads these as a pattern, "
            "and would write checkpoints that cannot be read; choose another folder"
        )


def refuse_folder(folder: Path) -> None:
    """Raise `CheckpointError` for a folder that no run may have.

    That is a checkpoint, a place within one, and a path in which checkpoints cannot be written.
    """
    refuse_pattern(folder)
    for place in _with_parents(folder):
        inside = "" if place == folder.absolute() else f" is inside {place}, which"
        if (place / METADATA).exists():
            raise CheckpointError(
                f"{folder}:{inside} is a checkpoint, and nothing trains in it; choose another folder for "
                f"the run. To train on from it, give the plan start=Start({str(place)!r})"
            )
    if checkpoints_in(folder):
        raise CheckpointError(
            f"{folder} holds checkpoints themselves; the run's folder is the one above, {folder.parent}"
        )


def _with_parents(folder: Path) -> Iterator[Path]:
    folder = folder.absolute()
    yield folder
    yield from folder.parents
