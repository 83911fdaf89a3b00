"""How runs ended, and which of them may be compared."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from growjax.budget.clock import Clock, Op
from growjax.budget.statistics import Interval, Spread, crossed, resampled, spread
from growjax.errors import BudgetError, raise_all


# A run whose learning rate ended above this share of its highest one is undecayed
_DECAYED = 0.1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one run of one arm ended.

    **Fields**

    - `arm`, `seed`: runs of one seed are paired.
    - `budget`: what it was given, in the unit of the clock that it ran on.
    - `clock`: the `identity` of its clock.
    - `spent`: what it spent, in this clock's unit.
    - `score`: its loss at the end.
    - `decayed`: whether its learning rate had fallen by then, see `decayed`.
    - `curve`: pairs of what was spent and the loss at evaluations on the way, in their order.
    - `windows`: (windows, 2) float, of each held-out window the sum of its losses and the number of its
      predictions, at the end; None if they were not kept. Runs that are compared have the same windows.
      There may be more of them than `score` and `curve` were taken over, so that their loss is another:
      where both runs of a pair have windows, their difference is of these.

    Raises `BudgetError` for numbers that are not finite, a cost of 0, and windows of another shape, all
    at once.

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
            object.__setattr__(self, "windows", np.asarray(self.windows, np.float64))
            faults += _window_faults(self)
        raise_all(BudgetError, f"the outcome of {self.arm!r}, seed {self.seed}:", faults)


def _window_faults(outcome: Outcome) -> Iterator[str]:
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
    """Whether a learning rate had fallen by the end: to a tenth of its highest value, or less."""
    return last <= _DECAYED * peak


def recharged(
    outcome: Outcome, operations: Sequence[tuple[Op, int]], clock: Clock, *, was: Clock
) -> Outcome:
    """A run as another clock charges it.

    **Arguments**

    - `operations`: what it did and how often, in the order of its stages; evaluations on the way lie on
      straight lines between their ends.
    - `was`: the clock that it ran on.

    Raises `BudgetError` if the outcome was charged on another clock than `was`, if its operations do not
    add up to what it spent, and for an operation that `clock` does not know.

    **Example**

        recharged(outcome, [(op, n) for span in plan.spans for op, n in span.ops], clock, was=plan.clock)
    """
    name = f"the outcome of {outcome.arm!r}, seed {outcome.seed}"
    if outcome.clock != was.identity:
        raise BudgetError(f"{name}: was: it was charged on {outcome.clock!r}, got {was.identity!r}")
    then, now = ([x / c.per_unit for x in _course(operations, c)] for c in (was, clock))
    if not math.isclose(then[-1], outcome.spent, rel_tol=1e-6):
        raise BudgetError(
            f"{name}: operations: they cost {then[-1]:.8g}, and it spent {outcome.spent:.8g}; give all "
            "of them, and none twice"
        )
    return dataclasses.replace(
        outcome,
        clock=clock.identity,
        spent=now[-1],
        curve=tuple((float(np.interp(x, then, now)), loss) for x, loss in outcome.curve),
    )


def _course(operations: Sequence[tuple[Op, int]], clock: Clock) -> list[int]:
    """What was spent, from nothing on, once each kind of operation was done."""
    # Whole numbers of any size: the FLOPs of a long run do not fit into 64 bits
    return list(itertools.accumulate((n * clock.cost(op) for op, n in operations), initial=0))


@dataclasses.dataclass(frozen=True)
class Pairs:
    """An arm's scores minus another's, seed by seed, and window by window where both kept them.

    `differences` are in the order of `seeds`: of the windows' losses, if all runs kept them. `sums`
    (seeds, windows) and `weights` (windows,) are None if some did not.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    sums: np.ndarray | None = None
    weights: np.ndarray | None = None

    @property
    def over(self) -> str:
        """What the interval is over: "seeds" or "seeds and windows"."""
        return "seeds" if self.sums is None else "seeds and windows"

    def spread(self) -> Spread | None:
        """Mean, error and degrees of freedom; None for one seed, which tells no error."""
        if len(self.seeds) < 2:
            return None
        if self.sums is None or self.weights is None:
            return spread(self.differences)
        return crossed(self.sums, self.weights)

    def interval(self, confidence: float = 0.95) -> Interval:
        """Of the mean: the bootstrap over seeds and windows, or Student's t over seeds alone."""
        errors = self.spread()
        if errors is None:
            return np.nan, np.nan
        if self.sums is None or self.weights is None:
            return errors.interval(confidence)
        return resampled(self.sums, self.weights, confidence)


def paired(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> Pairs:
    """The differences of runs, which come in pairs of one seed.

    Raises `BudgetError` for runs that were judged on different held-out windows.
    """
    seeds = tuple(o.seed for o in ours)
    differences = tuple(a.score - b.score for a, b in zip(ours, theirs, strict=True))
    windows = [o.windows for o in [*ours, *theirs]]
    known = [w for w in windows if w is not None]
    if len(known) < len(windows) or not known:
        return Pairs(seeds, differences)
    weights = known[0][:, 1]
    other = [
        f"{o.arm!r}, seed {o.seed}: {len(w)} windows of {w[:, 1].sum():g} predictions"
        for o, w in zip([*ours, *theirs], known, strict=True)
        if not np.array_equal(w[:, 1], weights)
    ]
    first = f"{len(weights)} windows of {weights.sum():g} predictions"
    headline = f"judged on other held-out windows than {ours[0].arm!r}, which has {first}:"
    raise_all(BudgetError, headline, other)
    sums = np.stack(
        [a[:, 0] - b[:, 0] for a, b in zip(known[: len(ours)], known[len(ours) :], strict=True)]
    )
    return Pairs(seeds, tuple((sums.sum(1) / weights.sum()).tolist()), sums, weights)


def check_clock(outcomes: Iterable[Outcome]) -> None:
    """Raises `BudgetError` that names the clocks, if there are several."""
    clocks = sorted({o.clock for o in outcomes})
    if len(clocks) > 1:
        raise BudgetError(
            f"clocks differ: {', '.join(map(repr, clocks))}; charge all runs on one (`recharged`)"
        )


def by_seed(outcomes: Iterable[Outcome]) -> dict[int, Outcome]:
    """Runs of one arm by seed; raises `BudgetError` for two of one."""
    runs: dict[int, Outcome] = {}
    twice = []
    for o in outcomes:
        if o.seed in runs:
            twice.append(f"{o.arm!r} has two runs of seed {o.seed}")
        runs[o.seed] = o
    raise_all(BudgetError, "these runs cannot be compared:", twice)
    return runs
