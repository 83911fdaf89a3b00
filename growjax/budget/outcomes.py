"""The outcomes of runs: cost, score and curve, and the pairs of them that may be compared."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from growjax.budget.clock import Clock, Op, cost_of
from growjax.budget.statistics import Interval, Spread, crossed, resampled, spread
from growjax.errors import BudgetError, raise_all


# A run whose learning rate ended above this share of its highest one is undecayed
_DECAYED = 0.1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one run of one arm.

    **Fields**

    - `arm`, `seed`: the arm, and the seed by which runs of two arms are paired.
    - `budget`: the cost that it was allowed, in the unit of the clock that it ran on.
    - `clock`: the `identity` of the clock of `spent` and `curve`.
    - `spent`: its cost, in this clock's unit.
    - `score`: its loss at the end.
    - `decayed`: whether its learning rate had fallen by then; see `decayed`.
    - `curve`: (cost, loss) at evaluations during the run, in their order.
    - `windows`: (windows, 2) float, the sum of the losses and the number of predictions of each held-out
      window at the end, or None. Runs that are compared have the same windows. They may be more than
      those of `score` and `curve`, with another loss: if both runs of a pair have windows, the difference
      is that of the windows.

    Raises `BudgetError` that lists numbers that are not finite, a cost of 0, and windows of another
    shape.

    **Example**

        Outcome("grown", 0, budget=1e12, clock="FLOPs", spent=1e12, score=2.31, decayed=True)
    """

    arm: str
    seed: int
    budget: float
    clock: str
    spent: float
    score: float
    decayed: bool
    curve: tuple[tuple[float, float], ...] = ()
    windows: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self):
        faults = []
        for name, value in (("score", self.score), ("spent", self.spent)):
            if not math.isfinite(value):
                faults.append(f"{name}: expected a finite number, got {value!r}")
        if self.spent <= 0:
            faults.append(f"spent: expected a positive cost, got {self.spent!r}")
        if self.windows is not None:
            # A list is accepted too; fields of a frozen dataclass can be set in this way alone
            object.__setattr__(self, "windows", np.asarray(self.windows, np.float64))
            faults += _window_faults(self)
        raise_all(BudgetError, f"the outcome of {self.arm!r}, seed {self.seed}:", faults)


def _window_faults(outcome: Outcome) -> Iterator[str]:
    """The faults of an outcome's windows, which are an array."""
    windows = outcome.windows
    assert windows is not None
    if windows.ndim != 2 or windows.shape[1] != 2 or len(windows) < 2:
        yield (
            "windows: expected two or more pairs of a summed loss and a number of predictions, got an "
            f"array of shape {windows.shape}"
        )
        return
    losses, weights = windows.T
    if not (np.isfinite(losses).all() and (weights >= 0).all() and weights.sum() > 0):
        yield "windows: expected finite losses and numbers of predictions of 0 or more"


def decayed(last: float, peak: float) -> bool:
    """Whether a learning rate had fallen by the end: to at most a tenth of its highest value."""
    return last <= _DECAYED * peak


def recharged(
    outcome: Outcome, operations: Sequence[tuple[Op, int]], clock: Clock, *, charged_on: Clock
) -> Outcome:
    """The outcome of a run in the unit of another clock.

    **Arguments**

    - `operations`: the run's operations and how often it did each, in the order of its stages. The costs
      of evaluations in between are interpolated linearly.
    - `charged_on`: the clock of the outcome.

    Raises `BudgetError` if the outcome was charged on another clock than `charged_on`, if its operations
    do not add up to `spent`, and for an operation that `clock` does not have.

    **Example**

        operations = [(op, n) for span in plan.spans for op, n in span.ops]
        recharged(outcome, operations, clock, charged_on=plan.clock)
    """
    name = f"the outcome of {outcome.arm!r}, seed {outcome.seed}"
    if outcome.clock != charged_on.identity:
        raise BudgetError(
            f"{name}: charged_on: it was charged on {outcome.clock!r}, got {charged_on.identity!r}"
        )
    # The costs after each kind of operation, on both clocks
    old = [cost / charged_on.per_unit for cost in _cumulative(operations, charged_on)]
    new = [cost / clock.per_unit for cost in _cumulative(operations, clock)]
    if not math.isclose(old[-1], outcome.spent, rel_tol=1e-6):
        raise BudgetError(
            f"{name}: operations: they cost {old[-1]:.8g}, and it spent {outcome.spent:.8g}; give all "
            "of them, and none twice"
        )
    return dataclasses.replace(
        outcome,
        clock=clock.identity,
        spent=new[-1],
        curve=tuple((float(np.interp(x, old, new)), loss) for x, loss in outcome.curve),
    )


