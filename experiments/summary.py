"""The arms and the rows of the summary of a training study, made from its lines."""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.study import Key, Line, key_of
from experiments.text import LIBRARY
from experiments.windows import WindowFile
from growjax.budget import Clock, FlopsClock, Op, Outcome, cost_of, load_clock, recharged
from growjax.errors import BudgetError
from growjax.report.arms import Arm, Part, by_place
from growjax.report.comparisons import (
    Recharge,
    against_frontier,
    equal_cost,
    own_cost,
    speed_ups,
)
from growjax.report.rows import EqualCost, Ranking, Row, SpeedUp


# Arms whose costs differ by more than this are not compared as of equal cost
_EQUAL = 0.03


@dataclasses.dataclass(frozen=True)
class Question:
    """The comparisons that a training study makes.

    **Fields**

    - `title`: the question in words.
    - `baseline`: the arm that all others of the same cost are compared with.
    - `target`: the baseline at a cost of its own, whose loss others should reach for less, such as
      training from scratch to the end.
    - `method`: the arm that the study is about, which all others of its cost are compared with as well.
    - `clocks`: under which the ranking is worked out again, besides FLOPs and those measured (each
      `clock*.json` next to the results, of `growjax calibrate`).
    """

    title: str
    baseline: str
    target: str | None = None
    method: str | None = None
    clocks: Mapping[str, Clock] = dataclasses.field(default_factory=dict)


def summarise(question: Question, results: Path, lines: Sequence[Line]) -> list[Row]:
    """Every row that the lines allow; an arm is compared over the seeds that it shares with another."""
    measured = map(load_clock, sorted(results.parent.glob("clock*.json")))
    clocks = {**question.clocks, **{clock.identity: clock for clock in measured}}
    charge = {name: recharging(lines, clock) for name, clock in clocks.items()}
    arms = arms_of(lines, WindowFile(results).read())
    rows: list[Row] = []
    for place, group in sorted(by_place(arms).items()):
        names = {arm.name for arm in group}
        made: list[Row] = []
        if question.baseline in names:
            made += _equal_cost(group, lines, question.baseline)
        if question.method in names:
            others = [a for a in group if a.name not in (question.baseline, question.target)]
            made += equal_cost(_same_cost(others, question.method), question.method)
        if question.target in names:
            made += own_cost(group, question.target, clocks=charge)
        workload, budget = place
        rows += [dataclasses.replace(row, workload=workload, budget=budget) for row in made]
    for workload in dict.fromkeys(arm.workload for arm in arms):
        group = [arm for arm in arms if arm.workload == workload]
        if len({arm.parameters for arm in group if arm.fixed}) > 1:
            rows += against_frontier(group)
        rows += _speed_ups(group, question, charge)
        rows += _rankings(group, question, clocks, lines)
    return rows


def flags(lines: Sequence[Line]) -> str:
    """The flags that make such lines, with the names of texts in place of their paths."""
    words = [f"--text {name}" for name in sorted({line["text"] for line in lines} - {LIBRARY})]
    others = dict.fromkeys(name for line in lines for name in line.get("texts", {}))
    words += [f"--also {' '.join(f'{name}={name}' for name in others)}"] if others else []
    words += ["--data DATA"] if any("downstream" in line for line in lines) else []
    return "".join(f" {word}" for word in words)


# Arms --------------------------------------------------------------------------------------------


def arms_of(
    lines: Sequence[Line], windows: Mapping[Key, np.ndarray] | None = None, measure: str = "score"
) -> list[Arm]:
    """The arms of some lines, in their order; trials of the ledger are left out.

    `measure` is "score", the held-out loss, or one of the other texts and tasks that the lines have; they
    have no curves and no `windows`.
    """
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        if line["budget"] != "tuning" and measured(line, measure) is not None:
            groups.setdefault(key_of(line)[:3], []).append(line)
    return [
        Arm(
            name,
            tuple(_outcome(line, (windows or {}).get(key_of(line)), measure) for line in group),
            parameters=group[0].get("parameters", 0),
            fixed=group[0]["fixed"],
            free=group[0]["free"],
            workload=workload,
            budget=budget,
            stages=tuple(Part(**stage) for stage in group[0]["stages"]),
            flops=tuple(line["flops"] for line in group),
            seconds=tuple(line["seconds"] for line in group),
            unit=group[0]["unit"],
        )
        for (workload, budget, name), group in groups.items()
    ]


def measured(line: Line, measure: str) -> float | None:
    """The value of a measure in a line; None if the line has none."""
    if measure == "score":
        return line["score"]
    return (line.get("texts", {}) | line.get("downstream", {})).get(measure)


def _outcome(line: Line, windows: np.ndarray | None, measure: str) -> Outcome:
    loss = measure == "score"
    score = measured(line, measure)
    assert score is not None
    return Outcome(
        arm=line["arm"],
        seed=line["seed"],
        budget=float(line["budget"].removesuffix("x")),
        clock=line["clock"],
        spent=line["spent"],
        score=score,
        decayed=line["decayed"],
        curve=tuple(map(tuple, line["curve"])) if loss else (),
        windows=windows if loss else None,
    )


def operations(line: Line) -> list[tuple[Op, int]]:
    """The operations of a run and how often each ran, in its order."""
    return [(Op(*op), count) for *op, count in line["operations"]]


def cost_on(line: Line, clock: Clock) -> float:
    """The cost of a run on a clock, in the clock's unit."""
    # Whole numbers of any size: the FLOPs of a long run do not fit into 64 bits
    return sum(count * cost_of(op, clock) for op, count in operations(line)) / clock.per_unit


