"""Studies that train: a cell is a plan, and all that share a seed share birth, text, masks and order."""

import dataclasses
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import study
from experiments.page import page
from experiments.study import Cells, Inputs, Key, Line, Page, Study
from experiments.summary import Question, flags, summarise
from experiments.text import Texts, load_texts
from experiments.windows import WINDOWS, WindowFile, token_losses, windows_of
from growjax.axes import axes_of
from growjax.budget import Clock, decayed
from growjax.cost import parameters
from growjax.data import ByteTokenizer, Corpus
from growjax.models import BERT
from growjax.plan.stages import Span
from growjax.report.rows import Row
from growjax.subnet import RandomPath
from growjax.train import CorpusFeed, End, Growth, Options, Plan, Step, train


# The number of evaluations during a run
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
# The flags of the command line that every training study takes
USES = ("text", "also", "data", "plans", "again")


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
class Cell(study.Cell):
    """One run of a study.

    **Fields**

    - `workload`: the kind of model and objective, such as "bert".
    - `budget`: its name among the budgets of the study, such as "2x".
    - `plan`: the run; its name is the arm, its seed the pair.
    - `fixed`: it trains all of one model from the first step to the last, as the baseline does; the
      frontier is made of these.
    - `reference`: a run on the proxy text whose model a selector compares with. Nobody is charged for it.
    - `clock`: under which the arm is compared, if it is charged less by its own: it is then `free`.
    - `after`: further numbers about the trained model, by name.
    - `midway`: the shares of the cost at which they are asked for as well, of the model as it is by then.
    """

    workload: str
    budget: str
    plan: Plan
    fixed: bool = False
    reference: Plan | None = None
    clock: Clock | None = None
    after: Callable[[Plan, Any, Texts], dict[str, Any]] | None = None
    midway: tuple[float, ...] = ()

    @property
    def key(self) -> Key:  # type: ignore
        return self.workload, self.budget, self.plan.name, self.plan.seed

    @property
    def free(self) -> bool:
        return self.clock is not None

    def run(self, shared: "Trainer") -> Line:
        line, model = trained_line(self, shared)
        if shared.lacks(self):
            objective = self.plan.spans[-1].objective
            examples = windows_of(shared.texts.valid, objective, shared.windows)
            shared.file.add(self.key, line["score"], model, examples)
        return line


@dataclasses.dataclass
class Trainer:
    """What the cells of a training study share: texts, compiled programs, second models.

    `windows` says of how many windows of held-out text losses are kept, in `file`; none of trials.
    `judge` adds scores of tasks to a line.
    """

    texts: Texts
    file: WindowFile
    windows: int = 0
    judge: Judge | None = None
    programs: dict[str, Any] = dataclasses.field(default_factory=dict)
    references: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, inputs: Inputs) -> "Trainer":
        texts = load_texts(inputs.text, inputs.out / "cache", dict(inputs.also))
        judge = None if inputs.data is None else blimp_judge(inputs.data)
        return cls(texts, WindowFile(inputs.results), WINDOWS[inputs.size], judge)

    def lacks(self, cell: study.Cell) -> bool:
        """Whether a cell should have losses by window, and has none."""
        wanted = self.windows > 0 and cell.key[1] != "tuning"
        return wanted and cell.key not in self.file.keys()

    def second_model(self, cell: Cell) -> Any:
        """The trained model of a cell's `reference`, once for all cells of a seed."""
        if cell.reference is None:
            return None
        key = f"{cell.workload} {cell.reference.seed}"
        if key not in self.references:
            plan = cell.reference
            feed = CorpusFeed(plan, self.texts.proxy, self.texts.valid)
            options = Options(held_out=plan.batch, held_out_end=0)
            *_, end = train(plan, feed, options=options, cache=self.programs)
            assert isinstance(end, End)
            self.references[key] = end.model
        return self.references[key]


def training_study(
    name: str,
    question: Question,
    cells: Cells,
    trials: Cells,
    *,
    workloads: tuple[str, ...],
    seeds: Mapping[str, int],
) -> Study:
    """A study whose cells train, with the summary and the page that these share."""

    def shown(results: Path, lines: Sequence[Line], rows: Sequence[Row]) -> Page:
        return page(question, results, lines, rows)

    return Study(
        name,
        workloads,
        seeds,
        cells,
        Trainer.open,
        lambda results, lines: summarise(question, results, lines),
        shown,
        trials=trials,
        uses=USES,
        flags=flags,
    )


def as_trial(cell: Cell) -> Cell:
    """A cell of the tuning ledger, which is charged to nobody and compared with nothing."""
    name = f"{cell.plan.name} at {cell.plan.rate.peak:g}"
    plan = dataclasses.replace(cell.plan, name=name)
    return dataclasses.replace(cell, plan=plan, budget="tuning", after=None)


def fixed_name(config: Any) -> str:
    """The name of an arm that has one size from start to end: layers (of each stack) by embed."""
    layers = getattr(config, "layers", None) or config.encoder_layers
    return f"fixed-{layers}x{config.embed}"


def trained_line(cell: Cell, shared: Trainer) -> tuple[Line, Any]:
    """Run one cell; returns the fields of its line, and the trained model."""
    plan, texts, reference = cell.plan, shared.texts, shared.second_model(cell)
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
    for record in train(plan, feed, options=options, reference=reference, cache=shared.programs):
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
    line = {
        "fixed": cell.fixed,
        "free": cell.free,
        "clock": (cell.clock or plan.clock).identity,
        "unit": plan.clock.unit,
        "spent": last.spent,
        "score": last.held_out,
        "decayed": decayed(plan.learning_rate(plan.cost), plan.rate.peak),
        "curve": curve,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "flops": plan.flops,
        "seconds": last.seconds,
        "parameters": parameters(end.model),
        "stages": _stages(plan),
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
        line["texts"] = {name: loss_on(plan, end.model, t) for name, t in texts.others.items()}
    if shared.judge is not None:
        line["downstream"] = shared.judge(end.model)
    if midway:
        line["midway"] = midway
    return line | (cell.after(plan, end.model, texts) if cell.after else {}), end.model


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


def blimp_judge(data: Path) -> Judge:
    """Scores a model by its share of BLiMP's minimal pairs, a few of each of the 67 kinds.

    An encoder takes a pass for every byte of a sentence, so it sees one pair of each kind.
    """
    from growjax.evals import Settings, evaluate

    def judge(model: Any) -> dict[str, float]:
        settings = Settings(data=data, limit=1 if isinstance(model, BERT) else 4)
        scores = evaluate(model, ["blimp"], ByteTokenizer(), settings)
        return {"blimp": float(scores["blimp"]["accuracy"])}

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


def _stages(plan: Plan) -> list[dict[str, Any]]:
    """Where stages start and stop, in the clock's unit; those of a path schedule one by one."""
    unit = plan.clock.per_unit
    return [
        {"label": era.label, "start": era.spent[0] / unit, "stop": era.spent[1] / unit}
        for era in plan.timeline(paths=True)
    ]
