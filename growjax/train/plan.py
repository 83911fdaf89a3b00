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

from growjax.axes import axes_of, sizes
from growjax.budget import Schedule
from growjax.cost import flops as count_flops
from growjax.data.objectives import Objective, batch_shapes
from growjax.data.sources import Source
from growjax.errors import GrowjaxError, PlanError, raise_all
from growjax.gates import is_gated, ungated
from growjax.growth import Chain, Operator
from growjax.maps import fold_in_name
from growjax.models import BERT, GPT, T5, BERTConfig, GPTConfig, Llama, LlamaConfig, T5Config
from growjax.optim.recipe import Optimizer
from growjax.parallel import Layout
from growjax.subnet import PathSchedule, RandomPath, Subnet
from growjax.train.losses import predictions, reads_pairs


ModelConfig = GPTConfig | BERTConfig | LlamaConfig | T5Config
_MODELS = {GPTConfig: GPT, BERTConfig: BERT, LlamaConfig: Llama, T5Config: T5}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a plan: grow first (or not), then train for a while.

    **Fields**

    - `name`: what it is called in reports.
    - `tokens`: how long it lasts, in training tokens; or
    - `flops`: in training FLOPs; or
    - `share`: as a share of the plan's `budget`. A `PathSchedule` says it itself.
    - `grow`: the operator that the stage starts with.
    - `ramp`: over how many of its first steps the gates that `grow` added open linearly, from
      1/ramp to 1. The stage is at least as long.
    - `subnet`: trains only this part of the model. A `PathSchedule`'s steps count from the stage's
      first. Layers that are skipped by a coin of their own (`mode="bernoulli"`, progressive layer
      drop) are charged as if they ran: no draw is cheaper than another.
    - `rewarm`: the share of the stage's cost over which the learning rate climbs again, from 0.
    - `batch`, `objective`: instead of the plan's, for this stage alone.
    """

    name: str = ""
    tokens: int | None = None
    flops: float | None = None
    share: float | None = None
    grow: Operator | Chain | None = None
    ramp: int = 0
    subnet: Subnet | PathSchedule | None = None
    rewarm: float = 0.0
    batch: int | None = None
    objective: Objective | None = None

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

    `start` is its first step and `tokens` what was seen before it; `flops[i]` are the training FLOPs of
    its step i; `model` has the shapes it trains, gates included; `parts` its sub-networks, each with
    the step of the stage that needs it first.
    """

    index: int
    stage: Stage
    start: int
    tokens: int
    flops: tuple[int, ...]
    model: Any
    parts: tuple[tuple[int, Subnet | None], ...]
    batch: int
    objective: Objective

    @property
    def steps(self) -> int:
        return len(self.flops)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every named axis."""
        return sizes(self.model)

    @property
    def step_tokens(self) -> int:
        """Training tokens of one step."""
        return self.batch * self.objective.raw_length


@dataclasses.dataclass(frozen=True)
class Plan:
    """One training run, from a model's birth to its end.

    **Fields**

    - `name`: what the run is called in reports.
    - `model`: the model that the first stage starts from; its `dtype` and `remat` are those of the run.
    - `stages`: what happens, in order.
    - `batch`: sequences per step, over all devices.
    - `objective`: what one sequence is and what is predicted, such as `growjax.data.Causal(128)`.
    - `rate`: the learning rate as a function of the share of all FLOPs that is spent.
    - `optimizer`: how gradients become updates.
    - `budget`: training FLOPs, needed if and only if stages are shares of it.
    - `accumulate`: in how many parts, one after the other, each batch is computed.
    - `layout`: how the run is spread over devices.
    - `data`: what it trains on; None if `train` is given its own.
    - `tokenizer`: "bytes", or the path of a `tokenizers` file.
    - `seed`: of the model, its growth, its sub-networks and the order of the data.

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
    budget: float | None = None
    accumulate: int = 1
    layout: Layout = Layout()
    data: Source | None = None
    tokenizer: str = "bytes"
    seed: int = 0

    def __post_init__(self):
        faults = list(_length_faults(self))
        for n, stage in enumerate(self.stages):
            faults += [f"stage {n} {stage.name!r}: {fault}" for fault in _stage_faults(stage)]
        faults = faults or _fit_faults(self)
        raise_all(PlanError, f"plan {self.name!r} cannot be run:", faults)

    def build(self) -> Any:
        """The model at birth."""
        return build(self.model, self.key("model"))

    def key(self, name: str) -> PRNGKeyArray:
        """The key for one purpose: the same in every run of this plan."""
        return purpose_key(self.seed, name)

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """The stages worked out: what a dry run shows."""
        return tuple(_work_out(self))

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
        """The learning rate at `spent` FLOPs.

        A function of cost, not of steps: a stage of small steps must not use up the schedule of the
        dear ones, and every run ends where its schedule does, whatever it cost.
        """
        rate = self.rate.at(spent / self.flops)
        start = 0
        for span in self.spans:
            cost = sum(span.flops)
            if span.stage.rewarm and start <= spent < start + span.stage.rewarm * cost:
                rate *= (spent - start) / (span.stage.rewarm * cost)
            start += cost
        return rate


