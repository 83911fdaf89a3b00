"""Folders of runs compared: a table, a verdict in words, and a page."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from growjax.budget import Outcome, decayed
from growjax.cost import parameters
from growjax.errors import BudgetError, raise_all
from growjax.plan.plan import Plan
from growjax.report.figures import (
    Curve,
    Ends,
    curves_figure,
    differences_figure,
    ends_figure,
    look,
    scale,
)
from growjax.report.page import Plot, Table, write_page
from growjax.report.standing import (
    Arm,
    Standing,
    answer,
    arms_table,
    bars,
    fixed_size,
    held_table,
    stand,
)
from growjax.runs.run import Run
from growjax.values import to_dict


# Arms of costs that are closer than this have no figure of losses against cost
_APART = 1.2


class Finished(NamedTuple):
    """What one finished run's folder says of it.

    `recipe` is its plan without what differs between seeds; `judged` is what it was judged by, in words
    that tell one text, objective and set of windows from another.
    """

    folder: Path
    plan: Plan
    recipe: str
    outcome: Outcome
    judged: dict[str, str]
    rate: float
    seconds: float


def compare_runs(
    folders: Sequence[str | os.PathLike[str]],
    *,
    out: str | Path | None = None,
    baseline: str | None = None,
    margin: float | None = None,
    console: Console | None = None,
) -> Standing:
    """Hold the runs in some folders against the frontier of those that train one fixed size.

    Runs of one plan that differ in the seed are one arm. Whether a learning rate is decayed is read off
    the run: where its schedule ends, over the highest rate that it had.

    **Arguments**

    - `out`: where to write a page; none by default.
    - `baseline`: the name of an arm to hold the others against, instead of all fixed sizes.
    - `margin`: a difference within it counts as none, in nats; see `growjax.budget.compare`.
    - `console`: where to print the verdict and the tables; nothing is printed by default.

    Raises `BudgetError` that names every run that was not finished, and the data, held-out windows and
    clocks if there are several; `DataError` for a folder without a journal.

    **Example**

        compare_runs(["runs/small-0", "runs/grown-0"], out="compare.html").held[0].equal.verdict
    """
    runs, faults = [], []
    for folder in folders:
        try:
            runs.append(read_finished(folder))
        except BudgetError as error:
            faults.append(str(error))
    raise_all(BudgetError, "these runs cannot be compared:", [*faults, *_faults(runs)])
    plans = {arm.name: (arm, plan) for arm, plan in _arms(runs)}
    if baseline is not None and baseline not in plans:
        raise BudgetError(f"baseline: {baseline!r} is no arm; there are {', '.join(plans)}")
    arms = [arm for arm, _ in plans.values()]
    if baseline is not None:
        arms = [arm._replace(fixed=arm.name == baseline) for arm in arms]
    standing = stand(arms, margin=margin)
    tables = _tables(standing, runs)
    if console is not None:
        for sentence in answer(standing):
            console.print(sentence, markup=False, highlight=False)
        for table in tables:
            console.print(_rich(table))
    if out is not None:
        starts = {name: _starts(plan) for name, (_, plan) in plans.items()}
        _write(Path(out), standing, runs[0].plan.clock.unit, starts, tables)
        if console is not None:
            console.print(f"page: {out}", markup=False)
    return standing


def read_finished(folder: str | os.PathLike[str]) -> Finished:
    """Read one run; raises `BudgetError` if it has not reached the end of its plan."""
    run = Run(folder)
    plan, rows = run.plan(), run.rows()
    steps = [row for row in rows if row["kind"] == "step"]
    if not run.finished or not steps:
        done = steps[-1]["step"] + 1 if steps else 0
        raise BudgetError(
            f"{folder}: it has done {done} of {plan.steps} steps; `growjax train {run.plan_file} --run "
            f"{folder}` goes on with it"
        )
    marks = [(float(row["spent"]), row["held_out"]) for row in steps if row["held_out"] is not None]
    kept = run.held_out()
    windows = None if kept is None else np.stack([kept[0].sums, kept[0].weights], axis=1)
    # The schedule's end over the highest rate of the run: what the plan calls its peak may never come
    last, peak = plan.learning_rate(plan.cost), max(row["rate"] for row in steps)
    outcome = Outcome(
        arm=plan.name,
        seed=plan.seed,
        budget=plan.cost / plan.clock.per_unit,
        clock=plan.clock.identity,
        spent=marks[-1][0],
        score=marks[-1][1],
        decayed=decayed(last, peak),
        curve=tuple(marks),
        windows=windows,
    )
    judged = {
        "data": _data(run, {} if kept is None else kept[1]),
        "objective": json.dumps(to_dict(plan.objective), sort_keys=True),
        "held-out windows on the way": ", ".join(
            sorted({str(row.get("held_out")) for row in rows if row["kind"] == "begin"})
        ),
    }
    return Finished(
        Path(folder), plan, _recipe(plan), outcome, judged, last / peak, steps[-1]["seconds"]
    )


def _data(run: Run, about: Mapping[str, Any]) -> str:
    """The digest of what a run trained on, or what its plan names if nothing else was kept of it."""
    if "data" in about:
        return about["data"]
    if run.last() is not None:
        from growjax.runs.checkpoint import read_lineage  # Orbax takes a second to import

        return read_lineage(run.checkpoint())["data"]
    return f"{json.dumps(to_dict(run.plan().data), sort_keys=True)} as {run.plan().tokenizer}"


def _recipe(plan: Plan) -> str:
    """The plan as text, without its seed and where it lies: equal for the runs of one arm."""
    saved = to_dict(plan)
    for name in ("seed", "layout", "data"):
        saved.pop(name, None)
    if saved.get("start"):
        saved["start"].pop("folder", None)
    return json.dumps(saved, sort_keys=True)


def _faults(runs: Sequence[Finished]) -> Iterator[str]:
    if not runs:
        yield "runs: expected the folders of at least one"
        return
    for name, values in {
        "clocks": [run.outcome.clock for run in runs],
        **{key: [run.judged[key] for run in runs] for key in runs[0].judged},
    }.items():
        places: dict[str, list[Path]] = {}
        for run, value in zip(runs, values, strict=True):
            places.setdefault(value, []).append(run.folder)
        if len(places) > 1:
            yield f"{name} differ: " + "; ".join(
                f"{value} ({', '.join(map(str, folders))})" for value, folders in places.items()
            )
    seeds: dict[tuple[str, int], list[Path]] = {}
    for run in runs:
        seeds.setdefault((run.recipe, run.plan.seed), []).append(run.folder)
    for (_, seed), folders in seeds.items():
        if len(folders) > 1:
            yield f"two runs of one plan and of seed {seed}: {', '.join(map(str, folders))}"


def _arms(runs: Sequence[Finished]) -> Iterator[tuple[Arm, Plan]]:
    """The runs of each recipe; a name that two recipes share gets the first folder's as well."""
    recipes: dict[str, list[Finished]] = {}
    for run in runs:
        recipes.setdefault(run.recipe, []).append(run)
    names = [found[0].plan.name for found in recipes.values()]
    for found in recipes.values():
        plan = found[0].plan
        name = plan.name
        if names.count(name) > 1:
            name = f"{name} ({found[0].folder.name})"
        outcomes = tuple(dataclasses.replace(run.outcome, arm=name) for run in found)
        yield Arm(name, outcomes, parameters(plan.spans[-1].model), fixed_size(plan)), plan


