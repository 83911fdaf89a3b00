"""What happens when in a plan: its stages, and the parts of those that run a schedule of paths."""

from collections.abc import Iterator
from typing import NamedTuple

from growjax.plan.stages import Span
from growjax.subnet import PathSchedule


class Era(NamedTuple):
    """A part of a run with a name: from step `start` up to `stop`.

    `flops` (training FLOPs) and `spent` (the clock's whole numbers) are what the run has used at both.
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
        first = 0
        for label, stop in _parts(span, paths):
            before = flops, spent
            flops += sum(span.flops[first:stop])
            spent += sum(span.costs[first:stop])
            yield Era(
                label, span.start + first, span.start + stop, (before[0], flops), (before[1], spent)
            )
            first = stop


def _parts(span: Span, paths: bool) -> Iterator[tuple[str, int]]:
    """Names and last steps of what a stage consists of."""
    schedule = span.stage.subnet
    if not (paths and isinstance(schedule, PathSchedule)):
        yield span.stage.name or f"stage {span.index}", span.steps
        return
    for part in schedule.stages:
        whole = part.path.length >= schedule.layers
        yield "whole model" if whole else f"path {part.path.length}", part.stop
