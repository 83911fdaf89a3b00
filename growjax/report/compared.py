"""Folders of runs compared: a table, a verdict in words, and a page."""

import dataclasses
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from growjax.budget import Frontier
from growjax.errors import BudgetError, raise_all
from growjax.plan.plan import Plan
from growjax.report.arms import Arm
from growjax.report.comparisons import against_frontier, frontier_of
from growjax.report.figures import differences_figure, ends_figure, looks_of, loss_figure
from growjax.report.page import Plot, Table, write_page
from growjax.report.rows import AgainstFrontier
from growjax.report.runs import Trained, arm_of, read_run
from growjax.report.tables import arms_table, bars, frontier_table, rich_table
from growjax.report.words import answer
from growjax.runs.run import Run
from growjax.values import allow_option, to_dict


# The ratio of the largest to the smallest cost, above which the page has a figure of final losses by cost
_APART = 1.2


@dataclasses.dataclass(frozen=True)
class Compared:
    """Arms, the frontier of those of a fixed size (None without such), and a row for each other arm."""

    arms: tuple[Arm, ...]
    frontier: Frontier | None
    rows: tuple[AgainstFrontier, ...]


def compare_runs(
    folders: Sequence[str | os.PathLike[str]],
    *,
    out: str | Path | None = None,
    baseline: str | None = None,
    margin: float | None = None,
    console: Console | None = None,
) -> Compared:
    """Compare the runs in some folders with the frontier of those that train one fixed size.

    Runs of one plan that differ in the seed are one arm. A run counts as decayed by the ratio of the
    learning rate at the end of its schedule to the highest rate of the run.

    **Arguments**

    - `out`: the path of the page to write; none by default.
    - `baseline`: the name of an arm to compare the others with, instead of all fixed sizes.
    - `margin`: differences up to it, in nats, count as equivalent; see `growjax.budget.compare`.
    - `console`: prints the verdict and the tables; nothing is printed by default.

    Raises `BudgetError` that names every unfinished run, and the data, held-out windows and clocks if
    runs differ in them; `DataError` for a folder without a journal.

    **Example**

        compare_runs(["runs/small-0", "runs/grown-0"], out="compare.html").rows[0].verdict
    """
    runs, errors = [], []
    for folder in folders:
        try:
            runs.append(read_finished(folder))
        except BudgetError as error:
            errors.append(str(error))
    raise_all(BudgetError, "these runs cannot be compared:", [*errors, *_faults(runs)])
    arms = _arms(runs)
    names = [arm.name for arm in arms]
    if baseline is not None and baseline not in names:
        raise BudgetError(f"baseline: {baseline!r} is no arm; there are {', '.join(names)}")
    if baseline is not None:
        arms = [dataclasses.replace(arm, fixed=arm.name == baseline) for arm in arms]
    compared = Compared(
        tuple(arms), frontier_of(arms), tuple(against_frontier(arms, margin=margin))
    )
    tables = _tables(compared, runs)
    if console is not None:
        for sentence in answer(compared.arms, compared.rows):
            console.print(sentence, markup=False, highlight=False)
        for table in tables:
            console.print(rich_table(table))
    if out is not None:
        _write(Path(out), compared, tables)
        if console is not None:
            console.print(f"page: {out}", markup=False)
    return compared


def read_finished(folder: str | os.PathLike[str]) -> Trained:
    """Read one run; raises `BudgetError` if it has not reached the end of its plan."""
    run = read_run(folder)
    if not run.run.finished or not run.steps:
        done = run.last["step"] + 1 if run.steps else 0
        plan_file, path = shlex.quote(str(run.run.plan_file)), shlex.quote(str(folder))
        allowed = allow_option(to_dict(run.plan))
        raise BudgetError(
            f"{folder}: it has done {done} of {run.plan.steps} steps; `growjax train {plan_file} --run "
            f"{path}{allowed}` goes on with it"
        )
    return run


def _conditions(run: Trained) -> dict[str, str]:
    """The conditions that compared runs must share, as text: clock, data, objective, held-out windows."""
    sets = {str(row.get("held_out")) for row in run.rows if row["kind"] == "begin"}
    return {
        "clocks": run.plan.clock.identity,
        "data": _data(run.run),
        "objective": json.dumps(to_dict(run.plan.objective), sort_keys=True),
        "held-out windows on the way": ", ".join(sorted(sets)),
    }


def _data(run: Run) -> str:
    """The digest of a run's training data, or the data that its plan names if no digest was saved."""
    held_out = run.held_out()
    if held_out is not None and "data" in held_out[1]:
        return held_out[1]["data"]
    if run.last() is not None:
        from growjax.runs.checkpoint import read_lineage  # Orbax takes a second to import

        return read_lineage(run.checkpoint())["data"]
    return f"{json.dumps(to_dict(run.plan().data), sort_keys=True)} as {run.plan().tokenizer}"


