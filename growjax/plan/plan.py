"""A training run as data: stages that grow the model or train a part of it, checked before it runs.

A `Plan` that exists is valid. Its constructor derives every stage's shapes, steps and cost by abstract
evaluation, so that a fault in the last stage is reported before the first one starts.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from growjax.axes import axes_of, partition, sizes
from growjax.budget import Clock, FlopsClock, clock_faults
from growjax.data.blend import Blend
from growjax.data.objectives import Objective, batch_shapes
from growjax.data.sources import Source
from growjax.errors import GrowjaxError, PlanError, StateError, raised
from growjax.gates import is_gated, ungated
from growjax.growth import Births
from growjax.growth.births import grown_shapes
from growjax.maps import fold_in_name
from growjax.models.protocol import Config, kind_of
from growjax.optim.divided import Division
from growjax.optim.partwise import divided
from growjax.optim.transfer import Transfer
from growjax.parallel import Layout
from growjax.plan.losses import Loss, cross_entropy
from growjax.plan.optimizer import Optimizer
from growjax.plan.schedule import Rate, Warmup
from growjax.plan.stages import Fork, Span, Stage, Start, Steps
from growjax.plan.timeline import Era, timeline
from growjax.plan.transfer import transfer_faults
from growjax.subnet import PathSchedule
from growjax.values import File, Name, Range, Size, check, positive, register, short


# The most stages of a plan. Each is worked out when the plan is checked, which takes some milliseconds.
_STAGES = 1000


@register
@dataclasses.dataclass(frozen=True)
class Plan:
    """One training run, from a model's birth to its end.

    **Fields**

    - `name`: the name of the run in reports.
    - `model`: the model that the first stage starts from: a configuration, whose `dtype` and `remat`
      are those of the run, or `Model` for one that growjax did not write.
    - `stages`: the stages, in order.
    - `batch`: sequences per step, over all devices.
    - `objective`: the length of a sequence and its targets, such as `growjax.data.Causal(128)`.
    - `rate`: the learning rate as a function of the share of the cost that is spent.
    - `optimizer`: how gradients become updates.
    - `clock`: the price list of the run's operations: in FLOPs, or in seconds of a reference machine.
    - `budget`: in the clock's unit; required if stages are shares of it, and refused otherwise.
    - `accumulate`: the number of parts in which each batch is computed, one after the other.
    - `layout`: how the run is spread over devices.
    - `data`: the source of the text, or a `Blend` of several; None if `train` is given a feed.
    - `validation`: the source of the held-out text; None holds out a part of `data`.
    - `tokenizer`: "bytes", or the path of a `tokenizers` file.
    - `seed`: the seed of the model, its growth, its sub-networks and the order of the data.
    - `loss`: the function that is minimised: (model, example) to losses and weights, as `cross_entropy`.
    - `start`: a trained model to start from, instead of a drawn one. Its shapes are compared with those
      of `model` before the first step; only the first stage's `grow` can make it larger.
    - `fork`: a run to go on from, with its whole state; the plan's first steps are those of that run.
    - `transfer`: the model that the rate was tuned for, if it is to transfer over width and depth.

    Raises `PlanError` that lists every fault.

    **Example**

        Plan("grown", small, (Stage(tokens=400_000), Stage(tokens=400_000, grow=gj.stack(layers=6))),
             batch=16, objective=Causal(128), rate=Schedule(2e-3))
    """

    name: Name
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
    data: Source | Blend | None = None
    tokenizer: File = "bytes"
    seed: Annotated[
        int, Range("an integer of 0 or more, below 2**31", lambda n: 0 <= n < 2**31)
    ] = 0
    start: Start | None = None
    loss: Loss = cross_entropy
    fork: Fork | None = None
    transfer: Transfer | None = None
    validation: Source | Blend | None = None

    def __post_init__(self):
        headline = f"plan {short(self.name)} cannot be run:"
        # The stages are worked out only if their lengths are given in a consistent way
        check(self, PlanError, headline, lambda: list(_length_faults(self)) or _fit_faults(self))

    def build(self) -> Any:
        """Draw the parameters of the model before the first stage."""
        return birth(self, self.seed)

    @functools.cached_property
    def origin(self) -> Any:
        """The shapes of the model before the first stage."""
        return eqx.filter_eval_shape(self.build)

    @property
    def activations(self) -> str:
        """The dtype of the activations: that of the configuration, or else that of the parameters."""
        dtype = getattr(self.model, "dtype", None)
        return dtype or str(jax.tree.leaves(partition(self.origin)[0])[0].dtype)

    def model_before(self, index: int) -> Any:
        """The shapes of the model when stage `index` begins, before it grows; gates included."""
        return self.spans[index - 1].model if index else self.origin

    def key(self, name: str) -> PRNGKeyArray:
        """The random key for one purpose, "model" or "grow": the same in every run of this plan."""
        return purpose_key(self.seed, name)

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """The stages with their steps, FLOPs and costs worked out."""
        return tuple(_work_out(self))

    def timeline(self, *, paths: bool = False) -> tuple[Era, ...]:
        """The stages by name, with the step, FLOPs and cost at the start and the end of each.

        With `paths`, each length of a path schedule is an entry of its own.
        """
        return tuple(timeline(self.spans, paths=paths))

    @functools.cached_property
    def cost(self) -> int:
        """The cost of the whole run, in the clock's smallest unit (one FLOP, or one nanosecond)."""
        return sum(span.charged + sum(span.costs) for span in self.spans)

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
        """The learning rate at a cost spent so far, in the clock's smallest unit.

        The rate follows cost and not steps: a stage of cheap steps must not use up the schedule of the
        expensive ones, and every run ends at the end of its schedule.
        """
        rate, warm = self._rate
        # `done`: the position in the schedule, a share of the whole cost; `climb`: the factor of a rewarm
        done, warmup, climb = spent / self.cost, rate.warmup, 1.0
        for span, cost in zip(self.spans, self._span_costs, strict=True):
            start = span.spent / self.cost
            # A stage that began already and rewinds starts at the end of the warmup; the last one counts
            if span.stage.rewind and span.spent <= spent and start > warmup:
                since = spent / self.cost - start
                if span.stage.rewind == "stretch":
                    # The rest of the run covers all of the schedule after its warmup
                    since *= (1 - warmup) / (1 - start)
                done = warmup + since
            if span.stage.rewarm and 0 <= spent - span.spent < span.stage.rewarm * cost:
                climb = (spent - span.spent) / (span.stage.rewarm * cost)
        # The warmup divides costs and not shares, so that plans of other budgets warm up by the same bits
        return climb * (rate.rising(spent / warm) if spent < warm else rate.at(done))

    @functools.cached_property
    def _span_costs(self) -> tuple[int, ...]:
        """The cost of each stage; cached, since `learning_rate` is called at every step."""
        return tuple(sum(span.costs) for span in self.spans)

    @functools.cached_property
    def _rate(self) -> tuple[Any, int]:
        """The rate, its warmup as a share, and the cost at which a `Warmup` ends (0 without one)."""
        warmup: Any = self.rate.warmup
        if not isinstance(warmup, Warmup):
            return self.rate, 0
        warm = _warmup_cost(self, warmup)
        rate: Any = self.rate
        return dataclasses.replace(rate, warmup=warm / self.cost), warm


