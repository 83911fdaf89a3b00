"""The command that tokenises text before it is trained on."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from growjax.data import (
    Blend,
    Blended,
    Corpus,
    Progress,
    load_tokenizer,
    prepare,
    source_at,
)
from growjax.errors import DataError
from growjax.plan.plan import Plan


EVERY = 10.0  # seconds between two lines of progress, without a terminal


def prepare_plan(plan: Plan, cache: str | Path, console: Console) -> None:
    """Tokenise the data of a plan into a cache, and print how large they are."""
    if plan.data is None:
        raise DataError(f"plan {plan.name!r}: names no data")
    _prepare(plan.data, plan.validation, plan.tokenizer, cache, 20, console)


def prepare_paths(
    path: str,
    cache: str | Path,
    *,
    tokenizer: str = "bytes",
    validation: str | None = None,
    held_out: int = 20,
    split: str | None = None,
    field: str | None = None,
    console: Console,
) -> None:
    """Tokenise the files at a path into a cache; print how large they are, and how a plan names them.

    The arguments are those of `growjax prepare`; `split` is for `Text` and `field` for JSONL and Parquet.

    **Example**

        prepare_paths("books", "runs/cache", console=Console())
    """
    given = {"split": split, "field": field}
    settings = {name: value for name, value in given.items() if value is not None}
    sources: list[Any] = []
    for part in [path] if validation is None else [path, validation]:
        source: Any = source_at(part)
        fields = {entry.name for entry in dataclasses.fields(source)}
        unknown = sorted(set(settings) - fields)
        if unknown:
            raise DataError(
                f"{part}: is read by {type(source).__name__}, without {' and '.join(unknown)}"
            )
        sources.append(dataclasses.replace(source, **settings))
    _prepare(sources[0], (*sources, None)[1], tokenizer, cache, held_out, console)


def _prepare(
    source: Any, validation: Any, tokenizer: str, cache: str | Path, held_out: int, console: Console
) -> None:
    shown = time.monotonic()
    with console.status("reading") as status:

        def show(progress: Progress) -> None:
            nonlocal shown
            # As `Text`: paths may hold brackets, which Rich reads as markup
            status.update(Text(str(progress)))
            if not console.is_terminal and time.monotonic() - shown > EVERY:
                shown = time.monotonic()
                console.print(Text(str(progress)))

        training, validating = prepare(
            source,
            load_tokenizer(tokenizer),
            cache,
            held_out=held_out,
            validation=validation,
            progress=show,
        )
    for name, corpus in (("to train on", training), ("held out", validating)):
        for label, part in _labelled(corpus):
            documents, size = len(part.starts), f"{len(part):,} tokens"
            say = f"{label}{size} {name}, in {documents:,} document{'s' * (documents != 1)}"
            console.print(Text(say), soft_wrap=True)
    fields = [("data", source, training)]
    if validation is not None:
        fields.append(("validation", validation, validating))
    end = f"tokenizer={tokenizer!r}"
    for title, lines in (
        ("in a plan", [f"{name}={given!r}" for name, given, _ in fields]),
        (
            "without the text",
            [f"{name}={_prepared(given, made)!r}" for name, given, made in fields],
        ),
    ):
        console.print(Text(f"{title}: {', '.join([*lines, end])}"), soft_wrap=True)


def _labelled(corpus: Corpus | Blended) -> Iterator[tuple[str, Corpus]]:
    """The corpora that are mixed, each with its name; or the only one, without."""
    if isinstance(corpus, Corpus):
        yield "", corpus
        return
    for name, part in zip(corpus.names, corpus.corpora, strict=True):
        yield f"{name}: ", part


def _prepared(source: Any, corpus: Corpus | Blended) -> Any:
    """The source that reads what was prepared."""
    if isinstance(corpus, Corpus):
        return corpus.prepared
    parts = tuple(_prepared(None, part) for part in corpus.corpora)
    return Blend(parts, source.weights, source.labels)