def _recipe(plan: Plan) -> str:
    """The plan as text, without its seed, its paths and the ends that triggers gave to stages.

    Equal for all runs of an arm.
    """
    saved = to_dict(plan.unended)
    for name in ("seed", "layout", "data", "fork"):
        saved.pop(name, None)
    if saved.get("start"):
        saved["start"].pop("folder", None)
    return json.dumps(saved, sort_keys=True)


def _faults(runs: Sequence[Trained]) -> Iterator[str]:
    if not runs:
        yield "runs: expected the folders of at least one"
        return
    conditions = [_conditions(run) for run in runs]
    for name in conditions[0]:
        folders = _grouped(runs, [values[name] for values in conditions])
        if len(folders) > 1:
            yield f"{name} differ: " + "; ".join(f"{x} ({names})" for x, names in folders.items())
    pairs = [(_recipe(run.plan), run.plan.seed) for run in runs]
    for (_, seed), names in _grouped(runs, pairs).items():
        if ", " in names:
            yield f"two runs of one plan and of seed {seed}: {names}"


def _grouped(runs: Sequence[Trained], values: Sequence[Any]) -> dict[Any, str]:
    """The folders of the runs that share a value, by that value."""
    folders: dict[Any, list[str]] = {}
    for run, value in zip(runs, values, strict=True):
        folders.setdefault(value, []).append(str(run.run))
    return {value: ", ".join(names) for value, names in folders.items()}


def _arms(runs: Sequence[Trained]) -> list[Arm]:
    """An arm for the runs of each recipe; arms of one name get the name of their first folder as well."""
    recipes: dict[str, list[Trained]] = {}
    for run in runs:
        recipes.setdefault(_recipe(run.plan), []).append(run)
    names = [group[0].plan.name for group in recipes.values()]
    arms = []
    for name, group in zip(names, recipes.values(), strict=True):
        more = f" ({group[0].name})" if names.count(name) > 1 else ""
        arms.append(arm_of(group, name + more))
    return arms


# Tables and page ---------------------------------------------------------------------------------


def _tables(compared: Compared, runs: Sequence[Trained]) -> list[Table]:
    tables = []
    if compared.rows:
        tables.append(frontier_table(compared.rows, "Against the best fixed size at equal cost"))
    fixed = [arm for arm in compared.arms if arm.fixed]
    tables.append(arms_table(fixed or compared.arms, "Fixed sizes" if fixed else "Arms"))
    columns = ("run", "arm", "seed", "loss (nats)", "cost", "rate at the end", "seconds")
    cells = []
    for run in runs:
        outcome = run.outcome(run.plan.name)
        cells.append(
            [
                str(run.run),
                run.plan.name,
                str(run.plan.seed),
                f"{outcome.score:.4f}",
                f"{outcome.spent:.4g}",
                f"{run.rate_at_end():.1%} of its peak",
                f"{run.last['seconds']:.0f}",
            ]
        )
    clock = runs[0].plan.clock
    caption = (
        f"Costs are {clock.unit} as charged by {clock.identity}; losses are of the evaluations on the "
        "way. Seconds are those of training."
    )
    return [*tables, Table("Runs", columns, cells, caption)]


def _write(path: Path, compared: Compared, tables: Sequence[Table]) -> None:
    arms, looks = compared.arms, looks_of(compared.arms)
    plots = []
    if compared.rows:
        plots.append(
            Plot(
                "Against the best fixed size at equal cost",
                differences_figure(bars(compared.rows), "the best fixed size at its cost"),
                "Means with 95% intervals; a small dot is a seed. Green is better, orange is worse; grey "
                "is neither.",
            )
        )
    plots.append(
        Plot(
            "Held-out loss against cost",
            loss_figure(arms, looks=looks),
            "Means over seeds; a bar across a line is where a stage begins. Only ends of decayed runs "
            "compare with ends.",
        )
    )
    costs = [arm.cost for arm in arms]
    if compared.frontier is not None and max(costs) > _APART * min(costs):
        envelope = [(point.cost, point.loss) for point in compared.frontier.envelope()]
        plots.append(
            Plot(
                "Ends",
                ends_figure(arms, envelope, looks=looks),
                "A dot is a mean, a small dot a seed. The wide line is the lowest loss of any fixed size "
                "for no more cost, decayed or not.",
            )
        )
    title = f"Compared: {', '.join(arm.name for arm in arms)}"
    write_page(path, title, plots, tables, FRONTIER_NOTES, answer=answer(arms, compared.rows))


# How the numbers of a comparison with the frontier are made; pages of studies have them as well
FRONTIER_NOTES = (
    "An arm is the runs of one plan that differ in the seed. A fixed size trains all of one model, born "
    "for the run, from the first step to the last; the frontier is the lowest loss that any of those was "
    "seen at for no more cost (1% more counts as the same), at its end or on its way, decayed or not.",
    "Differences are paired by seed, and by held-out window where the runs kept them. An interval over "
    "seeds alone does not cover the differences between held-out texts.",
    "No difference found is not an equality: the interval says what is still possible. Equivalent takes "
    "two one-sided tests of a margin that was stated.",
    "A speed-up is how many times an arm's cost the frontier needs for the arm's loss; a bound where no "
    "fixed size reached that loss.",
)
