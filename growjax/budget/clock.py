"""Reference clocks: the cost of a run is what its operations take on a reference machine.

A run counts its operations, and a clock has the cost of each, as an integer, so that sums do not depend
on their order. So the cost of a run depends neither on the speed and load of the machine that it runs on
nor on compilations. `FlopsClock` charges model FLOPs; the others charge seconds of a reference machine
from a table (Reference System Time: Kaddour et al., "No Train No Gain", NeurIPS 2023, section 3).
"""

import abc
import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np

from growjax import values
from growjax.cards import Card, Paper
from growjax.errors import BudgetError


OpKind = Literal["train", "forward", "curvature"]
# Steps whose mean is more than this multiple of their median were timed on a machine that did other work
_EVEN = 1.02
_TABLE = values.Range("at least two positive numbers", lambda seconds: len(seconds) > 1)


_REFERENCE = Paper(
    "No Train No Gain: Revisiting Efficient Training Algorithms For Transformer-based Language Models",
    "Kaddour, Jean and Key, Oscar and Nawrot, Piotr and Minervini, Pasquale and Kusner, Matt J.",
    2023,
    "Advances in Neural Information Processing Systems",
    "2307.06440",
)


@values.register
class Op(NamedTuple):
    """One operation of a run, which a clock charges.

    **Fields**

    - `kind`: a training step, a forward pass (to select examples), or a second gradient (curvature).
    - `depth`: how many blocks of each stack run.
    - `rows`, `length`: the number of sequences, and their length in tokens.
    - `flops`: its model FLOPs.
    - `updated`: the number of parameters that the optimizer goes through: all of the model's, also if
      only a path is trained. So a path through a large model and a small model of the same shapes are two
      operations. It is None in records from before this field existed.
    """

    kind: OpKind
    depth: int
    rows: int
    length: int
    flops: int
    updated: int | None = None


@values.base("a clock such as FlopsClock()")
class Clock(abc.ABC):
    """The cost of operations. A clock of your own is a subclass with `unit`, `cost` and `identity`.

    - `unit`: the noun in which budgets, tables and figures count: "FLOPs", "seconds" of a reference
      machine, or one of your own, such as "dollars".
    - `per_unit`: the number of `cost`'s integer units in one of it: 10**9 if `cost` is in nanoseconds and
      `unit` is "seconds".

    **Example**

        class Joules(Clock):
            unit = "joules"
            per_unit = 1000     # `cost` is in millijoules

            def cost(self, op):
                return round(op.flops / 4e8)

            @property
            def identity(self):
                return "joules of the small cluster, 2026"
    """

    unit: ClassVar[str]
    per_unit: ClassVar[int] = 1

    @abc.abstractmethod
    def cost(self, op: Op) -> int:
        """The cost of one operation, a whole number of 0 or more.

        Raises `BudgetError` for one that the clock does not know.
        """

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """A string that identifies the clock: results compare only under equal ones."""


