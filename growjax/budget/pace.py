"""Speed-ups: the cost at which a frontier reaches an arm's loss, divided by the arm's cost."""

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

    - `estimate`: the mean over seeds.
    - `bound`: "=" if the estimate is a value; ">=" if in some seed no run of the frontier reached the
      loss, so that it is a lower bound; "<=" if in some seed the frontier's first evaluation had reached
      it already.
    - `interval`: the 95% interval of the mean; infinite, or 0, on the side that a bound leaves open; None
      for one seed. `over` is "seeds", or "seeds and windows" if held-out windows count as a sample too.
    - `bracket`: the mean speed-ups by the evaluations before and after the crossings, between which the
      estimate interpolates.
    - `values`: the speed-up of each of `seeds`.
    - `left_out`: arms of the frontier that share too few seeds.
    - `verdict`: "faster" or "slower" if the interval excludes 1, and the bracket too (up to 1%), with six
      seeds or more; "open" for a bound whose interval includes 1. It concerns this arm alone: only
      `compare` corrects for several arms.
    - `reason`: what limits the estimate.
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
    """How many times faster an arm is than a frontier, at each of its budgets.

    **Arguments**

    - `outcomes`: the runs of `arm`, and those of `against` if it is an arm's name; others are ignored.
    - `against`: a frontier, or the name of an arm for the frontier of all its runs.
    - `allow_undecayed`: whether to accept an arm whose learning rate had not fallen, and which therefore
      seems slower than it is.

    The interval is Student's t over seeds. If the arm and the frontier's run at its cost have held-out
    windows, it is a bootstrap over seeds and windows instead, in which the windows change the arm's loss
    relative to that run's.

    Raises `BudgetError` for an arm without runs and for two clocks, and `UndecayedError` if the learning
    rate of the arm had not fallen.

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
    """The speed-up of an arm's runs at one budget, which are given by seed."""
    rivals, seeds, left_out = _rivals(against, runs)
    spent = np.array([runs[s].spent for s in seeds])
    windows = _windows(runs, against, seeds)
    if windows is not None:
        # The end has more windows than the evaluations of a curve, so its loss is more exact
        runs = {s: dataclasses.replace(runs[s], score=loss) for s, loss in windows.goals.items()}
    low, value, high = _costs(rivals, runs, seeds) / spent
    # Seeds whose loss the frontier never reaches, or has reached at its first evaluation
    never, at_once = np.isinf(high), low == 0
    mean, over = float(value.mean()), "seeds"
    bracket = float(low.mean()), float(high.mean())
    if never.any():
        # For these seeds the value is the baseline's largest cost, a lower bound: so the mean is one too,
        # if seeds with an upper bound count as 0
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
        interval = (_end(value, 0), _end(value, 1)) if len(seeds) > 1 else None
        if windows is not None and len(seeds) > 1:
            interval, over = _over_windows(runs, rivals, windows, spent), "seeds and windows"
    reasons = [reason] if reason else []
    if not all(o.decayed for o in runs.values()):
        reasons.append("its learning rate had not fallen")
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
        "; ".join(reasons),
    )


def _rivals(
    against: Frontier, runs: Mapping[int, Outcome]
) -> tuple[Frontier, tuple[int, ...], tuple[str, ...]]:
    """The part of a frontier that some runs are compared with, their common seeds, and arms left out.

    An arm with few seeds would remove the other seeds from the comparison. It stays only if the costs of
    the frontier change without it, in any seed.
    """
    chosen, seeds, left_out = against.shared(runs.keys())
    against = _only(against, chosen)
    costs = _costs(against, runs, seeds)
    # Arms with the fewest seeds come last in `chosen`, and are tried first
    for key in reversed(list(chosen)):
        fewer = {k: group for k, group in chosen.items() if k != key}
        removed = runs.keys() - chosen[key].keys()
        if removed and fewer and np.array_equal(_costs(_only(against, fewer), runs, seeds), costs):
            chosen = fewer
    against = _only(against, chosen)
    return against, against.shared(runs.keys())[1], left_out


def _only(against: Frontier, arms: Collection[tuple[str, float]]) -> Frontier:
    """The frontier of some of its arms, given as (arm, budget)."""
    return dataclasses.replace(
        against, runs=tuple(o for o in against.runs if (o.arm, o.budget) in arms)
    )


def _costs(against: Frontier, runs: Mapping[int, Outcome], seeds: Sequence[int]) -> np.ndarray:
    """(3, seeds): `low`, `cost` and `high` (see `Costs`) at which a frontier reaches the runs' scores."""
    return np.concatenate([np.stack(against.cost_of([runs[s].score], s)) for s in seeds], axis=1)


def _end(values: np.ndarray, side: int) -> float:
    """The lower (side 0) or upper (1) end of the interval of a mean; 0 or infinity for a single seed.

    Student's interval of few values may reach below 0, where no ratio of costs can be.
    """
    if len(values) < 2:
        return (0.0, math.inf)[side]
    return max(t_interval(values.tolist())[side], 0.0)


def _pace(bound: Bound, bracket: Interval, interval: Interval | None, seeds: int) -> Pace:
    """The verdict: the side of 1 that the interval is on, and the bracket too, up to `SLACK`."""
    if seeds < SEEDS or interval is None:
        return "too few seeds"
    if interval[0] > 1 and bracket[0] >= 1 - SLACK:
        return "faster"
    if interval[1] < 1 and bracket[1] <= 1 + SLACK:
        return "slower"
    return "no difference found" if bound == "=" else "open"


class _Windows(NamedTuple):
    """An arm and the frontier's run at its cost, paired by windows.

    `goals` are the losses, by seed, that the frontier has to reach: that run's scores plus the
    differences by windows.
    """

    pairs: Pairs
    goals: dict[int, float]


def _windows(
    runs: Mapping[int, Outcome], against: Frontier, seeds: Sequence[int]
) -> _Windows | None:
    """The pairs by windows; None if a run has no windows, or if the frontier's point is not an end."""
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

    The same windows are drawn for the arm and for the frontier's run at its cost. The difference of the
    two changes with the draw, and so does the loss that the frontier has to reach.
    """
    sums, weights, seeds = windows.pairs.sums, windows.pairs.weights, windows.pairs.seeds
    assert sums is not None and weights is not None
    rng = np.random.default_rng(0)
    # A draw of windows is the same text for all seeds: (draws,), the change of the mean difference
    shifts = window_draws(sums.mean(0)[None], weights, rng)[:, 0]
    shifts = shifts - sums.sum(1).mean() / weights.sum()
    by_seed = [
        rivals.cost_of(runs[s].score + shifts, s).cost / cost
        for s, cost in zip(seeds, spent, strict=True)
    ]
    speed_ups = np.stack(by_seed, axis=1)  # (draws, seeds)
    drawn = seed_draws(len(seeds), rng)
    means = speed_ups.mean(1) + widening(len(seeds)) * (drawn * speed_ups).sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return max(float(low), 0.0), float(high)
