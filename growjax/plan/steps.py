"""The work, operations and costs of the steps of a stage, worked out from shapes alone."""

import functools
import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from growjax.axes import axes_of, sizes
from growjax.budget import Clock, DepthClock, Op, cost_of
from growjax.cost import flops as count_flops
from growjax.cost import parameters
from growjax.data.objectives import Objective, batch_shapes
from growjax.errors import PlanError
from growjax.fitting import fit_flops
from growjax.growth import Fit, Operator, stack
from growjax.growth.births import grown_shapes
from growjax.nn.place import SHAPES, running_on
from growjax.plan.losses import Loss, cross_entropy
from growjax.plan.losses import objective as objective_of
from growjax.plan.stages import MOST_STEPS, Stage, Work
from growjax.subnet import Coins, PathSchedule, Subnet, random_path
from growjax.trees import abstract


class Steps:
    """The work, FLOPs and cost of the steps of a stage; steps that are alike are worked out once.

    `start` is the stage's first step. `loss` is (model, example) to losses and weights.
    """

    def __init__(
        self,
        stage: Stage,
        model: Any,
        batch: int,
        objective: Objective,
        *,
        start: int,
        seed: int,
        clock: Clock,
        curvature_every: int | None,
        loss: Loss = cross_entropy,
    ):
        self.stage, self.model, self.batch, self.objective = stage, model, batch, objective
        self.start, self.seed, self.clock = start, seed, clock
        self.curvature_every, self.loss = curvature_every, loss
        # (work, layers drawn) -> its operations
        self._operations: dict[tuple[Work, int | None], tuple[Op, ...]] = {}
        # Operation -> how often it ran so far, and the first step that ran it
        self._counts: dict[Op, int] = {}
        self._firsts: dict[Op, int] = {}
        # (coins, first step of a block) -> layers that run at each step of the block
        self._depths: dict[tuple[Coins, int], np.ndarray] = {}
        # The optimizer updates the whole model, whatever part of it a step trains. What stays unchanged
        # is charged too: it has a gradient, and the optimizer reads and writes its moments.
        self.updated = parameters(model)
        self.axes = axes_of(model)
        # Sizes of the axes of layers
        self.stacks = {a: n for a, n in self.axes.sizes.items() if "stack" in self.axes.roles(a)}
        if isinstance(stage.subnet, Coins) and stage.subnet.besides is not None:
            if isinstance(clock, DepthClock):
                raise PlanError(
                    f"subnet: {stage.subnet} reads logits after several layers, and the clock charges "
                    "layers alone; use FlopsClock, or measure a clock"
                )
            if curvature_every is not None:
                raise PlanError(
                    f"subnet: {stage.subnet} adds the losses of several exits, whose curvature the "
                    "optimizer does not know; take another optimizer"
                )
        if isinstance(stage.subnet, PathSchedule):
            expected, axis = stage.subnet.layers, stage.subnet.stages[0].path.axis
            layers = self.axes.size(axis)
            if layers != expected:
                raise PlanError(
                    f"its paths are made for {expected} {axis}, and the model has {layers}"
                )

    def until(
        self, unit: Literal["steps", "flops", "cost"], amount: float
    ) -> Iterator[tuple[Work, int, int]]:
        """Work, FLOPs and cost of each step, for as many steps as come closest to `amount` of a unit.

        Yields one step at least. Raises `PlanError` for more than `MOST_STEPS`.
        """
        used, stop = 0.0, 0.0
        for i in itertools.count():
            if unit == "steps" and i >= amount:
                return
            # Plans have millions of steps, and most are like the one before: until `stop`, all are
            if i >= stop:
                work, ops = self.step(i)
                flops = sum(op.flops for op in ops)
                cost = sum(cost_of(op, self.clock) for op in ops)
                step_amount = {"steps": 1, "flops": flops, "cost": cost}[unit]
                changes = self.curvature_every is not None or self._drawn(work.part, i) is not None
                stop = i + 1 if changes else self.stage.steady(i)
                # Checked in advance, since a list of so many steps would not fit into memory
                if not (amount - used) / max(step_amount, 1e-300) < MOST_STEPS - i:
                    raise PlanError(
                        f"more than {MOST_STEPS:,} steps; a plan lists its steps, so give larger batches "
                        "or a shorter stage"
                    )
            # Stop where the steps so far are closer to the amount than with one more
            if i and used + step_amount / 2 > amount:
                return
            used += step_amount
            for op in ops:
                self._counts[op] = self._counts.get(op, 0) + 1
                self._firsts.setdefault(op, i)
            yield work, flops, cost

    def step(self, i: int) -> tuple[Work, tuple[Op, ...]]:
        """The work of the stage's step `i`, and the operations that it is charged for."""
        refresh = self.curvature_every is not None and (self.start + i) % self.curvature_every == 0
        freeze = self.stage.inactive == "freeze"
        work = Work(self.stage.part(i, self.seed), refresh, freeze, self.stage.parts)
        drawn = self._drawn(work.part, i)
        if (work, drawn) not in self._operations:
            self._operations[work, drawn] = tuple(self._ops(work, drawn))
        return work, self._operations[work, drawn]

    def fit(self, before: Any) -> tuple[int, int, int]:
        """FLOPs, tokens and cost of fitting the stage's growth, for a model of these shapes before it.

        A FLOP of a fit costs as much as one of the stage's first step.
        """
        op = self.stage.grow
        if op is None or not (op.trains or isinstance(op, Fit)):
            return 0, 0, 0
        rows = self.batch * (1 if self.stage.select is None else self.stage.select.offers)
        flops = growth_flops(op, before, self.objective, rows, loss=self.loss)
        tokens = op.batches * rows * self.objective.raw_length if isinstance(op, Fit) else 0
        first = self.step(0)[1]
        cost, per = sum(cost_of(x, self.clock) for x in first), sum(x.flops for x in first)
        if per == 0:
            raise PlanError(
                "grow: its fit is charged by the FLOPs of the first step, which has none"
            )
        return flops, tokens, round(Fraction(flops * cost, per))

    def ops(self) -> tuple[tuple[Op, int], ...]:
        """Every operation of the steps so far, and how often it ran."""
        return tuple(self._counts.items())

    def firsts(self) -> tuple[int, ...]:
        """For each operation of `ops`, the first step that ran it."""
        return tuple(self._firsts[op] for op in self._counts)

    def _ops(self, work: Work, drawn: int | None) -> Iterator[Op]:
        """The operations of one step; `drawn` is the number of layers that its coins let run."""
        part = work.part
        if drawn is None:
            trained, depth = self._flops([] if part is None else [part]), self._depth(part)
        else:
            assert isinstance(part, Coins)
            if drawn == 0:
                # No path has 0 layers, but FLOPs are linear in depth: extrapolate from 1 and 2 layers
                short: dict[str, Any] = {a: 2 for a in part.stacks if self.stacks[a] == 1}
                model = grown_shapes(stack(**short), self.model) if short else self.model
                one, two = (self._flops(_paths(part.stacks, n), model) for n in (1, 2))
                trained = 2 * one - two
            else:
                trained = self._flops(_paths(part.stacks, drawn))
            if part.besides is not None:
                trained += self._flops([part.besides]) - self._flops([])
            depth = max([drawn, *(n for a, n in self.stacks.items() if a not in part.stacks)])
        length = self.objective.raw_length
        yield Op("train", depth, self.batch, length, trained, self.updated)
        if work.curvature:
            yield Op("curvature", depth, self.batch, length, trained, self.updated)
        if self.stage.select is not None:
            # One forward pass of the whole model over all rows on offer: a third of a training step
            rows = self.batch * self.stage.select.offers
            forward = self._flops([]) // 3 // self.batch * rows
            yield Op("forward", max(self.stacks.values(), default=0), rows, length, forward, 0)

    def _flops(self, parts: list[Subnet], model: Any = None) -> int:
        model = self.model if model is None else model
        return step_flops(model, self.objective, self.batch, *parts, loss=self.loss)

    def _depth(self, part: Subnet | None) -> int:
        """The largest number of layers of any stack in a part of the model; None is the whole model."""
        model = self.model
        if part is not None:
            model = eqx.filter_eval_shape(lambda m: part(m, key=jax.random.key(0), step=0), model)
        part_sizes = sizes(model)
        return max((part_sizes[axis] for axis in self.stacks), default=0)

    def _drawn(self, part: Subnet | None, i: int) -> int | None:
        """The number of layers that the coins of a step let run; None for a part without coins."""
        if not (isinstance(part, Coins) and part.tosses):
            return None
        # Drawn in blocks of 1024 steps, since one draw by itself costs a call of JAX
        layers, block = self.axes.size(part.stacks[0]), 1024
        n = self.start + i
        first = n // block * block
        if (part, first) not in self._depths:
            # Parts of one block stay: they may take turns
            self._depths = {key: n for key, n in self._depths.items() if key[1] == first}
            self._depths[part, first] = part.tossed(layers, self.seed, first, block).sum(1)
        return int(self._depths[part, first][n - first])


