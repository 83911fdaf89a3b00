"""Is an arm better than the baseline? Paired by seed, at the same cost, each decayed to its own end.

Two arms of one seed share their birth, the order of the text and the masks, so the difference of their
scores says more than either. Scores are losses: lower is better.

A run that is looked at before its learning rate has fallen looks worse than it is, and an arm that is
compared with such a point looks faster (Kaddour et al., "No Train No Gain", NeurIPS 2023). So an arm's
score counts only at the end of a decayed run. Of a baseline everything counts: `growjax.budget.frontier`.
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

    - `mean`, `interval`: of the difference, with 95%; `over` says whether the interval is over "seeds" or
      over "seeds and windows", the held-out ones.
    - `t_interval`, `bca_interval`: over seeds alone, by Student's t and by the bootstrap.
    - `p`: of flipping signs. `p_t`: of a paired t-test, whose error is over what the interval is over.
    - `p_equivalent`: of two one-sided tests of `margin`; 1 without a margin. Adjusted by Holm's method.
    - `p_holm`: `p_t` adjusted by Holm's method over `family`, the hypotheses that were tested together.
    - `detectable`: the difference that as many seeds would find in four cases of five.
    - `point`: of a frontier, which run of it the arm was held against; `left_out` names its arms that
      share too few seeds with this one.
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
    """The share of the target's cost at which an arm's loss was at the target's, and stayed there.

    `mean` and its 95% `interval` are over seeds; None if some seed never got there, as `reason` says.
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
    """Every arm against the baseline at its cost, over the seeds that both have.

    **Arguments**

    - `baseline`: an arm's name, all at one budget; or a frontier, against which every arm is held at its
      own cost and at each of its budgets.
    - `margin`: a difference within it counts as none, in the unit of the scores; state it before the
      runs. Without one, nothing is called equivalent.
    - `allow_undecayed`: compare arms whose learning rate had not fallen all the same, and name them.
    - `slack`: the share by which the frontier may cost more than an arm.

    An arm is better (or worse) if the t-test adjusted by Holm's method and the flipping of signs agree on
    it at `alpha` and the interval leaves 0 out; equivalent if two one-sided tests show it; otherwise no
    difference was found, which is not the same. With fewer than 6 seeds nothing is said. (Holm over
    flipped signs would decide nothing: with 6 seeds and two arms the smallest p is 0.0625.)

    Raises `BudgetError` for runs on different clocks, judged on different held-out windows, at different
    budgets (without a frontier), or twice of one seed, for a baseline that has no run, an arm that
    shares no seed with it and one that costs less than all of the frontier, all at once;
    `UndecayedError` if learning rates had not fallen.

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
            f"the learning rate of {', '.join(undecayed)} had not fallen at the score: such a point "
            "looks worse than the run would. Decay it within the budget, or allow_undecayed=True"
        )
    pairs = [paired(r.ours, r.theirs) for r in rivals]
    spreads = [pair.spread() for pair in pairs]
    p_t = [1.0 if e is None else e.p() for e in spreads]
    same = [1.0 if e is None or margin is None else e.p_equivalent(margin) for e in spreads]
    family = tuple(f"{r.ours[0].arm} at {r.ours[0].budget:.6g}" for r in rivals)
    rows = []
    for rival, pair, *p in zip(rivals, pairs, p_t, holm(p_t), holm(same), strict=True):
        ours, theirs, point, left_out = rival
        flips = sign_flip(pair.differences)
        verdict, reason = _verdict(pair, (flips, p[1], p[2]), margin, alpha, len(family))
        late = {o.arm for o in [*ours, *theirs] if not o.decayed}
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
                undecayed=tuple(sorted(late)),
                point=point,
                left_out=left_out,
                verdict=verdict,
                reason=reason,
            )
        )
    return rows


def cost_to_reach(outcomes: Sequence[Outcome], *arms: str, target: str) -> list[Reach]:
    """For what share of the target's cost each arm had the loss that the target ended with.

    Between two evaluations it is read off a straight line. The last crossing counts: a loss that rises
    again has not arrived. Budgets may differ, clocks may not.
    """
    known = _by_arm(outcomes, target)
    missing = [arm for arm in arms if arm not in known]
    raise_all(BudgetError, "these arms have no runs:", missing)
    rows = []
    for arm in arms:
        seeds = sorted(known[arm].keys() & known[target].keys())
        shares = []
        for seed in seeds:
            run, goal = known[arm][seed], known[target][seed]
            place = _arrival(run.curve, goal.score)
            shares.append(None if place is None else place / goal.spent)
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
    """A verdict as people read it: never a difference that was not found as an equality.

    **Example**

        words("no difference found", 0.01, (-0.02, 0.04)) == "no difference found (-0.020 to 0.040)"
    """
    low, high = interval
    span = f"({low:.3f} to {high:.3f})"
    if verdict in ("better", "worse"):
        low, high = sorted((abs(low), abs(high)))
        return f"{verdict} by {abs(mean):.3f} ({low:.3f} to {high:.3f})"
    if verdict == "equivalent":
        return f"equivalent within {margin:g} {span}"
    if verdict == "no difference found":
        return f"{verdict} {span}"
    # The interval of one seed is not a number
    return f"too few seeds to say {span if low == low else f'({mean:+.3f})'}"


# Verdicts -----------------------------------------------------------------------------------------


def _verdict(
    pair: Pairs,
    p: tuple[float, float, float],
    margin: float | None,
    alpha: float,
    family: int,
) -> tuple[Verdict, str]:
    """What may be said of some differences; `p` is of flipped signs, of Holm's and of equivalence."""
    flips, p_holm, p_same = p
    if len(pair.seeds) < SEEDS:
        return "too few seeds", f"{len(pair.seeds)} seeds, and a claim takes {SEEDS}"
    low, high = pair.interval()
    apart = low > 0 or high < 0
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
    """Runs that are paired, in the order of their seeds, and the point of a frontier if it is one."""

    ours: list[Outcome]
    theirs: list[Outcome]
    point: Point | None = None
    left_out: tuple[str, ...] = ()


