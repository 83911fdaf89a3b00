"""How much faster than a frontier an arm is: what the frontier needs for its loss, over its cost."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from growjax.budget.envelope import SEEDS, SLACK, Frontier, frontier
from growjax.budget.outcomes import Outcome, Pairs, by_seed, check_clock, paired
from growjax.budget.statistics import (
    Interval,
    seed_draws,
    t_interval,
    widening,
    window_draws,
)
from growjax.errors import BudgetError, UndecayedError


Bound = Literal["=", ">=", "<="]
Pace = Literal["faster", "slower", "no difference found", "open", "too few seeds"]


class SpeedUp(NamedTuple):
    """How many times an arm's cost a frontier needs to reach the arm's loss.

    **Fields**

    - `estimate`: the mean over seeds. `bound` says what it is: "=", or ">=" if the frontier never got
      there within what was run, "<=" if it was there at its first evaluation, in some seed.
    - `interval`: 95% of the mean; open (infinite, or 0) on the side that a bound leaves open, and None
      for one seed. `over` says whether it is over seeds, or over seeds and held-out windows.
    - `bracket`: the means of what the evaluations before and after the crossings would give.
    - `values`: of each of `seeds`.
    - `left_out`: arms of the frontier that share too few seeds.
    - `verdict`: "faster" or "slower" if the interval leaves 1 out, the bracket too (but for 1%), over six
      seeds or more; "open" if it is a bound that leaves 1 in. It is of this arm alone: no correction for
      several is in it, as there is in `compare`, which decides.
    """

    arm: str
    budget: float
    estimate: float
    bound: Bound
    interval: Interval | None
    bracket: Interval
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    over: str
    left_out: tuple[str, ...]
    verdict: Pace
    reason: str

    def __str__(self) -> str:
        value = f"{'' if self.bound == '=' else self.bound + ' '}{self.estimate:.2f}"
        if self.interval is None or self.bound != "=":
            return value
        return f"{value} ({self.interval[0]:.2f} to {self.interval[1]:.2f})"


def speed_up(
    outcomes: Sequence[Outcome],
    arm: str,
    against: Frontier | str,
    *,
    allow_undecayed: bool = False,
) -> list[SpeedUp]:
    """How much faster an arm is than a frontier, at each of its budgets.

    **Arguments**

    - `outcomes`: with the runs of `arm`, and those of `against` if it is an arm's name.
    - `against`: a frontier; the name of an arm stands for the frontier of all its runs.
    - `allow_undecayed`: take an arm whose own rate had not fallen, which looks slower than it is.

    The interval is Student's t over seeds; where the arm and the run of the frontier at its cost kept
    their held-out windows, a bootstrap over both (the windows move the arm's loss against that run's).

    **Example**

        speed_up(outcomes, "grown", frontier(fixed_sizes))[0].estimate
    """
    if isinstance(against, str):
        against = frontier(o for o in outcomes if o.arm == against)
    ours = [o for o in outcomes if o.arm == arm]
    check_clock([*ours, against.runs[0]])
    if not ours:
        raise BudgetError(f"arm: {arm!r} has no run")
    if not (allow_undecayed or all(o.decayed for o in ours)):
        raise UndecayedError(f"the learning rate of {arm} had not fallen at the score")
    rows = []
    for budget in sorted({o.budget for o in ours}):
        runs = by_seed(o for o in ours if o.budget == budget)
        rows.append(_pace_of(arm, budget, runs, against))
    return rows


def _pace_of(arm: str, budget: float, runs: dict[int, Outcome], against: Frontier) -> SpeedUp:
    rivals, seeds, left_out = _rivals(against, runs)
    spent = np.array([runs[s].spent for s in seeds])
    pairs = _windows(runs, against, seeds)
    if pairs is not None:
        # What is to be reached, by the many windows of the end: curves have the few of each mark
        runs = {s: dataclasses.replace(runs[s], score=loss) for s, loss in pairs.goals.items()}
    low, value, high = _costs(rivals, runs, seeds) / spent
    never, at_once = np.isinf(high), low == 0
    mean, over = float(value.mean()), "seeds"
    bracket = float(low.mean()), float(high.mean())
    if never.any():
        # The largest the baseline was given is a lower bound, and so is any mean with it in it
        bound: Bound = ">="
        value = np.where(at_once, 0.0, value)
        mean = float(value.mean())
        interval = (_end(value, 0), math.inf)
        reason = f"{never.sum()} of {len(seeds)} seeds have a loss that the baseline never reached"
    elif at_once.any():
        bound, interval = "<=", (0.0, _end(value, 1))
        reason = (
            f"{at_once.sum()} of {len(seeds)} seeds have a loss worse than its first evaluation"
        )
    else:
        bound, reason = "=", ""
        interval = t_interval(value.tolist()) if len(seeds) > 1 else None
        if pairs is not None and len(seeds) > 1:
            interval, over = _over_windows(runs, rivals, pairs, spent), "seeds and windows"
    undecayed = (
        "its learning rate had not fallen" if not all(o.decayed for o in runs.values()) else ""
    )
    return SpeedUp(
        arm,
        budget,
        mean,
        bound,
        interval,
        bracket,
        tuple(value.tolist()),
        seeds,
        over,
        left_out,
        _pace(bound, bracket, interval, len(seeds)),
        "; ".join(filter(None, [reason, undecayed])),
    )


def _rivals(
    against: Frontier, runs: Mapping[int, Outcome]
) -> tuple[Frontier, tuple[int, ...], tuple[str, ...]]:
    """The arms of a frontier that some runs are held against, over which seeds, and who is left out.

    An arm with few seeds would take the others' seeds out of the comparison: it stays if it changes what
    the frontier costs in any seed that it has.
    """
    chosen, seeds, left_out = against.shared(runs.keys())
    against = _only(against, chosen)
    costs = _costs(against, runs, seeds)
    # Those with the fewest seeds come last
    for key in reversed(list(chosen)):
        fewer = {k: group for k, group in chosen.items() if k != key}
        limits = runs.keys() - chosen[key].keys()
        if limits and fewer and np.array_equal(_costs(_only(against, fewer), runs, seeds), costs):
            chosen = fewer
    against = _only(against, chosen)
    return against, against.shared(runs.keys())[1], left_out


def _only(against: Frontier, arms: Collection[tuple[str, float]]) -> Frontier:
    return dataclasses.replace(
        against, runs=tuple(o for o in against.runs if (o.arm, o.budget) in arms)
    )


def _costs(against: Frontier, runs: Mapping[int, Outcome], seeds: Sequence[int]) -> np.ndarray:
    """(3, seeds): the least, the estimate and the most of what a frontier costs to reach some runs."""
    costs = [against.cost_of([runs[s].score], s) for s in seeds]
    return np.stack([np.concatenate(part) for part in zip(*costs, strict=True)])


def _end(values: np.ndarray, side: int) -> float:
    """One end of the interval of a mean over seeds; of one seed, what leaves all open."""
    if len(values) < 2:
        return (0.0, math.inf)[side]
    return max(t_interval(values.tolist())[side], 0.0)


def _pace(bound: Bound, bracket: Interval, interval: Interval | None, seeds: int) -> Pace:
    """Which side of 1 a speed-up is on, if its interval is, and what evaluations left open."""
    if seeds < SEEDS or interval is None:
        return "too few seeds"
    if interval[0] > 1 and bracket[0] >= 1 - SLACK:
        return "faster"
    if interval[1] < 1 and bracket[1] <= 1 + SLACK:
        return "slower"
    return "no difference found" if bound == "=" else "open"


class _Windows(NamedTuple):
    """An arm against the frontier's run at its cost, window by window; and the losses that this makes.

    `goals` are that run's scores and the windows' differences.
    """

    pairs: Pairs
    goals: dict[int, float]


def _windows(
    runs: Mapping[int, Outcome], against: Frontier, seeds: Sequence[int]
) -> _Windows | None:
    """None where some run did not keep its windows, or where the frontier is on some run's way."""
    point = against.at(float(np.mean([runs[s].spent for s in seeds])), seeds)
    if point is None or any(point.windows.get(s) is None for s in seeds):
        return None
    best = against.arms[point.arm, point.budget]
    pairs = paired([runs[s] for s in seeds], [best[s] for s in seeds])
    if pairs.sums is None:
        return None
    gaps = dict(zip(seeds, pairs.differences, strict=True))
    return _Windows(pairs, {s: best[s].score + gap for s, gap in gaps.items()})


def _over_windows(
    runs: Mapping[int, Outcome], rivals: Frontier, windows: _Windows, spent: np.ndarray
) -> Interval:
    """The interval of a speed-up over seeds and windows.

    Windows are drawn for the arm and for the frontier's run at its cost alike: the difference of the two
    moves by so much, and with it the loss that the frontier has to reach.
    """
    sums, weights, seeds = windows.pairs.sums, windows.pairs.weights, windows.pairs.seeds
    assert sums is not None and weights is not None
    rng = np.random.default_rng(0)
    # One draw of windows is the same text for all seeds
    shifts = window_draws(sums.mean(0)[None], weights, rng)[:, 0]
    shifts = shifts - sums.sum(1).mean() / weights.sum()
    moved = np.stack(
        [
            rivals.cost_of(runs[s].score + shifts, s).cost / cost
            for s, cost in zip(seeds, spent, strict=True)
        ],
        axis=1,
    )  # (draws, seeds)
    drawn = seed_draws(len(seeds), rng)
    means = moved.mean(1) + widening(len(seeds)) * (drawn * moved).sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return max(float(low), 0.0), float(high)
