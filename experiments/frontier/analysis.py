"""From lines to numbers: ends, token retention, family, forecasts, and the choice of held-out arms.

Costs are in units of the design, tokens are training tokens, losses are held-out nats a byte. Every
function takes lines of one design and answers by seed, so that intervals are over seeds.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.frontier.design import (
    DECAY,
    Design,
    Growing,
    Shape,
    fixed_name,
    pilot_name,
)
from experiments.frontier.tree import budget_name
from experiments.study import Line


Curve = list[tuple[float, float]]


class Index:
    """Lines by arm, budget and seed; those of the ledger left out."""

    def __init__(self, lines: Iterable[Line]):
        self._lines = {
            (line["arm"], line["budget"], line["seed"]): line
            for line in lines
            if line["budget"] != "tuning"
        }

    def line(self, arm: str, budget: float, seed: int) -> Line | None:
        """The line of a run; None if it is not there."""
        return self._lines.get((arm, budget_name(budget), seed))

    def score(self, arm: str, budget: float, seeds: Sequence[int]) -> float | None:
        """The mean loss of an arm over seeds; None unless all of them are there."""
        lines = [self.line(arm, budget, seed) for seed in seeds]
        scores = [line["score"] for line in lines if line is not None]
        return statistics.fmean(scores) if len(scores) == len(seeds) else None


# Fixed sizes --------------------------------------------------------------------------------------


def ends(design: Design, index: Index, shape: Shape, seed: int, x: str) -> Curve:
    """The decayed ends of a fixed size: its tokens or its cost ("spent"), and its loss."""
    lines = [index.line(fixed_name(shape), b, seed) for b in design.budgets_of(shape)]
    return [(line[x], line["score"]) for line in lines if line is not None]


def on_the_way(design: Design, index: Index, shape: Shape, seed: int) -> Curve:
    """Tokens and losses of a fixed size at its peak rate, from all of its trunks."""
    points: dict[float, float] = {}
    for budget in design.budgets_of(shape):
        line = index.line(fixed_name(shape), budget, seed)
        if line is None:
            continue
        per_token = line["spent"] / line["tokens"]
        for spent, loss in line["curve"]:
            if spent <= (1 - DECAY) * line["spent"]:
                points[spent / per_token] = loss
    return sorted(points.items())


def first_below(curve: Curve, loss: float) -> float | None:
    """Where a curve first falls to a loss, on a straight line in the logarithm; None if it never does."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if y0 > loss >= y1:
            share = (y0 - loss) / (y0 - y1)
            return math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0)))
    return None


class Parabola(NamedTuple):
    """Loss as a parabola in the logarithm of tokens or cost, by least squares, from `low` to `high`."""

    coefficients: tuple[float, ...]
    low: float
    high: float

    @classmethod
    def through(cls, points: Curve) -> "Parabola | None":
        """The parabola of three points or more; None for fewer."""
        if len(points) < 3:
            return None
        x, y = np.log([p[0] for p in points]), np.array([p[1] for p in points])
        fit = np.polyfit(x, y, 2)
        return cls(tuple(fit.tolist()), min(p[0] for p in points), max(p[0] for p in points))

    def at(self, x: float) -> float:
        """The loss at a number of tokens or a cost."""
        return float(np.polyval(self.coefficients, math.log(x)))

    def where(self, loss: float) -> float | None:
        """Where the falling branch has a loss, at most twice as far as its points; None elsewhere."""
        a, b, c = self.coefficients
        lowest, highest = math.log(self.low / 2), math.log(self.high * 2)
        roots = np.roots([a, b, c - loss]) if a else np.array([(loss - c) / b])
        falling = [
            float(r.real)
            for r in roots
            if abs(r.imag) < 1e-9 and lowest <= r.real <= highest and 2 * a * r.real + b < 0
        ]
        return math.exp(falling[0]) if falling else None


# Token retention ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Retention:
    """Token retention of one pilot and seed.

    - `kept`: D_eff - D*, tokens that count beyond those of the loss; None where it is unknown.
    - `span`: D1 - D*: D1 are the tokens while small, and D* those of the large size from scratch at the
      loss that the small one had.
    - `recovery`: tokens from the growth to that loss.
    - `reason`: why it is unknown.
    """

    kept: float | None
    span: float | None
    recovery: float | None
    reason: str = ""

    @property
    def net(self) -> float | None:
        """`kept` with the tokens that recovery took charged as well."""
        return None if self.kept is None or self.recovery is None else self.kept - self.recovery


def retention(
    design: Design, index: Index, growing: Growing, time: float, budget: float, seed: int
) -> Retention | None:
    """Token retention of a pilot; None if its run, or those that it is held against, are not there."""
    line = index.line(pilot_name(growing, time), budget, seed)
    way = on_the_way(design, index, growing.large, seed)
    end = Parabola.through(ends(design, index, growing.large, seed, "tokens"))
    small = on_the_way(design, index, growing.small, seed)
    if line is None or end is None or not small or not way:
        return None
    before = line["stage_tokens"][1]
    after = line["tokens"] - before
    loss = loss_at(small, before)
    fresh = first_below(way, loss)
    recovery = _recovery(line, loss)
    last = end.where(line["score"])
    missing = [
        words
        for value, words in (
            (fresh, "the large size never had the loss of the small one at its peak rate"),
            (recovery, "it did not come back to the loss before its growth before its decay"),
            (last, "its end is beyond the ends of the large size"),
        )
        if value is None
    ]
    if missing or fresh is None or recovery is None or last is None:
        return Retention(None, None, recovery, "; ".join(missing))
    # The tokens that it would have had to see from scratch, less those that it saw since its recovery
    counted = last - (after - recovery)
    return Retention(counted - fresh, before - fresh, recovery)


