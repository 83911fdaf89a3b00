"""The frontier: the lowest loss that a baseline was seen at for each cost, over all that was run of it.

An arm that trains for less has to be held against the best that its baseline did at that cost: at another
size, at another budget, at the end of a decayed run or on the way of a longer one. Whichever of those is
lowest is the baseline; choosing another one makes an arm look better than it is.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from growjax.budget.outcomes import Outcome, by_seed, check_clock
from growjax.errors import BudgetError, UndecayedError


Use = Literal["all", "ends"]

# Runs of the frontier that share fewer seeds with an arm are left out, and named
_LEAST = 3
# With fewer seeds no arm is called faster or slower, as in `compare`
SEEDS = 6
# The share of a decayed run's cost whose evaluations are its end
_LATE = 0.1
# Budgets end at whole steps: a run that costs this share more counts as of equal cost
SLACK = 0.01


class Point(NamedTuple):
    """Where a frontier is at some cost: which run is the lowest there, and what its loss is.

    `cost` and `loss` are means over the seeds of `scores`; `share` is the part of that run's cost. `end`
    says that all of it was spent, and `decayed` that its learning rate had fallen by then. `windows`
    has the held-out windows of the seeds whose run kept them, if it is an end.
    """

    arm: str
    budget: float
    cost: float
    loss: float
    share: float
    end: bool
    decayed: bool
    scores: Mapping[int, float]
    windows: Mapping[int, np.ndarray | None]

    def __str__(self) -> str:
        if self.end:
            return f"{self.arm}, at {'its decayed' if self.decayed else 'the undecayed'} end"
        return f"{self.arm}, undecayed, {self.share:.0%} of the way"


class Costs(NamedTuple):
    """What a frontier costs to reach some losses, as arrays of their shape.

    `cost` is an estimate, `high` the least at which a loss as low was seen, and `low` the evaluation (or
    end) before it of the run that the estimate is of. Where the frontier never gets there, `cost` and
    `low` are the most that was spent on any run, and `high` is infinite; where that run is there at its
    first evaluation, `low` is 0 and the others are that evaluation's cost.
    """

    low: np.ndarray
    cost: np.ndarray
    high: np.ndarray


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The lowest loss of some runs at each cost; `frontier` makes it.

    **Fields**

    - `runs`: of any number of arms at any budgets, all on the clock called `clock`.
    - `use`: "all" evaluations, or those at "ends" alone.

    **Example**

        best = frontier(fixed_sizes)
        best.at(1e12).arm, best.at(1e12).loss
    """

    runs: tuple[Outcome, ...]
    clock: str
    use: Use = "all"

    @functools.cached_property
    def arms(self) -> dict[tuple[str, float], dict[int, Outcome]]:
        """The runs of each arm at each budget, by seed."""
        groups: dict[tuple[str, float], list[Outcome]] = {}
        for o in self.runs:
            groups.setdefault((o.arm, o.budget), []).append(o)
        return {key: by_seed(runs) for key, runs in groups.items()}

    def shared(
        self, seeds: Collection[int] | None = None
    ) -> tuple[dict[tuple[str, float], dict[int, Outcome]], tuple[int, ...], tuple[str, ...]]:
        """The arms that can be paired with some seeds, the seeds that all of them have, and who cannot.

        Arms with the most of these seeds come first; one that would leave fewer than 3 of them in common
        (or fewer than all, if they are fewer) is left out, and named.
        """
        arms = self.arms
        wanted = set(itertools.chain(*arms.values())) if seeds is None else set(seeds)
        least = min(_LEAST, len(wanted))
        common, chosen, left_out = wanted, {}, []
        for key, runs in sorted(arms.items(), key=lambda item: -len(wanted & item[1].keys())):
            if len(common & runs.keys()) >= least:
                common = common & runs.keys()
                chosen[key] = runs
            else:
                have = sorted(wanted & runs.keys())
                left_out.append(f"{key[0]} at {key[1]:.6g} (seeds {have})")
        if not chosen:
            raise BudgetError(
                f"frontier: none of its arms shares {least} of the seeds {sorted(wanted)}: "
                + ", ".join(f"{arm!r} has {sorted(runs)}" for (arm, _), runs in arms.items())
            )
        return chosen, tuple(sorted(common)), tuple(left_out)

    def at(
        self, cost: float, seeds: Collection[int] | None = None, *, slack: float = SLACK
    ) -> Point | None:
        """The lowest evaluation that costs no more, in the mean over seeds; None if there is none.

        Which arm and which evaluation that is, is decided over the seeds that all arms share with
        `seeds`; its `scores` are of all of `seeds` that it has. `slack` is the share by which a run may
        cost more and still count: whole steps never come to the same cost. Evaluations in the last tenth
        of a decayed run are its end.
        """
        chosen, common, _ = self.shared(seeds)
        best: tuple[float, tuple[str, float], float] | None = None
        for key, runs in chosen.items():
            for place, loss in _means([runs[s] for s in common], self.use):
                if place <= cost * (1 + slack) and (best is None or loss < best[0]):
                    best = loss, key, place
        if best is None:
            return None
        _, (arm, budget), place = best
        runs = chosen[arm, budget]
        mine = {s: run for s, run in runs.items() if seeds is None or s in seeds}
        points = {s: _last(run, place, self.use) for s, run in mine.items()}
        known = {s: point for s, point in points.items() if point is not None}
        end = all(spent == runs[s].spent for s, (spent, _) in known.items())
        return Point(
            arm,
            budget,
            float(np.mean([spent for spent, _ in known.values()])),
            float(np.mean([loss for _, loss in known.values()])),
            float(np.mean([spent / runs[s].spent for s, (spent, _) in known.items()])),
            end,
            end and all(runs[s].decayed for s in known),
            {s: loss for s, (_, loss) in sorted(known.items())},
            {s: runs[s].windows if end else None for s in sorted(known)},
        )

    def envelope(self, seeds: Collection[int] | None = None) -> tuple[Point, ...]:
        """Every point at which the frontier falls, from the cheapest on: the steps of a figure."""
        chosen, common, _ = self.shared(seeds)
        costs = {
            place
            for runs in chosen.values()
            for place, _ in _means([runs[s] for s in common], self.use)
        }
        points: list[Point] = []
        for cost in sorted(costs):
            point = self.at(cost, common, slack=0.0)
            if point is not None and (not points or point.loss < points[-1].loss):
                points.append(point)
        return tuple(points)

    def cost_of(self, losses: np.ndarray | Sequence[float], seed: int) -> Costs:
        """What it takes to have some losses, by the runs of one seed.

        Between two evaluations of one run, and between the decayed ends of neighbours on the lower
        envelope of ends, the loss is taken to be on a straight line (for ends, in the logarithm of the
        cost). Nobody evaluated what lies between; the lines give it to the baseline, and the estimate is
        the lowest cost that any of them has.
        """
        runs = [runs[seed] for runs in self.arms.values() if seed in runs]
        losses = np.asarray(losses, np.float64)
        lines = [_falling(_points(run, self.use)) for run in runs]
        ends = _falling((run.spent, run.score) for run in runs if run.decayed)
        # (lines, 3, losses): the evaluation before, the crossing and the evaluation after
        parts = [_crossing(line, losses) for line in lines]
        parts += [_crossing(ends, losses, log=True)] if ends else []
        crossings = np.stack(parts)
        first = crossings[:, 1].argmin(0)
        low, cost, _ = np.take_along_axis(crossings, first[None, None], 0)[0]
        high = crossings[:, 2].min(0)
        most = max(run.spent for run in runs)
        never = np.isinf(high)
        return Costs(np.where(never, most, low), np.where(never, most, cost), high)


