"""The runs of the study: trees of plans in folders, which resume, and the lines that are left of them.

The plans of one shape and one seed are a tree: its longer trunks, pilots and families begin with the
whole state of a shorter trunk at the step where their learning rates (or shapes) part, so that shared
steps are trained once. What is measured on the way stands in `marks.jsonl` in the folder of each run.
"""

import dataclasses
import functools
import json
import math
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import study
from experiments.frontier.design import (
    WORKLOAD,
    Design,
    Growing,
    Setting,
    Settings,
    Shape,
)
from experiments.frontier.tuning import trial_name
from experiments.study import Key, Line
from experiments.text import Texts
from experiments.windows import WindowFile, digest_of, windows_of
from growjax.budget import decayed
from growjax.cost import parameters
from growjax.errors import TrainingError
from growjax.plan.prefix import Branch
from growjax.runs.journal import mend
from growjax.runs.run import Run, step_of
from growjax.train import CorpusFeed, End, Growth, Options, Plan, Step, branches, train


# The most evaluations on the way, and the least cost between two of them, in units of the design
MARKS, LEAST = 40, 0.2
# Budgets from which on losses are kept by window
_BY_WINDOW = 32


@dataclasses.dataclass
class Shared:
    """What all runs share: the design, the texts, the folder of the runs, and compiled programs."""

    design: Design
    texts: Texts
    runs: Path
    file: WindowFile
    programs: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def windows(self) -> str:
        """What tells the held-out windows at the end from others."""
        plan = self.design.fixed(
            self.design.shapes[0], self.design.budgets[-1], self.design.start, 0
        )
        rows = self.design.windows[1]
        return digest_of(windows_of(self.texts.valid, plan.objective, rows))


# Trees --------------------------------------------------------------------------------------------


def budget_name(budget: float) -> str:
    """The name of a budget, such as "8x"."""
    return f"{budget:g}x"


def run_name(plan: Plan, budget: str) -> str:
    """The folder of a run in the folder of its tree."""
    return f"{budget}, {plan.name}".replace(" ", "_").replace(",", "")


def tree(
    design: Design, shape: Shape, settings: Settings, seed: int
) -> list[tuple[str, str, float, Plan]]:
    """All plans that are born as a shape: piece, budget, when its growth is (0 if none), and plan.

    The trunks come first, since the others fork from them. Plans whose shapes are not settled are left
    out.
    """
    plans: list[tuple[str, str, float, Plan]] = []
    if shape not in settings:
        return plans
    for budget in design.budgets_of(shape):
        plan = design.fixed(shape, budget, settings[shape], seed)
        plans.append(("trunks", budget_name(budget), 0.0, plan))
    for growing, time, budget in pilots(design):
        if growing.small == shape and growing.large in settings:
            plan = design.grown(growing, time, budget, settings, seed)
            plans.append(("pilots", budget_name(budget), time, plan))
    family = design.family
    if family is not None and family[0] == shape and settings.keys() >= {*family}:
        for member in (1, 2):
            plan = design.of_family(member, settings, seed)
            plans.append(("family", budget_name(design.family_at[member]), 0.0, plan))
    return plans


def pilots(design: Design) -> list[tuple[Growing, float, int]]:
    """Every pilot: a growth, its share of the cost, and its budget; the cheap ones first."""
    return [
        (growing, time, budget)
        for budget in design.pilots_at
        for growing in design.growings
        for time in design.times
    ]