def _warmup_cost(plan: Plan, warmup: Warmup) -> int:
    """The cost of a warmup of steps or tokens; raises `PlanError` if it does not end before the plan."""
    steps, tokens, cost = 0, 0, 0
    for span in plan.spans:
        cost += span.charged
        for step_cost in span.costs:
            over = tokens >= warmup.tokens if warmup.tokens is not None else steps == warmup.steps
            if over:
                return cost
            steps, tokens, cost = steps + 1, tokens + span.step_tokens, cost + step_cost
    raise PlanError(
        f"rate: {warmup} does not end before the plan: {steps} steps, {tokens:,} tokens"
    )


def birth(plan: Plan, seed: Any) -> Any:
    """The model before the first stage of a plan, drawn from this seed (a number or a tracer)."""
    model = plan.model.build(purpose_key(seed, "model"))
    if plan.transfer is not None:
        model = plan.transfer.born(model)
    # The growth of a trained model before this plan. Its parameters are read from `start.folder` later;
    # here it has the same shapes.
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
    """Fields that contradict each other, before any stage is worked out."""
    wrong = list(clock_faults(plan.clock))
    yield from (f"clock: {type(plan.clock).__name__}.{fault}" for fault in wrong)
    if not plan.stages:
        yield "stages: expected at least one"
    if len(plan.stages) > _STAGES:
        yield f"stages: expected at most {_STAGES:,}, got {len(plan.stages):,}"
    if plan.validation is not None and plan.data is None:
        yield "validation: the plan names no data to train on; give `train` a feed with both"
    if plan.layout.own_paths and any(stage.inactive == "freeze" for stage in plan.stages):
        yield "layout: own_paths: a layer that one replica leaves out runs on another; freeze none"
    shares = [stage.share for stage in plan.stages if stage.share is not None]
    if shares and plan.budget is None:
        yield "budget: the stages are shares of it, so it must be given"
    elif not shares and plan.budget is not None:
        yield "budget: no stage is a share of it, so the stages decide; leave it out"
    if (
        not wrong
        and plan.clock.unit != "seconds"
        and any(s.seconds is not None for s in plan.stages)
    ):
        yield f"clock: it charges {plan.clock.unit}, and stages last seconds; give a reference clock"
    if plan.optimizer.curvature_every is not None and plan.loss is not cross_entropy:
        yield (
            f"optimizer: {plan.optimizer.name} draws labels from the model's predictions, so it needs "
            "the loss cross_entropy, and not another"
        )
    if plan.transfer is not None:
        yield from transfer_faults(plan.transfer, plan.optimizer, plan.stages)
    if shares and (len(shares) < len(plan.stages) or abs(sum(shares) - 1) > 1e-6):
        yield f"stages: every one must have a share and all together 1, got {shares}"


