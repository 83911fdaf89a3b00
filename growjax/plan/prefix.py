"""The common prefix of two plans: it decides whether a run can fork, and makes a tree of plans."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from growjax.errors import PlanError, raise_all
from growjax.plan.files import differences
from growjax.plan.plan import Plan
from growjax.plan.stages import Fork, Span
from growjax.values import to_dict


# Fields of a plan that must not change at a fork: the state would not fit, or its costs not compare
_STATE = ("model", "seed", "tokenizer", "objective", "clock")
# Fields of a plan that may change at a fork
_TRAINING = ("optimizer", "transfer", "loss", "accumulate", "data", "validation")
# Fields of a stage that do not change its steps: its name, its length, and those of the learning rate
_LENGTHS = ("name", "tokens", "flops", "seconds", "share", "rewarm", "rewind", "ended")


class Branch(NamedTuple):
    """A plan of a tree with its `fork` set, the folder of its run, and the steps others fork from."""

    plan: Plan
    run: Path
    save_at: tuple[int, ...]


def shared_steps(first: Plan, second: Plan) -> tuple[int, int]:
    """The number of first steps that two plans share, to the last bit, and the stage of the state then.

    A growth belongs to the steps after it: if one plan grows after the shared steps and the other does
    not, the stage is the one before the growth.

    **Example**

        shared_steps(trunk, dataclasses.replace(trunk, stages=(*trunk.stages, Stage(tokens=4000))))
    """
    whole = _STATE + _TRAINING
    if (
        list(differences(_fields(first, whole), _fields(second, whole)))
        or first.layout.own_paths != second.layout.own_paths
        or first.start != second.start
        or first.block != second.block
    ):
        return 0, 0
    steps, stage = 0, 0
    for a, b in zip(first.spans, second.spans, strict=False):
        if list(differences(_settings(a), _settings(b))):
            break
        if a.stage.until is not None and None in (a.stage.ended, b.stage.ended):
            # Nobody knows yet where it ends
            break
        stage = a.index
        common = min(a.steps, b.steps)
        # The first step of the stage at which the learning rates differ
        rates = _rates(first, second, a, common)
        parted = next((n for n, old, new in rates if old != new), None)
        steps = a.start + (common if parted is None else parted)
        if parted is not None or a.steps != b.steps:
            break
    return steps, stage


def branches(
    plans: Sequence[Plan], folder: str | Path, names: Sequence[str] | None = None
) -> list[Branch]:
    """Plans as a tree: each forks from the earlier plan that shares the most first steps with it.

    Train them in this order, each into the folder named after it (or by `names`), with the checkpoints
    that later ones fork from (`Options.save_at`). Shared steps are then trained once, and every run ends
    with the same bits as if it had been trained alone.

    Raises `PlanError` for two folders of one name, and for a name that is no folder in `folder`.

    **Example**

        for branch in branches([long, short, grown], "runs/tree"):
            for record in train(branch.plan, run=branch.run, options=Options(save_at=branch.save_at)):
                ...
    """
    names = [plan.name for plan in plans] if names is None else names
    repeated = sorted({name for name in names if names.count(name) > 1})
    faults = [f"{name!r}: two plans have this name" for name in repeated]
    # A plan may come from a stranger, and its name must not lead out of the folder
    faults += [
        f"{name!r}: the name of a plan of a tree is that of its folder, so it must be a plain one"
        for name in dict.fromkeys(names)
        if name in ("", ".", "..") or "/" in name or "\\" in name
    ]
    raise_all(PlanError, "these plans cannot be trained as a tree:", faults)
    folder = Path(folder)
    forked: list[Plan] = []
    save_at: dict[str, set[int]] = {name: set() for name in names}
    for n, plan in enumerate(plans):
        # The earlier plan with the most shared steps; of several, the first
        trunk, steps = "", 0
        for name, earlier in zip(names[:n], plans[:n], strict=True):
            shared = shared_steps(earlier, plan)[0]
            if shared > steps:
                trunk, steps = name, shared
        if plan.fork is None and steps > 0:
            save_at[trunk].add(steps)
            plan = dataclasses.replace(plan, fork=Fork(str(folder / trunk), steps))
        forked.append(plan)
    return [
        Branch(plan, folder / name, tuple(sorted(save_at[name])))
        for plan, name in zip(forked, names, strict=True)
    ]


def fork_faults(trunk: Plan, plan: Plan, step: int, stage: int) -> Iterator[str]:
    """The reasons why a plan cannot go on from a run of `trunk`, in `stage` and before `step`."""
    yield from differences(_fields(trunk, _STATE), _fields(plan, _STATE))
    if trunk.start != plan.start:
        yield f"start: was {trunk.start}, is {plan.start}"
    if trunk.block != plan.block:
        yield (
            f"stages: the longest window of them was {trunk.block} tokens, is {plan.block}: the text is "
            "shuffled in units of it, so other parts of it would come next. Give both plans an equally "
            "long window, or train on from the model alone (`start`)"
        )
    if stage >= len(plan.spans):
        yield f"stages: the checkpoint is in stage {stage}, and the plan has {len(plan.spans)} stages"
        return
    for a, b in zip(trunk.spans[: stage + 1], plan.spans, strict=False):
        yield from differences(_settings(a), _settings(b), f"stages[{a.index}]")
        if a.index < stage and a.steps != b.steps:
            yield f"stages[{a.index}]: was {a.steps} steps long, is {b.steps}"
    span = plan.spans[stage]
    if not span.start <= step <= span.start + span.steps:
        end = span.start + span.steps
        yield f"stages[{stage}]: has steps {span.start} to {end}, and the checkpoint is before {step}"


def fork_changes(trunk: Plan, plan: Plan, step: int) -> Iterator[str]:
    """The differences of a run of `trunk` before a step from the plan; none if the plan does the same."""
    yield from differences(_fields(trunk, _TRAINING), _fields(plan, _TRAINING))
    own = trunk.layout.own_paths, plan.layout.own_paths
    if own[0] != own[1]:
        yield f"plan.layout.own_paths: was {own[0]}, is {own[1]}"
    for span in trunk.spans:
        for n, old, new in _rates(trunk, plan, span, step - span.start):
            if old != new:
                at = f"at step {span.start + n} the learning rate was {old:.6g}"
                yield f"rate: {at}, and the plan says {new:.6g}"
                return


def _fields(plan: Plan, names: Sequence[str]) -> dict[str, Any]:
    """Some fields of a plan, as they are saved."""
    return {name: _saved(getattr(plan, name)) for name in names}


def _settings(span: Span) -> dict[str, Any]:
    """The fields of a stage that determine its steps, without their number and learning rates."""
    saved = {k: v for k, v in to_dict(span.stage).items() if k not in _LENGTHS}
    return saved | {"batch": span.batch, "objective": to_dict(span.objective)}


def _saved(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else to_dict(value)


def _rates(first: Plan, second: Plan, span: Span, steps: int) -> Iterator[tuple[int, float, float]]:
    """The number of each of the first steps of a shared stage, and both plans' learning rates at it."""
    spent = span.spent
    for n, cost in enumerate(span.costs[: max(steps, 0)]):
        # As in training: the learning rate in the middle of the step
        middle = spent + cost / 2
        yield n, first.learning_rate(middle), second.learning_rate(middle)
        spent += cost
