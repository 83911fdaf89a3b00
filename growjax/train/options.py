"""The options of running a plan, as a value."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from growjax.errors import TrainingError, raise_all
from growjax.train.judge import Hook


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of running a plan. None of them changes the trained model.

    **Fields**

    - `evaluate_every`: the cost between two held-out evaluations, in the smallest unit of the plan's
      clock (`plan.cost / 20`, say). The last step is always followed by one.
    - `evaluate_at`: numbers of steps after which there is a held-out evaluation besides.
    - `held_out`: the number of held-out windows in each of these evaluations, always the same ones.
    - `held_out_end`: the number of windows that the finished model is evaluated on (or all, if the text
      has fewer); the losses are in `End.held_out` and in the run's folder. 0 for none.
    - `hooks`: functions `(model, step) -> {name: number}`, called after each held-out evaluation; the
      numbers become the step's `scores`. The model is the one to evaluate (the average, if the optimizer
      averages), with its gates at their current level. Its arrays belong to the run, which deletes them
      in the next step. The time of hooks is not part of the run's cost or seconds.
    - `save_every`: steps between checkpoints, besides those before and after every growth.
    - `save_minutes`: minutes between checkpoints; None for none by time.
    - `save_at`: steps before which a checkpoint is written that stays, for runs that fork from it.
    - `keep_last`, `keep_every`: the number of latest checkpoints that stay, and the steps at whose
      multiples others stay.
    - `fall_back`: set a damaged checkpoint aside and go on from the one before it; by default it is an
      error.
    - `background`: compile the next stage while this one trains.
    - `profile`: the first and the last step of a profile, which is written into the run's folder.

    Raises `TrainingError` that lists every fault.
    """

    evaluate_every: float = math.inf
    evaluate_at: Sequence[int] = ()
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
        raise_all(TrainingError, "these options are not valid:", _faults(self))


def _faults(options: Options) -> Iterator[str]:
    if not options.evaluate_every > 0:
        yield f"evaluate_every: expected a positive number, got {options.evaluate_every!r}"
    for name, least, optional in (
        ("held_out", 1, False),
        ("held_out_end", 0, False),
        ("save_every", 1, True),
        ("keep_last", 1, False),
        ("keep_every", 1, True),
    ):
        value = getattr(options, name)
        if value is None and optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            yield f"{name}: expected a whole number of {least} or more, got {value!r}"
    for name in ("evaluate_at", "save_at"):
        for step in getattr(options, name):
            if not isinstance(step, int) or isinstance(step, bool) or step < 0:
                yield f"{name}: expected whole numbers of 0 or more, got {step!r}"
    if options.save_minutes is not None and not options.save_minutes > 0:
        yield f"save_minutes: expected a positive number or None, got {options.save_minutes!r}"
