"""The demo: five runs of a small language model, charged by the same FLOP count.

    scratch   the whole model from its first step
    control   the same, but at the cost of the grown run, its learning rate decayed within that
    small     the model that the grown run starts as, which never grows, at the cost of the grown run
    grown     narrow and shallow first, then wider behind gates (MSG), then deeper by stacking
    raptr     the whole model, of which every step trains a random path of layers, longer and longer

The text is one that every Python has: the sources and documentation of its own standard library.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from growjax.budget import Outcome, cost_to_reach
from growjax.cost import parameters
from growjax.data import ByteTokenizer, Causal, Corpus, StandardLibrary, Text, prepare
from growjax.errors import DataError
from growjax.growth import stack
from growjax.growth.masked import msg
from growjax.models import GPTConfig
from growjax.report import Plot, Table, arms_figure, cost_figure, write_page
from growjax.subnet import path_schedule
from growjax.train import CorpusFeed, End, Growth, Options, Plan, Schedule, Stage, Step, train


# Text --------------------------------------------------------------------------------------------


def load_text(path: Path | None, cache: Path) -> tuple[Corpus, Corpus]:
    """The files under `path`, or the standard library's sources and help topics, as bytes.

    Every twentieth file or so is held out. Raises `DataError` if there are fewer than two files or
    less than 100 kB.
    """
    source = StandardLibrary() if path is None else Text(str(path))
    hint = "name a folder of text files with --data"
    try:
        training, held_out = prepare(source, ByteTokenizer(), cache)
    except DataError as error:
        raise DataError(f"{error}; {hint}") from error
    size = _bytes(training) + _bytes(held_out)
    if size < 100_000:
        raise DataError(f"{_source(path)}: expected 100 kB of text, found {size} bytes; {hint}")
    return training, held_out


def _files(corpus: Corpus) -> int:
    return len(corpus.starts)


def _bytes(corpus: Corpus) -> int:
    return corpus.text_bytes


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
) -> dict[str, Any]:
    """Train the five arms, print a table, and write `results.json` and `report.html` into `out`.

    Returns what the JSON holds. Raises `DataError` if there is no text to train on.

    **Example**

        run(out=Path("runs/tiny"), size=Size(steps=40, embed=32, heads=2, head_dim=16, mlp=64))
    """
    console, plans = console or Console(), arms(size, seed)
    corpora = load_text(data, out / "cache")
    text = {
        "source": _source(data),
        "files": sum(map(_files, corpora)),
        "training_bytes": _bytes(corpora[0]),
        "held_out_bytes": _bytes(corpora[1]),
        "digest": corpora[0].digest[:16],
    }
    console.print(
        f"{text['source']}: {text['files']} files, {text['training_bytes']:,} bytes to train on, "
        f"{text['held_out_bytes']:,} held out"
    )
    started = time.perf_counter()
    programs: dict[str, Any] = {}
    every = plans[0].flops / size.marks
    done = [
        _run_arm(
            CorpusFeed(plan, *corpora), console, bar, size=size, every=every, programs=programs
        )
        for plan, bar in _bars(plans, console)
    ]
    for arm, share in zip(done, reached(done, seed), strict=True):
        arm["reached"] = share
    results = {
        "seed": seed,
        "size": dataclasses.asdict(size),
        "text": text,
        "wall_seconds": time.perf_counter() - started,
        "arms": done,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = write_report(out / "report.html", results)
    _print_table(console, results)
    console.print(verdict(done))
    compiling = sum(arm["compile_seconds"] for arm in done)
    console.print(
        f"{results['wall_seconds']:.0f} s in all, {compiling:.0f} of them compiling and growing. "
        f"Report: {page}"
    )
    return results


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


def _run_arm(
    feed: CorpusFeed,
    console: Console,
    bar: Any,
    *,
    size: Size,
    every: float,
    programs: dict[str, Any],
) -> dict[str, Any]:
    """Train one arm and collect everything that is reported about it, ready for JSON."""
    plan = feed.plan
    losses: list[tuple[int, float]] = []
    held_out: list[tuple[int, float]] = []
    growths: list[dict[str, Any]] = []
    seconds, end = 0.0, None
    options = Options(evaluate_every=every, held_out=size.held_out, held_out_end=0)
    for record in train(plan, feed, options=options, cache=programs):
        if isinstance(record, Step):
            losses.append((record.flops, record.loss))
            seconds = record.seconds
            done = f"{record.flops / 1e12:.3g} of {plan.flops / 1e12:.3g}"
            bar(completed=record.flops, flops=done, loss=f"{record.loss:.3f}")
            if record.held_out is not None:
                held_out.append((record.flops, record.held_out))
                bar(held_out=f"{record.held_out:.3f}")
        elif isinstance(record, Growth):
            crossing = record.crossing
            growths.append(
                {
                    "step": record.step,
                    "flops": record.flops,
                    "grew": record.grew,
                    "before": crossing.before,
                    "after": crossing.after,
                    "stall": record.stall,
                }
            )
            grew = ", ".join(f"{axis} {a} -> {b}" for axis, (a, b) in record.grew.items())
            console.print(
                f"{plan.name}, before step {record.step}: {grew}; held-out loss {crossing.before:.4f} "
                f"-> {crossing.after:.4f} (jump {crossing.after - crossing.before:+.4f}), training "
                f"stood still for {record.stall:.1f} s"
            )
        elif isinstance(record, End):
            end = record
    assert isinstance(end, End)
    return {
        "name": plan.name,
        "final": held_out[-1][1],
        "flops": plan.flops,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "seconds": seconds,
        "compile_seconds": end.compile_seconds,
        "programs": end.programs,
        "parameters": parameters(end.model),
        "stages": [
            {"label": era.label, "start": era.flops[0], "stop": era.flops[1]}
            for era in plan.timeline(paths=True)
        ],
        "costs": _changes([flops for span in plan.spans for flops in span.flops]),
        "growths": growths,
        "held_out": held_out,
        "loss": losses,
    }


def _changes(costs: Sequence[int]) -> list[tuple[int, int]]:
    """The steps at which the cost of a step changes, and what it changes to."""
    return [(i, c) for i, c in enumerate(costs) if i == 0 or c != costs[i - 1]]


def reached(arms: Sequence[Mapping[str, Any]], seed: int = 0) -> list[float | None]:
    """The share of the scratch run's FLOPs at which each arm reached scratch's final loss, and stayed.

    None for an arm that ended above it.
    """
    outcomes = [
        Outcome(
            arm=arm["name"],
            seed=seed,
            budget=arm["flops"],
            clock="FLOPs",
            spent=arm["flops"],
            score=arm["final"],
            decayed=True,
            curve=tuple(map(tuple, arm["held_out"])),
        )
        for arm in arms
    ]
    names = [arm["name"] for arm in arms]
    return [reach.shares[0] for reach in cost_to_reach(outcomes, *names, target="scratch")]


# A difference in nats that another seed may turn around
_CLOSE = 0.01


def verdict(arms: Sequence[Mapping[str, Any]]) -> str:
    """Which arm has the lowest held-out loss of those that cost what the grown run costs."""
    best, second, *_ = sorted(
        (arm for arm in arms if arm["name"] != "scratch"), key=lambda arm: arm["final"]
    )
    grown = next(arm for arm in arms if arm["name"] == "grown")
    gap = second["final"] - best["final"]
    text = (
        f"At equal cost ({grown['flops'] / 1e12:.3g} TFLOPs) the best arm is {best['name']}: held-out "
        f"loss {best['final']:.3f}, {gap:.3f} below {second['name']}"
    )
    if second is not grown and best is not grown:
        text += f" and {grown['final'] - best['final']:.3f} below grown"
    text += f". It has {best['parameters']:,} of scratch's {arms[0]['parameters']:,} parameters."
    if gap < _CLOSE:
        text += " With another seed the order of the first two may change."
    return text


# Reporting ---------------------------------------------------------------------------------------

_COLUMNS = (
    "arm",
    "held-out loss",
    "TFLOPs",
    "tokens",
    "seconds",
    "cost to reach scratch's loss",
)
_NOTES = (
    "FLOPs are model FLOPs: the matrix products of a forward pass, counted off the traced program, times "
    "three. Norms, softmax, the optimizer and recomputation are not counted, for any arm.",
    "The learning rate is a function of the FLOPs spent: up to 2e-3 over the first 5 % of the arm's "
    "own cost, then linearly down to 0 at its end. So every arm is fully decayed where its curve ends, "
    "and only ends compare with ends.",
    "The control is the from-scratch run at the cost of the grown run, and small is the model that the "
    "grown run starts as, trained for all of that cost. If the large model is wanted, grown against "
    "control says what growing is worth; if the lowest loss at this cost is wanted, grown has to beat "
    "small as well. Scratch shows what a third more compute buys.",
    "Held-out loss is the mean over fixed windows of files that nobody trained on, of the whole "
    "model, also while only a path through it is trained. All arms see the same windows.",
    "The last column is the share of the scratch run's FLOPs from which on the arm's held-out loss was "
    "at or below the scratch run's final one. The loss is measured every twentieth of those FLOPs, and "
    "read off a straight line in between; a loss that rises above the final one again has not got there.",
    "Seconds are those spent training, without compiling, growing and evaluating. They depend on what "
    "else the machine does; FLOPs do not.",
    "Runs this short favour small models: few layers learn faster at first, and part of what growing "
    "gains here is no more than that. With larger budgets larger models come first.",
    "One seed: differences of a hundredth of a nat may well change sign with another one.",
)


def _rows(results: dict[str, Any]) -> list[list[str]]:
    return [
        [
            arm["name"],
            f"{arm['final']:.3f}",
            f"{arm['flops'] / 1e12:.3g}",
            f"{arm['tokens']:,}",
            f"{arm['seconds']:.0f}",
            _saving(arm["reached"]),
        ]
        for arm in results["arms"]
    ]


def _saving(reached: float | None) -> str:
    if reached is None:
        return "not reached"
    return f"{reached:.0%}" if reached == 1 else f"{reached:.0%} ({1 - reached:.0%} saved)"


def _print_table(console: Console, results: dict[str, Any]) -> None:
    table = RichTable()
    for n, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if n else "left")
    for row in _rows(results):
        table.add_row(*row)
    console.print(table)


def write_report(path: Path, results: dict[str, Any]) -> Path:
    """The HTML page of the results of `run`, which may come from their JSON file."""
    size, text, done = results["size"], results["text"], results["arms"]
    jumps = [
        [
            ", ".join(f"{axis} {a} to {b}" for axis, (a, b) in growth["grew"].items()),
            f"{growth['step']}",
            f"{growth['flops'] / 1e12:.3g}",
            f"{growth['before']:.4f}",
            f"{growth['after']:.4f}",
            f"{growth['after'] - growth['before']:+.4f}",
        ]
        for arm in done
        for growth in arm["growths"]
    ]
    smallest = min(arm["parameters"] for arm in done)
    data = (
        f"Text: {text['source']}, {text['files']} files, {text['training_bytes']:,} bytes to train "
        f"on and {text['held_out_bytes']:,} held out (digest {text['digest']}). Model: "
        f"{size['layers']} layers, embed {size['embed']}, {size['heads']} heads of "
        f"{size['head_dim']}, mlp {size['mlp']}, {done[0]['parameters']:,} parameters "
        f"({smallest:,} in small); batches of "
        f"{size['batch']} x {size['length']} bytes; seed {results['seed']}."
    )
    return write_page(
        path,
        "Five runs of a small language model",
        plots=[
            Plot(
                "Held-out loss against cost",
                arms_figure(done, target="scratch", per="byte"),
                "Every arm ends fully decayed at its own cost. The strip names its stages; a tick on a "
                "curve is where one begins. The thin line is the scratch run's final loss.",
            ),
            Plot(
                "Cost of a step",
                cost_figure(done),
                "What a smaller model or a shorter path saves at each step, more steps spend. Lines of "
                "equal cost are drawn a little apart.",
            ),
        ],
        tables=[
            Table(
                "Results",
                _COLUMNS,
                _rows(results),
                f"{verdict(done)} Losses are in nats per byte. {data}",
            ),
            Table(
                "Growth",
                ("what grew", "before step", "TFLOPs", "loss before", "loss after", "jump"),
                jumps,
                "Loss of the same held-out batch just before and just after. Gates open from 0, so "
                "growth by msg changes nothing; stacking copies layers, and a jump is expected.",
            ),
        ],
        notes=_NOTES,
    )
