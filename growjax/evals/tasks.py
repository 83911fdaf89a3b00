"""The tasks of evaluation as a table of values, and the one function that runs them.

A task declares the kinds of model that it is for, its files of data, and a function that scores. To add
one, pass a `Task` of your own in place of a name.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from growjax.data import Tokenizer
from growjax.errors import EvalError, raise_all
from growjax.evals.files import find, read_text
from growjax.evals.finetune import Recipe, fine_tune
from growjax.evals.glue import GLUE, GlueTask, read_task
from growjax.evals.language import LanguageModel, bits_per_byte, masked_bits
from growjax.evals.metrics import Scores
from growjax.evals.minimal_pairs import blimp
from growjax.evals.questions import closed_book, read_questions, read_squad
from growjax.evals.reasoning import PRIMITIVES, primitives
from growjax.evals.spans import SpanRecipe, fine_tune_spans
from growjax.models import BERT
from growjax.models.protocol import Kind, kind_of, unwrapped


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of tasks.

    **Fields**

    - `data`: the folder with `glue`, `superglue`, `squad`, `blimp` and `qa` in it, as they are published.
    - `texts`: the files for `bpb`, a document each.
    - `shots`: how many solved examples stand before a question; None is the usual number for the task.
    - `limit`: the most pairs, problems, questions or documents of a task; None is all. Fine-tuning has
      no limit.
    - `seed`: decides the problems, the masks and the examples before a question.
    - `recipe`, `spans`, `seeds`: for fine-tuning; `spans` is the recipe for SQuAD.
    - `longest`, `framed`: see `LanguageModel`.
    - `include`: a folder with tasks of your own for the harness.
    """

    data: str | Path | None = None
    texts: tuple[str | Path, ...] = ()
    shots: int | None = None
    limit: int | None = None
    seed: int = 0
    recipe: Recipe = Recipe()
    spans: SpanRecipe = SpanRecipe()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    longest: int | None = None
    framed: bool = False
    include: str | Path | None = None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The model that is evaluated, with its tokenizer; `language` is the two as a `LanguageModel`."""

    model: Any
    tokenizer: Tokenizer
    settings: Settings

    @cached_property
    def language(self) -> LanguageModel:
        """The model as one that scores texts. Raises `EvalError` as `LanguageModel` does."""
        s = self.settings
        return LanguageModel(self.model, self.tokenizer, s.longest, s.framed)


def _no_data(settings: Settings, part: str) -> None:
    return None


DECODERS: tuple[Kind, ...] = ("causal", "seq2seq")
# The interface of a model that a task needs
Requirement = Literal["logits", "extend", "fine-tuning"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of evaluation: a name, its data, and a function that scores.

    **Fields**

    - `name`: the name to ask for. `NAME` at its end stands for any name, which is passed to `data`.
    - `about`: a line of description; `metric`: the score to look at first.
    - `run`: `(candidate, data, settings) -> {metric: number}`.
    - `data`: `(settings, name) -> data`, the files that `run` reads; raises `EvalError` without them.
    - `models`: the kinds of models that it is for.
    - `requires`: the interface that it needs: "logits", "extend" (to generate text) or "fine-tuning"
      (of a `BERT`). With None nothing is checked before the task runs.

    **Example**

        def length(candidate, data, settings):
            return {"tokens": float(len(candidate.language.encode("a text")))}

        evaluate(model, [Task("length", "tokens of a text", "tokens", length)], tokenizer)
    """

    name: str
    about: str
    metric: str
    run: Callable[[Candidate, Any, Settings], Scores]
    data: Callable[[Settings, str], Any] = _no_data
    models: tuple[Kind, ...] = (*DECODERS, "encoder")
    requires: Requirement | None = None


def evaluate(
    model: Any,
    tasks: Sequence[str | Task],
    tokenizer: Tokenizer,
    settings: Settings | None = None,
    *,
    done: Callable[[str, Scores], None] | None = None,
) -> dict[str, Scores]:
    """The scores of a model on some tasks: `{task: {metric: number}}`.

    **Arguments**

    - `model`: one of `growjax.models`, at any moment of its training; it is not changed.
    - `tasks`: names of `TASKS`, or tasks of your own. `primitives` stands for all `primitives/...`; a
      name that is not in the table is looked up in the lm-evaluation-harness. `@` and a number behind a
      name set its number of shots (`"qa/nq_open@1"`).
    - `done`: called with the name and scores of each task when it is finished.

    Raises `EvalError` that lists all missing data and unsuitable models before anything is computed.

    **Example**

        evaluate(model, ["bpb", "primitives/copy"], tokenizer, Settings(texts=("held-out.txt",)))
    """
    settings = settings or Settings()
    candidate = Candidate(model, tokenizer, settings)
    requests, faults = [], [] if tasks else ["expected 1 task or more, got none"]
    for task in _expanded(tasks):
        try:
            requests.append(_request(task, model, settings))
        except EvalError as error:
            faults.append(f"{task if isinstance(task, str) else task.name}: {error}")
    raise_all(EvalError, "these tasks cannot be run:", faults)
    results: dict[str, Scores] = {}
    for request in requests:
        scores: Any = request.task.run(candidate, request.data, request.settings)
        if request.task is HARNESS:
            # A name of the harness may be a group, whose tasks have scores of their own; the requested
            # name may end with a number of shots, which the harness's name (`data`) lacks
            by_name = {request.name if n == request.data else n: x for n, x in scores.items()}
        else:
            by_name = {request.name: scores}
        results |= by_name
        for name, task_scores in by_name.items():
            if done is not None:
                done(name, task_scores)
    return results