def frontier(outcomes: Iterable[Outcome], *, use: Use = "all") -> Frontier:
    """The lowest loss of some runs at each cost: all that was run of a baseline, at any size and budget.

    **Arguments**

    - `outcomes`: of the arms that make the baseline: plain runs of fixed sizes. Decayed or not; their
      curves count as well.
    - `use`: "all" is the frontier; "ends" are decayed ends alone, as in No Train No Gain.

    At a cost between evaluations it is the best one that costs no more. Raises `BudgetError` for no runs,
    for two clocks, and for two runs of one arm, budget and seed; `UndecayedError` for ends that are not
    decayed, if ends are all that counts.

    **Example**

        frontier([*small, *middle, *large]).at(4e12)
    """
    runs = tuple(outcomes)
    if not runs:
        raise BudgetError("outcomes: expected the runs of at least one fixed size")
    check_clock(runs)
    undecayed = sorted({o.arm for o in runs if not o.decayed})
    if use == "ends" and undecayed:
        raise UndecayedError(
            f"the learning rate of {', '.join(undecayed)} had not fallen at the end"
        )
    best = Frontier(runs, runs[0].clock, use)
    assert best.arms  # made here, so that what was run twice is refused here
    return best


# Curves -------------------------------------------------------------------------------------------


def _points(run: Outcome, use: Use) -> list[tuple[float, float]]:
    """Evaluations of a run that count, from the cheapest on.

    The last of a decayed run are its end: the rate had all but fallen by then, and which of them is
    lowest is chance. Of its end the held-out windows are kept.
    """
    until = run.spent * (1 - (_LATE if run.decayed else SLACK))
    way = [(x, y) for x, y in run.curve if x < until] if use == "all" else []
    return [*way, (run.spent, run.score)]


def _means(runs: Sequence[Outcome], use: Use) -> list[tuple[float, float]]:
    """The cost of every evaluation of some seeds, and the mean loss of their last ones by then."""
    places = sorted({x for run in runs for x, _ in _points(run, use)})
    points = [[_last(run, place, use) for run in runs] for place in places]
    return [
        (place, float(np.mean([point[1] for point in at if point is not None])))
        for place, at in zip(places, points, strict=True)
        if None not in at
    ]


def _last(run: Outcome, cost: float, use: Use) -> tuple[float, float] | None:
    """Cost and loss of the last evaluation that costs no more."""
    points = _points(run, use)
    index = bisect.bisect_right(points, cost, key=lambda point: point[0])
    return points[index - 1] if index else None


def _falling(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points at which the lowest loss so far falls."""
    falls: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not falls or y < falls[-1][1]:
            falls.append((x, y))
    return falls


def _crossing(
    line: Sequence[tuple[float, float]], losses: np.ndarray, log: bool = False
) -> np.ndarray:
    """(3, losses): the point of a falling line before it has a loss, where it has it, the point after.

    0 before its first point, and infinite beyond its last.
    """
    xs, ys = np.array(line).T
    above = (ys[:, None] > losses.ravel()).sum(0).reshape(losses.shape)
    before, after = np.append(0.0, xs)[above], np.append(xs, np.inf)[above]
    # np.interp wants what it looks up to rise
    place = np.interp(-losses, -ys, np.log(xs) if log else xs)
    place = np.exp(place) if log else place
    place = np.where(np.isinf(after), np.inf, np.clip(place, before, after))
    return np.stack([np.where(np.isinf(after), np.inf, before), place, after])
