"""The timeline of a plan: its stages, and the parts of the stages that run a schedule of paths."""

from collections.abc import Iterator
from typing import NamedTuple

from growjax.plan.stages import Span
from growjax.subnet import PathSchedule


class Era(NamedTuple):
    """A named part of a run: from step `start` up to, and without, step `stop`.

    `flops` are the training FLOPs of the run at its start and at its end, `spent` the costs, in the
    clock's smallest unit.
    """

    label: str
    start: int
    stop: int
    flops: tuple[int, int]
    spent: tuple[int, int]


def timeline(spans: tuple[Span, ...], *, paths: bool = False) -> Iterator[Era]:
    """The stages in their order; with `paths`, each length of a path schedule by itself."""
    flops = spent = 0
    for span in spans:
        first, flops, spent = 0, flops + span.fit_flops, spent + span.charged
        for label, stop in _parts(span, paths):
            flops_before, spent_before = flops, spent
            flops += sum(span.flops[first:stop])
            spent += sum(span.costs[first:stop])
            yield Era(
                label,
                span.start + first,
                span.start + stop,
                (flops_before, flops),
                (spent_before, spent),
            )
            first = stop


def _parts(span: Span, paths: bool) -> Iterator[tuple[str, int]]:
    """The parts of a stage: the label of each, and the step of the stage at which it stops."""
    schedule = span.stage.subnet
    if not (paths and isinstance(schedule, PathSchedule)):
        yield span.stage.name or f"stage {span.index}", span.steps
        return
    for part in schedule.stages:
        whole = part.path.length >= schedule.layers
        yield "whole model" if whole else f"path {part.path.length}", part.stop
