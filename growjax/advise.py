"""Whether to grow: a law of the loss from decayed ends, and the best plan of a budget under it.

The loss of a model of `N` parameters after `D` tokens is fitted as `E + A / N**alpha + B / D**beta`
(Hoffmann et al. 2022). A model that grows to `N` keeps a share of the tokens that it was trained on while
it was small, its *token retention* rho: it goes on as one that has counted

    D_eff = D* + rho (D1 - D*)

tokens, where `D1` is what it had counted before and `D*` is what a model of the new size needs for the
loss that it has. With rho 0 the loss alone decides how training goes on. Dynamic programming over sizes
and the cost spent finds the stages that count the most tokens. A plan of one stage is a fixed size, so
"do not grow" is one of the answers, and the usual one at a rho of 0.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from growjax.errors import BudgetError, raise_all
from growjax.growth import Chain, Operator
from growjax.plan.plan import Plan
from growjax.plan.stages import Stage


# The range of a law's exponents, and the residual (of log loss) up to which the fit minimises squares
_EXPONENTS, _HUBER = (0.05, 2.0), 0.02
# The parts that a budget is spent in, and how many of them the shortest stage has
_PARTS, _SHORTEST = 200, 10
# Two sizes are alike if the larger one needs this share of the tokens for an equal loss
_ALIKE = 0.999
# A plan grows only where so many of the drawn laws say that it is better by the margin
_SURE = 0.9
# Where growths may be by default: as late, and by as much, as pilots usually are
LATEST, FACTOR, MARGIN = 0.6, 5.0, 0.01


@dataclasses.dataclass(frozen=True)
class Ending:
    """The decayed end of a run that trained all of one size: parameters, tokens, held-out loss."""

    parameters: int
    tokens: float
    loss: float
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Size:
    """A size that a plan may have: its name, parameters, and cost of a training token on a clock."""

    name: str
    parameters: int
    token_cost: float


@dataclasses.dataclass(frozen=True)
class Law:
    """The loss by parameters and tokens: `floor + a / N**alpha + b / D**beta`."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, parameters: float, tokens: Any) -> Any:
        """The loss of a size after so many tokens, which may be an array."""
        return self.least(parameters) + self.b / np.asarray(tokens, np.float64) ** self.beta

    def least(self, parameters: float) -> float:
        """The loss of a size after any number of tokens."""
        return self.floor + self.a / parameters**self.alpha

    def tokens(self, parameters: float, loss: Any) -> Any:
        """The tokens after which a size has a loss; infinite for one that it never has."""
        above = np.asarray(loss, np.float64) - self.least(parameters)
        with np.errstate(divide="ignore", invalid="ignore"):
            needed = (self.b / above) ** (1 / self.beta)
        return np.where(above > 0, needed, np.inf)


def fit(endings: Sequence[Ending], start: Law | None = None) -> Law:
    """The law of some ends, by robust least squares in the logarithm of the loss.

    `start` is a law to begin from; without it, several are tried. Raises `BudgetError` for fewer than two
    sizes or three numbers of tokens, and for losses that are not positive.

    **Example**

        fit([Ending(line["parameters"], line["tokens"], line["score"]) for line in lines])
    """
    from scipy.optimize import least_squares

    faults = []
    if len({e.parameters for e in endings}) < 2 or len({e.tokens for e in endings}) < 3:
        faults.append("endings: expected two sizes or more, and three numbers of tokens or more")
    faults += [
        f"endings: {e}: expected positive, finite numbers"
        for e in endings
        if not all(math.isfinite(x) and x > 0 for x in (e.parameters, e.tokens, e.loss))
    ]
    raise_all(BudgetError, "no law can be fitted:", faults)
    n, d, y = np.log([(e.parameters, e.tokens, e.loss) for e in endings]).T
    # Centred, so that the coefficients do not depend on the exponents so much
    n0, d0 = n.mean(), d.mean()

    def residuals(x: np.ndarray) -> np.ndarray:
        floor, a, alpha, b, beta = x
        terms = [np.full_like(n, floor), a - alpha * (n - n0), b - beta * (d - d0)]
        return np.logaddexp.reduce(terms) - y

    least = float(y.min())
    low = [least - 8, least - 12, _EXPONENTS[0], least - 12, _EXPONENTS[0]]
    high = [least, least + 3, _EXPONENTS[1], least + 3, _EXPONENTS[1]]
    if start is None:
        starts = [
            [least - f, least - 2, alpha, least - 2, beta]
            for f in (0.3, 1.5)
            for alpha in (0.3, 0.8)
            for beta in (0.3, 0.8)
        ]
    else:
        shifted = (math.log(start.a) - start.alpha * n0, math.log(start.b) - start.beta * d0)
        starts = [[math.log(start.floor), shifted[0], start.alpha, shifted[1], start.beta]]
    inside = [np.clip(x, np.add(low, 1e-6), np.subtract(high, 1e-6)) for x in starts]
    tries = [
        least_squares(residuals, x, bounds=(low, high), loss="huber", f_scale=_HUBER)
        for x in inside
    ]
    floor, a, alpha, b, beta = min(tries, key=lambda result: result.cost).x
    scales = math.exp(a + alpha * n0), math.exp(b + beta * d0)
    return Law(math.exp(floor), scales[0], float(alpha), scales[1], float(beta))


