"""The calibration of `growjax.advise`: forecasts from one seed's pilots, against ends of the others.

Pilots are the runs of a fourth of the largest budget or less. The forecasts are those that
`growjax.advise` would make of them: of a fixed size by the fitted law, of a plan that grows by the token
retention of its own pilots as well.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments.frontier.analysis import Index
from experiments.frontier.design import Design, Growing, Shape, fixed_name, pilot_name
from growjax.advise import Ending, Law, Leg, Size, drawn, fit, predicted, retained
from growjax.report.pilots import LOST, plausible


# How far beyond the largest budget of its pilots advice is asked for, and from how many drawn laws
BEYOND, DRAWS = 4, 100


class Check(NamedTuple):
    """The end of an arm at the largest budget, and what was forecast for it (a 90% interval, and a loss).

    `pilots` is the seed of the pilots, `seed` that of the end.
    """

    arm: str
    pilots: int
    seed: int
    interval: tuple[float, float]
    forecast: float
    seen: float


class Calibration(NamedTuple):
    """Checks of fixed sizes and of plans that grow, and the growths of which no forecast is made.

    As `growjax advise` does, it leaves out a growth whose pilots kept less than nothing; `left_out` has
    it once for each seed of such pilots.
    """

    fixed: list[Check]
    grown: list[Check]
    left_out: list[str]


def calibration(design: Design, index: Index) -> Calibration:
    """Every arm at the largest budget, forecast from one seed's runs at a fourth of it or less."""
    target, result = design.budgets[-1], Calibration([], [], [])
    for pilots, laws in _laws(design, index):
        for shape in design.shapes:
            legs = _legs(design, [(shape, 1.0)], target)
            losses = [predicted(law, legs, 0.0) for law in laws]
            result.fixed.extend(_checks(design, index, fixed_name(shape), pilots, losses))
        for growing in design.growings:
            known = list(_retentions(design, index, growing, pilots, laws[0]))
            if known and np.mean(known) < LOST:
                result.left_out.append(str(growing))
            if not known or np.mean(known) < LOST:
                continue
            rng, retention = np.random.default_rng(1), plausible(known)
            for time in design.times:
                legs = _legs(design, _stages(growing, time), target)
                losses = [predicted(laws[0], legs, float(np.mean(retention)))]
                losses += [predicted(law, legs, float(rng.choice(retention))) for law in laws[1:]]
                result.grown.extend(
                    _checks(design, index, pilot_name(growing, time), pilots, losses)
                )
    return result


def _laws(design: Design, index: Index) -> Iterator[tuple[int, list[Law]]]:
    """Of each seed whose pilots are all there: the law of their ends, and the laws of its bootstrap."""
    for pilots in design.seeds:
        ends = [
            (shape, index.line(fixed_name(shape), budget, pilots))
            for shape in design.shapes
            for budget in design.budgets_of(shape)
            if BEYOND * budget <= design.budgets[-1]
        ]
        endings = [
            Ending(design.parameters(shape), line["tokens"], line["score"], pilots)
            for shape, line in ends
            if line is not None
        ]
        if len(endings) < len(ends) or len({e.tokens for e in endings}) < 3:
            continue
        law = fit(endings)
        yield pilots, [law, *drawn(endings, law, DRAWS)]


def _retentions(
    design: Design, index: Index, growing: Growing, seed: int, law: Law
) -> Iterator[float]:
    """Token retention of a growth's pilots by a law, where it can be told."""
    budget = design.budgets[-1] / BEYOND
    for time in design.times:
        line = index.line(pilot_name(growing, time), budget, seed)
        if line is not None:
            rho = retained(law, _legs(design, _stages(growing, time), budget), line["score"])
            if rho is not None:
                yield rho


def _stages(growing: Growing, time: float) -> list[tuple[Shape, float]]:
    return [(growing.small, time), (growing.large, 1 - time)]


def _legs(design: Design, stages: list[tuple[Shape, float]], budget: float) -> list[Leg]:
    legs = []
    for shape, share in stages:
        token_cost = budget * design.unit / design.tokens(shape, budget)
        size = Size(str(shape), design.parameters(shape), token_cost)
        legs.append(Leg(size, share, share * design.tokens(shape, budget)))
    return legs


def _checks(
    design: Design, index: Index, arm: str, pilots: int, losses: list[float]
) -> Iterator[Check]:
    """What was forecast (first of the law itself, then of each draw) against the ends of other seeds."""
    low, high = np.quantile(losses[1:], [0.05, 0.95]).tolist()
    for seed in design.seeds:
        line = index.line(arm, design.budgets[-1], seed)
        if line is not None and seed != pilots:
            yield Check(arm, pilots, seed, (low, high), losses[0], line["score"])
