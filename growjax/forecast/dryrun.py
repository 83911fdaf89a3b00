"""A plan's dry run: what every stage trains, what it costs and where it will lie, before it starts.

Everything is worked out from shapes. No array is made and nothing is compiled, so that a plan for a pod
can be read on a laptop; `growjax.forecast.pod` goes on to compile it for one.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from growjax.cost import parameters
from growjax.errors import LayoutError, PlanError, raise_all
from growjax.forecast.xla import xla_training_flops
from growjax.parallel import per_device_bytes, unsplit
from growjax.plan.plan import Plan
from growjax.plan.stages import Span, Work, step_flops
from growjax.programs.step import Programs
from growjax.subnet import Coins


# How far XLA's count of FLOPs may be from ours
_AGREES = 0.02


@dataclasses.dataclass(frozen=True)
class StageFacts:
    """One stage of a dry run.

    **Fields**

    - `grows`, `exactness`: what it grows by and what that promises; None if it does not grow.
    - `parts`: the sub-networks that it trains, and second gradients that it takes.
    - `selects`: the rule that chooses its batches; None if it trains on all that it reads.
    - `cost`: what the clock charges, in its unit.
    - `flops_per_token`, `xla_flops_per_token`: of training, by `growjax.cost` and by XLA.
    - `saved`: the share of its cost saved against training the last stage's whole model on its tokens.
    - `parameter_bytes`, `optimizer_bytes`: of the fullest device; None if the layout makes no mesh.
    - `growing_bytes`: of the states before and after its growth, which it holds both for a moment.
    - `unsplit`: the parameters that every device holds whole although it shares the rest.
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

    @property
    def xla_ratio(self) -> float:
        """XLA's count of FLOPs over ours."""
        return self.xla_flops_per_token / self.flops_per_token


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What `dry_run` found; it prints as a table.

    `start` is the folder of the model that it starts from, if there is one;
    `devices` is what it was worked out for and `mesh` how many of them each axis has, if they can be
    laid out so. `refusals` says why the plan cannot be run as it is, if it cannot.
    """

    plan: str
    devices: int
    mesh: dict[str, int] | None
    stages: tuple[StageFacts, ...]
    saved: float
    refusals: tuple[str, ...]
    start: str | None = None

    @property
    def flops(self) -> int:
        """Training FLOPs of the whole run."""
        return sum(stage.flops for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """As numbers, strings, lists and dicts."""
        return dataclasses.asdict(self) | {"flops": self.flops}

    def check(self) -> None:
        """Raise `PlanError` with every refusal, if there is one."""
        raise_all(PlanError, f"plan {self.plan!r} cannot be run like this:", self.refusals)

    def __rich__(self) -> RenderableType:
        mesh = self.mesh and " x ".join(f"{name}={n}" for name, n in self.mesh.items())
        table = Table(
            title=Text(f"{self.plan}: {self.flops:.4g} FLOPs, {self.saved:.1%} saved"),
            caption=f"{self.devices} devices: {mesh or 'cannot be laid out'}",
        )
        table.add_column("stage")
        for stage in self.stages:
            table.add_column(Text(f"{stage.index} {stage.name}"), justify="right")
        for name, cells in _rows(self.stages):
            table.add_row(name, *map(Text, cells))
        notes = [] if self.start is None else [f"starts from the model in {self.start}"]
        notes += [
            f"stage {stage.index}: every device holds all of {', '.join(stage.unsplit)}"
            for stage in self.stages
            if stage.unsplit
        ]
        lines = [*notes, *(f"refused: {reason}" for reason in self.refusals)]
        # Names of plans, stages and folders may hold brackets, and are no markup
        return Group(table, *map(Text, lines))


def dry_run(plan: Plan, *, devices: int | None = None) -> DryRun:
    """Work out what a plan trains, costs and needs, from shapes alone.

    `devices` is how many to lay it out on; by default the fewest that its layout can use.

    **Example**

        print(dry_run(plan, devices=256).stages[-1].optimizer_bytes)
    """
    layout = plan.layout
    devices = devices or max(layout.data, 1) * layout.fsdp * layout.tensor
    mesh, refusals = None, []
    try:
        mesh = layout.outline(devices)
    except LayoutError as error:
        refusals.append(str(error))
    else:
        refusals += _split_faults(plan, mesh)
    whole = [_whole_flops(plan, span) for span in plan.spans]
    lasts = zip(plan.spans, whole, strict=True)
    stages = tuple(_facts(plan, span, cost, mesh) for span, cost in lasts)
    refusals += _disagreements(stages)
    if plan.start is not None:
        # Checkpoints bring Orbax with them, which takes a second
        from growjax.runs.start import start_faults

        refusals += start_faults(plan)
    if plan.fork is not None:
        from growjax.runs.fork import fork_errors

        refusals += fork_errors(plan)
    saved = 1 - plan.flops / sum(whole)
    start = plan.start and plan.start.folder
    shape = mesh and dict(mesh.shape)
    return DryRun(plan.name, devices, shape, stages, saved, tuple(refusals), start)


def _facts(plan: Plan, span: Span, whole: int, mesh: Any) -> StageFacts:
    grow, flops = span.stage.grow, sum(span.flops)
    tokens = span.steps * span.step_tokens
    # As the loop does: a step's rate is that of its middle
    last = span.spent + sum(span.costs)
    ends = span.spent + span.costs[0] / 2, last - span.costs[-1] / 2
    state = growing = None
    if mesh is not None:
        state = _state_bytes(plan, span.model, mesh)
        if grow is not None:
            growing = sum(state) + sum(_state_bytes(plan, plan.before(span.index), mesh))
    return StageFacts(
        index=span.index,
        name=span.stage.name,
        grows=None if grow is None else str(grow),
        exactness=None if grow is None else grow.exactness,
        parts=tuple(map(said_work, dict.fromkeys(w for _, w in span.programs if w != Work()))),
        selects=None if span.stage.select is None else said(span.stage.select),
        sizes=span.sizes,
        parameters=parameters(span.model),
        batch=span.batch,
        steps=span.steps,
        tokens=tokens,
        flops=flops,
        cost=sum(span.costs) / plan.clock.per_unit,
        flops_per_token=flops / tokens,
        xla_flops_per_token=_xla_flops(plan, span) / tokens,
        saved=1 - flops / whole,
        rate=(plan.learning_rate(ends[0]), plan.learning_rate(ends[1])),
        parameter_bytes=state and state[0],
        optimizer_bytes=state and state[1],
        growing_bytes=growing,
        unsplit=() if mesh is None else tuple(unsplit(span.model, mesh)),
    )


def _whole_flops(plan: Plan, span: Span) -> int:
    """What a stage would cost if it trained all of the last stage's model."""
    last = plan.spans[-1].model
    return span.steps * step_flops(last, span.objective, span.batch, loss=plan.loss)


