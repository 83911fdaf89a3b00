"""Is an arm better than the baseline? Paired by seed, at the same cost, each decayed to its own end.

Two arms of one seed share their birth, the order of the text and the masks, so the difference of their
scores says more than either. Scores are losses: lower is better.

A run that is looked at before its learning rate has fallen looks worse than it is, and an arm that is
compared with such a point looks faster (Kaddour et al., "No Train No Gain", NeurIPS 2023). So a score
counts only at the end of a decayed run, and `speed_up` puts the flattering number next to the honest one.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from growjax.errors import BudgetError, UndecayedError, raise_all


Verdict = Literal["better", "worse", "equivalent", "undecided"]
Interval = tuple[float, float]

# Five seeds cannot reach p < 0.05 by flipping signs: the smallest of S seeds is 2 / 2^S
_SEEDS = 6
# Up to so many seeds every pattern of signs is tried
_EXACT = 16


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one run of one arm ended.

    **Fields**

    - `arm`, `seed`: runs of one seed are paired.
    - `budget`: what it was given, in the unit of the clock that it ran on.
    - `clock`: the `identity` of its clock.
    - `spent`: what it spent, in this clock's unit.
    - `score`: its loss at the end.
    - `decayed`: whether its learning rate had fallen by then.
    - `curve`: pairs of what was spent and the loss on the way.
    """

    arm: str
    seed: int
    budget: float
    clock: str
    spent: float
    score: float
    decayed: bool
    curve: tuple[tuple[float, float], ...] = ()


class Comparison(NamedTuple):
    """An arm against the baseline at one budget; differences are arm minus baseline.

    `t_interval` and `bca_interval` (bootstrap) hold 95%. `p` is that of flipping signs, `p_t` of a paired
    t-test and `p_holm` that one adjusted for all arms of the comparison. `detectable` is the difference
    that so many seeds would find in four cases of five, and `margin` what counts as none.
    """

    arm: str
    baseline: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    t_interval: Interval
    bca_interval: Interval
    p: float
    p_t: float
    p_holm: float
    detectable: float
    margin: float
    undecayed: tuple[str, ...]
    verdict: Verdict
    reason: str


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


class SpeedUp(NamedTuple):
    """What the baseline would have to be given for the arm's loss, over what the arm was given.

    `decayed` reads it off the ends of baselines that were decayed within budgets of their own, `naive`
    off the way of the largest one, whose learning rate was still high: the pitfall. None where the arm's
    loss is outside of what the baselines reached.
    """

    arm: str
    budget: float
    decayed: float | None
    decayed_interval: Interval | None
    naive: float | None
    naive_interval: Interval | None
    seeds: tuple[int, ...]
    reason: str


def compare(
    outcomes: Sequence[Outcome],
    baseline: str,
    *,
    margin: float | None = None,
    alpha: float = 0.05,
    allow_undecayed: bool = False,
) -> list[Comparison]:
    """Every arm against the baseline, over the seeds that both have.

    **Arguments**

    - `margin`: differences within it are none; the standard deviation of the baseline over its seeds by
      default.
    - `allow_undecayed`: compare them all the same, and say which they are.

    An arm is better (or worse) if the t-test adjusted by Holm's method and the flipping of signs agree on
    it at `alpha`; equivalent if the 90% interval is within the margin; undecided otherwise, and always
    with fewer than 6 seeds. (Holm over flipped signs would decide nothing: with 6 seeds and two arms the
    smallest p is 0.0625.)

    Raises `BudgetError` for runs on different clocks, at different budgets, or twice of one seed, for a
    baseline that is not there and an arm that shares no seed with it, all at once; `UndecayedError`, one,
    if learning rates had not fallen.

    **Example**

        compare(outcomes, "AdamW")[0].verdict
    """
    arms = _by_arm(outcomes, baseline)
    undecayed = sorted({o.arm for o in outcomes if not o.decayed})
    if undecayed and not allow_undecayed:
        raise UndecayedError(
            f"the learning rate of {', '.join(undecayed)} had not fallen at the score: such a point "
            "looks worse than the run would. Decay it within the budget, or allow_undecayed=True"
        )
    base = arms.pop(baseline)
    width = _deviation([o.score for o in base.values()]) if margin is None else margin
    found = []
    for arm, runs in arms.items():
        seeds = sorted(base.keys() & runs.keys())
        differences = [runs[s].score - base[s].score for s in seeds]
        found.append((arm, seeds, differences, t_test(differences)))
    adjusted = holm([p for *_, p in found])
    rows = []
    for (arm, seeds, differences, p_t), p_holm in zip(found, adjusted, strict=True):
        p = sign_flip(differences)
        verdict, reason = _verdict(differences, p, p_holm, width, alpha)
        rows.append(
            Comparison(
                arm,
                baseline,
                tuple(seeds),
                tuple(differences),
                statistics.fmean(differences),
                t_interval(differences),
                bca_interval(differences),
                p,
                p_t,
                p_holm,
                detectable(differences),
                width,
                tuple(a for a in (arm, baseline) if a in undecayed),
                verdict,
                reason,
            )
        )
    return rows


