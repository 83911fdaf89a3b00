"""From lines of results to what they say: rows of question, estimate, interval, seeds and verdict."""

import dataclasses
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.text import LIBRARY
from growjax.budget import (
    Clock,
    FlopsClock,
    Op,
    Outcome,
    compare,
    cost_to_reach,
    frontier,
    sign_flip,
    speed_up,
    t_interval,
)
from growjax.errors import BudgetError


Row = dict[str, Any]
Group = Sequence[Row]
# Runs whose cost differs by more than this are not compared as of equal cost
_EQUAL = 0.03


@dataclasses.dataclass(frozen=True)
class Study:
    """What the rows of a study are about.

    **Fields**

    - `name`: of its folder.
    - `baseline`: the arm that all others of the same cost are compared with.
    - `target`: the baseline at a cost of its own, whose loss others should reach for less, such as
      training from scratch to the end.
    - `method`: the arm that the study is about, which all others of its cost are compared with as well.
    - `clocks`: under which the ranking is worked out again, besides FLOPs.
    """

    name: str
    baseline: str
    target: str | None = None
    method: str | None = None
    clocks: Mapping[str, Clock] = dataclasses.field(default_factory=dict)


def summarise(study: Study, runs: Group, command: str) -> list[Row]:
    """Every row that the runs allow; an arm is compared over the seeds that it shares with another."""
    rows: list[Row] = []
    for (workload, budget), group in sorted(by(runs, "workload", "budget").items()):
        here = {"workload": workload, "budget": budget}
        arms = {r["arm"] for r in group}
        if study.baseline in arms:
            rows += [here | row for row in _equal_cost(group, study.baseline)]
        if study.method and study.method in arms:
            others = [r for r in group if r["arm"] not in (study.baseline, study.target)]
            rows += [here | row for row in _equal_cost(others, study.method, tasks=False)]
        if study.target and study.target in arms:
            rows += [here | row for row in _against_target(group, study)]
    for workload, group in by(runs, "workload").items():
        if any(r["arm"] == study.baseline for r in group):
            rows += [{"workload": workload} | row for row in _speed_ups(group, study)]
            rows += [{"workload": workload} | row for row in _rankings(group, study)]
    return [_known(row) | {"command": command} for row in rows]


def command_for(study: Study, size: str, runs: Group) -> str:
    """What makes such lines of results, with the names of texts in place of their paths."""
    words = [f"python -m experiments.{study.name}.run --size {size}"]
    words += [f"--text {name}" for name in sorted({run["text"] for run in runs} - {LIBRARY})]
    others = {name: None for run in runs for name in run.get("texts", {})}
    words += [f"--also {' '.join(f'{name}={name}' for name in others)}"] if others else []
    words += ["--data DATA"] if any("downstream" in run for run in runs) else []
    return " ".join(words)


def by(runs: Group, *names: str) -> dict[Any, list[Row]]:
    """Runs by some of their fields, in the order in which they come; trials of the ledger left out."""
    found: dict[Any, list[Row]] = defaultdict(list)
    for run in runs:
        if run["budget"] != "tuning":
            key = tuple(run[name] for name in names)
            found[key if len(names) > 1 else key[0]].append(run)
    return dict(found)


def whole_arms(group: Group, baseline: str) -> list[Row]:
    """The runs of those arms that have every seed of the baseline, at each budget that it has."""
    needed = {(r["budget"], r["seed"]) for r in group if r["arm"] == baseline}
    have = {arm: {(r["budget"], r["seed"]) for r in runs} for arm, runs in by(group, "arm").items()}
    return [r for r in group if needed <= have.get(r["arm"], set())]


def outcome(run: Row, budget: float, clock: Clock | None = None) -> Outcome:
    """One line of results as what `growjax.budget` compares, charged on another clock if there is one.

    The curve of a run that was charged its FLOPs is read along its operations in their order. Raises
    `BudgetError` for one that was charged anything else.
    """
    spent, curve = run["spent"], tuple(map(tuple, run["curve"]))
    if clock is not None:
        if run["clock"] != FlopsClock().identity:
            raise BudgetError(f"clock: expected a run charged its FLOPs, got {run['clock']!r}")
        was, now = (_course(run, c) for c in (FlopsClock(), clock))
        spent = now[-1]
        curve = tuple((float(np.interp(at, was, now)), loss) for at, loss in curve)
    return Outcome(
        arm=run["arm"],
        seed=run["seed"],
        budget=budget,
        clock=run["clock"] if clock is None else clock.identity,
        spent=spent,
        score=run["score"],
        decayed=run["decayed"],
        curve=curve,
    )


def on_clock(run: Row, clock: Clock) -> float:
    """What the operations of a run cost on a clock, in its unit."""
    return _course(run, clock)[-1]