# Cells --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trial(study.Cell):
    """A trial of the ledger; it is short, so that it is kept in no folder."""

    design: Design
    shape: Shape
    setting: Setting

    @property
    def key(self) -> Key:  # type: ignore
        return WORKLOAD, "tuning", trial_name(self.shape, self.setting), self.design.tuning_seed

    def run(self, shared: Shared) -> Line:
        name, budget = self.key[2], self.design.budgets_of(self.shape)[0]
        plan = self.design.fixed(self.shape, budget, self.setting, self.key[3], name)
        options = Options(held_out_end=self.design.windows[1], background=False)
        where = {"shape": str(self.shape), "at": budget_name(budget), "flops": plan.flops}
        feed = CorpusFeed(plan, shared.texts.training, shared.texts.valid)
        seconds = 0.0
        try:
            for record in train(plan, feed, options=options, cache=shared.programs):
                if isinstance(record, Step):
                    seconds = record.seconds
                if isinstance(record, End):
                    assert record.held_out is not None
                    where |= {"score": record.held_out.loss, "tokens": plan.tokens}
        except TrainingError as error:
            # A rate that is too high: the ledger says so, and the search turns back
            where |= {"score": math.inf, "diverged": str(error).splitlines()[0]}
        return where | {"seconds": seconds, "machine": machine(), "text": shared.texts.name}


@dataclasses.dataclass(frozen=True)
class Member(study.Cell):
    """A run of a tree, or one by itself (`trunk` is then empty).

    - `branch`: its plan, which may fork from another run, and its folder.
    - `trunk`: the members that it may fork from.
    - `tuned`: the settings that its plan is made of, by shape.
    """

    piece: str
    budget: str
    branch: Branch
    shapes: tuple[Shape, ...]
    tuned: tuple[Setting, ...]
    trunk: tuple["Member", ...] = ()

    @property
    def key(self) -> Key:  # type: ignore
        return WORKLOAD, self.budget, self.branch.plan.name, self.branch.plan.seed

    def settings(self, shared: Shared) -> Line:
        return {str(s): str(x) for s, x in zip(self.shapes, self.tuned, strict=True)}

    def run(self, shared: Shared) -> Line:
        end = self.train(shared)
        plan, unit = self.branch.plan, self.branch.plan.clock.per_unit
        assert end.held_out is not None
        marks = self.marks(shared)
        score = end.held_out.loss
        if float(self.budget.removesuffix("x")) >= _BY_WINDOW:
            pairs = np.stack([end.held_out.sums, end.held_out.weights], axis=1)
            if self.key not in shared.file.keys():
                shared.file.write(self.key, score, pairs, shared.windows)
        steps = [mark for mark in marks if mark["kind"] == "mark"]
        return {
            "piece": self.piece,
            "fixed": len(plan.stages) == 1,
            "free": False,
            "clock": plan.clock.identity,
            "unit": plan.clock.unit,
            "spent": plan.cost / unit,
            "score": score,
            "decayed": decayed(plan.learning_rate(plan.cost), plan.rate.peak),
            "curve": [[mark["spent"], mark["loss"]] for mark in steps],
            # Training tokens and cost before each growth, and the losses of one batch around it
            "growths": [mark for mark in marks if mark["kind"] == "growth"],
            "tokens": plan.tokens,
            "stage_tokens": [span.tokens for span in plan.spans],
            "flops": plan.flops,
            "steps": plan.steps,
            "seconds": marks[-1]["seconds"],
            "parameters": parameters(plan.spans[-1].model),
            "stages": [
                {"label": era.label, "start": era.spent[0] / unit, "stop": era.spent[1] / unit}
                for era in plan.timeline()
            ],
            "operations": [[*op, n] for span in plan.spans for op, n in span.ops],
            "text": shared.texts.name,
            "machine": machine(),
        }

    def train(self, shared: Shared) -> End:
        """Train the run to its end, or go on with it; first the run that it forks from, if need be."""
        plan, folder = self.branch.plan, shared.runs / self.branch.run
        if plan.fork is not None:
            fork = plan.fork
            trunk = next(m for m in self.trunk if str(m.branch.run) == fork.run)
            if fork.step not in steps_of(shared.runs / trunk.branch.run) and not steps_of(folder):
                trunk.train(shared)
            plan = dataclasses.replace(
                plan, fork=dataclasses.replace(fork, run=str(shared.runs / fork.run))
            )
        design = shared.design
        unit = design.unit * plan.clock.per_unit
        options = Options(
            evaluate_every=max(plan.cost / MARKS, LEAST * unit),
            held_out=design.windows[0],
            held_out_end=design.windows[1],
            save_at=self.branch.save_at,
            save_minutes=3.0,
            background=False,
        )
        feed = CorpusFeed(plan, shared.texts.training, shared.texts.valid)
        records = train(plan, feed, run=folder, options=options, cache=shared.programs)
        end = None
        for record in records:
            if isinstance(record, Step) and record.held_out is not None:
                self._mark(folder, record)
            elif isinstance(record, Growth):
                span = plan.spans[record.stage]
                row = {
                    "kind": "growth",
                    "step": record.step,
                    "tokens": span.tokens,
                    "spent": span.spent / plan.clock.per_unit,
                    "before": record.crossing.before,
                    "after": record.crossing.after,
                }
                add_row(folder, row)
            elif isinstance(record, End):
                end = record
        assert end is not None
        if not end.finished:
            raise KeyboardInterrupt(f"{folder}: stopped by {end.signal}")
        return end

    def _mark(self, folder: Path, step: Step) -> None:
        row = {
            "kind": "mark",
            "step": step.step,
            "tokens": step.tokens,
            "spent": step.spent,
            "loss": step.held_out,
            "seconds": step.seconds,
        }
        add_row(folder, row)

    def marks(self, shared: Shared) -> list[dict[str, Any]]:
        """What was measured on the way, before a fork as well; each step once."""
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        plan = self.branch.plan
        if plan.fork is not None and plan.fork.step is not None:
            trunk = next(m for m in self.trunk if str(m.branch.run) == plan.fork.run)
            for row in trunk.marks(shared):
                # A mark is of the step that it follows, and a fork begins before one
                if row["step"] < plan.fork.step:
                    rows[row["kind"], row["step"]] = row
        for row in study.read(shared.runs / self.branch.run / MARKS_FILE):
            rows[row["kind"], row["step"]] = row
        return sorted(rows.values(), key=lambda row: (row["step"], row["kind"]))


