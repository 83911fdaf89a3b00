"""New coordinates with numbers of one's own, and GradMax, which finds such numbers in a gradient.

Evci et al., "GradMax: Growing Neural Networks using Gradient Information", ICLR 2022.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from growjax import values
from growjax.algebra import NONE, AxisMap
from growjax.axes import Axes, Slot, axes_of, get, partition
from growjax.cards import Card, Paper
from growjax.errors import GrowthError, raise_all
from growjax.growth.finishes import Finish, rms
from growjax.growth.operator import Exactness, Operator, Sizes, frozen_sizes, resolve
from growjax.maps import fold_in_name


_GRADMAX = Paper(
    "GradMax: Growing Neural Networks using Gradient Information",
    "Evci, Utku and van Merriënboer, Bart and Unterthiner, Thomas and Vladymyrov, Max and Pedregosa, "
    "Fabian",
    2022,
    "International Conference on Learning Representations",
    "2201.05125",
)

# How large the probing units of GradMax are: so small that an activation is its slope at 0
_PROBE = 1e-4


@dataclasses.dataclass(frozen=True)
class Entries(Finish):
    """The entries of new coordinates: pairs of a leaf's path and its numbers there."""

    entries: tuple[tuple[str, Any], ...]

    def applied(self, move, slot, old, new, *, key):
        """The given numbers at new coordinates, in the leaves that have some."""
        del old, key
        numbers = dict(self.entries).get(slot.path)
        if numbers is None:
            return new
        (dim,) = slot.positions(move.axis)
        index = (slice(None),) * dim + (np.flatnonzero(move.source == NONE),)
        return new.at[index].set(jnp.asarray(np.asarray(numbers), new.dtype))


def _entry_faults(entries: Any) -> Iterator[str]:
    for path, numbers in entries:
        try:
            ok = bool(np.isfinite(np.asarray(numbers, float)).all())
        except (TypeError, ValueError):
            ok = False
        if not ok:
            yield f"entries: {path}: expected an array of finite numbers"


@values.register
class Given(Operator):
    """New coordinates with given numbers; see `given`."""

    sizes: Sizes = eqx.field(static=True)
    entries: Annotated[
        tuple[tuple[str, Any], ...], values.Faults("pairs of a path and numbers", _entry_faults)
    ] = eqx.field(static=True)
    exact: bool = eqx.field(static=True, default=False)
    method: Literal["", "gradmax"] = eqx.field(static=True, default="")
    card: ClassVar[Card] = Card(
        use="New coordinates whose numbers come from elsewhere: a gradient (gj.growth.gradmax), a model, "
        "a file.",
        traps=(
            "It fits the model that its numbers were made for, and is saved with all of them.",
            "GradMax leaves the weights into new units zero, which never learn under ReLU; it refuses.",
        ),
        example="given((('blocks.block.mlp.up_bias', ((0.5,), (0.5,))),), exact=True, mlp=7)",
        by={"method": {"gradmax": (_GRADMAX,)}},
    )

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """By `exact`, the caller's word that these numbers change nothing."""
        return "exact-given-init" if self.exact else "approximate"

    def maps(self, axes: Axes) -> list[AxisMap]:
        """New coordinates at the end, zero where nothing is given."""
        if len(self.sizes) > 1:
            raise GrowthError("sizes: entries are those of one axis; chain several operators")
        moves, faults = [], []
        for axis, size in resolve(axes, dict(self.sizes)).items():
            old = axes.size(axis)
            slots = {slot.path: slot for slot in axes.having(axis, "param") if slot.arrays()}
            for path, numbers in self.entries:
                if (
                    path not in slots
                    or slots[path].spec.parts
                    or len(slots[path].positions(axis)) != 1
                ):
                    faults.append(
                        f"{path}: no parameter with the axis {axis} once; it is on {', '.join(slots)}"
                    )
                    continue
                (dim,) = slots[path].positions(axis)
                shape = [d.size(axes.sizes) for d in slots[path].dims]
                shape[dim] = size - old
                if np.shape(numbers) != tuple(shape):
                    faults.append(
                        f"{path}: expected numbers {tuple(shape)}, got {np.shape(numbers)}"
                    )
            source = [*range(old), *[NONE] * (size - old)]
            moves.append(AxisMap(axis, source, init="zeros", finish=Entries(self.entries)))
        raise_all(GrowthError, "these entries do not fit the model:", faults)
        return moves


def given(
    entries: Mapping[str, Any] | Any,
    *,
    exact: bool = False,
    method: Literal["", "gradmax"] = "",
    **sizes: int,
) -> Given:
    """Grow one axis by coordinates whose numbers you give; what you do not give is zero.

    **Arguments**

    - `entries`: path of a parameter to its entries at the new coordinates, shaped like the parameter with
      their number in place of the axis's size (`[new]` is last in `"blocks.block.mlp.up"`).
    - `exact`: promise that the function is kept; the certificate then tests it.
    - `method`: what has found them, for `gj.cite`.

    Raises `GrowthError` for a path or a shape that does not fit.

    **Example**

        gj.growth.given({"blocks.block.mlp.down": rows}, exact=True, mlp=1030)    # from 1024
    """
    pairs = entries.items() if isinstance(entries, Mapping) else entries
    frozen = tuple((path, _frozen(x)) for path, x in pairs)
    return Given(frozen_sizes(sizes), frozen, exact, method)


def _frozen(numbers: Any) -> Any:
    """Numbers as nested tuples of Python's floats."""
    if hasattr(numbers, "shape"):
        numbers = np.asarray(numbers, float).tolist()
    return tuple(map(_frozen, numbers)) if isinstance(numbers, list | tuple) else numbers


