"""How far two plans do the same: what a fork is checked by, and a tree of plans is made of."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from growjax.errors import PlanError, raise_all
from growjax.plan.files import differences
from growjax.plan.plan import Plan
from growjax.plan.stages import Fork, Span
from growjax.values import to_dict


# What the state of a run is of: with another one it would be the state of nothing
_STATE = ("model", "seed", "tokenizer", "objective", "clock")
# What was done with that state, and may be done otherwise from a step on
_TRAINING = ("optimizer", "loss", "accumulate", "data")
# Fields of a stage that say how long it is and how it is called, and those that only the rate depends on
_LENGTHS = ("name", "tokens", "flops", "seconds", "share", "rewarm", "rewind")


class Branch(NamedTuple):
    """One plan of a tree: with its fork, the folder of its run, and the steps that others fork from."""

    plan: Plan
    run: Path
    save_at: tuple[int, ...]


def shared_steps(first: Plan, second: Plan) -> tuple[int, int]:
    """How many first steps two plans share, to the last bit, and the stage of the step after them.

    A growth belongs to the steps after it: where one plan grows and the other does not, the stage is the
    one before the growth.

    **Example**

        shared_steps(trunk, dataclasses.replace(trunk, stages=(*trunk.stages, Stage(tokens=4000))))
    """
    whole = _STATE + _TRAINING
    if (
        list(differences(_fields(first, whole), _fields(second, whole)))
        or first.start != second.start
    ):
        return 0, 0
    steps, stage = 0, 0
    for a, b in zip(first.spans, second.spans, strict=False):
        if list(differences(_head(a), _head(b))):
            break
        stage = a.index
        same = min(a.steps, b.steps)
        rates = _rates(first, second, a, same)
        parted = next((n for n, old, new in rates if old != new), None)
        steps = a.start + (same if parted is None else parted)
        if parted is not None or a.steps != b.steps:
            break
    return steps, stage


def branches(
    plans: Sequence[Plan], folder: str | Path, names: Sequence[str] | None = None
) -> list[Branch]:
    """Plans as a tree: each forks from the earlier one that it has the most steps in common with.

    They are to be trained in this order, each into the folder named after it (or by `names`), with the
    checkpoints that later ones fork from (`Options.save_at`). What several have in common is then trained
    once, and every run ends with the same bits as if it had been trained alone.

    Raises `PlanError` for two folders of one name.

    **Example**

        for branch in branches([long, short, grown], "runs/tree"):
            for record in train(branch.plan, run=branch.run, options=Options(save_at=branch.save_at)):
                ...
    """
    names = [plan.name for plan in plans] if names is None else names
    twice = sorted({name for name in names if names.count(name) > 1})
    headline = "these plans cannot be trained as a tree:"
    raise_all(PlanError, headline, [f"{name!r}: two plans are called so" for name in twice])
    folder = Path(folder)
    forked: list[Plan] = []
    save_at: dict[str, set[int]] = {name: set() for name in names}
    for n, plan in enumerate(plans):
        common = [(shared_steps(earlier, plan)[0], -m) for m, earlier in enumerate(plans[:n])]
        steps, place = max(common, default=(0, 0))
        if plan.fork is None and steps > 0:
            trunk = names[-place]
            save_at[trunk].add(steps)
            plan = dataclasses.replace(plan, fork=Fork(str(folder / trunk), steps))
        forked.append(plan)
    return [
        Branch(plan, folder / name, tuple(sorted(save_at[name])))
        for plan, name in zip(forked, names, strict=True)
    ]


def fork_faults(trunk: Plan, plan: Plan, step: int, stage: int) -> Iterator[str]:
    """Why a plan cannot go on from the state of another before a step, in one of its stages."""
    yield from differences(_fields(trunk, _STATE), _fields(plan, _STATE))
    if trunk.start != plan.start:
        yield f"start: was {trunk.start}, is {plan.start}"
    if stage >= len(plan.spans):
        yield f"stages: the checkpoint is in stage {stage}, and the plan has {len(plan.spans)} stages"
        return
    for a, b in zip(trunk.spans[: stage + 1], plan.spans, strict=False):
        yield from differences(_head(a), _head(b), f"stages[{a.index}]")
        if a.index < stage and a.steps != b.steps:
            yield f"stages[{a.index}]: was {a.steps} steps long, is {b.steps}"
    span = plan.spans[stage]
    if not span.start <= step <= span.start + span.steps:
        end = span.start + span.steps
        yield f"stages[{stage}]: has steps {span.start} to {end}, and the checkpoint is before {step}"


def fork_changes(trunk: Plan, plan: Plan, step: int) -> Iterator[str]:
    """What a run did before a step that a plan does not say; nothing if the state is the plan's own."""
    yield from differences(_fields(trunk, _TRAINING), _fields(plan, _TRAINING))
    for span in trunk.spans:
        for n, old, new in _rates(trunk, plan, span, step - span.start):
            if old != new:
                at = f"at step {span.start + n} the learning rate was {old:.6g}"
                yield f"rate: {at}, and the plan says {new:.6g}"
                return


def _fields(plan: Plan, names: Sequence[str]) -> dict[str, Any]:
    return {name: _saved(getattr(plan, name)) for name in names}


def _head(span: Span) -> dict[str, Any]:
    """What a stage does, but for how long."""
    saved = {k: v for k, v in to_dict(span.stage).items() if k not in _LENGTHS}
    return saved | {"batch": span.batch, "objective": to_dict(span.objective)}


def _saved(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else to_dict(value)


def _rates(first: Plan, second: Plan, span: Span, steps: int) -> Iterator[tuple[int, float, float]]:
    """The learning rates of two plans at the first steps of a stage that they share."""
    spent = span.spent
    for n, cost in enumerate(span.costs[: max(steps, 0)]):
        # As the trainer asks for it: in the middle of the step
        middle = spent + cost / 2
        yield n, first.learning_rate(middle), second.learning_rate(middle)
        spent += cost
