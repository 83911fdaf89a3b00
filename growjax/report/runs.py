"""The folders of runs as arms, and one page about some of them."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from growjax.budget import Outcome, decayed
from growjax.cost import parameters
from growjax.errors import DataError
from growjax.plan.plan import Plan
from growjax.report.arms import Arm, Part, fixed_size
from growjax.report.figures import Line, lines_figure, look, loss_figure, unit_of
from growjax.report.page import Plot, Table, write_page
from growjax.report.tables import number
from growjax.runs.run import Run


Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Trained:
    """The contents of a run's folder: its plan, and the rows of its journal, each step once."""

    run: Run
    plan: Plan
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.run.folder.name

    @functools.cached_property
    def steps(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == "step"]

    @property
    def growths(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == "growth"]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The steps with a held-out evaluation."""
        return [row for row in self.steps if row["held_out"] is not None]

    @property
    def last(self) -> dict[str, Any]:
        return self.steps[-1]

    def points(self, x: str, y: str) -> Points:
        """Pairs `(row[x], row[y])` of the steps that have both numbers."""
        pairs = [(row.get(x), row.get(y)) for row in self.steps]
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    def rate_at_end(self) -> float:
        """The learning rate at the end of the schedule, divided by the highest rate of the run.

        Not by the peak of the plan, which a run may never reach.
        """
        return self.plan.learning_rate(self.plan.cost) / max(row["rate"] for row in self.steps)

    def outcome(self, arm: str, charge: str = "spent") -> Outcome:
        """The final score and loss curve, charged by the plan's clock ("spent") or by "flops"."""
        held_out = self.run.held_out()
        windows = None
        # One window says nothing of how losses differ between windows
        if held_out is not None and len(held_out[0].sums) > 1:
            windows = np.stack([held_out[0].sums, held_out[0].weights], axis=1)
        # A trigger may end a stage at another step in each run; what a run was allowed is the same
        plan, curve = self.plan.unended, self.points(charge, "held_out")
        by_clock = charge == "spent"
        return Outcome(
            arm=arm,
            seed=plan.seed,
            budget=plan.cost / plan.clock.per_unit if by_clock else plan.flops,
            clock=plan.clock.identity if by_clock else "FLOPs",
            spent=float(curve[-1][0]),
            score=curve[-1][1],
            decayed=decayed(self.rate_at_end(), 1.0),
            curve=tuple(curve),
            windows=windows,
        )


def arm_of(
    runs: Sequence[Trained], name: str = "", *, charge: str = "spent", paths: bool = False
) -> Arm:
    """The runs of one plan as an arm, by default with the name of the first run's folder.

    `charge` is as in `Trained.outcome`, and `paths` as in `Plan.timeline`.
    """
    first = runs[0]
    plan, name = first.plan, name or first.name
    unit, spent = (plan.clock.per_unit, "spent") if charge == "spent" else (1, "flops")
    stages = []
    for era in plan.timeline(paths=paths):
        start, stop = (x / unit for x in getattr(era, spent))
        # An unfinished run has not reached all of its stages
        if start < first.last[charge]:
            stages.append(Part(era.label, start, min(stop, first.last[charge])))
    return Arm(
        name,
        tuple(run.outcome(name, charge) for run in runs),
        parameters=parameters(plan.spans[-1].model),
        fixed=fixed_size(plan),
        stages=tuple(stages),
        flops=tuple(float(run.last["flops"]) for run in runs),
        seconds=tuple(run.last["seconds"] for run in runs),
        unit=plan.clock.unit if charge == "spent" else "FLOPs",
    )


