"""A stage of a plan, and the operations and costs of its steps, worked out from shapes alone."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import numpy as np

from growjax.axes import axes_of, sizes
from growjax.budget import Clock, Op, cost_of
from growjax.cards import Card
from growjax.cost import flops as count_flops
from growjax.cost import parameters
from growjax.data.objectives import Objective, batch_shapes
from growjax.errors import PlanError
from growjax.growth import Births, Operator
from growjax.growth.depth import MASKED
from growjax.nn.place import SHAPES, running_on
from growjax.optim import Parts
from growjax.plan.losses import Loss, cross_entropy
from growjax.select import Selector
from growjax.subnet import Coins, PathSchedule, Subnet, random_path
from growjax.values import Folder, Name, Range, Size, at_least, check, positive, ranged, register


# The most steps of a stage. Each is listed before the run: this many take a second or two, and 200 MB
MOST_STEPS = 10_000_000
Carry = Literal["dual", "zero", "reset"]
Rewind = Literal["stretch", "slope"]
Inactive = Literal["zero_grad", "freeze"]
Train = Literal["all", "new", "old"] | Parts
_PARTS = {"all": None, "new": Parts(old=0.0), "old": Parts(new=0.0)}


@register
@dataclasses.dataclass(frozen=True)
class Start:
    """A trained model that a plan starts from: its parameters, without any optimizer state.

    **Fields**

    - `folder`: a growjax checkpoint, a run (its last checkpoint), or a Hugging Face model.
    - `operators`: the operators, in order, that make a model of these shapes from the plan's `model`.

    **Example**

        Plan("grown", small, (Stage(tokens=400_000, grow=gj.stack(layers=6)),), start=Start("runs/small"),
             batch=16, objective=Causal(128), rate=Schedule(2e-3))
    """

    folder: Folder
    operators: tuple[Operator, ...] = ()

    def __post_init__(self):
        check(self, PlanError)


@register
@dataclasses.dataclass(frozen=True)
class Fork:
    """A run that a plan goes on from: it begins with that run's whole state before a step.

    **Fields**

    - `run`: the folder of that run. Up to the step, its plan must have the same model, seed, growth,
      parts, batches and lengths of finished stages. Learning rates, optimizer settings, loss and data may
      differ, before the step and after it; differences before it are recorded in the lineage.
    - `step`: the step before which the checkpoint was saved; None for the latest checkpoint that the plan
      can go on from.

    **Example**

        longer = dataclasses.replace(plan, name="longer", stages=(*plan.stages, Stage(tokens=400_000)),
                                     fork=Fork("runs/first"))
    """

    run: Folder
    step: Annotated[int, Range("a number of steps", lambda n: n >= 0)] | None = None

    def __post_init__(self):
        check(self, PlanError)


@register
@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a plan: grow first (or not), then train for a while.

    **Fields**

    - `name`: the name of the stage in reports.
    - `tokens`: its length in training tokens; or
    - `flops`: its length in training FLOPs; or
    - `seconds`: its length in seconds of the plan's reference clock; or
    - `share`: its length as a share of the plan's `budget`. With a `PathSchedule`, which has a length of
      its own, give none of the four.
    - `grow`: the operator that the stage starts with.
    - `carry`: the optimizer state of grown parameters: "dual" follows the weights, "zero" is zero for
      copies, "reset" starts anew for all parameters.
    - `ramp`: the number of first steps over which the gates that `grow` added open linearly, from
      1/ramp to 1. The stage must be at least as long.
    - `subnet`: the part of the model that is trained; None trains all of it. The steps of a
      `PathSchedule` count from the stage's first. If each layer is skipped at random by itself
      (`mode="bernoulli"`, progressive layer drop), a step is charged for the layers it draws.
    - `inactive`: the layers that `subnet` leaves out of a step: "zero_grad" gives them a gradient of
      zero, so that momentum and weight decay still move them; "freeze" leaves their parameters, moments
      and ages unchanged.
    - `train`: the part of a grown model that is trained: "new" (what the last growth added; all else
      stays bitwise unchanged), "old", or `growjax.optim.Parts` with rates and decays of parts.
    - `select`: a rule that chooses each step's batch from a larger one, such as
      `growjax.select.RhoLoss()`.
    - `rewarm`: the share of the stage's cost over which the learning rate rises again, from 0.
    - `rewind`: the learning rate goes back to its peak. With "stretch" it falls over the rest of the run
      to the end of the schedule; with "slope" it falls as fast as before, as in the code of MSG, and
      ends higher.
    - `batch`, `objective`: for this stage, instead of the plan's.
    - `charge`: what was spent on the stage besides its steps, in the clock's unit: the trials of other
      operators (`Probe`), the fit of a map. The run pays it before the stage's first step.
    """

    name: Name = ""
    tokens: Annotated[float, positive()] | None = None
    flops: Annotated[float, positive()] | None = None
    seconds: Annotated[float, positive()] | None = None
    share: Annotated[float, ranged(0, 1, "a share", above=True)] | None = None
    grow: Operator | None = None
    carry: Carry = "dual"
    ramp: Annotated[int, Range("a number of steps", lambda n: n >= 0)] = 0
    subnet: Subnet | PathSchedule | None = None
    inactive: Inactive = "zero_grad"
    train: Train = "all"
    select: Selector | None = None
    rewarm: Annotated[float, ranged(0, 1, "a share of the stage")] = 0.0
    rewind: Rewind | None = None
    batch: Size | None = None
    objective: Objective | None = None
    charge: Annotated[float, at_least(0)] = 0.0
    card: ClassVar[Card] = Card(by={"rewind": (MASKED,)})

    def __post_init__(self):
        check(self, PlanError, f"stage {self.name!r} cannot be run:", self._faults)

    def _faults(self) -> Iterator[str]:
        scheduled = isinstance(self.subnet, PathSchedule)
        lengths = ("tokens", "flops", "seconds", "share")
        given = [name for name in lengths if getattr(self, name) is not None]
        if scheduled and given:
            yield f"its path schedule has a length of its own; leave {' and '.join(given)} out"
        elif not scheduled and len(given) != 1:
            got = " and ".join(given) or "none"
            yield f"expected one of tokens, flops, seconds and share, got {got}"
        layers = scheduled or isinstance(self.subnet, Coins)
        if self.inactive == "freeze" and not layers:
            yield (
                "inactive: 'freeze' is for a subnet that leaves layers out, such as a path, got "
                f"{self.subnet!r}"
            )
        if self.carry != "dual" and self.grow is None:
            yield f"carry: {self.carry!r} is for a stage that grows, and this one does not"

    def part(self, i: int, seed: int) -> Subnet | None:
        """The sub-network that the stage's step `i` trains; equal ones share one program."""
        return None if self.subnet is None else self.subnet.at(i, seed=seed)

    def steady(self, i: int) -> float:
        """The first step after `i` whose `part` may differ from that of step `i`; infinite if none."""
        return math.inf if self.subnet is None else self.subnet.steady(i)

    @property
    def parts(self) -> Parts | None:
        """How the parts of the model are trained; None if all of it is, at one rate."""
        return self.train if isinstance(self.train, Parts) else _PARTS[self.train]

    def level(self, i: int) -> float:
        """The level of the gates at the stage's step `i`: 0 is closed, 1 open."""
        return min((i + 1) / self.ramp, 1.0) if self.ramp else 1.0


