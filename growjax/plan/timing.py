"""When to grow and by how much: published laws, and triggers that read the losses of a run."""

import abc
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np

from growjax.cards import Card
from growjax.errors import PlanError, raise_all
from growjax.growth.depth import FEW_LAYERS
from growjax.values import Range, Size, at_least, base, check, ranged, register, short
from growjax.values import faults as field_faults


def stacking_tokens(parameters: float, flops: float) -> float:
    """G_stack's law: the tokens to train a small model on before it is stacked.

    `log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74`, for a stacked model of `parameters` N without
    embeddings and `flops` C of the whole run (6 N times its tokens). The paper fits it for Llamas of
    410M to 3B parameters, and finds a factor of 4 in depth best of 2, 4 and 8.

    Du et al., "Stacking Your Transformers", NeurIPS 2024.

    **Example**

        stacking_tokens(7e9, 6 * 7e9 * 2e12)      # 1.1e10 tokens
    """
    faults = [
        line
        for name, value, least in (("parameters", parameters, 0), ("flops", flops, 1))
        for line in field_faults(_above(least), value, name)
    ]
    raise_all(PlanError, "G_stack's law does not say:", faults)
    exponent = 0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74
    if exponent > 300:
        raise PlanError(f"flops: {flops:g} is too little for a law of large runs")
    return 10**exponent


def _above(least: float) -> Any:
    return Annotated[float, Range(f"a number above {least:g}", lambda x: x > least)]


def proportional_shares(stages: int, alpha: float = 1.0) -> tuple[float, ...]:
    """MIDAS's Prop-alpha schedule: stage i of n gets a share of the budget in proportion to `i ** alpha`.

    0 is equal shares. They add up to 1, as `Stage(share=...)` asks for.

    Saunshi et al., "On the Inductive Bias of Stacking Towards Improving Reasoning", NeurIPS 2024.

    **Example**

        proportional_shares(3, 1)       # (1/6, 1/3, 1/2)
    """
    faults = [*field_faults(Size, stages, "stages"), *field_faults(float, alpha, "alpha")]
    raise_all(PlanError, "a budget cannot be shared so:", faults)
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.arange(1, stages + 1, dtype=float) ** alpha
        shares = weights / weights.sum()
    if not np.all(shares > 0):
        raise PlanError(f"alpha: expected a power that leaves every stage a share, got {alpha!r}")
    return tuple(shares.tolist())


@base("a trigger such as Plateau(window=200, least=0.005)")
class Trigger(abc.ABC):
    """A rule that ends a stage by its losses, for `Stage(until=...)`: subclass it, write `fires`.

    A subclass is a frozen dataclass with hashable fields. It may depend on nothing but its arguments, so
    that a run that resumes ends the stage at the same step.

    **Example**

        @dataclasses.dataclass(frozen=True)
        class Below(Trigger):
            loss: float
            reads = 1

            def fires(self, losses, done):
                return {"loss": losses[-1]} if losses[-1] < self.loss else None
    """

    # The number of latest losses that it reads
    reads: int

    @abc.abstractmethod
    def fires(self, losses: Sequence[float], done: int) -> Mapping[str, float] | None:
        """The numbers by which the stage ends, or None to go on.

        `losses` are those of the latest steps (`reads` of them, or all if there are fewer), oldest first;
        `done` counts the steps of the stage up to the last of them.
        """


@register
@dataclasses.dataclass(frozen=True)
class Plateau(Trigger):
    """The loss has stopped to fall: its mean over a window is hardly below that over the window before.

    **Fields**

    - `window`: the number of steps of each window.
    - `least`: the least fall, as a share of the earlier mean.

    **Example**

        Stage(share=0.5, until=Plateau(window=200, least=0.005))
    """

    window: Size
    least: Annotated[float, ranged(0, 1, "a share", below=True)]

    def __post_init__(self):
        check(self, PlanError, "this trigger cannot be used:")

    @property
    def reads(self) -> int:  # type: ignore[override]
        """Two windows."""
        return 2 * self.window

    def fires(self, losses: Sequence[float], done: int) -> Mapping[str, float] | None:
        """The means of both windows, if the later one is not much lower."""
        del done
        if len(losses) < self.reads:
            return None
        before, after = np.asarray(losses[-self.reads :], float).reshape(2, -1).mean(1).tolist()
        return {"before": before, "after": after} if after > before * (1 - self.least) else None


