"""The demo: five runs of a small language model, charged by the same FLOP count.

    scratch   the whole model from its first step
    control   the same, but at the cost of the grown run, its learning rate decayed within that
    small     the model that the grown run starts as, which never grows, at the cost of the grown run
    grown     narrow and shallow first, then wider behind gates (MSG), then deeper by stacking
    raptr     the whole model, of which every step trains a random path of layers, longer and longer

The text is one that every Python has: the sources and documentation of its own standard library. Each run
has a folder like any other, without checkpoints, and the page is that of `growjax report`.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from growjax.data import ByteTokenizer, Causal, Corpus, StandardLibrary, Text, prepare
from growjax.errors import DataError
from growjax.growth import stack
from growjax.growth.masked import msg
from growjax.models import GPTConfig
from growjax.report import Arm, Plot, Table, cost_figure, write_summary
from growjax.report.comparisons import own_cost
from growjax.report.rows import OwnCost
from growjax.report.runs import arm_of, read_run, write_report
from growjax.report.tables import rich_table
from growjax.runs.watch import watch
from growjax.subnet import path_schedule
from growjax.train import (
    CorpusFeed,
    End,
    Growth,
    Options,
    Plan,
    Schedule,
    Stage,
    Step,
    save_plan,
    train,
)


# Text --------------------------------------------------------------------------------------------


def load_text(path: Path | None, cache: Path) -> tuple[Corpus, Corpus]:
    """The files under `path`, or the standard library's sources and help topics, as bytes.

    Every twentieth file or so is held out. Raises `DataError` if there are less than 100 kB.
    """
    source = StandardLibrary() if path is None else Text(str(path))
    hint = "name a folder of text files with --data"
    try:
        training, held_out = prepare(source, ByteTokenizer(), cache)
    except DataError as error:
        raise DataError(f"{error}; {hint}") from error
    size = training.text_bytes + held_out.text_bytes
    if size < 100_000:
        raise DataError(f"{_source(path)}: expected 100 kB of text, found {size} bytes; {hint}")
    return training, held_out


def _source(path: Path | None) -> str:
    return f"Python {sys.version.split()[0]} standard library" if path is None else str(path)


# Arms --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the demo is. `steps` are those of the scratch run; the other arms follow from it."""

    steps: int = 320
    layers: int = 6
    embed: int = 192
    heads: int = 6
    head_dim: int = 32
    mlp: int = 768
    length: int = 128
    batch: int = 8
    held_out: int = 64
    marks: int = 20


