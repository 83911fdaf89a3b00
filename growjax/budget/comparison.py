"""Comparisons of arms with a baseline: paired by seed, at the same cost, each at the end of its decay.

Runs of one seed share their initial parameters, the order of the text and the masks, so the difference of
two scores varies less than either. Scores are losses: lower is better.

Before its learning rate has fallen, a run's loss is higher than a decayed run would have at that cost,
and an arm that is compared with such a point seems faster than it is (Kaddour et al., "No Train No Gain",
NeurIPS 2023). So an arm is scored only at the end of a decayed run. All evaluations of a baseline count:
see `growjax.budget.frontier`.
"""

import itertools
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from growjax.budget.envelope import SEEDS, SLACK, Frontier, Point
from growjax.budget.outcomes import Outcome, Pairs, by_seed, check_clock, paired
from growjax.budget.statistics import (
    Interval,
    bca_interval,
    detectable,
    holm,
    sign_flip,
    t_interval,
)
from growjax.errors import BudgetError, UndecayedError, raise_all


Verdict = Literal["better", "worse", "equivalent", "no difference found", "too few seeds"]


class Comparison(NamedTuple):
    """An arm against the baseline at one cost; differences are arm minus baseline.

    **Fields**

    - `differences`: of the scores, in the order of `seeds`.
    - `mean`, `interval`: the mean difference and its 95% interval; `over` is "seeds", or "seeds and
      windows" if the interval also counts the held-out windows as a sample.
    - `t_interval`, `bca_interval`: intervals over seeds alone, by Student's t and by the bootstrap.
    - `p`: of the sign-flip test. `p_t`: of a paired t-test with the same error as `interval`.
    - `p_holm`: `p_t` adjusted by Holm's method over `family`, the hypotheses that were tested together.
    - `p_equivalent`: of two one-sided tests of `margin`, adjusted by Holm's method; 1 without a margin.
    - `detectable`: the difference that this many seeds detect with a power of 0.8.
    - `undecayed`: the arms of this comparison whose learning rate had not fallen.
    - `point`: the point of the frontier that the arm is compared with, if the baseline is a frontier;
      `left_out` names arms of the frontier that share too few seeds with this one.
    - `verdict`, `reason`: the result, and what limits it.
    """

    arm: str
    baseline: str
    budget: float
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    interval: Interval
    over: str
    t_interval: Interval
    bca_interval: Interval
    p: float
    p_t: float
    p_holm: float
    p_equivalent: float
    family: tuple[str, ...]
    detectable: float
    margin: float | None
    undecayed: tuple[str, ...]
    point: Point | None
    left_out: tuple[str, ...]
    verdict: Verdict
    reason: str

    def __str__(self) -> str:
        """The verdict in words, with the interval."""
        return words(self.verdict, self.mean, self.interval, self.margin)


class Reach(NamedTuple):
    """The share of the target's cost after which an arm's loss stayed at or below the target's last loss.

    `mean` and its 95% `interval` are over seeds; None if some seed never reached that loss, as `reason`
    says.
    """

    arm: str
    target: str
    shares: tuple[float | None, ...]
    mean: float | None
    interval: Interval | None
    reason: str


