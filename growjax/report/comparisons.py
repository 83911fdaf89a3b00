"""Arms compared: at equal cost, each at its own cost, by how much faster they are, with the frontier.

Every function makes rows of a summary. Arms are paired by seed, over the seeds that two of them share.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from growjax.budget import (
    Comparison,
    Frontier,
    compare,
    cost_to_reach,
    frontier,
    sign_flip,
    speed_up,
    t_interval,
)
from growjax.budget.envelope import SEEDS, SLACK
from growjax.errors import BudgetError
from growjax.report.arms import Arm, by_place
from growjax.report.rows import AgainstFrontier, EqualCost, OwnCost, SpeedUp


# An arm as another clock charges it; raises BudgetError for an operation that the clock does not know
Recharge = Callable[[Arm], Arm]
LOSS = "held-out nats, lower is better"


def equal_cost(
    arms: Sequence[Arm], baseline: str, *, measure: str = LOSS, higher: bool = False
) -> Iterator[EqualCost]:
    """Every arm against the baseline, all at one cost; undecayed arms are compared, and named.

    `higher` says that the scores of `measure` are better where they are higher: differences and intervals
    keep the sign of the scores, and verdicts their sense.
    """
    sign = -1 if higher else 1
    budget = next(arm.cost for arm in arms if arm.name == baseline)
    outcomes = [
        dataclasses.replace(o, score=sign * o.score, budget=budget)
        for arm in arms
        for o in arm.outcomes
    ]
    for c in compare(outcomes, baseline, allow_undecayed=True):
        yield EqualCost(
            question=f"{c.arm} against {baseline} at equal cost: {measure}",
            baseline=baseline,
            measure=measure,
            **_numbers(c, sign),
        )


def _numbers(c: Comparison, sign: int = 1) -> dict[str, Any]:
    """The fields that rows of equal cost have in common."""
    return {
        "estimate": sign * c.mean,
        "interval": _signed(c.interval, sign),
        "seeds": len(c.seeds),
        "verdict": c.verdict,
        "arm": c.arm,
        "p": c.p,
        "p_t": c.p_t,
        "p_holm": c.p_holm,
        "bootstrap": _signed(c.bca_interval, sign),
        "over": c.over,
        "differences": tuple(sign * x for x in c.differences),
        "detectable": c.detectable,
        "margin": c.margin,
        "undecayed": c.undecayed,
        "reason": c.reason,
    }


def _signed(interval: tuple[float, float], sign: int) -> tuple[float, float]:
    low, high = sorted(sign * x for x in interval)
    return low, high


def own_cost(
    arms: Sequence[Arm], target: str, *, clocks: Mapping[str, Recharge] | None = None
) -> Iterator[OwnCost]:
    """The loss of every arm minus that of a target of another cost, and the share of the target's cost.

    `clocks` charge the same runs in other ways.
    """
    goal = next(arm for arm in arms if arm.name == target)
    for arm in arms:
        if arm.name == target:
            continue
        ours, theirs = arm.shared(goal), goal.shared(arm)
        gaps = [a - b for a, b in zip(ours.scores, theirs.scores, strict=True)]
        low, high = t_interval(gaps)
        verdict = "lower" if high < 0 else "higher" if low > 0 else "no difference found"
        (reach,) = cost_to_reach([*ours.outcomes, *theirs.outcomes], arm.name, target=target)
        yield OwnCost(
            question=f"{arm.name} against {target}, each at its own cost: held-out nats",
            estimate=statistics.fmean(gaps),
            interval=(low, high),
            seeds=len(gaps),
            verdict=verdict if len(gaps) >= SEEDS else "too few seeds",
            arm=arm.name,
            baseline=target,
            p=sign_flip(gaps),
            differences=tuple(gaps),
            cost=_share(ours.costs, theirs.costs),
            flops=_share(ours.flops, theirs.flops),
            seconds=_share(ours.seconds, theirs.seconds),
            cost_to_reach=reach.mean,
            cost_to_reach_interval=reach.interval,
            reached=reach.shares,
            reason=reach.reason or f"every seed reached the loss of {target}",
            clocks={
                name: _recharged(ours, theirs, recharge)
                for name, recharge in (clocks or {}).items()
            },
        )


def _share(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The mean of the quotients; None if they are unknown."""
    quotients = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.fmean(quotients) if quotients else None


