"""The runs of the contest: fixed sizes, and operators that grow one trunk of each seed.

The small size that stays small is the trunk: it keeps a checkpoint of its whole state at the step where
operators grow, from which their runs fork. These are short, so that they have no folders of their own.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import growjax as gj
from experiments import study
from experiments.frontier.design import Shape, fixed_name
from experiments.frontier.tree import machine, steps_of
from experiments.operators.design import FIXED, Contest, Direction, Entry
from experiments.study import Key, Line
from experiments.text import Texts
from experiments.windows import WindowFile, digest_of, losses_by_window, windows_of
from growjax.budget import decayed
from growjax.cost import parameters
from growjax.data import held_out_batch
from growjax.fitting import Fitted, fit
from growjax.growth import Operator, atoms, ligo
from growjax.plan.stages import Fork
from growjax.runs.lineage import load_model
from growjax.runs.run import Run, step_of
from growjax.train import CorpusFeed, End, Options, Plan, Step, cross_entropy, train


@dataclasses.dataclass
class Shared:
    """What all runs share: the design, the texts, the folder of the trunks, and compiled programs."""

    design: Contest
    texts: Texts
    runs: Path
    file: WindowFile
    programs: dict[str, Any] = dataclasses.field(default_factory=dict)
    # The trunk's model of the last seed, and its loss
    grown_from: dict[int, tuple[Any, float]] = dataclasses.field(default_factory=dict)
    held_out: dict[int, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def windows(self, plan: Plan, rows: int) -> dict[str, np.ndarray]:
        """Held-out windows, which depend on their number alone."""
        if rows not in self.held_out:
            self.held_out[rows] = windows_of(self.texts.valid, plan.objective, rows)
        return self.held_out[rows]

    def loss(self, plan: Plan, model: Any, rows: int) -> tuple[float, np.ndarray]:
        """The held-out loss of a model in nats a byte, and its sums and counts by window."""
        pairs = losses_by_window(model, self.windows(plan, rows))
        return float(pairs[:, 0].sum() / pairs[:, 1].sum()), pairs


@dataclasses.dataclass(frozen=True)
class Fixed(study.Cell):
    """A size that does not change; that of the small one is the trunk of its seed."""

    design: Contest
    shape: Shape
    seed: int

    @property
    def key(self) -> Key:  # type: ignore
        return FIXED, self.design.budget_name, fixed_name(self.shape), self.seed

    @property
    def plan(self) -> Plan:
        """Its plan."""
        return self.design.fixed(self.shape, self.seed)

    def settings(self, shared: Any) -> Line:
        return {str(self.shape): str(self.design.settings[self.shape])}

    @property
    def fork(self) -> int | None:
        """The step before which operators grow; None if they do not grow this size."""
        if self.shape != self.design.small:
            return None
        entry = self.design.entries("depth")[0]
        return self.design.grown("depth", entry, self.seed).spans[1].start

    def run(self, shared: Shared) -> Line:
        marks, line = _trained(self.plan, shared, folder=self.folder(shared), save_at=self.fork)
        return {"fixed": True, **_common(self.plan, self.key, line, shared), "after": marks}

    def folder(self, shared: Shared) -> Path | None:
        """The folder of the trunk; None for the other sizes, which are trained without one."""
        return None if self.fork is None else shared.runs / f"trunk-{self.seed}"

    def checkpoint(self, shared: Shared) -> Path:
        """The trunk's checkpoint at the growth; the trunk is trained if it is not there."""
        folder = self.folder(shared)
        assert folder is not None
        if self.fork not in steps_of(folder):
            # A finished trunk whose checkpoint is gone would not write it again
            shutil.rmtree(folder, ignore_errors=True)
            _trained(self.plan, shared, folder=folder, save_at=self.fork)
        return next(p for p in Run(folder).checkpoints() if step_of(p)[0] == self.fork)


