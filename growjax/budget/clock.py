"""Reference clocks: what a run costs is what its operations take on one known machine, not on this one.

A run counts its operations; a clock says what each costs, as a whole number, so that sums do not depend
on their order. Nothing that happens on the machine at hand has a say: not its speed, not its load, not
what it compiles. `FlopsClock` charges model FLOPs; the others charge seconds of a reference machine,
from a table (Reference System Time: Kaddour et al., "No Train No Gain", NeurIPS 2023, section 3).
"""

import abc
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np

from growjax import values
from growjax.errors import BudgetError


OpKind = Literal["train", "forward", "curvature"]
# Above this share of their median, the mean of some steps is not that of an undisturbed machine
_EVEN = 1.02
_TABLE = values.Range("at least two positive numbers", lambda seconds: len(seconds) > 1)


@values.register
class Op(NamedTuple):
    """One thing that a run does and is charged for.

    `kind` is a training step, a forward pass (looking at examples) or a second gradient (curvature);
    `depth` how many blocks of each stack run; `rows` and `length` how many sequences of how many tokens;
    `flops` its model FLOPs. `updated` is how many parameters the optimizer goes over: all of the model's,
    also where a path of it is trained, so that a path through a large model and a small model are two
    operations. It is None in what was recorded before there was such a number.
    """

    kind: OpKind
    depth: int
    rows: int
    length: int
    flops: int
    updated: int | None = None


@values.base("a clock such as FlopsClock()")
class Clock(abc.ABC):
    """What operations cost: subclass it and write `cost`.

    `unit` is what people give budgets in, and `per_unit` how many of the whole numbers of `cost` make
    one.
    """

    unit: ClassVar[Literal["FLOPs", "seconds"]]
    per_unit: ClassVar[int]

    @abc.abstractmethod
    def cost(self, op: Op) -> int:
        """What one operation costs; raises `BudgetError` for one that the clock does not know."""

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """What tells two clocks apart: results compare under the same one only."""


@values.register
@dataclasses.dataclass(frozen=True)
class FlopsClock(Clock):
    """Charges model FLOPs: exact, and blind to memory traffic and to small shapes."""

    unit = "FLOPs"
    per_unit = 1

    def cost(self, op: Op) -> int:
        return op.flops

    @property
    def identity(self) -> str:
        return "FLOPs"


@values.register
@dataclasses.dataclass(frozen=True)
class DepthClock(Clock):
    """Charges seconds by the number of layers that run, in proportion to the sequences.

    **Fields**

    - `name`: of the machine and the model.
    - `seconds`: of a training step with 1, 2, ... layers.
    - `rows`: the sequences of that step.
    - `forward`, `curvature`: what a forward pass and a second gradient take, as shares of a step. With 0
      they are free, which shows what a method would gain if they were.
    - `fit`: "table" knows the depths of the table; "linear" puts a line through it, and knows all.
    - `provenance`: where the numbers come from.

    **Example**

        RTX3090_BERT.cost(Op("train", depth=16, rows=128, length=128, flops=0)) == 225_300_000
    """

    name: str
    seconds: Annotated[tuple[Annotated[float, values.positive()], ...], _TABLE]
    rows: values.Size
    forward: Annotated[float, values.at_least(0)]
    curvature: Annotated[float, values.at_least(0)]
    fit: Literal["table", "linear"] = "table"
    provenance: str = ""

    unit = "seconds"
    per_unit = 10**9

    def __post_init__(self):
        values.check(self, BudgetError, f"clock {self.name!r} cannot be used:")

    def cost(self, op: Op) -> int:
        """Nanoseconds; raises `BudgetError` for a depth that the table does not have."""
        if op.depth == 0:
            step = self.line[0]
        elif self.fit == "linear":
            step = self.line[0] + self.line[1] * op.depth
        elif op.depth <= len(self.seconds):
            step = self.seconds[op.depth - 1]
        else:
            raise BudgetError(
                f"clock {self.name!r}: it knows 1 to {len(self.seconds)} layers, and {op.depth} run; "
                "take fit='linear' to go on along its line"
            )
        share = {"train": 1.0, "forward": self.forward, "curvature": self.curvature}[op.kind]
        return round(step * share * op.rows / self.rows * 1e9)

    @property
    def line(self) -> tuple[float, float]:
        """Seconds of no layer, and of each, of the line that fits the table best."""
        depth = np.arange(1, len(self.seconds) + 1)
        slope, start = np.polyfit(depth, self.seconds, 1)
        return float(start), float(slope)

    def faults(self) -> list[str]:
        """Where the table contradicts itself: more layers never take less time."""
        pairs = zip(self.seconds, self.seconds[1:], strict=False)
        return [
            f"{d} layers take {later} s, and {d - 1} took {earlier} s"
            for d, (earlier, later) in enumerate(pairs, start=2)
            if later < earlier
        ]

    @property
    def identity(self) -> str:
        return f"{self.name} {_digest(dataclasses.asdict(self))}"


