"""A plan's dry run: the sizes, cost, learning rates and memory of every stage, before it starts.

Everything is worked out from shapes. No array is made and nothing is compiled, so that a plan for a pod
can be checked on a laptop; `growjax.forecast.pod` compiles it for a pod.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from growjax.cost import parameters
from growjax.errors import LayoutError, PlanError, raise_all
from growjax.forecast.residuals import Residuals, stored
from growjax.forecast.xla import xla_training_flops
from growjax.optim import Parts
from growjax.parallel import per_device_bytes, row_axes, row_parts, unsplit
from growjax.plan.plan import Plan
from growjax.plan.stages import Span, Work
from growjax.plan.steps import step_flops
from growjax.programs.carried import carry_faults
from growjax.programs.step import Programs
from growjax.subnet import Coins


# The largest relative difference between XLA's count of FLOPs and ours that is no fault
_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class StageFacts:
    """One stage of a dry run.

    **Fields**

    - `grows`, `exactness`: the operator and its promise; None if the stage does not grow.
    - `parts`: the sub-networks that it trains, and the second gradients that it computes.
    - `selects`: the rule that chooses its batches; None if it trains on every batch as it is read.
    - `cost`: the cost, in the clock's unit.
    - `flops_per_token`, `xla_flops_per_token`: training FLOPs, counted by `growjax.cost` and by XLA.
    - `saved`: 1 - its FLOPs / those of training the last stage's whole model on the same tokens.
    - `rate`: the learning rates of its first and last step.
    - `parameter_bytes`, `optimizer_bytes`: bytes on the fullest device; None if the layout makes no mesh.
    - `growing_bytes`: bytes of the states before and after its growth, both in memory for a moment.
    - `kept_bytes`, `host_bytes`: bytes that a step stores for the gradient, for one device: on it, and in
      the host's memory; None unless the layout uses that memory.
    - `unsplit`: the parameters that every device holds whole although the layout splits parameters.
    - `fit_flops`, `fit_tokens`: those of the fit of its growth, which is part of `cost`, but not of
      `flops` and `tokens`.
    - `until`: the trigger that may end it earlier, or None; numbers are those of the longest stage.
    """

    index: int
    name: str
    grows: str | None
    exactness: str | None
    parts: tuple[str, ...]
    selects: str | None
    sizes: dict[str, int]
    parameters: int
    batch: int
    steps: int
    tokens: int
    flops: int
    cost: float
    flops_per_token: float
    xla_flops_per_token: float
    saved: float
    rate: tuple[float, float]
    parameter_bytes: int | None
    optimizer_bytes: int | None
    growing_bytes: int | None
    unsplit: tuple[str, ...]
    fit_flops: int = 0
    fit_tokens: int = 0
    until: str | None = None
    kept_bytes: int | None = None
    host_bytes: int | None = None

    @property
    def xla_ratio(self) -> float:
        """XLA's count of FLOPs over ours."""
        return self.xla_flops_per_token / self.flops_per_token


