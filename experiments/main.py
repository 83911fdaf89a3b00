"""The command line of the studies: run cells, in pieces if need be, and report on what is there."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from experiments.study import Cell, blimp_judge, run
from experiments.summary import Study
from experiments.text import load_texts
from experiments.windows import WINDOWS
from growjax.train import save_plan


Cells = Callable[[str, Any, int], Iterable[Cell]]


def main(
    about: Study,
    cells: Cells,
    seeds: Mapping[str, int],
    workloads: tuple[str, ...],
    trials: Cells | None = None,
) -> None:
    """Parse the command line of a study and do what it says."""

    def study(
        size: str = "smoke",
        text: Path | None = None,
        also: tuple[str, ...] = (),
        data: Path | None = None,
        out: Path = Path("runs") / about.name,
        only: tuple[str, ...] = (),
        workload: tuple[str, ...] = workloads,
        budget: tuple[str, ...] = (),
        shard: Annotated[tuple[int, int], tyro.conf.arg(metavar="I N")] = (0, 1),
        plans: Path | None = None,
        report: bool = False,
        tune: bool = False,
        again: bool = False,
    ) -> None:
        """Run the cells of a study that have no result yet, and report on all that do.

        Args:
            size: smoke (a minute), small (hours on two cores, in pieces) or paper (for a pod).
            text: a folder with train.txt and valid.txt; Python's standard library if there is none.
            also: further texts to judge by, as NAME=PATH.
            data: a folder with blimp in it, to judge by minimal pairs; none if there is none.
            out: where results, summary and page go.
            only: the arms to run; all if there is none.
            workload: the kinds of model to run.
            budget: the budgets to run; all if there is none.
            shard: run the seeds that are I modulo N, so that N processes share the work.
            plans: run nothing; write the plans of seed 0 there, for `growjax plan` and `growjax train`,
                and those of second models next to them, for `growjax train --reference`.
            report: run nothing; report on what is there.
            tune: run the tuning ledger instead: every method at four learning rates, one seed.
            again: run cells again that have a result but no losses by window, and add only these.
        """
        if size not in seeds:
            raise SystemExit(f"size: expected one of {', '.join(seeds)}, got {size!r}")
        if tune and trials is None:
            raise SystemExit("tune: this study compares arms at one learning rate and tunes none")
        console = Console()
        if plans is not None:
            plans.mkdir(parents=True, exist_ok=True)
            for cell in (c for w in workload for c in cells(size, w, 0)):
                name = f"{cell.workload}-{cell.budget}-{cell.plan.name}".replace(" ", "_")
                path = plans / f"{name.replace('/', '_')}.json"
                save_plan(cell.plan, path)
                if cell.reference is not None:
                    save_plan(cell.reference, path.with_suffix(".reference.json"))
            return
        results = out / f"{size}.jsonl"
        if not report:
            cache = out / "cache"
            jax.config.update("jax_compilation_cache_dir", str((cache / "programs").absolute()))
            others = {k: Path(v) for k, _, v in (item.partition("=") for item in also)}
            texts = load_texts(text, cache, others)
            judge = None if data is None else blimp_judge(data)
            found = trials if tune and trials else cells
            # A seed is finished before the next one starts, so that what is there are whole seeds
            for seed in range(shard[0], 1 if tune else seeds[size], shard[1]):
                todo = [
                    cell
                    for w in workload
                    for cell in found(size, w, seed)
                    if (not only or cell.plan.name in only)
                    and (not budget or cell.budget in budget)
                ]
                run(todo, texts, results, console, judge, windows=WINDOWS[size], again=again)
        from experiments.page import write_summary  # matplotlib

        for row in write_summary(results, about):
            estimate = row["estimate"]
            console.print(
                f"{row['workload']} {row['budget']}: {row['question']}: "
                f"{'-' if estimate is None else format(estimate, '+.4f')} "
                f"({row['verdict']}, {row['seeds']} seeds)"
            )
        console.print(f"report: {out / 'report.html'}")

    tyro.cli(study, description=__doc__)
