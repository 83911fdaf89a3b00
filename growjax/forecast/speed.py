"""The time of a plan's steps on a kind of device: from a compiled program's cycles, or by roofline.

The roofline is a bound: a device multiplies at its peak and, at the same time, reads and writes its
memory at its full rate. The optimizer's update, which multiplies nothing, comes after that. A real step
takes longer.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from growjax.errors import LayoutError
from growjax.forecast.residuals import residual_bytes
from growjax.parallel import per_device_bytes, row_parts
from growjax.plan.plan import Plan
from growjax.plan.stages import Span, Work
from growjax.programs.step import Programs


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of device, by its maker's figures.

    - `peak`: FLOPs a second of dense products in bfloat16.
    - `bandwidth`: bytes a second of its memory.
    - `memory`: bytes.
    - `clock`, `cores`: cycles a second, and the cores that share a program; for TPUs.
    """

    peak: float
    bandwidth: float
    memory: int
    clock: float = 0.0
    cores: int = 1


DEVICES = {
    "v5e": Device(197e12, 819e9, 16 << 30, clock=1.5e9),
    "v5p": Device(459e12, 2765e9, 95 << 30, clock=1.75e9, cores=2),
    "v6e": Device(918e12, 1640e9, 32 << 30, clock=1.75e9),
    "a100": Device(312e12, 2039e9, 80 << 30),
    "h100": Device(989e12, 3350e9, 80 << 30),
    "h200": Device(989e12, 4800e9, 141 << 30),
    "b200": Device(2250e12, 8000e9, 180 << 30),
}


@dataclasses.dataclass(frozen=True)
class Pace:
    """How fast a stage trains, all devices together; evaluation, saving and growth are not in it.

    - `step`: seconds of a step, the mean over the stage.
    - `mfu`: the model's training FLOPs (`growjax.cost`: recomputed ones are not counted) over those that
      the devices could compute meanwhile.
    """

    stage: int
    step: float
    tokens_per_second: float
    hours: float
    mfu: float


def device_of(kind: str) -> Device:
    """A device by its name, such as "v5e" or "h100"; raises `LayoutError` for others."""
    if kind not in DEVICES:
        raise LayoutError(f"kind: expected one of {', '.join(DEVICES)}, got {kind!r}")
    return DEVICES[kind]


def pace_of(span: Span, seconds: Mapping[Work, float], device: Device, devices: int) -> Pace:
    """The pace of a stage from the seconds of each of its programs."""
    total = sum(seconds[work] for work in span.works)
    tokens = span.steps * span.step_tokens
    return Pace(
        stage=span.index,
        step=total / span.steps,
        tokens_per_second=tokens / total,
        hours=total / 3600,
        mfu=sum(span.flops) / (total * devices * device.peak),
    )


def roofline(plan: Plan, kind: str, devices: int) -> tuple[Pace, ...]:
    """A bound on the pace of every stage on a number of devices of one kind.

    Raises `LayoutError` for a kind that is not known, and a layout that does not make so many devices.

    **Example**

        roofline(plan, "v5e", 16)[-1].hours
    """
    device, mesh = device_of(kind), plan.layout.outline(devices)
    programs = Programs.of(plan, mesh)
    ways = row_parts(mesh)
    paces = []
    for span in plan.spans:
        shapes = programs.shapes(span.model)
        where = programs.shardings(shapes)
        state = per_device_bytes(shapes, where)
        # The optimizer reads the state and its gradient, and writes the state
        update = 2 * state + per_device_bytes(shapes.trained, where.trained)
        seconds = {
            work: _bound(plan, span, work, device, devices, span.batch / ways)
            + update / device.bandwidth
            for work in dict.fromkeys(span.works)
        }
        paces.append(pace_of(span, seconds, device, devices))
    return tuple(paces)


def _bound(plan: Plan, span: Span, work: Work, device: Device, devices: int, rows: float) -> float:
    """The least seconds of the forward and backward passes of one step."""
    flops = next(n for w, n in zip(span.works, span.flops, strict=True) if w == work)
    # What is stored for the backward pass is written once and read once
    moved = 2 * rows * residual_bytes(span, work.part, plan.loss, plan.layout)
    return max(flops / devices / device.peak, moved / device.bandwidth)


def pace_table(title: str, paces: Sequence[Pace], names: Sequence[str]) -> Table:
    """The paces of stages as a table, with their hours below it; `names` are those of all stages."""
    hours = f"{sum(pace.hours for pace in paces):.3g} hours of training"
    of_stage = {pace.stage: pace for pace in paces}
    unknown = [str(stage) for stage in range(len(names)) if stage not in of_stage]
    if unknown:
        hours += f", without stage{'s' * (len(unknown) > 1)} {', '.join(unknown)}"
    table = Table(title=Text(title), caption=hours, box=box.SIMPLE_HEAD)
    table.add_column("stage", overflow="fold")
    for name in ("seconds / step", "tokens / s", "hours", "MFU"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage, name in enumerate(names):
        pace, numbers = of_stage.get(stage), ["unknown"] * 4
        if pace is not None:
            numbers = [
                f"{pace.step:.3g}",
                f"{pace.tokens_per_second:,.0f}",
                f"{pace.hours:.3g}",
                f"{pace.mfu:.1%}",
            ]
        table.add_row(Text(f"{stage} {name}"), *numbers)
    return table
