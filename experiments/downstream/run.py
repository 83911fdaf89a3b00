"""What is growth worth downstream? A pre-trained encoder and the same one grown, fine-tuned on GLUE.

`python -m experiments.downstream.run --size small --data GLUE --model FOLDER --out DIR`; `--size smoke`
makes up its own model and data. `--with-transformers` adds the same runs by PyTorch.
"""

import dataclasses
import hashlib
import importlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import growjax as gj
from experiments.downstream.made_up import make_up
from growjax.data import Tokenizer
from growjax.errors import EvalError, raise_all
from growjax.evals import GLUE, Example, GlueTask, Recipe, fine_tune, read_task
from growjax.evals.commands import open_model
from growjax.evals.finetune import Classifier
from growjax.evals.glue import headline, score
from growjax.models import BERT


Arm = Literal["ungrown", "grown", "transformers"]
NAMES = ("glue/rte", "glue/mrpc", "glue/cola", "glue/sst-2")


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


@dataclasses.dataclass(frozen=True)
class Cell:
    """Everything that the runs of one task share."""

    folder: Path
    model: BERT
    tokenizer: Tokenizer
    task: GlueTask
    train: Sequence[Example]
    dev: Sequence[Example]
    recipe: Recipe

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """One run: the scores of its last epoch."""
        began = time.perf_counter()
        if arm == "transformers":
            return self._line(began, self._by_transformers(seed))
        model, more = self.model, {}
        if arm == "grown":
            model = gj.grow(growth(model), model, key=gj.step_key(seed, 0))
            more = {"moved": moved(self.model, model)}
        found = fine_tune(
            model,
            self.tokenizer,
            self.task,
            self.train,
            {"dev": self.dev},
            recipe=self.recipe,
            seeds=[seed],
            last_only=True,
        )
        return self._line(began, found.runs[0][-1]) | more

    def _line(self, began: float, scores: dict[str, float]) -> dict[str, Any]:
        return {
            "score": headline(scores),
            "metrics": scores,
            "constant": constant(self.task, self.dev),
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _by_transformers(self, seed: int) -> dict[str, float]:
        peer = importlib.import_module("experiments.downstream.peer")
        fresh = Classifier(self.model, self.task.outputs, key=jax.random.key(seed))
        outputs = peer.fine_tuned(
            self.folder,
            self.task,
            self.train,
            self.dev,
            self.recipe,
            seed,
            np.asarray(fresh.weight),
        )
        return score(self.task, self.dev, outputs)


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


# Lines, rows -------------------------------------------------------------------------------------


def glue(
    size: Literal["smoke", "small", "paper"] = "smoke",
    data: Path | None = None,
    model: Path | None = None,
    out: Path = Path("out"),
    tasks: tuple[str, ...] = NAMES,
    examples: int | None = None,
    with_transformers: bool = False,
) -> list[dict]:
    """Fine-tune a model and the same one grown, seed by seed, and compare them.

    **Arguments**

    - `data`: the folder of GLUE, with `RTE/train.tsv` and so on in it; smoke makes its own.
    - `model`: a BERT as Hugging Face has it, with its tokenizer; smoke makes its own.
    - `tasks`: names of `growjax.evals.GLUE` that have labels and one development set.
    - `examples`: the training rows of every task, instead of those of the size.
    - `with_transformers`: the ungrown model by PyTorch as well: the same rows, order and head.

    Lines that are there are not run again. Raises `EvalError` if they are of another recipe or model.
    """
    if with_transformers:
        _need_torch()
    with tempfile.TemporaryDirectory() as folder:
        if size == "smoke" and data is None and model is None:
            data, model = make_up(Path(folder))
        faults = [
            f"--{name}: expected a folder, got {value}"
            for name, value in (("data", data), ("model", model))
            if value is None or not value.is_dir()
        ]
        raise_all(EvalError, "what to fine-tune, and on what, is not there:", faults)
        assert data is not None and model is not None
        return _glue(size, data, model, out, tasks, examples, with_transformers)


def _glue(
    name: str,
    data: Path,
    folder: Path,
    out: Path,
    tasks: Sequence[str],
    examples: int | None,
    with_transformers: bool,
) -> list[dict]:
    size, path = SIZES[name], out / f"glue-{name}.jsonl"
    loaded, tokenizer, _ = open_model(folder)
    shared, settings = {}, {}
    for task in _tasks(tasks):
        train, dev = (read_task(task, data, split) for split in ("train", "dev"))
        count = size.examples.get(task.name) if examples is None else examples
        train = part(train, count)
        shared[task.name] = Cell(folder, loaded, tokenizer, task, train, dev, size.recipe)
        settings[task.name] = {
            "model": _digest(folder),
            "examples": len(train),
            **{n: getattr(size.recipe, n) for n in ("batch", "rate", "epochs", "length")},
        }
    _expect_the_same(path, settings)
    arms = ("ungrown", "grown", "transformers")[: 3 if with_transformers else 2]
    # Seeds outermost: a run that is cut short has whole seeds
    wanted = [(t, arm, seed) for seed in range(size.seeds) for t in shared for arm in arms]
    lines = _read(path)
    there = {tuple(line["cell"]) for line in lines}
    out.mkdir(parents=True, exist_ok=True)
    for cell in wanted:
        if cell not in there:
            task, *rest = cell
            found = shared[task].run(*rest)
            lines.append({"cell": list(cell), **found, "settings": settings[task]})
            with path.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    command = f"python -m experiments.downstream.run --size {name}"
    rows = []
    for task in dict.fromkeys(line["cell"][0] for line in lines):
        rows += rows_of(task, [line for line in lines if line["cell"][0] == task], command)
    (out / f"glue-{name}.md").write_text(table(lines))
    # The rows of other sizes stay
    summary = out / "summary.json"
    before = json.loads(summary.read_text()) if summary.exists() else {}
    summary.write_text(json.dumps({**before, f"glue-{name}": rows}, indent=1) + "\n")
    return rows


def table(lines: Sequence[Mapping]) -> str:
    """A row for each task: its constant answer, and of every arm the median, lowest to highest."""
    arms = list(dict.fromkeys(line["cell"][1] for line in lines))
    rows = [["task", "constant", *arms], ["---"] * (2 + len(arms))]
    for task in dict.fromkeys(line["cell"][0] for line in lines):
        row = []
        for arm in arms:
            found = [x["score"] for x in lines if x["cell"][:2] == [task, arm]]
            spread = f"{min(found, default=0):.3f} to {max(found, default=0):.3f}"
            seeds = f"{len(found)} seed{'s' * (len(found) != 1)}"
            row.append(f"{np.median(found):.3f} ({spread}; {seeds})" if found else "")
        floor = next(line["constant"] for line in lines if line["cell"][0] == task)
        rows.append([task, f"{floor:.3f}", *row])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def rows_of(task: str, lines: Sequence[Mapping], command: str) -> list[dict]:
    """The rows of one task: each arm, and the arms against each other, paired by seed."""
    arms: dict[str, dict[int, float]] = {}
    for line in lines:
        arms.setdefault(line["cell"][1], {})[line["cell"][2]] = line["score"]
    floor, rows = lines[0]["constant"], []
    for arm, scores in arms.items():
        question = f"{task}, {arm}: is it above the best constant answer, {floor:.3f}, every time?"
        rows.append(_row(question, [*scores.values()], min(scores.values()) > floor, command))
    for arm, question, within in (
        ("grown", "is the grown model within 2 points of the ungrown one, every time?", 0.02),
        ("transformers", "is transformers within 2 points of growjax, every time?", 0.02),
    ):
        seeds = arms.get(arm, {}).keys() & arms.get("ungrown", {}).keys()
        if seeds:
            gaps = [arms[arm][seed] - arms["ungrown"][seed] for seed in sorted(seeds)]
            near = max(map(abs, gaps)) <= within
            rows.append(_row(f"{task}: {question}", gaps, near, command))
    return rows


def _row(question: str, values: Sequence[float], verdict: bool, command: str) -> dict:
    """The median of a few seeds, the lowest and the highest: too few for a confidence interval."""
    return {
        "question": question,
        "estimate": round(float(np.median(values)), 4),
        "interval": [round(min(values), 4), round(max(values), 4)],
        "seeds": len(values),
        "verdict": "yes" if verdict else "no",
        "command": command,
    }


# Checks ------------------------------------------------------------------------------------------


def _tasks(names: Sequence[str]) -> list[GlueTask]:
    fit = [n for n, task in GLUE.items() if task.labels and task.dev == ("dev",)]
    faults = [f"{n}: expected one of {', '.join(fit)}" for n in names if n not in fit]
    raise_all(EvalError, "--tasks: these cannot be run:", faults)
    return [GLUE[name] for name in names]


def _digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        whole.update(file.read_bytes())
    return whole.hexdigest()[:12]


def _read(path: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def _expect_the_same(path: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    faults = []
    for line in _read(path):
        task, arm, seed = line["cell"]
        wanted = settings.get(task, line["settings"])
        faults += [
            f"{task}, {arm}, seed {seed}: {name} is {line['settings'].get(name)} there, {value} here"
            for name, value in wanted.items()
            if line["settings"].get(name) != value
        ]
    raise_all(EvalError, f"{path}: its lines are of another run; name another --out:", faults[:5])


def _need_torch() -> None:
    try:
        importlib.import_module("torch")
        importlib.import_module("transformers")
    except ImportError as error:
        raise EvalError(
            f"--with-transformers: needs torch and transformers ({error}); "
            "pip install 'growjax[parity]', or leave it out"
        ) from error


def main() -> None:
    """Run what the command line asks for, and print its rows."""
    for line in tyro.cli(glue):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