def build(config: ModelConfig, key: PRNGKeyArray) -> Any:
    """The model that a configuration describes."""
    return _MODELS[type(config)](config, key=key)


def purpose_key(seed: int, name: str) -> PRNGKeyArray:
    """The key for one purpose of a run: "model" or "grow"."""
    return fold_in_name(jax.random.key(seed), name)


def is_objective(value: Any) -> bool:
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
    if not is_objective(plan.objective):
        yield f"objective: expected one such as Causal(128), got {plan.objective!r}"
    if not plan.stages:
        yield "stages: expected at least one"
    shares = [stage.share for stage in plan.stages if stage.share is not None]
    if shares and plan.budget is None:
        yield "budget: the stages are shares of it, so it must be given"
    elif not shares and plan.budget is not None:
        yield "budget: no stage is a share of it, so the stages decide; leave it out"
    elif plan.budget is not None and not plan.budget > 0:
        yield f"budget: expected a positive number of FLOPs, got {plan.budget!r}"
    if shares and (len(shares) < len(plan.stages) or abs(sum(shares) - 1) > 1e-6):
        yield f"stages: every one must have a share and all together 1, got {shares}"


def _stage_faults(stage: Stage) -> Iterator[str]:
    scheduled = isinstance(stage.subnet, PathSchedule)
    lengths = ("tokens", "flops", "share")
    given = [what for what in lengths if getattr(stage, what) is not None]
    if scheduled and given:
        yield f"its path schedule says how long it is; leave {' and '.join(given)} out"
    elif not scheduled and len(given) != 1:
        yield f"expected one of tokens, flops and share, got {' and '.join(given) or 'none'}"
    for what in given:
        if not getattr(stage, what) > 0:
            yield f"{what}: expected a positive number, got {getattr(stage, what)!r}"
    if stage.grow is not None and not isinstance(stage.grow, Operator | Chain):
        yield f"grow: expected an operator such as gj.msg(mlp=2048), got {stage.grow!r}"
    if not (stage.subnet is None or scheduled or isinstance(stage.subnet, Subnet)):
        yield f"subnet: expected one such as gj.random_path(6), got {stage.subnet!r}"
    if not isinstance(stage.ramp, int) or stage.ramp < 0:
        yield f"ramp: expected a number of steps, got {stage.ramp!r}"
    if not 0 <= stage.rewarm <= 1:
        yield f"rewarm: expected a share of the stage from 0 to 1, got {stage.rewarm!r}"
    if stage.batch is not None and (not isinstance(stage.batch, int) or stage.batch < 1):
        yield f"batch: expected a positive integer, got {stage.batch!r}"
    if not (stage.objective is None or is_objective(stage.objective)):
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
    model = eqx.filter_eval_shape(plan.build)
    spans: list[Span] = []
    start, tokens, spent, share = 0, 0, 0, 0.0
    for n, stage in enumerate(plan.stages):
        where = f"stage {n} {stage.name!r}: "
        model = ungated(model)
        batch, objective = stage.batch or plan.batch, stage.objective or plan.objective
        try:
            if stage.grow is not None:
                model = eqx.filter_eval_shape(stage.grow, model, key=plan.key("grow"))
            if misfits := list(_shape_faults(plan, batch, objective, model)):
                faults += [where + fault for fault in misfits]
                continue
            costs = _Costs(stage, model, plan.seed, batch, objective)
            share += stage.share or 0.0
            if isinstance(stage.subnet, PathSchedule):
                flops = [costs[i] for i in range(stage.subnet.stages[-1].stop)]
            elif stage.tokens is not None:
                steps = max(round(stage.tokens / (batch * objective.raw_length)), 1)
                flops = [costs[i] for i in range(steps)]
            else:
                # Shares count from the start, so that a stage makes up for its forerunner's rounding
                flops = _until(costs, stage.flops or share * (plan.budget or 0.0) - spent)
        except GrowjaxError as error:
            faults.append(where + str(error).replace("\n", "\n    "))
            return spans
        faults += [where + fault for fault in _ramp_faults(stage, model, len(flops))]
        parts: dict[Subnet | None, int] = {}
        for i in range(len(flops)):
            parts.setdefault(stage.part(i, plan.seed), i)
        needs = tuple((i, part) for part, i in parts.items())
        spans.append(Span(n, stage, start, tokens, tuple(flops), model, needs, batch, objective))
        start, spent = start + len(flops), spent + sum(flops)
        tokens += len(flops) * spans[-1].step_tokens
    return spans