def drawn(endings: Sequence[Ending], law: Law, draws: int, seed: int = 0) -> Iterator[Law]:
    """The laws of a bootstrap over the seeds and the residuals of some ends.

    Each draw gives every size and number of tokens the residual of a random one, and draws its seeds with
    replacement.
    """
    cells: dict[tuple[int, float], list[float]] = {}
    for e in endings:
        cells.setdefault((e.parameters, e.tokens), []).append(math.log(e.loss))
    means = {place: float(np.mean(losses)) for place, losses in cells.items()}
    residuals = [means[place] - math.log(float(law.loss(*place))) for place in cells]
    # The law has five parameters, by which residuals are smaller than the errors that they stand for
    widening = math.sqrt(len(cells) / max(len(cells) - 5, 1))
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        resampled = []
        for place, losses in cells.items():
            mean = math.log(float(law.loss(*place))) + widening * rng.choice(residuals)
            seeds = rng.choice(losses, len(losses)) - means[place]
            resampled += [Ending(*place, math.exp(mean + x)) for x in seeds]
        yield fit(resampled, law)


# Plans --------------------------------------------------------------------------------------------


class Leg(NamedTuple):
    """A stage of an advised plan: its size, its share of the cost, and the tokens that it trains on."""

    size: Size
    share: float
    tokens: float


def counted(law: Law, legs: Sequence[Leg], retention: float) -> float:
    """The tokens that the last size of a plan counts at the end: those it would need from scratch."""
    tokens = 0.0
    for before, leg in zip([None, *legs], legs, strict=False):
        if before is not None:
            tokens = float(_grown(law, before.size, leg.size, tokens, retention))
        tokens += leg.tokens
    return tokens


def predicted(law: Law, legs: Sequence[Leg], retention: float) -> float:
    """The loss that a plan ends with."""
    return float(law.loss(legs[-1].size.parameters, counted(law, legs, retention)))


def retained(law: Law, legs: Sequence[Leg], loss: float) -> float | None:
    """The token retention rho of a pilot of two legs that ended with a loss.

    It is the rho at which `predicted` gives that loss, and may lie outside of 0 to 1. None where it
    cannot be told: the law has no loss so low for the larger size, or knows next to no difference between
    the sizes, so that there is nothing to retain.
    """
    small, large = legs
    fresh = float(law.tokens(large.size.parameters, law.loss(small.size.parameters, small.tokens)))
    end = float(law.tokens(large.size.parameters, loss))
    if not math.isfinite(end) or fresh > _ALIKE * small.tokens:
        return None
    return (end - large.tokens - fresh) / (small.tokens - fresh)


def _grown(law: Law, small: Size, large: Size, tokens: Any, retention: float) -> Any:
    """The tokens that a grown model counts, given those that it counted before (may be an array)."""
    with np.errstate(divide="ignore"):
        fresh = law.tokens(large.parameters, law.loss(small.parameters, tokens))
        return np.where(np.asarray(tokens) > 0, fresh + retention * (tokens - fresh), 0.0)


