"""A stage of a plan, and what its steps do and cost, worked out from shapes alone."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import equinox as eqx
import jax
import numpy as np

from growjax.axes import axes_of, sizes
from growjax.budget import Clock, Op
from growjax.cost import flops as count_flops
from growjax.cost import parameters
from growjax.data.objectives import Objective, batch_shapes
from growjax.errors import PlanError
from growjax.growth import Births, Operator
from growjax.plan.losses import Loss, cross_entropy
from growjax.select import Selector
from growjax.subnet import Coins, PathSchedule, RandomPath, Subnet, random_path
from growjax.values import Range, Size, check, positive, ranged, register


# What a step does and costs is listed before the run: this many take a second or two, and 200 MB
MOST_STEPS = 10_000_000
Carry = Literal["dual", "zero", "reset"]
Rewind = Literal["stretch", "slope"]
Inactive = Literal["zero_grad", "freeze"]


@register
@dataclasses.dataclass(frozen=True)
class Start:
    """A model that was trained already, for a plan to start from: its parameters, and nothing else.

    **Fields**

    - `folder`: of a growjax checkpoint, of a run (its last checkpoint), or of a Hugging Face model.
    - `operators`: what that model grew by since it was what the plan's `model` describes, in order.

    **Example**

        Plan("grown", small, (Stage(tokens=400_000, grow=gj.stack(layers=6)),), start=Start("runs/small"),
             batch=16, objective=Causal(128), rate=Schedule(2e-3))
    """

    folder: Annotated[str, Range("the name of a folder", bool)]
    operators: tuple[Operator, ...] = ()

    def __post_init__(self):
        check(self, PlanError)


@register
@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a plan: grow first (or not), then train for a while.

    **Fields**

    - `name`: what it is called in reports.
    - `tokens`: how long it lasts, in training tokens; or
    - `flops`: in training FLOPs; or
    - `seconds`: of the plan's reference clock; or
    - `share`: as a share of the plan's `budget`. A `PathSchedule` says it itself.
    - `grow`: the operator that the stage starts with.
    - `carry`: the optimizer's state of what grew: "dual" follows the weights, "zero" starts copies from
      nothing, "reset" starts all of it again.
    - `ramp`: over how many of its first steps the gates that `grow` added open linearly, from
      1/ramp to 1. The stage is at least as long.
    - `subnet`: trains only this part of the model. A `PathSchedule`'s steps count from the stage's
      first. Layers that are skipped by a coin of their own (`mode="bernoulli"`, progressive layer
      drop) are charged where they are drawn.
    - `inactive`: layers that `subnet` leaves out of a step get a gradient of zero, and move on by their
      momentum and weight decay ("zero_grad"), or stay as they were, with their moments and their age
      ("freeze").
    - `select`: chooses each step's batch from several, such as `growjax.select.RhoLoss()`.
    - `rewarm`: the share of the stage's cost over which the learning rate climbs again, from 0.
    - `rewind`: the learning rate starts again from its peak: "stretch" falls to the schedule's own end,
      "slope" as fast as before, as MSG's code does, and ends above it.
    - `batch`, `objective`: instead of the plan's, for this stage alone.
    """

    name: str = ""
    tokens: Annotated[float, positive()] | None = None
    flops: Annotated[float, positive()] | None = None
    seconds: Annotated[float, positive()] | None = None
    share: Annotated[float, ranged(0, 1, "a share", above=True)] | None = None
    grow: Operator | None = None
    carry: Carry = "dual"
    ramp: Annotated[int, Range("a number of steps", lambda n: n >= 0)] = 0
    subnet: Subnet | PathSchedule | None = None
    inactive: Inactive = "zero_grad"
    select: Selector | None = None
    rewarm: Annotated[float, ranged(0, 1, "a share of the stage")] = 0.0
    rewind: Rewind | None = None
    batch: Size | None = None
    objective: Objective | None = None

    def __post_init__(self):
        check(self, PlanError, f"stage {self.name!r} cannot be run:", self._faults)

    def _faults(self) -> Iterator[str]:
        scheduled = isinstance(self.subnet, PathSchedule)
        lengths = ("tokens", "flops", "seconds", "share")
        given = [name for name in lengths if getattr(self, name) is not None]
        if scheduled and given:
            yield f"its path schedule says how long it is; leave {' and '.join(given)} out"
        elif not scheduled and len(given) != 1:
            got = " and ".join(given) or "none"
            yield f"expected one of tokens, flops, seconds and share, got {got}"
        layers = scheduled or isinstance(self.subnet, Coins)
        if self.inactive == "freeze" and not layers:
            yield (
                "inactive: only layers can stay as they were, give a path or drop, got "
                f"{self.subnet!r}"
            )
        if self.carry != "dual" and self.grow is None:
            yield f"carry: {self.carry!r} is for a stage that grows, and this one does not"

    def part(self, i: int, seed: int) -> Subnet | None:
        """The sub-network of the stage's step `i`; equal ones share one program."""
        if isinstance(self.subnet, PathSchedule | RandomPath):
            return self.subnet.at(i, seed=seed)
        return self.subnet

    def steady(self, i: int) -> float:
        """The step before which the part is that of step `i`, as far as is known without drawing."""
        if isinstance(self.subnet, PathSchedule | RandomPath):
            return self.subnet.steady(i)
        return math.inf

    def level(self, i: int) -> float:
        """How far the gates are open at the stage's step `i`."""
        return min((i + 1) / self.ramp, 1.0) if self.ramp else 1.0


