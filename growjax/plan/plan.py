"""A training run as data: stages that grow the model or train a part of it, checked before it runs.

A `Plan` that exists is valid. Making one works out every stage's shapes, steps and cost without
computing anything, so that a fault in the last stage is found before the first one starts.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from growjax.axes import axes_of, partition, sizes
from growjax.budget import Clock, FlopsClock
from growjax.data.objectives import Objective, batch_shapes
from growjax.data.sources import Source
from growjax.errors import GrowjaxError, PlanError
from growjax.gates import is_gated, ungated
from growjax.growth import Births
from growjax.growth.births import grown_shapes
from growjax.maps import fold_in_name
from growjax.models.protocol import Config, kind_of
from growjax.parallel import Layout
from growjax.plan.losses import Loss, cross_entropy
from growjax.plan.optimizer import Optimizer
from growjax.plan.schedule import Rate
from growjax.plan.stages import Span, Stage, Start, Steps
from growjax.plan.timeline import Era, timeline
from growjax.subnet import PathSchedule
from growjax.values import Range, Size, check, positive, register, short


@register
@dataclasses.dataclass(frozen=True)
class Plan:
    """One training run, from a model's birth to its end.

    **Fields**

    - `name`: what the run is called in reports.
    - `model`: the model that the first stage starts from: a configuration, whose `dtype` and `remat`
      are those of the run, or `Model` for one that growjax did not write.
    - `stages`: what happens, in order.
    - `batch`: sequences per step, over all devices.
    - `objective`: what one sequence is and what is predicted, such as `growjax.data.Causal(128)`.
    - `rate`: the learning rate as a function of the share of the cost that is spent.
    - `optimizer`: how gradients become updates.
    - `clock`: what each step costs: FLOPs, or seconds of a reference machine.
    - `budget`: in the clock's unit, needed if and only if stages are shares of it.
    - `accumulate`: in how many parts, one after the other, each batch is computed.
    - `layout`: how the run is spread over devices.
    - `data`: what it trains on; None if `train` is given its own.
    - `tokenizer`: "bytes", or the path of a `tokenizers` file.
    - `seed`: of the model, its growth, its sub-networks and the order of the data.
    - `loss`: what is minimised, one example to its losses and weights; see `cross_entropy`.
    - `start`: a trained model to start from, instead of drawing one. Whether it has the shapes of `model`
      is seen before the first step; it becomes a larger one by the first stage's `grow` alone.

    Raises `PlanError` that lists every fault.

    **Example**

        Plan("grown", small, (Stage(tokens=400_000), Stage(tokens=400_000, grow=gj.stack(layers=6))),
             batch=16, objective=Causal(128), rate=Schedule(2e-3))
    """

    name: str
    model: Config
    stages: tuple[Stage, ...]
    batch: Size
    objective: Objective
    rate: Rate
    optimizer: Optimizer = Optimizer()
    clock: Clock = FlopsClock()
    budget: Annotated[float, positive()] | None = None
    accumulate: Size = 1
    layout: Layout = Layout()
    data: Source | None = None
    tokenizer: str = "bytes"
    seed: Annotated[
        int, Range("an integer of 0 or more, below 2**31", lambda n: 0 <= n < 2**31)
    ] = 0
    start: Start | None = None
    loss: Loss = cross_entropy

    def __post_init__(self):
        headline = f"plan {short(self.name)} cannot be run:"
        check(self, PlanError, headline, lambda: list(_length_faults(self)) or _fit_faults(self))

    def build(self) -> Any:
        """The model before the first stage, all of its parameters drawn."""
        return birth(self, self.seed)

    @functools.cached_property
    def origin(self) -> Any:
        """The shapes of the model before the first stage."""
        return eqx.filter_eval_shape(self.build)

    @property
    def activations(self) -> str:
        """The type that the model computes in: what its configuration says, or that of its parameters."""
        dtype = getattr(self.model, "dtype", None)
        return dtype or str(jax.tree.leaves(partition(self.origin)[0])[0].dtype)

    def before(self, index: int) -> Any:
        """The shapes of the model that a stage finds, gates included."""
        return self.spans[index - 1].model if index else self.origin

    def key(self, name: str) -> PRNGKeyArray:
        """The key for one purpose: the same in every run of this plan."""
        return purpose_key(self.seed, name)

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """The stages worked out: what a dry run shows."""
        return tuple(_work_out(self))

    def timeline(self, *, paths: bool = False) -> tuple[Era, ...]:
        """The stages by name, with the steps, FLOPs and cost that each begins and ends at.

        With `paths`, each length of a path schedule stands by itself.
        """
        return tuple(timeline(self.spans, paths=paths))

    @functools.cached_property
    def cost(self) -> int:
        """What the clock charges for the whole run, in its whole numbers."""
        return sum(sum(span.costs) for span in self.spans)

    @functools.cached_property
    def flops(self) -> int:
        """Training FLOPs of the whole run."""
        return sum(sum(span.flops) for span in self.spans)

    @functools.cached_property
    def steps(self) -> int:
        """Steps of the whole run."""
        return sum(span.steps for span in self.spans)

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run."""
        return sum(span.steps * span.step_tokens for span in self.spans)

    def learning_rate(self, spent: float) -> float:
        """The learning rate once so much is spent, in the clock's whole numbers.

        A function of cost, not of steps: a stage of small steps must not use up the schedule of the
        dear ones, and every run ends where its schedule does, whatever it cost.
        """
        done, warmup, climb = spent / self.cost, self.rate.warmup, 1.0
        for span in self.spans:
            cost, start = sum(span.costs), span.spent / self.cost
            if span.stage.rewind and span.spent <= spent and start > warmup:
                gone = spent / self.cost - start
                if span.stage.rewind == "stretch":
                    gone *= (1 - warmup) / (1 - start)
                done = warmup + gone
            if span.stage.rewarm and 0 <= spent - span.spent < span.stage.rewarm * cost:
                climb = (spent - span.spent) / (span.stage.rewarm * cost)
        return climb * self.rate.at(done)


