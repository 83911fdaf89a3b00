"""The frontier: the lowest loss of a baseline at each cost, over all its runs and their evaluations.

An arm has to be compared with the best that its baseline reached at the same cost: with another size,
with another budget, at the end of a decayed run or in the middle of a longer one. A comparison with
anything but the lowest of these makes the arm look better than it is.
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

# Runs of the frontier that share fewer seeds with an arm are left out, and listed
_LEAST = 3
# With fewer seeds there is no verdict, neither here nor in `compare`
SEEDS = 6
# Evaluations in this last share of a decayed run's cost count as its end
_LATE = 0.1
# Budgets end at whole steps: a run that costs this share more counts as of equal cost
SLACK = 0.01


class Point(NamedTuple):
    """The lowest evaluation of a frontier at some cost.

    **Fields**

    - `arm`, `budget`: the run that it belongs to.
    - `cost`, `loss`: its cost and loss, as means over the seeds of `scores`.
    - `share`: its cost as a share of the run's whole cost.
    - `end`: whether it is the end of the run; `decayed`: and its learning rate had fallen by then.
    - `scores`: the loss of each seed.
    - `windows`: the held-out windows of each seed's run, or None, as in `Outcome`; None if not an end.
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
    """The costs at which a frontier reaches some losses, as arrays of their shape.

    `cost` is an estimate between two evaluations of a run. `low` is the cost of the evaluation (or end)
    before it, and `high` the least cost of any evaluation with a loss as low. If the frontier never
    reaches a loss, `cost` and `low` are the largest cost of any run, and `high` is infinite. If the first
    evaluation of the run is as low already, `low` is 0, and `cost` and `high` are its cost.
    """

    low: np.ndarray
    cost: np.ndarray
    high: np.ndarray


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The lowest loss of some runs at each cost; `frontier` makes it.

    **Fields**

    - `runs`: the runs of any number of arms at any budgets.
    - `clock`: the identity of the clock of all of them.
    - `use`: whether "all" evaluations count, or only the "ends" of runs.

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
        """The arms that can be paired with some seeds, the seeds that all have, and the other arms.

        `seeds` None is the seeds of all arms. Arms are taken in the order of how many of the seeds they
        have, most first. An arm is left out if it would leave fewer than 3 seeds in common (or fewer than
        all, if there are fewer than 3).
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
                own = sorted(wanted & runs.keys())
                left_out.append(f"{key[0]} at {key[1]:.6g} (seeds {own})")
        if not chosen:
            raise BudgetError(
                f"frontier: no arm shares {least} of the seeds {sorted(wanted)}: "
                + ", ".join(f"{arm!r} has {sorted(runs)}" for (arm, _), runs in arms.items())
            )
        return chosen, tuple(sorted(common)), tuple(left_out)

    def at(
        self, cost: float, seeds: Collection[int] | None = None, *, slack: float = SLACK
    ) -> Point | None:
        """The evaluation with the lowest mean loss over seeds that costs at most `cost`, or None.

        It is chosen by the seeds that all arms share with `seeds`, and its `scores` are of all of `seeds`
        that its arm has. `slack` is the share by which a run may cost more and still count, since whole
        steps never add up to exactly the same cost. Evaluations in the last tenth of a decayed run count
        as its end.
        """
        chosen, common, _ = self.shared(seeds)
        best: tuple[float, tuple[str, float], float] | None = None
        for key, runs in chosen.items():
            for spent, loss in _means([runs[s] for s in common], self.use):
                if spent <= cost * (1 + slack) and (best is None or loss < best[0]):
                    best = loss, key, spent
        if best is None:
            return None
        # `best` was chosen by common seeds; the point has all seeds of its arm
        _, (arm, budget), most = best
        runs = chosen[arm, budget]
        # For each seed (cost, loss) of its last evaluation up to that cost
        points: dict[int, tuple[float, float]] = {}
        for s, run in runs.items():
            point = _last(run, most, self.use) if seeds is None or s in seeds else None
            if point is not None:
                points[s] = point
        end = all(spent == runs[s].spent for s, (spent, _) in points.items())
        return Point(
            arm,
            budget,
            cost=float(np.mean([spent for spent, _ in points.values()])),
            loss=float(np.mean([loss for _, loss in points.values()])),
            share=float(np.mean([spent / runs[s].spent for s, (spent, _) in points.items()])),
            end=end,
            decayed=end and all(runs[s].decayed for s in points),
            scores={s: loss for s, (_, loss) in sorted(points.items())},
            windows={s: runs[s].windows if end else None for s in sorted(points)},
        )

    def envelope(self, seeds: Collection[int] | None = None) -> tuple[Point, ...]:
        """The points at which the frontier falls, from the cheapest on, as for a step plot."""
        chosen, common, _ = self.shared(seeds)
        costs = {
            spent
            for runs in chosen.values()
            for spent, _ in _means([runs[s] for s in common], self.use)
        }
        points: list[Point] = []
        for cost in sorted(costs):
            point = self.at(cost, common, slack=0.0)
            if point is not None and (not points or point.loss < points[-1].loss):
                points.append(point)
        return tuple(points)

    def cost_of(self, losses: np.ndarray | Sequence[float], seed: int) -> Costs:
        """The costs at which the runs of one seed reach some losses.

        The loss is interpolated linearly between two evaluations of a run, and in the logarithm of the
        cost between the decayed ends that are neighbours on their lower envelope. Losses in between were
        never evaluated; to interpolate them favours the baseline. The estimate is the lowest cost on any
        of these lines.
        """
        runs = [runs[seed] for runs in self.arms.values() if seed in runs]
        losses = np.asarray(losses, np.float64)
        lines = [_falling(_points(run, self.use)) for run in runs]
        ends = _falling((run.spent, run.score) for run in runs if run.decayed)
        # (lines, 3, losses): the costs of the evaluation before, the crossing and the evaluation after
        parts = [_crossing(line, losses) for line in lines]
        if ends:
            parts.append(_crossing(ends, losses, log=True))
        crossings = np.stack(parts)
        # For each loss, the line that reaches it at the lowest cost
        first = crossings[:, 1].argmin(0)
        low, cost, _ = np.take_along_axis(crossings, first[None, None], 0)[0]
        high = crossings[:, 2].min(0)
        most = max(run.spent for run in runs)
        never = np.isinf(high)
        return Costs(np.where(never, most, low), np.where(never, most, cost), high)


def frontier(outcomes: Iterable[Outcome], *, use: Use = "all") -> Frontier:
    """The frontier of some runs: the lowest loss at each cost, over all sizes and budgets of a baseline.

    **Arguments**

    - `outcomes`: the runs of the baseline's arms, which train models of fixed sizes. They may be decayed
      or not, and their curves count as well.
    - `use`: "all" evaluations, or only decayed "ends", as in No Train No Gain.

    At a cost between evaluations its loss is that of the best cheaper one. Raises `BudgetError` without
    runs, for two clocks, and for two runs of one arm, budget and seed; `UndecayedError` for undecayed
    runs, if only ends count.

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
    assert best.arms  # computed here, so that two runs of one seed are refused here
    return best