@values.register
class Timing(NamedTuple):
    """How an operation was timed: over how many steps, and nanoseconds a step of the blocks of them.

    `fed` is what it takes on batches of a run's own data over what it takes on one that is there already.
    """

    steps: int
    mean: float
    median: float
    p5: float
    p95: float
    fed: float | None = None


@values.register
@dataclasses.dataclass(frozen=True)
class MeasuredClock(Clock):
    """Charges the seconds that each operation took where it was measured, and knows no others.

    `entries` are pairs of an operation and its nanoseconds, `timings` how each was timed, in the same
    order or not at all; `growjax.train.calibrate` makes them.

    Of operations that train, the number of parameters that are updated must be the one that was measured.
    Clocks from before it was recorded have entries without it, which charge operations of the same time,
    and no others: whether such a price is a path's or a small model's is not known. A forward pass
    updates nothing, so that its old entries are as good as new ones.

    A cost that falls with depth contradicts itself, and neither of the two operations is charged.

    **Example**

        load_clock("clocks/xeon.json").cost(op)
    """

    name: str
    entries: tuple[tuple[Op, int], ...]
    provenance: str = ""
    timings: tuple[Timing, ...] = ()

    unit = "seconds"
    per_unit = 10**9

    def __post_init__(self):
        # The clocks of the first studies have plain lists for operations and timings
        with contextlib.suppress(TypeError, ValueError):  # what they are not, `check` says
            known = tuple((Op(*op), int(ns)) for op, ns in self.entries)
            object.__setattr__(self, "entries", known)
            object.__setattr__(self, "timings", tuple(Timing(*timing) for timing in self.timings))
        values.check(self, BudgetError, f"clock {self.name!r} cannot be used:", self._faults)
        prices = {_as_read(op): ns for op, ns in self.entries}
        object.__setattr__(self, "_known", prices)
        object.__setattr__(self, "_falls", _falls_with_depth(prices))

    def _faults(self) -> Iterator[str]:
        if self.timings and len(self.timings) != len(self.entries):
            yield (
                f"timings: expected none or one for each of {len(self.entries)} operations, got "
                f"{len(self.timings)}"
            )

    def cost(self, op: Op) -> int:
        """Nanoseconds.

        Raises `BudgetError` for an operation that was not measured, or with other numbers of parameters
        alone, and for one whose price and another's fall with depth.
        """
        known: Mapping[Op, int] = self.__dict__["_known"]
        op = _as_read(op)
        if op in self.__dict__["_falls"]:
            raise BudgetError(
                f"clock {self.name!r}: {self.__dict__['_falls'][op]}: a deeper one cannot take less; "
                "measure both again, on a quiet machine"
            )
        if op in known:
            return known[op]
        others = [other for other in known if other[:-1] == op[:-1]]
        if not others:
            raise BudgetError(
                f"clock {self.name!r}: {op} was never measured; calibrate it with this plan as well"
            )
        measured = ", ".join(
            "an unrecorded number" if o.updated is None else str(o.updated) for o in others
        )
        raise BudgetError(
            f"clock {self.name!r}: {op} was measured with {measured} of updated parameters alone; a path "
            "through a large model and a small model differ in that. Calibrate it with this plan as well"
        )

    def faults(self) -> list[str]:
        """Which costs fall with depth, and which operations took uneven steps or waited for data.

        Measure again on a quiet machine, and with data that come faster: a clock that charges steps which
        wait for data anyway favours slow methods.
        """
        found = list(dict.fromkeys(self.__dict__["_falls"].values()))
        for (op, _), timing in zip(self.entries, self.timings, strict=bool(self.timings)):
            uneven, at_most = timing.mean / timing.median, f"expected at most {_EVEN}"
            if uneven > _EVEN:
                found.append(f"{op}: {uneven:.3f} of the median on average, {at_most}")
            if timing.fed is not None and timing.fed > _EVEN:
                found.append(f"{op}: {timing.fed:.3f} of its time with the run's data, {at_most}")
        return found

    @property
    def identity(self) -> str:
        # As it was before operations had a number of updated parameters, where they have none
        known = [[*op[: 5 if op.kind == "forward" else 6], ns] for op, ns in self.entries]
        return f"{self.name} {_digest([[x for x in entry if x is not None] for entry in known])}"


