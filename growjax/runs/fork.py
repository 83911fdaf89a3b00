"""The state that a fork begins with: that of another run before a step, if it fits the fork's plan."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from growjax.errors import CheckpointError, DamagedError, GrowjaxError
from growjax.plan.plan import Plan
from growjax.plan.prefix import fork_changes, fork_faults
from growjax.plan.stages import Fork
from growjax.programs.step import Programs
from growjax.runs import hosts
from growjax.runs.checkpoint import load, read_lineage
from growjax.runs.run import Run, step_of
from growjax.runs.saves import Resumed


_OWN = "that of its plan"


class Trunk(NamedTuple):
    """A checkpoint that a plan can go on from, its lineage, and the differences of its run's plan."""

    path: Path
    lineage: Mapping[str, Any]
    changes: tuple[str, ...]

    @property
    def record(self) -> dict[str, Any]:
        """The field `fork` of the lineages of the new run."""
        return {
            "run": str(self.path.parent.parent),
            "step": self.lineage["step"],
            "stage": self.lineage["stage"],
            "changes": list(self.changes),
        }


def fork_errors(plan: Plan) -> list[str]:
    """The reasons why a plan cannot fork from the run that it names, before anything is computed."""
    try:
        find_trunk(plan)
    except GrowjaxError as error:
        return [f"fork: {error}"]
    return []


def pinned(plan: Plan, run: Run) -> Plan:
    """A plan whose fork names the step that it goes on from, which the plan in the run's folder has, too.

    Without one, the first session takes the latest checkpoint of the trunk. The trunk may still be
    training, and no later session takes another one.
    """
    fork = plan.fork
    if fork is None or fork.step is not None:
        return plan

    def step() -> int | None:
        if not run.plan_file.exists():
            return find_trunk(plan).lineage["step"]
        saved = run.plan().fork
        return None if saved is None else saved.step

    return dataclasses.replace(plan, fork=Fork(fork.run, hosts.from_first(step)))


def find_trunk(plan: Plan) -> Trunk:
    """The latest checkpoint that a plan can go on from; if the fork names a step, one before that step.

    Raises `CheckpointError` that lists the steps with a checkpoint, or the faults of each checkpoint.
    """
    assert plan.fork is not None
    run, step = Run(plan.fork.run), plan.fork.step
    if not run.plan_file.exists():
        raise CheckpointError(f"{run}: expected the folder of a run, but it has no plan.json")
    trunk = run.plan()
    plan = plan.following(trunk, step)
    assert plan.fork is not None
    paths = [path for path in run.checkpoints() if step is None or step_of(path)[0] == step]
    if not paths:
        steps = sorted({step_of(path)[0] for path in run.checkpoints()})
        listed = ", ".join(map(str, steps)) or "none"
        if step is None:
            raise CheckpointError(
                f"{run}: a run without a whole checkpoint, so nothing forks from it"
            )
        raise CheckpointError(
            f"{run}: it has no checkpoint before step {step}, only before: {listed}. "
            "`growjax train --save-at STEP`, or Options(save_at=(STEP,)), writes one that stays"
        )
    errors: list[str] = []
    for path in reversed(paths):
        faults = list(fork_faults(trunk, plan, *step_of(path)))
        if not faults:
            lineage = read_lineage(path)
            return Trunk(path, lineage, tuple(fork_changes(trunk, plan, step_of(path)[0])))
        errors += [f"{path.name}: {fault}" for fault in faults]
    listed = "".join(f"\n  - {error}" for error in errors)
    raise CheckpointError(f"{run}: plan {plan.name!r} differs from it before it forks:{listed}")


def read_fork(plan: Plan, programs: Programs, data: str, loss: str | None) -> tuple[Resumed, Trunk]:
    """Read the state that a fork begins with, onto the mesh of the programs; returns its trunk as well.

    `data` is the digest of the data of the fork, `loss` the name of a loss in place of the plan's. Raises
    `CheckpointError` as `find_trunk` does, for a state of other shapes (of another optimizer, say), and
    if hosts differ; `DamagedError` if the checkpoint is not whole. A checkpoint that its run removes
    meanwhile is a `CheckpointError`, too.
    """
    trunk = hosts.together(lambda: find_trunk(plan))
    first = hosts.from_first(lambda: trunk.lineage)
    lineage = trunk.lineage

    def compare() -> None:
        if json.dumps(lineage, sort_keys=True) != json.dumps(first, sort_keys=True):
            raise CheckpointError(f"{trunk.path} is not the checkpoint that process 0 forks from")

    hosts.together(compare)
    if lineage["data"] != data:
        change = f"data: it trained on text of digest {lineage['data']}, and goes on with {data}"
        trunk = trunk._replace(changes=(*trunk.changes, change))
    if lineage.get("loss") != loss:
        change = (
            f"loss: it minimised {lineage.get('loss') or _OWN}, and goes on with {loss or _OWN}"
        )
        trunk = trunk._replace(changes=(*trunk.changes, change))
    span = plan.spans[lineage["stage"]]
    try:
        state = load(trunk.path, programs.shapes(span.model), together=hosts.together)
    except DamagedError as error:
        if trunk.path.exists():
            raise
        raise CheckpointError(
            f"{trunk.path}: it was removed while it was read, by a run that is training and keeps only "
            "its latest; try again, or fork from a step that it keeps (`--save-at STEP`)"
        ) from error
    resumed = Resumed(
        str(trunk.path),
        span.index,
        lineage["step"],
        lineage["flops"],
        lineage["seconds"],
        state,
        tuple(lineage.get("losses", ())),
        tuple(stage for stage, _ in lineage.get("ended", ())),
    )
    return resumed, trunk
