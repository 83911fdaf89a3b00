"""Pilots: runs of fixed sizes and of growths between them, and the advice that their ends give."""

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from growjax.advise import MARGIN, Advice, Ending, Law, Leg, Size, fit, retained, staged
from growjax.advise import advise as advise_from
from growjax.axes import sizes
from growjax.cost import parameters
from growjax.errors import BudgetError, GrowthError, PlanError, raise_all
from growjax.growth import Chain, Operator
from growjax.plan.plan import Plan
from growjax.report.arms import fixed_size
from growjax.report.runs import Trained
from growjax.report.sweep import combinations
from growjax.train.commands import operator_of


# A growth whose pilots keep less than this on average lost more than the tokens of its smaller size: it
# did worse than the loss that it grew at. What is a little below 0 is noise.
LOST = -0.05


class Pilot(NamedTuple):
    """A pilot: its plan, and the names of its sizes; of one size, or of two where it grows."""

    plan: Plan
    sizes: tuple[str, ...]
    budget: float

    @property
    def folder(self) -> str:
        shares = [f"{stage.share:g}" for stage in self.plan.stages[:-1]]
        return ",".join(
            ["-".join([*self.sizes, *shares]), f"{self.budget:g}", f"seed={self.plan.seed}"]
        )


@dataclasses.dataclass(frozen=True)
class Family:
    """The sizes that a plan may have: a plan of one stage for each, and what grows one into another.

    - `fixed`: the plans by name, the smallest size first.
    - `growths`: operators by the names of two sizes; `reasons` why two others do not grow.
    """

    fixed: Mapping[str, Plan]
    growths: Mapping[tuple[str, str], Operator | Chain]
    reasons: Mapping[tuple[str, str], str]

    def operator(self, small: str, large: str) -> Operator | Chain:
        """What grows a size into a larger one."""
        return self.growths[small, large]

    def parameters(self, name: str) -> int:
        """The number of parameters of a size."""
        return parameters(self.fixed[name].spans[0].model)

    def size(self, name: str) -> Size:
        """A size as `growjax.advise` knows it, with the cost of a token on the clock of its plan."""
        plan = self.fixed[name]
        return Size(name, self.parameters(name), plan.cost / plan.clock.per_unit / plan.tokens)


def family(path: str | Path, over: Sequence[str], by: str = "copy+stack") -> Family:
    """The sizes of a plan: one for every combination of values of its fields.

    `over` is as for `growjax sweep`, such as `model.layers=2,4,8`; `by` names operators as for
    `growjax grow --by`. Raises `PlanError` for fields that cannot be changed, and `BudgetError` for plans
    that grow or train a part of a model, for fewer than two sizes, and where no size grows into another.
    """
    plans = {c.folder: c.plan for c in combinations(path, over)}
    faults = [
        f"{name}: expected a plan of one stage that trains all of one model"
        for name, plan in plans.items()
        if not fixed_size(plan) or len(plan.stages) > 1
    ]
    raise_all(BudgetError, f"{path}: there are no sizes to advise of:", faults)
    counts = {name: parameters(plan.spans[0].model) for name, plan in plans.items()}
    fixed = {name: plans[name] for name in sorted(plans, key=counts.__getitem__)}
    if len(set(counts.values())) < len(counts) or len(fixed) < 2:
        named = ", ".join(f"{name} has {counts[name]:,} parameters" for name in fixed)
        raise BudgetError(f"over: expected two sizes or more, each of its own: {named}")
    growths, reasons = {}, {}
    for small, large in itertools.combinations(fixed, 2):
        try:
            growths[small, large] = _growth(fixed[small], fixed[large], by)
        except (GrowthError, PlanError) as error:
            reasons[small, large] = str(error)
    if not growths:
        faults = [f"{small} to {large}: {reason}" for (small, large), reason in reasons.items()]
        raise_all(BudgetError, f"by {by!r}, no size grows into another:", faults)
    return Family(fixed, growths, reasons)


def _growth(small: Plan, large: Plan, by: str) -> Operator | Chain:
    """What grows the model of a plan into that of another; raises `GrowthError` if nothing does."""
    before, after = (sizes(plan.spans[0].model) for plan in (small, large))
    smaller = [axis for axis in before if after.get(axis, 0) < before[axis]]
    if smaller or before.keys() != after.keys():
        axes = ", ".join(smaller or sorted(before.keys() ^ after.keys()))
        raise GrowthError(f"no operator takes away from an axis, or adds one: {axes}")
    to = {axis: size for axis, size in after.items() if size != before[axis]}
    operator = operator_of(by, to, small.spans[0].model)
    grown = dataclasses.replace(
        large,
        model=small.model,
        stages=(large.stages[0], dataclasses.replace(large.stages[0], grow=operator)),
    )
    reached = sizes(grown.spans[-1].model)
    if reached != after:
        raise GrowthError(f"{operator} ends with the sizes {reached}, not {after}")
    return operator


def pilots(
    choices: Family, budgets: Sequence[float], times: Sequence[float], seeds: Sequence[int]
) -> list[Pilot]:
    """Every size at every budget, and every growth to the next size at the largest: seed after seed."""
    all_pilots = []
    for seed in seeds:
        for name in choices.fixed:
            for budget in sorted(budgets):
                all_pilots.append(_pilot(choices, [(name, 1.0)], budget, seed))
        for small, large in _next(choices):
            for time in times:
                all_pilots.append(
                    _pilot(choices, [(small, time), (large, 1 - time)], max(budgets), seed)
                )
    return all_pilots