class Work(NamedTuple):
    """The work of one step, as far as it determines the step's program.

    `part` is the sub-network that it trains, `curvature` whether it computes a second gradient, and
    `freeze` whether the layers outside the part stay unchanged. `parts` are the rates of what growth
    added and of all else, None if everything is trained alike.
    """

    part: Subnet | None = None
    curvature: bool = False
    freeze: bool = False
    parts: Parts | None = None


class Span(NamedTuple):
    """A stage with its steps worked out.

    - `start`: its first step, of the whole run.
    - `tokens`, `spent`: the training tokens and the cost (in the clock's smallest unit) before its first
      step; `charged` of this cost was for the stage besides its steps.
    - `works`, `flops`, `costs`: of each step, its work, its training FLOPs and its cost.
    - `ops`: the different operations of the stage, and how often each runs.
    - `firsts`: of each of these operations, the first step (of the stage) that runs it.
    - `model`: the shapes of the model that it trains, gates included.
    - `births`: the number of the growth that each coordinate was born in.
    - `grown_at`: the step of the run that each growth happens before; the first is the birth.
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
    charged: int = 0

    @property
    def steps(self) -> int:
        return len(self.costs)

    @property
    def programs(self) -> tuple[tuple[int, Work], ...]:
        """The different works, each with the first step of the stage that needs it."""
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
    """The work, FLOPs and cost of the steps of a stage; steps that are alike are worked out once.

    `start` is the stage's first step. `loss` is (model, example) to losses and weights.
    """

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
        self.start, self.seed, self.clock = start, seed, clock
        self.curvature_every, self.loss = curvature_every, loss
        # (work, layers drawn) -> its operations
        self._operations: dict[tuple[Work, int | None], tuple[Op, ...]] = {}
        # Operation -> how often it ran so far, and the first step that ran it
        self._counts: dict[Op, int] = {}
        self._firsts: dict[Op, int] = {}
        # (coins, first step of a block) -> layers that run at each step of the block
        self._depths: dict[tuple[Coins, int], np.ndarray] = {}
        # The optimizer updates the whole model, whatever part of it a step trains. What stays unchanged
        # is charged too: it has a gradient, and the optimizer reads and writes its moments.
        self.updated = parameters(model)
        self.axes = axes_of(model)
        # Sizes of the axes of layers
        self.stacks = {a: n for a, n in self.axes.sizes.items() if "stack" in self.axes.roles(a)}
        if isinstance(stage.subnet, PathSchedule):
            expected, axis = stage.subnet.layers, stage.subnet.stages[0].path.axis
            layers = self.axes.size(axis)
            if layers != expected:
                raise PlanError(
                    f"its paths are made for {expected} {axis}, and the model has {layers}"
                )

    def until(
        self, unit: Literal["steps", "flops", "cost"], amount: float
    ) -> Iterator[tuple[Work, int, int]]:
        """Work, FLOPs and cost of each step, for as many steps as come closest to `amount` of a unit.

        Yields one step at least. Raises `PlanError` for more than `MOST_STEPS`.
        """
        used, stop = 0.0, 0.0
        for i in itertools.count():
            if unit == "steps" and i >= amount:
                return
            # Plans have millions of steps, and most are like the one before: until `stop`, all are
            if i >= stop:
                work, ops = self.step(i)
                flops, cost = (
                    sum(op.flops for op in ops),
                    sum(cost_of(op, self.clock) for op in ops),
                )
                step_amount = {"steps": 1, "flops": flops, "cost": cost}[unit]
                changes = self.curvature_every is not None or self._drawn(work.part, i) is not None
                stop = i + 1 if changes else self.stage.steady(i)
                # Checked in advance, since a list of so many steps would not fit into memory
                if not (amount - used) / max(step_amount, 1e-300) < MOST_STEPS - i:
                    raise PlanError(
                        f"more than {MOST_STEPS:,} steps; a plan lists its steps, so give larger batches "
                        "or a shorter stage"
                    )
            # Stop where one more step would miss the amount by more than this many do
            if i and used + step_amount / 2 > amount:
                return
            used += step_amount
            for op in ops:
                self._counts[op] = self._counts.get(op, 0) + 1
                self._firsts.setdefault(op, i)
            yield work, flops, cost

    def step(self, i: int) -> tuple[Work, tuple[Op, ...]]:
        """The work of the stage's step `i`, and the operations that it is charged for."""
        refresh = self.curvature_every is not None and (self.start + i) % self.curvature_every == 0
        freeze = self.stage.inactive == "freeze"
        work = Work(self.stage.part(i, self.seed), refresh, freeze, self.stage.parts)
        drawn = self._drawn(work.part, i)
        if (work, drawn) not in self._operations:
            self._operations[work, drawn] = tuple(self._ops(work, drawn))
        return work, self._operations[work, drawn]

    def ops(self) -> tuple[tuple[Op, int], ...]:
        """Every operation of the steps so far, and how often it ran."""
        return tuple(self._counts.items())

    def firsts(self) -> tuple[int, ...]:
        """For each operation of `ops`, the first step that ran it."""
        return tuple(self._firsts[op] for op in self._counts)

    def _ops(self, work: Work, drawn: int | None) -> Iterator[Op]:
        """The operations of one step; `drawn` is the number of layers that its coins let run."""
        part = work.part
        if drawn is None:
            trained, depth = self._flops([] if part is None else [part]), self._depth(part)
        else:
            assert isinstance(part, Coins)
            if drawn == 0:
                # No path has 0 layers, but FLOPs are linear in depth: extrapolate from 1 and 2 layers
                one, two = (self._flops(_paths(part.stacks, n)) for n in (1, 2))
                trained = 2 * one - two
            else:
                trained = self._flops(_paths(part.stacks, drawn))
            depth = max([drawn, *(n for a, n in self.stacks.items() if a not in part.stacks)])
        length = self.objective.raw_length
        yield Op("train", depth, self.batch, length, trained, self.updated)
        if work.curvature:
            yield Op("curvature", depth, self.batch, length, trained, self.updated)
        if self.stage.select is not None:
            # One forward pass of the whole model over all rows on offer: a third of a training step
            rows = self.batch * self.stage.select.offers
            forward = self._flops([]) // 3 // self.batch * rows
            yield Op("forward", max(self.stacks.values(), default=0), rows, length, forward, 0)

    def _flops(self, parts: list[Subnet]) -> int:
        return step_flops(self.model, self.objective, self.batch, *parts, loss=self.loss)

    def _depth(self, part: Subnet | None) -> int:
        """The largest number of layers of any stack in a part of the model; None is the whole model."""
        model = self.model
        if part is not None:
            model = eqx.filter_eval_shape(lambda m: part(m, key=jax.random.key(0), step=0), model)
        part_sizes = sizes(model)
        return max((part_sizes[axis] for axis in self.stacks), default=0)

    def _drawn(self, part: Subnet | None, i: int) -> int | None:
        """The number of layers that the coins of a step let run; None for a part without coins."""
        if not (isinstance(part, Coins) and part.tosses):
            return None
        # Drawn in blocks of 1024 steps, since one draw by itself costs a call of JAX
        layers, block = self.axes.size(part.stacks[0]), 1024
        n = self.start + i
        first = n // block * block
        if (part, first) not in self._depths:
            self._depths = {(part, first): part.tossed(layers, self.seed, first, block).sum(1)}
        return int(self._depths[part, first][n - first])


