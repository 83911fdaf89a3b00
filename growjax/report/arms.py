"""An arm as figures and tables need it: its runs, the size of its model, and where its stages begin."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from growjax.budget import Outcome
from growjax.plan.plan import Plan
from growjax.report.rows import Row


@dataclasses.dataclass(frozen=True)
class Part:
    """A stage of an arm, from `start` to `stop` in the clock's unit."""

    label: str
    start: float
    stop: float


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs that differ in the seed alone.

    **Fields**

    - `outcomes`: one for each seed, all charged on one clock.
    - `parameters`: of the model at the end.
    - `fixed`: it trains all of one model from the first step to the last; fixed arms make the frontier.
    - `free`: its clock does not charge some of its operations, so that its costs are not comparable.
    - `workload`, `budget`: arms that agree in both are compared with the frontier together, as the family
      of Holm's method.
    - `stages`: of the first seed.
    - `flops`, `seconds`: of training, of each seed in the order of `outcomes`; empty if not known.

    **Example**

        Arm("small", outcomes, parameters=40_000, fixed=True).loss
    """

    name: str
    outcomes: tuple[Outcome, ...]
    parameters: int = 0
    fixed: bool = False
    free: bool = False
    workload: str = ""
    budget: str = ""
    stages: tuple[Part, ...] = ()
    flops: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    unit: str = "FLOPs"

    @property
    def costs(self) -> list[float]:
        """The cost of every seed, in the clock's unit."""
        return [o.spent for o in self.outcomes]

    @property
    def cost(self) -> float:
        """The mean of `costs`."""
        return float(np.mean(self.costs))

    @property
    def scores(self) -> list[float]:
        """The loss at the end of every seed, in nats."""
        return [o.score for o in self.outcomes]

    @property
    def loss(self) -> float:
        """The mean of `scores`."""
        return float(np.mean(self.scores))

    @property
    def spread(self) -> float | None:
        """The standard deviation of `scores`; None for one seed."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Cost and loss of each evaluation on the way, means over seeds."""
        marks = zip(*(o.curve for o in self.outcomes), strict=False)
        return [tuple(np.mean(points, axis=0).tolist()) for points in marks]

    def shared(self, other: "Arm") -> "Arm":
        """The seeds that another arm has as well, in their order."""
        seeds = {o.seed for o in other.outcomes}
        order = sorted(range(len(self.outcomes)), key=lambda i: self.outcomes[i].seed)
        chosen = [i for i in order if self.outcomes[i].seed in seeds]
        return dataclasses.replace(
            self,
            outcomes=tuple(self.outcomes[i] for i in chosen),
            flops=tuple(self.flops[i] for i in chosen if self.flops),
            seconds=tuple(self.seconds[i] for i in chosen if self.seconds),
        )

    @property
    def decayed(self) -> bool:
        """Whether every seed ended with a decayed learning rate."""
        return all(o.decayed for o in self.outcomes)


def fixed_size(plan: Plan) -> bool:
    """Whether a run trains all of one model, born for it, from its first step to its last."""
    return plan.start is None and all(
        stage.grow is None and stage.subnet is None and stage.select is None
        for stage in plan.stages
    )


def place(*names: str) -> str:
    """The workload and the budget of arms in words, without those that are empty.

    **Example**

        place("gpt", "4x") == "gpt, 4x"
    """
    return ", ".join(filter(None, names))


Placed = TypeVar("Placed", bound=Arm | Row)


def by_place(placed: Iterable[Placed]) -> dict[tuple[str, str], list[Placed]]:
    """Arms, or rows about them, by workload and budget, in the order in which they come."""
    groups: dict[tuple[str, str], list[Placed]] = {}
    for each in placed:
        groups.setdefault((each.workload, each.budget), []).append(each)
    return groups


def sizes_in_words(numbers: Sequence[int]) -> str:
    """Numbers of parameters in words.

    **Example**

        sizes_in_words([40_032, 628_608]) == "40k and 629k parameters, none between"
    """
    names = [f"{n / 1000:.0f}k" if n < 10**6 else f"{n / 10**6:.3g}M" for n in numbers]
    if len(names) < 2:
        return f"{names[0]} parameters alone" if names else "none"
    between = ", none between" if len(names) == 2 else ""
    return f"{', '.join(names[:-1])} and {names[-1]} parameters{between}"