@dataclasses.dataclass(frozen=True)
class DryRun:
    """The result of `dry_run`; it prints as a table.

    - `devices`: the number of devices that it was worked out for.
    - `mesh`: the size of each mesh axis; None if the layout does not fit the devices.
    - `saved`: the share of FLOPs saved against training the last stage's whole model on all tokens.
    - `unit`: the clock's unit, in which the costs of stages are.
    - `refusals`: the reasons why the plan cannot run as it is; empty if it can.
    - `start`: the folder of the model that it starts from, or None.
    """

    plan: str
    devices: int
    mesh: dict[str, int] | None
    stages: tuple[StageFacts, ...]
    saved: float
    unit: str
    refusals: tuple[str, ...]
    start: str | None = None

    @property
    def flops(self) -> int:
        """Training FLOPs of the whole run."""
        return sum(stage.flops + stage.fit_flops for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """The fields as numbers, strings, lists and dicts, for JSON."""
        return dataclasses.asdict(self) | {"flops": self.flops}

    def check(self) -> None:
        """Raise `PlanError` that lists all refusals; do nothing without any."""
        raise_all(PlanError, f"plan {self.plan!r} cannot be run like this:", self.refusals)

    def __rich__(self) -> RenderableType:
        mesh = self.mesh and " x ".join(f"{name}={n}" for name, n in self.mesh.items())
        table = Table(
            title=Text(f"{self.plan}: {self.flops:.4g} FLOPs, {self.saved:.1%} saved"),
            caption=f"{self.devices} device{'s' * (self.devices != 1)}: {mesh or 'cannot be laid out'}",
        )
        table.add_column("stage")
        for stage in self.stages:
            table.add_column(Text(f"{stage.index} {stage.name}"), justify="right")
        for name, cells in _rows(self.stages, self.unit):
            table.add_row(*map(Text, [name, *cells]))
        notes = [] if self.start is None else [f"starts from the model in {self.start}"]
        notes += [
            f"stage {stage.index}: {stage.grows} is fitted first: {stage.fit_flops:.4g} FLOPs"
            + (f", {stage.fit_tokens:,} tokens" if stage.fit_tokens else "")
            for stage in self.stages
            if stage.fit_flops
        ]
        notes += [
            f"stage {stage.index}: at most this long: {stage.until} may end it, which changes the rest"
            for stage in self.stages
            if stage.until
        ]
        notes += [
            f"stage {stage.index}: every device holds all of {', '.join(stage.unsplit)}"
            for stage in self.stages
            if stage.unsplit
        ]
        lines = [*notes, *(f"refused: {reason}" for reason in self.refusals)]
        # As `Text`: names of plans, stages and folders may hold brackets, which Rich reads as markup
        return Group(table, *map(Text, lines))


def dry_run(plan: Plan, *, devices: int | None = None) -> DryRun:
    """Work out the sizes, cost and memory of a plan from shapes alone.

    `devices` is the number of devices to lay it out on; by default the fewest that its layout can use.

    **Example**

        print(dry_run(plan, devices=256).stages[-1].optimizer_bytes)
    """
    layout = plan.layout
    if devices is not None and devices < 1:
        raise LayoutError(f"devices: expected a positive number, got {devices}")
    devices = devices or max(layout.data, 1) * layout.shared
    mesh, refusals = None, []
    try:
        mesh = layout.outline(devices)
    except LayoutError as error:
        refusals.append(str(error))
    else:
        refusals += _split_faults(plan, mesh)
    full = [_full_flops(plan, span) for span in plan.spans]
    stages = tuple(_facts(plan, span, n, mesh) for span, n in zip(plan.spans, full, strict=True))
    refusals += [*_disagreements(stages), *carry_faults(plan)]
    if plan.start is not None:
        # Reading checkpoints imports Orbax, which takes a second
        from growjax.runs.start import start_faults

        refusals += start_faults(plan)
    if plan.fork is not None:
        from growjax.runs.fork import fork_errors

        refusals += fork_errors(plan)
    saved = 1 - plan.flops / sum(full)
    start = plan.start and plan.start.folder
    shape = mesh and dict(mesh.shape)
    unit = plan.clock.unit
    return DryRun(plan.name, devices, shape, stages, saved, unit, tuple(refusals), start)


def _facts(plan: Plan, span: Span, full: int, mesh: Any) -> StageFacts:
    """The facts of a stage; `full` are the FLOPs of `_full_flops`."""
    grow, flops = span.stage.grow, sum(span.flops)
    tokens = span.steps * span.step_tokens
    # The cost spent in the middle of the first and of the last step, where training takes their rates
    end = span.spent + sum(span.costs)
    first, last = span.spent + span.costs[0] / 2, end - span.costs[-1] / 2
    state = growing = None
    kept: list[Residuals] = []
    if mesh is not None:
        if plan.layout.uses_host:
            works = dict.fromkeys(work for _, work in span.programs)
            kept = [stored(plan, span, work.part, mesh) for work in works]
        state = _state_bytes(plan, span.model, mesh)
        if grow is not None:
            growing = sum(state) + sum(_state_bytes(plan, plan.model_before(span.index), mesh))
    return StageFacts(
        index=span.index,
        name=span.stage.name,
        grows=None if grow is None else str(grow),
        exactness=None if grow is None else grow.exactness,
        parts=tuple(map(work_label, dict.fromkeys(w for _, w in span.programs if w != Work()))),
        selects=None if span.stage.select is None else label(span.stage.select),
        sizes=span.sizes,
        parameters=parameters(span.model),
        batch=span.batch,
        steps=span.steps,
        tokens=tokens,
        flops=flops,
        cost=(span.charged + sum(span.costs)) / plan.clock.per_unit,
        flops_per_token=flops / tokens,
        xla_flops_per_token=_xla_flops(plan, span) / tokens,
        saved=1 - flops / full,
        rate=(plan.learning_rate(first), plan.learning_rate(last)),
        parameter_bytes=state and state[0],
        optimizer_bytes=state and state[1],
        growing_bytes=growing,
        unsplit=() if mesh is None else tuple(unsplit(span.model, mesh)),
        fit_flops=span.fit_flops,
        fit_tokens=span.fit_tokens,
        until=None if span.stage.until is None or span.stage.ended else str(span.stage.until),
        kept_bytes=max((use.device for use in kept), default=None),
        host_bytes=max((use.host for use in kept), default=None),
    )


def _full_flops(plan: Plan, span: Span) -> int:
    """Training FLOPs of a stage if its steps trained the whole model of the last stage."""
    last = plan.spans[-1].model
    return span.steps * step_flops(last, span.objective, span.batch, loss=plan.loss)


def _xla_flops(plan: Plan, span: Span) -> float:
    """XLA's count of the training FLOPs of a stage.

    XLA counts one sequence of each program; the program's steps are scaled by XLA's count over ours.
    """
    total = 0.0
    for work in dict.fromkeys(span.works):
        ours = sum(n for w, n in zip(span.works, span.flops, strict=True) if w == work)
        # A program with coins holds all layers, so compare the counts of the whole model
        part = None if isinstance(work.part, Coins) and work.part.tosses else work.part
        xla = xla_training_flops(span.model, span.objective, part, loss=plan.loss)
        total += ours * xla / step_flops(span.model, span.objective, 1, part, loss=plan.loss)
    return total


def _state_bytes(plan: Plan, model: Any, mesh: Any) -> tuple[int, int]:
    """Bytes on the fullest device: those of the model, and those of the optimizer state."""
    programs = Programs.of(plan, mesh)
    shapes = programs.shapes(model)
    where = programs.shardings(shapes)
    trained = per_device_bytes(shapes.trained, where.trained)
    rest = per_device_bytes(shapes.rest, where.rest)
    return trained + rest, per_device_bytes(shapes.optimizer, where.optimizer)


def _split_faults(plan: Plan, mesh: Any) -> Iterator[str]:
    """Stages whose batch, in `accumulate` parts, cannot be split over the devices."""
    ways, axes = row_parts(mesh), row_axes(mesh)
    for span in plan.spans:
        rows, parts = span.batch // plan.accumulate, plan.accumulate
        if rows % ways:
            # The next multiples below (unless it is 0) and above
            multiple = parts * ways
            low = span.batch // multiple * multiple
            high = -(-span.batch // multiple) * multiple
            choices = " or ".join(str(n) for n in (low, high) if n)
            yield (
                f"stage {span.index} {span.stage.name!r}: batch: {rows} sequences at a time cannot be "
                f"split over {' x '.join(f'{a}={mesh.shape[a]}' for a in axes)} = {ways} devices"
                f"{f' in {parts} parts' if parts > 1 else ''}; take {choices}"
            )


def _disagreements(stages: Sequence[StageFacts]) -> Iterator[str]:
    """Stages whose FLOPs XLA counts otherwise."""
    for stage in stages:
        if abs(stage.xla_ratio - 1) > _TOLERANCE:
            yield (
                f"stage {stage.index} {stage.name!r}: {stage.flops_per_token:.6g} FLOPs a token are "
                f"counted, and XLA counts {stage.xla_flops_per_token:.6g}; they should agree to "
                f"{_TOLERANCE:.0%}. Either count, or the model's code, is wrong, and so would be every "
                "cost. Compare with a stage that agrees"
            )


# The printed table -------------------------------------------------------------------------------


def _rows(stages: Sequence[StageFacts], unit: str) -> Iterator[tuple[str, list[str]]]:
    """The rows of the table: a name, and a cell for each stage; costs are in `unit`."""

    def row(name, cell):
        return name, [cell(stage) for stage in stages]

    yield row("grows", lambda s: s.grows or "-")
    yield row("promises", lambda s: s.exactness or "-")
    yield row("trains", lambda s: "\n".join(s.parts) or "all")
    if any(stage.selects for stage in stages):
        yield row("selects", lambda s: s.selects or "-")
    for axis in dict.fromkeys(axis for stage in stages for axis in stage.sizes):
        yield row(f"  {axis}", lambda s, axis=axis: str(s.sizes.get(axis, "-")))
    yield row("parameters", lambda s: f"{s.parameters:,}")
    yield row("batch", lambda s: str(s.batch))
    yield row("steps", lambda s: f"{s.steps:,}")
    yield row("tokens", lambda s: f"{s.tokens:,}")
    yield row("FLOPs / token", lambda s: f"{s.flops_per_token:.5g}")
    yield row("  as XLA counts", lambda s: f"{s.xla_flops_per_token:.5g}")
    yield row("  ratio", lambda s: f"{s.xla_ratio:.4f}")
    yield row("FLOPs", lambda s: f"{s.flops:.4g}")
    if any(stage.cost != stage.flops for stage in stages):
        yield row(f"cost in {unit}", lambda s: f"{s.cost:.4g}")
    yield row("saved", lambda s: f"{s.saved:.1%}")
    yield row("learning rate", lambda s: f"{s.rate[0]:.3g} to {s.rate[1]:.3g}")
    if any(stage.parameter_bytes is not None for stage in stages):
        yield row("model / device", lambda s: amount(s.parameter_bytes))
        yield row("optimizer / device", lambda s: amount(s.optimizer_bytes))
        yield row("while growing", lambda s: amount(s.growing_bytes))
    if any(stage.host_bytes is not None for stage in stages):
        yield row("for the gradient / device", lambda s: amount(s.kept_bytes))
        yield row("  in the host's memory", lambda s: amount(s.host_bytes))


def work_label(work: Work) -> str:
    """The work of a step in words: `RandomPath(length=3), curvature`."""
    words = [] if work.part is None else [label(work.part)]
    words += [name for name in ("curvature", "freeze") if getattr(work, name)]
    if work.parts is not None:
        alone = {Parts(old=0.0): "new", Parts(new=0.0): "old"}
        words.append(alone.get(work.parts) or label(work.parts))
    return ", ".join(words)


def label(part: Any) -> str:
    """A sub-network or selector with its fields that are not at their default: `RandomPath(length=3)`."""
    fields = {f.name: (getattr(part, f.name), f.default) for f in dataclasses.fields(part)}
    changed = [f"{name}={value}" for name, (value, default) in fields.items() if value != default]
    return f"{type(part).__name__}({', '.join(changed)})"


def amount(n: float | None) -> str:
    """A number of bytes in a readable unit: `1.5 GiB`; "-" for None."""
    if n is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
