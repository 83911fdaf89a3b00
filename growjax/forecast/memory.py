"""What would make a training step fit a device's memory, by arithmetic: no program is compiled again.

A remedy's gain is the difference of two sums over shapes: of the state that a device holds, or of what
the forward pass keeps for the backward one. What a compiler adds to those is assumed to stay.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax

from growjax.axes import partition
from growjax.data.objectives import batch_shapes
from growjax.errors import GrowjaxError
from growjax.forecast.dryrun import amount
from growjax.models import Model
from growjax.parallel import per_device_bytes
from growjax.plan.losses import Loss, cross_entropy
from growjax.plan.plan import Plan
from growjax.plan.stages import Span
from growjax.programs.ahead import Need
from growjax.programs.step import Programs
from growjax.subnet import Subnet


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
    kind, index, work = need
    training, part = kind == "step", work and work.part
    before = usage(plan, index, part, devices, training=training)

    def left(changes: dict[str, Any]) -> int | None:
        try:
            after = usage(_changed(plan, changes), index, part, devices, training=training)
        except GrowjaxError:  # another stage does not allow it
            return None
        return _left(used, before, after)

    enough, strongest = [], {}
    for field, values in _options(plan, index, devices, training=training).items():
        for value in values:
            n = left({field: value})
            if n is not None and n <= memory:
                enough.append(f"{field}={value} (about {amount(n)})")
                break
            if n is not None and n < used:
                strongest[field] = value
    if enough:
        return f"any of these would do: {', '.join(enough)}"
    # A smaller batch would be another run, and the parts of one do the same
    strongest.pop("batch", None)
    more = "take more chips, or chips with more memory"
    if not strongest:
        return more
    said = " and ".join(f"{field}={value}" for field, value in strongest.items())
    n = left(strongest)
    if n is not None and n <= memory:
        return f"no single change is enough; together {said} would do (about {amount(n)})"
    return f"not even {said} would be enough; {more}"


def _changed(plan: Plan, changes: dict[str, Any]) -> Plan:
    """The plan with some of what `_options` names changed."""
    fields: dict[str, Any] = {k: v for k, v in changes.items() if k in ("accumulate", "batch")}
    if "fsdp" in changes:
        fields["layout"] = dataclasses.replace(plan.layout, fsdp=changes["fsdp"], data=-1)
    model = {k.removeprefix("model."): v for k, v in changes.items() if k.startswith("model.")}
    if model:
        config: Any = plan.model
        fields["model"] = dataclasses.replace(config, **model)
    return dataclasses.replace(plan, **fields)


def usage(plan: Plan, index: int, part: Subnet | None, devices: int, *, training: bool) -> Use:
    """What a device must hold at least, in a step of a stage or, without `training`, its state alone."""
    span = plan.spans[index]
    sizes = plan.layout.resolved(devices)
    mesh = plan.layout.outline(devices)
    programs = Programs(plan.optimizer.build(), plan.loss, mesh, plan.layout)
    shapes = programs.shapes(span.model)
    where = programs.shardings(shapes)
    state = per_device_bytes(shapes, where)
    if not training:
        return Use(state, 0, 0)
    sums = per_device_bytes(shapes.trained, where.trained) if plan.accumulate > 1 else 0
    rows = math.ceil(span.batch / plan.accumulate / (sizes[0] * sizes[1]))
    return Use(state, sums, rows * kept_bytes(span, part, plan.loss))


def kept_bytes(span: Span, part: Subnet | None, loss: Loss = cross_entropy) -> int:
    """What the forward pass of one sequence keeps for the backward one, parameters not included."""
    trained, rest = partition(span.model)
    rows = batch_shapes(span.objective, 1)

    def residuals(trained, rest, example):
        def loss_of(trained, example):
            model = eqx.combine(trained, rest)
            model = model if part is None else part(model, key=jax.random.key(0), step=0)
            return jax.vmap(lambda row: loss(model, row))(example)[0].sum()

        return jax.vjp(loss_of, trained, example)[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, trained, rest, rows))
    found = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(trained))
    return max(found - whole, 0)


def _left(used: int, before: Use, after: Use) -> int:
    """What a program that uses `used` bytes would use after a change."""
    # A compiler may keep less than is asked for: then its share of that is what shrinks
    transient = max(used - before.state - before.sums, 0)
    share = after.kept / before.kept if before.kept else 1.0
    gain = min(before.kept - after.kept, round(transient * (1 - share)))
    return used - gain + (after.state - before.state) + (after.sums - before.sums)


def _options(plan: Plan, index: int, devices: int, *, training: bool) -> dict[str, Sequence[Any]]:
    """What may be changed, each with its values from the mildest on."""
    layout, span = plan.layout, plan.spans[index]
    found: dict[str, Sequence[Any]] = {}
    if layout.step == "auto":
        doubled = _doubled(layout.fsdp, devices)
        found["fsdp"] = [n for n in doubled if devices % (n * layout.tensor) == 0]
    if not training:
        return found
    ways = math.prod(layout.resolved(devices)[:2])
    parts = _doubled(plan.accumulate, span.batch)
    found["accumulate"] = [n for n in parts if span.batch % (n * ways) == 0]
    if not isinstance(plan.model, Model):  # another one's arguments are not ours to change
        for field, cheapest in (("remat", "nothing"), ("dtype", "bfloat16")):
            if getattr(plan.model, field, cheapest) != cheapest:
                found[f"model.{field}"] = [cheapest]
    if span.batch == plan.batch:
        smaller = [plan.batch // 2**k for k in range(1, plan.batch.bit_length())]
        found["batch"] = [n for n in smaller if n % (plan.accumulate * ways) == 0]
    return found


def _doubled(first: int, last: int) -> Iterator[int]:
    while (first := 2 * first) <= last:
        yield first