class Work(NamedTuple):
    """What makes one step's program.

    The part that it trains, whether it takes a second gradient, and whether layers that the part leaves
    out stay as they were.
    """

    part: Subnet | None = None
    curvature: bool = False
    freeze: bool = False


class Span(NamedTuple):
    """A stage with everything worked out.

    `start` is its first step; `tokens` and `spent` what was seen and spent before it. Of its step i,
    `works[i]` says what it does, `flops[i]` its training FLOPs and `costs[i]` what the clock charges for
    it. `ops` are all operations of the stage and how often each is done, and `firsts` which of its steps
    does each first. `model` has the shapes it trains, gates included, and `births` the growth that each
    coordinate was born in. Growth n happened before step `grown_at[n]` of the run, the first being birth.
    """

    index: int
    stage: Stage
    start: int
    tokens: int
    spent: int
    works: tuple[Work, ...]
    flops: tuple[int, ...]
    costs: tuple[int, ...]
    ops: tuple[tuple[Op, int], ...]
    firsts: tuple[int, ...]
    model: Any
    batch: int
    objective: Objective
    births: Births
    grown_at: tuple[int, ...]

    @property
    def steps(self) -> int:
        return len(self.costs)

    @property
    def programs(self) -> tuple[tuple[int, Work], ...]:
        """The different works, each with the step of the stage that needs it first."""
        first: dict[Work, int] = {}
        for i, work in enumerate(self.works):
            first.setdefault(work, i)
        return tuple((i, work) for work, i in first.items())

    @property
    def sizes(self) -> dict[str, int]:
        """The size of every named axis."""
        return sizes(self.model)

    @property
    def offered(self) -> int:
        """Sequences that one step reads; it trains on `batch` of them."""
        return self.batch * (self.stage.select.offers if self.stage.select else 1)

    @property
    def step_tokens(self) -> int:
        """Training tokens of one step."""
        return self.batch * self.objective.raw_length


