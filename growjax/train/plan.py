"""A training run as data: stages that grow the model or train a part of it, checked before it runs.

A `Plan` that exists is valid. Making one works out every stage's shapes, steps and cost without
computing anything, so that a fault in the last stage is found before the first one starts.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from growjax.axes import axes_of, put, sizes
from growjax.cost import training_flops_per_token
from growjax.errors import GrowjaxError, PlanError, raise_all
from growjax.growth import Chain, Operator
from growjax.maps import fold_in_name
from growjax.models import GPT, GPTConfig
from growjax.subnet import PathSchedule, RandomPath, Subnet


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a plan: grow first (or not), then train for a while.

    **Fields**

    - `name`: what it is called in reports.
    - `tokens`: how long it lasts, in training tokens; or
    - `share`: the same as a share of the plan's `budget`. A `PathSchedule` says it itself.
    - `grow`: the operator that the stage starts with.
    - `ramp`: over how many of its first steps the gates that `grow` added open linearly, from
      1/ramp to 1. The stage is at least as long.
    - `subnet`: trains only this part of the model. A `PathSchedule`'s steps count from the stage's
      first. Layers that are skipped by a coin of their own (`mode="bernoulli"`, progressive layer
      drop) are charged as if they ran: no draw is cheaper than another.
    """

    name: str = ""
    tokens: int | None = None
    share: float | None = None
    grow: Operator | Chain | None = None
    ramp: int = 0
    subnet: Subnet | PathSchedule | None = None

    def part(self, i: int, seed: int) -> Subnet | None:
        """The sub-network of the stage's step `i`; equal ones share one program."""
        if isinstance(self.subnet, PathSchedule | RandomPath):
            return self.subnet.at(i, seed=seed)
        return self.subnet

    def level(self, i: int) -> float:
        """How far the gates are open at the stage's step `i`."""
        return min((i + 1) / self.ramp, 1.0) if self.ramp else 1.0


