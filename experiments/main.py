"""The command line of all studies: run cells, in pieces if need be, and report on those that ran."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from experiments.study import SIZES, Inputs, Study, run
from experiments.text import BETWEEN
from growjax.data import Text
from growjax.train import save_plan


def main(about: Study) -> None:
    """Parse and run the command line of a study."""

    def study(
        size: str = "smoke",
        text: Path | None = None,
        also: tuple[str, ...] = (),
        data: Path | None = None,
        model: Path | None = None,
        examples: int | None = None,
        out: Path = Path("runs") / about.name,
        only: tuple[str, ...] = (),
        workload: tuple[str, ...] = about.workloads,
        budget: tuple[str, ...] = (),
        shard: Annotated[tuple[int, int], tyro.conf.arg(metavar="I N")] = (0, 1),
        plans: Path | None = None,
        seeds: int = 1,
        report: bool = False,
        tune: bool = False,
        again: bool = False,
    ) -> None:
        """Run the cells of a study that have no result yet, and report on all that do.

        Args:
            size: smoke (a minute), small (hours on two cores, in pieces) or paper (for a pod).
            text: a folder with train.txt and valid.txt; Python's standard library if there is none.
            also: further texts to judge by, as NAME=PATH.
            data: a folder of tasks: blimp, to judge by minimal pairs, or GLUE.
            model: a pre-trained model as Hugging Face has it, with its tokenizer.
            examples: the training rows of every task, instead of those of the size.
            out: where results, summary and page go.
            only: the arms to run; all if there is none, but for those that need another library.
            workload: the workloads to run.
            budget: the budgets to run; all if there is none.
            shard: run the seeds that are I modulo N, so that N processes share the work.
            plans: run nothing; write the plans of its arms there, for `growjax plan`, `growjax train` and
                `experiments/tpu/run.sh`, with the folder --text as their data, which need not be here. In
                the folder "second" in it are arms that choose by a second model, with the plans of these.
            seeds: the number of seeds that --plans writes plans of.
            report: run nothing; report on what is there.
            tune: run the tuning ledger instead: every method at four learning rates, one seed.
            again: run cells again that have a result but no losses by window, and add only these.
        """
        if size not in about.seeds:
            raise SystemExit(f"size: expected one of {', '.join(SIZES)}, got {size!r}")
        unknown = set(workload) - set(about.workloads)
        if unknown:
            raise SystemExit(
                f"workload: expected some of {', '.join(about.workloads)}, got {', '.join(unknown)}"
            )
        if tune and about.trials is None:
            raise SystemExit("tune: this study compares arms at one learning rate and tunes none")
        given: dict[str, Any] = {
            "text": text,
            "also": {k: Path(v) for k, _, v in (item.partition("=") for item in also)},
            "data": data,
            "model": model,
            "examples": examples,
            "plans": plans,
            "again": again,
        }
        for name, value in given.items():
            if value and name not in about.uses:
                raise SystemExit(f"{name}: means nothing to this study")
        console = Console()
        if plans is not None:
            _write_plans(about, size, workload, only, budget, seeds, text, plans)
            return
        fields = ("text", "also", "data", "model", "examples")
        inputs = Inputs(size, out, **{name: given[name] for name in fields})
        if not report:
            cache = out / "cache" / "programs"
            jax.config.update("jax_compilation_cache_dir", str(cache.absolute()))
            shared = about.open(inputs)
            cells = about.trials if tune and about.trials else about.cells
            # A seed is finished before the next one starts, so that a stopped study has whole seeds
            for seed in range(shard[0], 1 if tune else about.seeds[size], shard[1]):
                todo = _chosen((c for w in workload for c in cells(size, w, seed)), only, budget)
                run(todo, shared, inputs.results, console, again=shared.lacks if again else None)
        for row in about.report(inputs.results):
            estimate = "-" if row.estimate is None else format(row.estimate, "+.4f")
            console.print(
                f"{row.workload} {row.budget}: {row.question}: {estimate} ({row.verdict}, "
                f"{row.seeds} seeds)",
                markup=False,
            )
        console.print(f"report: {out / 'report.html'}")

    tyro.cli(study, description=__doc__)


def _write_plans(
    about: Study,
    size: str,
    workloads: tuple[str, ...],
    only: tuple[str, ...],
    budgets: tuple[str, ...],
    seeds: int,
    text: Path | None,
    folder: Path,
) -> None:
    """Write the plans of the cells that the other arguments choose, each under a name of its own."""
    data: dict[str, Any] = {}
    if text is not None:
        data["data"] = Text(str(text / "train.txt"), split=BETWEEN)
        data["validation"] = Text(str(text / "valid.txt"), split=BETWEEN)
    for seed in range(seeds):
        cells: list[Any] = [cell for w in workloads for cell in about.cells(size, w, seed)]
        for cell in _chosen(cells, only, budgets):
            name = f"{cell.workload}-{cell.budget}-{cell.plan.name}" + (f"-{seed}" if seed else "")
            name = name.replace(" ", "_").replace("/", "_")
            path = (folder if cell.reference is None else folder / "second") / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_plan(dataclasses.replace(cell.plan, **data), path)
            if cell.reference is not None:
                save_plan(
                    dataclasses.replace(cell.reference, **data), path.with_suffix(".reference.json")
                )


def _chosen(cells: Iterable[Any], only: tuple[str, ...], budgets: tuple[str, ...]) -> list[Any]:
    """The cells of some arms and budgets; without names of arms, all that are not optional."""
    return [
        cell
        for cell in cells
        if (cell.key[2] in only if only else not cell.optional)
        and (not budgets or cell.key[1] in budgets)
    ]