def _paths(stacks: tuple[str, ...], depth: int) -> list[Subnet]:
    """Paths of one depth, one through each of these stacks."""
    return [random_path(depth, keep=(), axis=axis) for axis in stacks]


def step_flops(
    model: Any,
    objective: Objective,
    batch: int,
    *parts: Subnet | None,
    loss: Loss = cross_entropy,
) -> int:
    """Model FLOPs of one training step: three forward passes of the part that is trained.

    `model` may hold arrays or shapes; `parts` are applied one after the other.
    """
    shapes, structure = jax.tree.flatten(abstract((model, batch_shapes(objective, 1))))
    return 3 * batch * _forward_flops(tuple(shapes), structure, parts, loss)


def growth_flops(
    op: Operator, model: Any, objective: Objective, rows: int, *, loss: Loss = cross_entropy
) -> int:
    """Model FLOPs of growing a model by an operator that is fitted first, or that trains as it grows.

    A `Fit` is fitted to batches of `rows` examples. `model` may hold arrays or shapes.
    """
    shapes, structure = jax.tree.flatten(abstract((model, batch_shapes(objective, rows))))
    return _growth_flops(op, tuple(shapes), structure, loss)


@functools.lru_cache(maxsize=256)
def _growth_flops(op: Operator, leaves: tuple, structure: Any, loss: Loss) -> int:
    """The same, cached across plans."""
    model, batch = jax.tree.unflatten(structure, leaves)
    with running_on(SHAPES):
        if isinstance(op, Fit):
            return op.batches * fit_flops(op, model, batch, functools.partial(_batch_loss, loss))
        return count_flops(lambda model: op(model, key=jax.random.key(0)), model)


def _batch_loss(loss: Loss, model: Any, batch: Any) -> Any:
    return objective_of(jax.vmap(lambda row: loss(model, row))(batch), jnp.sum(batch["weights"]))


@functools.lru_cache(maxsize=1024)
def _forward_flops(
    leaves: tuple, structure: Any, parts: tuple[Subnet | None, ...], loss: Loss
) -> int:
    """FLOPs of one forward pass over one sequence, from shapes.

    Cached across plans, since the plans of a study share most of their models. A cache needs arguments
    that can be hashed: the leaves' shapes and the tree's structure.
    """

    def forward(model, rows):
        for part in parts:
            model = model if part is None else part(model, key=jax.random.key(0), step=0)
        return jax.vmap(lambda row: loss(model, row))(rows)

    with running_on(SHAPES):
        return count_flops(forward, *jax.tree.unflatten(structure, leaves))