# What is shown -----------------------------------------------------------------------------------


def _tables(standing: Standing, runs: Sequence[Finished]) -> list[Table]:
    tables = []
    if standing.held:
        tables.append(held_table(standing.held, "Against the best fixed size at equal cost"))
    if standing.fixed:
        tables.append(arms_table(standing.fixed, "Fixed sizes"))
    else:
        tables.append(arms_table(standing.arms, "Arms"))
    columns = ("run", "arm", "seed", "loss (nats)", "cost", "rate at the end", "seconds")
    cells = [
        [
            str(run.folder),
            run.plan.name,
            str(run.plan.seed),
            f"{run.outcome.score:.4f}",
            f"{run.outcome.spent:.4g}",
            f"{run.rate:.1%} of its peak",
            f"{run.seconds:.0f}",
        ]
        for run in runs
    ]
    unit = runs[0].plan.clock.unit
    caption = (
        f"Costs are {unit} as charged by {runs[0].outcome.clock}; losses are of the evaluations on the "
        "way. Seconds are those of training."
    )
    return [*tables, Table("Runs", columns, cells, caption)]


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, caption=table.caption or None)
    for n, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if n else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*(cell.replace("[", r"\[") for cell in row))
    return shown


def _write(
    path: Path,
    standing: Standing,
    unit: str,
    starts: Mapping[str, Sequence[float]],
    tables: Sequence[Table],
) -> None:
    divisor, name = 1.0, "reference seconds"
    if unit == "FLOPs":
        divisor, name = scale(max(arm.cost for arm in standing.arms))
        name = f"training {name}"
    looks = {arm.name: look(n) for n, arm in enumerate(standing.arms)}
    plots = []
    if standing.held:
        plots.append(
            Plot(
                "Against the best fixed size at equal cost",
                differences_figure(bars(standing), "the best fixed size at its cost"),
                "Means with 95% intervals; a small dot is a seed. Green is better, orange is worse; grey "
                "is neither.",
            )
        )
    curves = [
        Curve(arm.name, _mean(arm.outcomes), starts[arm.name], looks[arm.name])
        for arm in standing.arms
    ]
    plots.append(
        Plot(
            "Held-out loss against cost",
            curves_figure(curves, (divisor, name)),
            "Means over seeds; a bar across a line is where a stage begins. Only ends of decayed runs "
            "compare with ends.",
        )
    )
    costs = [arm.cost for arm in standing.arms]
    if standing.frontier is not None and max(costs) > _APART * min(costs):
        ends = [
            Ends(arm.name, [(arm.cost, [o.score for o in arm.outcomes])], looks[arm.name])
            for arm in standing.arms
        ]
        envelope = [(p.cost, p.loss) for p in standing.frontier.envelope()]
        plots.append(
            Plot(
                "Ends",
                ends_figure(ends, envelope, (divisor, name)),
                "A dot is a mean, a small dot a seed. The wide line is the lowest loss of any fixed size "
                "for no more cost, decayed or not.",
            )
        )
    names = ", ".join(arm.name for arm in standing.arms)
    write_page(path, f"Compared: {names}", plots, tables, _NOTES, answer=answer(standing))


def _mean(outcomes: Sequence[Outcome]) -> list[tuple[float, float]]:
    """The means of the seeds' evaluations, mark by mark."""
    curves = zip(*(o.curve for o in outcomes), strict=False)
    return [tuple(np.mean(points, axis=0).tolist()) for points in curves]


def _starts(plan: Plan) -> list[float]:
    """What had been spent at the beginning of each stage but the first."""
    return [era.spent[0] / plan.clock.per_unit for era in plan.timeline()[1:]]


_NOTES = (
    "An arm is the runs of one plan that differ in the seed. A fixed size trains all of one model, born "
    "for the run, from the first step to the last; the frontier is the lowest loss that any of those was "
    "seen at for no more cost (1% more counts as the same), at its end or on its way, decayed or not.",
    "Differences are paired by seed, and by held-out window where the runs kept them. An interval over "
    "seeds alone leaves out what another held-out text would have said.",
    "No difference found is not an equality: the interval says what is still possible. Equivalent takes "
    "two one-sided tests of a margin that was stated.",
    "A speed-up is how many times an arm's cost the frontier needs for the arm's loss; a bound where the "
    "frontier never got there.",
)
