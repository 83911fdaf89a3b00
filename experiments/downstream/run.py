"""What is growth worth downstream? A pre-trained encoder and the same one grown, fine-tuned on GLUE.

`python -m experiments.downstream.run --size small --data GLUE --model FOLDER --out DIR`; `--size smoke`
makes up its own model and data. `--only ungrown grown transformers` adds the same runs by PyTorch.
"""

import dataclasses
import hashlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import growjax as gj
from experiments import study
from experiments.downstream.made_up import make_up
from experiments.study import Inputs, Key, Line, Page, Study, answers_in_words, by
from growjax.errors import EvalError, raise_all
from growjax.evals import GLUE, Example, GlueTask, Recipe, fine_tune, read_task
from growjax.evals.commands import open_model
from growjax.evals.finetune import Classifier
from growjax.evals.glue import headline, score
from growjax.models import BERT
from growjax.report.figures import Bar, differences_figure
from growjax.report.page import Plot, Section, Table
from growjax.report.rows import Answer, Row, select
from growjax.report.tables import answer_table


ARMS = ("ungrown", "grown", "transformers")
NAMES = ("glue/rte", "glue/mrpc", "glue/cola", "glue/sst-2")
# Scores that are this close are called near
_NEAR = 0.02


@dataclasses.dataclass(frozen=True)
class Size:
    """`examples` is how many training rows of a task there are, a fixed part; None is all of them."""

    examples: Mapping[str, int | None]
    recipe: Recipe
    seeds: int


SIZES = {
    "smoke": Size(dict.fromkeys(NAMES, 64), Recipe(rate=1e-2, epochs=8, length=16), 2),
    "small": Size(
        {"glue/rte": 256, "glue/mrpc": 256, "glue/cola": 2048, "glue/sst-2": 1024},
        Recipe(rate=1e-4, epochs=3, length=64),
        3,
    ),
    "paper": Size(dict.fromkeys(NAMES), Recipe(rate=1e-4), 5),
}