def compare(
    outcomes: Sequence[Outcome],
    baseline: str | Frontier,
    *,
    margin: float | None = None,
    alpha: float = 0.05,
    allow_undecayed: bool = False,
    slack: float = SLACK,
) -> list[Comparison]:
    """Every arm against the baseline at the same cost, over the seeds that both have.

    **Arguments**

    - `baseline`: the name of an arm, with all runs at one budget; or a frontier, with which every arm is
      compared at its own cost and at each of its budgets.
    - `margin`: the largest difference of scores that does not matter; choose it before the runs. Without
      one, nothing is called equivalent.
    - `alpha`: the level of the tests.
    - `allow_undecayed`: whether to compare arms whose learning rate had not fallen; they are listed in
      `undecayed`.
    - `slack`: the share by which the frontier may cost more than an arm.

    An arm is better (or worse) if the t-test adjusted by Holm's method and the sign-flip test are both
    significant at `alpha`, and the interval excludes 0. It is equivalent if two one-sided tests are
    significant. Otherwise the verdict is "no difference found", which does not mean equal. With fewer
    than 6 seeds it is "too few seeds". (Holm's method over sign-flip tests would decide nothing: with 6
    seeds and two arms the smallest adjusted p is 0.0625.)

    Raises `BudgetError` that lists all of these: runs on different clocks, with different held-out
    windows, at different budgets (without a frontier), or twice of one seed; a baseline without runs; an
    arm that shares no seed with it, or costs less than all of the frontier. Raises `UndecayedError` if
    learning rates had not fallen.

    **Example**

        compare(outcomes, "AdamW")[0].verdict
        compare(grown, frontier(fixed_sizes), margin=0.01)[0].interval
    """
    if isinstance(baseline, Frontier):
        rivals = _at_frontier(outcomes, baseline, slack)
    else:
        rivals = _at_budget(outcomes, baseline)
    undecayed = sorted({o.arm for r in rivals for o in [*r.ours, *r.theirs] if not o.decayed})
    if undecayed and not allow_undecayed:
        raise UndecayedError(
            f"the learning rate of {', '.join(undecayed)} had not fallen at the score: a decayed run "
            "would score better. Decay it within the budget, or pass allow_undecayed=True"
        )
    pairs = [paired(r.ours, r.theirs) for r in rivals]
    p_t, p_same = [], []
    for pair in pairs:
        spread = pair.spread()  # None for a single seed, which decides nothing
        p_t.append(1.0 if spread is None else spread.p())
        if spread is None or margin is None:
            p_same.append(1.0)
        else:
            p_same.append(spread.p_equivalent(margin))
    family = tuple(f"{r.ours[0].arm} at {r.ours[0].budget:.6g}" for r in rivals)
    rows = []
    for rival, pair, *p in zip(rivals, pairs, p_t, holm(p_t), holm(p_same), strict=True):
        ours, theirs, point, left_out = rival
        flips = sign_flip(pair.differences)
        verdict, reason = _verdict(pair, (flips, p[1], p[2]), margin, alpha, len(family))
        undecayed_arms = {o.arm for o in [*ours, *theirs] if not o.decayed}
        rows.append(
            Comparison(
                arm=ours[0].arm,
                baseline=str(point or baseline),
                budget=ours[0].budget,
                seeds=pair.seeds,
                differences=pair.differences,
                mean=statistics.fmean(pair.differences),
                interval=pair.interval(),
                over=pair.over,
                t_interval=t_interval(pair.differences),
                bca_interval=bca_interval(pair.differences),
                p=flips,
                p_t=p[0],
                p_holm=p[1],
                p_equivalent=p[2],
                family=family,
                detectable=detectable(pair.differences),
                margin=margin,
                undecayed=tuple(sorted(undecayed_arms)),
                point=point,
                left_out=left_out,
                verdict=verdict,
                reason=reason,
            )
        )
    return rows


def cost_to_reach(outcomes: Sequence[Outcome], *arms: str, target: str) -> list[Reach]:
    """The share of the target's cost at which each arm reached the loss that the target ended with.

    Losses between two evaluations are interpolated linearly. The last crossing counts: a loss that rises
    above the target's again has not reached it. Budgets may differ, clocks may not.
    """
    runs_of = _by_arm(outcomes, target)
    missing = [arm for arm in arms if arm not in runs_of]
    raise_all(BudgetError, "these arms have no runs:", missing)
    rows = []
    for arm in arms:
        seeds = sorted(runs_of[arm].keys() & runs_of[target].keys())
        shares = []
        for seed in seeds:
            run, goal = runs_of[arm][seed], runs_of[target][seed]
            cost = _arrival(run.curve, goal.score)
            shares.append(None if cost is None else cost / goal.spent)
        reached = [share for share in shares if share is not None]
        reason, mean, interval = "", None, None
        if len(reached) < len(shares):
            reason = f"{len(reached)} of {len(shares)} seeds reached the loss of {target}"
        else:
            mean = statistics.fmean(reached)
            interval = t_interval(reached) if len(reached) > 1 else None
        rows.append(Reach(arm, target, tuple(shares), mean, interval, reason))
    return rows


def words(verdict: str, mean: float, interval: Interval, margin: float | None = None) -> str:
    """A verdict with its mean or interval, as text.

    **Example**

        words("no difference found", 0.01, (-0.02, 0.04)) == "no difference found (-0.020 to 0.040)"
    """
    low, high = interval
    span = f"({low:.3f} to {high:.3f})"
    if verdict in ("better", "worse"):
        # The verdict has the direction, so the numbers need no sign
        low, high = sorted((abs(low), abs(high)))
        return f"{verdict} by {abs(mean):.3f} ({low:.3f} to {high:.3f})"
    if verdict == "equivalent":
        return f"equivalent within {margin:g} {span}"
    if verdict == "no difference found":
        return f"{verdict} {span}"
    # The interval of one seed is NaN, which is not equal to itself
    return f"too few seeds to say {span if low == low else f'({mean:+.3f})'}"


# Verdicts -----------------------------------------------------------------------------------------


