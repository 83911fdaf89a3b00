"""How a plan is run, as a value."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from growjax.errors import TrainingError, raise_all
from growjax.train.judge import Hook


@dataclasses.dataclass(frozen=True)
class Options:
    """How a plan is run. None of it changes what is computed.

    **Fields**

    - `evaluate_every`: what is spent between two held-out evaluations, in the whole numbers of the
      plan's clock (a twentieth of `plan.cost`, say); there is one after the last step anyway.
    - `held_out`: windows of held-out text that each of them is taken over, always the same ones.
    - `held_out_end`: windows that the finished model is evaluated on (or all that there are); their
      losses are in `End.held_out` and in the run's folder. 0 leaves it out.
    - `hooks`: functions `(model, step) -> {name: number}`, called after each held-out evaluation; the
      numbers become the step's `scores`. The model is the one that is judged (the average, if the
      optimizer averages), its gates as open as they are; its arrays are the run's own, and gone after the
      next step. Nobody is charged for it, in cost or in seconds.
    - `save_every`: steps between checkpoints, besides those on both sides of every growth; and
    - `save_minutes`: minutes between them. None saves by steps alone.
    - `save_at`: steps before which a checkpoint is written, and kept: what other runs fork from.
    - `keep_last`, `keep_every`: how many of the latest checkpoints stay, and which others.
    - `fall_back`: set a damaged checkpoint aside and go on from the one before it, instead of an error.
    - `background`: compile the next stage while this one trains.
    - `profile`: first and last step of which a profile is written, into the run's folder.

    Raises `TrainingError` that lists every fault.
    """

    evaluate_every: float = math.inf
    held_out: int = 256
    held_out_end: int = 4096
    hooks: Sequence[Hook] = ()
    save_every: int | None = None
    save_minutes: float | None = 10.0
    save_at: Sequence[int] = ()
    keep_last: int = 2
    keep_every: int | None = None
    fall_back: bool = False
    background: bool = True
    profile: tuple[int, int] | None = None

    def __post_init__(self):
        raise_all(TrainingError, "these options make no sense:", _faults(self))


def _faults(options: Options) -> Iterator[str]:
    if not options.evaluate_every > 0:
        yield f"evaluate_every: expected a positive number, got {options.evaluate_every!r}"
    for name, least, optional in (
        ("held_out", 1, False),
        ("held_out_end", 0, False),
        ("save_every", 1, True),
        ("keep_last", 0, False),
        ("keep_every", 1, True),
    ):
        value = getattr(options, name)
        if value is None and optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            yield f"{name}: expected a whole number of {least} or more, got {value!r}"
    for step in options.save_at:
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            yield f"save_at: expected whole numbers of 0 or more, got {step!r}"
    if options.save_minutes is not None and not options.save_minutes > 0:
        yield f"save_minutes: expected a positive number or None, got {options.save_minutes!r}"