def _course(run: Row, clock: Clock) -> list[float]:
    """What was spent on a clock, in its unit, once each kind of operation was done, from nothing on."""
    costs = (clock.cost(Op(*op)) * n for *op, n in run["operations"])
    # Whole numbers of any size: the FLOPs of a long run do not fit into 64 bits
    return [spent / clock.per_unit for spent in itertools.accumulate(costs, initial=0)]


# Rows --------------------------------------------------------------------------------------------


def _equal_cost(group: Group, baseline: str, tasks: bool = True) -> Iterator[Row]:
    """The loss, and with `tasks` what else was measured, against the baseline at its cost."""
    budget = statistics.median(r["spent"] for r in group if r["arm"] == baseline)
    same = [r for r in group if abs(r["spent"] / budget - 1) <= _EQUAL]
    # What is measured, and 1 where less of it is better
    measures: dict[str, tuple[str, int]] = {"score": ("held-out nats, lower is better", 1)}
    if tasks:
        measures |= {n: (f"{n}, nats, lower is better", 1) for n in same[0].get("texts", {})}
        measures |= {n: (f"{n}, higher is better", -1) for n in same[0].get("downstream", {})}
    for name, (what, sign) in measures.items():
        values = [r | r.get("texts", {}) | r.get("downstream", {}) for r in same]
        outcomes = [outcome(r | {"score": sign * r[name]}, budget) for r in values]
        for c in compare(outcomes, baseline, allow_undecayed=True):
            yield {
                "question": f"{c.arm} against {baseline} at equal cost: {what}",
                "estimate": sign * c.mean,
                "interval": sorted(sign * x for x in c.t_interval),
                "bootstrap": sorted(sign * x for x in c.bca_interval),
                "p": c.p,
                "p_t": c.p_t,
                "p_holm": c.p_holm,
                "detectable": c.detectable,
                "margin": c.margin,
                "seeds": len(c.seeds),
                "undecayed": list(c.undecayed),
                "verdict": c.verdict,
                "reason": c.reason,
            }


def _against_target(group: Group, study: Study) -> Iterator[Row]:
    """Every arm against one at another cost: how far from its loss, and for what share of its cost."""
    target = study.target
    assert target is not None
    known = {(r["arm"], r["seed"]): r for r in group}
    arms = [arm for arm in dict.fromkeys(r["arm"] for r in group) if arm != target]
    outcomes = [outcome(r, r["spent"]) for r in group]
    for reach in cost_to_reach(outcomes, *arms, target=target):
        seeds = [s for arm, s in known if arm == reach.arm and (target, s) in known]
        pairs = [(known[reach.arm, s], known[target, s]) for s in seeds]
        gaps = [a["score"] - b["score"] for a, b in pairs]
        low, high = t_interval(gaps)
        told = "lower" if high < 0 else "higher" if low > 0 else "not told apart"
        yield {
            "question": f"{reach.arm} against {target}, each at its own cost: held-out nats",
            "estimate": statistics.fmean(gaps),
            "interval": [low, high],
            "p": sign_flip(gaps),
            "cost": statistics.fmean(a["spent"] / b["spent"] for a, b in pairs),
            "flops": statistics.fmean(a["flops"] / b["flops"] for a, b in pairs),
            "seconds": statistics.fmean(a["seconds"] / b["seconds"] for a, b in pairs),
            "cost_to_reach": reach.mean,
            "cost_to_reach_interval": reach.interval and list(reach.interval),
            "reached": list(reach.shares),
            "reason": reach.reason or f"every seed reached the loss of {target}",
            "seeds": len(seeds),
            "verdict": told if len(seeds) >= 6 else "undecided",
        } | _elsewhere(pairs, target, study.clocks)


def _elsewhere(
    pairs: Sequence[tuple[Row, Row]], target: str, clocks: Mapping[str, Clock]
) -> dict[str, Any]:
    """The same two costs on every clock that knows all operations of both."""
    found = {}
    for name, clock in clocks.items():
        both = [row for pair in pairs for row in pair]
        try:
            outcomes = [outcome(r, r["spent"], clock) for r in both]
        except BudgetError as error:
            found[name] = {"reason": str(error)}
            continue
        (reach,) = cost_to_reach(outcomes, both[0]["arm"], target=target)
        shares = [a.spent / b.spent for a, b in zip(outcomes[::2], outcomes[1::2], strict=True)]
        found[name] = {
            "cost": statistics.fmean(shares),
            "cost_to_reach": reach.mean,
            "reached": list(reach.shares),
        }
    return {"clocks": found} if found else {}