def cost_to_reach(outcomes: Sequence[Outcome], *arms: str, target: str) -> list[Reach]:
    """For what share of the target's cost each arm had the loss that the target ended with.

    Between two looks at the loss it is read off a straight line. The last crossing counts: a loss that
    rises again has not arrived. Budgets may differ, clocks may not.
    """
    known = _by_arm(outcomes, target, same_budget=False)
    missing = [arm for arm in arms if arm not in known]
    raise_all(BudgetError, "these arms have no runs:", missing)
    rows = []
    for arm in arms:
        seeds = sorted(known[arm].keys() & known[target].keys())
        shares = []
        for seed in seeds:
            at, goal = known[arm][seed], known[target][seed]
            place = _arrival(at.curve, goal.score)
            shares.append(None if place is None else place / goal.spent)
        there = [share for share in shares if share is not None]
        reason = ""
        if len(there) < len(shares):
            reason = f"{len(there)} of {len(shares)} seeds reached the loss of {target}"
        whole = not reason
        interval = t_interval(there) if whole and len(there) > 1 else None
        mean = statistics.fmean(there) if whole else None
        rows.append(Reach(arm, target, tuple(shares), mean, interval, reason))
    return rows


def speed_up(
    outcomes: Sequence[Outcome], arm: str, baseline: str, *, allow_undecayed: bool = False
) -> list[SpeedUp]:
    """How much faster an arm is than the baseline at each of its budgets, honestly and naively.

    The honest one needs the baseline at two budgets or more: between their ends the loss is a straight
    line in the logarithm of the budget. `naive` needs the curve of the largest.

    **Example**

        [(s.budget, s.decayed, s.naive) for s in speed_up(outcomes, "stacking", "AdamW")]
    """
    _same_clock(outcomes)
    ours = {(o.budget, o.seed): o for o in outcomes if o.arm == arm}
    base = {(o.budget, o.seed): o for o in outcomes if o.arm == baseline}
    loose = sorted({o.arm for o in [*ours.values(), *base.values()] if not o.decayed})
    if loose and not allow_undecayed:
        raise UndecayedError(f"the learning rate of {', '.join(loose)} had not fallen at the score")
    budgets = sorted({b for b, _ in base})
    if len(budgets) < 2:
        raise BudgetError(
            f"baseline: a speed-up needs {baseline!r} at two budgets or more, got {budgets}"
        )
    whole = {s for _, s in base if all((b, s) in base for b in budgets)}
    rows = []
    for budget in sorted({b for b, _ in ours}):
        seeds = sorted(s for s in whole if (budget, s) in ours)
        honest, naive = [], []
        for s in seeds:
            score = ours[budget, s].score
            spent = ours[budget, s].spent
            ends = [(math.log(base[b, s].spent), base[b, s].score) for b in budgets]
            place = _arrival(ends, score, extend=False)
            honest.append(None if place is None else math.exp(place) / spent)
            on_way = _arrival(base[budgets[-1], s].curve, score, first=True)
            naive.append(None if on_way is None else on_way / spent)
        rows.append(
            SpeedUp(arm, budget, *_over(honest), *_over(naive), tuple(seeds), _gaps(honest))
        )
    return rows


# Statistics --------------------------------------------------------------------------------------


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The interval of a mean by Student's t; not a number below two values."""
    if len(values) < 2:
        return math.nan, math.nan
    from scipy.stats import t  # SciPy's statistics take a second to import

    mean, error = statistics.fmean(values), _deviation(values) / len(values) ** 0.5
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def bca_interval(values: Sequence[float], confidence: float = 0.95, draws: int = 9999) -> Interval:
    """The interval of a mean by the bootstrap, corrected for bias and acceleration; always the same."""
    if len(values) < 2 or _deviation(values) == 0:
        return (math.nan, math.nan) if len(values) < 2 else (values[0], values[0])
    from scipy.stats import bootstrap

    rng = np.random.default_rng(0)
    found = bootstrap(
        (np.asarray(values),), np.mean, confidence_level=confidence, n_resamples=draws, rng=rng
    )
    low, high = found.confidence_interval
    return float(low), float(high)


