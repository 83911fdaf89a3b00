"""The state that a fork begins with: that of another run before a step, held against the fork's plan."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from growjax.errors import CheckpointError, GrowjaxError
from growjax.plan.plan import Plan
from growjax.plan.prefix import fork_changes, fork_faults
from growjax.programs.step import Programs
from growjax.runs import hosts
from growjax.runs.checkpoint import load, read_lineage
from growjax.runs.run import Run, step_of
from growjax.runs.saves import Resumed


class Trunk(NamedTuple):
    """A checkpoint that a plan can go on from, its lineage, and what was done otherwise before it."""

    path: Path
    lineage: Mapping[str, Any]
    changes: tuple[str, ...]

    @property
    def record(self) -> dict[str, Any]:
        """What the lineages of the fork say about it."""
        return {
            "run": str(self.path.parent.parent),
            "step": self.lineage["step"],
            "stage": self.lineage["stage"],
            "changes": list(self.changes),
        }


def fork_errors(plan: Plan) -> list[str]:
    """Everything that forbids a plan to fork from the run that it names, before anything is computed."""
    try:
        find_trunk(plan)
    except GrowjaxError as error:
        return [f"fork: {error}"]
    return []


def find_trunk(plan: Plan) -> Trunk:
    """The latest checkpoint, at the fork's step if it has one, that a plan can go on from.

    Raises `CheckpointError` that says what there is and why none of it will do.
    """
    assert plan.fork is not None
    run, step = Run(plan.fork.run), plan.fork.step
    if not run.plan_file.exists():
        raise CheckpointError(f"{run}: expected the folder of a run, and there is no plan in it")
    trunk = run.plan()
    paths = [path for path in run.checkpoints() if step is None or step_of(path)[0] == step]
    if not paths:
        steps = sorted({step_of(path)[0] for path in run.checkpoints()})
        listed = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(
            f"{run}: there is no checkpoint before step {step}; there are some before: {listed}. "
            "`growjax train --save-at STEP`, or Options(save_at=(STEP,)), writes one there and keeps it"
        )
    errors: list[str] = []
    for path in reversed(paths):
        faults = list(fork_faults(trunk, plan, *step_of(path)))
        if not faults:
            lineage = read_lineage(path)
            return Trunk(path, lineage, tuple(fork_changes(trunk, plan, step_of(path)[0])))
        errors += [f"{path.name}: {fault}" for fault in faults]
    listed = "".join(f"\n  - {error}" for error in errors)
    raise CheckpointError(f"{run}: plan {plan.name!r} does other things before it forks:{listed}")


def read_fork(plan: Plan, programs: Programs, data: str) -> tuple[Resumed, Trunk]:
    """The state that a fork begins with, on the mesh of the programs, and where it is from.

    `data` is the digest of what the fork trains on. Raises `CheckpointError` as `find_trunk` does, for a
    state of other shapes (another optimizer), and if hosts differ; `DamagedError` if the checkpoint is
    not whole.
    """
    trunk = hosts.together(lambda: find_trunk(plan))
    first = hosts.from_first(lambda: trunk.lineage)
    lineage = trunk.lineage

    def same() -> None:
        if json.dumps(lineage, sort_keys=True) != json.dumps(first, sort_keys=True):
            raise CheckpointError(f"{trunk.path} is not the checkpoint that process 0 forks from")

    hosts.together(same)
    if lineage["data"] != data:
        change = f"data: it trained on text of digest {lineage['data']}, and goes on with {data}"
        trunk = trunk._replace(changes=(*trunk.changes, change))
    span = plan.spans[lineage["stage"]]
    state = load(trunk.path, programs.shapes(span.model), together=hosts.together)
    resumed = Resumed(
        str(trunk.path), span.index, lineage["step"], lineage["flops"], lineage["seconds"], state
    )
    return resumed, trunk
