"""A training run as data: stages that grow the model or train a part of it, checked before it runs.

A `Plan` that exists is valid. Its constructor derives every stage's shapes, steps and cost by abstract
evaluation, so that a fault in the last stage is reported before the first one starts.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from growjax.axes import partition, sizes
from growjax.budget import Clock, FlopsClock, clock_faults
from growjax.data.blend import Blend
from growjax.data.objectives import Objective
from growjax.data.sources import Source
from growjax.errors import PlanError
from growjax.growth import atoms
from growjax.models.protocol import Config
from growjax.optim.transfer import Transfer
from growjax.parallel import Layout
from growjax.plan.losses import Loss, cross_entropy
from growjax.plan.optimizer import Optimizer
from growjax.plan.schedule import Rate, Warmup
from growjax.plan.stages import Fork, Span, Stage, Start
from growjax.plan.timeline import Era, timeline
from growjax.plan.worked import birth, purpose_key, shape_faults, work_out
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
        return tuple(work_out(self))

    @property
    def block(self) -> int:
        """The tokens of the text that are shuffled as one unit: the longest window of all stages."""
        return max(span.objective.raw_length for span in self.spans)

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
        """Training FLOPs of the whole run, with those of fits."""
        return sum(span.fit_flops + sum(span.flops) for span in self.spans)

    @functools.cached_property
    def steps(self) -> int:
        """Steps of the whole run."""
        return sum(span.steps for span in self.spans)

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run, with those of fits."""
        return sum(span.fit_tokens + span.steps * span.step_tokens for span in self.spans)

    def learning_rate(self, spent: float) -> float:
        """The learning rate at a cost spent so far, in the clock's smallest unit.

        The rate follows cost and not steps: a stage of cheap steps must not use up the schedule of the
        expensive ones, and every run ends at the end of its schedule.
        """
        if self._before is not None and spent <= self._fired:
            return self._before.learning_rate(spent)
        rate, warm = self._rate
        # `done`: the position in the schedule, a share of the whole cost; `climb`: the factor of a rewarm
        done, warmup, climb = self._position(spent), rate.warmup, 1.0
        for span, cost in zip(self.spans, self._span_costs, strict=True):
            start = self._position(span.spent)
            # A stage that began already and rewinds starts at the end of the warmup; the last one counts
            if span.stage.rewind and span.spent <= spent and start > warmup:
                since = self._position(spent) - start
                if span.stage.rewind == "stretch":
                    # The rest of the run covers all of the schedule after its warmup
                    since *= (1 - warmup) / (1 - start)
                done = warmup + since
            if span.stage.rewarm and 0 <= spent - span.spent < span.stage.rewarm * cost:
                climb = (spent - span.spent) / (span.stage.rewarm * cost)
        # The warmup divides costs and not shares, so that plans of other budgets warm up by the same bits
        return climb * (rate.rising(spent / warm) if spent < warm else rate.at(done))

    def rises(self, spent: float, stage: int) -> bool:
        """Whether the learning rate rises at a cost spent so far: the plan's warm-up, or the stage's."""
        span, cost = self.spans[stage], self._span_costs[stage]
        rate, warm = self._rate
        # As in `learning_rate`: a `Warmup` ends at a cost, and one that is a share at a position
        warming = spent < warm if warm else self._position(spent) < rate.warmup
        return warming or spent - span.spent < span.stage.rewarm * cost

    def ended(self, stage: int, steps: int) -> "Plan":
        """The plan once a trigger has ended a stage after some steps.

        It is an ordinary plan: by itself it trains the same run, without looking at a loss.
        """
        return self.with_stage(stage, dataclasses.replace(self.stages[stage], ended=steps))

    @property
    def ends(self) -> tuple[tuple[int, int], ...]:
        """The stages that triggers have ended, each with its number of steps."""
        return tuple((n, s.ended) for n, s in enumerate(self.stages) if s.ended is not None)

    @property
    def unended(self) -> "Plan":
        """The plan before any trigger has fired, which is the same for all runs of it."""
        stages = tuple(dataclasses.replace(stage, ended=None) for stage in self.stages)
        return dataclasses.replace(self, stages=stages) if self.ends else self

    def following(self, other: "Plan", step: int | None = None) -> "Plan":
        """The plan with the ends that triggers have given to stages of the same place in another plan.

        With a `step`, only of stages that were over before it.
        """
        plan = self
        for n, steps in other.ends:
            mine = self.stages[n] if n < len(self.stages) else None
            if mine is None or mine.ended is not None or mine.until != other.stages[n].until:
                continue
            if step is None or other.spans[n].start + steps <= step:
                plan = plan.ended(n, steps)
        return plan

    def with_stage(self, index: int, stage: Stage) -> "Plan":
        """The plan with another stage in the place of stage `index`."""
        stages = (*self.stages[:index], stage, *self.stages[index + 1 :])
        return dataclasses.replace(self, stages=stages)

    @functools.cached_property
    def _before(self) -> "Plan | None":
        """The plan before its last trigger has fired, whose learning rates count until then."""
        last = self._last_ended
        if last is None:
            return None
        return self.with_stage(last, dataclasses.replace(self.stages[last], ended=None))

    @functools.cached_property
    def _last_ended(self) -> int | None:
        """The last stage that a trigger has ended."""
        return self.ends[-1][0] if self.ends else None

    @functools.cached_property
    def _fired(self) -> int:
        """The cost spent when the last trigger fired."""
        assert self._last_ended is not None
        return self.spans[self._last_ended].spent + self._span_costs[self._last_ended]

    def _position(self, spent: float) -> float:
        """The position in the schedule, from 0 to 1: the share of the cost that is spent.

        A trigger changes the cost of the run. The rest of the run then covers the rest of the schedule.
        """
        if self._before is None:
            return spent / self.cost
        if spent <= self._fired:
            return self._before._position(spent)
        done = self._before._position(self._fired)
        return done + (1 - done) * (spent - self._fired) / (self.cost - self._fired)

    @functools.cached_property
    def _span_costs(self) -> tuple[int, ...]:
        """The cost of each stage; cached, since `learning_rate` is called at every step."""
        return tuple(sum(span.costs) for span in self.spans)

    @functools.cached_property
    def _rate(self) -> tuple[Any, int]:
        """The rate, its warmup as a share, and the cost at which a `Warmup` ends (0 without one)."""
        if self._before is not None:
            return self._before._rate
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
        cost, tokens = cost + span.charged, tokens + span.fit_tokens
        for step_cost in span.costs:
            over = tokens >= warmup.tokens if warmup.tokens is not None else steps == warmup.steps
            if over:
                return cost
            steps, tokens, cost = steps + 1, tokens + span.step_tokens, cost + step_cost
    raise PlanError(
        f"rate: {warmup} does not end before the plan: {steps} steps, {tokens:,} tokens"
    )


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
        yield from _transfer_faults(plan.transfer, plan.optimizer, plan.stages)
    if shares and (len(shares) < len(plan.stages) or abs(sum(shares) - 1) > 1e-6):
        yield f"stages: every one must have a share and all together 1, got {shares}"


