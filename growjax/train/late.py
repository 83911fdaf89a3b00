"""A step whose numbers are still being computed on the device, and how the host reads them later."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import jax

from growjax.errors import TrainingError
from growjax.plan.plan import Plan
from growjax.plan.stages import Span
from growjax.programs.step import Report
from growjax.runs.records import Step
from growjax.train.stopwatch import Stopwatch


@dataclasses.dataclass(frozen=True)
class Late:
    """The stage's step `i`, with its report still on the device.

    The host reads it after it has started the next step, so that the device never waits for the host.
    `spent` (in the plan's clock's smallest unit) and `flops` are the totals of the run after the step;
    `waited` are the seconds that it waited for its data.
    """

    plan: Plan
    span: Span
    i: int
    spent: int
    flops: int
    rate: float
    level: float
    waited: float
    report: Report

    def read(
        self, stopwatch: Stopwatch, last: Callable[[], Path | None], held_out: float | None = None
    ) -> Step:
        """Wait for the numbers and make the record; raises `TrainingError` unless they are finite.

        `last` returns the last checkpoint, for the error. `held_out` is the step's held-out loss.
        """
        loss, gradient_norm, parameter_norm = (float(x) for x in jax.device_get(self.report))
        span, step = self.span, self.span.start + self.i
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise TrainingError(
                f"plan {self.plan.name!r}: step {step} (stage {span.index} {span.stage.name!r}, learning "
                f"rate {self.rate:.3g}) has a loss of {loss} and a gradient of norm {gradient_norm}; "
                "lower the peak, lengthen the warmup or look at the batch. Last good checkpoint: "
                f"{last() or 'none'}"
            )
        seconds = stopwatch.training()
        return Step(
            stage=span.index,
            step=step,
            tokens=span.tokens + (self.i + 1) * span.step_tokens,
            flops=self.flops,
            spent=self.spent / self.plan.clock.per_unit,
            seconds=seconds,
            rate=self.rate,
            level=self.level,
            loss=loss,
            gradient_norm=gradient_norm,
            parameter_norm=parameter_norm,
            took=stopwatch.lap(),
            waited=self.waited,
            held_out=held_out,
        )
