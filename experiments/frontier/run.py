"""The honest frontier: fixed sizes at every cost, growths on top of them, and a held-out budget.

`python -m experiments.frontier.run --size smoke`; see the README next to this file.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import tyro
from rich.console import Console

from experiments import study
from experiments.frontier.analysis import Index, chosen
from experiments.frontier.design import DESIGNS, Design
from experiments.frontier.report import page
from experiments.frontier.summary import summarise
from experiments.frontier.tree import Member, Shared, Trial, alone, budget_name, members, tidy
from experiments.frontier.tuning import losses_of, search, settled
from experiments.study import Line, read, write_report
from experiments.text import LIBRARY, load_texts
from experiments.windows import WindowFile
from growjax.report.rows import Row


Piece = Literal["ledger", "trunks", "pilots", "family", "held-out"]
PIECES: tuple[Piece, ...] = ("ledger", "trunks", "pilots", "family", "held-out")
TREES: tuple[Piece, ...] = ("trunks", "pilots", "family")


def ledger(shared: Shared, results: Path, console: Console, sizes: Sequence[str] = ()) -> None:
    """Run the trials that are missing until the search of each size is over, smallest size first."""
    design = shared.design
    for shape in () if design.given else design.shapes:
        if sizes and str(shape) not in sizes:
            continue
        while True:
            _, missing = search(design, shape, losses_of(read(results)))
            if missing is None:
                break
            study.run([Trial(design, shape, missing)], shared, results, console)


def trees(
    shared: Shared,
    results: Path,
    console: Console,
    pieces: Sequence[str],
    *,
    seeds: Sequence[int],
    sizes: Sequence[str] = (),
    budgets: Sequence[str] = (),
) -> None:
    """Run the trunks, pilots and families of some seeds: cheap budgets first, seed after seed."""
    design = shared.design
    settings = settled(design, read(results))
    for seed in seeds:
        every = members(design, settings, seed)
        todo = [
            m
            for m in every
            if m.piece in pieces
            and (not sizes or str(m.shapes[0]) in sizes)
            and (not budgets or m.budget in budgets)
        ]
        # A fork trains what it needs, so that any order is right, and this one says most for least
        todo.sort(key=lambda m: (float(m.budget.removesuffix("x")), PIECES.index(m.piece)))
        study.run(todo, shared, results, console)
        lines = {study.key_of(line) for line in read(results)}
        if len(settings) == len(design.shapes) and all(m.key in lines for m in every):
            tidy(shared, every)


def held_out(shared: Shared, results: Path, console: Console, seeds: Sequence[int]) -> None:
    """Run the arms of the held-out budget on fresh seeds, once everything that chooses them is there."""
    design, lines = shared.design, read(results)
    picked = chosen(design, Index(lines))
    if picked is None:
        console.print("held-out: waits for every trunk and every pilot")
        return
    settings, budget = settled(design, lines), budget_name(design.held_out)
    for seed in seeds:
        runs: list[Member] = []
        for f in picked:
            if f.growing is None:
                plan = design.fixed(f.shape, design.held_out, settings[f.shape], seed)
            else:
                plan = design.grown(f.growing, f.time, design.held_out, settings, seed)
            runs.append(alone("held-out", budget, design, settings, plan))
        study.run(runs, shared, results, console)
        tidy(shared, runs)


def flags(lines: Sequence[Line]) -> str:
    """The flags that make such lines, with the name of the text in place of its path."""
    names = sorted({line["text"] for line in lines} - {LIBRARY})
    return "".join(f" --text {name}" for name in names)


def report(results: Path, design: Design) -> list[Row]:
    """Write summary, page and pictures of the lines that are there."""
    rows = functools.partial(summarise, design=design)
    return write_report(
        "frontier", results, rows, functools.partial(page, design=design), flags(read(results))
    )


def run(
    size: Literal["smoke", "small", "elsewhere"] = "smoke",
    text: Path | None = None,
    out: Path = Path("runs/frontier"),
    piece: tuple[Piece, ...] = PIECES,
    seed: tuple[int, ...] = (),
    only: tuple[str, ...] = (),
    budget: tuple[str, ...] = (),
    report_only: bool = False,
) -> None:
    """Run what has no line yet, and report on all that does.

    Args:
        size: smoke (shows that all of it runs), small (hours; it goes on where it was stopped), or
            elsewhere (whether advice holds on another text; an hour).
        text: a folder with train.txt and valid.txt; Python's standard library if there is none.
        out: where results, summary and page go, and the folders of the runs.
        piece: the pieces to run, in this order.
        seed: the seeds to run, of trunks, pilots and families or of the held-out runs; all if there is
            none. The ledger has one seed.
        only: the sizes to run, such as 2x32: those of the ledger, and those that trees are born as.
        budget: the budgets of trees to run, such as 2x; all if there is none.
        report_only: run nothing; report on what is there.
    """
    design, console = DESIGNS[size], Console()
    results = out / f"{size}.jsonl"
    unknown = sorted({*seed} - {*design.seeds, *design.fresh})
    if unknown:
        raise SystemExit(
            f"--seed: expected some of {[*design.seeds]} or {[*design.fresh]} (held-out), got {unknown}"
        )
    if not report_only:
        jax.config.update("jax_compilation_cache_dir", str((out / "cache" / "programs").absolute()))
        texts = load_texts(text, out / "cache")
        shared = Shared(design, texts, (out / f"{size}-runs").absolute(), WindowFile(results))
        for name, names in _runs(piece):
            if name == "ledger":
                ledger(shared, results, console, only)
            elif name == "held-out":
                seeds = [s for s in design.fresh if s in seed or not seed]
                held_out(shared, results, console, seeds)
            else:
                seeds = [s for s in design.seeds if s in seed or not seed]
                trees(shared, results, console, names, seeds=seeds, sizes=only, budgets=budget)
    for row in report(results, design):
        estimate = "-" if row.estimate is None else format(row.estimate, "+.4f")
        words = f"{row.budget} {row.question}: {estimate} ({row.verdict}, {row.seeds} seeds)"
        console.print(words.strip(), markup=False)
    console.print(f"report: {out / 'report.html'}")


def _runs(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, tuple[Piece, ...]]]:
    """Pieces in their order; those of trees together, since they share their runs."""
    of_trees: list[Piece] = [p for p in TREES if p in pieces]
    if "ledger" in pieces:
        yield "ledger", ("ledger",)
    if of_trees:
        yield of_trees[0], tuple(of_trees)
    if "held-out" in pieces:
        yield "held-out", ("held-out",)


if __name__ == "__main__":
    tyro.cli(run, description=__doc__)