class _Request(NamedTuple):
    """A task that can be run, with its data and its own settings."""

    name: str
    task: Task
    data: Any
    settings: Settings


def _expanded(tasks: Iterable[str | Task]) -> list[str | Task]:
    """The requested tasks, with all `primitives/...` in place of `primitives`, with the same shots."""
    expanded: list[str | Task] = []
    for task in tasks:
        if isinstance(task, str) and task.partition("@")[0] == "primitives":
            _, at, shots = task.partition("@")
            expanded += [f"primitives/{name}{at}{shots}" for name in PRIMITIVES]
        else:
            expanded.append(task)
    return expanded


def _request(requested: str | Task, model: Any, settings: Settings) -> _Request:
    """One task with its data and its number of shots. Raises `EvalError` if it cannot be run."""
    name, at, shots = (requested if isinstance(requested, str) else requested.name).partition("@")
    if at and not shots.isdigit():
        raise EvalError(f"expected a number behind @, got {shots!r}")
    settings = dataclasses.replace(settings, shots=int(shots) if at else settings.shots)
    family, _, part = name.partition("/")
    if isinstance(requested, Task):
        task = requested
    else:
        task = TASKS.get(name) or TASKS.get(f"{family}/NAME")
    if task is None:
        siblings = [other for other in TASKS if other.startswith(f"{family}/")]
        if siblings:
            raise EvalError(f"expected one of {', '.join(siblings)}")
        task, part = HARNESS, name
    kind = kind_of(model)
    if kind not in task.models:
        suitable = " or ".join(_KINDS[k] for k in task.models)
        raise EvalError(f"is for {suitable}, and the model is {_KINDS[kind]}")
    fault = _interface_fault(model, task.requires)
    if fault:
        raise EvalError(fault)
    return _Request(name + at + shots, task, task.data(settings, part), settings)


def _interface_fault(model: Any, required: Requirement | None) -> str | None:
    """The message about a model without the interface that a task needs; None if it has it."""
    inside = unwrapped(model)
    name = type(inside).__name__
    if required == "fine-tuning" and not isinstance(inside, BERT):
        return f"fine-tunes a BERT, and the model is a {name}"
    if required == "extend" and not hasattr(inside, "extend"):
        return f"the model writes, and a {name} has no `extend`; see growjax.models.GPT for one"
    if required is not None and not (callable(inside) or hasattr(inside, "predict")):
        return f"reads logits, and a {name} cannot be called; see growjax.models.protocol"
    return None


_KINDS = {"causal": "a decoder", "seq2seq": "an encoder-decoder", "encoder": "an encoder"}


# Data of tasks: each function takes the settings and the last part of a task's name -----------------


def _folder(settings: Settings, name: str) -> Path:
    """A benchmark's folder within `Settings.data`."""
    if settings.data is None:
        raise EvalError(f"expected the folder of data, with {name} in it, got none")
    return Path(settings.data) / name


def _texts(settings: Settings, part: str) -> list[Path]:
    """The files of `Settings.texts`, which must exist."""
    missing = [str(path) for path in settings.texts if not Path(path).is_file()]
    if missing:
        raise EvalError(f"expected files of text in `texts`; missing: {', '.join(missing)}")
    if not settings.texts:
        raise EvalError("expected files of text in `texts`, got none")
    return [Path(path) for path in settings.texts]


def _pairs(settings: Settings, part: str) -> Path:
    """The folder of BLiMP's pairs, or the archive in it."""
    folder = _folder(settings, "blimp")
    if not folder.is_dir():
        raise EvalError(f"{folder}: is not a folder; expected BLiMP's pairs in it")
    # An archive counts only if the folder has not been unpacked
    archives = sorted(folder.glob("*.tar*"))
    return archives[0] if archives and not any(folder.rglob("*.jsonl*")) else folder


def _files(task: GlueTask, settings: Settings, part: str) -> Path:
    """The folder of GLUE or SuperGLUE, after a check that it has all files of the task."""
    folder = _folder(settings, task.name.partition("/")[0])
    for split in ("train", *task.dev):
        find(folder / task.folder, f"{split}.{'tsv' if task.examples is None else 'jsonl'}")
    return folder


def _squad(version: str, settings: Settings, part: str) -> list[Path]:
    """The files of training and development questions of one version of SQuAD."""
    folder = _folder(settings, "squad")
    return [find(folder, f"{split}-{version}.json") for split in ("train", "dev")]