def birth(plan: Plan, seed: Any) -> Any:
    """The model before the first stage of a plan, drawn from this seed (or from one that is traced)."""
    model = plan.model.build(purpose_key(seed, "model"))
    for op in plan.start.operators if plan.start else ():
        model = ungated(op(model, key=purpose_key(seed, "grow")))
    return model


def births_at_start(plan: Plan) -> Births:
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


# Faults ------------------------------------------------------------------------------------------


def _length_faults(plan: Plan) -> Iterator[str]:
    if not plan.stages:
        yield "stages: expected at least one"
    if plan.layout.own_paths and any(stage.inactive == "freeze" for stage in plan.stages):
        yield "layout: own_paths: a layer that one replica leaves out runs on another; freeze none"
    shares = [stage.share for stage in plan.stages if stage.share is not None]
    if shares and plan.budget is None:
        yield "budget: the stages are shares of it, so it must be given"
    elif not shares and plan.budget is not None:
        yield "budget: no stage is a share of it, so the stages decide; leave it out"
    if plan.clock.unit != "seconds" and any(s.seconds is not None for s in plan.stages):
        yield f"clock: it charges {plan.clock.unit}, and stages last seconds; give a reference clock"
    if plan.optimizer.curvature_every is not None and plan.loss is not cross_entropy:
        yield (
            f"optimizer: {plan.optimizer.name} draws labels from what the model predicts; that goes with "
            "cross_entropy, and not with a loss of one's own"
        )
    if shares and (len(shares) < len(plan.stages) or abs(sum(shares) - 1) > 1e-6):
        yield f"stages: every one must have a share and all together 1, got {shares}"


def _fit_faults(plan: Plan) -> list[str]:
    """Everything that only shows once the stages are worked out, up to the first that cannot be."""
    faults: list[str] = []
    spans = _work_out(plan, faults)
    plan.__dict__["spans"] = tuple(spans)  # what the cached property would do over again
    return faults


