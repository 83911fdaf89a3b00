"""Where arms stand against the frontier of fixed sizes, and how that is said."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from growjax.budget import (
    Comparison,
    Frontier,
    Outcome,
    SpeedUp,
    compare,
    frontier,
    speed_up,
)
from growjax.budget.envelope import SLACK
from growjax.plan.plan import Plan
from growjax.report.figures import Bar
from growjax.report.page import Table


# More arms of one verdict are counted, and not named
_NAMED = 4


class Arm(NamedTuple):
    """Runs that differ in the seed alone.

    `parameters` are those of the model at the end; a `fixed` arm trains all of one model from the first
    step to the last, and makes the frontier. Arms of one `group` are held against it together, which is
    the family of Holm's method.
    """

    name: str
    outcomes: tuple[Outcome, ...]
    parameters: int
    fixed: bool
    group: str = ""

    @property
    def cost(self) -> float:
        """The mean over seeds, in the clock's unit."""
        return float(np.mean([o.spent for o in self.outcomes]))

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return float(np.mean([o.score for o in self.outcomes]))


def fixed_size(plan: Plan) -> bool:
    """Whether a run trains all of one model, born for it, from its first step to its last."""
    return plan.start is None and all(
        stage.grow is None and stage.subnet is None and stage.select is None
        for stage in plan.stages
    )


class Held(NamedTuple):
    """An arm against the frontier: at equal cost, and in how much faster it is.

    `sizes` are the numbers of parameters of the fixed sizes that were run for as long.
    """

    arm: Arm
    equal: Comparison
    pace: SpeedUp
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Standing:
    """Some arms, the frontier that the fixed ones make (None without one), and the others against it."""

    arms: tuple[Arm, ...]
    frontier: Frontier | None
    held: tuple[Held, ...]

    @property
    def fixed(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in self.arms if arm.fixed)


def stand(arms: Sequence[Arm], *, margin: float | None = None) -> Standing:
    """Hold every arm that is not of one fixed size against the frontier of those that are.

    `margin` is as in `compare`. Undecayed arms are compared, and named as such.

    **Example**

        stand([Arm("small", small, 40_000, True), Arm("grown", grown, 629_000, False)]).held[0].equal
    """
    fixed = [o for arm in arms if arm.fixed for o in arm.outcomes]
    if not fixed:
        return Standing(tuple(arms), None, ())
    best = frontier(fixed)
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        if not arm.fixed:
            groups.setdefault(arm.group, []).append(arm)
    held = []
    for members in groups.values():
        outcomes = [o for arm in members for o in arm.outcomes]
        rows = compare(outcomes, best, margin=margin, allow_undecayed=True)
        for arm, equal in zip(members, rows, strict=True):
            (pace,) = speed_up(arm.outcomes, arm.name, best, allow_undecayed=True)
            held.append(Held(arm, equal, pace, tuple(_sizes(arms, arm.cost))))
    return Standing(tuple(arms), best, tuple(held))


def _sizes(arms: Sequence[Arm], cost: float) -> list[int]:
    """Numbers of parameters of the fixed arms that were run to some cost."""
    return sorted({a.parameters for a in arms if a.fixed and a.cost >= cost * (1 - SLACK)})


# In words ----------------------------------------------------------------------------------------


def answer(standing: Standing) -> list[str]:
    """What the comparison says, a sentence or two for each group; differences are never equalities."""
    if standing.frontier is None:
        return [
            "No arm here trains one model of one size from its first step to its last, so there is no "
            "baseline: whether growing pays, these runs cannot say."
        ]
    if not standing.held:
        best = min(standing.fixed, key=lambda arm: arm.loss)
        return [
            f"All arms here are of one fixed size; the lowest loss is that of {best.name}, "
            f"{best.loss:.4f} nats. Nothing that grows is held against them."
        ]
    groups: dict[str, list[Held]] = {}
    for row in standing.held:
        groups.setdefault(row.arm.group, []).append(row)
    return [_sentences(group, rows) for group, rows in groups.items()]


_PHRASES = {
    "better": "better than the best fixed size at equal cost",
    "equivalent": "equivalent to the best fixed size at equal cost",
    "no difference found": "no difference found to the best fixed size at equal cost",
    "worse": "worse than the best fixed size at equal cost",
    "too few seeds": "too few seeds to say (6 are needed), against the best fixed size at equal cost",
}