# Curves -------------------------------------------------------------------------------------------


def _points(run: Outcome, use: Use) -> list[tuple[float, float]]:
    """(cost, loss) of the evaluations of a run that count, from the cheapest on.

    The evaluations near the end of a decayed run are represented by the end: their rates were nearly as
    low, so which of them is lowest is chance, and only the end has held-out windows.
    """
    if use == "ends":
        return [(run.spent, run.score)]
    until = run.spent * (1 - (_LATE if run.decayed else SLACK))
    return [*((x, y) for x, y in run.curve if x < until), (run.spent, run.score)]


def _means(runs: Sequence[Outcome], use: Use) -> list[tuple[float, float]]:
    """(cost, mean loss) over seeds, at the cost of every evaluation by which all seeds have one."""
    costs = sorted({x for run in runs for x, _ in _points(run, use)})
    means = []
    for cost in costs:
        losses = [point[1] for run in runs if (point := _last(run, cost, use)) is not None]
        if len(losses) == len(runs):
            means.append((cost, float(np.mean(losses))))
    return means


def _last(run: Outcome, cost: float, use: Use) -> tuple[float, float] | None:
    """(cost, loss) of the last evaluation of a run that costs at most `cost`, or None."""
    points = _points(run, use)
    index = bisect.bisect_right(points, cost, key=lambda point: point[0])
    return points[index - 1] if index else None


def _falling(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points, in the order of cost, whose loss is lower than all before."""
    line: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not line or y < line[-1][1]:
            line.append((x, y))
    return line


def _crossing(
    line: Sequence[tuple[float, float]], losses: np.ndarray, log: bool = False
) -> np.ndarray:
    """(3, losses): costs of a falling line's last point above each loss, of the loss, of the next point.

    The cost before the first point is 0; all three are infinite for a loss below the line's last point.
    With `log`, the line is straight in the logarithm of the cost.
    """
    xs, ys = np.array(line).T
    above = (ys[:, None] > losses.ravel()).sum(0).reshape(losses.shape)
    before, after = np.append(0.0, xs)[above], np.append(xs, np.inf)[above]
    # np.interp needs ascending values, and losses descend
    cost = np.interp(-losses, -ys, np.log(xs) if log else xs)
    cost = np.exp(cost) if log else cost
    cost = np.where(np.isinf(after), np.inf, np.clip(cost, before, after))
    return np.stack([np.where(np.isinf(after), np.inf, before), cost, after])