class Span(NamedTuple):
    """A stage with everything worked out.

    `start` is its first step, `flops[i]` the training FLOPs of its step i, `sizes` what it trains at.
    """

    stage: Stage
    start: int
    flops: tuple[int, ...]
    sizes: dict[str, int]

    @property
    def steps(self) -> int:
        return len(self.flops)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One training run, from a model's birth to a learning rate of zero.

    **Fields**

    - `name`: what the run is called in reports.
    - `model`: the model that the first stage starts from.
    - `stages`: what happens, in order.
    - `batch`, `length`: sequences per step, and tokens per sequence.
    - `peak`: the highest learning rate.
    - `warmup`: the share of the FLOPs over which it rises to there; it falls to 0 over the rest.
    - `budget`: training FLOPs, needed if and only if the stages are shares of it.
    - `b2`: Adam's memory of squared gradients; short runs want a short one.
    - `weight_decay`: of the matrices, per unit of learning rate.
    - `seed`: of the model, its growth and its sub-networks.

    Raises `PlanError` that lists every fault.

    **Example**

        Plan("grown", small, (Stage(tokens=400_000), Stage(tokens=400_000, grow=gj.stack(layers=6))),
             batch=16, length=128, peak=2e-3)
    """

    name: str
    model: GPTConfig
    stages: tuple[Stage, ...]
    batch: int
    length: int
    peak: float
    warmup: float = 0.05
    budget: float | None = None
    b2: float = 0.95
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self):
        faults = list(_length_faults(self))
        for n, stage in enumerate(self.stages):
            faults += [f"stage {n} {stage.name!r}: {fault}" for fault in _stage_faults(stage)]
        faults = [*_rate_faults(self), *(faults or _fit_faults(self))]
        raise_all(PlanError, f"plan {self.name!r} cannot be run:", faults)

    def build(self) -> GPT:
        """The model at birth."""
        return GPT(self.model, key=self.key("model"))

    def key(self, name: str) -> PRNGKeyArray:
        """The key for one purpose: the same in every run of this plan."""
        return fold_in_name(jax.random.key(self.seed), name)

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """The stages worked out: what a dry run shows."""
        return tuple(_dry_run(self))

    @functools.cached_property
    def flops(self) -> int:
        """Training FLOPs of the whole run."""
        return sum(sum(span.flops) for span in self.spans)

    @functools.cached_property
    def steps(self) -> int:
        """Steps of the whole run."""
        return sum(span.steps for span in self.spans)

    def learning_rate(self, spent: float) -> float:
        """The learning rate at `spent` FLOPs: up to the peak and down to 0 at the plan's own end.

        A function of cost, not of steps: a stage of small steps must not use up the schedule of the
        dear ones, and every run ends fully decayed, whatever it cost.
        """
        done = spent / self.flops
        rise = done / self.warmup if self.warmup else 1.0
        return self.peak * max(min(rise, (1 - done) / (1 - self.warmup)), 0.0)


def is_gated(model: Any) -> bool:
    """Whether any axis of the model is behind gates."""
    return any(slot.arrays() for slot in axes_of(model).of_kind("gate"))


def settled(model: Any) -> Any:
    """The model without its gates, also for shapes, which have no levels that could be checked."""
    return put(model, {slot.steps: None for slot in axes_of(model).of_kind("gate")})


# Faults ------------------------------------------------------------------------------------------


def _rate_faults(plan: Plan) -> Iterator[str]:
    if not plan.peak > 0:
        yield f"peak: expected a positive learning rate, got {plan.peak!r}"
    if not 0 <= plan.warmup < 1:
        yield f"warmup: expected a share of the run from 0 to below 1, got {plan.warmup!r}"
    if not 0 <= plan.b2 < 1:
        yield f"b2: expected a rate from 0 to below 1, got {plan.b2!r}"
    if plan.weight_decay < 0:
        yield f"weight_decay: expected 0 or more, got {plan.weight_decay!r}"


def _length_faults(plan: Plan) -> Iterator[str]:
    for field, value in [("batch", plan.batch), ("length", plan.length)]:
        if not isinstance(value, int) or value < 1:
            yield f"{field}: expected a positive integer, got {value!r}"
    if not plan.stages:
        yield "stages: expected at least one"
    shares = [stage.share for stage in plan.stages if stage.share is not None]
    if shares and plan.budget is None:
        yield "budget: the stages are shares of it, so it must be given"
    elif not shares and plan.budget is not None:
        yield "budget: no stage is a share of it, so the stages' tokens decide; leave it out"
    elif plan.budget is not None and not plan.budget > 0:
        yield f"budget: expected a positive number of FLOPs, got {plan.budget!r}"
    if shares and (len(shares) < len(plan.stages) or abs(sum(shares) - 1) > 1e-6):
        yield f"stages: every one must have a share and all together 1, got {shares}"
    if plan.length > plan.model.positions and plan.model.position == "learned":
        yield f"length: {plan.length} is longer than the model's {plan.model.positions} positions"


def _stage_faults(stage: Stage) -> Iterator[str]:
    scheduled = isinstance(stage.subnet, PathSchedule)
    given = [what for what in ("tokens", "share") if getattr(stage, what) is not None]
    if scheduled and given:
        yield f"its path schedule says how long it is; leave {' and '.join(given)} out"
    elif not scheduled and len(given) != 1:
        yield f"expected either tokens or share, got {' and '.join(given) or 'neither'}"
    if stage.tokens is not None and stage.tokens < 1:
        yield f"tokens: expected a positive number, got {stage.tokens!r}"
    if stage.share is not None and not stage.share > 0:
        yield f"share: expected a positive number, got {stage.share!r}"
    if stage.grow is not None and not isinstance(stage.grow, Operator | Chain):
        yield f"grow: expected an operator such as gj.msg(mlp=2048), got {stage.grow!r}"
    if not (stage.subnet is None or scheduled or isinstance(stage.subnet, Subnet)):
        yield f"subnet: expected one such as gj.random_path(6), got {stage.subnet!r}"
    if not isinstance(stage.ramp, int) or stage.ramp < 0:
        yield f"ramp: expected a number of steps, got {stage.ramp!r}"


def _steps(plan: Plan, tokens: int) -> int:
    return max(round(tokens / (plan.batch * plan.length)), 1)


def _fit_faults(plan: Plan) -> list[str]:
    """Everything that only shows once the stages are worked out, up to the first that cannot be."""
    faults: list[str] = []
    spans = _dry_run(plan, faults)
    plan.__dict__["spans"] = tuple(spans)  # what the cached property would do over again
    return faults


def _dry_run(plan: Plan, faults: list[str] | None = None) -> list[Span]:
    """Work out every stage from shapes alone, and add what does not fit to `faults`."""
    faults = [] if faults is None else faults
    model = eqx.filter_eval_shape(GPT, plan.model, key=plan.key("model"))
    spans: list[Span] = []
    start, spent, share = 0, 0, 0.0
    for n, stage in enumerate(plan.stages):
        where = f"stage {n} {stage.name!r}: "
        model = settled(model)
        try:
            if stage.grow is not None:
                model = eqx.filter_eval_shape(stage.grow, model, key=plan.key("grow"))
            flops = _Costs(plan, stage, model)
            if stage.tokens is not None:
                costs = [flops[i] for i in range(_steps(plan, stage.tokens))]
            elif isinstance(stage.subnet, PathSchedule):
                costs = [flops[i] for i in range(stage.subnet.stages[-1].stop)]
            else:
                share += stage.share or 0.0
                costs = _until(flops, share * (plan.budget or 0.0) - spent)
        except GrowjaxError as error:
            faults.append(where + str(error).replace("\n", "\n    "))
            return spans
        faults += [where + fault for fault in _ramp_faults(stage, model, len(costs))]
        spans.append(Span(stage, start, tuple(costs), sizes(model)))
        start, spent = start + len(costs), spent + sum(costs)
    return spans


class _Costs:
    """Training FLOPs of each step of a stage; each of its programs is counted once."""

    def __init__(self, plan: Plan, stage: Stage, model: Any):
        self.plan, self.stage, self.model = plan, stage, model
        self.known: dict[Subnet | None, int] = {}
        if isinstance(stage.subnet, PathSchedule) and stage.subnet.layers != sizes(model)["layers"]:
            raise PlanError(
                f"its paths are made for {stage.subnet.layers} layers, and the model has "
                f"{sizes(model)['layers']}"
            )

    def __getitem__(self, i: int) -> int:
        part = self.stage.part(i, self.plan.seed)
        if part not in self.known:
            plan = self.plan

            def call(model, tokens):
                if part is not None:
                    model = part(model, key=jax.random.key(0))
                return model(tokens)

            per_token = training_flops_per_token(eqx.Partial(call, self.model), plan.length)
            self.known[part] = round(per_token * plan.batch * plan.length)
        return self.known[part]


def _until(flops: _Costs, budget: float) -> list[int]:
    """The steps that come closest to a budget, and at least one."""
    costs: list[int] = []
    spent = 0
    while not costs or spent + flops[len(costs)] / 2 <= budget:
        costs.append(flops[len(costs)])
        spent += costs[-1]
    return costs


def _ramp_faults(stage: Stage, model: Any, steps: int) -> Iterator[str]:
    fresh = is_gated(model)
    if stage.ramp > steps:
        yield f"the ramp of {stage.ramp} steps is longer than its {steps} steps"
    if stage.ramp and not fresh:
        yield "ramp: it grows nothing behind gates, so there is nothing to open"
    if fresh and not stage.ramp:
        axes = sorted({s.own_axis for s in axes_of(model).of_kind("gate") if s.arrays()})
        yield f"ramp: it grows {', '.join(axes)} behind gates; say over how many steps they open"