def growth(model: BERT) -> gj.growth.Operator:
    """A third more heads and hidden units that nothing reads yet: the function stays, to rounding."""
    sizes = gj.sizes(model)
    heads = sizes["kv_heads"] * sizes["group"]
    return gj.zeros(heads=-(-heads * 4 // 3), mlp=-(-sizes["mlp"] * 4 // 3))


class Task(NamedTuple):
    """A task with its training rows and its whole development set."""

    about: GlueTask
    train: Sequence[Example]
    dev: Sequence[Example]


class Shared:
    """A model and the tasks in a folder, read when one of their runs needs them.

    Raises `EvalError` if the folders are not there; the smallest size makes up its own.
    """

    def __init__(self, inputs: Inputs):
        data, model = inputs.data, inputs.model
        if inputs.size == "smoke" and data is None and model is None:
            data, model = make_up(inputs.out / "made-up")
        faults = [
            f"--{name}: expected a folder, got {value}"
            for name, value in (("data", data), ("model", model))
            if value is None or not value.is_dir()
        ]
        raise_all(EvalError, "what to fine-tune, and on what, is not there:", faults)
        assert data is not None and model is not None
        self.data, self.folder, self.examples = data, model, inputs.examples
        self.size = SIZES[inputs.size]
        self.model, self.tokenizer, _ = open_model(model)
        self.digest = _digest(model)
        self._tasks: dict[str, Task] = {}

    def task(self, name: str) -> Task:
        if name not in self._tasks:
            train, dev = (read_task(GLUE[name], self.data, split) for split in ("train", "dev"))
            train = part(train, self.examples or self.size.examples[name])
            self._tasks[name] = Task(GLUE[name], train, dev)
        return self._tasks[name]


@dataclasses.dataclass(frozen=True)
class Cell(study.Cell):
    """One run: a task, an arm and a seed; the budget is how often all rows are seen."""

    key: Key

    @property
    def optional(self) -> bool:  # type: ignore
        """PyTorch is not installed everywhere."""
        return self.key[2] == "transformers"

    def settings(self, shared: Shared) -> Line:
        recipe = {n: getattr(shared.size.recipe, n) for n in ("batch", "rate", "epochs", "length")}
        rows = len(shared.task(self.key[0]).train)
        return {"model": shared.digest, "examples": rows, **recipe}

    def run(self, shared: Shared) -> Line:
        """The scores of the last epoch, and of the best constant answer."""
        task, (_, _, arm, seed) = shared.task(self.key[0]), self.key
        more = {}
        if arm == "transformers":
            scores = by_transformers(shared, task, seed)
        else:
            model = shared.model
            if arm == "grown":
                model = gj.grow(growth(model), model, key=gj.step_key(seed, 0))
                more = {"moved": moved(shared.model, model)}
            tuned = fine_tune(
                model,
                shared.tokenizer,
                task.about,
                task.train,
                {"dev": task.dev},
                recipe=shared.size.recipe,
                seeds=[seed],
                last_only=True,
            )
            scores = tuned.runs[0][-1]
        floor = constant(task.about, task.dev)
        return {"score": headline(scores), "metrics": scores, "constant": floor, **more}


def cells(size: str, workload: str, seed: int) -> Iterator[Cell]:
    """The arms of one task and seed; the budget is how often all rows are seen."""
    for arm in ARMS:
        yield Cell((workload, f"{SIZES[size].recipe.epochs} epochs", arm, seed))


def by_transformers(shared: Shared, task: Task, seed: int) -> dict[str, float]:
    """The scores of the same fine-tuning by PyTorch; raises `EvalError` where that is not installed."""
    try:
        importlib.import_module("torch")
        importlib.import_module("transformers")
    except ImportError as error:
        raise EvalError(
            f"--only transformers: needs torch and transformers ({error}); "
            "pip install 'growjax[parity]', or leave it out"
        ) from error
    peer = importlib.import_module("experiments.downstream.peer")
    head = np.asarray(Classifier(shared.model, task.about.outputs, key=jax.random.key(seed)).weight)
    recipe = shared.size.recipe
    outputs = peer.fine_tuned(shared.folder, task.about, task.train, task.dev, recipe, seed, head)
    return score(task.about, task.dev, outputs)


@eqx.filter_jit
def _hidden(model: BERT, tokens: jax.Array) -> jax.Array:
    return jax.vmap(lambda row: model(row).hidden)(tokens)


def moved(small: BERT, big: BERT) -> float:
    """How far growth moved the hidden states of some tokens, relative to the largest."""
    sizes = gj.sizes(small)
    shape = (4, min(16, sizes["positions"]))
    tokens = jax.random.randint(jax.random.key(0), shape, 0, sizes["vocab"])
    before, after = _hidden(small, tokens), _hidden(big, tokens)
    return float(jnp.abs(after - before).max() / jnp.abs(before).max())


def part(examples: Sequence[Example], count: int | None) -> list[Example]:
    """Some of the examples, always the same; all of them in their order if there are no more."""
    if count is None or count >= len(examples):
        return list(examples)
    chosen = np.random.default_rng(0).permutation(len(examples))[:count]
    return [examples[i] for i in sorted(chosen)]


def constant(task: GlueTask, dev: Sequence[Example]) -> float:
    """The score of the best constant answer."""
    answers = np.eye(len(task.labels))
    return max(headline(score(task, dev, np.tile(row, (len(dev), 1)))) for row in answers)


def _digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        whole.update(file.read_bytes())
    return whole.hexdigest()[:12]


# Rows and page -----------------------------------------------------------------------------------


def summarise(results: Path, lines: Sequence[Line]) -> list[Row]:
    """Of each task every arm, and the arms against each other, paired by seed."""
    rows: list[Row] = []
    for task, group in by(lines, "workload").items():
        arms = _scores(group)
        floor = group[0]["constant"]
        for arm, scores in arms.items():
            question = f"{arm}: is it above the best constant answer, {floor:.3f}, every time?"
            rows.append(_row(task, question, [*scores.values()], min(scores.values()) > floor))
        for arm, question in (
            ("grown", "is the grown model within 2 points of the ungrown one, every time?"),
            ("transformers", "is transformers within 2 points of growjax, every time?"),
        ):
            gaps = _gaps(arms, arm)
            if gaps:
                rows.append(_row(task, question, gaps, max(map(abs, gaps)) <= _NEAR))
    return rows


def _scores(lines: Sequence[Line]) -> dict[str, dict[int, float]]:
    """The score of each arm and seed."""
    return {
        arm: {run["seed"]: run["score"] for run in runs} for arm, runs in by(lines, "arm").items()
    }


def _gaps(arms: Mapping[str, Mapping[int, float]], arm: str) -> list[float]:
    """An arm minus the ungrown model, over the seeds that both have."""
    ours, base = arms.get(arm, {}), arms.get("ungrown", {})
    return [ours[seed] - base[seed] for seed in sorted(ours.keys() & base.keys())]


def _row(task: str, question: str, values: Sequence[float], verdict: bool) -> Answer:
    """The median of a few seeds, the lowest and the highest: too few for a confidence interval."""
    return Answer(
        workload=task,
        question=question,
        estimate=round(float(np.median(values)), 4),
        interval=(round(min(values), 4), round(max(values), 4)),
        seeds=len(values),
        verdict="yes" if verdict else "no",
    )


def table(lines: Sequence[Line]) -> Table:
    """A row for each task: its constant answer, and of every arm the median, lowest to highest."""
    arms = list(by(lines, "arm"))
    rows = []
    for task, group in by(lines, "workload").items():
        scores = _scores(group)
        cells = [_spread([*scores.get(arm, {}).values()]) for arm in arms]
        rows.append([task, f"{group[0]['constant']:.3f}", *cells])
    caption = "Medians over seeds, with the lowest and the highest; accuracies or correlations."
    return Table("Scores", ("task", "constant", *arms), rows, caption)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    seeds = f"{len(values)} seed{'s' * (len(values) != 1)}"
    return f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f}; {seeds})"


def page(results: Path, lines: Sequence[Line], rows: Sequence[Row]) -> Page:
    """The differences from the ungrown model, the scores and the answers."""
    bars = []
    for task, group in by(lines, "workload").items():
        arms = _scores(group)
        for arm in ARMS[1:]:
            gaps = _gaps(arms, arm)
            if gaps:
                median = float(np.median(gaps))
                bars.append(Bar(task, arm, median, (min(gaps), max(gaps)), gaps, ""))
    figure = differences_figure(
        bars, "the ungrown model", quantity="score", unit="", better="right"
    )
    caption = "Medians, with lines from the lowest seed to the highest."
    answers = answer_table(select(rows, Answer), "Answers", "median (lowest to highest)")
    return Page(
        "What is growth worth when a pre-trained encoder is fine-tuned?",
        answers_in_words(rows),
        [Plot("Scores minus those of the ungrown model", figure, caption)],
        [Section("Numbers", [table(lines), answers])],
        pictures={"differences": figure},
    )


STUDY = Study(
    "downstream",
    NAMES,
    {name: size.seeds for name, size in SIZES.items()},
    cells,
    Shared,
    summarise,
    page,
    uses=("data", "model", "examples"),
    flags=lambda lines: " --data GLUE --model MODEL",
)


if __name__ == "__main__":
    from experiments.main import main

    main(STUDY)