@dataclasses.dataclass(frozen=True)
class Grown(study.Cell):
    """The small size until the growth, and what an operator makes of it from then on."""

    design: Contest
    direction: Direction
    entry: Entry
    seed: int

    @property
    def key(self) -> Key:  # type: ignore
        return self.direction, self.design.budget_name, self.entry.name, self.seed

    def settings(self, shared: Any) -> Line:
        sizes = (self.design.small, self.design.large[self.direction])
        tuned = {str(shape): str(self.design.settings[shape]) for shape in sizes}
        return {**tuned, "growth": self.entry.settings, "at": self.design.time}

    def run(self, shared: Shared) -> Line:
        trunk = Fixed(self.design, self.design.small, self.seed)
        checkpoint = trunk.checkpoint(shared)
        plan = trunk.plan
        if self.seed not in shared.grown_from:
            shared.grown_from.clear()
            model = load_model(checkpoint)[0]
            loss, _ = shared.loss(plan, model, self.design.windows[0])
            shared.grown_from[self.seed] = model, loss
        model, before = shared.grown_from[self.seed]
        fitted = None
        if self.entry.grow is None:
            fitted = self._fit(plan, model, shared)
            charge = float(fitted.flops) / plan.clock.per_unit
            plan = self.design.grown(self.direction, self.entry, self.seed, fitted.operator, charge)
        else:
            plan = self.design.grown(self.direction, self.entry, self.seed)
        operator = plan.spans[1].stage.grow
        assert operator is not None
        first = gj.grow(operator, model, key=plan.key("grow"))
        # The level of a stage without a ramp is 1 from its first step on
        first = first if self.entry.ramp or not gj.gates.is_gated(first) else gj.ramp(first, 1.0)
        after = [[0, shared.loss(plan, first, self.design.windows[0])[0]]]
        step = plan.spans[1].start
        plan = dataclasses.replace(plan, fork=Fork(str(checkpoint.parents[1]), step))
        marks, line = _trained(plan, shared, marks=[step + n for n in self.design.after if n])
        return {
            "fixed": False,
            **_common(plan, self.key, line, shared),
            "before": before,
            "after": after + [[mark - step, loss] for mark, loss in marks],
            "charged": 0.0 if fitted is None else fitted.flops / plan.clock.per_unit,
            "exactness": _exactness(operator),
            "grew_at": [span.start for span in plan.spans[1:]],
        }

    def _fit(self, plan: Plan, model: Any, shared: Shared) -> Fitted:
        """LiGO's maps, fitted to batches of the training text in an order of the seed."""
        count, rows = self.design.fit
        windows = held_out_batch(shared.texts.training, plan.objective, count * rows)
        order = np.random.default_rng(self.seed).permutation(count * rows).reshape(count, rows)
        batches = [{k: jnp.asarray(v[part]) for k, v in windows.items()} for part in order]
        sizes: Any = self.design.sizes(self.direction)
        return fit(ligo(batches=count, **sizes), model, batches, mean_loss, key=plan.key("fit"))


def mean_loss(model: Any, batch: Any) -> Any:
    """The mean loss of a batch, in nats a byte."""
    losses, weights, *_ = jax.vmap(lambda row: cross_entropy(model, row))(batch)
    return (losses * weights).sum() / weights.sum()


def _exactness(operator: Operator) -> str:
    """The weakest promise of an operator's parts."""
    order = ["exact", "exact-given-init", "approximate"]
    return max((atom.exactness for atom in atoms(operator)), key=order.index)


def _trained(
    plan: Plan,
    shared: Shared,
    *,
    marks: list[int] | None = None,
    folder: Path | None = None,
    save_at: int | None = None,
) -> tuple[list[tuple[int, float]], dict[str, Any]]:
    """Train a plan; returns the held-out loss after some steps, and what was measured at the end."""
    on_the_way, at_end = shared.design.windows
    losses: list[tuple[int, float]] = []
    last: dict[str, Any] = {"seconds": 0.0}

    # Windows are evaluated here, many at once: the run's own evaluation has the batch of training
    def look(model: Any, step: Step) -> dict[str, float]:
        done = step.step + 1
        if done == plan.steps:
            last["score"], last["pairs"] = shared.loss(plan, model, at_end)
        if done in (marks or ()):
            losses.append((done, shared.loss(plan, model, on_the_way)[0]))
        return {}

    options = Options(
        evaluate_at=tuple(marks or ()),
        held_out=1,
        held_out_end=0,
        hooks=(look,),
        save_at=() if save_at is None else (save_at,),
        save_minutes=None,
        background=False,
    )
    feed = CorpusFeed(plan, shared.texts.training, shared.texts.valid)
    end = None
    for record in train(plan, feed, run=folder, options=options, cache=shared.programs):
        if isinstance(record, Step):
            last["seconds"] = record.seconds
        elif isinstance(record, End):
            end = record
    assert end is not None
    if not end.finished:
        raise KeyboardInterrupt(f"{plan.name}: stopped by {end.signal}")
    if "score" not in last:
        # A trunk that was finished before, by a process that stopped before it wrote the line
        last["score"], last["pairs"] = shared.loss(plan, end.model, at_end)
    return losses, last


def _common(plan: Plan, key: Key, last: dict[str, Any], shared: Shared) -> Line:
    """The fields that the lines of all runs have; the losses by window go to their own file."""
    if key not in shared.file.keys():
        windows = shared.windows(plan, shared.design.windows[1])
        shared.file.write(key, last["score"], last["pairs"], digest_of(windows))
    unit = plan.clock.per_unit
    return {
        "free": False,
        "clock": plan.clock.identity,
        "unit": plan.clock.unit,
        "spent": plan.cost / unit,
        "score": last["score"],
        "decayed": decayed(plan.learning_rate(plan.cost), plan.rate.peak),
        "curve": [],
        "tokens": plan.tokens,
        "flops": plan.flops,
        "steps": plan.steps,
        "seconds": last["seconds"],
        "parameters": parameters(plan.spans[-1].model),
        "stages": [
            {"label": era.label, "start": era.spent[0] / unit, "stop": era.spent[1] / unit}
            for era in plan.timeline()
        ],
        "text": shared.texts.name,
        "machine": machine(),
    }


def cells(design: Contest, seed: int) -> list[study.Cell]:
    """The runs of a seed: the trunk, then the operators, then the other sizes."""
    grown = [
        Grown(design, direction, entry, seed)
        for direction in design.large
        for entry in design.entries(direction)
    ]
    others = [Fixed(design, s, seed) for s in design.base.shapes if s != design.small]
    return [Fixed(design, design.small, seed), *grown, *others]