def _fit_faults(plan: Plan) -> list[str]:
    """Faults of the stages once they are worked out, up to the first stage that cannot be."""
    faults: list[str] = []
    spans = _work_out(plan, faults)
    # Fills the cached property, which would work everything out again
    plan.__dict__["spans"] = tuple(spans)
    if not faults and plan.cost == 0:
        faults.append(
            f"clock: {plan.clock.identity!r} charges nothing for any step, and the learning rate follows "
            "the cost; give the steps a price, or use FlopsClock()"
        )
    elif not faults:
        try:
            plan.learning_rate(0)
        except PlanError as error:
            faults.append(str(error))
    return faults


def _work_out(plan: Plan, faults: list[str] | None = None) -> list[Span]:
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
            if stage.grow is not None:
                births, grown_at = births.grown(stage.grow, model), (*grown_at, start)
                model = eqx.filter_eval_shape(stage.grow, model, key=plan.key("grow"))
            misfits = list(_shape_faults(plan, batch, objective, model))
            if plan.transfer is not None:
                misfits += [f"transfer: {fault}" for fault in plan.transfer.faults(model)]
            if not misfits and stage.objective is not None:
                # Held-out losses are computed with the plan's own objective, at every stage
                own = _shape_faults(plan, batch, plan.objective, model)
                misfits = [f"the plan's own, for held-out losses: {fault}" for fault in own]
            if misfits:
                faults += [where + fault for fault in misfits]
                continue
            charged = round(stage.charge * plan.clock.per_unit)
            spent += charged
            share += stage.share or 0.0
            # From the shares of all stages so far, so that a stage makes up for earlier rounding
            left = share * (plan.budget or 0.0) * plan.clock.per_unit - spent
            if charged and stage.share is not None and left <= 0:
                raise PlanError(
                    f"charge: {stage.charge:g} leaves nothing of its share for its steps"
                )
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
            rows = list(steps.until(*_limit(plan, stage, batch * objective.raw_length, left)))
        except GrowjaxError as error:
            faults.append(where + str(error).replace("\n", "\n    "))
            return spans
        except Exception as error:
            # The user's own model, loss, operator or objective may raise anything
            faults.append(where + raised(error))
            return spans
        faults += [where + fault for fault in _ramp_faults(stage, model, len(rows))]
        faults += [where + fault for fault in _parts_faults(plan, stage, model, births)]
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
        )
        spans.append(span)
        start, spent = start + len(costs), spent + sum(costs)
        tokens += len(costs) * span.step_tokens
    return spans


def _limit(
    plan: Plan, stage: Stage, step_tokens: int, left: float
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


def _shape_faults(plan: Plan, batch: int, objective: Objective, model: Any) -> Iterator[str]:
    """Faults of a batch and an objective with the shapes of a model."""
    model_sizes = sizes(model)
    if batch % plan.accumulate:
        yield f"batch: {batch} sequences cannot be computed in {plan.accumulate} equal parts"
    shapes = batch_shapes(objective, 1)
    longest = max(x.shape[1] for x in shapes.values())
    # A model without an axis of positions (rotary, say) reads any length
    positions = model_sizes.get("positions", longest)
    if longest > positions:
        yield f"objective: {longest} tokens are more than the model's {positions} positions"
    seq2seq = "encoder_tokens" in shapes
    if seq2seq != (kind_of(model) == "seq2seq"):
        kind = "an encoder and a decoder" if seq2seq else "one sequence"
        name = type(model).__name__
        yield f"objective: {objective} makes examples for {kind}, which {name} does not read"


def reference_faults(plan: Plan, reference: Any) -> Iterator[str]:
    """Faults of a second model that the selectors of a plan compare with, from shapes alone.

    `reference` is None where there is none. The shapes are not checked for a plan with a loss of its own,
    which may read a batch in any way.
    """
    spans = [s for s in plan.spans if s.stage.select is not None and s.stage.select.compares]
    if reference is None and spans:
        yield (
            "reference: a stage's selector compares with a second model; give it one (`--reference "
            "FOLDER` on the command line)"
        )
    for span in spans if reference is not None and plan.loss is cross_entropy else ():
        where = f"stage {span.index} {span.stage.name!r}: reference: "
        for fault in _shape_faults(plan, span.batch, span.objective, reference):
            yield where + fault
        mine, theirs = span.sizes.get("vocab"), sizes(reference).get("vocab")
        if mine != theirs:
            yield f"{where}its vocabulary has {theirs} words, and that of the trained model {mine}"


def _parts_faults(plan: Plan, stage: Stage, model: Any, births: Births) -> Iterator[str]:
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
