"""What a run reports while it runs. Records are plain data: printed, written as JSON, compared."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Crossing:
    """What a growth did: the loss on the same tokens before and after, and the seconds it took.

    `change` is the mean absolute change of a token's loss, in nats; `limit` what rounding explains, or
    None where the operator promises nothing.
    """

    operator: str
    exactness: str
    before: float
    after: float
    change: float
    limit: float | None
    grow_seconds: float
    certify_seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """Losses on the held-out windows, one by one: runs on the same text are compared window by window.

    `sums` are the losses of a window's positions times their weights, in nats, and `weights` the sums of
    these: float64 `[windows]` both.
    """

    sums: np.ndarray
    weights: np.ndarray

    @property
    def windows(self) -> int:
        return len(self.sums)

    @property
    def loss(self) -> float:
        """The mean over all weights, in nats per token."""
        return float(self.sums.sum() / self.weights.sum())


@dataclasses.dataclass(frozen=True)
class Begin:
    """Where a run begins: at its birth, or after the checkpoint that it goes on from.

    `notes` are sentences about what the user should know: a lock or a damaged checkpoint that was found.
    `held_out` is how many windows each evaluation on the way is taken over: losses of runs compare over
    the same ones alone. `forked` is the folder of the run that this one begins with the state of.
    """

    stage: int
    step: int
    resumed: str | None
    devices: int
    notes: tuple[str, ...] = ()
    held_out: int | None = dataclasses.field(default=None, compare=False)
    forked: str | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """What one training step reports; `held_out` only at marks and after the last step.

    `held_out` is taken over the same few windows at every mark (`Options.held_out`); the many of the end
    are in `End`. `step` counts from 0. `tokens`, `flops`, `spent` and `seconds` are what the run has used
    once it is done, over all its sessions: `spent` is what the plan's clock charges, in its unit; seconds
    are those spent training, not compiling, growing, evaluating or saving.
    `scores` are what the run's hooks said of it, at the same marks; None without hooks.
    `took` are the seconds since the step before was reported, `waited` those of them spent waiting for
    data. Losses are in nats per token: `loss` of the part that was trained, on its batch; `held_out` of
    the whole model.
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
    """A growth before `step`: what grew, what it did to the loss, and how long training stood still.

    `stall` are the seconds from the end of the last step to the start of the next; `compile_wait` is
    the part of them that was spent waiting for programs.
    """

    stage: int
    step: int
    flops: int
    grew: dict[str, tuple[int, int]]
    crossing: Crossing
    stall: float
    compile_wait: float


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint is being written."""

    stage: int
    step: int
    path: str


@dataclasses.dataclass(frozen=True)
class End:
    """The end of a run, or of a session of it if `finished` is False (it was asked to stop).

    `model` is without gates if the run is finished. `programs` were compiled in this session; the
    seconds are what was not spent training. `step` is how many steps of the run are done.
    `held_out` are the losses of the finished model on every window of the fixed set, if there is one;
    `signal` is what asked to stop, such as "SIGTERM".
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


Record = Begin | Step | Growth | Saved | End