MARKS_FILE = "marks.jsonl"


def add_row(folder: Path, row: dict[str, Any]) -> None:
    """Add a row to the marks of a run."""
    path = folder / MARKS_FILE
    mend(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def steps_of(folder: Path) -> set[int]:
    """The steps before which a run has a checkpoint."""
    return {step_of(path)[0] for path in Run(folder).checkpoints()} if folder.exists() else set()


def members(design: Design, settings: Settings, seed: int) -> list[Member]:
    """The runs of all trees of a seed; a run comes after those that it forks from."""
    every: list[Member] = []
    for shape in design.shapes:
        plans = tree(design, shape, settings, seed)
        names = [run_name(plan, budget) for _, budget, _, plan in plans]
        grown = branches([plan for *_, plan in plans], Path(f"{shape}-{seed}"), names)
        own: list[Member] = []
        for (piece, budget, *_), branch in zip(plans, grown, strict=True):
            shapes = shapes_of(design, branch.plan)
            tuned = tuple(settings[s] for s in shapes)
            own.append(Member(piece, budget, branch, shapes, tuned, tuple(own)))
        every += own
    return every


def shapes_of(design: Design, plan: Plan) -> tuple[Shape, ...]:
    """The shapes of a plan's stages, whose names they are."""
    by_name = {str(shape): shape for shape in design.shapes}
    return tuple(by_name[stage.name] for stage in plan.stages)


def alone(piece: str, budget: str, design: Design, settings: Settings, plan: Plan) -> Member:
    """A run that forks from nothing, and from which nothing forks."""
    shapes = shapes_of(design, plan)
    folder = Path(f"{piece}-{plan.seed}") / run_name(plan, budget)
    return Member(
        piece, budget, Branch(plan, folder, ()), shapes, tuple(settings[s] for s in shapes)
    )


def tidy(shared: Shared, done: Sequence[Member]) -> None:
    """Remove the folders of the runs of a tree, once all of them have a line."""
    for member in done:
        folder = shared.runs / member.branch.run
        if folder.exists():
            shutil.rmtree(folder)


def machine() -> str:
    """The machine at hand, in words."""
    return f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}"
