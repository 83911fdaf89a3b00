"""What `growjax eval` does, as functions."""

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
    """Evaluate a checkpoint, print a table and write the numbers as JSON, with what they are of.

    Raises `EvalError` if `out` is there already, and as `open_model` and `evaluate` do.
    """
    out = Path(out)
    if out.exists():
        raise EvalError(
            f"{out}: is there already, and nothing is overwritten; name another with --out"
        )
    model, found, start = open_model(checkpoint, tokenizer)
    if start is not None:
        settings = dataclasses.replace(settings, start=start, always=isinstance(model, Llama))

    def done(task: str, scores: Scores) -> None:
        console.print(
            f"{task}: {next(iter(scores))} {next(iter(scores.values())):.4f}",
            style="dim",
            markup=False,
        )

    results = evaluate(model, tasks, found, settings, done=done)
    console.print(table_of(results))
    record = {
        "checkpoint": str(checkpoint),
        "growjax": __version__,
        "tokenizer": found.vocabulary.digest,
        "settings": dataclasses.asdict(settings),
        "results": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1, default=str) + "\n")
    console.print(f"written to {out}", markup=False)
    return results


def list_tasks(console: Console) -> None:
    """Print the table of tasks: what each is, its first score and the models that it is for."""
    table = Table(title="Tasks")
    table.add_column("task", no_wrap=True)
    for column in ("what it is", "first score", "for"):
        table.add_column(column)
    for task in (*TASKS.values(), HARNESS):
        models = ", ".join(task.models) if task.models != Task.models else "any"
        table.add_row(task.name, task.about, task.metric, models)
    console.print(table)


def open_model(
    checkpoint: str | Path, tokenizer: str | Path | None = None
) -> tuple[Any, Tokenizer, int | None]:
    """The model in a folder, its tokenizer, and the token it wants before a text if that is its own.

    **Arguments**

    - `checkpoint`: a run (its last checkpoint), one checkpoint, or a Hugging Face folder.
    - `tokenizer`: "bytes" or a file; None is what the run was trained with, or what the folder has
      (`tokenizer.json` or `vocab.txt`).

    Raises `EvalError` if it is none of these, or if no tokenizer is found.
    """
    path = Path(checkpoint)
    if (path / "config.json").is_file():
        found = load_tokenizer(tokenizer) if tokenizer else _tokenizer_in(path)
        return hf.load(path), found, found.vocabulary.specials.get("bos")
    if not path.is_dir():
        raise EvalError(
            f"{path}: expected a run, a checkpoint or a Hugging Face folder; it is none"
        )
    model, lineage = load_model(path)
    return model, load_tokenizer(tokenizer or lineage["tokenizer"]), None


def _tokenizer_in(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder / "tokenizer.json")
    if (folder / "vocab.txt").is_file():
        config = folder / "tokenizer_config.json"
        said: Mapping[str, Any] = read_json(config) if config.is_file() else {}
        return load_tokenizer(folder / "vocab.txt", lowercase=said.get("do_lower_case", True))
    raise EvalError(
        f"{folder}: expected tokenizer.json or vocab.txt in it; name a tokenizer with --tokenizer"
    )


def table_of(results: Mapping[str, Scores]) -> Table:
    """The scores of all tasks, but for those of BLiMP's single files."""
    table = Table(title="Evaluation")
    for column, side in (("task", "left"), ("metric", "left"), ("score", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for task, scores in results.items():
        shown = {name: x for name, x in scores.items() if not name.startswith("paradigm/")}
        for i, (name, value) in enumerate(shown.items()):
            number = f"{value:,.0f}" if value == int(value) and value > 1 else f"{value:.4f}"
            # Names of tasks may come from a user's files, and are no markup
            table.add_row(escape(task) if i == 0 else "", escape(name), number)
    return table