def recharging(lines: Sequence[Line], clock: Clock) -> Recharge:
    """A function that charges arms of these lines on another clock.

    It raises `BudgetError` for an operation that the clock does not know.
    """
    table = {key_of(line): line for line in lines}

    def recharge(arm: Arm) -> Arm:
        outcomes = []
        for o in arm.outcomes:
            line = table[arm.workload, arm.budget, arm.name, o.seed]
            outcomes.append(recharged(o, operations(line), clock, charged_on=FlopsClock()))
        return dataclasses.replace(arm, outcomes=tuple(outcomes), unit=clock.unit)

    return recharge


# Rows --------------------------------------------------------------------------------------------


def _same_cost(arms: Sequence[Arm], baseline: str | None) -> list[Arm]:
    """The arms whose cost is that of the baseline, up to `_EQUAL`."""
    cost = next(arm.cost for arm in arms if arm.name == baseline)
    return [arm for arm in arms if abs(arm.cost / cost - 1) <= _EQUAL]


def _equal_cost(arms: Sequence[Arm], lines: Sequence[Line], baseline: str) -> Iterator[EqualCost]:
    """The loss against the baseline at its cost, and the other measures of the same runs."""
    same = _same_cost(arms, baseline)
    yield from equal_cost(same, baseline)
    names = {arm.name for arm in same}
    place = arms[0].workload, arms[0].budget
    same_lines = [x for x in lines if (x["workload"], x["budget"]) == place and x["arm"] in names]
    base = next(line for line in same_lines if line["arm"] == baseline)
    measures = {name: (f"{name}, nats, lower is better", False) for name in base.get("texts", {})}
    for name in base.get("downstream", {}):
        measures[name] = f"{name}, higher is better", True
    for name, (measure, higher) in measures.items():
        judged = arms_of(same_lines, measure=name)
        yield from equal_cost(judged, baseline, measure=measure, higher=higher)


def _speed_ups(
    arms: Sequence[Arm], question: Question, charge: Mapping[str, Recharge]
) -> Iterator[SpeedUp]:
    """Speed-ups over all runs of the baseline; the target is the baseline at another cost."""
    same = (question.baseline, question.target)
    for name, recharge in {"": None, **charge}.items():
        known = [arm for arm in (_known(arm, recharge) for arm in arms) if arm is not None]
        ends = [arm for arm in known if arm.name in same]
        others = [arm for arm in known if arm.name not in same]
        yield from speed_ups(others, ends, question.baseline, clock=name)


def _known(arm: Arm, recharge: Recharge | None) -> Arm | None:
    """An arm on another clock; None if the clock does not know one of its operations."""
    try:
        return arm if recharge is None else recharge(arm)
    except BudgetError:
        return None


def _rankings(
    arms: Sequence[Arm], question: Question, clocks: Mapping[str, Clock], lines: Sequence[Line]
) -> Iterator[Ranking]:
    """The order of the arms under each other clock, of those whose operations it knows."""
    base = [arm for arm in arms if arm.name == question.baseline]
    if len(base) < 2:
        return
    table = {key_of(line): line for line in lines}

    def costs(arm: Arm, clock: Clock) -> list[float] | None:
        """The cost of each seed; None if the clock does not know one of the operations."""
        runs = [table[arm.workload, arm.budget, arm.name, o.seed] for o in arm.outcomes]
        try:
            return [cost_on(run, clock) for run in runs]
        except BudgetError:
            return None

    for (workload, budget), group in sorted(by_place(arms).items()):
        # Arms that are charged less by a clock of their own have no place under another
        paid = [arm for arm in _with_every_seed(group, question.baseline) if not arm.free]
        for name, clock in {"FLOPs": FlopsClock(), **clocks}.items():
            base_costs = [costs(arm, clock) for arm in base]
            if clock.identity == base[0].outcomes[0].clock or None in base_costs:
                continue
            known = [(arm, cost) for arm in paid if (cost := costs(arm, clock)) is not None]
            usual = _order([(a, a.costs) for a, _ in known], [(a, a.costs) for a in base])
            order = _order(known, list(zip(base, base_costs, strict=True)))
            moved = sum(a != b for a, b in zip(usual, order, strict=True))
            yield Ranking(
                workload=workload,
                budget=budget,
                question=f"arms that change their place when charged by {name}",
                estimate=moved,
                interval=None,
                seeds=len({o.seed for arm, _ in known for o in arm.outcomes}),
                verdict="changed" if moved else "unchanged",
                clock=name,
                order=tuple(order),
                usual_order=tuple(usual),
                left_out=tuple(sorted({arm.name for arm in paid} - {*order})),
            )


def _with_every_seed(arms: Sequence[Arm], baseline: str) -> list[Arm]:
    """The arms that have every seed of the baseline."""
    seeds = {o.seed for arm in arms if arm.name == baseline for o in arm.outcomes}
    return [arm for arm in arms if seeds <= {o.seed for o in arm.outcomes}]


def _order(known: Sequence[tuple[Arm, Any]], base: Sequence[tuple[Arm, Any]]) -> list[str]:
    """Arms from best to worst by how far their loss is below the baseline's at the same cost.

    The baseline's loss at any cost is on a straight line, in the logarithm, between its budgets' ends.
    """
    line = sorted((float(np.mean(np.log(costs))), arm.loss) for arm, costs in base)
    gaps = {
        arm.name: statistics.fmean(
            loss - _on_line(line, math.log(cost))
            for loss, cost in zip(arm.scores, costs, strict=True)
        )
        for arm, costs in known
    }
    return sorted(gaps, key=gaps.__getitem__)


def _on_line(points: Sequence[tuple[float, float]], x: float) -> float:
    """The height of a broken line, whose first and last pieces go on."""
    n = max(1, min(sum(p[0] < x for p in points), len(points) - 1))
    (x0, y0), (x1, y1) = points[n - 1], points[n]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