def sign_flip(values: Sequence[float], draws: int = 100_000) -> float:
    """How often a mean this far from 0 comes about if every sign is a coin: exact up to 16 values."""
    x = np.asarray(values, np.float64)
    if len(x) <= _EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(x))))
    else:
        rng = np.random.default_rng(0)
        signs = np.concatenate(
            [np.ones((1, len(x))), rng.choice((1.0, -1.0), size=(draws, len(x)))]
        )
    sums = np.abs(signs @ x)
    # Sums that are equal but for rounding are as far
    return float(np.mean(sums >= abs(x.sum()) * (1 - 1e-12)))


def t_test(values: Sequence[float]) -> float:
    """The two-sided p of a mean of 0; 1 below two values."""
    if len(values) < 2:
        return 1.0
    if _deviation(values) == 0:
        return 1.0 if values[0] == 0 else 0.0
    from scipy.stats import t

    statistic = statistics.fmean(values) / (_deviation(values) / len(values) ** 0.5)
    return float(2 * t.sf(abs(statistic), len(values) - 1))


def holm(p: Sequence[float]) -> list[float]:
    """The p of several tests, each raised so that one false find among all is as rare as in one test."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min((len(p) - rank) * p[i], 1.0))
        adjusted[i] = highest
    return adjusted


def detectable(values: Sequence[float], power: float = 0.8) -> float:
    """The difference that so many seeds with such a spread find with this power."""
    if len(values) < 2:
        return math.nan
    from scipy.stats import t

    degrees = len(values) - 1
    factor = float(t.ppf(0.975, degrees) + t.ppf(power, degrees))
    return factor * _deviation(values) / len(values) ** 0.5


def _verdict(
    differences: Sequence[float], p: float, p_holm: float, margin: float, alpha: float
) -> tuple[Verdict, str]:
    if len(differences) < _SEEDS:
        return "undecided", f"{len(differences)} seeds, and a claim takes {_SEEDS}"
    low, high = t_interval(differences, 1 - 2 * alpha)
    small = -margin < low and high < margin
    if p <= alpha and p_holm <= alpha:
        verdict: Verdict = "better" if statistics.fmean(differences) < 0 else "worse"
        return verdict, "but by less than the baseline's own spread" if small else ""
    if small:
        return "equivalent", ""
    return "undecided", f"{len(differences)} seeds find {detectable(differences):.2g} or more"


# Runs --------------------------------------------------------------------------------------------


def _by_arm(
    outcomes: Sequence[Outcome], needed: str, same_budget: bool = True
) -> dict[str, dict[int, Outcome]]:
    """The runs of each arm by seed, if they may be compared at all."""
    _same_clock(outcomes)
    arms: dict[str, dict[int, Outcome]] = {}
    faults = []
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
    budgets = sorted({o.budget for o in outcomes})
    if same_budget and len(budgets) > 1:
        faults.append(
            f"budgets differ: {', '.join(f'{b:.6g}' for b in budgets)}; compare one at a time"
        )
    raise_all(BudgetError, "these runs cannot be compared:", faults)
    return arms


def _same_clock(outcomes: Iterable[Outcome]) -> None:
    clocks = sorted({o.clock for o in outcomes})
    if len(clocks) > 1:
        raise BudgetError(
            f"clocks differ: {', '.join(map(repr, clocks))}; charge all runs on one (`recharge`)"
        )


def _arrival(
    curve: Sequence[tuple[float, float]], goal: float, *, first: bool = False, extend: bool = True
) -> float | None:
    """Where a curve falls to a goal and stays, or (`first`) gets there at first; None if it does not.

    With `extend` a curve that starts at the goal arrived where it starts; without, that is unknown.
    """
    found = None
    if curve and curve[0][1] <= goal:
        found = curve[0][0] if extend or curve[0][1] == goal else None
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 <= goal < y0:
            found = x0 + (x1 - x0) * (y0 - goal) / (y0 - y1)
            if first:
                return found
        elif y1 > goal:
            found = None
    return found


def _over(values: Sequence[float | None]) -> tuple[float | None, Interval | None]:
    known = [v for v in values if v is not None]
    if not known or len(known) < len(values):
        return None, None
    return statistics.fmean(known), t_interval(known) if len(known) > 1 else None


def _gaps(values: Sequence[float | None]) -> str:
    outside = sum(v is None for v in values)
    return (
        f"{outside} of {len(values)} seeds are outside of what the baselines reached"
        if outside
        else ""
    )


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