class _Costs:
    """Training FLOPs of each step of a stage; each of its programs is counted once."""

    def __init__(self, stage: Stage, model: Any, seed: int, batch: int, objective: Objective):
        self.stage, self.model, self.seed = stage, model, seed
        self.batch, self.objective = batch, objective
        self.known: dict[Subnet | None, int] = {}
        if isinstance(stage.subnet, PathSchedule):
            made_for, axis = stage.subnet.layers, stage.subnet.stages[0].path.axis
            have = axes_of(model).size(axis)
            if made_for != have:
                raise PlanError(
                    f"its paths are made for {made_for} {axis}, and the model has {have}"
                )

    def __getitem__(self, i: int) -> int:
        part = self.stage.part(i, self.seed)
        if part not in self.known:
            self.known[part] = step_flops(self.model, self.objective, self.batch, part)
        return self.known[part]


def step_flops(model: Any, objective: Objective, batch: int, part: Subnet | None = None) -> int:
    """Model FLOPs of one training step: three forward passes of the part that is trained."""

    def forward(model, rows):
        if part is not None:
            model = part(model, key=jax.random.key(0))
        return jax.vmap(lambda row: predictions(model, row))(rows)

    return 3 * batch * count_flops(forward, model, batch_shapes(objective, 1))


def _until(costs: _Costs, budget: float) -> list[int]:
    """The steps that come closest to a budget, and at least one."""
    flops: list[int] = []
    spent = 0
    while not flops or spent + costs[len(flops)] / 2 <= budget:
        flops.append(costs[len(flops)])
        spent += flops[-1]
    return flops


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
        name = type(plan.model).__name__
        yield f"objective: {objective} makes examples for {kind}, which is not what {name} reads"


def _ramp_faults(stage: Stage, model: Any, steps: int) -> Iterator[str]:
    fresh = is_gated(model)
    if stage.ramp > steps:
        yield f"the ramp of {stage.ramp} steps is longer than its {steps} steps"
    if stage.ramp and not fresh:
        yield "ramp: it grows nothing behind gates, so there is nothing to open"
    if fresh and not stage.ramp:
        axes = sorted({s.own_axis for s in axes_of(model).of_kind("gate") if s.arrays()})
        yield f"ramp: it grows {', '.join(axes)} behind gates; say over how many steps they open"