def _cumulative(operations: Sequence[tuple[Op, int]], clock: Clock) -> list[int]:
    """The cost so far before the first operations, and after each kind of them."""
    # Python integers: the FLOPs of a long run do not fit into 64 bits
    return list(itertools.accumulate((n * cost_of(op, clock) for op, n in operations), initial=0))


@dataclasses.dataclass(frozen=True)
class Pairs:
    """An arm's scores minus another's, for each seed, and for each window if all runs have windows.

    **Fields**

    - `differences`: in the order of `seeds`, of the windows' losses if all runs have windows.
    - `sums`: (seeds, windows), the differences of the windows' summed losses, or None.
    - `weights`: (windows,), the numbers of predictions of the windows, or None.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    sums: np.ndarray | None = None
    weights: np.ndarray | None = None

    @property
    def over(self) -> str:
        """The samples that the interval counts: "seeds" or "seeds and windows"."""
        return "seeds" if self.sums is None else "seeds and windows"

    def spread(self) -> Spread | None:
        """Mean, error and degrees of freedom; None for one seed, which has no error."""
        if len(self.seeds) < 2:
            return None
        if self.sums is None or self.weights is None:
            return spread(self.differences)
        return crossed(self.sums, self.weights)

    def interval(self, confidence: float = 0.95) -> Interval:
        """The interval of the mean: a bootstrap over seeds and windows, or Student's t over seeds."""
        errors = self.spread()
        if errors is None:
            return np.nan, np.nan
        if self.sums is None or self.weights is None:
            return errors.interval(confidence)
        return resampled(self.sums, self.weights, confidence)


def paired(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> Pairs:
    """The differences of two lists of runs, which have the same seeds in the same order.

    Raises `BudgetError` for runs that were evaluated on different held-out windows.
    """
    seeds = tuple(o.seed for o in ours)
    differences = tuple(a.score - b.score for a, b in zip(ours, theirs, strict=True))
    runs = [*ours, *theirs]
    windows = [o.windows for o in runs if o.windows is not None]
    if len(windows) < len(runs) or not windows:
        return Pairs(seeds, differences)
    weights = windows[0][:, 1]
    faults = [
        f"{o.arm!r}, seed {o.seed}: {len(w)} windows of {w[:, 1].sum():g} predictions"
        for o, w in zip(runs, windows, strict=True)
        if not np.array_equal(w[:, 1], weights)
    ]
    first = f"{len(weights)} windows of {weights.sum():g} predictions"
    headline = f"evaluated on other held-out windows than {ours[0].arm!r}, which has {first}:"
    raise_all(BudgetError, headline, faults)
    losses = np.stack([w[:, 0] for w in windows])  # (runs, windows)
    sums = losses[: len(ours)] - losses[len(ours) :]
    return Pairs(seeds, tuple((sums.sum(1) / weights.sum()).tolist()), sums, weights)


def check_clock(outcomes: Iterable[Outcome]) -> None:
    """Raise `BudgetError` that names the clocks of some runs, if there are several."""
    clocks = sorted({o.clock for o in outcomes})
    if len(clocks) > 1:
        raise BudgetError(
            f"clocks differ: {', '.join(map(repr, clocks))}; charge all runs on one with `recharged`"
        )


def by_seed(outcomes: Iterable[Outcome]) -> dict[int, Outcome]:
    """The runs of one arm by seed; raises `BudgetError` for two runs of one seed."""
    runs: dict[int, Outcome] = {}
    faults = []
    for o in outcomes:
        if o.seed in runs:
            faults.append(f"{o.arm!r} has two runs of seed {o.seed}")
        runs[o.seed] = o
    raise_all(BudgetError, "these runs cannot be compared:", faults)
    return runs