def rho(retentions: Sequence[Retention], *, net: bool = False) -> float | None:
    """Token retention of some pilots together; None if it is unknown of one of them."""
    rates = [r.net if net else r.kept for r in retentions]
    spans = [r.span for r in retentions]
    known = [k for k in rates if k is not None], [s for s in spans if s is not None]
    if not rates or len(known[0]) < len(rates) or len(known[1]) < len(rates):
        return None
    return sum(known[0]) / sum(known[1])


def loss_at(curve: Curve, x: float) -> float:
    """The loss of a curve, on a straight line in the logarithm between two points."""
    return float(np.interp(math.log(x), np.log([p[0] for p in curve]), [p[1] for p in curve]))


def _recovery(line: Line, loss: float) -> float | None:
    """Tokens from a pilot's growth until it first has a loss again, before its rate falls."""
    start, stop = line["stages"][1]["start"], (1 - DECAY) * line["spent"]
    after = line["tokens"] - line["stage_tokens"][1]
    per_token = (line["spent"] - start) / after
    for spent, value in line["curve"]:
        if start < spent <= stop and value <= loss:
            return (spent - start) / per_token
    return None


# The family ---------------------------------------------------------------------------------------


def family_share(design: Design, index: Index, seed: int) -> float | None:
    """What a family costs in one trunk, as a share of three runs that end at the same losses."""
    assert design.family is not None
    lines = [
        index.line(f"family, {m}", b, seed) for m, b in zip("ML", design.family_at[1:], strict=True)
    ]
    small = index.line(fixed_name(design.family[0]), design.family_at[0], seed)
    alone = 0.0
    for line, shape in zip(lines, design.family[1:], strict=True):
        fit = Parabola.through(ends(design, index, shape, seed, "spent"))
        cost = None if line is None or fit is None else fit.where(line["score"])
        if cost is None:
            return None
        alone += cost
    if small is None or lines[1] is None:
        return None
    # The largest is the trunk; the others leave it at their decays
    trunk = lines[1]["spent"] + sum(DECAY * b * design.unit for b in design.family_at[:2])
    return trunk / (small["spent"] + alone)


# The forecast -------------------------------------------------------------------------------------


class Forecast(NamedTuple):
    """What an arm is expected to end with at the held-out budget, by seed of the fits."""

    arm: str
    shape: Shape
    growing: Growing | None
    time: float
    values: tuple[float, ...]

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.values)

    def interval(self, fresh: int) -> tuple[float, float] | None:
        """The 90% interval of the mean of so many fresh seeds; None for one seed."""
        seeds = len(self.values)
        if seeds < 2:
            return None
        from scipy.stats import t

        error = statistics.stdev(self.values) * (1 / seeds + 1 / fresh) ** 0.5
        half = float(t.ppf(0.95, seeds - 1)) * error
        return self.loss - half, self.loss + half


def forecasts(design: Design, index: Index) -> list[Forecast]:
    """Every arm at the held-out budget, by the rule of the README; those with missing runs left out.

    A fixed size goes on along its parabola. A grown arm keeps its distance, at the largest budget of the
    pilots, from the fixed size that it grows into.
    """
    predicted: list[Forecast] = []
    goal = design.held_out * design.unit
    fixed: dict[Shape, tuple[float, ...]] = {}
    for shape in design.shapes:
        fits = [Parabola.through(ends(design, index, shape, s, "spent")) for s in design.seeds]
        values = tuple(fit.at(goal) for fit in fits if fit is not None)
        if len(values) == len(design.seeds) and _complete(design, index, shape):
            fixed[shape] = values
            predicted.append(Forecast(fixed_name(shape), shape, None, 0.0, values))
    last = design.pilots_at[-1]
    for growing in design.growings:
        for time in design.times:
            arm = pilot_name(growing, time)
            pairs = [
                (index.line(arm, last, s), index.line(fixed_name(growing.large), last, s))
                for s in design.seeds
            ]
            if growing.large not in fixed or any(None in pair for pair in pairs):
                continue
            gaps = [a["score"] - b["score"] for a, b in pairs if a is not None and b is not None]
            values = tuple(f + gap for f, gap in zip(fixed[growing.large], gaps, strict=True))
            predicted.append(Forecast(arm, growing.large, growing, time, values))
    return predicted


def _complete(design: Design, index: Index, shape: Shape) -> bool:
    """Whether a fixed size has a line for every seed and budget of its own."""
    name = fixed_name(shape)
    return all(
        index.line(name, budget, seed) is not None
        for seed in design.seeds
        for budget in design.budgets_of(shape)
    )


def chosen(design: Design, index: Index) -> list[Forecast] | None:
    """The arms of the held-out budget: the best fixed size, its neighbours, and the best grown arm.

    None until every trunk and every pilot is there, so that nothing is chosen from a part of them, and
    for a design without fresh seeds.
    """
    predicted = forecasts(design, index)
    fixed = {f.shape: f for f in predicted if f.growing is None}
    grown = [f for f in predicted if f.growing is not None]
    if (
        not design.fresh
        or len(fixed) < len(design.shapes)
        or len(grown) < len(design.growings) * len(design.times)
    ):
        return None
    order = sorted(design.shapes, key=design.parameters)
    best = min(range(len(order)), key=lambda n: fixed[order[n]].loss)
    # At an edge there is one neighbour, and the next one after it
    first = min(max(best - 1, 0), max(len(order) - 3, 0))
    return [*(fixed[shape] for shape in order[first : first + 3]), min(grown, key=lambda f: f.loss)]