def _paths(stacks: tuple[str, ...], depth: int) -> list[Subnet]:
    """Paths of one depth, one through each of these stacks."""
    return [random_path(depth, keep=(), axis=axis) for axis in stacks]


def step_flops(
    model: Any,
    objective: Objective,
    batch: int,
    *parts: Subnet | None,
    loss: Loss = cross_entropy,
) -> int:
    """Model FLOPs of one training step: three forward passes of the part that is trained.

    `model` may hold arrays or shapes; `parts` are applied one after the other.
    """
    leaves, structure = jax.tree.flatten((model, batch_shapes(objective, 1)))
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x for x in leaves)
    return 3 * batch * _forward_flops(tuple(shapes), structure, parts, loss)


@functools.lru_cache(maxsize=1024)
def _forward_flops(
    leaves: tuple, structure: Any, parts: tuple[Subnet | None, ...], loss: Loss
) -> int:
    """FLOPs of one forward pass over one sequence, from shapes.

    Cached across plans, since the plans of a study share most of their models. A cache needs arguments
    that can be hashed: the leaves' shapes and the tree's structure.
    """

    def forward(model, rows):
        for part in parts:
            model = model if part is None else part(model, key=jax.random.key(0))
        return jax.vmap(lambda row: loss(model, row))(rows)

    with running_on(SHAPES):
        return count_flops(forward, *jax.tree.unflatten(structure, leaves))
