"""Commands that read or grow a checkpoint: grow, export, certify, inspect, families, eval."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import tyro

from growjax.cli.allowed import Allow, allow_packages
from growjax.errors import GrowjaxError


# Each command imports its modules inside its body, so that `--help` is fast.


def grow(
    out: Path,
    to: dict[str, int] = {},  # noqa: B006 (never changed; tyro shows it)
    checkpoint: tyro.conf.Positional[Path | None] = None,
    from_hf: Path | None = None,
    by: str | None = None,
    dtype: str | None = None,
    shard: float = 5.0,
    seed: int = 0,
    allow: Allow = (),
) -> None:
    """Grow a checkpoint, with its optimizer state, into a new one, and print its certificate.

    Args:
        to: Axes and the sizes to reach, such as: --to mlp 2048 embed 384.
        out: The folder to write; it must not exist.
        checkpoint: The folder of a run (its last checkpoint) or of one checkpoint.
        from_hf: A Hugging Face folder to grow instead, into another one.
        by: Operators joined by +: msg, copy, zeros for widths, stack or expand for layers. By default
            msg, and copy for a Hugging Face folder, which cannot hold gates. Or, without --to, one
            operator with all its options: "copy(mlp=2048, shares=equal)", or several:
            "chain(copy(mlp=9), stack(layers=(0, 1, 1), branch=zero))".
        dtype: The dtype to write to a Hugging Face folder. By default that of the source, and float32 if
            that has 16 bits.
        shard: The largest size of a file of weights in a Hugging Face folder, in GB.
        seed: The seed of the random draws.
    """
    allow_packages(allow)
    if dtype is not None and from_hf is None:
        raise GrowjaxError("dtype: only with --from-hf; a checkpoint of ours keeps its own")
    if (checkpoint is None) == (from_hf is None):
        raise GrowjaxError("grow: expected one of CHECKPOINT and --from-hf")
    if from_hf is not None:
        from growjax.train.pretrained import grow_pretrained

        with _progress() as progress:
            certificate = grow_pretrained(
                by or "copy",
                to,
                from_hf,
                out,
                seed=seed,
                dtype=dtype,
                shard=round(shard * 1e9),
                progress=progress,
            )
        print(certificate)
        return
    assert checkpoint is not None
    from growjax.runs.checkpoint import read_lineage
    from growjax.runs.lineage import model_of
    from growjax.runs.run import checkpoint_in
    from growjax.train.commands import grow_checkpoint, operator_of

    checkpoint = checkpoint_in(checkpoint)
    op = operator_of(by or "msg", to, model_of(read_lineage(checkpoint)))
    print(grow_checkpoint(op, checkpoint, out, seed=seed))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float | None], None]]:
    """A function that shows what is done: in one line of a terminal, or in lines of a log."""
    from rich.console import Console
    from rich.markup import escape

    console, shown = Console(stderr=True), time.monotonic()

    def log(text: str, share: float | None) -> None:
        nonlocal shown
        # Of the midst of a long part a line every ten seconds is enough
        if share is None or time.monotonic() - shown > 10:
            shown = time.monotonic()
            done = "" if share is None else f" ({share:.0%})"
            print(f"{text}{done}", file=sys.stderr, flush=True)

    if not console.is_terminal:
        yield log
        return
    with console.status("") as status:
        yield lambda text, share: status.update(
            escape(text if share is None else f"{text} ({share:.0%})")
        )


def export(
    checkpoint: tyro.conf.Positional[Path],
    out: Path,
    source: Path | None = None,
    tokenizer: str | None = None,
    window: int | None = None,
    dtype: str | None = None,
    allow: Allow = (),
) -> None:
    """Write a run or a checkpoint as a folder that transformers loads, with tokenizer and special ids.

    Args:
        checkpoint: The folder of a run (its last checkpoint) or of one checkpoint.
        out: The folder to write; it must not exist.
        source: The Hugging Face folder that the model came from; by default the one that the run started
            from. Its other files are copied.
        tokenizer: "bytes", a file or a folder; by default that of the run.
        window: The most tokens that the model reads, for models without a limit of their own; by default
            the longest window of the run.
        dtype: The dtype of the parameters to write; by default that of the model.
    """
    allow_packages(allow)
    from growjax.train.export import export_checkpoint

    export_checkpoint(
        checkpoint, out, source=source, tokenizer=tokenizer, window=window, dtype=dtype
    )
    print(out)


def certify(
    checkpoint: tyro.conf.Positional[Path],
    to: dict[str, int] = {},  # noqa: B006 (never changed; tyro shows it)
    by: str = "msg",
    seed: int = 0,
    allow: Allow = (),
) -> None:
    """Print the certificate of growing a checkpoint, without writing anything.

    Args:
        checkpoint: The folder of a run (its last checkpoint) or of one checkpoint.
        to: Axes and the sizes to reach, such as: --to mlp 2048 embed 384.
        by: Operators joined by +: msg, copy, zeros for widths, stack for layers; or, without --to, one
            operator with all its options, as for grow.
        seed: The seed of the random draws.
    """
    allow_packages(allow)
    from growjax.gates import ungated
    from growjax.runs.lineage import load_model
    from growjax.train.commands import certify_model, operator_of

    model = ungated(load_model(checkpoint)[0])
    certificate = certify_model(operator_of(by, to, model), model, seed=seed)
    print(certificate)
    if not certificate.passed:
        sys.exit(1)


def inspect(path: tyro.conf.Positional[Path], allow: Allow = ()) -> None:
    """Print the lineage of a checkpoint (of a run, its last one) and its arrays.

    Args:
        path: The folder of a checkpoint, of a run, or of a Hugging Face model.
    """
    allow_packages(allow)
    from rich.console import Console

    from growjax.train.commands import describe

    describe(path, Console())


def families() -> None:
    """List the families of Hugging Face checkpoints, and what of each can be grown."""
    from rich.console import Console
    from rich.table import Table

    from growjax.hf.convert import FAMILIES

    table = Table("model_type", "checkpoints", "grows", box=None, pad_edge=False)
    for name, family in FAMILIES.items():
        table.add_row(name, family.members, family.growth)
    Console().print(table)


def evaluate(
    checkpoint: tyro.conf.Positional[Path | None] = None,
    tasks: tuple[str, ...] = (),
    data: Path | None = None,
    text: tuple[Path, ...] = (),
    tokenizer: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    longest: int | None = None,
    seed: int = 0,
    seeds: int = 5,
    rate: float = 5e-5,
    batch: int = 32,
    epochs: int | None = None,
    length: int = 128,
    include: Path | None = None,
    out: Path = Path("eval.json"),
    allow: Allow = (),
) -> None:
    """Score a checkpoint on some tasks, print a table and write the numbers as JSON.

    Args:
        checkpoint: The folder of a run, of one checkpoint, or of a Hugging Face model.
        tasks: Names of tasks; `growjax eval --tasks` lists them. Any other name is one of lm-eval.
            A number of examples to show may follow it, as in qa/nq_open@5.
        data: The folder with glue, superglue, squad, blimp and qa in it.
        text: Files of text for bpb.
        tokenizer: "bytes" or a file; by default the one that the model was trained with.
        shots: The number of solved examples to show before a question.
        limit: The most pairs, problems or questions of a task to use.
        longest: The most tokens to read at once, for models without a limit of their own.
        seed: The seed of problems, masks and examples.
        seeds: The number of times to fine-tune, with seeds 0, 1, ...
        rate: The highest learning rate of fine-tuning.
        batch: Examples a step of fine-tuning.
        epochs: Epochs of fine-tuning; by default 3, or 5 below 10,000 examples.
        length: The longest input of fine-tuning, in tokens.
        include: A folder of task definitions for lm-eval.
        out: The file to write; it must not exist.
    """
    allow_packages(allow)
    from rich.console import Console

    from growjax.evals import Recipe, Settings
    from growjax.evals.commands import eval_checkpoint, list_tasks

    if not tasks:
        list_tasks(Console())
        return
    if checkpoint is None:
        raise GrowjaxError(
            "eval: expected CHECKPOINT, a run, one checkpoint or a Hugging Face folder"
        )
    settings = Settings(
        data=data,
        texts=text,
        shots=shots,
        limit=limit,
        seed=seed,
        recipe=Recipe(batch=batch, rate=rate, epochs=epochs, length=length),
        seeds=tuple(range(seeds)),
        longest=longest,
        include=include,
    )
    eval_checkpoint(checkpoint, tasks, settings, tokenizer=tokenizer, out=out, console=Console())
