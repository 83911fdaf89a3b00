"""A training run as data: stages that grow the model or train a part of it, checked before it runs.

A `Plan` that exists is valid. Making one works out every stage's shapes, steps and cost without
computing anything, so that a fault in the last stage is found before the first one starts.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal, get_args

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from growjax.axes import axes_of, sizes
from growjax.budget import Clock, FlopsClock
from growjax.data.objectives import Objective, batch_shapes
from growjax.data.sources import Source
from growjax.errors import GrowjaxError, PlanError, raise_all
from growjax.gates import is_gated, ungated
from growjax.growth import Chain, Operator
from growjax.maps import fold_in_name
from growjax.models import BERT, GPT, T5, BERTConfig, GPTConfig, Llama, LlamaConfig, T5Config
from growjax.parallel import Layout
from growjax.plan.losses import reads_pairs
from growjax.plan.optimizer import Optimizer
from growjax.plan.schedule import Schedule
from growjax.plan.stages import Carry, Inactive, Rewind, Span, Stage, Start, Steps
from growjax.plan.timeline import Era, timeline
from growjax.select import Selector
from growjax.subnet import Coins, PathSchedule, Subnet


ModelConfig = GPTConfig | BERTConfig | LlamaConfig | T5Config
_MODELS = {GPTConfig: GPT, BERTConfig: BERT, LlamaConfig: Llama, T5Config: T5}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One training run, from a model's birth to its end.

    **Fields**

    - `name`: what the run is called in reports.
    - `model`: the model that the first stage starts from; its `dtype` and `remat` are those of the run.
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
    - `start`: a trained model to start from, instead of drawing one. Whether it has the shapes of `model`
      is seen before the first step; it becomes a larger one by the first stage's `grow` alone.

    Raises `PlanError` that lists every fault.

    **Example**

        Plan("grown", small, (Stage(tokens=400_000), Stage(tokens=400_000, grow=gj.stack(layers=6))),
             batch=16, objective=Causal(128), rate=Schedule(2e-3))
    """

    name: str
    model: ModelConfig
    stages: tuple[Stage, ...]
    batch: int
    objective: Objective
    rate: Schedule
    optimizer: Optimizer = Optimizer()
    clock: Clock = FlopsClock()
    budget: float | None = None
    accumulate: int = 1
    layout: Layout = Layout()
    data: Source | None = None
    tokenizer: str = "bytes"
    seed: int = 0
    start: Start | None = None

    def __post_init__(self):
        faults = list(_length_faults(self))
        for n, stage in enumerate(self.stages):
            faults += [f"stage {n} {stage.name!r}: {fault}" for fault in _stage_faults(stage)]
        faults = faults or _fit_faults(self)
        raise_all(PlanError, f"plan {self.name!r} cannot be run:", faults)

    def build(self) -> Any:
        """The model before the first stage, all of its parameters drawn."""
        return birth(self, self.seed)

    @functools.cached_property
    def origin(self) -> Any:
        """The shapes of the model before the first stage."""
        return eqx.filter_eval_shape(self.build)

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


def build(config: ModelConfig, key: PRNGKeyArray) -> Any:
    """The model that a configuration describes."""
    return _MODELS[type(config)](config, key=key)


def birth(plan: Plan, seed: Any) -> Any:
    """The model before the first stage of a plan, drawn from this seed (or from one that is traced)."""
    model = build(plan.model, purpose_key(seed, "model"))
    for op in plan.start.operators if plan.start else ():
        model = ungated(op(model, key=purpose_key(seed, "grow")))
    return model


def purpose_key(seed: int, name: str) -> PRNGKeyArray:
    """The key for one purpose of a run: "model" or "grow"."""
    return fold_in_name(jax.random.key(seed), name)


def _is_objective(value: Any) -> bool:
    """Whether this is something that makes training examples."""
    return callable(value) and hasattr(value, "raw_length")


# Faults ------------------------------------------------------------------------------------------


def _length_faults(plan: Plan) -> Iterator[str]:
    for field in ("batch", "accumulate"):
        value = getattr(plan, field)
        if not isinstance(value, int) or value < 1:
            yield f"{field}: expected a positive integer, got {value!r}"
    if type(plan.model) not in _MODELS:
        names = ", ".join(cls.__name__ for cls in _MODELS)
        yield f"model: expected one of {names}, got {plan.model!r}"
    if not _is_objective(plan.objective):
        yield f"objective: expected one such as Causal(128), got {plan.objective!r}"
    if not isinstance(plan.clock, Clock):
        yield f"clock: expected one such as FlopsClock(), got {plan.clock!r}"
        return
    if not isinstance(plan.seed, int) or not 0 <= plan.seed < 2**31:
        yield f"seed: expected an integer of 0 or more, below 2**31, got {plan.seed!r}"
    if not plan.stages:
        yield "stages: expected at least one"
    if plan.start is not None:
        yield from _start_faults(plan.start)
    if plan.layout.own_paths and any(stage.inactive == "freeze" for stage in plan.stages):
        yield "layout: own_paths: a layer that one replica leaves out runs on another; freeze none"
    shares = [stage.share for stage in plan.stages if stage.share is not None]
    if shares and plan.budget is None:
        yield "budget: the stages are shares of it, so it must be given"
    elif not shares and plan.budget is not None:
        yield "budget: no stage is a share of it, so the stages decide; leave it out"
    elif plan.budget is not None and not plan.budget > 0:
        yield f"budget: expected a positive number of {plan.clock.unit}, got {plan.budget!r}"
    if plan.clock.unit != "seconds" and any(s.seconds is not None for s in plan.stages):
        yield f"clock: it charges {plan.clock.unit}, and stages last seconds; give a reference clock"
    if shares and (len(shares) < len(plan.stages) or abs(sum(shares) - 1) > 1e-6):
        yield f"stages: every one must have a share and all together 1, got {shares}"