def _next(choices: Family) -> list[tuple[str, str]]:
    """Each size with the next larger one that it grows into."""
    nearest: dict[str, tuple[str, str]] = {}
    for small, large in choices.growths:
        nearest.setdefault(small, (small, large))
    return list(nearest.values())


def _pilot(choices: Family, shares: Sequence[tuple[str, float]], budget: float, seed: int) -> Pilot:
    legs = [Leg(Size(name, 1, 1.0), share, 0.0) for name, share in shares]
    names = tuple(name for name, _ in shares)
    plan = staged(legs, budget, choices.fixed, choices.operator, name=" to ".join(names), seed=seed)
    return Pilot(plan, names, budget)


# Advice from pilots -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Growth:
    """Pilots of one growth at one share of the cost: losses and token retentions, in the order of seeds.

    A retention is None where it cannot be told (see `growjax.advise.retained`).
    """

    small: str
    large: str
    time: float
    losses: tuple[float, ...]
    retentions: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class Advised:
    """The advice that pilots give, and the numbers that it rests on.

    - `advice`, `law`, `sizes`: see `growjax.advise`.
    - `ends`: the decayed ends by size.
    - `growths`: the pilots that grew.
    - `left_out`: the mean retention of each growth whose pilots lost more than all tokens of the smaller
      size, by the names of its sizes. No law forecasts where such a growth ends, so no plan has it.
    - `retention`: the known retentions of the other growths, at least 0 and at most 1; a single 0 if none
      is known.
    - `cost`: the cost of all pilots together, in the clock's unit.
    """

    advice: Advice
    law: Law
    sizes: tuple[Size, ...]
    ends: Mapping[str, tuple[Ending, ...]]
    growths: tuple[Growth, ...]
    left_out: Mapping[tuple[str, str], float]
    retention: tuple[float, ...]
    cost: float


def read_advice(
    choices: Family,
    trained: Sequence[Pilot],
    runs: Sequence[Trained],
    budget: float,
    *,
    margin: float = MARGIN,
    draws: int = 200,
) -> Advised:
    """The advice for a budget, from pilots and their finished runs in the same order.

    Plans that grow are searched among growths no later and no larger than those of the pilots.
    """
    ends: dict[str, list[Ending]] = {name: [] for name in choices.fixed}
    grown: dict[tuple[str, str, float], list[tuple[Plan, float]]] = {}
    cost = 0.0
    for pilot, run in zip(trained, runs, strict=True):
        plan, loss = pilot.plan, run.outcome(pilot.plan.name).score
        cost += _own_cost(run)
        if len(pilot.sizes) == 1:
            (name,) = pilot.sizes
            ends[name].append(Ending(choices.parameters(name), plan.tokens, loss, plan.seed))
        else:
            (small, large), time = pilot.sizes, plan.stages[0].share
            assert time is not None
            grown.setdefault((small, large, time), []).append((plan, loss))
    endings = [ending for some in ends.values() for ending in some]
    law = fit(endings)
    growths = tuple(
        Growth(
            small,
            large,
            time,
            tuple(loss for _, loss in results),
            tuple(retained(law, _legs(choices, plan), loss) for plan, loss in results),
        )
        for (small, large, time), results in grown.items()
    )
    kept: dict[tuple[str, str], list[float]] = {}
    for growth in growths:
        known = [rho for rho in growth.retentions if rho is not None]
        kept.setdefault((growth.small, growth.large), []).extend(known)
    means = {pair: statistics.fmean(some) for pair, some in kept.items() if some}
    left_out = {pair: mean for pair, mean in means.items() if mean < LOST}
    measured = {pair: some for pair, some in kept.items() if pair not in left_out}
    retention = plausible([rho for some in measured.values() for rho in some])
    every = tuple(choices.size(name) for name in choices.fixed)
    advice = advise_from(
        endings,
        every,
        budget,
        retention=retention,
        latest=max(growth.time for growth in growths),
        factor=max(
            (choices.parameters(large) / choices.parameters(small) for small, large in measured),
            default=1.0,
        ),
        growable=lambda small, large: (small.name, large.name) in choices.growths.keys() - left_out,
        margin=margin,
        draws=draws,
    )
    by_size = {name: tuple(some) for name, some in ends.items()}
    return Advised(advice, law, every, by_size, growths, left_out, retention, cost)


def plausible(known: Sequence[float]) -> tuple[float, ...]:
    """Retentions for `growjax.advise`: beyond 0 and 1 they are noise. A single 0 if none is known."""
    return tuple(min(max(rho, 0.0), 1.0) for rho in known) or (0.0,)


def _legs(choices: Family, plan: Plan) -> list[Leg]:
    """The stages of a pilot, with the tokens that it trained in each."""
    starts = [*(span.tokens for span in plan.spans), plan.tokens]
    return [
        Leg(choices.size(stage.name), stage.share or 0.0, stop - start)
        for stage, (start, stop) in zip(plan.stages, itertools.pairwise(starts), strict=True)
    ]


def _own_cost(run: Trained) -> float:
    """What a run cost beyond the steps that it shares with the run that it was forked from."""
    shared = [row["spent"] for row in run.steps if row.get("inherited")]
    return run.last["spent"] - (shared[-1] if shared else 0.0)
