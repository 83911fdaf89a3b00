"""The ledger: for each shape, a search over rate, batch and warm-up until no neighbour is better.

A trial is a whole run at the shape's smallest budget, its rate decayed at its end, with a seed of its
own. From the best setting so far the neighbours are tried, one coordinate after the other: twice and half
of the rate, of the batch, of the warm-up. A lower loss moves the search there. It ends where all
neighbours are higher, so that every coordinate is bracketed; only the batch and the warm-up have bounds.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

from experiments.frontier.design import WORKLOAD, Design, Setting, Settings, Shape, fixed_name
from experiments.study import Line


# Smaller batches leave the machine idle, and longer warm-ups leave no time at the peak
BATCHES = (2, 256)
WARMUPS = (0.025, 0.4)


def trial_name(shape: Shape, setting: Setting) -> str:
    """The arm of a trial."""
    return f"{fixed_name(shape)} at {setting}"


def losses_of(lines: Iterable[Line]) -> dict[str, float]:
    """The loss of every trial by its arm; infinite for one that diverged."""
    return {
        line["arm"]: math.inf if line["score"] is None else line["score"]
        for line in lines
        if line["workload"] == WORKLOAD and line["budget"] == "tuning"
    }


def neighbours(setting: Setting) -> Iterator[Setting]:
    """The settings next to one, coordinate after coordinate; those outside the bounds left out."""
    for factor in (2, 0.5):
        yield dataclasses.replace(setting, rate=setting.rate * factor)
    for batch in (setting.batch * 2, setting.batch // 2):
        if BATCHES[0] <= batch <= BATCHES[1]:
            yield dataclasses.replace(setting, batch=batch)
    for warmup in (setting.warmup * 2, setting.warmup / 2):
        if WARMUPS[0] <= warmup <= WARMUPS[1]:
            yield dataclasses.replace(setting, warmup=warmup)


def search(
    design: Design, shape: Shape, losses: Mapping[str, float]
) -> tuple[Setting, Setting | None]:
    """The best setting of a shape so far, and the trial that is missing; None if it is settled."""
    best = design.start
    if trial_name(shape, best) not in losses:
        return best, best
    while True:
        loss = losses[trial_name(shape, best)]
        for setting in neighbours(best):
            name = trial_name(shape, setting)
            if name not in losses:
                return best, setting
            if losses[name] < loss:
                # The loss falls with every move, so that the search ends
                best = setting
                break
        else:
            return best, None


def settled(design: Design, lines: Iterable[Line]) -> Settings:
    """The tuned setting of each shape whose search is over, or those that the design was given."""
    if design.given:
        return dict(design.given)
    losses = losses_of(lines)
    searches = {shape: search(design, shape, losses) for shape in design.shapes}
    return {shape: best for shape, (best, missing) in searches.items() if missing is None}
