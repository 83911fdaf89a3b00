"""The rows of the study's summary: ledger, ends, frontier, token retention, family and forecasts."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from experiments.frontier.analysis import (
    Forecast,
    Index,
    Retention,
    chosen,
    family_share,
    forecasts,
    retention,
    rho,
)
from experiments.frontier.calibration import BEYOND, Check, calibration
from experiments.frontier.design import (
    DESIGNS,
    WORKLOAD,
    Design,
    Growing,
    fixed_name,
    pilot_name,
)
from experiments.frontier.tree import budget_name, pilots
from experiments.frontier.tuning import losses_of, neighbours, search, trial_name
from experiments.study import Line
from experiments.summary import arms_of
from experiments.windows import WindowFile
from growjax.budget import compare, t_interval
from growjax.report.arms import Arm
from growjax.report.comparisons import against_frontier
from growjax.report.rows import Answer, Row


# Large sizes with at most so many times the parameters of the small one are growths by two
_BY_TWO = 2.5
LEDGER = "setting of {}"
END = "held-out nats of {} at its end"
RHO = "token retention of {}"
NET = "token retention of {}, with the tokens of recovery charged"
FAMILY = "cost of the family in one trunk, as a share of three runs of equal losses"
FORECAST = "forecast of {}"
PRIMARY = "does a grown plan beat the best fixed size at equal cost?"
CALIBRATION = "share of ends inside the 90% intervals of growjax.advise"
GROWN = "share of ends of plans that grow inside the 90% intervals of growjax.advise"
LEFT = (
    "end of the lowest of the growths that growjax.advise leaves out, minus the lowest fixed size"
)
PICKED = "end of the size that growjax.advise picks, minus the lowest"
PIECES = "runs of {} that are there"


def summarise(results: Path, lines: Sequence[Line], design: Design | None = None) -> list[Row]:
    """Every row that the lines allow, and rows that say how much of the study is there."""
    design = design or DESIGNS[results.stem]
    index = Index(lines)
    arms = arms_of(lines, WindowFile(results).read())
    rows: list[Row] = []
    rows += _pieces(design, lines)
    rows += _ledger(design, lines)
    rows += [_end(arm) for arm in arms]
    rows += against_frontier(_comparable(arms))
    rows += _retentions(design, index)
    rows += _family(design, index)
    if design.fresh:
        rows += _forecasts(design, index)
    rows += _calibration(design, index)
    if design.fresh:
        rows += _primary(design, index, arms)
    return rows


# Pieces -------------------------------------------------------------------------------------------


def wanted(design: Design) -> dict[str, int]:
    """How many runs each piece has; those of the ledger are not known beforehand."""
    seeds = len(design.seeds)
    trunks = sum(len(design.budgets_of(shape)) for shape in design.shapes)
    return {
        "trunks": seeds * trunks,
        "pilots": seeds * len(pilots(design)),
        "family": 0 if design.family is None else 2 * seeds,
        "held-out": 4 * len(design.fresh),
    }


def _pieces(design: Design, lines: Sequence[Line]) -> Iterator[Answer]:
    losses = losses_of(lines)
    over = [shape for shape in design.shapes if search(design, shape, losses)[1] is None]
    if not design.given:
        yield _answer(
            PIECES.format("the ledger"),
            len(losses),
            1 if losses else 0,
            f"the search of {len(over)} of {len(design.shapes)} sizes is over",
        )
    for piece, count in wanted(design).items():
        if not count:
            continue
        matching = [line for line in lines if line.get("piece") == piece]
        seeds = len({line["seed"] for line in matching})
        yield _answer(PIECES.format(piece), len(matching), seeds, f"{len(matching)} of {count}")


def _ledger(design: Design, lines: Sequence[Line]) -> Iterator[Answer]:
    losses = losses_of(lines)
    for shape in design.shapes:
        best, missing = search(design, shape, losses)
        name = trial_name(shape, best)
        if name not in losses:
            continue
        tried = sum(trial_name(shape, n) in losses for n in neighbours(best))
        state = f"lower than its {tried} neighbours" if missing is None else "the search goes on"
        budget = budget_name(design.budgets_of(shape)[0])
        question = LEDGER.format(fixed_name(shape))
        yield _answer(question, losses[name], 1, f"{best}: {state}", budget)


# Arms ---------------------------------------------------------------------------------------------


def _end(arm: Arm) -> Answer:
    interval = t_interval(arm.scores) if len(arm.scores) > 1 else None
    return Answer(
        workload=arm.workload,
        budget=arm.budget,
        question=END.format(arm.name),
        estimate=arm.loss,
        interval=interval,
        seeds=len(arm.scores),
        verdict=f"{arm.parameters:,} parameters",
    )


def _comparable(arms: Sequence[Arm]) -> list[Arm]:
    """The arms without their curves, and without those that no fixed size of their seeds stands against.

    Curves are of fewer windows than ends, and a trunk at its peak rate is above its decayed branches.
    """
    bare = [
        dataclasses.replace(
            arm, outcomes=tuple(dataclasses.replace(o, curve=()) for o in arm.outcomes)
        )
        for arm in arms
    ]
    fixed = [arm for arm in bare if arm.fixed]

    def stands(arm: Arm) -> bool:
        seeds = {o.seed for o in arm.outcomes}
        same = [f for f in fixed if f.budget == arm.budget]
        return any(seeds <= {o.seed for o in f.outcomes} for f in same)

    return [*fixed, *(arm for arm in bare if not arm.fixed and stands(arm))]


# Token retention ----------------------------------------------------------------------------------


def factor(design: Design, growing: Growing) -> str:
    """By how much a growth multiplies the parameters: "2" or "4", roughly."""
    ratio = design.parameters(growing.large) / design.parameters(growing.small)
    return "2" if ratio <= _BY_TWO else "4"


def _retentions(design: Design, index: Index) -> Iterator[Answer]:
    values: dict[tuple[Growing, float, int], dict[int, Retention]] = {}
    for growing, time, budget in pilots(design):
        retained = {s: retention(design, index, growing, time, budget, s) for s in design.seeds}
        measured = {s: r for s, r in retained.items() if r is not None}
        if not measured:
            continue
        known = {s: r for s, r in measured.items() if r.kept is not None}
        values[growing, time, budget] = known
        arm, name = pilot_name(growing, time), budget_name(budget)
        reasons = sorted({r.reason for r in measured.values() if r.reason})
        verdict = "; ".join([f"{len(known)} of {len(measured)} seeds", *reasons])
        for question, net in ((RHO, False), (NET, True)):
            each = [rho([r], net=net) for r in known.values()]
            yield _mean(question.format(arm), [x for x in each if x is not None], verdict, name)
    for words, belongs in _groups(design):
        group = [known for (g, t, _), known in values.items() if belongs(g, t)]
        # Of seeds that every pilot has, so that a seed's value is of the same runs as another's
        seeds = sorted(set(design.seeds).intersection(*group)) if group else []
        for question, net in ((RHO, False), (NET, True)):
            each = [rho([known[s] for known in group], net=net) for s in seeds]
            if each:
                means = [x for x in each if x is not None]
                yield _mean(question.format(words), means, f"{len(group)} pilots")


def _groups(design: Design) -> Iterator[tuple[str, Callable[[Growing, float], bool]]]:
    """Pilots that are looked at together: by operator, by time, by factor."""
    for kind in dict.fromkeys(g.kind for g in design.growings):
        yield f"all growths by {kind}", lambda g, t, kind=kind: g.kind == kind
    for time in design.times:
        yield f"all growths at {time:g}", lambda g, t, time=time: t == time
    for by in dict.fromkeys(factor(design, g) for g in design.growings):
        yield f"all growths by a factor of {by}", lambda g, t, by=by: factor(design, g) == by


# Family, forecasts, and the primary question ------------------------------------------------------


def _family(design: Design, index: Index) -> Iterator[Answer]:
    if design.family is None:
        return
    shares = [family_share(design, index, seed) for seed in design.seeds]
    known = [share for share in shares if share is not None]
    if known:
        low, high = t_interval(known) if len(known) > 1 else (float("nan"),) * 2
        cheaper = "cheaper" if high < 1 else "dearer" if low > 1 else "no difference found"
        yield _mean(FAMILY, known, cheaper if len(known) > 1 else "too few seeds")


def _forecasts(design: Design, index: Index) -> Iterator[Answer]:
    picked = {f.arm for f in chosen(design, index) or ()}
    for forecast in forecasts(design, index):
        interval = forecast.interval(len(design.fresh))
        seen = index.score(forecast.arm, design.held_out, design.fresh)
        yield Answer(
            workload=WORKLOAD,
            budget=budget_name(design.held_out),
            question=FORECAST.format(forecast.arm),
            estimate=forecast.loss,
            interval=interval,
            seeds=len(forecast.values),
            verdict=_seen(forecast, interval, seen, forecast.arm in picked),
        )


def _seen(
    forecast: Forecast, interval: tuple[float, float] | None, seen: float | None, picked: bool
) -> str:
    if seen is None:
        return "to be run" if picked else "not chosen"
    if interval is None:
        return f"{seen:.4f} was seen"
    inside = interval[0] <= seen <= interval[1]
    return f"{seen:.4f} was seen, {'inside' if inside else 'outside'} the 90% interval"


def _calibration(design: Design, index: Index) -> Iterator[Answer]:
    """How `growjax.advise` does beyond its pilots, on seeds that it has not seen.

    Pairs of seeds share ends, so that there is no interval.
    """
    fixed, grown, left_out = calibration(design, index)
    target = design.budgets[-1]
    words = f"pilots of one seed up to {budget_name(target / BEYOND)}, ends of the others"
    for question, checked in ((CALIBRATION, fixed), (GROWN, grown)):
        if checked:
            inside = sum(
                low <= check.seen <= high for check in checked for low, high in [check.interval]
            )
            verdict = f"{inside} of {len(checked)}: {words}"
            yield _of(question, inside / len(checked), checked, verdict, target)
    above, names = [], []
    for pair in dict.fromkeys((check.pilots, check.seed) for check in fixed):
        ends = [check for check in fixed if (check.pilots, check.seed) == pair]
        if len(ends) == len(design.shapes):
            pick = min(ends, key=lambda check: check.forecast)
            above.append(pick.seen - min(check.seen for check in ends))
            names.append(pick.arm.removeprefix("fixed-"))
    if above:
        picks = ", ".join(f"{name} {names.count(name)} times" for name in dict.fromkeys(names))
        verdict = f"{picks} of {len(names)}: {words}"
        yield _of(PICKED, statistics.fmean(above), fixed, verdict, target)
    if left_out:
        yield from _left_out(design, index, left_out)


def _of(
    question: str, estimate: float, checked: Sequence[Check], verdict: str, budget: float
) -> Answer:
    seeds = len({check.pilots for check in checked})
    return _answer(question, estimate, seeds, verdict, budget_name(budget))


def _left_out(design: Design, index: Index, growths: Sequence[str]) -> Iterator[Answer]:
    """Whether leaving out such growths lost anything: where they end, of every seed that has run them."""
    target = design.budgets[-1]
    above = [
        line["score"] - min(fixed)
        for growing in design.growings
        if str(growing) in growths
        for time in design.times
        for seed in design.seeds
        for line in [index.line(pilot_name(growing, time), target, seed)]
        for fixed in [_fixed_ends(design, index, target, seed)]
        if line is not None and len(fixed) == len(design.shapes)
    ]
    if above:
        names = ", ".join(
            f"{name} by the pilots of {growths.count(name)} seeds"
            for name in dict.fromkeys(growths)
        )
        yield _answer(
            LEFT,
            min(above),
            len(design.seeds),
            f"{len(above)} ends, {sum(x > 0 for x in above)} above the lowest fixed size: {names}",
            budget_name(target),
        )


def _fixed_ends(design: Design, index: Index, budget: float, seed: int) -> list[float]:
    lines = [index.line(fixed_name(shape), budget, seed) for shape in design.shapes]
    return [line["score"] for line in lines if line is not None]


def _primary(design: Design, index: Index, arms: Sequence[Arm]) -> Iterator[Answer]:
    """The grown arm against the fixed size that ends lowest at the held-out budget, which favours that.

    One hypothesis, one-sided at 0.05; the interval is over seeds and windows.
    """
    budget = budget_name(design.held_out)
    group = [arm for arm in _comparable(arms) if arm.budget == budget]
    fixed, grown = [a for a in group if a.fixed], [a for a in group if not a.fixed]
    picked = chosen(design, index)
    everything = {(a.name, len(a.outcomes)) for a in group}
    if picked is None or any((f.arm, len(design.fresh)) not in everything for f in picked):
        yield Answer(
            workload=WORKLOAD,
            budget=budget,
            question=PRIMARY,
            estimate=None,
            interval=None,
            seeds=0,
            verdict="not run yet",
        )
        return
    best = min(fixed, key=lambda arm: arm.loss)
    cost = design.held_out * design.unit
    outcomes = [
        dataclasses.replace(o, budget=cost) for arm in (best, grown[0]) for o in arm.outcomes
    ]
    (row,) = compare(outcomes, best.name)
    one_sided = row.p_t / 2 if row.mean < 0 else 1 - row.p_t / 2
    yes = one_sided <= 0.05 and row.interval[1] < 0
    yield Answer(
        workload=WORKLOAD,
        budget=budget,
        question=PRIMARY,
        estimate=row.mean,
        interval=row.interval,
        seeds=len(row.seeds),
        verdict=(
            f"{'yes' if yes else 'no'}: {grown[0].name} minus {best.name}, one-sided p "
            f"{one_sided:.3g}, over {row.over}"
        ),
    )


# Rows ---------------------------------------------------------------------------------------------


def _answer(question: str, value: float, seeds: int, verdict: str, budget: str = "") -> Answer:
    return Answer(
        workload=WORKLOAD,
        budget=budget,
        question=question,
        estimate=value,
        interval=None,
        seeds=seeds,
        verdict=verdict,
    )


def _mean(question: str, values: Sequence[float], verdict: str, budget: str = "") -> Answer:
    """A mean over seeds with its t interval."""
    return Answer(
        workload=WORKLOAD,
        budget=budget,
        question=question,
        estimate=statistics.fmean(values) if values else None,
        interval=t_interval(list(values)) if len(values) > 1 else None,
        seeds=len(values),
        verdict=verdict,
    )