def read_run(folder: str | os.PathLike[str]) -> Trained:
    """Read one run; raises `DataError` for a folder without a journal."""
    run = Run(folder)
    return Trained(run, run.plan(), run.rows())


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    title: str = "",
    answer: Sequence[str] = (),
    target: str | None = None,
    per: str = "token",
    paths: bool = False,
    plots: Sequence[Plot] = (),
    tables: Sequence[Table] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write a page about runs: losses against FLOPs, tokens and seconds, stages, growths and speed.

    **Arguments**

    - `answer`: the sentences at the top; by default, they name the run with the lowest loss.
    - `target`: the run whose final loss a line marks.
    - `per`: the unit of text that a loss is divided by.
    - `paths`: show each length of a path schedule as a stage of its own.
    - `plots`, `tables`, `notes`: further ones, placed before those of every report.

    Raises `DataError` for a folder without a journal, or of a run without an evaluation.

    **Example**

        write_report(["runs/scratch", "runs/grown"], "report.html")
    """
    trained = [read_run(run) for run in runs]
    if not trained:
        raise DataError("runs: expected at least one folder of a run")
    for run in trained:
        if not run.evaluations:
            raise DataError(f"{run.run}: nothing was evaluated in it yet")
    arms = [arm_of([run], charge="flops", paths=paths) for run in trained]
    nats = f"held-out loss (nats per {per})"
    divisor, flops = unit_of(arms)
    looks = [look(n) for n in range(len(trained))]

    def lines(x: str, y: str, *, smooth: bool = False, unit: float = 1.0) -> list[Line]:
        drawn = []
        for run, style in zip(trained, looks, strict=True):
            points = run.points(x, y)
            points = running_mean(points) if smooth else points
            drawn.append(Line(run.name, [(a / unit, b) for a, b in points], style))
        return drawn

    plots = [
        Plot(
            "Held-out loss against cost",
            loss_figure(arms, target=target, per=per),
            "The strip names the stages; a tick on a curve is where one begins."
            + (f" The thin line is the final loss of {target}." if target else ""),
        ),
        *plots,
        Plot(
            "Held-out loss against tokens",
            lines_figure(lines("tokens", "held_out"), "training tokens", nats),
            "The same losses.",
        ),
        Plot(
            "Held-out loss against time",
            lines_figure(lines("seconds", "held_out"), "seconds of training", nats),
            "The same losses. Seconds depend on what else the machine did.",
        ),
        Plot(
            "Training loss",
            lines_figure(
                lines("flops", "loss", smooth=True, unit=divisor),
                flops,
                f"training loss (nats per {per})",
            ),
            "Of the part that was trained, on its batch; a running mean over a fiftieth of the run.",
        ),
        Plot(
            "Speed",
            lines_figure(
                lines("tokens", "tokens_per_second", smooth=True),
                "training tokens",
                "tokens per second",
            ),
            "Of each step, as a running mean. A step that waited for data shows as a dip.",
        ),
    ]
    tables = [*tables, results_table(trained), *_scores_table(trained), *_growth_table(trained)]
    title = title or ", ".join(run.name for run in trained)
    return write_page(
        out, title, plots, tables, [*notes, *_NOTES], answer=answer or [_lowest(arms, per)]
    )


_NOTES = (
    "FLOPs are model FLOPs: the matrix products of a forward pass, counted off the traced program, times "
    "three. Norms, softmax, the optimizer and recomputation are not counted, for any run.",
    "Seconds are those spent training, over all sessions of a run, without compiling, growing, "
    "evaluating and saving.",
    "Held-out losses are of the whole model, also while a part of it is trained. Ends of runs compare if "
    "their learning rates are decayed; points before the end do not.",
    "The loss before and after a growth is that of one held-out batch; what an operator promises is "
    "checked there. An approximate one, such as stacking, promises nothing, and a jump is expected.",
)


def _lowest(arms: Sequence[Arm], per: str) -> str:
    """A sentence that names the run with the lowest loss, and the limits of comparing single runs."""
    best, *others = sorted(arms, key=lambda arm: arm.loss)
    text = f"The lowest held-out loss is that of {best.name}: {best.loss:.4f} nats per {per}"
    if not others:
        return f"{best.name} ended at a held-out loss of {best.loss:.4f} nats per {per}."
    if best.cost > 1.01 * min(arm.cost for arm in others):
        text += f", for {best.cost / others[0].cost:.2f} times the FLOPs of {others[0].name}"
    return (
        f"{text}, {others[0].loss - best.loss:.4f} below {others[0].name}. "
        "This page compares runs one by one; `growjax compare` compares several seeds with a baseline."
    )


def running_mean(points: Points) -> Points:
    """A running mean over a fiftieth of the points."""
    width = max(len(points) // 50, 1)
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    return [
        (points[i][0], (sums[i + 1] - sums[max(i + 1 - width, 0)]) / min(width, i + 1))
        for i in range(len(points))
    ]


# Tables ------------------------------------------------------------------------------------------


def results_table(runs: Sequence[Trained]) -> Table:
    """A table of the final loss and the cost of each run."""
    heads = ("run", "held-out loss", "FLOPs", "tokens", "seconds", "waited for data", "finished")
    cells = [
        [
            run.name,
            f"{run.evaluations[-1]['held_out']:.4f}",
            f"{run.last['flops']:.4g}",
            f"{run.last['tokens']:,}",
            f"{run.last['seconds']:.0f}",
            f"{sum(row['waited'] for row in run.steps):.1f}",
            "yes" if run.run.finished else "no",
        ]
        for run in runs
    ]
    return Table("Results", heads, cells, "Losses in nats; seconds of training.")


def _scores_table(runs: Sequence[Trained]) -> list[Table]:
    scores = [run.evaluations[-1].get("scores") or {} for run in runs]
    names = list(dict.fromkeys(name for row in scores for name in row))
    if not names:
        return []
    cells = [
        [run.name, *(number(row.get(name), ".4g") for name in names)]
        for run, row in zip(runs, scores, strict=True)
    ]
    caption = "What the runs' hooks returned at their last evaluation."
    return [Table("Scores", ("run", *names), cells, caption)]


def _growth_table(runs: Sequence[Trained]) -> list[Table]:
    cells = [
        [
            f"{run.name}: {', '.join(f'{axis} {m} to {n}' for axis, (m, n) in row['grew'].items())}",
            row["crossing"]["exactness"],
            f"{row['step']}",
            f"{row['crossing']['before']:.5f}",
            f"{row['crossing']['after']:.5f}",
            f"{row['crossing']['change']:.2g}",
            f"{row['stall']:.2f}",
        ]
        for run in runs
        for row in run.growths
    ]
    if not cells:
        return []
    heads = ("growth", "promise", "before step", "loss before", "after", "change", "stall (s)")
    caption = (
        "Change is the mean absolute change of a token's loss; stall: how long training waited."
    )
    return [Table("Growth", heads, cells, caption)]
