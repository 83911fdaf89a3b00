"""What would make a training step fit a device's memory, by arithmetic: no program is compiled again.

A remedy's gain is the difference of two sums over shapes: of the state that a device holds, or of what
the forward pass keeps for the backward one. What a compiler adds to those is assumed to stay.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from growjax.axes import partition
from growjax.data.objectives import batch_shapes
from growjax.errors import GrowjaxError
from growjax.parallel import AXES, per_device_bytes
from growjax.subnet import Subnet
from growjax.train.losses import cross_entropy
from growjax.train.plan import Plan, Span
from growjax.train.step import Programs
from growjax.train.transition import Need, placed_shapes


class Use(NamedTuple):
    """Bytes of one device: its state, its gradients if they are summed over parts, and what is kept."""

    state: int
    sums: int
    kept: int

    @property
    def total(self) -> int:
        return self.state + self.sums + self.kept


def remedies(plan: Plan, need: Need, devices: int, used: int, memory: int) -> str:
    """What brings a program that uses `used` bytes of a device below `memory`, in words."""
    kind, index, part = need
    before = usage(plan, index, part, devices, training=kind == "step")
    enough, best = [], []
    for options in _options(plan, index, devices, training=kind == "step"):
        left = [(said, used - before.total + _total(p, need, devices)) for said, p in options]
        fits = [(said, n) for said, n in left if n <= memory]
        if fits:
            enough.append(f"{fits[0][0]} (about {fits[0][1] / 2**30:.1f} GiB)")
        elif left:
            best.append(min(left, key=lambda item: item[1]))
    if enough:
        return f"any of these would do: {', '.join(enough)}"
    if not best:
        return "take more chips, or chips with more memory"
    said = " and ".join(said for said, _ in best)
    together = used - sum(used - n for _, n in best)
    if together <= memory:
        return f"no single change is enough; together {said} may be"
    return f"not even {said} would be enough; take more chips, or chips with more memory"


def usage(plan: Plan, index: int, part: Subnet | None, devices: int, *, training: bool) -> Use:
    """What a device must hold at least, in a step of a stage or, without `training`, its state alone."""
    span = plan.spans[index]
    sizes = plan.layout.resolved(devices)
    mesh: Any = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    programs = Programs(plan.optimizer.build(), cross_entropy, mesh, plan.layout, plan.seed)
    shapes = placed_shapes(programs, span.model)
    where = programs.shardings(shapes)
    state = per_device_bytes(shapes, where)
    if not training:
        return Use(state, 0, 0)
    sums = per_device_bytes(shapes.trained, where.trained) if plan.accumulate > 1 else 0
    rows = math.ceil(span.batch / plan.accumulate / (sizes[0] * sizes[1]))
    return Use(state, sums, rows * kept_bytes(span, part))


def kept_bytes(span: Span, part: Subnet | None) -> int:
    """What the forward pass of one sequence keeps for the backward one, parameters not included."""
    trained, rest = partition(span.model)
    rows = batch_shapes(span.objective, 1)

    def zeros(tree):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)

    def residuals():
        def loss_of(trained, example):
            import equinox as eqx

            model = eqx.combine(trained, zeros(rest))
            model = model if part is None else part(model, key=jax.random.key(0), step=0)
            return jax.vmap(lambda row: cross_entropy(model, row))(example)[0].sum()

        example = {k: jnp.zeros(x.shape, x.dtype) for k, x in rows.items()}
        return jax.vjp(loss_of, zeros(trained), example)[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals))
    found = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(trained))
    return max(found - whole, 0)


def _total(plan: Plan, need: Need, devices: int) -> int:
    return usage(plan, need[1], need[2], devices, training=need[0] == "step").total


def _options(
    plan: Plan, index: int, devices: int, *, training: bool
) -> Iterator[list[tuple[str, Plan]]]:
    """Kinds of change, each with its steps from the mildest on."""
    layout, span = plan.layout, plan.spans[index]

    def changed(said: str, **fields: Any) -> list[tuple[str, Plan]]:
        try:
            return [(said, dataclasses.replace(plan, **fields))]
        except GrowjaxError:
            return []

    widths = [n for n in _doubled(layout.fsdp, devices) if devices % (n * layout.tensor) == 0]
    yield [
        found
        for n in widths
        if layout.step == "auto"
        for found in changed(f"fsdp={n}", layout=dataclasses.replace(layout, fsdp=n, data=-1))
    ]
    if not training:
        return
    ways = math.prod(layout.resolved(devices)[:2])
    parts = [n for n in _doubled(plan.accumulate, span.batch) if span.batch % (n * ways) == 0]
    yield [found for n in parts for found in changed(f"accumulate={n}", accumulate=n)]
    if plan.model.remat != "nothing":
        model = dataclasses.replace(plan.model, remat="nothing")
        yield changed('model.remat="nothing"', model=model)
    if plan.model.dtype is None:
        model = dataclasses.replace(plan.model, dtype="bfloat16")
        yield changed('model.dtype="bfloat16"', model=model)
    if span.stage.batch is None and span.batch == plan.batch:
        smaller = [plan.batch // 2**k for k in range(1, 8)]
        fitting = [n for n in smaller if n and n % (plan.accumulate * ways) == 0]
        yield [found for n in fitting for found in changed(f"batch={n}", batch=n)]


def _doubled(first: int, last: int) -> Iterator[int]:
    while (first := 2 * first) <= last:
        yield first
