"""The rows of the contest's summary: ends, comparisons of each arm, and what early losses predict."""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments.frontier.design import fixed_name
from experiments.operators.design import DESIGNS, DIRECTIONS, FIXED, REFERENCE, Contest, Direction
from experiments.study import Line, answer
from experiments.summary import arms_of
from experiments.windows import WindowFile
from growjax.budget import t_interval
from growjax.report.arms import Arm
from growjax.report.comparisons import against_frontier, equal_cost
from growjax.report.rows import Answer, Row


END = "held-out nats of {} at its end"
AFTER = "held-out nats of {}, {} steps after its growth"
BEFORE = "held-out nats of the small size at the growth"
RECOVERY = "steps of {} until it has the loss before its growth"
PREDICTS = "rank correlation of the loss {} steps after the growth with the end, {}"
REGRET = "regret of choosing by the loss {} steps after the growth"
RANDOM = "regret of choosing at random"
RUNS = "runs that are there"
ALL, ALIVE = "all operators", "without the controls"
# A mean correlation above this, with its whole interval, is a prediction
LEAST = 0.5
# Losses that are as near to the lowest are as good a choice
TIE = 1e-3


def summarise(
    results: Path, lines: Sequence[Line], design: Contest | None = None, *, compared: bool = True
) -> list[Row]:
    """Every row that the lines allow, direction after direction.

    Without `compared` no arm is compared with another: these intervals, over seeds and 4,096 windows,
    take most of a minute.
    """
    design = design or DESIGNS[results.stem]
    arms = arms_of(lines, WindowFile(results).read() if compared else None)
    wanted = len(design.seeds) * (
        len(design.base.shapes) + sum(len(design.entries(d)) for d in DIRECTIONS)
    )
    rows: list[Row] = [
        _row("", RUNS, len(lines), None, len(design.seeds), f"{len(lines)} of {wanted}")
    ]
    rows += [_end(arm) for arm in arms]
    for direction in DIRECTIONS:
        own = [line for line in lines if line["workload"] == direction]
        if own:
            made = _comparisons(design, direction, arms) if compared else []
            budget = design.budget_name
            rows += [dataclasses.replace(r, workload=direction, budget=budget) for r in made]
            rows += _on_the_way(design, direction, own)
            rows += _predictions(design, direction, own)
    return rows


def _row(
    workload: str,
    question: str,
    value: float | None,
    interval: tuple[float, float] | None,
    seeds: int,
    verdict: str,
) -> Answer:
    return Answer(
        workload=workload,
        question=question,
        estimate=value,
        interval=interval,
        seeds=seeds,
        verdict=verdict,
    )


def _mean(workload: str, question: str, values: Sequence[float], verdict: str = "") -> Answer:
    """A mean over seeds with its t interval."""
    interval = t_interval(list(values)) if len(values) > 1 else None
    mean = statistics.fmean(values)
    return _row(workload, question, mean, interval, len(values), verdict)


def _end(arm: Arm) -> Answer:
    words = f"{arm.parameters:,} parameters"
    return dataclasses.replace(
        _mean(arm.workload, END.format(arm.name), arm.scores, words), budget=arm.budget
    )


# Comparisons --------------------------------------------------------------------------------------


def _comparisons(design: Contest, direction: Direction, arms: Sequence[Arm]) -> list[Row]:
    """Every operator of a direction against the frontier, the reference, and the large size."""
    fixed = [dataclasses.replace(a, workload=direction) for a in arms if a.workload == FIXED]
    grown = [arm for arm in arms if arm.workload == direction]
    complete = {len(arm.outcomes) for arm in (*fixed, *grown)} == {len(design.seeds)}
    # Arms of different seeds would be compared over different seeds: wait for all of them
    if not complete or len(fixed) < len(design.base.shapes):
        return []
    rows: list[Row] = [*against_frontier([*fixed, *grown])]
    rows += equal_cost(grown, REFERENCE[direction])
    large = fixed_name(design.large[direction])
    rows += equal_cost([*grown, *(arm for arm in fixed if arm.name == large)], large)
    return rows


# After the growth ---------------------------------------------------------------------------------


def _on_the_way(design: Contest, direction: Direction, lines: Sequence[Line]) -> Iterator[Answer]:
    names = list(dict.fromkeys(line["arm"] for line in lines))
    first = [line for line in lines if line["arm"] == names[0]]
    yield _mean(direction, BEFORE, [line["before"] for line in first])
    for name in names:
        own = [line for line in lines if line["arm"] == name]
        for n in design.after:
            losses = [dict(map(tuple, line["after"]))[n] for line in own]
            yield _mean(direction, AFTER.format(name, n), losses, own[0]["exactness"])
        steps = [recovery(line) for line in own]
        known = [n for n in steps if n is not None]
        yield _row(
            direction,
            RECOVERY.format(name),
            statistics.median(known) if len(known) == len(steps) else None,
            None,
            len(own),
            f"{len(known)} of {len(own)} seeds within {design.after[-1]} steps",
        )


def recovery(line: Line) -> int | None:
    """The first of the measured steps from which on a run has the loss before its growth for good."""
    first = None
    for n, loss in line["after"]:
        if n and loss > line["before"]:
            first = None
        elif n and first is None:
            first = n
    return first


# Do early losses predict the end? -----------------------------------------------------------------


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where all numbers of one side are the same."""
    from scipy.stats import rankdata

    a, b = rankdata(x), rankdata(y)
    if a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _predictions(design: Contest, direction: Direction, lines: Sequence[Line]) -> Iterator[Answer]:
    """Correlations by seed, and regrets, of operators that grow once."""
    entries = {entry.name: entry for entry in design.entries(direction)}
    once = [name for name, e in entries.items() if e.grow is None or len(e.grow) == 1]
    table = {(line["arm"], line["seed"]): line for line in lines}
    seeds = [s for s in design.seeds if all((name, s) in table for name in once)]
    if not seeds:
        return
    for n in design.after:
        early = {key: dict(map(tuple, line["after"]))[n] for key, line in table.items()}
        for words, names in (
            (ALL, once),
            (ALIVE, [name for name in once if not entries[name].floor]),
        ):
            correlations = [
                spearman(
                    [early[name, s] for name in names], [table[name, s]["score"] for name in names]
                )
                for s in seeds
            ]
            question = PREDICTS.format(n, words)
            if len(seeds) > 1:
                yield answer(direction, question, correlations, low=LEAST)
            else:
                yield _mean(direction, question, correlations, "too few seeds")
        ends = _ends(table, once, seeds)
        best = min(ends.values())
        regrets = []
        for s in seeds:
            lowest = min(early[name, s] for name in once)
            chosen = [ends[name] for name in once if early[name, s] <= lowest + TIE]
            regrets.append(statistics.fmean(chosen) - best)
        yield _mean(direction, REGRET.format(n), regrets)
    ends = _ends(table, once, seeds)
    alive = [end for name, end in ends.items() if not entries[name].floor]
    value = statistics.fmean(alive) - min(ends.values())
    yield _row(direction, RANDOM, value, None, len(seeds), ALIVE)


def _ends(table: dict, names: Sequence[str], seeds: Sequence[int]) -> dict[str, float]:
    """The mean end of each operator."""
    return {name: statistics.fmean(table[name, s]["score"] for s in seeds) for name in names}