def _verdict(
    pair: Pairs,
    p: tuple[float, float, float],
    margin: float | None,
    alpha: float,
    family: int,
) -> tuple[Verdict, str]:
    """The verdict on an arm, and its reason.

    `p` are those of the sign-flip test, of the t-test after Holm, and of equivalence; `family` is the
    number of hypotheses that were tested together.
    """
    flips, p_holm, p_same = p
    if len(pair.seeds) < SEEDS:
        return "too few seeds", f"{len(pair.seeds)} seeds, and a claim takes {SEEDS}"
    low, high = pair.interval()
    apart = low > 0 or high < 0
    # Two one-sided tests at alpha are significant if the interval at 1 - 2 alpha is within the margin
    within = pair.interval(1 - 2 * alpha)
    small = margin is not None and -margin < within[0] and within[1] < margin
    if flips <= alpha and p_holm <= alpha and apart:
        verdict: Verdict = "better" if statistics.fmean(pair.differences) < 0 else "worse"
        return verdict, f"but by less than the margin of {margin:g}" if small else ""
    if small and p_same <= alpha:
        return "equivalent", ""
    reason = f"{len(pair.seeds)} seeds find {detectable(pair.differences):.2g} or more"
    if apart:
        reason = (
            f"its own interval leaves 0 out, and of {family} tested together some would: p {p_holm:.2g} "
            f"after Holm, {flips:.2g} by flipping signs"
        )
    return "no difference found", reason


# Runs ---------------------------------------------------------------------------------------------


class _Rival(NamedTuple):
    """Runs of an arm and of its baseline, paired in the order of their seeds.

    `point` is that of the frontier, if the baseline is one.
    """

    ours: list[Outcome]
    theirs: list[Outcome]
    point: Point | None = None
    left_out: tuple[str, ...] = ()


def _at_budget(outcomes: Sequence[Outcome], baseline: str) -> list[_Rival]:
    """Every arm paired with the baseline arm, at the one budget of all."""
    budgets = sorted({o.budget for o in outcomes})
    faults = []
    if len(budgets) > 1:
        listed = ", ".join(f"{budget:.6g}" for budget in budgets)
        faults.append(f"budgets differ: {listed}; compare one at a time")
    arms = _by_arm(outcomes, baseline, faults)
    base = arms.pop(baseline)
    rivals = []
    for runs in arms.values():
        seeds = sorted(base.keys() & runs.keys())
        rivals.append(_Rival([runs[s] for s in seeds], [base[s] for s in seeds]))
    return rivals


def _at_frontier(outcomes: Sequence[Outcome], against: Frontier, slack: float) -> list[_Rival]:
    """Every arm at each of its budgets, paired with the lowest run of the frontier at its cost."""
    check_clock([*outcomes, against.runs[0]])
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault((o.arm, o.budget), []).append(o)
    rivals, faults = [], []
    for (arm, budget), group in groups.items():
        runs = by_seed(group)
        cost = statistics.fmean(o.spent for o in group)
        try:
            point = against.at(cost, runs.keys(), slack=slack)
        except BudgetError as error:
            faults.append(f"{arm!r} at {budget:.6g}: {error}")
            continue
        if point is None:
            faults.append(f"{arm!r} at {budget:.6g}: every run of the frontier costs more")
            continue
        seeds = sorted(point.scores)
        theirs = [
            Outcome(
                arm=str(point),
                seed=s,
                budget=budget,
                clock=against.clock,
                spent=point.cost,
                score=point.scores[s],
                # An undecayed point counts as the baseline, so it is no reason to refuse the arm
                decayed=True,
                windows=point.windows[s],
            )
            for s in seeds
        ]
        left_out = against.shared(runs.keys())[2]
        rivals.append(_Rival([runs[s] for s in seeds], theirs, point, left_out))
    raise_all(BudgetError, "these runs cannot be compared with the frontier:", faults)
    return rivals


def _by_arm(
    outcomes: Sequence[Outcome], needed: str, faults: Sequence[str] = ()
) -> dict[str, dict[int, Outcome]]:
    """The runs of each arm by seed. Raises `BudgetError` unless each shares seeds with the arm `needed`.

    `faults` are raised together with those noted here.
    """
    check_clock(outcomes)
    faults = list(faults)
    arms: dict[str, dict[int, Outcome]] = {}
    for o in outcomes:
        if o.seed in arms.setdefault(o.arm, {}):
            faults.append(f"{o.arm!r} has two runs of seed {o.seed}")
        arms[o.arm][o.seed] = o
    if needed not in arms:
        faults.append(f"{needed!r} has no run; expected one of {', '.join(map(repr, arms))}")
    faults += [
        f"{arm!r} shares no seed with {needed!r}: {sorted(runs)} and {sorted(arms[needed])}"
        for arm, runs in arms.items()
        if needed in arms and not runs.keys() & arms[needed].keys()
    ]
    raise_all(BudgetError, "these runs cannot be compared:", faults)
    return arms


def _arrival(curve: Sequence[tuple[float, float]], goal: float) -> float | None:
    """The cost at which a curve of (cost, loss) last falls to a loss; None if it ends above it."""
    cost = curve[0][0] if curve and curve[0][1] <= goal else None
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 <= goal < y0:
            cost = x0 + (x1 - x0) * (y0 - goal) / (y0 - y1)
        elif y1 > goal:
            cost = None
    return cost
