"""Probe and choose: several ways to go on from one state, each tried for some steps, and one is kept."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from growjax.cards import Card, Paper
from growjax.errors import PlanError
from growjax.plan.plan import Plan
from growjax.plan.stages import Fork, Stage
from growjax.values import Folder, Size, at_least, check, register


_LAG = Paper(
    "Landscape-Aware Growing: The Power of a Little LAG",
    "Karp, Stefani and Saunshi, Nikunj and Miryoosefi, Sobhan and Reddi, Sashank J. and Kumar, Sanjiv",
    2024,
    arxiv="2406.02469",
)


@register
@dataclasses.dataclass(frozen=True)
class Probe:
    """A plan with several candidates for one stage, of which `growjax.train.choose` keeps the best.

    **Fields**

    - `plan`: the plan; its stage number `stage` is replaced by a candidate.
    - `candidates`: the stages to choose from, with operators of their own, say.
    - `steps`: how many steps of the stage each candidate is trained for before the choice.

    All candidates start from the same state, with the same batches. The trials of those that are not kept
    are paid by the plan that is: `plans` are its possible outcomes, one for each candidate, with their
    cost as the stage's `charge`. So every outcome is an ordinary plan that is known, checked and costed
    before anything is trained. It gives the same run without the probe if the learning rates before the
    stage are those of the first candidate's plan, which trains these steps: with a `Warmup` of steps,
    and a schedule that is at its peak then, they are. The lineage notes where they differ.

    The loss right after a growth says little about the end; the paper waits for some hundred steps.

    Raises `PlanError` for fewer than two candidates, and if an outcome cannot be run.

    **Example**

        Probe(plan, 1, (Stage("copies", share=0.7, grow=gj.stack(layers=12)),
                        Stage("middle", share=0.7, grow=gj.stack(layers=12, order="middle"))), steps=300)

    Karp et al., "Landscape-Aware Growing", 2024.
    """

    plan: Plan
    stage: Annotated[int, at_least(0)]
    candidates: tuple[Stage, ...]
    steps: Size
    card: ClassVar[Card] = Card(papers=(_LAG,))

    def __post_init__(self):
        check(self, PlanError, "this probe cannot be run:", self._faults)

    def _faults(self) -> Iterator[str]:
        if self.stage >= len(self.plan.stages):
            yield f"stage: the plan has {len(self.plan.stages)} stages, and none with number {self.stage}"
            return
        if len(set(self.candidates)) < 2:
            yield "candidates: expected at least two different stages"
            return
        stages = (*self.plan.stages[: self.stage], *self.candidates)
        if any(stage.until is not None and stage.ended is None for stage in stages):
            yield "plan, candidates: a trigger may end a stage before the choice; fix its length"
            return
        for n, plan in enumerate(self.plans):
            steps = plan.spans[self.stage].steps
            if steps < self.steps:
                yield f"candidates[{n}]: it has {steps} steps, fewer than the {self.steps} of its trial"

    @functools.cached_property
    def costs(self) -> tuple[int, ...]:
        """The cost of each candidate's trial and of its fit, in the clock's smallest unit."""
        trials = (
            self.plan.with_stage(self.stage, stage).spans[self.stage] for stage in self.candidates
        )
        return tuple(span.fit_cost + sum(span.costs[: self.steps]) for span in trials)

    @functools.cached_property
    def plans(self) -> tuple[Plan, ...]:
        """The plan with each candidate, charged for the trials of the others."""
        total, unit = sum(self.costs), self.plan.clock.per_unit
        return tuple(
            self.plan.with_stage(
                self.stage,
                dataclasses.replace(stage, charge=stage.charge + (total - cost) / unit),
            )
            for stage, cost in zip(self.candidates, self.costs, strict=True)
        )

    def trial(self, number: int, folder: str | Path) -> Plan:
        """The outcome of one candidate as the run `folder / number`: all but the first fork from it."""
        plan, step = self.plans[number], self.start
        if number == 0 or step == 0:
            return plan
        return dataclasses.replace(plan, fork=Fork(str(Path(folder) / "0"), step))

    @property
    def start(self) -> int:
        """The step before which the candidates part."""
        return self.plans[0].spans[self.stage].start


@register
@dataclasses.dataclass(frozen=True)
class Decision:
    """The outcome of a probe, with its numbers: a file `decision.json` in the probe's folder.

    **Fields**

    - `probe`: what was asked.
    - `losses`: the held-out loss after each candidate's trial, in nats per token; None if it was not
      finite.
    - `windows`: the number of held-out windows.
    - `chosen`: the number of the candidate with the lowest loss; of equal ones, the first.
    - `run`: the folder of its run, which stands at the end of the trial.
    """

    probe: Probe
    losses: tuple[float | None, ...]
    windows: Size
    chosen: Annotated[int, at_least(0)]
    run: Folder

    def __post_init__(self):
        check(self, PlanError, "this is no decision of a probe:", self._faults)

    def _faults(self) -> Iterator[str]:
        count = len(self.probe.candidates)
        if len(self.losses) != count:
            yield f"losses: expected one for each of {count} candidates, got {len(self.losses)}"
        elif self.chosen != lowest(self.losses):
            yield f"chosen: candidate {self.chosen} does not have the lowest loss"

    @property
    def plan(self) -> Plan:
        """The plan of `run`. `probe.plans[chosen]` is the same without a fork, as a run by itself."""
        return self.probe.trial(self.chosen, Path(self.run).parent)


def lowest(losses: Sequence[float | None]) -> int | None:
    """The number of the lowest of some losses, the first of equal ones; None if none is finite."""
    finite = [loss for loss in losses if loss is not None]
    return losses.index(min(finite)) if finite else None