def _at_budget(outcomes: Sequence[Outcome], baseline: str) -> list[_Rival]:
    """Every arm and an arm of the same budget."""
    budgets = sorted({o.budget for o in outcomes})
    several = f"budgets differ: {', '.join(f'{b:.6g}' for b in budgets)}; compare one at a time"
    arms = _by_arm(outcomes, baseline, [several] if len(budgets) > 1 else [])
    base = arms.pop(baseline)
    rivals = []
    for runs in arms.values():
        seeds = sorted(base.keys() & runs.keys())
        rivals.append(_Rival([runs[s] for s in seeds], [base[s] for s in seeds]))
    return rivals


def _at_frontier(outcomes: Sequence[Outcome], against: Frontier, slack: float) -> list[_Rival]:
    """Every arm at each of its budgets, and the lowest of the frontier at its cost."""
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
            faults.append(f"{arm!r} at {budget:.6g}: nothing of the frontier costs so little")
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
                # On a frontier everything counts, whatever its rate was
                decayed=True,
                windows=point.windows[s],
            )
            for s in seeds
        ]
        left_out = against.shared(runs.keys())[2]
        rivals.append(_Rival([runs[s] for s in seeds], theirs, point, left_out))
    raise_all(BudgetError, "these runs cannot be held against the frontier:", faults)
    return rivals


def _by_arm(
    outcomes: Sequence[Outcome], needed: str, faults: Sequence[str] = ()
) -> dict[str, dict[int, Outcome]]:
    """The runs of each arm by seed, if all of them can be paired with those of one."""
    check_clock(outcomes)
    faults = list(faults)
    arms: dict[str, dict[int, Outcome]] = {}
    for o in outcomes:
        if o.seed in arms.setdefault(o.arm, {}):
            faults.append(f"{o.arm!r} has two runs of seed {o.seed}")
        arms[o.arm][o.seed] = o
    if needed not in arms:
        faults.append(f"{needed!r} has no run; there are {', '.join(map(repr, arms))}")
    faults += [
        f"{arm!r} shares no seed with {needed!r}: {sorted(runs)} and {sorted(arms[needed])}"
        for arm, runs in arms.items()
        if needed in arms and not runs.keys() & arms[needed].keys()
    ]
    raise_all(BudgetError, "these runs cannot be compared:", faults)
    return arms


def _arrival(curve: Sequence[tuple[float, float]], goal: float) -> float | None:
    """Where a curve falls to a goal and stays; None if it does not."""
    place = curve[0][0] if curve and curve[0][1] <= goal else None
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 <= goal < y0:
            place = x0 + (x1 - x0) * (y0 - goal) / (y0 - y1)
        elif y1 > goal:
            place = None
    return place
