"""The rows of a summary: a question, the estimate with its interval, seeds, verdict and command.

`summary.json` is a list of rows. The `kind` of a row names its class in this module, so that a reader
selects rows by their type instead of by the fields that they have.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from growjax.errors import DataError
from growjax.values.codec import write_text


Interval = tuple[float | None, float | None]
R = TypeVar("R", bound="Row")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The fields that all rows have.

    **Fields**

    - `question`: the question that the row answers; `workload` and `budget` name the runs.
    - `estimate`, `interval`: the mean over seeds with its 95% interval. An end that is None is open, and
      an interval that is None is unknown (one seed gives none).
    - `command`: the command that computes the row again.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type["Row"]]] = {}

    workload: str = ""
    budget: str = ""
    question: str
    estimate: float | None
    interval: Interval | None
    seeds: int
    verdict: str
    command: str = ""

    def __init_subclass__(cls, kind: str):
        cls.kind = kind
        cls.kinds[kind] = cls

    def __post_init__(self):
        for field in dataclasses.fields(self):
            # A frozen dataclass refuses plain assignment
            object.__setattr__(self, field.name, _finite(getattr(self, field.name)))


class Answer(Row, kind="answer"):
    """A question with a yes or a no, such as whether a number lies within two others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference(Row, kind="difference"):
    """An arm's loss or score minus another's, paired by seed.

    **Fields**

    - `arm`, `baseline`: the names of the two; a difference is the arm's value minus the baseline's.
    - `p`: the p-value of a sign-flip test.
    - `differences`: the difference of each seed.
    - `reason`: why the row has no verdict, or the limits of the verdict.
    """

    arm: str
    baseline: str
    p: float
    differences: tuple[float, ...] = ()
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EqualCost(Difference, kind="equal cost"):
    """An arm against a baseline of the same cost; see `growjax.budget.Comparison` for the numbers.

    **Fields**

    - `measure`: the quantity compared.
    - `p_t`, `p_holm`: the p-value of a t-test, and `p` adjusted by Holm's method for all arms of the
      comparison.
    - `over`: the units that the interval resamples, "seeds" or "seeds and windows"; `bootstrap` is an
      interval over seeds.
    - `undecayed`: the arms whose learning rate had not fallen.
    """

    measure: str
    p_t: float
    p_holm: float
    bootstrap: Interval | None = None
    over: str = "seeds"
    detectable: float | None = None
    margin: float | None = None
    undecayed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgainstFrontier(EqualCost, kind="against the frontier"):
    """An arm against the best fixed size at its cost, and how much faster it is than the frontier.

    **Fields**

    - `baseline`: the run of the frontier with the lowest loss at that cost.
    - `loss`, `cost`: the arm's loss and cost, means over seeds; `cost` in the clock's unit.
    - `speed_up`: how many times the arm's cost the frontier needs for the arm's loss. It is a lower bound
      where `bound` is ">=", since the frontier never had that loss, and an upper one where it is "<=".
    - `pace`: the verdict of the speed-up alone, and `pace_reason` why.
    - `family`: how many arms Holm's method adjusts for; `left_out`: fixed arms with too few seeds.
    - `sizes`: numbers of parameters of the fixed arms that were run to such a cost.
    """

    loss: float
    cost: float
    speed_up: float
    bound: str
    speed_up_interval: Interval | None
    pace: str
    pace_reason: str
    family: int
    left_out: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnCost(Difference, kind="own cost"):
    """An arm against a target that costs something else, each at its own cost.

    **Fields**

    - `cost`, `flops`, `seconds`: the arm's divided by the target's.
    - `cost_to_reach`: the share of the target's cost at which the arm reached the target's loss for good;
      None if some seed never did. `reached` has the share of each seed.
    - `clocks`: the same shares under other clocks, or the reason why a clock gives none.
    """

    cost: float | None
    flops: float | None
    seconds: float | None
    cost_to_reach: float | None
    cost_to_reach_interval: Interval | None
    reached: tuple[float | None, ...]
    clocks: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedUp(Row, kind="speed-up"):
    """How many times an arm's cost the baseline needs for the arm's loss.

    `bound` is as in `AgainstFrontier`; `naive` is the number from the loss curve of the baseline's
    longest run alone; `clock` names the clock, if it is not the runs' own.
    """

    arm: str
    baseline: str
    bound: str
    naive: float | None
    clock: str = ""
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking(Row, kind="ranking"):
    """The order of the arms under another clock, the best first; the estimate counts the arms that moved.

    `left_out` names the arms with an operation that the clock cannot charge.
    """

    clock: str
    order: tuple[str, ...]
    usual_order: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def select(rows: Sequence[Row], kind: type[R]) -> list[R]:
    """The rows of exactly one kind.

    **Example**

        select(read_summary("experiments/msg/results/summary.json"), AgainstFrontier)[0].verdict
    """
    return [row for row in rows if type(row) is kind]


def write_summary(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows as a list in JSON, a row a line."""
    lines = [
        json.dumps({"kind": row.kind, **dataclasses.asdict(row)}, allow_nan=False) for row in rows
    ]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def read_summary(path: str | Path) -> list[Row]:
    """The rows of a `summary.json`; raises `DataError` for anything else."""
    rows = []
    for n, fields in enumerate(json.loads(Path(path).read_text(encoding="utf-8"))):
        kind = fields.pop("kind", None) if isinstance(fields, dict) else None
        if kind not in Row.kinds:
            raise DataError(
                f"{path}: row {n}: kind: expected one of {', '.join(Row.kinds)}, got {kind!r}"
            )
        try:
            rows.append(Row.kinds[kind](**{name: _tuples(x) for name, x in fields.items()}))
        except TypeError as error:
            raise DataError(f"{path}: row {n}, {kind}: {error}") from error
    return rows


def _tuples(value: Any) -> Any:
    """A value read from JSON, with tuples in place of lists."""
    if isinstance(value, dict):
        return {name: _tuples(x) for name, x in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _finite(value: Any) -> Any:
    """A field in the form of JSON: None for an unknown number (NaN) and for an open end (infinity).

    An interval with a NaN is None as a whole.
    """
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, tuple):
        if any(isinstance(x, float) and math.isnan(x) for x in value):
            return None
        return tuple(map(_finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value
