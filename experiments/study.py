"""What the experiments share: cells of arm, budget and seed, each run once and kept as a line of JSON.

A cell whose line is there is not run again, so that a study of hours is run in pieces, by as many
processes as there are seeds. Every arm of a seed has the same birth, the same order of the same text and
the same masks; only what the arm is about differs.
"""

import dataclasses
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.text import Texts
from experiments.windows import WindowFile, token_losses, windows_of
from growjax.axes import axes_of
from growjax.budget import Clock
from growjax.cost import parameters
from growjax.data import ByteTokenizer, Corpus
from growjax.models import BERT
from growjax.plan.stages import Span
from growjax.subnet import RandomPath
from growjax.train import CorpusFeed, End, Growth, Options, Plan, Step, train


MARKS = 24
# How blocks are computed. Small ones on a CPU are bound by memory, so keeping less of them is faster
COMPUTE: dict[str, dict[str, Any]] = {
    "smoke": {"remat": "nothing"},
    "small": {"remat": "nothing"},
    "paper": {"remat": "dots", "dtype": "bfloat16"},
}
# Multiples of a study's learning rates that its ledger tries
TRIALS = (0.5, 1.0, 2.0, 4.0)
# A trained model's scores on tasks, higher is better
Judge = Callable[[Any], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the models of a study are, and how long the whole one trains, in steps.

    `masked` is the share of a BERT's tokens that is predicted.
    """

    layers: int
    embed: int
    heads: int
    head_dim: int
    mlp: int
    vocab: int
    length: int
    batch: int
    steps: int
    masked: float = dataclasses.field(default=0.15, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    **Fields**

    - `workload`: what kind of model and objective, such as "bert".
    - `budget`: its name among the budgets of the study, such as "2x".
    - `plan`: the run; its name is the arm, its seed the pair.
    - `reference`: a run on the proxy text whose model a selector compares with. Nobody is charged for it.
    - `clock`: under which the arm is compared, if it is charged less by its own (a "free" variant).
    - `after`: further numbers about the trained model, by name.
    - `midway`: the shares of the cost at which they are asked for as well, of the model as it is by then.
    """

    workload: str
    budget: str
    plan: Plan
    reference: Plan | None = None
    clock: Clock | None = None
    after: Callable[[Plan, Any, Texts], dict[str, Any]] | None = None
    midway: tuple[float, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.workload, self.budget, self.plan.name, self.plan.seed


def as_trial(cell: Cell) -> Cell:
    """A cell of the tuning ledger, which is charged to nobody and compared with nothing."""
    name = f"{cell.plan.name} at {cell.plan.rate.peak:g}"
    plan = dataclasses.replace(cell.plan, name=name)
    return dataclasses.replace(cell, plan=plan, budget="tuning", after=None)


def fixed_name(config: Any) -> str:
    """The name of an arm that has one size from start to end: layers (of each stack) by embed."""
    layers = getattr(config, "layers", None) or config.encoder_layers
    return f"fixed-{layers}x{config.embed}"


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; none if it is not there."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def key_of(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["workload"], row["budget"], row["arm"], row["seed"]


def run(
    cells: Sequence[Cell],
    texts: Texts,
    out: Path,
    console: Console | None = None,
    judge: Judge | None = None,
    *,
    windows: int = 0,
    again: bool = False,
) -> None:
    """Run the cells that have no line in `out` yet, and add theirs.

    **Arguments**

    - `judge`: adds scores of tasks to the line.
    - `windows`: of how many windows of held-out text losses are kept, in a `WindowFile` next to `out`;
      none of trials.
    - `again`: also run the cells that have a line, but no losses by window. Only the latter are kept of
      them, with the score of this run, which need not be the line's bit for bit on another machine.
    """
    console = console or Console()
    done = {key_of(row) for row in read(out)}
    file = WindowFile(out)
    judged = file.keys()

    def lacks_windows(cell: Cell) -> bool:
        return windows > 0 and cell.budget != "tuning" and cell.key not in judged

    todo = [cell for cell in cells if cell.key not in done or (again and lacks_windows(cell))]
    programs: dict[str, Any] = {}
    references: dict[str, Any] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for n, cell in enumerate(todo):
        start = time.perf_counter()
        row, model = run_cell(cell, texts, programs, references, judge)
        if lacks_windows(cell):
            examples = windows_of(texts.valid, cell.plan.spans[-1].objective, windows)
            file.add(cell.key, row["score"], model, examples)
        if cell.key not in done:
            with out.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
        console.print(
            f"{n + 1}/{len(todo)} {' '.join(map(str, cell.key))}: {row['score']:.4f} nats, "
            f"{row['steps']} steps, {time.perf_counter() - start:.0f} s"
        )


def run_cell(
    cell: Cell,
    texts: Texts,
    programs: dict[str, Any],
    references: dict[str, Any],
    judge: Judge | None = None,
) -> tuple[dict[str, Any], Any]:
    """Run one cell; return everything that is kept of it, and the trained model."""
    plan, reference = cell.plan, None
    if cell.reference is not None:
        key = f"{cell.workload} {cell.reference.seed}"
        if key not in references:
            references[key] = _trained(cell.reference, texts.proxy, texts.valid, programs)
        reference = references[key]
    feed = CorpusFeed(plan, texts.training, texts.valid)
    curve, growths, speeds = [], [], defaultdict(list)
    due, midway = sorted(cell.midway), {}

    def look(model: Any, step: Step) -> dict[str, float]:
        if cell.after and due and step.spent * plan.clock.per_unit >= due[0] * plan.cost:
            midway[f"{due.pop(0):g}"] = cell.after(plan, model, texts)
        return {}

    options = Options(
        evaluate_every=plan.cost / MARKS, held_out=_held_out(plan), held_out_end=0, hooks=(look,)
    )
    depths: dict[Any, int] = {}
    last = end = None
    for record in train(plan, feed, options=options, reference=reference, cache=programs):
        if isinstance(record, Step):
            last = record
            span = plan.spans[record.stage]
            work = record.stage, span.works[record.step - span.start].part
            if work not in depths:
                depths[work] = _depth(span, record.step - span.start)
            speeds[depths[work]].append(record.took)
            if record.held_out is not None:
                curve.append((record.spent, record.held_out))
        elif isinstance(record, Growth):
            growths.append(_growth(plan, record))
        elif isinstance(record, End):
            end = record
    assert last is not None and last.held_out is not None and end is not None
    rate = plan.learning_rate(plan.cost)
    row = {
        "workload": cell.workload,
        "budget": cell.budget,
        "arm": plan.name,
        "seed": plan.seed,
        "clock": (cell.clock or plan.clock).identity,
        "unit": plan.clock.unit,
        "spent": last.spent,
        "score": last.held_out,
        "decayed": rate <= 0.01 * plan.rate.peak,
        "curve": curve,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "flops": plan.flops,
        "seconds": last.seconds,
        "parameters": parameters(end.model),
        "stages": list(_stages(plan)),
        "growths": growths,
        "operations": [[*op, n] for span in plan.spans for op, n in span.ops],
        # Not charged to anybody
        "compile_seconds": end.compile_seconds,
        "held_out_seconds": end.held_out_seconds,
        "step_seconds": {str(d): statistics.median(s) for d, s in sorted(speeds.items())},
        "text": texts.name,
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}",
    }
    if texts.others:
        row["texts"] = {name: loss_on(plan, end.model, t) for name, t in texts.others.items()}
    if judge is not None:
        row["downstream"] = judge(end.model)
    if midway:
        row["midway"] = midway
    return row | (cell.after(plan, end.model, texts) if cell.after else {}), end.model


def loss_on(plan: Plan, model: Any, corpus: Corpus, rows: int | None = None) -> float:
    """Nats per token of a model on windows of a text, through the plan's own objective."""
    batch = plan.spans[-1].batch
    examples = CorpusFeed(plan, corpus, corpus).held_out(plan.objective, rows or _held_out(plan))
    total = count = 0.0
    for start in range(0, len(examples["targets"]), batch):
        part = {k: jnp.asarray(v[start : start + batch]) for k, v in examples.items()}
        losses, weights = map(np.asarray, token_losses(model, part))
        total, count = total + (losses * weights).sum(), count + weights.sum()
    return float(total / count)


def _held_out(plan: Plan) -> int:
    """As many sequences as make a held-out set of a fixed number of predictions, roughly.

    The scores that are committed were taken so; losses over thousands of windows stand in a `WindowFile`.
    """
    return 8 * plan.batch


def _trained(plan: Plan, training: Corpus, valid: Corpus, programs: dict[str, Any]) -> Any:
    feed = CorpusFeed(plan, training, valid)
    return list(
        train(plan, feed, options=Options(held_out=plan.batch, held_out_end=0), cache=programs)
    )[-1].model  # type: ignore


def blimp_judge(data: Path) -> Judge:
    """Scores a model by its share of BLiMP's minimal pairs, a few of each of the 67 kinds.

    An encoder takes a pass for every byte of a sentence, so it sees one pair of each kind.
    """
    from growjax.evals import Settings, evaluate

    def judge(model: Any) -> dict[str, float]:
        settings = Settings(data=data, limit=1 if isinstance(model, BERT) else 4)
        found = evaluate(model, ["blimp"], ByteTokenizer(), settings)
        return {"blimp": float(found["blimp"]["accuracy"])}

    return judge


def _depth(span: Span, i: int) -> int:
    """How many layers the stage's step `i` trains; those of the deepest stack, if it trains all."""
    part = span.works[i].part
    if isinstance(part, RandomPath):
        return int(part.length)
    table = axes_of(span.model)
    return max(n for axis, n in table.sizes.items() if "stack" in table.roles(axis))


def _growth(plan: Plan, record: Growth) -> dict[str, Any]:
    return {
        "spent": plan.spans[record.stage].spent / plan.clock.per_unit,
        "grew": record.grew,
        "before": record.crossing.before,
        "after": record.crossing.after,
        "stall": record.stall,
    }


def _stages(plan: Plan) -> Iterator[dict[str, Any]]:
    """Where stages start and stop, in the clock's unit; those of a path schedule one by one."""
    for era in plan.timeline(paths=True):
        start, stop = (spent / plan.clock.per_unit for spent in era.spent)
        yield {"label": era.label, "start": start, "stop": stop}
