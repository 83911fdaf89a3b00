"""The stages of a plan, worked out from shapes alone: models, steps, costs, and why they cannot run."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from growjax.axes import axes_of, partition, sizes
from growjax.data.objectives import Objective, batch_shapes
from growjax.errors import GrowjaxError, PlanError, StateError, raised
from growjax.gates import is_gated, ungated
from growjax.growth import Births, Fit
from growjax.growth.births import grown_shapes
from growjax.maps import fold_in_name
from growjax.models.protocol import kind_of
from growjax.optim.divided import Division
from growjax.optim.partwise import divided
from growjax.plan.stages import Span, Stage, Work
from growjax.plan.steps import Steps
from growjax.subnet import PathSchedule, RandomTokens


# `plan` is a `Plan` everywhere here; its class imports this module


def birth(plan: Any, seed: Any) -> Any:
    """The model before the first stage of a plan, drawn from this seed (a number or a tracer)."""
    model = plan.model.build(purpose_key(seed, "model"))
    if plan.transfer is not None:
        model = plan.transfer.born(model)
    # The growth of a trained model before this plan. Its parameters are read from `start.folder` later;
    # here it has the same shapes.
    for op in plan.start.operators if plan.start else ():
        model = ungated(op(model, key=purpose_key(seed, "grow")))
    return model


def births_at_start(plan: Any) -> Births:
    """The births of the coordinates of the model before the first stage."""
    if plan.start is None or not plan.start.operators:
        return Births.original(plan.origin)
    model = eqx.filter_eval_shape(plan.model.build, plan.key("model"))
    births = Births.original(model)
    for op in plan.start.operators:
        births, model = births.grown(op, model), ungated(grown_shapes(op, model))
    return births


def purpose_key(seed: int, name: str) -> PRNGKeyArray:
    """The key for one purpose of a run: "model" or "grow"."""
    return fold_in_name(jax.random.key(seed), name)


def work_out(plan: Any, faults: list[str] | None = None) -> list[Span]:
    """Work out every stage from shapes alone; faults are added to `faults`."""
    faults = [] if faults is None else faults
    spans: list[Span] = []
    try:
        model, births = plan.origin, births_at_start(plan)
    except GrowjaxError as error:
        where = "model" if plan.start is None else "start"
        faults.append(f"{where}: " + str(error).replace("\n", "\n    "))
        return spans
    except Exception as error:
        # The user's own function that builds a model may raise anything
        faults.append(f"model: {plan.model!r} cannot be built: {raised(error)}")
        return spans
    # Steps, tokens and cost before the stage, and the share of the budget at its end
    start, tokens, spent, share = 0, 0, 0, 0.0
    # The step before which each growth happens; 0 for the birth, and for growths before the plan
    grown_at = (0,) * (int(births.growths) + 1)
    for n, stage in enumerate(plan.stages):
        where = f"stage {n} {stage.name!r}: "
        # Gates of the stage before are open by its end, and dropped here
        model = ungated(model)
        batch, objective = stage.batch or plan.batch, stage.objective or plan.objective
        try:
            before = model
            if stage.grow is not None:
                births, grown_at = births.grown(stage.grow, model), (*grown_at, start)
                model = eqx.filter_eval_shape(stage.grow, model, key=plan.key("grow"))
            misfits = list(shape_faults(plan, batch, objective, model))
            if plan.transfer is not None:
                misfits += [f"transfer: {fault}" for fault in plan.transfer.faults(model)]
            if not misfits and stage.objective is not None:
                # Held-out losses are computed with the plan's own objective, at every stage
                own = shape_faults(plan, batch, plan.objective, model)
                misfits = [f"the plan's own, for held-out losses: {fault}" for fault in own]
            if misfits:
                faults += [where + fault for fault in misfits]
                continue
            steps = Steps(
                stage,
                model,
                batch,
                objective,
                start=start,
                seed=plan.seed,
                clock=plan.clock,
                curvature_every=plan.optimizer.curvature_every,
                loss=plan.loss,
            )
            fit_flops, fit_tokens, fit_cost = steps.fit(before)
            charged = round(stage.charge * plan.clock.per_unit) + fit_cost
            spent += charged
            share += stage.share or 0.0
            # From the shares of all stages so far, so that a stage makes up for earlier rounding
            left = share * (plan.budget or 0.0) * plan.clock.per_unit - spent
            if charged and stage.share is not None and left <= 0:
                paid = charged / plan.clock.per_unit
                raise PlanError(
                    f"charge: {paid:g} besides its steps leaves nothing of its share for these"
                )
            limit = _limit(plan, stage, batch * objective.raw_length, left)
            rows = list(itertools.islice(steps.until(*limit), stage.ended))
        except GrowjaxError as error:
            faults.append(where + str(error).replace("\n", "\n    "))
            return spans
        except Exception as error:
            # The user's own model, loss, operator or objective may raise anything
            faults.append(where + raised(error))
            return spans
        faults += [where + fault for fault in _ramp_faults(stage, model, len(rows))]
        if stage.ended is not None and stage.ended > len(rows):
            faults.append(
                f"{where}ended: after {stage.ended} steps, and it has at most {len(rows)}"
            )
        faults += [where + fault for fault in _fit_faults(stage, len(rows))]
        faults += [where + fault for fault in _context_faults(plan, objective, rows)]
        faults += [where + fault for fault in _parts_faults(plan, stage, model, births)]
        tokens += fit_tokens
        works, flops, costs = (tuple(column) for column in zip(*rows, strict=True))
        span = Span(
            n,
            stage,
            start,
            tokens,
            spent,
            works,
            flops,
            costs,
            steps.ops(),
            steps.firsts(),
            model,
            batch,
            objective,
            births,
            grown_at,
            charged,
            fit_flops,
            fit_tokens,
            fit_cost,
        )
        spans.append(span)
        start, spent = start + len(costs), spent + sum(costs)
        tokens += len(costs) * span.step_tokens
    return spans


def _limit(
    plan: Any, stage: Stage, step_tokens: int, left: float
) -> tuple[Literal["steps", "flops", "cost"], float]:
    """The length of a stage: its unit, and the number of steps, FLOPs or units of the clock.

    `left` is the cost that the stage's share of the budget leaves, in the clock's smallest unit.
    """
    if isinstance(stage.subnet, PathSchedule):
        return "steps", stage.subnet.stages[-1].stop
    if stage.tokens is not None:
        return "steps", max(round(stage.tokens / step_tokens), 1)
    if stage.flops is not None:
        return "flops", stage.flops
    return "cost", left if stage.seconds is None else stage.seconds * plan.clock.per_unit


def shape_faults(plan: Any, batch: int, objective: Objective, model: Any) -> Iterator[str]:
    """Faults of a batch and an objective with the shapes of a model."""
    model_sizes = sizes(model)
    if batch % plan.accumulate:
        yield f"batch: {batch} sequences cannot be computed in {plan.accumulate} equal parts"
    shapes = batch_shapes(objective, 1)
    lengths = {key: x.shape[1] for key, x in shapes.items()}
    ways, longest = plan.layout.context, max(lengths.values())
    if any(length % ways for length in lengths.values()):
        uneven = ", ".join(f"{k} of {n}" for k, n in lengths.items() if n % ways)
        yield f"layout: context={ways} devices cannot share these sequences evenly: {uneven}"
    # A model without an axis of positions (rotary, say) reads any length
    positions = model_sizes.get("positions", longest)
    if longest > positions:
        yield f"objective: {longest} tokens are more than the model's {positions} positions"
    seq2seq = "encoder_tokens" in shapes
    if seq2seq != (kind_of(model) == "seq2seq"):
        kind = "an encoder and a decoder" if seq2seq else "one sequence"
        name = type(model).__name__
        yield f"objective: {objective} makes examples for {kind}, which {name} does not read"


def _fit_faults(stage: Stage, steps: int) -> Iterator[str]:
    """Why the growth of a stage cannot be fitted to its batches."""
    op = stage.grow
    if isinstance(op, Fit) and op.batches > steps:
        yield (
            f"grow: {op} is fitted to the first {op.batches} batches of its stage, which has {steps}; "
            "give it fewer, or the stage more tokens"
        )


def _context_faults(
    plan: Any, objective: Objective, rows: Sequence[tuple[Work, int, int]]
) -> Iterator[str]:
    """Numbers of drawn tokens that the devices of a sequence cannot share."""
    ways = plan.layout.context
    if ways == 1:
        return
    longest = max(x.shape[1] for x in batch_shapes(objective, 1).values())
    counts = {work.part.count for work, _, _ in rows if isinstance(work.part, RandomTokens)}
    # Sequences that are not longer are read whole
    if uneven := sorted(n for n in counts if n < longest and n % ways):
        numbers = ", ".join(map(str, uneven))
        yield (
            f"subnet: layers that read {numbers} tokens cannot be split over "
            f"context={ways} devices; read a multiple of it"
        )


def _parts_faults(plan: Any, stage: Stage, model: Any, births: Births) -> Iterator[str]:
    """Why the parts of a model cannot be trained as a stage says."""
    parts, growths = stage.parts, int(births.growths)
    if parts is None:
        return
    if not growths:
        yield (
            "train: parts are what growth added and all else, and the model has not grown; let a stage "
            "grow it first, or give Start the operators that it grew by"
        )
        return
    missing = [number for number, _ in parts.growths if number > growths]
    if missing:
        yield f"train: growths: there are {growths} up to here, and no {missing}"
    decays = any(part.decay != 1 for part in parts.named().values())
    if decays and getattr(plan.optimizer, "weight_decay", None) == 0:
        yield "train: decay: the optimizer has no weight_decay to multiply"
    trained = partition(model)[0]
    division = Division(parts, births, lambda slot, growth: np.int32(0))
    try:
        frozen = division.frozen(trained)
    except StateError as error:
        yield f"train: {error}"
        return
    if all(mask.all() for mask in frozen.values()):
        yield "train: nothing is trained: all coordinates are of parts at rate 0"
        return
    rule = plan.optimizer.build()
    second = {} if plan.optimizer.curvature_every is None else {"curvature": trained}

    def update(gradient, state, params, more):
        return divided(rule, rule, division, gradient, state, params, rate=1.0, **more)

    try:
        state = jax.eval_shape(rule.init, trained)
        jax.eval_shape(update, trained, state, trained, second)
    except StateError as error:
        yield "train: " + str(error).replace("\n", "\n    ")


def _ramp_faults(stage: Stage, model: Any, steps: int) -> Iterator[str]:
    """Faults of a stage's ramp: gates need one that fits into the stage, and only gates do."""
    gated = is_gated(model)
    if stage.ramp > steps:
        yield f"the ramp of {stage.ramp} steps is longer than its {steps} steps"
    if stage.ramp and not gated:
        yield "ramp: it grows nothing behind gates, so no gate can open; leave the ramp out"
    if gated and not stage.ramp:
        axes = sorted({s.own_axis for s in axes_of(model).of_kind("gate") if s.arrays()})
        yield f"ramp: it grows {', '.join(axes)} behind gates; say over how many steps they open"