class Budget:
    """What a run may spend on a clock, and what it has spent: charged by the driver, never by a method.

    **Arguments**

    - `total`: in the clock's unit (FLOPs or reference seconds); None has no end.

    `spent` is in the clock's whole numbers, `counts` says how often each operation was charged, and
    `uncharged` names what was left out with the seconds it took here.

    **Example**

        budget = Budget(FlopsClock(), total=1e12)
        budget.charge(op, 10)
        budget.done
    """

    def __init__(self, clock: Clock, total: float | None = None):
        if total is not None and not total > 0:
            raise BudgetError(f"total: expected a positive number of {clock.unit}, got {total!r}")
        self.clock = clock
        self.total = None if total is None else total * clock.per_unit
        self.spent = 0
        self.counts: collections.Counter[Op] = collections.Counter()
        self.uncharged: collections.Counter[str] = collections.Counter()

    def charge(self, op: Op, n: int = 1) -> int:
        """Add `n` operations, and return what they cost."""
        if n < 0:
            raise BudgetError(f"n: nothing is given back; expected 0 or more, got {n}")
        cost = n * self.clock.cost(op)
        self.spent += cost
        self.counts[op] += n
        return cost

    def note(self, what: str, seconds: float) -> None:
        """Name something that nobody is charged for."""
        self.uncharged[what] += seconds  # type: ignore[assignment]

    @property
    def done(self) -> float:
        """The share that is spent, at most 1."""
        if self.total is None:
            raise BudgetError("total: this budget has no end, so no share of it can be spent")
        return min(self.spent / self.total, 1.0)

    def affords(self, op: Op, n: int = 1) -> bool:
        """Whether so many operations are still within the budget."""
        return self.total is None or self.spent + n * self.clock.cost(op) <= self.total


def recharge(counts: Mapping[Op, int], clock: Clock) -> int:
    """What the same operations cost on another clock."""
    return sum(n * clock.cost(op) for op, n in counts.items())


def save_clock(clock: Clock, path: str | Path) -> None:
    """Write a clock as JSON, provenance and all."""
    values.write(clock, path, error=BudgetError)


def load_clock(path: str | Path, *, allow: Sequence[str] = ()) -> Clock:
    """Read a clock from JSON; raises `BudgetError` that lists every fault.

    `allow` names the packages that a clock of one's own may be imported from.
    """
    return values.read(path, Clock, allow=allow, error=BudgetError)


def _as_read(op: Op) -> Op:
    """An operation as clocks look it up: a forward pass updates nothing, recorded or not."""
    return op._replace(updated=0) if op.kind == "forward" else op


def _falls_with_depth(prices: Mapping[Op, int]) -> dict[Op, str]:
    """Operations of which a deeper one, with no fewer FLOPs and parameters, costs less; and the words."""
    falls: dict[Op, str] = {}
    alike: dict[Any, list[Op]] = {}
    for op in prices:
        alike.setdefault((op.kind, op.rows, op.length, op.updated is None), []).append(op)
    for group in alike.values():
        for a, b in itertools.permutations(group, 2):
            more = b.flops >= a.flops and (b.updated or 0) >= (a.updated or 0)
            if a.depth < b.depth and more and prices[b] < prices[a]:
                deep, shallow = prices[b] / 1e6, prices[a] / 1e6
                fall = (
                    f"{b.kind} of {b.depth} layers took {deep:.3f} ms, and of {a.depth} layers "
                    f"{shallow:.3f} ms ({b.rows} x {b.length} tokens)"
                )
                falls.setdefault(a, fall)
                falls.setdefault(b, fall)
    return falls


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


# The clocks of "No Train No Gain" ----------------------------------------------------------------

_3090 = (
    *(0.02521, 0.03837, 0.05177, 0.06508, 0.07847, 0.09188, 0.1052, 0.1186),
    *(0.1319, 0.1454, 0.1589, 0.1722, 0.1857, 0.1988, 0.2120, 0.2253),
)
RTX3090_BERT = DepthClock(
    "RTX 3090, BERT",
    _3090,
    rows=128,
    forward=0.09285 / 0.2253,
    curvature=1.0,
    provenance="Seconds of 128 sequences of 128 tokens, forward and backward with the optimizer's step "
    "spread over 12 of them; 16 layers of width 768; CUDA 11.7, PyTorch 1.13. From the code that No "
    "Train No Gain released, with the entry of 7 layers, .01052 there, read as .1052. A forward pass is "
    "measured at 16 layers; a second gradient is charged as a step, as there.",
)
RTX3090_BERT_AS_RELEASED = dataclasses.replace(
    RTX3090_BERT,
    name="RTX 3090, BERT, as released",
    seconds=(*_3090[:6], 0.01052, *_3090[7:]),
    provenance="As RTX3090_BERT, with the slip at 7 layers.",
)
A100_T5 = DepthClock(
    "A100, T5",
    (0.129, 0.209, 0.291, 0.373, 0.455, 0.538, 0.619, 0.703, 0.783, 0.865, 0.947, 1.031),
    rows=144,
    forward=0.412,
    curvature=1.25 / 1.031,
    provenance="Seconds of one update of 144 examples, by layers of each of the two stacks; T5 v1.1 "
    "base; CUDA 11.8, PyTorch 2.0. From the code that No Train No Gain released. A second gradient from "
    "its 1.156 s for Sophia's update, every tenth of which refreshes; the share of a forward pass is "
    "that of RTX3090_BERT, since none is given.",
)

assert get_args(OpKind) == ("train", "forward", "curvature")