def _work_out(plan: Plan, faults: list[str] | None = None) -> list[Span]:
    """Work out every stage from shapes alone, and add what does not fit to `faults`."""
    faults = [] if faults is None else faults
    spans: list[Span] = []
    try:
        model, births = plan.origin, births_at_start(plan)
    except GrowjaxError as error:
        where = "model" if plan.start is None else "start"
        faults.append(f"{where}: " + str(error).replace("\n", "\n    "))
        return spans
    except Exception as error:  # whatever a function of the user's own does
        faults.append(f"model: {plan.model!r} cannot be built: {type(error).__name__}: {error}")
        return spans
    start, tokens, spent, share = 0, 0, 0, 0.0
    grown_at = (0,) * (int(births.growths) + 1)
    for n, stage in enumerate(plan.stages):
        where = f"stage {n} {stage.name!r}: "
        model = ungated(model)
        batch, objective = stage.batch or plan.batch, stage.objective or plan.objective
        try:
            if stage.grow is not None:
                births, grown_at = births.grown(stage.grow, model), (*grown_at, start)
                model = eqx.filter_eval_shape(stage.grow, model, key=plan.key("grow"))
            misfits = list(_shape_faults(plan, batch, objective, model))
            if not misfits and stage.objective is not None:
                # Held-out losses are taken through the plan's own, at every stage
                own = _shape_faults(plan, batch, plan.objective, model)
                misfits = [f"the plan's own, for held-out losses: {fault}" for fault in own]
            if misfits:
                faults += [where + fault for fault in misfits]
                continue
            share += stage.share or 0.0
            # Shares count from the start, so that a stage makes up for its forerunner's rounding
            left = share * (plan.budget or 0.0) * plan.clock.per_unit - spent
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
            done = list(steps.until(*_limit(plan, stage, batch * objective.raw_length, left)))
        except GrowjaxError as error:
            faults.append(where + str(error).replace("\n", "\n    "))
            return spans
        except Exception as error:  # of a model, loss, operator or objective of the user's own
            faults.append(f"{where}{type(error).__name__}: {error}")
            return spans
        faults += [where + fault for fault in _ramp_faults(stage, model, len(done))]
        works, flops, costs = (tuple(column) for column in zip(*done, strict=True))
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
        )
        spans.append(span)
        start, spent = start + len(costs), spent + sum(costs)
        tokens += len(costs) * span.step_tokens
    return spans


def _limit(
    plan: Plan, stage: Stage, step_tokens: int, left: float
) -> tuple[Literal["steps", "flops", "cost"], float]:
    """How long a stage lasts, and in what that is counted."""
    if isinstance(stage.subnet, PathSchedule):
        return "steps", stage.subnet.stages[-1].stop
    if stage.tokens is not None:
        return "steps", max(round(stage.tokens / step_tokens), 1)
    if stage.flops is not None:
        return "flops", stage.flops
    return "cost", left if stage.seconds is None else stage.seconds * plan.clock.per_unit


def _shape_faults(plan: Plan, batch: int, objective: Objective, model: Any) -> Iterator[str]:
    known = sizes(model)
    if batch % plan.accumulate:
        yield f"batch: {batch} sequences cannot be computed in {plan.accumulate} equal parts"
    shapes = batch_shapes(objective, 1)
    longest = max(x.shape[1] for x in shapes.values())
    if longest > known.get("positions", longest):
        yield f"objective: {longest} tokens are more than the model's {known['positions']} positions"
    seq2seq = "encoder_tokens" in shapes
    if seq2seq != (kind_of(model) == "seq2seq"):
        kind = "an encoder and a decoder" if seq2seq else "one sequence"
        name = type(model).__name__
        yield f"objective: {objective} makes examples for {kind}, which is not what {name} reads"


def reference_faults(plan: Plan, reference: Any) -> Iterator[str]:
    """Why a second model cannot look at what the stages of a plan choose from, from shapes alone.

    A plan with a loss of its own says itself what it reads; it is not looked into.
    """
    for span in plan.spans if plan.loss is cross_entropy else ():
        if span.stage.select is None or not span.stage.select.compares:
            continue
        where = f"stage {span.index} {span.stage.name!r}: reference: "
        for fault in _shape_faults(plan, span.batch, span.objective, reference):
            yield where + fault
        mine, theirs = span.sizes.get("vocab"), sizes(reference).get("vocab")
        if mine != theirs:
            yield f"{where}it knows {theirs} words, and the model that trains {mine}"


def _ramp_faults(stage: Stage, model: Any, steps: int) -> Iterator[str]:
    fresh = is_gated(model)
    if stage.ramp > steps:
        yield f"the ramp of {stage.ramp} steps is longer than its {steps} steps"
    if stage.ramp and not fresh:
        yield "ramp: it grows nothing behind gates, so there is nothing to open"
    if fresh and not stage.ramp:
        axes = sorted({s.own_axis for s in axes_of(model).of_kind("gate") if s.arrays()})
        yield f"ramp: it grows {', '.join(axes)} behind gates; say over how many steps they open"