def _sentences(group: str, rows: Sequence[Held]) -> str:
    kinds: dict[str, list[Held]] = {kind: [] for kind in _PHRASES}
    for row in sorted(rows, key=lambda row: row.equal.mean):
        kinds[row.equal.verdict].append(row)
    said = "; ".join(f"{_PHRASES[kind]}: {_list(found)}" for kind, found in kinds.items() if found)
    best = min(rows, key=lambda row: row.equal.mean)
    at = f"At {group}, {said}" if group else said[0].upper() + said[1:]
    return (
        f"{at}. That fixed size is {best.equal.baseline}; fixed sizes run to such a cost: "
        f"{sizes(best.sizes)}."
    )


def _list(rows: Sequence[Held]) -> str:
    """Arms and their differences; the first and the last of many."""
    if len(rows) <= _NAMED:
        return ", ".join(f"{row.arm.name} {_by(row)}" for row in rows)
    first, last = rows[0], rows[-1]
    return (
        f"{len(rows)} arms, from {first.arm.name} ({first.equal.mean:+.3f} nats) to {last.arm.name} "
        f"({last.equal.mean:+.3f})"
    )


def _by(row: Held) -> str:
    mean, (low, high) = row.equal.mean, row.equal.interval
    if row.equal.verdict in ("better", "worse"):
        ends = sorted((abs(low), abs(high)))
        return f"by {abs(mean):.3f} nats ({ends[0]:.3f} to {ends[1]:.3f})"
    return difference(mean, row.equal.interval)


def sizes(numbers: Sequence[int]) -> str:
    """Numbers of parameters in words.

    **Example**

        sizes([40_032, 628_608]) == "40k and 629k parameters, none between"
    """
    names = [f"{n / 1000:.0f}k" if n < 10**6 else f"{n / 10**6:.3g}M" for n in numbers]
    if len(names) < 2:
        return f"{names[0]} parameters alone" if names else "none"
    between = ", none between" if len(names) == 2 else ""
    return f"{', '.join(names[:-1])} and {names[-1]} parameters{between}"


def difference(mean: float, interval: tuple[float, float] | None, form: str = "+.3f") -> str:
    """A difference with its interval, or alone where one seed tells none."""
    if interval is None or math.isnan(interval[0]):
        return f"{mean:{form}}"
    return f"{mean:{form}} ({interval[0]:{form}} to {interval[1]:{form}})"


# In figures and tables ---------------------------------------------------------------------------


def bars(standing: Standing) -> list[Bar]:
    """The differences to the frontier, for `differences_figure`."""
    return [
        Bar(
            row.arm.group,
            row.arm.name,
            row.equal.mean,
            row.equal.interval,
            row.equal.differences,
            row.equal.verdict,
        )
        for row in standing.held
    ]


def held_table(rows: Sequence[Held], title: str) -> Table:
    """Arms against the best fixed size at their cost, from the best to the worst."""
    columns = (
        "arm",
        "seeds",
        "loss (nats)",
        "cost",
        "best fixed size at its cost",
        "arm minus that (95%)",
        "verdict",
        "speed-up over the frontier",
    )
    cells = [
        [
            row.arm.name + (" (undecayed)" if row.equal.undecayed else ""),
            str(len(row.equal.seeds)),
            f"{row.arm.loss:.4f}",
            f"{row.arm.cost:.4g}",
            row.equal.baseline,
            difference(row.equal.mean, row.equal.interval),
            row.equal.verdict,
            str(row.pace),
        ]
        for row in sorted(rows, key=lambda row: row.equal.mean)
    ]
    family = rows[0].equal.family
    over = sorted({row.equal.over for row in rows})
    caption = (
        f"Intervals are over {' or '.join(over)}. Better and worse take a t-test adjusted by Holm's "
        f"method, flipping signs, and six seeds; the family is this table, {len(family)} in number."
    )
    left_out = sorted({name for row in rows for name in row.equal.left_out})
    if left_out:
        caption += f" Left out of the frontier, with too few seeds: {', '.join(left_out)}."
    return Table(title, columns, cells, caption)


def arms_table(arms: Sequence[Arm], title: str) -> Table:
    """Arms as they ended, from the cheapest to the dearest."""
    columns = (
        "arm",
        "parameters",
        "seeds",
        "loss (nats)",
        "spread of seeds",
        "cost",
        "decayed",
    )
    cells = []
    for arm in sorted(arms, key=lambda arm: arm.cost):
        scores = [o.score for o in arm.outcomes]
        cells.append(
            [
                f"{arm.name}, {arm.group}" if arm.group else arm.name,
                f"{arm.parameters:,}",
                str(len(scores)),
                f"{arm.loss:.4f}",
                f"{np.std(scores, ddof=1):.4f}" if len(scores) > 1 else "-",
                f"{arm.cost:.4g}",
                "yes" if all(o.decayed for o in arm.outcomes) else "no",
            ]
        )
    return Table(title, columns, cells)
