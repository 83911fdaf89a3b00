"""The functions behind the command line's commands for plans and checkpoints."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from growjax import growth
from growjax.axes import axes_of, sizes
from growjax.budget import MeasuredClock, Op, Timing, save_clock
from growjax.certificate import Certificate, certify
from growjax.cost import parameters
from growjax.errors import BudgetError, CheckpointError, GrowthError, PlanError
from growjax.forecast.calibration import calibrate
from growjax.forecast.dryrun import dry_run
from growjax.forecast.pod import chips, compile_for
from growjax.forecast.speed import device_of, pace_table, roofline
from growjax.gates import is_gated, ungated
from growjax.growth import Chain, Operator, chain
from growjax.hf.convert import FAMILIES, load_deferred
from growjax.hf.convert import config as read_config
from growjax.hf.files import CONFIG, read_json
from growjax.models.protocol import kind_of
from growjax.parallel import Layout
from growjax.plan.losses import cross_entropy
from growjax.plan.plan import Plan
from growjax.plan.prefix import Branch, branches
from growjax.plan.probe import Probe
from growjax.plan.stages import Fork
from growjax.plan.worked import purpose_key
from growjax.programs.step import Programs, checksums
from growjax.runs import hosts
from growjax.runs.checkpoint import load, numbered, read_lineage, write_whole
from growjax.runs.feed import CorpusFeed
from growjax.runs.lineage import births_of, load_model, model_of, operators_of, optimizer_of
from growjax.runs.records import End
from growjax.runs.run import Run, checkpoint_in
from growjax.runs.watch import watch
from growjax.train.choosing import TrialStopped, choose
from growjax.train.loop import train
from growjax.train.options import Options
from growjax.train.planfile import read_plan
from growjax.values import from_dict, to_dict


# The names of operators on the command line
OPERATORS = {
    "msg": growth.msg,
    "stack": growth.stack,
    "copy": growth.copy,
    "zeros": growth.zeros,
    "expand": functools.partial(growth.stack, order="interleave", branch="zero"),
}
_DEPTH = {"stack", "expand"}  # the operators that add layers

# Exit statuses of a run that was asked to stop, by SIGTERM and by Ctrl-C, and saved
STOPPED, INTERRUPTED = 75, 130


def show_plan(
    plan: Plan,
    *,
    target: str | None = None,
    devices: int | None = None,
    kind: str | None = None,
    console: Console,
) -> None:
    """Print a plan's dry run and, with a `target`, the programs compiled for that TPU slice.

    With a `kind` of device, such as "h100", it prints the least time that the plan can take there.
    Raises `LayoutError` for an unknown kind or target, and `PlanError` that lists everything that forbids
    the run, after the table is printed.

    **Example**

        show_plan(plan, target="v5e:16x16", console=Console())
    """
    if kind is not None:
        device_of(kind)  # an unknown kind is refused before anything is printed
    forecast = dry_run(plan, devices=devices if target is None else chips(target))
    console.print(forecast)
    forecast.check()
    if kind is not None:
        title = f"at best, on {forecast.devices} x {kind} (by roofline)"
        paces = roofline(plan, kind, forecast.devices)
        console.print(pace_table(title, paces, [stage.name for stage in plan.stages]))
    if target is not None:
        compiled = compile_for(plan, target)
        console.print(compiled)
        compiled.check()


def train_plans(
    plans: Sequence[Plan],
    run: str | Path,
    options: Options,
    *,
    fork: str | None = None,
    evaluations: int = 20,
    reference: Any = None,
    trackers: Sequence[str] = (),
    console: Console,
) -> int:
    """Train a plan, or several as a tree; returns the exit status of the first that did not finish.

    - `fork`: RUN or RUN@STEP, the run that the plan goes on from; for one plan only.
    - `evaluations`: the number of evaluations of each plan on held-out text.

    Several plans are trained one after the other, each in the folder of its name in `run`; the steps that
    they share are trained once (`growjax.train.branches`). Raises `PlanError` without plans, or for
    several plans with `fork`.
    """
    if not plans or (fork is not None and len(plans) > 1):
        raise PlanError(f"expected at least one plan, and exactly one with fork, got {len(plans)}")
    if fork is not None:
        plans = [dataclasses.replace(plans[0], fork=_fork_of(fork))]
    tree = [Branch(plans[0], Path(run), ())] if len(plans) == 1 else branches(plans, run)
    return train_tree(
        tree,
        options,
        evaluations=evaluations,
        reference=reference,
        trackers=trackers,
        console=console,
    )


def train_tree(
    tree: Sequence[Branch],
    options: Options,
    *,
    evaluations: int = 20,
    reference: Any = None,
    trackers: Sequence[str] = (),
    console: Console,
) -> int:
    """Train the plans of a tree in order; returns the exit status of the first that did not finish.

    They share compiled programs. A signal that comes while one of them closes, when it is finished,
    keeps the next one from starting.
    """
    programs: dict[str, Any] = {}
    for n, branch in enumerate(tree):
        if len(tree) > 1:
            console.print(f"plan {branch.plan.name}, into {branch.run}", markup=False)
        branch_options = dataclasses.replace(
            options,
            evaluate_every=branch.plan.cost / max(evaluations, 1),
            save_at=(*options.save_at, *branch.save_at),
        )
        finished, signal = _trained(
            branch.plan, branch.run, branch_options, reference, trackers, console, programs
        )
        if not finished:
            return _status(signal)
        # All hosts go on, or none does
        if n + 1 < len(tree) and hosts.from_first(lambda signal=signal: signal):
            console.print(
                f"stopped by {signal or 'request'}. The same command goes on", markup=False
            )
            return _status(signal)
    return 0


def choose_and_train(
    probe: Probe,
    run: str | Path,
    options: Options,
    *,
    evaluations: int = 20,
    only: bool = False,
    console: Console,
) -> int:
    """Keep the best candidate of a probe (`growjax.train.choose`), and train its run to the end.

    With `only` it stops after the decision. Returns the exit status, as `train_plan` does.
    """
    programs: dict[str, Any] = {}
    options = dataclasses.replace(options, evaluate_every=probe.plans[0].cost / max(evaluations, 1))
    try:
        decision = choose(probe, run, options=options, console=console, cache=programs)
    except TrialStopped as stopped:
        console.print(str(stopped), markup=False)
        return _status(stopped.signal)
    unit = probe.plan.clock
    for n, (stage, loss, cost) in enumerate(
        zip(probe.candidates, decision.losses, probe.costs, strict=True)
    ):
        mark = "  kept" if n == decision.chosen else ""
        shown = "not finite" if loss is None else f"{loss:.4f}"
        console.print(
            f"{stage.name or stage.grow or n}: held-out loss {shown} after {probe.steps} steps, "
            f"{cost / unit.per_unit:.4g} {unit.unit}{mark}",
            markup=False,
        )
    if only:
        return 0
    return train_plan(decision.plan, decision.run, options, console=console, programs=programs)


def _fork_of(text: str) -> Fork:
    """The fork that RUN or RUN@STEP names; a folder may have an @ in its name as well."""
    run, at, step = text.rpartition("@")
    if not at or not step.isdigit() or Run(text).plan_file.exists():
        return Fork(text)
    return Fork(run, int(step))


def train_plan(
    plan: Plan,
    run: str | Path,
    options: Options,
    *,
    reference: Any = None,
    trackers: Sequence[str] = (),
    console: Console,
    programs: dict[str, Any] | None = None,
) -> int:
    """Run a plan in a folder, with its progress on a console; returns the exit status.

    `programs` is a dict through which runs that follow each other share compiled programs.

    - 0: the end of the plan.
    - `STOPPED` (75, a temporary failure in `sysexits.h`): SIGTERM asked the run to stop. It is saved, and
      the same command goes on.
    - `INTERRUPTED` (130): Ctrl-C. It is saved too, but a script should not start it again.
    """
    finished, signal = _trained(plan, run, options, reference, trackers, console, programs)
    return 0 if finished else _status(signal)


def _trained(
    plan: Plan,
    run: str | Path,
    options: Options,
    reference: Any,
    trackers: Sequence[str],
    console: Console,
    programs: dict[str, Any] | None,
) -> tuple[bool, str | None]:
    """Run a plan as `train_plan` does: whether it is finished, and the signal that asked it to stop."""
    records = train(plan, run=run, options=options, reference=reference, cache=programs)
    end = None
    for record in watch(records, plan, run=run, console=console, trackers=trackers):
        if isinstance(record, End):
            end = record
    return end is None or end.finished, records.signal


def _status(signal: str | None) -> int:
    """The exit status of a run that a signal has stopped."""
    return INTERRUPTED if signal == "SIGINT" else STOPPED


def calibrate_plans(
    plans: Sequence[str | Path],
    out: str | Path,
    *,
    name: str | None = None,
    console: Console,
    warmup: int = 50,
    steps: int = 1000,
    blocks: int = 20,
    cache: str | Path = "runs/cache",
) -> MeasuredClock:
    """Measure the operations of the plans in some files, print each, and write the clock.

    The arguments are those of `growjax.train.calibrate`; plans that name data are measured on their data
    as well. Faults of the clock are printed, and the clock is written nevertheless. Raises `BudgetError`
    if `out` exists: results may have been charged by it.
    """
    out = Path(out)
    if out.exists():
        raise BudgetError(f"{out}: exists already, and nothing is overwritten")

    def show(op: Op, timing: Timing) -> None:
        mean, p5, p95 = (ns / 1e6 for ns in (timing.mean, timing.p5, timing.p95))
        fed = "" if timing.fed is None else f", times {timing.fed:.3f} with the plan's data"
        console.print(
            f"{op.kind} of {op.depth} layers, {op.rows} x {op.length} tokens, {op.flops:.4g} FLOPs, "
            f"{op.updated or 0:,} parameters: {mean:.3f} ms (blocks: {p5:.3f} to {p95:.3f}){fed}",
            markup=False,
        )

    read = [read_plan(plan) for plan in plans]
    clock = calibrate(
        *read,
        name=name or out.stem,
        warmup=warmup,
        steps=steps,
        blocks=blocks,
        feeds=[None if plan.data is None else CorpusFeed.of(plan, cache) for plan in read],
        seen=show,
    )
    for fault in clock.faults():
        console.print(f"measure again: {fault}", markup=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_clock(clock, out)
    console.print(f"{out}: {clock.identity}", markup=False)
    return clock


def operator_of(by: str, to: Mapping[str, int], model: Any) -> Operator | Chain:
    """The operator that a command line describes: names joined by `+`, and sizes to reach.

    Without sizes, `by` is the operator in full, as it prints itself (`growjax.growth.parse`). By name,
    copies have random shares, so that each can learn something of its own.

    Each size goes to the first operator named that can grow its axis: `stack` and `expand` (copies whose
    branches are zero) grow stacks of layers and no other axis. `model` may hold arrays or shapes.

    **Example**

        operator_of("msg+stack", {"mlp": 2048, "layers": 12}, model)
        operator_of("stack(layers=(0, 1, 1, 2), branch=zero)", {}, model)
    """
    if "(" in by:
        if to:
            raise GrowthError(f"to: the operator {by!r} has its sizes already; leave them out")
        return growth.parse(by)
    names = by.split("+")
    unknown = [name for name in names if name not in OPERATORS]
    if unknown or not to:
        raise GrowthError(
            f"by, to: expected some of {', '.join(OPERATORS)} joined by +, and sizes such as mlp=2048; "
            f"got {by!r} and {dict(to)}"
        )
    table, left, operators = axes_of(model), dict(to), []
    stacks = [axis for axis in left if "stack" in table.roles(axis)]
    for name in names:
        if name in _DEPTH:
            axes = [axis for axis in left if axis in stacks]
        elif _DEPTH & {*names}:
            axes = [axis for axis in left if axis not in stacks]
        else:
            # No operator for layers is named; some others can grow them as well
            axes = list(left)
        if axes:
            operators.append(OPERATORS[name](**{axis: left.pop(axis) for axis in axes}))
    if left:
        raise GrowthError(f"to: nothing in {by!r} grows {', '.join(left)}")
    return operators[0] if len(operators) == 1 else chain(*operators)


def grow_checkpoint(
    op: Operator | Chain, path: str | Path, out: str | Path, *, seed: int = 0
) -> Certificate:
    """Grow a checkpoint (of a run, its last one), with its optimizer state, into a new checkpoint.

    The program is the one that grows the state of a run. Raises `CheckpointError`, and writes nothing,
    if `out` exists, if gates are still opening, or if the certificate is not passed.
    """
    path, out = checkpoint_in(path), Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: exists already, and nothing is overwritten")
    model, lineage = load_model(path)
    if is_gated(model) and lineage["level"] != 1:
        raise CheckpointError(
            f"{path}: its gates are at {lineage['level']:.2f}; grow a checkpoint from after its ramp"
        )
    certificate = certify_model(op, ungated(model), seed=seed)
    if not certificate.passed:
        raise CheckpointError(f"{path}: {op} does not do what it promises:\n{certificate}")
    # On one device
    layout = Layout()
    mesh = layout.mesh(jax.devices()[:1])
    optimizer = optimizer_of(lineage).build()
    programs = Programs(optimizer, cross_entropy, mesh, layout)
    shapes = programs.shapes(model_of(lineage))
    grown = programs.growth(shapes, op)(load(path, shapes), np.int32(seed))
    after = {
        **lineage,
        "operators": [*lineage["operators"], to_dict(op)],
        "gated": True,
        "level": 0.0,
        "sizes": sizes(grown.model),
        "births": births_of(lineage).grown(op, ungated(model)).runs(),
        "parent": path.name,
        "checksums": numbered(grown, jax.jit(checksums)),
        "certificate": certificate.to_dict(),
    }
    write_whole(out, grown, after)
    return certificate


def certify_model(op: Operator | Chain, model: Any, *, seed: int = 0) -> Certificate:
    """Certify an operator on a model with an axis `vocab`, on two random sequences."""
    return certify(op, model, random_batch(model, seed), key=purpose_key(seed, "grow"))


def random_batch(model: Any, seed: int) -> Any:
    """Two random sequences of at most 32 tokens; for an encoder-decoder, a pair of such batches."""
    model_sizes = sizes(model)
    if "vocab" not in model_sizes:
        raise GrowthError(
            "certify: this model has no axis 'vocab', so the range of its tokens is unknown; use "
            "gj.certify with a batch of your own"
        )
    length = min(model_sizes.get("positions", 32), 32)
    rng = np.random.default_rng(seed)
    shape = (2, length)
    inputs = jnp.asarray(rng.integers(0, model_sizes["vocab"], shape), jnp.int32)
    outputs = jnp.asarray(rng.integers(0, model_sizes["vocab"], shape), jnp.int32)
    return (inputs, outputs) if kind_of(model) == "seq2seq" else inputs


def describe(path: str | Path, console: Console) -> None:
    """Print the lineage and the arrays of a checkpoint (of a run, its last one).

    Of a Hugging Face folder: its family, what of it can be grown, and its arrays.
    """

    def say(text: str) -> None:
        # As `Text`, since names and paths may hold brackets, which Rich reads as markup
        console.print(Text(text))

    path = Path(path)
    if (path / CONFIG).is_file():
        model, config = load_deferred(path), read_config(path)
        family = FAMILIES[read_json(path / CONFIG)["model_type"]]
        say(
            f"{path}\na Hugging Face folder: {family.model_type} ({family.members}), read as {config}"
        )
        say(
            f"growjax grow --from-hf {path} --to AXIS SIZE --out FOLDER grows it: {family.growth}; "
            "operators with all their options grow more"
        )
        console.print(_leaves(model))
        return
    if (path / "checkpoints").is_dir():
        names = [p.name for p in Run(path).checkpoints()]
        say(f"{len(names)} checkpoints: {', '.join(names)}")
    path = checkpoint_in(path)
    lineage = read_lineage(path)
    model = model_of(lineage)
    say(
        f"{path}\n{lineage['plan']}: step {lineage['step']}, stage {lineage['stage']}; "
        f"{lineage['tokens']:,} tokens, {lineage['flops']:.4g} training FLOPs, "
        f"{lineage['seconds']:.0f} s of training; seed {lineage['seed']}, growjax {lineage['growjax']}"
    )
    say(f"born as {from_dict(lineage['model'])}")
    added = births_of(lineage).ranges()
    for n, op in enumerate(operators_of(lineage), 1):
        new = "; ".join(f"{axis} {where}" for axis, where in added.get(n, {}).items())
        say(f"growth {n}: grown by {op}, new are {new or 'no coordinates'}")
    if lineage["parent"]:
        say(f"after {lineage['parent']}")
    if start := lineage["start"]:
        training = ""
        if start["flops"] is not None:
            training = (
                f", which took {start['tokens']:,} tokens and {start['flops']:.4g} training FLOPs"
            )
        say(f"started from {start['folder']} ({start['is']}){training}")
    if fork := lineage.get("fork"):
        say(f"forked from {fork['run']} before step {fork['step']}")
        for change in fork["changes"]:
            say(f"trained otherwise before: {change}")
    if is_gated(model):
        say(f"behind gates at {lineage['level']:.2f}")
    if lineage["certificate"]:
        say(f"certificate {lineage['certificate']}")
    console.print(_leaves(model))


def _leaves(model: Any) -> Table:
    """The table of a model's arrays, or shapes of arrays."""
    table = Table(title=f"{parameters(model):,} parameters")
    table.add_column("leaf", no_wrap=True)  # half a path names nothing
    for column in ("shape", "type", "axes"):
        table.add_column(column)
    for slot in axes_of(model).values():
        for x in slot.arrays():
            axes = " ".join(dim.axis for dim in slot.dims)
            table.add_row(*map(Text, (slot.path, str(tuple(x.shape)), str(x.dtype), axes)))
    return table
