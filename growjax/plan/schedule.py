"""Learning rates as functions of the budget spent.

A rate that counts steps is meaningless once steps cost different amounts: a stage of small steps would
use up the schedule of the dear ones. Here the argument is always the share of the budget that is spent,
whatever the budget is counted in.
"""

import abc
import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Literal

from growjax.budget import decayed
from growjax.errors import PlanError
from growjax.values import Size, base, check, positive, ranged, register


@register
@dataclasses.dataclass(frozen=True)
class Warmup:
    """A warm-up of so many steps, or of so many training tokens, whatever the budget is.

    Two plans of different budgets then have the same learning rates while both are at their peak, so that
    one can be forked from the other.

    **Example**

        Schedule(1e-3, "wsd", warmup=Warmup(steps=200))
    """

    steps: Size | None = None
    tokens: Annotated[float, positive()] | None = None

    def __post_init__(self):
        check(self, PlanError, "this warm-up cannot be used:", self._faults)

    def _faults(self) -> Iterator[str]:
        if (self.steps is None) == (self.tokens is None):
            yield f"expected one of steps and tokens, got {self.steps} and {self.tokens}"


@base("a learning rate such as Schedule(2e-3)")
class Rate(abc.ABC):
    """A learning rate as a function of the share of the budget that is spent: subclass it, write `at`.

    `warmup` is the share after which a stage can `rewind` it; `peak` its highest value, for reports.
    Where `warmup` is a `Warmup`, `rising` is the rate at a share of it, and `at` is only asked after it,
    of the same rate with the warm-up as a share (`dataclasses.replace`).

    **Example**

        @dataclasses.dataclass(frozen=True)
        class Constant(Rate):
            peak: float
            warmup: float = 0.0

            def at(self, done):
                return self.peak
    """

    peak: float
    warmup: float | Warmup

    @abc.abstractmethod
    def at(self, done: float) -> float:
        """The learning rate once this share of the budget, from 0 to 1, is spent."""

    def rising(self, climbed: float) -> float:
        """The learning rate once this share of the warm-up, from 0 to 1, is over."""
        return self.peak * climbed

    @property
    def decayed(self) -> bool:
        """Whether the rate has fallen, by the end, to at most a tenth of its peak."""
        return decayed(self.at(1.0), self.peak)


@register
@dataclasses.dataclass(frozen=True)
class Schedule(Rate):
    """The learning rate at a share of the budget: up to a peak, and down again.

    **Fields**

    - `peak`: the highest learning rate.
    - `shape`: how it falls. "linear" and "cosine" from the end of the warmup; "wsd" stays at the peak
      and falls linearly over the last `decay` of the budget; "inverse_sqrt" falls with the root of what
      was spent; "constant" stays, and is not decayed at the end.
    - `warmup`: the share of the budget over which it rises linearly, or a `Warmup` of steps or tokens.
    - `start`: from where it rises, as a share of the peak.
    - `decay`: the share over which "wsd" falls.
    - `final`: where it ends, as a share of the peak.

    Raises `PlanError` that lists every field out of range.

    The triangle of No Train No Gain is "linear" with `warmup=0.5`; its cosine for T5 is "cosine" with
    `warmup=0.1526, start=0.5, final=1e-5`; decay to zero is "linear" with a short warmup.

    **Example**

        Schedule(1e-3, "wsd", warmup=0.01).at(0.5) == 1e-3
    """

    peak: Annotated[float, positive("learning rate")]
    shape: Literal["linear", "cosine", "wsd", "inverse_sqrt", "constant"] = "linear"
    warmup: Annotated[float, ranged(0, 1, "a share", below=True)] | Warmup = 0.05
    decay: Annotated[float, ranged(0, 1, "a share", above=True)] = 0.2
    final: Annotated[float, ranged(0, 1, "a share of the peak")] = 0.0
    start: Annotated[float, ranged(0, 1, "a share of the peak")] = 0.0

    def __post_init__(self):
        check(self, PlanError, "this learning rate cannot be used:", self._faults)

    def _faults(self) -> Iterator[str]:
        if isinstance(self.warmup, Warmup):
            return  # what share it is, the plan knows
        if self.shape == "wsd" and self.warmup + self.decay > 1:
            yield f"decay: {self.decay} of the budget does not fit after {self.warmup} of warmup"

    def at(self, done: float) -> float:
        """The learning rate once this share of the budget is spent; past the end it is the last one."""
        assert not isinstance(self.warmup, Warmup), "a plan turns it into a share first"
        done = min(max(done, 0.0), 1.0)
        if done < self.warmup:
            return self.rising(done / self.warmup)
        late = (done - self.warmup) / (1 - self.warmup)
        if self.shape == "constant":
            return self.peak
        if self.shape == "inverse_sqrt":
            return self.peak * max(math.sqrt(max(self.warmup, 1e-3) / max(done, 1e-3)), self.final)
        if self.shape == "wsd":
            down = min(max((done - (1 - self.decay)) / self.decay, 0.0), 1.0)
        elif self.shape == "cosine":
            down = (1 - math.cos(math.pi * late)) / 2
        else:
            down = late
        return self.peak * (1 - (1 - self.final) * down)

    def rising(self, climbed: float) -> float:
        """The learning rate once this share of the warm-up is over."""
        return self.peak * (self.start + (1 - self.start) * climbed)