def search(
    law: Law,
    sizes: Sequence[Size],
    budget: float,
    retention: float,
    *,
    latest: float = LATEST,
    factor: float = FACTOR,
    growable: Callable[[Size, Size], bool] | None = None,
) -> tuple[Leg, ...]:
    """The stages that end with the lowest loss for a budget, by dynamic programming.

    `latest`, `factor` and `growable` are as in `advise`.

    `most[size][k]` are the most tokens that a size can count when `k` parts of the budget are spent: by
    training for one more part, or by growing there. More tokens are never worse, so nothing else of the
    way matters. Growths are at twentieths of the cost, so that no stage is shorter than one.
    """
    order = sorted(sizes, key=lambda size: size.parameters)
    part = budget / _PARTS
    most = np.full((len(order), _PARTS + 1), -np.inf)
    # Where a size came from: the size before it and the part at which it grew, or -1 for a birth
    origin = np.full((len(order), _PARTS + 1, 2), -1)
    for j, size in enumerate(order):
        step = part / size.token_cost
        most[j, 0] = 0.0
        # What this size counts if it grows at a part, and from which smaller one
        grown = np.full(_PARTS + 1, -np.inf)
        source = np.zeros(_PARTS + 1, int)
        for i in range(j):
            if not 1 < size.parameters / order[i].parameters <= factor:
                continue
            if growable is not None and not growable(order[i], size):
                continue
            some = np.arange(_SHORTEST, int(latest * _PARTS) + 1, _SHORTEST)
            values = _grown(law, order[i], size, most[i, some], retention)
            better = values > grown[some]
            grown[some[better]], source[some[better]] = values[better], i
        for k in range(1, _PARTS + 1):
            most[j, k], origin[j, k] = most[j, k - 1] + step, origin[j, k - 1]
            if grown[k - 1] + step > most[j, k]:
                most[j, k], origin[j, k] = grown[k - 1] + step, (source[k - 1], k - 1)
    ends = [float(law.loss(s.parameters, most[j, -1])) for j, s in enumerate(order)]
    j, k, legs = int(np.argmin(ends)), _PARTS, list[Leg]()
    while j >= 0:
        i, begun = map(int, origin[j, k])
        begun = max(begun, 0)
        share = (k - begun) / _PARTS
        legs.append(Leg(order[j], share, share * budget / order[j].token_cost))
        j, k = i, begun
    return tuple(reversed(legs))


# Advice -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Advice:
    """Whether to grow, for one budget.

    **Fields**

    - `legs`: the plan that ends lowest, under the law of all ends; one leg is a fixed size.
    - `control`: the best fixed size, as a plan of one leg.
    - `loss`, `interval`: what `legs` ends with, and its interval over draws of the law and of rho;
      `control_loss`, `control_interval` of the control.
    - `gain_interval`: of the loss of `legs` minus that of the control.
    - `sure`: the share of draws in which `legs` ends lower than every fixed size, by the margin; 0 for a
      fixed size.
    - `grow`: whether to grow, which is only said where `sure` is 0.9 or more.
    """

    budget: float
    legs: tuple[Leg, ...]
    control: tuple[Leg, ...]
    loss: float
    interval: tuple[float, float]
    control_loss: float
    control_interval: tuple[float, float]
    gain_interval: tuple[float, float]
    sure: float

    @property
    def grow(self) -> bool:
        return len(self.legs) > 1 and self.sure >= _SURE

    def __str__(self) -> str:
        """The advice in a sentence or two."""
        best = self.control[0].size
        low, high = self.control_interval
        fixed = f"train {best.name} ({best.parameters:,} parameters): {self.control_loss:.3f} "
        fixed += f"({low:.3f} to {high:.3f})"
        low, high = self.interval
        way = " to ".join(f"{leg.size.name} ({leg.share:.0%})" for leg in self.legs)
        grown = f"{way}: {self.loss:.3f} ({low:.3f} to {high:.3f})"
        if len(self.legs) == 1:
            return f"Do not grow: {fixed}. No plan that grows is forecast to end lower"
        wins = f"lower by the margin in {self.sure:.0%} of draws"
        if self.grow:
            return f"Grow: {grown}, {wins}. The best fixed size: {fixed}"
        return f"Do not grow: {fixed}. The best plan that grows: {grown}, {wins}"

    def plans(
        self, fixed: Mapping[str, Plan], operator: Callable[[str, str], Operator | Chain]
    ) -> tuple[Plan, Plan]:
        """The plan that ends lowest and its control, to save and to train.

        **Arguments**

        - `fixed`: a plan of one stage for each size, by its name. A plan that grows is that of its last
          size, with the model of the first.
        - `operator`: of the names of two sizes, what grows the first into the second.

        Raises `BudgetError` for a size without a plan.
        """
        missing = sorted({leg.size.name for leg in (*self.legs, *self.control)} - fixed.keys())
        raise_all(BudgetError, "fixed: these sizes have no plan:", missing)
        return (
            staged(self.legs, self.budget, fixed, operator, name="advised"),
            staged(self.control, self.budget, fixed, operator, name="control"),
        )


