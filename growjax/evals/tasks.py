"""The tasks of evaluation as a table of values, and the one function that runs them.

A task says which models it is for, where its data are and how it is scored. A task more is a line in
`TASKS`, or a `Task` of your own in place of a name.
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
    """What tasks need besides a model, its tokenizer and their names.

    **Fields**

    - `data`: the folder with `glue`, `superglue`, `squad`, `blimp` and `qa` in it, as they are published.
    - `texts`: the files for `bpb`, a document each.
    - `shots`: how many solved examples stand before a question; None is what is usual for the task.
    - `limit`: of how many pairs, problems, questions or documents; None is all. Fine-tuning knows none.
    - `seed`: of problems, masks and of the choice of examples.
    - `recipe`, `spans`, `seeds`: of fine-tuning; `spans` is that on SQuAD.
    - `longest`, `start`, `always`: see `LanguageModel`.
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
    start: int | None = None
    always: bool = False
    include: str | Path | None = None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The model that is evaluated, with its tokenizer; as a `language` model where a task wants one."""

    model: Any
    tokenizer: Tokenizer
    settings: Settings

    @cached_property
    def language(self) -> LanguageModel:
        """Likelihoods of texts. Raises `EvalError` for a model that has none."""
        s = self.settings
        return LanguageModel(self.model, self.tokenizer, s.longest, s.start, s.always)


def _no_data(settings: Settings, part: str) -> None:
    return None


DECODERS: tuple[Kind, ...] = ("causal", "seq2seq")
# What a task does with a model besides reading its arrays
Asks = Literal["logits", "extend", "fine-tuning"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: what it needs, and how it is run.

    **Fields**

    - `name`: as it is asked for. `NAME` at its end stands for any name, which `data` is told.
    - `about`: one line for people; `metric`: the score to look at first.
    - `run`: `(candidate, data, settings) -> {metric: number}`.
    - `data`: `(settings, name) -> data`, the files that `run` reads; raises `EvalError` if some lack.
    - `models`: the kinds of models that it is for.
    - `asks`: what it calls: the model's logits, its `extend` (it writes) or a `BERT` to fine-tune; None
      is nothing that could be known before.

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
    asks: Asks | None = None


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

    - `model`: one of `growjax.models`, as it is at this moment of training; it is not changed.
    - `tasks`: names of `TASKS`, or tasks of your own. `primitives` is all of `primitives/...`; any name
      that is not in the table is asked of the lm-evaluation-harness. `@` and a number behind a name is
      its own number of shots (`"qa/nq_open@1"`).
    - `done`: is told every result at once.

    Raises `EvalError` that lists everything that is lacking before anything is computed.

    **Example**

        evaluate(model, ["bpb", "primitives/copy"], tokenizer, Settings(texts=("held-out.txt",)))
    """
    settings = settings or Settings()
    candidate = Candidate(model, tokenizer, settings)
    requests, faults = [], [] if tasks else ["expected one at least"]
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
            # It has groups, whose tasks have scores of their own
            found = {request.name if n == request.data else n: each for n, each in scores.items()}
        else:
            found = {request.name: scores}
        results |= found
        for name, each in found.items():
            if done is not None:
                done(name, each)
    return results


class _Request(NamedTuple):
    name: str
    task: Task
    data: Any
    settings: Settings


def _expanded(tasks: Iterable[str | Task]) -> list[str | Task]:
    """The requested tasks, with `primitives` as all of them."""
    whole: list[str | Task] = []
    for task in tasks:
        name, at, shots = ("", "", "") if isinstance(task, Task) else task.partition("@")
        every = PRIMITIVES if name == "primitives" else ()
        whole += [f"primitives/{each}{at}{shots}" for each in every] or [task]
    return whole


def _request(asked: str | Task, model: Any, settings: Settings) -> _Request:
    """One task with its data found and its number of shots read; raises `EvalError` if it cannot run."""
    name, at, shots = (asked if isinstance(asked, str) else asked.name).partition("@")
    if at and not shots.isdigit():
        raise EvalError(f"expected a number behind @, got {shots!r}")
    settings = dataclasses.replace(settings, shots=int(shots) if at else settings.shots)
    family, _, part = name.partition("/")
    task = asked if isinstance(asked, Task) else TASKS.get(name) or TASKS.get(f"{family}/NAME")
    if task is None:
        siblings = [each for each in TASKS if each.startswith(f"{family}/")]
        if siblings:
            raise EvalError(f"expected one of {', '.join(siblings)}")
        task, part = HARNESS, name
    kind = kind_of(model)
    if kind not in task.models:
        wanted = " or ".join(_KINDS[each] for each in task.models)
        raise EvalError(f"is for {wanted}, and the model is {_KINDS[kind]}")
    lacking = _lacking(model, task.asks)
    if lacking:
        raise EvalError(lacking)
    return _Request(name + at + shots, task, task.data(settings, part), settings)


def _lacking(model: Any, asks: Asks | None) -> str | None:
    """Why a model cannot do what a task asks of it; None if it can."""
    inside = unwrapped(model)
    name = type(inside).__name__
    if asks == "fine-tuning" and not isinstance(inside, BERT):
        return f"fine-tunes a BERT, and the model is a {name}"
    if asks == "extend" and not hasattr(inside, "extend"):
        return f"the model writes, and a {name} has no `extend`; see growjax.models.GPT for one"
    if asks is not None and not (callable(inside) or hasattr(inside, "predict")):
        return f"reads logits, and a {name} cannot be called; see growjax.models.protocol"
    return None