# GradMax ---------------------------------------------------------------------------------------------


def gradmax(
    model: Any,
    batch: Any,
    loss: Callable[[Any, Any], Array],
    *,
    scale: float = 1.0,
    gates: tuple[str, ...] = (),
    key: PRNGKeyArray | None = None,
    **sizes: int,
) -> Given:
    """New hidden units for which the next gradient on a batch is largest (GradMax).

    Weights into new units are zero, so the function is kept; those out of them are the directions in
    which the loss would fall fastest: the first singular vectors of the mean product of what a branch
    reads with the gradient of what it writes. These products are measured by one backward pass
    of the model with as many tiny probing units as the branch has inputs.

    **Arguments**

    - `batch`, `loss`: `(model, batch) -> scalar`, of the data that is trained on.
    - `scale`: the norm of a new unit's weights, as a multiple of the root mean square of the old units'.
    - `gates`: the names of arrays whose activation multiplies the others (`("glu",)` in the models here),
      which are drawn with `key`, one column for all new units, instead of being zero.
    - one axis and its size, such as `mlp=1030`.

    Returns an operator with these numbers in it, for this model: `gj.grow` it, or save it in a plan.
    Raises `GrowthError` for an axis whose units are not an activation of a product each, and where the
    activation has no slope at 0 (`relu`): new units would never learn.

    **Example**

        op = gj.growth.gradmax(model, batch, loss, mlp=1030)
    """
    table = axes_of(model)
    if len(sizes) != 1:
        raise GrowthError(f"sizes: expected one axis and its size, such as mlp=1030, got {sizes}")
    ((axis, size),) = sizes.items()
    new = resolve(table, sizes).get(axis, table.size(axis)) - table.size(axis)
    units = _units(table, axis, gates)
    entries, probes = {}, {}
    for maker, reader, gate in units:
        width = maker.value.shape[-2]
        if new > min(width, reader.value.shape[-1]):
            raise GrowthError(
                f"{axis}: a gradient has at most {width} directions, got {new} new units"
            )
        stack = maker.value.shape[:-2]
        probes[maker.path] = np.broadcast_to(_PROBE * np.eye(width), (*stack, width, width))
        if gate is not None:
            if key is None:
                raise GrowthError(f"{gate.path} is drawn: pass key=jax.random.key(...)")
            column = jax.random.normal(fold_in_name(key, gate.path), (*stack, width, 1))
            column = np.asarray(column * width**-0.5)
            probes[gate.path] = np.broadcast_to(column, (*stack, width, width))
            entries[gate.path] = np.broadcast_to(column, (*stack, width, new))
    widths = {maker.value.shape[-2] for maker, _, _ in units}
    if len(widths) > 1:
        raise GrowthError(
            f"{axis}: its branches read {sorted(widths)} numbers; expected the same of all"
        )
    probing = given(probes, **{axis: table.size(axis) + widths.pop()})
    gradient = _gradient(loss, probing, model, batch)
    for _, reader, _ in units:
        products = np.asarray(get(gradient, reader.steps))[..., table.size(axis) :, :]
        directions = np.linalg.svd(products)[2][..., :new, :]
        size_of = np.asarray(rms(reader, jnp.asarray(reader.value))) * reader.value.shape[-1] ** 0.5
        entries[reader.path] = scale * size_of * directions
    op = given(entries, exact=True, method="gradmax", **sizes)
    grown = _gradient(loss, op, model, batch)
    still = [
        maker.path
        for maker, _, _ in units
        if new and not np.any(np.asarray(get(grown, maker.steps))[..., table.size(axis) :])
    ]
    raise_all(
        GrowthError,
        "new units with zero weights have no gradient (does the activation have a slope at 0?), so they "
        "would never learn:",
        still,
    )
    return op


def _units(table: Axes, axis: str, gates: tuple[str, ...]) -> list[tuple[Slot, Slot, Slot | None]]:
    """For each branch with the axis: the matrix into its units, that out of them, and a gate's."""
    branches: dict[str, dict[str, list[Slot]]] = {}
    faults = []
    for slot in table.having(axis, "param"):
        if not slot.arrays():
            continue
        roles = [dim.role for dim in slot.dims if dim.role != "stack"]
        module, _, name = slot.path.rpartition(".")
        if roles == ["consumed", "produced"]:
            reads = slot.dims[-2].axis == axis
            kind = "reader" if reads else "gate" if name in gates else "maker"
        elif roles == ["produced"]:
            kind = "vector"
        else:
            faults.append(f"{slot.path}: {axis} is no plain hidden axis here")
            continue
        branches.setdefault(module, {}).setdefault(kind, []).append(slot)
    units = []
    for module, slots in branches.items():
        makers, readers = slots.get("maker", []), slots.get("reader", [])
        multiplying = slots.get("gate", [])
        if len(makers) != 1 or len(readers) != 1 or len(multiplying) > 1:
            faults.append(
                f"{module}: expected one matrix into {axis}, one out of it and at most one in gates, "
                f"got {len(makers)}, {len(readers)} and {len(multiplying)}"
            )
            continue
        units.append((makers[0], readers[0], multiplying[0] if multiplying else None))
    if not branches:
        faults.append(f"{axis}: no parameter has it")
    raise_all(GrowthError, f"GradMax finds no hidden units along {axis}:", faults)
    return units


def _gradient(loss: Callable, op: Operator, model: Any, batch: Any) -> Any:
    """The gradient of the loss of the grown model."""

    @eqx.filter_jit
    def gradient(model, batch):
        trained, rest = partition(op(model))
        return jax.grad(lambda t: loss(eqx.combine(t, rest), batch))(trained)

    return gradient(model, batch)
