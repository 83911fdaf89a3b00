"""Changes of a plan that make a training step fit a device's memory, estimated without compiling again.

The gain of a change is computed from shapes: of the state that a device holds, and of the residuals,
the activations that the forward pass stores for the backward pass. Any other memory that the compiler
uses is assumed to stay the same.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from growjax.errors import GrowjaxError
from growjax.forecast.dryrun import amount
from growjax.forecast.residuals import stored
from growjax.models import Model
from growjax.parallel import per_device_bytes, row_parts
from growjax.plan.plan import Plan
from growjax.programs.ahead import Need
from growjax.programs.step import Programs
from growjax.subnet import Subnet


# The fields that may be changed, the cheapest change first: accumulation costs nearly nothing, sharding
# the state costs its communication, recomputation a third of the time; the others train another model
_COSTS = ("accumulate", "fsdp", "model.remat", "layout.remat", "model.dtype", "batch")


class Use(NamedTuple):
    """Bytes of one device: its state, the sums of gradients if they accumulate, and the residuals.

    `host` are those of its residuals that are in the host's memory instead.
    """

    state: int
    sums: int
    residuals: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.state + self.sums + self.residuals


def remedies(plan: Plan, need: Need, devices: int, used: int, memory: int) -> str:
    """Changes of the plan that bring a program that uses `used` bytes of a device to `memory` or less.

    Returns a sentence: the single changes that suffice, or else the strongest changes together.
    """
    kind, index, _ = need
    estimate = _estimator(plan, need, devices, used)
    enough, strongest = [], {}
    for field, values in _options(plan, index, devices, training=kind == "step").items():
        for value in values:
            n = estimate({field: value})
            if n is not None and n <= memory:
                enough.append(f"{field}={value} (about {amount(n)})")
                break
            if n is not None and n < used:
                strongest[field] = value
    if enough:
        return f"any of these would do: {', '.join(enough)}"
    # A smaller batch trains another model, and `accumulate` saves the same memory
    strongest.pop("batch", None)
    more = "take more chips, or chips with more memory"
    if not strongest:
        return more
    together = " and ".join(f"{field}={value}" for field, value in strongest.items())
    n = estimate(strongest)
    if n is not None and n <= memory:
        return f"no single change is enough; together {together} would do (about {amount(n)})"
    return f"not even {together} would be enough; {more}"


def cheapest(
    plan: Plan,
    need: Need,
    devices: int,
    used: int,
    memory: int,
    measure: Callable[[Plan], int | None],
) -> str | None:
    """The first change of the plan, from the cheapest on, after which a program really fits.

    `measure` compiles the program of a plan and returns the bytes that it uses; None if it does not fit.
    The search for the mildest value of a field that fits begins at the one that the estimate names: two
    compilations suffice if the estimate is right. Returns None if none fits.
    """
    kind, index, _ = need
    estimate = _estimator(plan, need, devices, used)
    options = _options(plan, index, devices, training=kind == "step")
    for field in _COSTS:
        estimates = {v: estimate({field: v}) for v in options.get(field, ())}
        allowed = {v: n for v, n in estimates.items() if n is not None}
        if not allowed:
            continue
        start = next((i for i, n in enumerate(allowed.values()) if n <= memory), len(allowed) - 1)
        plans = [_changed(plan, {field: value}) for value in allowed]
        if (best := _mildest(plans, start, memory, measure)) is not None:
            place, n = best
            return f"{field}={[*allowed][place]} makes it {amount(n)}, as was compiled"
    return None


def _mildest(
    plans: Sequence[Plan], start: int, memory: int, measure: Callable[[Plan], int | None]
) -> tuple[int, int] | None:
    """The first of some plans, each of which takes less memory than those before it, that fits.

    Returns its place and its memory; `start` is where it is guessed to be.
    """
    sizes: dict[int, int | None] = {}

    def fits(i: int) -> bool:
        if i not in sizes:
            sizes[i] = measure(plans[i])
        size = sizes[i]
        return size is not None and size <= memory

    low, high = 0, start
    while high < len(plans) and not fits(high):
        low, high = high + 1, high + 1
    if not 0 <= high < len(plans):
        return None
    if low < high and not fits(high - 1):
        low = high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return (high, sizes[high] or 0) if fits(high) else None


def _estimator(
    plan: Plan, need: Need, devices: int, used: int
) -> Callable[[dict[str, Any]], int | None]:
    """A function from changes of the plan to the bytes that a program uses after them.

    It returns None for changes that the plan does not allow; `used` is what the program uses before.
    """
    kind, index, work = need
    training, part = kind == "step", work and work.part
    before = usage(plan, index, part, devices, training=training)

    def estimate(changes: dict[str, Any]) -> int | None:
        try:
            after = usage(_changed(plan, changes), index, part, devices, training=training)
        except GrowjaxError:
            # Another stage may not allow the change
            return None
        return _estimate(used, before, after)

    return estimate


def _changed(plan: Plan, changes: dict[str, Any]) -> Plan:
    """The plan with some of the fields that `_options` names changed."""
    fields: dict[str, Any] = {k: v for k, v in changes.items() if k in ("accumulate", "batch")}
    layout = {k.removeprefix("layout."): v for k, v in changes.items() if k.startswith("layout.")}
    if "fsdp" in changes:
        layout |= {"fsdp": changes["fsdp"], "data": -1}
    if layout:
        fields["layout"] = dataclasses.replace(plan.layout, **layout)
    model = {k.removeprefix("model."): v for k, v in changes.items() if k.startswith("model.")}
    if model:
        config: Any = plan.model
        fields["model"] = dataclasses.replace(config, **model)
    return dataclasses.replace(plan, **fields)


def usage(plan: Plan, index: int, part: Subnet | None, devices: int, *, training: bool) -> Use:
    """The least bytes that a device holds during a training step of a stage.

    `part` is the sub-network that is trained. Without `training`, only the state is counted.
    """
    span = plan.spans[index]
    mesh = plan.layout.outline(devices)
    programs = Programs.of(plan, mesh)
    shapes = programs.shapes(span.model)
    where = programs.shardings(shapes)
    state = per_device_bytes(shapes, where)
    if not training:
        return Use(state, 0, 0)
    sums = per_device_bytes(shapes.trained, where.trained) if plan.accumulate > 1 else 0
    return Use(state, sums, *stored(plan, span, part, mesh))


def _estimate(used: int, before: Use, after: Use) -> int:
    """The bytes that a program that uses `used` would use after a change."""
    # The compiler may store fewer residuals than counted. Then the actual bytes, all that are not
    # state or sums, are assumed to shrink by the same factor.
    transient = max(used - before.state - before.sums, 0)
    factor = after.residuals / before.residuals if before.residuals else 1.0
    gain = min(before.residuals - after.residuals, round(transient * (1 - factor)))
    return used - gain + (after.state - before.state) + (after.sums - before.sums)


def _options(plan: Plan, index: int, devices: int, *, training: bool) -> dict[str, Sequence[Any]]:
    """The fields that may be changed, each with its possible values from the mildest on."""
    layout, span = plan.layout, plan.spans[index]
    options: dict[str, Sequence[Any]] = {}
    if layout.step == "auto":
        doubled = _doubled(layout.fsdp, devices)
        others = layout.shared // layout.fsdp
        options["fsdp"] = [n for n in doubled if devices % (n * others) == 0]
    if not training:
        return options
    ways = row_parts(layout.outline(devices))
    parts = _doubled(plan.accumulate, span.batch)
    options["accumulate"] = [n for n in parts if span.batch % (n * ways) == 0]
    # A layout that says what is kept says it for the model
    if layout.remat not in ("model", "full"):
        options["layout.remat"] = ["full"]
    # The arguments of a model that growjax did not write are unknown
    if not isinstance(plan.model, Model):
        for field, cheapest in (("remat", "nothing"), ("dtype", "bfloat16")):
            own = field != "remat" or layout.remat == "model"
            if own and getattr(plan.model, field, cheapest) != cheapest:
                options[f"model.{field}"] = [cheapest]
    # A stage with a batch of its own does not follow the plan's
    if span.batch == plan.batch:
        smaller = [plan.batch // 2**k for k in range(1, plan.batch.bit_length())]
        options["batch"] = [n for n in smaller if n % (plan.accumulate * ways) == 0]
    return options


def _doubled(first: int, last: int) -> Iterator[int]:
    """2, 4, 8, ... times `first`, up to `last`."""
    n = 2 * first
    while n <= last:
        yield n
        n *= 2
