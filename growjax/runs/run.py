"""The folder of one run.

    RUN/plan.json         the plan
    RUN/checkpoints/      folders named `STEP-STAGE`, and nothing else
    RUN/metrics.jsonl     the journal: a line of JSON for every record, append-only
    RUN/held_out.npz      the held-out losses of the trained model, window by window
    RUN/lock              the process that trains in it

This module does not import Orbax, which takes a second; `checkpoint` does, which reads and writes arrays.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from growjax.errors import CheckpointError, PlanError
from growjax.plan.files import load_plan
from growjax.plan.plan import Plan
from growjax.runs import hosts, journal
from growjax.runs.lock import Lock
from growjax.runs.records import HeldOut


_NAME = re.compile(r"\d{8,}-\d{2,}")  # STEP-STAGE, with zeros in front
# A file that every checkpoint has that Orbax has finished
METADATA = "_CHECKPOINT_METADATA"


class Session(NamedTuple):
    """One session of a run, by its journal.

    - `step`, `stage`: where it began.
    - `resumed`: the path of the checkpoint that it went on from; None at the birth of the model.
    - `finished`: True if it reached the end of the plan, False if it was asked to stop, None if it was
      killed.
    """

    step: int
    stage: int
    resumed: str | None
    finished: bool | None


class Run:
    """The folder of a run.

    **Arguments**

    - `folder`: the folder, which need not exist yet.

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
        """The plan of the run; raises `PlanError` if its file is missing or cannot be read."""
        several = sorted(str(path.parent) for path in self.folder.glob("*/plan.json"))
        if several and not self.plan_file.exists():
            # Of a probe, a sweep or several plans
            raise PlanError(
                f"{self.folder}: expected the folder of one run; in it are {', '.join(several)}"
            )
        return load_plan(self.plan_file)

    def lock(self) -> Lock:
        """The lock of the folder, which the process that trains in it holds."""
        return Lock(self.folder / "lock")

    # Checkpoints ------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """The whole checkpoints, oldest first."""
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
        sessions: list[Session] = []
        for row in journal.lines_of(self.journal_file):
            if "inherited" in row:
                continue  # of the run that this one was forked from
            if row["kind"] == "begin":
                sessions.append(Session(row["step"], row["stage"], row.get("resumed"), None))
            elif row["kind"] == "end" and sessions:
                sessions[-1] = sessions[-1]._replace(finished=bool(row["finished"]))
        return sessions

    @property
    def finished(self) -> bool:
        """Whether the last session in the journal reached the end of the plan."""
        sessions = self.sessions() if self.journal_file.exists() else []
        return bool(sessions) and sessions[-1].finished is True

    # The held-out losses of the end --------------------------------------------------------------

    def save_held_out(self, held_out: HeldOut, about: dict[str, Any]) -> None:
        """Write the losses of the windows; `about` identifies their model and windows, as JSON data.

        Raises `CheckpointError` if the folder cannot be written to.
        """
        # Written under another name and renamed, so that the file is never half written
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
        """The losses of the windows, and `about` as it was saved; None if the run has not ended.

        Raises `CheckpointError` if the file is damaged.

        **Example**

            held_out, about = Run("runs/first").held_out()
            (held_out.sums / held_out.weights).std(), about["step"]
        """
        if not self.held_out_file.exists():
            return None
        try:
            with np.load(self.held_out_file, allow_pickle=False) as file:
                sums, weights = file["sums"], file["weights"]
                about = json.loads(str(file["about"]))
            if sums.ndim != 1 or sums.shape != weights.shape or not isinstance(about, dict):
                raise ValueError(f"shapes {sums.shape} and {weights.shape}")
        except Exception as error:
            # NumPy and the modules for zip files raise many kinds of errors for damaged ones
            raise CheckpointError(
                f"{self.held_out_file} is damaged ({error}); remove it, and `growjax train` with the "
                "same arguments measures the finished model again"
            ) from error
        return HeldOut(sums, weights), about


def checkpoints_in(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first: by step, then by stage."""
    try:
        # By number: as text, stage 100 would stand before stage 99
        return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=step_of)
    except (FileNotFoundError, NotADirectoryError):
        return []


def step_of(checkpoint: Path) -> tuple[int, int]:
    """The step before which a checkpoint was saved, and its stage, from its name."""
    step, stage = checkpoint.name.split("-")
    return int(step), int(stage)


def checkpoint_in(path: str | os.PathLike[str]) -> Path:
    """The checkpoint at a path, which is the folder of a checkpoint or of a run (its newest checkpoint).

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
    if not (path / METADATA).exists():
        if (path / "plan.json").exists():
            raise CheckpointError(f"{path}: a run without a whole checkpoint")
        if (path / "config.json").exists():
            raise CheckpointError(
                f"{path}: a Hugging Face folder and no checkpoint of growjax; growjax grow --from-hf "
                f"{path} grows it, inspect and eval read it, and a plan starts from it (start=Start(...))"
            )
    return path


def refuse_pattern(path: Path) -> None:
    """Raise `CheckpointError` for a path that Orbax would read as a pattern.

    Orbax lists the files of a checkpoint by a pattern that includes the whole path. If the path has
    brackets, it matches no file, and Orbax writes a checkpoint without arrays, and reports no error.
    """
    if any(sign in str(path.absolute()) for sign in "[]*?"):
        raise CheckpointError(
            f"{path.absolute()}: expected a path without [, ], * and ?: Orbax reads these as a pattern, "
            "and would write checkpoints that cannot be read; choose another folder"
        )


def refuse_folder(folder: Path) -> None:
    """Raise `CheckpointError` for a folder in which no run can be stored.

    That is a checkpoint, a folder inside one or inside the checkpoints of a run, one with checkpoints
    directly in it, and a path that Orbax cannot write to.
    """
    refuse_pattern(folder)
    if checkpoints_in(folder):
        raise CheckpointError(
            f"{folder} holds checkpoints themselves; the run's folder is the one above, {folder.parent}"
        )
    for place in _with_parents(folder):
        inside = "" if place == folder.absolute() else f" is inside {place}, which"
        if (place / METADATA).exists():
            raise CheckpointError(
                f"{folder}:{inside} is a checkpoint, and nothing trains in it; choose another folder for "
                f"the run. To train on from it, give the plan start=Start({str(place)!r})"
            )
        run = Run(place.parent)
        if place == run.checkpoints_folder and run.plan_file.exists():
            raise CheckpointError(
                f"{folder}: the run {run} has its checkpoints in {place}, and nothing else belongs "
                "there; choose another folder"
            )


def _with_parents(folder: Path) -> Iterator[Path]:
    """The absolute path of a folder, then of each folder above it."""
    folder = folder.absolute()
    yield folder
    yield from folder.parents


def settled(plan: Plan, run: Run | None) -> Plan:
    """A plan with the ends that triggers gave to stages of a run, or of the one that it forks from."""
    if not any(stage.until for stage in plan.stages):
        return plan

    def known() -> list[Any]:
        if run is not None and run.plan_file.exists():
            return list(plan.following(run.plan()).ends)
        if plan.fork is not None and Run(plan.fork.run).plan_file.exists():
            return list(plan.following(Run(plan.fork.run).plan(), plan.fork.step).ends)
        return list(plan.ends)

    for stage, steps in hosts.from_first(known):
        plan = plan.ended(stage, steps)
    return plan
