"""The command `growjax eval`, as functions."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from growjax import __version__, hf
from growjax.data import Tokenizer, load_tokenizer
from growjax.errors import EvalError, HuggingFaceError
from growjax.evals.language import LanguageModel
from growjax.evals.metrics import Scores
from growjax.evals.tasks import HARNESS, TASKS, Settings, Task, evaluate
from growjax.hf.files import located
from growjax.runs.lineage import load_model, pretrained_folder
from growjax.values.codec import write_text


def eval_checkpoint(
    checkpoint: str | Path,
    tasks: Sequence[str],
    settings: Settings,
    *,
    tokenizer: str | Path | None = None,
    out: str | Path,
    console: Console,
) -> dict[str, Scores]:
    """Evaluate a checkpoint, print a table, and write the scores with the settings to `out` as JSON.

    Raises `EvalError` if `out` exists already, and as `open_model` and `evaluate` do.
    """
    out = Path(out)
    if out.exists():
        raise EvalError(
            f"{out}: exists already, and nothing is overwritten; name another with --out"
        )
    model, model_tokenizer, framed = open_model(checkpoint, tokenizer)
    settings = dataclasses.replace(settings, framed=framed)

    def print_first_score(task: str, scores: Scores) -> None:
        metric, value = next(iter(scores.items()))
        console.print(f"{task}: {metric} {value:.4f}", style="dim", markup=False)

    results = evaluate(model, tasks, model_tokenizer, settings, done=print_first_score)
    record = {
        "checkpoint": str(checkpoint),
        "growjax": __version__,
        "tokenizer": model_tokenizer.vocabulary.digest,
        "settings": dataclasses.asdict(settings),
        "results": results,
    }
    # Before the file, which may meet a full disk
    console.print(table_of(results))
    # Settings hold paths, which `str` writes
    write_text(out, json.dumps(record, indent=1, default=str) + "\n", error=EvalError)
    console.print(f"written to {out}", markup=False)
    return results


def list_tasks(console: Console) -> None:
    """Print the table of tasks: a description, the first score, and the kinds of model it is for."""
    table = Table(title="Tasks")
    table.add_column("task", no_wrap=True)
    for column in ("description", "first score", "for"):
        table.add_column(column)
    for task in (*TASKS.values(), HARNESS):
        models = ", ".join(task.models) if task.models != Task.models else "any"
        table.add_row(task.name, task.about, task.metric, models)
    console.print(table)


def open_model(
    checkpoint: str | Path, tokenizer: str | Path | None = None
) -> tuple[Any, Tokenizer, bool]:
    """The model in a folder, its tokenizer, and whether its texts begin as the tokenizer's files say.

    **Arguments**

    - `checkpoint`: a run (its last checkpoint), one checkpoint, a Hugging Face folder, or the id of a
      repository in the local cache of the Hugging Face Hub.
    - `tokenizer`: "bytes", a file or a folder; None is the tokenizer that the run was trained with, or
      that of the Hugging Face folder.

    Texts begin as the files say for a Hugging Face folder, and for a run that started from one; a run
    from scratch saw nothing but the separator between documents. Raises `EvalError` if `checkpoint` is
    none of these, and `DataError` if there is no tokenizer.
    """
    path = Path(checkpoint)
    if not path.is_dir():
        try:
            path = located(checkpoint)
        except HuggingFaceError as error:
            raise EvalError(
                f"{path}: expected a run, a checkpoint or a Hugging Face folder; it is none\n{error}"
            ) from error
    if (path / "config.json").is_file():
        return hf.load(path), load_tokenizer(tokenizer or path), True
    model, lineage = load_model(path)
    loaded = load_tokenizer(tokenizer or lineage["tokenizer"])
    return model, loaded, pretrained_folder(lineage) is not None


def language_model(
    checkpoint: str | Path, tokenizer: str | Path | None = None, *, longest: int | None = None
) -> LanguageModel:
    """The model in a folder with its tokenizer, to score and to write texts; see `open_model`."""
    model, model_tokenizer, framed = open_model(checkpoint, tokenizer)
    return LanguageModel(model, model_tokenizer, longest, framed)


def table_of(results: Mapping[str, Scores]) -> Table:
    """The scores of all tasks as a table, without those of BLiMP's single files."""
    table = Table(title="Evaluation")
    for column, side in (("task", "left"), ("metric", "left"), ("score", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for task, scores in results.items():
        shown = {name: x for name, x in scores.items() if not name.startswith("paradigm/")}
        for i, (name, value) in enumerate(shown.items()):
            # Counts (tokens, bytes, seeds) are whole numbers; scores have four digits
            whole = math.isfinite(value) and value == int(value) and value > 1
            number = f"{value:,.0f}" if whole else f"{value:.4f}"
            # Names of tasks may come from a user's files, so brackets in them are not markup
            table.add_row(escape(task) if i == 0 else "", escape(name), number)
    return table