def staged(
    legs: Sequence[Leg],
    budget: float,
    fixed: Mapping[str, Plan],
    operator: Callable[[str, str], Operator | Chain],
    **changes: Any,
) -> Plan:
    """Legs as a plan, with some fields changed; `fixed` and `operator` are as in `Advice.plans`."""
    last = fixed[legs[-1].size.name]
    stages, before = list[Stage](), ""
    for leg in legs:
        name = leg.size.name
        stages.append(
            dataclasses.replace(
                last.stages[0],
                name=name,
                tokens=None,
                flops=None,
                seconds=None,
                share=leg.share,
                grow=operator(before, name) if before else None,
            )
        )
        before = name
    model = fixed[legs[0].size.name].model
    return dataclasses.replace(last, model=model, stages=tuple(stages), budget=budget, **changes)


def advise(
    endings: Sequence[Ending],
    sizes: Sequence[Size],
    budget: float,
    *,
    retention: Sequence[float] = (0.0,),
    latest: float = LATEST,
    factor: float = FACTOR,
    growable: Callable[[Size, Size], bool] | None = None,
    margin: float = MARGIN,
    draws: int = 200,
    confidence: float = 0.9,
) -> Advice:
    """Whether to grow for a budget, from the decayed ends of fixed sizes and measured token retentions.

    **Arguments**

    - `endings`: of pilots, or of any runs that trained all of one size.
    - `sizes`: those that a plan may have. Those far from the sizes of the ends are extrapolated.
    - `budget`: in the unit of the sizes' `token_cost`.
    - `retention`: rho of each pilot that grew; their mean is used for the search, and one is drawn for
      every draw of the law. Without pilots it is 0: the loss is the state. A growth whose pilots kept
      less than nothing ends higher than any forecast: leave it out (`growable`).
    - `latest`, `factor`: the last share of the cost at which a plan may grow, and the most times by which
      its parameters may: give those of the pilots that measured rho, which says nothing of others.
    - `growable`: of two sizes, whether the first can grow into the second; all can by default.
    - `margin`: the gain, in nats, below which growing is not worth it.
    - `draws`, `confidence`: of the bootstrap, and of its intervals.

    Raises `BudgetError` that lists faults of the arguments, and as `fit` does.

    **Example**

        advice = advise(endings, [Size("2x32", 40_000, 2.7e5), Size("4x64", 230_000, 1.5e6)], 1e13)
        print(advice)          # Do not grow: train 4x64 ...
    """
    faults = []
    if not sizes:
        faults.append("sizes: expected one or more")
    if len({size.name for size in sizes}) < len(sizes):
        faults.append("sizes: two have the same name")
    if not (math.isfinite(budget) and budget > 0):
        faults.append(f"budget: expected a positive number, got {budget!r}")
    if not retention or not all(0 <= rho <= 1 for rho in retention):
        faults.append(f"retention: expected shares from 0 to 1, got {tuple(retention)}")
    if not 0 <= latest <= 1:
        faults.append(f"latest: expected a share of the cost, got {latest!r}")
    if draws < 1:
        faults.append(f"draws: expected one or more, got {draws!r}")
    if not 0 < confidence < 1:
        faults.append(f"confidence: expected a share between 0 and 1, got {confidence!r}")
    faults += [
        f"sizes: {size}: expected a positive number of parameters and cost of a token"
        for size in sizes
        if not all(math.isfinite(x) and x > 0 for x in (size.parameters, size.token_cost))
    ]
    raise_all(BudgetError, "there is nothing to advise:", faults)
    law, rho = fit(endings), float(np.mean(retention))
    fixed = [(Leg(size, 1.0, budget / size.token_cost),) for size in sizes]
    legs = search(law, sizes, budget, rho, latest=latest, factor=factor, growable=growable)
    control = min(fixed, key=lambda plan: predicted(law, plan, 0.0))
    rng = np.random.default_rng(1)
    ours, theirs, lowest = [], [], []
    for other in drawn(endings, law, draws):
        ours.append(predicted(other, legs, float(rng.choice(retention))))
        theirs.append(predicted(other, control, 0.0))
        lowest.append(min(predicted(other, plan, 0.0) for plan in fixed))
    tail = (1 - confidence) / 2

    def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
        low, high = np.quantile(values, [tail, 1 - tail])
        return float(low), float(high)

    wins = float(np.mean(np.less(ours, np.subtract(lowest, margin)))) if len(legs) > 1 else 0.0
    return Advice(
        budget,
        legs,
        control,
        predicted(law, legs, rho),
        interval(ours),
        predicted(law, control, 0.0),
        interval(theirs),
        interval(np.subtract(ours, theirs)),
        wins,
    )