def _start_faults(start: Any) -> Iterator[str]:
    if not isinstance(start, Start):
        yield f"start: expected one such as Start('runs/small'), got {start!r}"
    elif not isinstance(start.folder, str) or not start.folder:
        yield f"start: folder: expected the name of one, got {start.folder!r}"
    elif not all(isinstance(op, Operator | Chain) for op in start.operators):
        yield f"start: operators: expected some such as gj.stack(layers=6), got {start.operators!r}"


def _stage_faults(stage: Stage) -> Iterator[str]:
    scheduled = isinstance(stage.subnet, PathSchedule)
    lengths = ("tokens", "flops", "seconds", "share")
    given = [what for what in lengths if getattr(stage, what) is not None]
    if scheduled and given:
        yield f"its path schedule says how long it is; leave {' and '.join(given)} out"
    elif not scheduled and len(given) != 1:
        got = " and ".join(given) or "none"
        yield f"expected one of tokens, flops, seconds and share, got {got}"
    for what in given:
        if not getattr(stage, what) > 0:
            yield f"{what}: expected a positive number, got {getattr(stage, what)!r}"
    if stage.grow is not None and not isinstance(stage.grow, Operator | Chain):
        yield f"grow: expected an operator such as gj.msg(mlp=2048), got {stage.grow!r}"
    if not (stage.subnet is None or scheduled or isinstance(stage.subnet, Subnet)):
        yield f"subnet: expected one such as gj.random_path(6), got {stage.subnet!r}"
    if stage.inactive not in get_args(Inactive):
        known = ", ".join(get_args(Inactive))
        yield f"inactive: expected one of {known}, got {stage.inactive!r}"
    elif stage.inactive == "freeze" and not (scheduled or isinstance(stage.subnet, Coins)):
        yield f"inactive: only layers can stay as they were, give a path or drop, got {stage.subnet!r}"
    if not (stage.select is None or isinstance(stage.select, Selector)):
        yield f"select: expected one such as RhoLoss(), got {stage.select!r}"
    if stage.carry not in get_args(Carry):
        yield f"carry: expected one of {', '.join(get_args(Carry))}, got {stage.carry!r}"
    if stage.carry != "dual" and stage.grow is None:
        yield f"carry: {stage.carry!r} is for a stage that grows, and this one does not"
    if stage.rewind is not None and stage.rewind not in get_args(Rewind):
        yield f"rewind: expected one of {', '.join(get_args(Rewind))} or None, got {stage.rewind!r}"
    if not isinstance(stage.ramp, int) or stage.ramp < 0:
        yield f"ramp: expected a number of steps, got {stage.ramp!r}"
    if not 0 <= stage.rewarm <= 1:
        yield f"rewarm: expected a share of the stage from 0 to 1, got {stage.rewarm!r}"
    if stage.batch is not None and (not isinstance(stage.batch, int) or stage.batch < 1):
        yield f"batch: expected a positive integer, got {stage.batch!r}"
    if not (stage.objective is None or _is_objective(stage.objective)):
        yield f"objective: expected one such as Causal(128), got {stage.objective!r}"


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
        model = plan.origin
    except GrowjaxError as error:
        faults.append("start: " + str(error).replace("\n", "\n    "))
        return spans
    start, tokens, spent, share = 0, 0, 0, 0.0
    for n, stage in enumerate(plan.stages):
        where = f"stage {n} {stage.name!r}: "
        model = ungated(model)
        batch, objective = stage.batch or plan.batch, stage.objective or plan.objective
        try:
            if stage.grow is not None:
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
            )
            done = list(steps.until(*_limit(plan, stage, batch * objective.raw_length, left)))
        except GrowjaxError as error:
            faults.append(where + str(error).replace("\n", "\n    "))
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
    if seq2seq != reads_pairs(model):
        kind = "an encoder and a decoder" if seq2seq else "one sequence"
        name = type(model).__name__
        yield f"objective: {objective} makes examples for {kind}, which is not what {name} reads"


def reference_faults(plan: Plan, reference: Any) -> Iterator[str]:
    """Why a second model cannot look at what the stages of a plan choose from, from shapes alone.

    Models of other families, which go with a loss of their own, are not looked into.
    """
    for span in plan.spans if isinstance(reference, tuple(_MODELS.values())) else ():
        if span.stage.select is None or not span.stage.select.compares:
            continue
        where = f"stage {span.index} {span.stage.name!r}: reference: "
        for fault in _shape_faults(plan, span.batch, span.objective, reference):
            yield where + fault
        mine, theirs = span.sizes["vocab"], sizes(reference)["vocab"]
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