def _speed_ups(group: Group, study: Study) -> Iterator[Row]:
    """What the baseline would need for each arm's loss: decayed, and looked at on its way.

    The target is the baseline at another cost, so its ends are among those that losses are read off.
    """
    same = (study.baseline, study.target)
    arms = by([r for r in group if r["arm"] not in same], "arm")
    for name, clock in {"": None, **study.clocks}.items():
        ends: list[Outcome] = []
        for (arm, _), runs in by(group, "arm", "budget").items():
            if arm in same and (known := _charged(runs, clock)):
                cost = statistics.median(o.spent for o in known)
                ends += [dataclasses.replace(o, arm=study.baseline, budget=cost) for o in known]
        if len({o.budget for o in ends}) < 2:
            continue
        more = f", charged by {name}" if name else ""
        for arm, runs in arms.items():
            ours = _charged(runs, clock)
            if not ours:
                continue
            longest = max(o.budget for o in ends)
            way = frontier(o for o in ends if o.budget == longest)
            naive = speed_up(ours, arm, way, allow_undecayed=True)
            for s, n in zip(
                speed_up(ours, arm, frontier(ends), allow_undecayed=True), naive, strict=True
            ):
                yield {
                    "budget": f"{s.budget:g}x",
                    "question": f"speed-up of {arm} over all that was run of {study.baseline}{more}",
                    "estimate": s.estimate,
                    "interval": s.interval
                    and [x if math.isfinite(x) else None for x in s.interval],
                    "bound": s.bound,
                    "naive": n.estimate,
                    "reason": s.reason,
                    "seeds": len(s.seeds),
                    "verdict": s.verdict,
                }


def _charged(runs: Group, clock: Clock | None) -> list[Outcome]:
    """Runs as outcomes on another clock, or on their own; none if it does not know all they did."""
    try:
        return [outcome(r, _times(r["budget"]), clock) for r in runs]
    except BudgetError:
        return []


def _rankings(group: Group, study: Study) -> Iterator[Row]:
    """Who comes where, of all that another clock knows, when it charges them."""
    base = [r for r in group if r["arm"] == study.baseline]
    if len({r["budget"] for r in base}) < 2:
        return
    clocks: dict[str, Clock] = {"FLOPs": FlopsClock(), **study.clocks}
    for budget, runs in sorted(by(group, "budget").items()):
        # Arms that are charged less by a clock of their own have no place under another
        paid = [r for r in whole_arms(runs, study.baseline) if not r["arm"].endswith(", free")]
        for name, clock in clocks.items():
            if clock.identity == base[0]["clock"] or not _knows(clock, base):
                continue
            told = [r for arm in by(paid, "arm").values() if _knows(clock, arm) for r in arm]
            usual, order = _order(told, base, None), _order(told, base, clock)
            moved = [a for a, b in zip(usual, order, strict=True) if a != b]
            yield {
                "budget": budget,
                "question": f"arms that change their place when charged by {name}",
                "estimate": len(moved),
                "interval": None,
                "order": order,
                "usual_order": usual,
                "left_out": sorted({r["arm"] for r in paid} - {*order}),
                "seeds": len({r["seed"] for r in told}),
                "verdict": "changed" if moved else "unchanged",
            }


def _knows(clock: Clock, runs: Group) -> bool:
    """Whether it can charge all that some runs did."""
    try:
        return bool([on_clock(run, clock) for run in runs])
    except BudgetError:
        return False


def _order(runs: Group, base: Group, clock: Clock | None) -> list[str]:
    """Arms from best to worst by how far their loss is below the baseline's at the same cost.

    The baseline's loss at any cost is on a straight line, in the logarithm, between its budgets' ends.
    """

    def cost(run: Row) -> float:
        return math.log(run["spent"] if clock is None else on_clock(run, clock))

    ends: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for r in base:
        ends[r["budget"]].append((cost(r), r["score"]))
    line = sorted(tuple(map(float, np.mean(points, axis=0))) for points in ends.values())
    gaps: dict[str, list[float]] = defaultdict(list)
    for r in runs:
        gaps[r["arm"]].append(r["score"] - _on_line(line, cost(r)))
    return sorted(gaps, key=lambda arm: statistics.fmean(gaps[arm]))


def _on_line(points: Sequence[tuple[float, ...]], x: float) -> float:
    """The height of a broken line, whose first and last pieces go on."""
    n = max(1, min(sum(p[0] < x for p in points), len(points) - 1))
    (x0, y0), (x1, y1) = points[n - 1], points[n]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _times(budget: str) -> float:
    return float(budget.removesuffix("x"))


def _known(row: Row) -> Row:
    """The row with None for what one seed cannot tell; JSON has no NaN."""

    def known(value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(v, float) and math.isnan(v) for v in value):
            return None
        return None if isinstance(value, float) and math.isnan(value) else value

    return {name: known(value) for name, value in row.items()}
