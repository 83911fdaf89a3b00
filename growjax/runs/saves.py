"""Saving and resuming: the checkpoints that a plan writes into the folder of its run, with lineages."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx

from growjax import __version__
from growjax.errors import CheckpointError, DamagedError, GrowjaxError, raise_all
from growjax.plan.files import differences, save_plan
from growjax.plan.plan import Plan
from growjax.plan.stages import Span
from growjax.programs.step import Programs, State
from growjax.runs import hosts
from growjax.runs.checkpoint import (
    Checkpoints,
    load,
    numbered,
    read_lineage,
    set_aside,
)
from growjax.runs.lineage import digest_of
from growjax.runs.lock import Lock
from growjax.runs.records import Crossing
from growjax.runs.run import Run, refuse_folder
from growjax.values import from_dict, to_dict
from growjax.values.codec import seal_of


class Resumed(NamedTuple):
    """The state of a run at a checkpoint, and the position, FLOPs and training seconds of it."""

    path: str
    stage: int
    step: int
    flops: int
    seconds: float
    state: State
    losses: tuple[float, ...] = ()
    ended: tuple[int, ...] = ()  # the stages that triggers had ended when it was saved


class Saves:
    """The checkpoints of one plan in the folder of its run, next to the plan itself.

    **Arguments**

    - `lock`: the lock on the folder, held by process 0.
    - `reference`: the second model that a selector compares with.
    - `loss`: the name of the loss that is minimised in place of the plan's, if there is one.
    - `keep_last`, `keep_every`, `keep`: how many of the latest checkpoints stay, and those before which
      steps: multiples of a number, and certain ones.
    - `fall_back`: set a damaged checkpoint aside and go on from the one before it; by default it is an
      error that names the folder to remove.

    `notes` are sentences for the user about checkpoints that were set aside. Raises `CheckpointError` if
    the folder is that of another plan; the layout and the location of the data may differ.
    """

    def __init__(
        self,
        plan: Plan,
        run: Run,
        lock: Lock,
        *,
        keep_last: int,
        keep_every: int | None,
        keep: Sequence[int] = (),
        reference: Any = None,
        loss: str | None = None,
        fall_back: bool = False,
    ):
        self.plan, self.run, self.lock = plan, run, lock
        self.loss, self.fall_back = loss, fall_back
        arrays = eqx.filter(reference, eqx.is_array)
        self.reference = None if reference is None else digest_of(arrays)
        self.checkpoints = Checkpoints(
            run.checkpoints_folder, keep_last=keep_last, keep_every=keep_every, keep=keep
        )
        self.parent: str | None = None  # the name of the last checkpoint
        self.start: dict[str, Any] | None = None  # the trained model that the run started from
        self.fork: dict[str, Any] | None = (
            None  # the run, and its step, that the run was forked from
        )
        self.notes: list[str] = []
        if run.plan_file.exists():
            old = run.plan()
            faults = list(differences(_fixed(old), _fixed(plan)))
            hint = "choose another folder, or go on with that one"
            raise_all(CheckpointError, f"{run} holds the run of another plan; {hint}:", faults)

    def last(self) -> Path | None:
        """The last checkpoint, once it is written; None if there is none."""
        self.checkpoints.wait()
        return self.run.last()

    def check(self) -> None:
        """Raise `CheckpointError` if another process has taken over the lock on the folder."""
        self.lock.check()

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        self.checkpoints.wait()

    def resume(self, programs: Programs, data: str) -> Resumed | None:
        """Read the last checkpoint, onto the mesh of the programs; None for a new run.

        `data` is the digest of the run's data. With many hosts, process 0 chooses the checkpoint, and all
        confirm that theirs is the same. Raises `CheckpointError` if it is of another run, or if hosts
        differ, and `DamagedError` if it is not whole and `fall_back` is not set.
        """
        names = hosts.from_first(self._begin)
        for name in reversed(names):
            path = self.run.checkpoints_folder.absolute() / name
            try:
                return self._read(path, programs, data)
            except DamagedError:
                if not self.fall_back:
                    raise
                moved = hosts.from_first(lambda path=path: set_aside(path).name)
                self.notes.append(f"{path} is not a whole checkpoint; it was set aside as {moved}")
        return None

    def _begin(self) -> list[str]:
        """Clean the folder, write the plan, and list the names of the checkpoints; for process 0."""
        self.checkpoints.clean()
        names = [path.name for path in self.run.checkpoints()]
        if not self.run.plan_file.exists():
            if names:
                # The file of the plan was lost, but the lineage identifies the plan
                path = self.run.checkpoints()[-1]
                lineage = self._check_plan(path)
                if lineage.get("fixed", _digest(self.plan)) != _digest(self.plan):
                    raise CheckpointError(
                        f"{self.run}: its plan.json was lost, and this is not the plan that it began "
                        "with (a batch, a length, a rate or another field differs); go on with that "
                        f"plan, or train in another folder, with start=Start({str(path)!r})"
                    )
            elif self.plan.fork is not None:
                from growjax.runs.fork import find_trunk

                # A fork that fails leaves no plan, from which the corrected one would differ
                find_trunk(self.plan)
            self._write_plan()
        return names

    def _write_plan(self) -> None:
        """Write the plan into the folder of the run, which need not exist."""
        try:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            save_plan(self.plan, self.run.plan_file, sealed=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.run.plan_file}: could not be written: {error.strerror}"
            ) from error

    def _check_plan(self, path: Path) -> dict[str, Any]:
        """The lineage of a checkpoint; raises `CheckpointError` if it is of another plan."""
        lineage = read_lineage(path)
        if not lineage["stage"] < len(self.plan.spans):
            raise CheckpointError(
                f"{path} is of the run of another plan: it is of stage {lineage['stage']}, and the plan "
                f"has {len(self.plan.spans)}"
            )
        mine = self._identity(lineage["stage"])
        try:
            # Read and saved again: a field that is newer than the checkpoint gets its default
            theirs = {name: to_dict(from_dict(lineage.get(name))) for name in mine}
        except GrowjaxError as error:
            raise CheckpointError(f"{path}: its lineage: {error}") from error
        # Through JSON, since the lineage has lists for tuples
        faults = list(differences(*json.loads(json.dumps([theirs, mine]))))
        raise_all(CheckpointError, f"{path} is of the run of another plan:", faults)
        return lineage

    def _read(self, path: Path, programs: Programs, data: str) -> Resumed:
        """Read a checkpoint on all hosts; its lineage is compared with the run, and between hosts."""
        lineage = hosts.together(lambda: self._check_plan(path))
        first = hosts.from_first(lambda: lineage)

        def compare() -> None:
            # A lineage holds the checksums of all arrays, so equal lineages mean equal checkpoints
            if json.dumps(lineage, sort_keys=True) != json.dumps(first, sort_keys=True):
                raise CheckpointError(f"{path} is not the checkpoint that process 0 goes on from")

        hosts.together(compare)
        # The plan may know the ends of the checkpoint's own stage and of later ones, and must know all
        # before it
        ended, stage = [list(pair) for pair in self.plan.ends], lineage["stage"]
        before = [pair for pair in ended if pair[0] < stage]
        if lineage.get("ended", []) not in (before, [pair for pair in ended if pair[0] <= stage]):
            raise CheckpointError(
                f"{path}: triggers have ended stages of its run, each after so many steps: "
                f"{lineage.get('ended', [])}, and {self.run.plan_file} says {ended}; write the former "
                "into the plan (Stage(ended=...))"
            )
        if lineage["data"] != data:
            raise CheckpointError(
                f"{path}: it was trained on other data (digest {lineage['data']}, now {data}); a run "
                "goes on with the data that it began with"
            )
        if lineage["reference"] != self.reference:
            raise CheckpointError(
                f"{path}: it chose by another second model (digest {lineage['reference']}, now "
                f"{self.reference}); a run goes on with the model that it began with"
            )
        if "loss" in lineage and lineage["loss"] != self.loss:
            names = [name or "that of its plan" for name in (lineage["loss"], self.loss)]
            raise CheckpointError(
                f"{path}: it was trained by another loss ({names[0]}, now {names[1]}); a run goes on "
                "with the loss that it began with (`train(loss=...)`)"
            )
        span = self.plan.spans[lineage["stage"]]
        if not span.start <= lineage["step"] <= span.start + span.steps:
            raise CheckpointError(
                f"{path} is of the run of another plan: it is before step {lineage['step']}, and stage "
                f"{span.index} has steps {span.start} to {span.start + span.steps}"
            )
        state = load(path, programs.shapes(span.model), together=hosts.together)
        self.parent, self.start, self.fork = path.name, lineage["start"], lineage.get("fork")
        return Resumed(
            str(path),
            span.index,
            lineage["step"],
            lineage["flops"],
            lineage["seconds"],
            state,
            tuple(lineage.get("losses", ())),
            tuple(stage for stage, _ in lineage.get("ended", ())),
        )

    def save(
        self,
        span: Span,
        step: int,
        state: State,
        seal: Callable[[State], list[Any]],
        *,
        level: float,
        flops: int,
        seconds: float,
        data: str,
        crossing: Crossing | None,
        losses: Sequence[float] = (),
    ) -> Path | None:
        """Start to write the state before `step`, with its lineage; returns its path.

        Returns None if the checkpoint exists already: a resumed run repeats steps, with the same numbers.
        `seal` is the compiled program of `checksums`, `losses` those that the stage's trigger reads.
        """
        # The checkpoint that is still being written may be this one; it gets its name at the end
        self.checkpoints.wait()
        if self.checkpoints.path(step, span.index).exists():
            return None
        lineage = {
            "growjax": __version__,
            **self._identity(span.index),
            "gated": span.stage.grow is not None,
            "level": level,
            "sizes": span.sizes,
            "births": span.births.runs(),
            "stage": span.index,
            "step": step,
            "tokens": span.tokens + (step - span.start) * span.step_tokens,
            "flops": flops,
            "seconds": seconds,
            "data": data,
            "reference": self.reference,
            "loss": self.loss,
            "fixed": _digest(self.plan),
            "parent": self.parent,
            "start": self.start,
            "fork": self.fork,
            "checksums": numbered(state, seal),
            "certificate": None if crossing is None else dataclasses.asdict(crossing),
            "losses": list(losses),
            "ended": [list(pair) for pair in self.plan.ends],
        }
        path = self.checkpoints.save(step, span.index, state, lineage)
        self.parent = path.name
        return path

    def change(self, plan: Plan) -> None:
        """Go on with a plan of which a trigger has ended a stage, and write it."""
        self.plan = plan
        hosts.from_first(self._write_plan)

    def _identity(self, stage: int) -> dict[str, Any]:
        """The fields of a lineage that identify the plan, up to a stage."""
        plan = self.plan
        grown = [s.grow for s in plan.stages[: stage + 1] if s.grow is not None]
        earlier = plan.start.operators if plan.start else ()
        return {
            "plan": plan.name,
            "model": to_dict(plan.model),
            "optimizer": to_dict(plan.optimizer),
            "operators": [to_dict(op) for op in (*earlier, *grown)],
            "seed": plan.seed,
            "tokenizer": plan.tokenizer,
        }


@contextlib.contextmanager
def locked(plan: Plan, run: Run, **options: Any) -> Iterator[Saves]:
    """The `Saves` of a plan in a folder that is locked in a `with` block; `options` are those of `Saves`.

    If the block raises an error of growjax, a checkpoint that is being written is waited for.
    """
    lock = run.lock()
    with contextlib.ExitStack() as stack:

        def take() -> list[str]:
            refuse_folder(run.folder)
            stack.enter_context(lock)
            return [] if lock.note is None else [f"{run}: {lock.note}"]

        # Process 0 holds the lock for all
        notes = hosts.from_first(take)
        saves = Saves(plan, run, lock, **options)
        saves.notes += notes
        try:
            yield saves
        except (GrowjaxError, GeneratorExit):
            # `GeneratorExit`: the caller closed the iterator over the records
            with contextlib.suppress(CheckpointError):
                saves.wait()
            raise


def _fixed(plan: Plan) -> dict[str, Any]:
    """The fields of a plan, as they are saved, that may not change when a run is resumed.

    A plan with the others set to fixed values would say the same, and work out all stages again.
    """
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    # Data are compared by their digest, wherever they lie; of a layout only what changes the draws counts
    del fields["data"], fields["validation"]
    fields["layout"] = {"own_paths": plan.layout.own_paths}
    for name, where in (("start", "folder"), ("fork", "run")):
        if fields[name] is not None:
            fields[name] = dataclasses.replace(fields[name], **{where: "it was read at the start"})
    return to_dict(fields)


def _digest(plan: Plan) -> str:
    """Identifies the fields of a plan that may not change, without the ends of its stages by triggers."""
    fields = _fixed(plan)
    for stage in fields["stages"]:
        stage.pop("ended", None)
    return seal_of(fields)