def _recharged(ours: Arm, theirs: Arm, recharge: Recharge) -> dict[str, Any]:
    """The same costs on another clock, if it knows all operations of both."""
    try:
        ours, theirs = recharge(ours), recharge(theirs)
    except BudgetError as error:
        return {"reason": str(error)}
    (reach,) = cost_to_reach([*ours.outcomes, *theirs.outcomes], ours.name, target=theirs.name)
    return {
        "cost": _share(ours.costs, theirs.costs),
        "cost_to_reach": reach.mean,
        "reached": reach.shares,
    }


def speed_ups(
    arms: Sequence[Arm], baselines: Sequence[Arm], baseline: str, *, clock: str = ""
) -> Iterator[SpeedUp]:
    """How many times its cost the baseline needs for each arm's loss.

    **Arguments**

    - `baselines`: the baseline at each of its budgets; with a single budget, no rows are given.
    - `clock`: the name of the clock that charges all of these, if it is not the runs' own.
    """
    if len({arm.cost for arm in baselines}) < 2:
        return
    outcomes = [
        dataclasses.replace(o, arm=baseline, budget=arm.cost)
        for arm in baselines
        for o in arm.outcomes
    ]
    best = frontier(outcomes)
    largest = max(arm.cost for arm in baselines)
    longest_run = frontier(o for o in outcomes if o.budget == largest)
    charged = f", charged by {clock}" if clock else ""
    for arm in arms:
        (pace,) = speed_up(arm.outcomes, arm.name, best, allow_undecayed=True)
        (naive,) = speed_up(arm.outcomes, arm.name, longest_run, allow_undecayed=True)
        yield SpeedUp(
            workload=arm.workload,
            budget=arm.budget,
            question=f"speed-up of {arm.name} over all that was run of {baseline}{charged}",
            estimate=pace.estimate,
            interval=pace.interval,
            seeds=len(pace.seeds),
            verdict=pace.verdict,
            arm=arm.name,
            baseline=baseline,
            bound=pace.bound,
            naive=naive.estimate,
            clock=clock,
            reason=pace.reason,
        )


# The frontier ------------------------------------------------------------------------------------


def frontier_of(arms: Sequence[Arm]) -> Frontier | None:
    """The frontier that the fixed ones of some arms make; None without one."""
    fixed = [o for arm in arms if arm.fixed for o in arm.outcomes]
    return frontier(fixed) if fixed else None


def against_frontier(arms: Sequence[Arm], *, margin: float | None = None) -> list[AgainstFrontier]:
    """Every arm that is not of one fixed size against the frontier of those that are.

    `margin` is as in `growjax.budget.compare`. Undecayed arms are compared, and named as such. Arms whose
    clock leaves something out (`free`) have no row.

    **Example**

        small = Arm("small", outcomes, parameters=40_000, fixed=True)
        against_frontier([small, Arm("grown", others, parameters=629_000)])[0].verdict
    """
    best = frontier_of(arms)
    if best is None:
        return []
    grown = [arm for arm in arms if not (arm.fixed or arm.free)]
    rows = []
    for (workload, budget), group in by_place(grown).items():
        outcomes = [o for arm in group for o in arm.outcomes]
        comparisons = compare(outcomes, best, margin=margin, allow_undecayed=True)
        for arm, equal in zip(group, comparisons, strict=True):
            (pace,) = speed_up(arm.outcomes, arm.name, best, allow_undecayed=True)
            used = best.shared({o.seed for o in arm.outcomes})[0]
            sizes = {
                fixed.parameters
                for fixed in arms
                if (fixed.name, fixed.outcomes[0].budget) in used
                and fixed.cost >= arm.cost * (1 - SLACK)
            }
            rows.append(
                AgainstFrontier(
                    workload=workload,
                    budget=budget,
                    question=f"{arm.name} against the best fixed size at equal cost",
                    baseline=equal.baseline,
                    measure=LOSS,
                    loss=arm.loss,
                    cost=arm.cost,
                    speed_up=pace.estimate,
                    bound=pace.bound,
                    speed_up_interval=pace.interval,
                    pace=pace.verdict,
                    pace_reason=pace.reason,
                    family=len(equal.family),
                    left_out=equal.left_out,
                    sizes=tuple(sorted(sizes)),
                    **_numbers(equal),
                )
            )
    return rows
