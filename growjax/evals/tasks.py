"""Tasks by name: the door for the command line, and for a training run at its marks."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from growjax.data import Tokenizer
from growjax.errors import EvalError, raise_all
from growjax.evals.files import find, read_text
from growjax.evals.finetune import Recipe, fine_tune
from growjax.evals.glue import TASKS, read_task
from growjax.evals.language import LanguageModel, bits_per_byte, masked_bits
from growjax.evals.metrics import Scores
from growjax.evals.minimal_pairs import blimp
from growjax.evals.questions import closed_book, read_questions, read_squad
from growjax.evals.reasoning import PRIMITIVES, primitives
from growjax.evals.spans import SpanRecipe, fine_tune_spans


# The threshold of no answer, for the version that has such questions
_SQUAD = {"squad/v1.1": None, "squad/v2.0": 0.0}


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


def evaluate(
    model: Any,
    tasks: Sequence[str],
    tokenizer: Tokenizer,
    settings: Settings | None = None,
    *,
    done: Callable[[str, Scores], None] | None = None,
) -> dict[str, Scores]:
    """The scores of a model on some tasks: `{task: {metric: number}}`.

    **Arguments**

    - `model`: one of `growjax.models`, as it is at this moment of training; it is not changed.
    - `tasks`: their names. `@` and a number behind one is its own number of shots (`"qa/nq_open@1"`).

        | name | what it is |
        |---|---|
        | `bpb` | bits per byte of `texts`; for an encoder, bits per masked token |
        | `blimp` | the likelier of two sentences, by likelihood or pseudo-likelihood |
        | `primitives`, `primitives/copy`, ... | reasoning primitives, all or one |
        | `qa/NAME` | closed-book questions of the folder or file `NAME` in `qa` |
        | `glue/rte`, ..., `superglue/boolq`, ... | fine-tuning of an encoder |
        | `squad/v1.1`, `squad/v2.0` | fine-tuning of an encoder that points at the answer |
        | any other | a task of the lm-evaluation-harness |

    - `done`: is told every result at once.

    Raises `EvalError` that lists everything that is lacking before anything is computed.

    **Example**

        evaluate(model, ["bpb", "primitives/copy"], tokenizer, Settings(texts=("held-out.txt",)))
    """
    settings = settings or Settings()
    names = [name for task in tasks for name in _expanded(task)]
    raise_all(EvalError, "these tasks cannot be run:", _faults(names, settings))
    language: LanguageModel | None = None
    results: dict[str, Scores] = {}
    for name in names:
        bare, shots = _shots(name, settings)
        if bare in TASKS or bare in _SQUAD:
            found = {name: _fine_tuned(model, tokenizer, bare, settings)}
        else:
            if language is None:
                s = settings
                language = LanguageModel(model, tokenizer, s.longest, s.start, s.always)
            found = _asked(language, name, bare, shots, settings)
        results |= found
        if done is not None:
            for task, scores in found.items():
                done(task, scores)
    return results


def _fine_tuned(model: Any, tokenizer: Tokenizer, name: str, settings: Settings) -> Scores:
    folder = _folder(settings, name.partition("/")[0])
    if name in _SQUAD:
        train, dev = (read_squad(find(folder, file)) for file in _squad_files(name))
        recipe = dataclasses.replace(settings.spans, threshold=_SQUAD[name])
        return fine_tune_spans(
            model, tokenizer, train, dev, recipe=recipe, seeds=settings.seeds
        ).summary()
    task = TASKS[name]
    examples = read_task(task, folder, "train")
    sets = {split: read_task(task, folder, split) for split in task.dev}
    found = fine_tune(
        model, tokenizer, task, examples, sets, recipe=settings.recipe, seeds=settings.seeds
    )
    return found.summary()


def _asked(
    language: LanguageModel, name: str, bare: str, shots: int | None, settings: Settings
) -> dict[str, Scores]:
    kind, _, rest = bare.partition("/")
    if bare == "bpb":
        texts = [read_text(Path(path)) for path in settings.texts]
        encoder = language.kind == "encoder"
        return {name: (masked_bits if encoder else bits_per_byte)(language, texts)}
    if bare == "blimp":
        return {name: blimp(language, _blimp(settings), limit=settings.limit)}
    if kind == "primitives":
        more: dict[str, Any] = {} if settings.limit is None else {"count": settings.limit}
        more |= {} if shots is None else {"shots": shots}
        return {name: primitives(language, rest, seed=settings.seed, **more)}
    if kind == "qa":
        asked, examples = _questions(settings, rest)
        more = {} if shots is None else {"shots": shots}
        scores = closed_book(
            language,
            read_questions(asked),
            examples=None if examples is None else read_questions(examples),
            limit=settings.limit,
            seed=settings.seed,
            **more,
        )
        return {name: scores}
    from growjax.evals.harness import run_harness

    found = run_harness(
        language,
        [bare],
        shots=shots,
        limit=settings.limit,
        include=settings.include,
        seed=settings.seed,
    )
    return {task if task != bare else name: scores for task, scores in found.items()}


# Names -------------------------------------------------------------------------------------------


def _expanded(task: str) -> list[str]:
    name, at, shots = task.partition("@")
    return [f"primitives/{n}{at}{shots}" for n in PRIMITIVES] if name == "primitives" else [task]


def _shots(name: str, settings: Settings) -> tuple[str, int | None]:
    """A name without its number of shots, and that number."""
    bare, at, shots = name.partition("@")
    return bare, int(shots) if at else settings.shots


def _faults(names: Sequence[str], settings: Settings) -> list[str]:
    faults = [] if names else ["expected one at least"]
    for name in names:
        bare, at, shots = name.partition("@")
        kind, _, rest = bare.partition("/")
        try:
            if at and not shots.isdigit():
                raise EvalError(f"expected a number behind @, got {shots!r}")
            if kind in ("glue", "superglue"):
                if bare not in TASKS:
                    raise EvalError(f"expected one of {', '.join(TASKS)}")
                task = TASKS[bare]
                for split in ("train", *task.dev):
                    end = "tsv" if task.examples is None else "jsonl"
                    find(_folder(settings, kind) / task.folder, f"{split}.{end}")
            elif kind == "squad":
                if bare not in _SQUAD:
                    raise EvalError(f"expected one of {', '.join(_SQUAD)}")
                for file in _squad_files(bare):
                    find(_folder(settings, kind), file)
            elif kind == "primitives" and rest not in PRIMITIVES:
                raise EvalError(f"expected one of {', '.join(PRIMITIVES)} behind primitives/")
            elif kind == "qa":
                _questions(settings, rest)
            elif bare == "blimp":
                _blimp(settings)
            elif bare == "bpb":
                lost = [str(path) for path in settings.texts if not Path(path).is_file()]
                if lost or not settings.texts:
                    raise EvalError(
                        f"expected files of text in `texts`; {', '.join(lost) or 'none'}"
                    )
        except EvalError as error:
            faults.append(f"{name}: {error}")
    return faults


def _folder(settings: Settings, kind: str) -> Path:
    if settings.data is None:
        raise EvalError(f"expected the folder of data, with {kind} in it, and none was named")
    return Path(settings.data) / kind


def _squad_files(name: str) -> tuple[str, str]:
    version = name.partition("/")[2]
    return f"train-{version}.json", f"dev-{version}.json"


def _blimp(settings: Settings) -> Path:
    """The folder of pairs, or the archive in it."""
    folder = _folder(settings, "blimp")
    if not folder.is_dir():
        raise EvalError(f"{folder}: there is no such folder")
    archives = sorted(folder.glob("*.tar*"))
    return archives[0] if archives and not any(folder.rglob("*.jsonl*")) else folder


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