@values.register
@dataclasses.dataclass(frozen=True)
class FlopsClock(Clock):
    """Charges model FLOPs, exactly; memory traffic and the cost of small shapes are not counted."""

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
    """Charges seconds by the number of layers that run, in proportion to the number of sequences.

    **Fields**

    - `name`: the name of the machine and the model.
    - `seconds`: the time of a training step with 1, 2, ... layers.
    - `rows`: the sequences of that step.
    - `forward`, `curvature`: the times of a forward pass and a second gradient, as shares of a step. With
      0 they are free, which shows what a method would gain if they were.
    - `fit`: "table" has the depths of the table; "linear" fits a line to it, and has all depths.
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
    card: ClassVar[Card] = Card(papers=(_REFERENCE,))

    def __post_init__(self):
        values.check(self, BudgetError, f"clock {self.name!r} cannot be used:")

    def cost(self, op: Op) -> int:
        """Nanoseconds; raises `BudgetError` for a depth that the table does not have."""
        if op.depth == 0:
            step = self.line[0]  # embedding and head alone: the intercept of the line
        elif self.fit == "linear":
            step = self.line[0] + self.line[1] * op.depth
        elif op.depth <= len(self.seconds):
            step = self.seconds[op.depth - 1]
        else:
            raise BudgetError(
                f"clock {self.name!r}: its table has 1 to {len(self.seconds)} layers, and {op.depth} "
                "run; use fit='linear' to extrapolate"
            )
        share = {"train": 1.0, "forward": self.forward, "curvature": self.curvature}[op.kind]
        return round(step * share * op.rows / self.rows * 1e9)

    @property
    def line(self) -> tuple[float, float]:
        """Seconds of a step without layers, and of each layer: the least-squares line of the table."""
        depth = np.arange(1, len(self.seconds) + 1)
        slope, intercept = np.polyfit(depth, self.seconds, 1)
        return float(intercept), float(slope)

    def faults(self) -> list[str]:
        """The depths of the table at which a step takes less time than with one layer fewer."""
        pairs = zip(self.seconds, self.seconds[1:], strict=False)
        return [
            f"{d} layers take {later} s, and {d - 1} took {earlier} s"
            for d, (earlier, later) in enumerate(pairs, start=2)
            if later < earlier
        ]

    @property
    def identity(self) -> str:
        # The name alone would not tell two tables apart
        return f"{self.name} {_digest(dataclasses.asdict(self))}"


@values.register
class Timing(NamedTuple):
    """How an operation was timed.

    **Fields**

    - `steps`: the number of steps, which are timed in blocks.
    - `mean`, `median`, `p5`, `p95`: of the blocks, in nanoseconds a step; `p5` and `p95` are percentiles.
    - `fed`: the time of a step that waits for a run's own data, over that of a step on a batch already in
      memory; None if it was not measured.
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
    """Charges the time that each operation took when it was measured, and has no other operations.

    `entries` are pairs of an operation and its nanoseconds, `timings` how each was timed, in the same
    order, or empty; `growjax.train.calibrate` makes them.

    A training operation must also have the measured number of updated parameters. Old clocks have entries
    without that number. They charge only operations that were recorded without it too, since it is not
    known whether such a price is that of a path or of a small model. A forward pass updates nothing, so
    its old entries are as good as new ones.

    If a deeper operation is cheaper than a shallower one, the measurements contradict each other, and
    neither operation can be charged.

    **Example**

        load_clock("clocks/xeon.json").cost(op)
    """

    name: str
    entries: tuple[tuple[Op, int], ...]
    provenance: str = ""
    timings: tuple[Timing, ...] = ()

    unit = "seconds"
    per_unit = 10**9
    card: ClassVar[Card] = Card(papers=(_REFERENCE,))

    def __post_init__(self):
        # The clocks of the first studies have plain lists for operations and timings. Values that are
        # neither stay as they are, and `check` reports them
        with contextlib.suppress(TypeError, ValueError):
            entries = tuple((Op(*op), int(ns)) for op, ns in self.entries)
            object.__setattr__(self, "entries", entries)
            object.__setattr__(self, "timings", tuple(Timing(*timing) for timing in self.timings))
        values.check(self, BudgetError, f"clock {self.name!r} cannot be used:", self._faults)
        prices = {_price_key(op): ns for op, ns in self.entries}
        # Plain attributes beside the fields, which a frozen dataclass sets in this way alone
        object.__setattr__(self, "_prices", prices)
        object.__setattr__(self, "_contradictions", _contradictions(prices))

    def _faults(self) -> Iterator[str]:
        if self.timings and len(self.timings) != len(self.entries):
            yield (
                f"timings: expected none or one for each of {len(self.entries)} operations, got "
                f"{len(self.timings)}"
            )

    def cost(self, op: Op) -> int:
        """Nanoseconds.

        Raises `BudgetError` for an operation that was not measured, or only with other numbers of updated
        parameters, and for one whose price contradicts that of another depth.
        """
        prices: Mapping[Op, int] = self.__dict__["_prices"]
        op = _price_key(op)
        if op in self.__dict__["_contradictions"]:
            raise BudgetError(
                f"clock {self.name!r}: {self.__dict__['_contradictions'][op]}: a deeper one cannot take "
                "less; measure both again, on a quiet machine"
            )
        if op in prices:
            return prices[op]
        # The same operation but for the last field, the number of updated parameters
        others = [other for other in prices if other[:-1] == op[:-1]]
        if not others:
            raise BudgetError(
                f"clock {self.name!r}: {op} was never measured; calibrate it with this plan as well"
            )
        measured = ", ".join(
            "an unrecorded number" if o.updated is None else str(o.updated) for o in others
        )
        raise BudgetError(
            f"clock {self.name!r}: {op} was measured only with {measured} of updated parameters; a path "
            "through a large model and a small model differ in that. Calibrate it with this plan as well"
        )

    def faults(self) -> list[str]:
        """The costs that fall with depth, and the operations with uneven steps or waits for data.

        Measure again on a quiet machine, and with faster data: if steps wait for data anyway, slow
        methods cost no more than fast ones.
        """
        faults = list(dict.fromkeys(self.__dict__["_contradictions"].values()))
        for (op, _), timing in zip(self.entries, self.timings, strict=bool(self.timings)):
            uneven, at_most = timing.mean / timing.median, f"expected at most {_EVEN}"
            if uneven > _EVEN:
                faults.append(f"{op}: {uneven:.3f} of the median on average, {at_most}")
            if timing.fed is not None and timing.fed > _EVEN:
                faults.append(f"{op}: {timing.fed:.3f} of its time with the run's data, {at_most}")
        return faults

    @property
    def identity(self) -> str:
        # Entries without a number of updated parameters (the sixth field), and forward passes, are hashed
        # as before that field existed, so that old clocks keep their identity
        rows = []
        for op, ns in self.entries:
            fields = [*op[: 5 if op.kind == "forward" else 6], ns]
            rows.append([x for x in fields if x is not None])
        return f"{self.name} {_digest(rows)}"


