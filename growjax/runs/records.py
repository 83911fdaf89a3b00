"""The records of a run: one for each step, growth, checkpoint, beginning and end. They are plain data."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Fitting:
    """The fit of a growth, before it, or the training that is part of it (`batches` is 0 then).

    - `losses`: the loss on each batch, in nats per token.
    - `flops`, `tokens`, `cost`: its model FLOPs, training tokens and cost (in the clock's unit). The
      totals of the run have them from its stage on.
    """

    batches: int
    losses: tuple[float, ...]
    flops: int
    tokens: int
    cost: float


@dataclasses.dataclass(frozen=True)
class Crossing:
    """The effect of a growth: the loss on the same tokens before and after, and the seconds it took.

    - `change`: the mean absolute change of a token's loss, in nats.
    - `limit`: the largest change that rounding explains; None if the operator promises nothing.
    - `fit`: the fit of the operator, or None.
    """

    operator: str
    exactness: str
    before: float
    after: float
    change: float
    limit: float | None
    grow_seconds: float
    certify_seconds: float
    fit: Fitting | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """The loss of every held-out window, since runs on the same text are compared window by window.

    `sums` are the weighted sums of the losses over a window's positions, in nats, and `weights` the sums
    of the weights: float64 `[windows]` both.
    """

    sums: np.ndarray
    weights: np.ndarray

    @property
    def windows(self) -> int:
        """The number of windows."""
        return len(self.sums)

    @property
    def loss(self) -> float:
        """The weighted mean loss over all windows, in nats per token."""
        return float(self.sums.sum() / self.weights.sum())


@dataclasses.dataclass(frozen=True)
class Begin:
    """The beginning of a session: at the birth of the model, or at a checkpoint.

    - `resumed`: the checkpoint that it goes on from; None at the birth.
    - `notes`: sentences for the user, such as a lock taken over from a dead process, or a damaged
      checkpoint set aside.
    - `held_out`: the number of windows of each evaluation during the run; losses are comparable only
      over the same windows.
    - `forked`: the folder of the run whose state this one begins with, or None.
    - `ended`: the stages that triggers have ended so far, each with its number of steps.
    """

    stage: int
    step: int
    resumed: str | None
    devices: int
    notes: tuple[str, ...] = ()
    held_out: int | None = dataclasses.field(default=None, compare=False)
    forked: str | None = None
    ended: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step.

    - `step`: its number in the run, from 0.
    - `tokens`, `flops`, `spent`, `seconds`: the totals of the run after it, over all sessions. `spent` is
      the cost in the clock's unit; `seconds` are those of training, without compiling, growing,
      evaluating and saving.
    - `rate`, `level`: its learning rate, and the level of the gates.
    - `loss`: the loss of the part that was trained, on its batch, in nats per token.
    - `took`, `waited`: seconds since the previous step was reported, and the seconds of these spent
      waiting for data.
    - `held_out`: the loss of the whole model, in nats per token, on the same windows at every evaluation
      (`Options.held_out`); None at steps without one. The losses on many windows are in `End`.
    - `scores`: at the same steps, the numbers of the run's hooks, and `held_out/NAME`, the loss on the
      held-out text of each source of a `Blend`; None without either.
    """

    stage: int
    step: int
    tokens: int
    flops: int
    spent: float
    seconds: float
    rate: float
    level: float
    loss: float
    gradient_norm: float
    parameter_norm: float
    took: float
    waited: float
    held_out: float | None = None
    scores: dict[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Growth:
    """A growth before `step`.

    - `grew`: the old and the new size of each axis that grew.
    - `crossing`: its effect on the loss.
    - `stall`: seconds from the end of the last step to the start of the next.
    - `compile_wait`: the seconds of these spent waiting for compiled programs.
    """

    stage: int
    step: int
    flops: int
    grew: dict[str, tuple[int, int]]
    crossing: Crossing
    stall: float
    compile_wait: float


@dataclasses.dataclass(frozen=True)
class Decided:
    """The choice among the candidates of a probe, whose trials ended after `step`.

    - `candidates`: the candidates by their names, or by what they grow.
    - `losses`: the held-out loss after the trial of each, in nats per token; None if not finite.
    - `costs`: the cost of each trial, in the clock's unit.
    - `chosen`: the number of the candidate that this run is of.
    """

    stage: int
    step: int
    candidates: tuple[str, ...]
    losses: tuple[float | None, ...]
    costs: tuple[float, ...]
    chosen: int


@dataclasses.dataclass(frozen=True)
class Ended:
    """The end of a stage by its trigger, after `step`.

    - `steps`: the number of steps of the stage.
    - `trigger`: the trigger, as it prints itself.
    - `numbers`: the numbers by which it fired.
    """

    stage: int
    step: int
    steps: int
    trigger: str
    numbers: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Saved:
    """The beginning of the writing of a checkpoint, for the state before `step`."""

    stage: int
    step: int
    path: str


@dataclasses.dataclass(frozen=True)
class End:
    """The end of a run or, if `finished` is False, of a session that was asked to stop.

    - `model`: the model to evaluate; without gates if the run is finished.
    - `programs`: the number of programs compiled in this session.
    - `compile_seconds`, `held_out_seconds`, `hook_seconds`: seconds of this session that were not
      training.
    - `step`: the number of steps of the run that are done.
    - `held_out`: the losses of the finished model on many windows (`Options.held_out_end`), or None.
    - `signal`: the signal that asked the run to stop, such as "SIGTERM", or None.
    """

    model: Any
    finished: bool
    programs: int
    compile_seconds: float
    held_out_seconds: float
    hook_seconds: float = 0.0
    step: int = 0
    held_out: HeldOut | None = None
    signal: str | None = None


Record = Begin | Step | Growth | Decided | Ended | Saved | End