@register
@dataclasses.dataclass(frozen=True)
class Mixing(Trigger):
    """A grown model is as good as one that was never small: its mean loss has come close to the other's.

    **Fields**

    - `whole`: the losses of the other run, from the step of the growth on.
    - `window`: the number of steps of each mean.
    - `close`: how far above the other's it may be, as a share.

    It never fires after the last of these losses.

    Bu et al., "Scaling Depth Capacity via Zero/One-layer Model Expansion", 2026.

    **Example**

        Stage(share=0.5, grow=gj.stack(layers=12), until=Mixing(whole, window=50, close=0.005))
    """

    whole: tuple[float, ...]
    window: Size
    close: Annotated[float, at_least(0)]
    card: ClassVar[Card] = Card(papers=(FEW_LAYERS,))

    def __post_init__(self):
        check(self, PlanError, "this trigger cannot be used:", self._faults)

    def _faults(self) -> Iterator[str]:
        if len(self.whole) < self.window:
            yield f"whole: expected at least the {self.window} losses of a window, got {len(self.whole)}"

    @property
    def reads(self) -> int:  # type: ignore[override]
        """One window."""
        return self.window

    def fires(self, losses: Sequence[float], done: int) -> Mapping[str, float] | None:
        """The mean losses of both models over the same steps, if they are close."""
        if len(losses) < self.window or done > len(self.whole):
            return None
        grown = float(np.mean(losses[-self.window :]))
        whole = float(np.mean(self.whole[done - self.window : done]))
        return {"grown": grown, "whole": whole} if grown <= whole * (1 + self.close) else None


def plateau(losses: Sequence[float], *, window: int, least: float) -> int | None:
    """The first step at which a loss has stopped to fall (`Plateau`); None if it has not.

    Losses are those of every step, oldest first. It shows on a run that is over where a stage with this
    trigger would have ended.

    **Example**

        losses = [row["loss"] for row in read_journal(run) if row["kind"] == "step"]
        plateau(losses, window=200, least=0.005)
    """
    return _first_firing(Plateau(window, least), _losses_of(losses=losses)[0])


def mixing(
    grown: Sequence[float], whole: Sequence[float], *, window: int, close: float
) -> int | None:
    """The number of steps after a growth until a grown model is as good as one that was never small.

    Both losses are of the same steps, from the growth on, at a constant rate (`Mixing`). None if the
    grown model's stays above. A pilot's mixing time t, which depends on the data more than on the size,
    says when to grow a long run: at its end minus t and the decay.

    **Example**

        mixing(losses_of("runs/grown")[start:], losses_of("runs/whole")[start:], window=50, close=0.005)
    """
    ours, theirs = _losses_of(grown=grown, whole=whole)
    if len(ours) != len(theirs):
        raise PlanError(
            f"grown, whole: expected losses of the same steps, got {len(ours)} and {len(theirs)}"
        )
    return _first_firing(Mixing(theirs, window, close), ours)


def _losses_of(**losses: Any) -> list[tuple[float, ...]]:
    """The losses of each argument as numbers; raises `PlanError`."""
    read, faults = [], []
    for name, several in losses.items():
        try:
            numbers = np.asarray(several, float)
        except (TypeError, ValueError):
            numbers = np.zeros(())
        if numbers.ndim != 1:
            faults.append(f"{name}: expected the loss of every step, got {short(several)}")
        read.append(tuple(numbers.ravel().tolist()))
    raise_all(PlanError, "these are no losses of steps:", faults)
    return read


def _first_firing(trigger: Trigger, losses: Sequence[float]) -> int | None:
    """The number of losses after which a trigger fires for the first time; None if it never does."""
    for done in range(1, len(losses) + 1):
        if trigger.fires(losses[max(done - trigger.reads, 0) : done], done) is not None:
            return done
    return None