def _xla_flops(plan: Plan, span: Span) -> float:
    """XLA's count of a stage: ours of each program, as far as XLA's of one sequence differs from ours."""
    total = 0.0
    for work in dict.fromkeys(span.works):
        ours = sum(n for w, n in zip(span.works, span.flops, strict=True) if w == work)
        # Layers that coins leave out are still in the program
        part = None if isinstance(work.part, Coins) and work.part.tosses else work.part
        xla = xla_training_flops(span.model, span.objective, part, loss=plan.loss)
        total += ours * xla / step_flops(span.model, span.objective, 1, part, loss=plan.loss)
    return total


def _state_bytes(plan: Plan, model: Any, mesh: Any) -> tuple[int, int]:
    """Bytes of the fullest device: those of the model, and those of the optimizer."""
    programs = Programs(plan.optimizer.build(), plan.loss, mesh, plan.layout)
    shapes = programs.shapes(model)
    where = programs.shardings(shapes)
    model = [(shapes.trained, where.trained), (shapes.rest, where.rest)]
    return sum(per_device_bytes(*pair) for pair in model), per_device_bytes(
        shapes.optimizer, where.optimizer
    )


def _split_faults(plan: Plan, mesh: Any) -> Iterator[str]:
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for span in plan.spans:
        rows, parts = span.batch // plan.accumulate, plan.accumulate
        if rows % ways:
            fit = parts * ways
            low, high = span.batch // fit * fit, -(-span.batch // fit) * fit
            choices = " or ".join(str(n) for n in (low, high) if n)
            yield (
                f"stage {span.index} {span.stage.name!r}: batch: {rows} sequences at a time cannot be "
                f"split over data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} = {ways} devices"
                f"{f' in {parts} parts' if parts > 1 else ''}; take {choices}"
            )


def _disagreements(stages: Sequence[StageFacts]) -> Iterator[str]:
    for stage in stages:
        if abs(stage.xla_ratio - 1) > _AGREES:
            yield (
                f"stage {stage.index} {stage.name!r}: {stage.flops_per_token:.6g} FLOPs a token are "
                f"counted, and XLA counts {stage.xla_flops_per_token:.6g}; they should agree to "
                f"{_AGREES:.0%}. Compare with a stage that agrees: this is a fault of the count or of "
                "the model's code, and what costs are compared with it cannot be believed"
            )


# What is printed ---------------------------------------------------------------------------------


def _rows(stages: Sequence[StageFacts]) -> Iterator[tuple[str, list[str]]]:
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
        yield row("reference seconds", lambda s: f"{s.cost:.4g}")
    yield row("saved", lambda s: f"{s.saved:.1%}")
    yield row("learning rate", lambda s: f"{s.rate[0]:.3g} to {s.rate[1]:.3g}")
    if any(stage.parameter_bytes is not None for stage in stages):
        yield row("model / device", lambda s: amount(s.parameter_bytes))
        yield row("optimizer / device", lambda s: amount(s.optimizer_bytes))
        yield row("while growing", lambda s: amount(s.growing_bytes))


def said_work(work: Work) -> str:
    """What makes a step's program: `RandomPath(length=3), curvature`."""
    parts = [] if work.part is None else [said(work.part)]
    return ", ".join([*parts, *(name for name in ("curvature", "freeze") if getattr(work, name))])


def said(part: Any) -> str:
    """A sub-network or selector as it differs from its class's defaults: `RandomPath(length=3)`."""
    fields = {f.name: (getattr(part, f.name), f.default) for f in dataclasses.fields(part)}
    changed = [f"{name}={value}" for name, (value, default) in fields.items() if value != default]
    return f"{type(part).__name__}({', '.join(changed)})"


def amount(n: float | None) -> str:
    """Bytes for people: `1.5 GiB`."""
    if n is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