def arms(size: Size, seed: int = 0) -> list[Plan]:
    """The plans of the five arms. All but scratch cost the same, to within a step."""
    whole = GPTConfig(
        layers=size.layers,
        embed=size.embed,
        heads=size.heads,
        head_dim=size.head_dim,
        mlp=size.mlp,
        vocab=ByteTokenizer().vocabulary.size,
        positions=size.length,
    )
    small = dataclasses.replace(whole, layers=size.layers // 2, mlp=size.mlp // 2)
    make = functools.partial(
        Plan,
        batch=size.batch,
        objective=Causal(size.length, packing="concat"),
        rate=Schedule(2e-3),
        seed=seed,
    )
    tokens = size.steps * size.batch * size.length

    scratch = make("scratch", whole, (Stage("whole model", tokens=tokens),))
    grown = make(
        "grown",
        small,
        (
            Stage(f"{small.layers} layers", share=0.15),
            Stage(
                f"mlp {size.mlp}", share=0.35, grow=msg(mlp=size.mlp), ramp=max(size.steps // 10, 1)
            ),
            Stage(f"{size.layers} layers", share=0.5, grow=stack(layers=size.layers, order="top")),
        ),
        budget=0.75 * scratch.flops,
    )
    control = make("control", whole, (Stage("whole model", share=1.0),), budget=grown.flops)
    stays = make("small", small, (Stage("small model", share=1.0),), budget=grown.flops)
    return [scratch, control, stays, grown, _raptr(make, whole, grown.flops)]


def _raptr(make: Any, whole: GPTConfig, budget: float) -> Plan:
    """Paths through half of the layers, then more and more; as many steps as the budget pays for."""
    lengths = range(whole.layers // 2, whole.layers + 1)

    def plan(steps: int) -> Plan:
        schedule = path_schedule(lengths, layers=whole.layers, steps=steps)
        return make("raptr", whole, (Stage(subnet=schedule),))

    one_each = plan(len(lengths))
    return plan(max(round(budget / one_each.flops * one_each.steps), one_each.steps))


# Running -----------------------------------------------------------------------------------------


def run(
    data: Path | None = None,
    seed: int = 0,
    out: Path = Path("runs/demo"),
    size: Size = Size(),
    console: Console | None = None,
) -> list[OwnCost]:
    """Train the five arms, print a table, and write a folder for each, `summary.json` and `report.html`.

    Returns the rows of the summary: each arm against scratch. Raises `DataError` if there is no text to
    train on.

    **Example**

        run(out=Path("runs/tiny"), size=Size(steps=40, embed=32, heads=2, head_dim=16, mlp=64))
    """
    console, plans = console or Console(), arms(size, seed)
    corpora = load_text(data, out / "cache")
    text = _text_in_words(data, corpora)
    console.print(text)
    started, compiling = time.perf_counter(), 0.0
    programs: dict[str, Any] = {}
    every = plans[0].flops / size.marks
    options = Options(evaluate_every=every, held_out=size.held_out, held_out_end=0)
    for plan, bar in _bars(plans, console):
        feed = CorpusFeed(plan, *corpora)
        compiling += _train(feed, out / plan.name, options, programs, console, bar)
    folders = [out / plan.name for plan in plans]
    trained = [arm_of([read_run(folder)], charge="flops") for folder in folders]
    rows = list(own_cost(trained, "scratch"))
    write_summary(out / "summary.json", rows)
    results = results_table(trained, rows)
    model = (
        f"Model: {size.layers} layers, embed {size.embed}, {size.heads} heads of {size.head_dim}, mlp "
        f"{size.mlp}; batches of {size.batch} x {size.length} bytes; seed {seed}."
    )
    costs = Plot(
        "Cost of a step",
        cost_figure(plans),
        "What a smaller model or a shorter path saves at each step, more steps spend. Lines of equal "
        "cost are drawn a little apart.",
    )
    page = write_report(
        folders,
        out / "report.html",
        title="Five runs of a small language model",
        answer=[verdict(trained), f"{text} {model}"],
        target="scratch",
        per="byte",
        paths=True,
        plots=[costs],
        tables=[results],
        notes=_NOTES,
    )
    console.print(rich_table(results))
    console.print(verdict(trained))
    console.print(
        f"{time.perf_counter() - started:.0f} s in all, {compiling:.0f} of them compiling and growing. "
        f"Report: {page}"
    )
    return rows


def _text_in_words(data: Path | None, corpora: tuple[Corpus, Corpus]) -> str:
    training, held_out = corpora
    return (
        f"{_source(data)}: {len(training.starts) + len(held_out.starts)} files, "
        f"{training.text_bytes:,} bytes to train on, {held_out.text_bytes:,} held out (digest "
        f"{training.digest[:16]})."
    )


def _bars(plans: Sequence[Plan], console: Console) -> Iterator[tuple[Plan, Any]]:
    """Every plan with a function that moves its progress bar: all bars stay in sight."""
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn(
            "{task.fields[flops]} TFLOPs  loss {task.fields[loss]}  held-out {task.fields[held_out]}"
        ),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=60) as progress:
        tasks = [
            progress.add_task(
                plan.name, total=plan.flops, start=False, flops="-", loss="-", held_out="-"
            )
            for plan in plans
        ]
        for plan, task in zip(plans, tasks, strict=True):
            progress.start_task(task)
            yield plan, functools.partial(progress.update, task)


def _train(
    feed: CorpusFeed,
    folder: Path,
    options: Options,
    programs: dict[str, Any],
    console: Console,
    bar: Any,
) -> float:
    """Train one arm, with its plan and its journal in a folder; return the seconds of compiling."""
    plan = feed.plan
    folder.mkdir(parents=True, exist_ok=True)
    save_plan(plan, folder / "plan.json")
    records = train(plan, feed, options=options, cache=programs)
    for record in watch(records, plan, run=folder):
        if isinstance(record, Step):
            done = f"{record.flops / 1e12:.3g} of {plan.flops / 1e12:.3g}"
            bar(completed=record.flops, flops=done, loss=f"{record.loss:.3f}")
            if record.held_out is not None:
                bar(held_out=f"{record.held_out:.3f}")
        elif isinstance(record, Growth):
            before, after = record.crossing.before, record.crossing.after
            grew = ", ".join(f"{axis} {a} -> {b}" for axis, (a, b) in record.grew.items())
            console.print(
                f"{plan.name}, before step {record.step}: {grew}; held-out loss {before:.4f} -> "
                f"{after:.4f} (jump {after - before:+.4f}), training stood still for {record.stall:.1f} s"
            )
        elif isinstance(record, End):
            return record.compile_seconds
    raise AssertionError("a run ends with End")


# A difference in nats that another seed may turn around
_CLOSE = 0.01


def verdict(arms: Sequence[Arm]) -> str:
    """Which arm has the lowest held-out loss of those that cost what the grown run costs."""
    by_name = {arm.name: arm for arm in arms}
    scratch, grown = by_name["scratch"], by_name["grown"]
    best, second, *_ = sorted((arm for arm in arms if arm is not scratch), key=lambda arm: arm.loss)
    gap = second.loss - best.loss
    text = (
        f"At equal cost ({grown.cost / 1e12:.3g} TFLOPs) the best arm is {best.name}: held-out loss "
        f"{best.loss:.3f}, {gap:.3f} below {second.name}"
    )
    if second is not grown and best is not grown:
        text += f" and {grown.loss - best.loss:.3f} below grown"
    text += f". It has {best.parameters:,} of scratch's {scratch.parameters:,} parameters."
    if gap < _CLOSE:
        text += " With another seed the order of the first two may change."
    return text


def results_table(arms: Sequence[Arm], rows: Sequence[OwnCost]) -> Table:
    """How each arm ended, and for what share of the scratch run's cost it had that run's loss."""
    shares = {row.arm: row.cost_to_reach for row in rows}
    cells = [
        [
            arm.name,
            f"{arm.parameters:,}",
            f"{arm.loss:.3f}",
            f"{arm.cost / 1e12:.3g}",
            "-" if arm.name not in shares else _saving(shares[arm.name]),
        ]
        for arm in arms
    ]
    columns = ("arm", "parameters", "held-out loss", "TFLOPs", "cost to reach scratch's loss")
    return Table("Against scratch", columns, cells, "Losses are in nats per byte.")


def _saving(share: float | None) -> str:
    return "not reached" if share is None else f"{share:.0%} ({1 - share:.0%} saved)"


_NOTES = (
    "The learning rate is a function of the FLOPs spent: up to 2e-3 over the first 5 % of the arm's "
    "own cost, then linearly down to 0 at its end. So every arm is fully decayed where its curve ends, "
    "and only ends compare with ends.",
    "The control is the from-scratch run at the cost of the grown run, and small is the model that the "
    "grown run starts as, trained for all of that cost. If the large model is wanted, grown against "
    "control says what growing is worth; if the lowest loss at this cost is wanted, grown has to beat "
    "small as well. Scratch shows what a third more compute buys.",
    "Held-out loss is the mean over fixed windows of files that nobody trained on; all arms see the same "
    "windows.",
    "The cost to reach scratch's loss is the share of the scratch run's FLOPs from which on the arm's "
    "held-out loss was at or below the scratch run's final one. The loss is measured every twentieth of "
    "those FLOPs, and read off a straight line in between; a loss that rises above the final one again "
    "has not got there.",
    "Runs this short favour small models: few layers learn faster at first, and part of what growing "
    "gains here is no more than that. With larger budgets larger models come first.",
    "One seed: differences of a hundredth of a nat may well change sign with another one.",
)
