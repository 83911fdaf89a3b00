"""Learning rates as functions of the budget spent.

A schedule over steps is meaningless once steps cost different amounts: a stage of cheap steps would use
up the schedule of the expensive ones. Here the argument is always the share of the budget that is spent,
from 0 to 1, in whatever unit the budget is counted.
"""

import abc
import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from growjax.cards import Card, Paper
from growjax.errors import PlanError
from growjax.values import Size, base, check, positive, ranged, register


_BUDGETED = Paper(
    "Budgeted Training: Rethinking Deep Neural Network Training Under Resource Constraints",
    "Li, Mengtian and Yumer, Ersin and Ramanan, Deva",
    2020,
    "International Conference on Learning Representations",
    "1905.04753",
)
_COSINE = Paper(
    "SGDR: Stochastic Gradient Descent with Warm Restarts",
    "Loshchilov, Ilya and Hutter, Frank",
    2017,
    "International Conference on Learning Representations",
    "1608.03983",
)
_WSD = Paper(
    "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies",
    "Hu, Shengding and Tu, Yuge and Han, Xu and He, Chaoqun and Cui, Ganqu and others",
    2024,
    "Conference on Language Modeling",
    "2404.06395",
)
_INVERSE_SQRT = Paper(
    "Attention Is All You Need",
    "Vaswani, Ashish and Shazeer, Noam and Parmar, Niki and Uszkoreit, Jakob and Jones, Llion and Gomez, "
    "Aidan N. and Kaiser, Lukasz and Polosukhin, Illia",
    2017,
    "Advances in Neural Information Processing Systems",
    "1706.03762",
)


@register
@dataclasses.dataclass(frozen=True)
class Warmup:
    """A warm-up of a number of steps, or of training tokens, independent of the budget.

    Plans of different budgets then have the same learning rates until one of them leaves its peak, and
    the steps before can be shared by a fork.

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

    `warmup` is the share that a stage with `rewind` goes back to; `peak` the highest rate, for reports.
    With a `Warmup`, `rising` is the rate at a share of it; `at` is called after its end only, on the rate
    with the warmup as a share of the budget (`dataclasses.replace`).

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
        """The learning rate when the share `done` of the budget, from 0 to 1, is spent."""

    def rising(self, climbed: float) -> float:
        """The learning rate when the share `climbed` of the warmup, from 0 to 1, is over."""
        return self.peak * climbed


@register
@dataclasses.dataclass(frozen=True)
class Schedule(Rate):
    """A learning rate that rises linearly to a peak, and then falls.

    **Fields**

    - `peak`: the highest learning rate.
    - `shape`: how it falls. "linear" and "cosine" from the end of the warmup; "wsd" stays at the peak
      and falls linearly over the last `decay` of the budget; "inverse_sqrt" falls with the square root
      of the share spent; "constant" stays at the peak, also at the end.
    - `warmup`: the share of the budget over which it rises, or a `Warmup` of steps or tokens.
    - `start`: the rate at the beginning, as a share of the peak.
    - `decay`: the share of the budget over which "wsd" falls.
    - `final`: the rate at the end, as a share of the peak ("inverse_sqrt": the lowest rate).

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
    card: ClassVar[Card] = Card(
        by={
            "shape": {
                "linear": (_BUDGETED,),
                "cosine": (_COSINE,),
                "wsd": (_WSD,),
                "inverse_sqrt": (_INVERSE_SQRT,),
            }
        }
    )

    def __post_init__(self):
        check(self, PlanError, "this learning rate cannot be used:", self._faults)

    def _faults(self) -> Iterator[str]:
        if isinstance(self.warmup, Warmup):
            # Its share of the budget follows from the plan, which checks the rate again
            return
        if self.shape == "wsd" and self.warmup + self.decay > 1:
            yield f"decay: {self.decay} of the budget does not fit after {self.warmup} of warmup"

    def at(self, done: float) -> float:
        """The learning rate when the share `done` of the budget is spent.

        `done` is clipped to [0, 1], so the rate stays at its last value past the end.
        """
        assert not isinstance(self.warmup, Warmup), "a plan turns it into a share first"
        done = min(max(done, 0.0), 1.0)
        if done < self.warmup:
            return self.rising(done / self.warmup)
        if self.shape == "constant":
            return self.peak
        if self.shape == "inverse_sqrt":
            # Without a warmup the rate would be infinite at 0: it stays at the peak for 0.1%
            return self.peak * max(math.sqrt(max(self.warmup, 1e-3) / max(done, 1e-3)), self.final)
        # From 0 (at the peak) to 1 (at `final`)
        fallen = (done - self.warmup) / (1 - self.warmup)
        if self.shape == "wsd":
            fallen = min(max((done - (1 - self.decay)) / self.decay, 0.0), 1.0)
        elif self.shape == "cosine":
            fallen = (1 - math.cos(math.pi * fallen)) / 2
        return self.peak * (1 - (1 - self.final) * fallen)

    def rising(self, climbed: float) -> float:
        """The learning rate when the share `climbed` of the warmup is over."""
        return self.peak * (self.start + (1 - self.start) * climbed)
