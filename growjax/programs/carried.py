"""Growths of a plan that its optimizer's state cannot follow, found before anything is trained."""

import functools
from collections.abc import Iterator
from typing import Any, Literal

import equinox as eqx

from growjax.axes import partition
from growjax.errors import StateError
from growjax.gates import ungated
from growjax.growth import Operator
from growjax.optim import carry
from growjax.plan.optimizer import Rule
from growjax.plan.plan import Plan
from growjax.plan.worked import purpose_key


def carry_faults(plan: Plan) -> Iterator[str]:
    """Growths of a plan that its optimizer's state cannot follow, found from shapes alone.

    A run would meet the `StateError` of `gj.carry` only when it gets there, after all stages before.
    """
    rule = plan.optimizer.build()
    before = [plan.origin, *(span.model for span in plan.spans)]
    for model, span in zip(before, plan.spans, strict=False):
        op, carried = span.stage.grow, span.stage.carry
        if op is None or carried == "reset":
            continue
        model = ungated(model)
        error = _refusal(plan, op, rule, model, carried)
        if error is not None:
            indented = str(error).replace("\n", "\n    ")
            remedy = "carry='reset' starts all of the optimizer state anew"
            if carried == "dual" and _refusal(plan, op, rule, model, "zero") is None:
                remedy = f"carry='zero' starts that of new copies alone anew; {remedy}"
            yield (
                f"stage {span.index} {span.stage.name!r}: carry={carried!r}: {indented}\n"
                f"    In a plan, {remedy}"
            )


def _refusal(
    plan: Plan, op: Operator, rule: Rule, model: Any, copies: Literal["dual", "zero"]
) -> StateError | None:
    """Why the optimizer's state cannot follow a growth of a model; None if it can."""
    follow = functools.partial(_followed, op, rule, copies=copies)
    try:
        eqx.filter_eval_shape(follow, model, purpose_key(plan.seed, "grow"))
    except StateError as error:
        return error
    return None


def _followed(
    op: Operator, rule: Rule, model: Any, key: Any, *, copies: Literal["dual", "zero"]
) -> Any:
    """A fresh optimizer state of a model, carried through an operator."""
    state = rule.init(partition(model)[0])
    return carry(op, state, model, optimizer=rule, key=key, copies=copies)
