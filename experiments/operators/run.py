"""The contest: operators that grow one model at one cost, against each other and fixed sizes.

`python -m experiments.operators.run --size smoke`; see the README next to this file.
"""

import functools
import shutil
from pathlib import Path
from typing import Literal

import jax
import tyro
from rich.console import Console

from experiments import study
from experiments.frontier.run import flags
from experiments.operators.cells import Shared, cells
from experiments.operators.design import DESIGNS, Contest
from experiments.operators.report import page
from experiments.operators.summary import summarise
from experiments.study import read, write_report
from experiments.text import load_texts
from experiments.windows import WindowFile
from growjax.report.rows import Row


def report(results: Path, design: Contest) -> list[Row]:
    """Write summary, page and pictures of the lines that are there."""
    return write_report(
        "operators",
        results,
        functools.partial(summarise, design=design),
        functools.partial(page, design=design),
        flags(read(results)),
    )


def run(
    size: Literal["smoke", "small"] = "smoke",
    text: Path | None = None,
    out: Path = Path("runs/operators"),
    seed: tuple[int, ...] = (),
    only: tuple[str, ...] = (),
    report_only: bool = False,
) -> None:
    """Run what has no line yet, and report on all that does.

    Args:
        size: smoke (shows that all of it runs) or small (an hour; it goes on where it was stopped).
        text: a folder with train.txt and valid.txt; Python's standard library if there is none.
        out: where results, summary and page go, and the folders of the trunks.
        seed: the seeds to run; all if there is none. Another process may take the others.
        only: the arms to run; all if there is none.
        report_only: run nothing; report on what is there.
    """
    design, console = DESIGNS[size], Console()
    results = out / f"{size}.jsonl"
    if not report_only:
        jax.config.update("jax_compilation_cache_dir", str((out / "cache" / "programs").absolute()))
        texts = load_texts(text, out / "cache")
        shared = Shared(design, texts, (out / f"{size}-runs").absolute(), WindowFile(results))
        # A seed is finished before the next one starts, so that a stopped study has whole seeds
        for number in seed or design.seeds:
            every = cells(design, number)
            study.run([c for c in every if not only or c.key[2] in only], shared, results, console)
            lines = {study.key_of(line) for line in read(results)}
            if all(cell.key in lines for cell in every):
                shutil.rmtree(shared.runs / f"trunk-{number}", ignore_errors=True)
    for row in report(results, design):
        estimate = "-" if row.estimate is None else format(row.estimate, "+.4f")
        words = f"{row.workload}, {row.question}: {estimate} ({row.verdict}, {row.seeds} seeds)"
        console.print(words, markup=False)
    console.print(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    tyro.cli(run, description=__doc__)