class Steps:
    """What the steps of a stage do and cost; each different one is worked out once."""

    def __init__(
        self,
        stage: Stage,
        model: Any,
        batch: int,
        objective: Objective,
        *,
        start: int,
        seed: int,
        clock: Clock,
        curvature_every: int | None,
        loss: Loss = cross_entropy,
    ):
        self.stage, self.model, self.batch, self.objective = stage, model, batch, objective
        self.start, self.seed, self.clock, self.every = start, seed, clock, curvature_every
        self.loss = loss
        self.known: dict[Any, tuple[Op, ...]] = {}
        self.often: dict[Op, int] = {}
        self.first: dict[Op, int] = {}
        self.tossed: dict[tuple[Coins, int], np.ndarray] = {}
        # The optimizer goes over the whole model, whatever part of it a step trains
        self.updated = parameters(model)
        self.axes = table = axes_of(model)
        self.stacks = {a: n for a, n in table.sizes.items() if "stack" in table.roles(a)}
        if isinstance(stage.subnet, PathSchedule):
            made_for, axis = stage.subnet.layers, stage.subnet.stages[0].path.axis
            have = table.size(axis)
            if made_for != have:
                raise PlanError(
                    f"its paths are made for {made_for} {axis}, and the model has {have}"
                )

    def until(
        self, what: Literal["steps", "flops", "cost"], amount: float
    ) -> Iterator[tuple[Work, int, int]]:
        """Work, FLOPs and cost of the steps that come closest to an amount, and of at least one.

        Raises `PlanError` for more steps than a plan can list.
        """
        spent, stop = 0.0, 0.0
        for i in itertools.count():
            if what == "steps" and i >= amount:
                return
            # Plans have millions of steps, and most are like the one before
            if i >= stop:
                work, ops = self.step(i)
                flops, cost = sum(op.flops for op in ops), sum(map(self.clock.cost, ops))
                more = {"steps": 1, "flops": flops, "cost": cost}[what]
                changes = self.every is not None or self._drawn(work.part, i) is not None
                stop = i + 1 if changes else self.stage.steady(i)
                # Before any are listed: they would not fit into memory
                if not (amount - spent) / max(more, 1e-300) < MOST_STEPS - i:
                    raise PlanError(
                        f"more than {MOST_STEPS:,} steps; a plan lists its steps, so give larger batches "
                        "or a shorter stage"
                    )
            if i and spent + more / 2 > amount:
                return
            spent += more
            for op in ops:
                self.often[op] = self.often.get(op, 0) + 1
                self.first.setdefault(op, i)
            yield work, flops, cost

    def step(self, i: int) -> tuple[Work, tuple[Op, ...]]:
        """What the stage's step `i` does, and the operations that it takes."""
        refresh = self.every is not None and (self.start + i) % self.every == 0
        work = Work(self.stage.part(i, self.seed), refresh, self.stage.inactive == "freeze")
        drawn = self._drawn(work.part, i)
        if (work, drawn) not in self.known:
            self.known[work, drawn] = tuple(self._ops(work, drawn))
        return work, self.known[work, drawn]

    def ops(self) -> tuple[tuple[Op, int], ...]:
        """Every operation so far, and how often."""
        return tuple(self.often.items())

    def firsts(self) -> tuple[int, ...]:
        """Of each of them, the step that does it first."""
        return tuple(self.first[op] for op in self.often)

    def _ops(self, work: Work, drawn: int | None) -> Iterator[Op]:
        part = work.part
        if drawn is not None:
            assert isinstance(part, Coins)
            # Costs are linear in depth; the cheapest path there is has one layer
            flops = [
                self._flops(_depths(part.stacks, n)) for n in ((1, 2) if drawn == 0 else (drawn,))
            ]
            trained = 2 * flops[0] - flops[1] if drawn == 0 else flops[0]
            depth = max([drawn, *(n for a, n in self.stacks.items() if a not in part.stacks)])
        else:
            trained, depth = self._flops([] if part is None else [part]), self._depth(part)
        length = self.objective.raw_length
        yield Op("train", depth, self.batch, length, trained, self.updated)
        if work.curvature:
            yield Op("curvature", depth, self.batch, length, trained, self.updated)
        if self.stage.select is not None:
            rows = self.batch * self.stage.select.offers
            looked = self._flops([]) // 3 // self.batch * rows
            yield Op("forward", max(self.stacks.values(), default=0), rows, length, looked, 0)

    def _flops(self, parts: list[Subnet]) -> int:
        return step_flops(self.model, self.objective, self.batch, *parts, loss=self.loss)

    def _depth(self, part: Subnet | None) -> int:
        model = self.model
        if part is not None:
            model = eqx.filter_eval_shape(lambda m: part(m, key=jax.random.key(0), step=0), model)
        known = sizes(model)
        return max((known[axis] for axis in self.stacks), default=0)

    def _drawn(self, part: Subnet | None, i: int) -> int | None:
        """How many layers the coins of a step let run; None if there are no coins."""
        if not (isinstance(part, Coins) and part.tosses):
            return None
        layers, many = self.axes.size(part.stacks[0]), 1024
        n = self.start + i
        first = n // many * many
        if (part, first) not in self.tossed:
            self.tossed = {(part, first): part.tossed(layers, self.seed, first, many).sum(1)}
        return int(self.tossed[part, first][n - first])


def _depths(stacks: tuple[str, ...], depth: int) -> list[Subnet]:
    """Paths of one depth through every one of these stacks."""
    return [random_path(depth, keep=(), axis=axis) for axis in stacks]


def step_flops(
    model: Any,
    objective: Objective,
    batch: int,
    *parts: Subnet | None,
    loss: Loss = cross_entropy,
) -> int:
    """Model FLOPs of one training step: three forward passes of the part that is trained."""
    leaves, structure = jax.tree.flatten((model, batch_shapes(objective, 1)))
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x for x in leaves)
    return 3 * batch * _forward_flops(tuple(shapes), structure, parts, loss)


@functools.lru_cache(maxsize=1024)
def _forward_flops(
    leaves: tuple, structure: Any, parts: tuple[Subnet | None, ...], loss: Loss
) -> int:
    """Of one sequence, by shapes alone: the plans of a study share most of them."""

    def forward(model, rows):
        for part in parts:
            model = model if part is None else part(model, key=jax.random.key(0))
        return jax.vmap(lambda row: loss(model, row))(rows)

    return count_flops(forward, *jax.tree.unflatten(structure, leaves))
