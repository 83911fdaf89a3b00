"""Learning rates as functions of the budget spent.

A rate that counts steps is meaningless once steps cost different amounts: a stage of small steps would
use up the schedule of the dear ones. Here the argument is always the share of the budget that is spent,
whatever the budget is counted in.
"""

import dataclasses
import math
from typing import Literal

from growjax.budget import decayed
from growjax.errors import PlanError, raise_all


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate at a share of the budget: up to a peak, and down again.

    **Fields**

    - `peak`: the highest learning rate.
    - `shape`: how it falls. "linear" and "cosine" from the end of the warmup; "wsd" stays at the peak
      and falls linearly over the last `decay` of the budget; "inverse_sqrt" falls with the root of what
      was spent; "constant" stays, and is not decayed at the end.
    - `warmup`: the share of the budget over which it rises linearly.
    - `start`: from where it rises, as a share of the peak.
    - `decay`: the share over which "wsd" falls.
    - `final`: where it ends, as a share of the peak.

    Raises `PlanError` that lists every field out of range.

    The triangle of No Train No Gain is "linear" with `warmup=0.5`; its cosine for T5 is "cosine" with
    `warmup=0.1526, start=0.5, final=1e-5`; decay to zero is "linear" with a short warmup.

    **Example**

        Schedule(1e-3, "wsd", warmup=0.01).at(0.5) == 1e-3
    """

    peak: float
    shape: Literal["linear", "cosine", "wsd", "inverse_sqrt", "constant"] = "linear"
    warmup: float = 0.05
    decay: float = 0.2
    final: float = 0.0
    start: float = 0.0

    def __post_init__(self):
        shapes = ("linear", "cosine", "wsd", "inverse_sqrt", "constant")
        checks = [
            ("peak", "a positive learning rate", self.peak, self.peak > 0),
            ("shape", f"one of {', '.join(shapes)}", self.shape, self.shape in shapes),
            ("warmup", "a share from 0 to below 1", self.warmup, 0 <= self.warmup < 1),
            ("decay", "a share above 0 and at most 1", self.decay, 0 < self.decay <= 1),
            ("final", "a share of the peak from 0 to 1", self.final, 0 <= self.final <= 1),
            ("start", "a share of the peak from 0 to 1", self.start, 0 <= self.start <= 1),
        ]
        faults = [
            f"{name}: expected {what}, got {got!r}" for name, what, got, ok in checks if not ok
        ]
        if not faults and self.shape == "wsd" and self.warmup + self.decay > 1:
            faults.append(
                f"decay: {self.decay} of the budget does not fit after {self.warmup} of warmup"
            )
        raise_all(PlanError, "this learning rate cannot be used:", faults)

    @property
    def decayed(self) -> bool:
        """Whether the rate has fallen, by the end, to at most a tenth of its peak."""
        return decayed(self.at(1.0), self.peak)

    def at(self, done: float) -> float:
        """The learning rate once this share of the budget is spent; past the end it is the last one."""
        done = min(max(done, 0.0), 1.0)
        if done < self.warmup:
            return self.peak * (self.start + (1 - self.start) * done / self.warmup)
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