def _questions(settings: Settings, name: str) -> tuple[Path, Path | None]:
    """The file of questions, and the file of examples to draw from, or None.

    `name` is a file, or a folder with one file of test (or development) questions and perhaps one of
    training questions.
    """
    path = _folder(settings, "qa") / name
    if path.is_file():
        return path, None
    if not path.is_dir():
        raise EvalError(f"{path}: expected a file or a folder of questions, got neither")
    files = [p for p in sorted(path.iterdir()) if {".json", ".jsonl"} & set(p.suffixes)]

    def with_word(*words: str) -> list[Path]:
        """The files with one of these words in their names, such as NQ-open.dev.jsonl."""
        matching = []
        for file in files:
            parts = file.name.replace("-", ".").replace("_", ".").split(".")
            if any(part in words for part in parts):
                matching.append(file)
        return matching

    asked = with_word("test") or with_word("dev", "val", "validation")
    if len(asked) != 1:
        raise EvalError(
            f"{path}: expected one file of test or development questions; name one of "
            f"{', '.join(f'qa/{name}/{p.name}' for p in files) or 'none'}"
        )
    train = [p for p in files if p.name.startswith("train")] or with_word("train")
    return asked[0], train[0] if train else None


# Runs of tasks -----------------------------------------------------------------------------------


def _not_none(**values: Any) -> dict[str, Any]:
    """The arguments that are not None; a task has its own default for the others."""
    return {name: value for name, value in values.items() if value is not None}


def _bits(candidate: Candidate, paths: Sequence[Path], settings: Settings) -> Scores:
    score = masked_bits if candidate.language.kind == "encoder" else bits_per_byte
    return score(candidate.language, [read_text(path) for path in paths])


def _primitive(name: str, candidate: Candidate, data: None, settings: Settings) -> Scores:
    numbers = _not_none(count=settings.limit, shots=settings.shots)
    return primitives(candidate.language, name, seed=settings.seed, **numbers)


def _closed_book(candidate: Candidate, paths: tuple[Path, Path | None], s: Settings) -> Scores:
    # Without a file of examples they are drawn from the questions themselves
    questions, examples = paths
    pool = None if examples is None else read_questions(examples)
    return closed_book(
        candidate.language,
        read_questions(questions),
        examples=pool,
        seed=s.seed,
        **_not_none(limit=s.limit, shots=s.shots),
    )


def _glue(task: GlueTask, candidate: Candidate, folder: Path, s: Settings) -> Scores:
    train = read_task(task, folder, "train")
    dev = {split: read_task(task, folder, split) for split in task.dev}
    model, tokenizer = candidate.model, candidate.tokenizer
    tuned = fine_tune(model, tokenizer, task, train, dev, recipe=s.recipe, seeds=s.seeds)
    return tuned.summary()


def _spans(
    threshold: float | None, candidate: Candidate, paths: Sequence[Path], s: Settings
) -> Scores:
    """SQuAD; `threshold` is None for version 1.1, whose questions all have an answer."""
    recipe = dataclasses.replace(s.spans, threshold=threshold)
    train, dev = (read_squad(path) for path in paths)
    model, tokenizer = candidate.model, candidate.tokenizer
    return fine_tune_spans(model, tokenizer, train, dev, recipe=recipe, seeds=s.seeds).summary()


def _harness(candidate: Candidate, name: str, settings: Settings) -> Any:
    """The scores of each task that a name of the harness, which may be a group, stands for."""
    from growjax.evals.harness import run_harness  # imports the harness, which takes seconds

    s = settings
    return run_harness(
        candidate.language, [name], shots=s.shots, limit=s.limit, include=s.include, seed=s.seed
    )


# The table ---------------------------------------------------------------------------------------


ENCODER: tuple[Kind, ...] = ("encoder",)

_TABLE = [
    Task(
        "bpb",
        "bits per byte; an encoder's per masked token",
        "bits_per_byte",
        _bits,
        _texts,
        requires="logits",
    ),
    Task(
        "blimp",
        "the likelier of two sentences",
        "accuracy",
        lambda candidate, path, s: blimp(candidate.language, path, limit=s.limit),
        _pairs,
        requires="logits",
    ),
    *(
        Task(
            f"primitives/{name}",
            "small problems in words",
            "choice",
            partial(_primitive, name),
            requires="logits",
        )
        for name in PRIMITIVES
    ),
    Task(
        "qa/NAME",
        "closed-book questions",
        "exact_match",
        _closed_book,
        _questions,
        DECODERS,
        "extend",
    ),
    *(
        Task(
            name,
            "fine-tuning",
            "score",
            partial(_glue, task),
            partial(_files, task),
            ENCODER,
            "fine-tuning",
        )
        for name, task in GLUE.items()
    ),
    *(
        Task(
            f"squad/{version}",
            "fine-tuning",
            "score",
            partial(_spans, threshold),
            partial(_squad, version),
            ENCODER,
            "fine-tuning",
        )
        for version, threshold in {"v1.1": None, "v2.0": 0.0}.items()
    ),
]

TASKS: dict[str, Task] = {task.name: task for task in _TABLE}
HARNESS = Task(
    "any other",
    "a task of the lm-evaluation-harness",
    "",
    _harness,
    lambda _, name: name,
    requires="logits",
)