# The rules whose updates have a size of their own, whatever the size of the gradients
_OWN_SIZE = ("adamw", "nadamw", "ademamix", "lion")


def _transfer_faults(
    transfer: Transfer, optimizer: Optimizer, stages: Sequence[Stage]
) -> Iterator[str]:
    """The reasons why rates do not transfer with an optimizer and through the growths of some stages."""
    if optimizer.name not in _OWN_SIZE:
        yield (
            f"transfer: the updates of {optimizer.name} do not have a size of their own; use "
            f"{', '.join(_OWN_SIZE[:-1])} or {_OWN_SIZE[-1]}"
        )
    elif optimizer.scale_by_parameter:
        yield "transfer: scale_by_parameter scales updates by the weights, as transfer does; use one"
    for n, stage in enumerate(stages if transfer.depth else ()):
        operators = () if stage.grow is None else atoms(stage.grow)
        if any(getattr(op, "init", None) == "born" for op in operators):
            yield (
                f"transfer: stage {n} {stage.name!r}: fresh layers would be drawn without the multiple "
                "of the depth; draw them like the old ones, by gj.fresh(init='matched')"
            )


def _fit_faults(plan: Plan) -> list[str]:
    """Faults of the stages once they are worked out, up to the first stage that cannot be."""
    faults: list[str] = []
    spans = work_out(plan, faults)
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
        for fault in shape_faults(plan, span.batch, span.objective, reference):
            yield where + fault
        mine, theirs = span.sizes.get("vocab"), sizes(reference).get("vocab")
        if mine != theirs:
            yield f"{where}its vocabulary has {theirs} words, and that of the trained model {mine}"