def clock_faults(clock: Clock) -> Iterator[str]:
    """The faults of the attributes that a clock's class must have."""
    unit, per_unit = getattr(clock, "unit", None), clock.per_unit
    if not isinstance(unit, str) or not 0 < len(unit) <= 40 or not unit.isprintable():
        yield f'unit: expected a noun such as "seconds" or "dollars", got {unit!r}'
    if isinstance(per_unit, bool) or not isinstance(per_unit, int) or per_unit < 1:
        yield f"per_unit: expected a positive integer, got {per_unit!r}"
    if not isinstance(clock.identity, str) or not clock.identity:
        yield f"identity: expected a string that no other clock has, got {clock.identity!r}"


def cost_of(op: Op, clock: Clock) -> int:
    """The cost of one operation; raises `BudgetError` if it is not a whole number of 0 or more."""
    cost = clock.cost(op)
    if isinstance(cost, bool) or not isinstance(cost, int | np.integer) or cost < 0:
        # Sums of fractions would depend on their order
        raise BudgetError(
            f"clock {clock.identity!r}: expected cost to return a whole number of 0 or more for {op}, "
            f"got {cost!r}; round it, and let per_unit say how many of them are one of {clock.unit}"
        )
    return int(cost)


def recharge(counts: Mapping[Op, int], clock: Clock) -> int:
    """The cost of some operations on another clock."""
    return sum(n * cost_of(op, clock) for op, n in counts.items())


def save_clock(clock: Clock, path: str | Path) -> None:
    """Write a clock as JSON, with its provenance."""
    values.write(clock, path, error=BudgetError)


def load_clock(path: str | Path, *, allow: Sequence[str] = ()) -> Clock:
    """Read a clock from JSON; raises `BudgetError` that lists every fault.

    `allow` names the packages from which a clock class of your own may be imported.
    """
    return values.read(path, Clock, allow=allow, error=BudgetError)


def _price_key(op: Op) -> Op:
    """The operation by which a price is looked up: a forward pass updates nothing, recorded or not."""
    return op._replace(updated=0) if op.kind == "forward" else op


def _contradictions(prices: Mapping[Op, int]) -> dict[Op, str]:
    """The operations that are dearer than a deeper one, or cheaper than a shallower one, with a message.

    Only operations of the same shape are compared, and a deeper one must not have fewer FLOPs or updated
    parameters.
    """
    messages: dict[Op, str] = {}
    comparable: dict[Any, list[Op]] = {}
    for op in prices:
        comparable.setdefault((op.kind, op.rows, op.length, op.updated is None), []).append(op)
    for group in comparable.values():
        for a, b in itertools.permutations(group, 2):
            more = b.flops >= a.flops and (b.updated or 0) >= (a.updated or 0)
            if a.depth < b.depth and more and prices[b] < prices[a]:
                deep, shallow = prices[b] / 1e6, prices[a] / 1e6
                message = (
                    f"{b.kind} of {b.depth} layers took {deep:.3f} ms, and of {a.depth} layers "
                    f"{shallow:.3f} ms ({b.rows} x {b.length} tokens)"
                )
                messages.setdefault(a, message)
                messages.setdefault(b, message)
    return messages


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
