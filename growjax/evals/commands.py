"""The command `growjax eval`, as functions."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from growjax import __version__, hf
from growjax.data import Tokenizer, load_tokenizer
from growjax.errors import EvalError
from growjax.evals.files import read_json
from growjax.evals.metrics import Scores
from growjax.evals.tasks import HARNESS, TASKS, Settings, Task, evaluate
from growjax.models import Llama
from growjax.runs.lineage import load_model


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
    model, model_tokenizer, start = open_model(checkpoint, tokenizer)
    if start is not None:
        # Llama was trained with its start token before every text; other models only need it where
        # a text has no context
        settings = dataclasses.replace(settings, start=start, always=isinstance(model, Llama))

    def print_first_score(task: str, scores: Scores) -> None:
        metric, value = next(iter(scores.items()))
        console.print(f"{task}: {metric} {value:.4f}", style="dim", markup=False)

    results = evaluate(model, tasks, model_tokenizer, settings, done=print_first_score)
    console.print(table_of(results))
    record = {
        "checkpoint": str(checkpoint),
        "growjax": __version__,
        "tokenizer": model_tokenizer.vocabulary.digest,
        "settings": dataclasses.asdict(settings),
        "results": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    # Settings hold paths, which `str` writes
    out.write_text(json.dumps(record, indent=1, default=str) + "\n")
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
) -> tuple[Any, Tokenizer, int | None]:
    """The model in a folder, its tokenizer, and the model's own start token if it has one.

    **Arguments**

    - `checkpoint`: a run (its last checkpoint), one checkpoint, or a Hugging Face folder.
    - `tokenizer`: "bytes" or a file; None is the tokenizer that the run was trained with, or the
      folder's own (`tokenizer.json` or `vocab.txt`).

    The start token is the `bos` of a Hugging Face tokenizer, and None for a run of growjax. Raises
    `EvalError` if `checkpoint` is none of these, or if no tokenizer is found.
    """
    path = Path(checkpoint)
    if (path / "config.json").is_file():
        loaded = load_tokenizer(tokenizer) if tokenizer else _tokenizer_in(path)
        return hf.load(path), loaded, loaded.vocabulary.specials.get("bos")
    if not path.is_dir():
        raise EvalError(
            f"{path}: expected a run, a checkpoint or a Hugging Face folder; it is none"
        )
    model, lineage = load_model(path)
    return model, load_tokenizer(tokenizer or lineage["tokenizer"]), None


def _tokenizer_in(folder: Path) -> Tokenizer:
    """The tokenizer that a Hugging Face folder holds; `tokenizer.json` comes first."""
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder / "tokenizer.json")
    if (folder / "vocab.txt").is_file():
        path = folder / "tokenizer_config.json"
        config: Mapping[str, Any] = read_json(path) if path.is_file() else {}
        # A WordPiece vocabulary does not say whether it is lower-cased; Hugging Face's default is yes
        return load_tokenizer(folder / "vocab.txt", lowercase=config.get("do_lower_case", True))
    raise EvalError(
        f"{folder}: expected tokenizer.json or vocab.txt in it; name a tokenizer with --tokenizer"
    )


def table_of(results: Mapping[str, Scores]) -> Table:
    """The scores of all tasks as a table, without those of BLiMP's single files."""
    table = Table(title="Evaluation")
    for column, side in (("task", "left"), ("metric", "left"), ("score", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for task, scores in results.items():
        shown = {name: x for name, x in scores.items() if not name.startswith("paradigm/")}
        for i, (name, value) in enumerate(shown.items()):
            # Counts (tokens, bytes, seeds) are whole numbers; scores have four digits
            number = f"{value:,.0f}" if value == int(value) and value > 1 else f"{value:.4f}"
            # Names of tasks may come from a user's files, so brackets in them are not markup
            table.add_row(escape(task) if i == 0 else "", escape(name), number)
    return table