_KINDS = {"causal": "a decoder", "seq2seq": "an encoder-decoder", "encoder": "an encoder"}


# Where data are ----------------------------------------------------------------------------------


def _folder(settings: Settings, name: str) -> Path:
    if settings.data is None:
        raise EvalError(f"expected the folder of data, with {name} in it, and none was named")
    return Path(settings.data) / name


def _texts(settings: Settings, part: str) -> list[Path]:
    lost = [str(path) for path in settings.texts if not Path(path).is_file()]
    if lost or not settings.texts:
        raise EvalError(f"expected files of text in `texts`; {', '.join(lost) or 'none'}")
    return [Path(path) for path in settings.texts]


def _pairs(settings: Settings, part: str) -> Path:
    """The folder of BLiMP's pairs, or the archive in it."""
    folder = _folder(settings, "blimp")
    if not folder.is_dir():
        raise EvalError(f"{folder}: there is no such folder")
    archives = sorted(folder.glob("*.tar*"))
    return archives[0] if archives and not any(folder.rglob("*.jsonl*")) else folder


def _files(task: GlueTask, settings: Settings, part: str) -> Path:
    """The folder of GLUE or SuperGLUE, which holds the files of the task."""
    folder = _folder(settings, task.name.partition("/")[0])
    for split in ("train", *task.dev):
        find(folder / task.folder, f"{split}.{'tsv' if task.examples is None else 'jsonl'}")
    return folder


def _squad(version: str, settings: Settings, part: str) -> list[Path]:
    folder = _folder(settings, "squad")
    return [find(folder, f"{split}-{version}.json") for split in ("train", "dev")]


def _questions(settings: Settings, name: str) -> tuple[Path, Path | None]:
    """The file of the questions, and that of the examples if there is one."""
    path = _folder(settings, "qa") / name
    if path.is_file():
        return path, None
    if not path.is_dir():
        raise EvalError(f"{path}: there is no such file or folder of questions")
    files = [p for p in sorted(path.iterdir()) if {".json", ".jsonl"} & set(p.suffixes)]

    def of(*words: str) -> list[Path]:
        parts = {p: p.name.replace("-", ".").replace("_", ".").split(".") for p in files}
        return [p for p in files if any(part in words for part in parts[p])]

    asked = of("test") or of("dev", "val", "validation")
    if len(asked) != 1:
        raise EvalError(
            f"{path}: expected one file of test or development questions; name one of "
            f"{', '.join(f'qa/{name}/{p.name}' for p in files) or 'none'}"
        )
    train = [p for p in files if p.name.startswith("train")] or of("train")
    return asked[0], train[0] if train else None


# How they are run --------------------------------------------------------------------------------


def _given(**values: Any) -> dict[str, Any]:
    """The settings that were made; the others are each task's own."""
    return {name: value for name, value in values.items() if value is not None}


def _bits(candidate: Candidate, paths: Sequence[Path], settings: Settings) -> Scores:
    score = masked_bits if candidate.language.kind == "encoder" else bits_per_byte
    return score(candidate.language, [read_text(path) for path in paths])


def _primitive(name: str, candidate: Candidate, data: None, settings: Settings) -> Scores:
    numbers = _given(count=settings.limit, shots=settings.shots)
    return primitives(candidate.language, name, seed=settings.seed, **numbers)


def _closed_book(candidate: Candidate, paths: tuple[Path, Path | None], s: Settings) -> Scores:
    questions, examples = paths
    pool = None if examples is None else read_questions(examples)
    numbers = _given(limit=s.limit, shots=s.shots)
    asked = read_questions(questions)
    return closed_book(candidate.language, asked, examples=pool, seed=s.seed, **numbers)


def _glue(task: GlueTask, candidate: Candidate, folder: Path, s: Settings) -> Scores:
    sets = {split: read_task(task, folder, split) for split in ("train", *task.dev)}
    train, c = sets.pop("train"), candidate
    found = fine_tune(c.model, c.tokenizer, task, train, sets, recipe=s.recipe, seeds=s.seeds)
    return found.summary()


def _spans(
    nothing: float | None, candidate: Candidate, paths: Sequence[Path], s: Settings
) -> Scores:
    """`nothing` is the score above which a question is given no answer."""
    sets, recipe = map(read_squad, paths), dataclasses.replace(s.spans, threshold=nothing)
    model, tokenizer = candidate.model, candidate.tokenizer
    return fine_tune_spans(model, tokenizer, *sets, recipe=recipe, seeds=s.seeds).summary()


def _harness(candidate: Candidate, name: str, settings: Settings) -> Any:
    """The scores of each task that a name of the harness stands for."""
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
        asks="logits",
    ),
    Task(
        "blimp",
        "the likelier of two sentences",
        "accuracy",
        lambda candidate, path, s: blimp(candidate.language, path, limit=s.limit),
        _pairs,
        asks="logits",
    ),
    *(
        Task(
            f"primitives/{name}",
            "small problems in words",
            "choice",
            partial(_primitive, name),
            asks="logits",
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
            f"squad/{x}",
            "fine-tuning",
            "score",
            partial(_spans, no),
            partial(_squad, x),
            ENCODER,
            "fine-tuning",
        )
        for x, no in {"v1.1": None, "v2.0": 0.0}.items()
    ),
]

TASKS: dict[str, Task] = {task.name: task for task in _TABLE}
HARNESS = Task(
    "any other",
    "a task of the lm-evaluation-harness",
    "",
    _harness,
    lambda _, name: name,
    asks="logits",
)
