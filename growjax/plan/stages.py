"""A stage of a plan, and the operations and costs of its steps, worked out from shapes alone."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from growjax.axes import sizes
from growjax.budget import Op
from growjax.cards import Card
from growjax.data.objectives import Objective
from growjax.errors import PlanError
from growjax.growth import Births, Operator
from growjax.growth.depth import MASKED
from growjax.optim import Parts
from growjax.plan.timing import Trigger
from growjax.select import Selector
from growjax.subnet import Coins, PathSchedule, Subnet
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
    - `grow`: the operator that the stage starts with. One that is fitted first (`gj.growth.ligo`,
      `gj.growth.gradmax`) is fitted to the stage's first batches, which it trains on afterwards, and
      charged for that.
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
    - `charge`: what was spent on the stage besides its steps and the fit of `grow`, in the clock's unit,
      such as the trials of other operators (`Probe`). The run pays it before the stage's first step.
    - `until`: a trigger that ends the stage by its losses, such as `Plateau(200, 0.005)`, before its
      length, which is then the longest that it may be. It reads losses one step late, and waits for the
      ramp, for warm-ups and for the batches of a fit. What a stage leaves of its share, the next one
      has; without shares the run is shorter. The learning rate goes on from where it is, to the end of
      the schedule.
    - `ended`: the number of steps after which the trigger has ended the stage; the trainer writes it.
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
    until: Trigger | None = None
    ended: Size | None = None
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
        if self.ended is not None and self.until is None:
            yield "ended: it is of a stage that a trigger ends (until=...)"
        elif self.ended is not None and self.ended < self.ramp:
            yield f"ended: after {self.ended} steps the ramp of {self.ramp} is not over"
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
    - `fit_flops`, `fit_tokens`, `fit_cost`: the model FLOPs and training tokens of the fit of its growth,
      and its cost, which is part of `charged`. The run has counted them before the stage's first step.
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
    fit_flops: int = 0
    fit_tokens: int = 0
    fit_cost: int = 0

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
