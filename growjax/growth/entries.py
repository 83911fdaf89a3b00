"""New coordinates with numbers of one's own, and GradMax, which finds such numbers in a gradient.

Evci et al., "GradMax: Growing Neural Networks using Gradient Information", ICLR 2022.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from growjax import maps, values
from growjax.algebra import NONE, AxisMap
from growjax.axes import Axes, Slot, axes_of, get, put
from growjax.cards import Card, Paper
from growjax.errors import GrowthError, raise_all
from growjax.growth.finishes import Finish, rms
from growjax.growth.fits import Fit, Measure
from growjax.growth.operator import Exactness, Operator, Sizes, frozen_sizes, resolve
from growjax.maps import fold_in_name
from growjax.values import Size


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
        numbers = numbers if hasattr(numbers, "shape") else np.asarray(numbers)
        return new.at[index].set(jnp.asarray(numbers, new.dtype))


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
        use="New coordinates whose numbers come from elsewhere: a gradient, a model, a file.",
        traps=("It fits the model that its numbers were made for, and is saved with all of them.",),
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
            moves.append(_entry_map(axis, old, size - old, dict(self.entries)))
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
    return Given(frozen_sizes(sizes), values.tuples(entries), exact, method)


# GradMax ---------------------------------------------------------------------------------------------


@values.register
class GradMax(Fit):
    """New hidden units whose numbers a gradient finds when they are due; see `gradmax`."""

    sizes: Sizes = eqx.field(static=True)
    batches: Size = eqx.field(static=True, default=1)
    scale: Annotated[float, values.positive()] = eqx.field(static=True, default=1.0)
    gates: tuple[str, ...] = eqx.field(static=True, default=())
    exactness: ClassVar[Exactness] = "exact-given-init"
    card: ClassVar[Card] = Card(
        use="More hidden units for a model that still learns, in the directions that its data ask for.",
        traps=(
            "Weights into new units are zero, which never learn under ReLU; it refuses.",
            "At most as many new units as the branch reads numbers.",
        ),
        example="gradmax(mlp=7)",
        papers=(_GRADMAX,),
    )

    def start(self, model: Any, *, key: PRNGKeyArray) -> Any:
        """No products yet, and the columns of gates."""
        numbers: dict[str, Any] = {"products": {}, "columns": {}, "rows": {}, "learn": {}}
        _, _, units = self._grown(axes_of(model))
        for maker, reader, gate in units:
            *stack, width, _ = maker.value.shape
            shape = (*stack, width, reader.value.shape[-1])
            # No narrower than float32: they are added up, and have a decomposition
            wide = jnp.promote_types(reader.value.dtype, jnp.float32)
            numbers["products"][reader.path] = jnp.zeros(shape, wide)
            numbers["learn"][maker.path] = jnp.zeros((), bool)
            if gate is not None:
                draws = jax.random.normal(fold_in_name(key, gate.path), (*stack, width, 1))
                numbers["columns"][gate.path] = (draws * width**-0.5).astype(gate.value.dtype)
        return self._with_rows(numbers, model)

    def improved(self, numbers: Any, model: Any, measure: Measure) -> tuple[Any, Any]:
        """The products of one more batch, by tiny probing units, and which new units they let learn."""
        axis, new, units = self._grown(axes_of(model))
        old, width = axes_of(model).size(axis), units[0][0].value.shape[-2]
        probes = dict(numbers["columns"])
        for maker, _, _ in units:
            *stack, _, _ = maker.value.shape
            eye = _PROBE * jnp.eye(width, dtype=maker.value.dtype)
            probes[maker.path] = jnp.broadcast_to(eye, (*stack, width, width))
        for path, column in numbers["columns"].items():
            probes[path] = jnp.broadcast_to(column, (*column.shape[:-1], width))
        _, gradient = _gradient(measure, model, axis, width, probes, [u[1] for u in units])
        products = {
            path: total + gradient[path][..., old:, :].astype(total.dtype)
            for path, total in numbers["products"].items()
        }
        numbers = self._with_rows(numbers | {"products": products}, model)
        entries = self._entries(numbers, new)
        loss, gradient = _gradient(measure, model, axis, new, entries, [u[0] for u in units])
        learn = {path: jnp.any(g[..., old:] != 0) for path, g in gradient.items()}
        return numbers | {"learn": learn}, loss

    def maps_of(self, axes: Axes, numbers: Any) -> list[AxisMap]:
        """New coordinates at the end of the axis, with these numbers."""
        axis, new, _ = self._grown(axes)
        entries = {} if numbers is None else self._entries(numbers, new)
        return [_entry_map(axis, axes.size(axis), new, entries)] if new else []

    def frozen(self, numbers: Any) -> Given:
        """`gj.growth.given` with the numbers."""
        rows = next(iter(numbers["rows"].values()))
        entries = jax.device_get(self._entries(numbers, rows.shape[-2]))
        return given(entries, exact=True, method="gradmax", **dict(self.sizes))

    def faults(self, numbers: Any) -> Iterator[str]:
        """The matrices into new units that no gradient reaches."""
        for path, learns in numbers["learn"].items():
            if not learns:
                yield (
                    f"{path}: new units with zero weights have no gradient (does the activation have a "
                    "slope at 0?), so they would never learn"
                )

    def _grown(self, axes: Axes) -> tuple[str, int, list[tuple[Slot, Slot, Slot | None]]]:
        """The axis, how many units it gets, and its branches; raises `GrowthError`."""
        if len(self.sizes) != 1:
            raise GrowthError(
                f"sizes: expected one axis and its size, such as mlp=1030, got {dict(self.sizes)}"
            )
        ((axis, _),) = self.sizes
        new = resolve(axes, dict(self.sizes)).get(axis, axes.size(axis)) - axes.size(axis)
        units = _units(axes, axis, self.gates)
        widths = {maker.value.shape[-2] for maker, _, _ in units}
        if len(widths) > 1:
            raise GrowthError(
                f"{axis}: its branches read {sorted(widths)} numbers; expected the same of all"
            )
        for maker, reader, _ in units:
            width = min(maker.value.shape[-2], reader.value.shape[-1])
            if new > width:
                raise GrowthError(
                    f"{axis}: a gradient has at most {width} directions, got {new} new units"
                )
        return axis, new, units

    def _with_rows(self, numbers: Any, model: Any) -> Any:
        """The numbers with the rows out of new units: the first singular vectors of the products."""
        _, new, units = self._grown(axes_of(model))
        rows = {}
        for _, reader, _ in units:
            directions = jnp.linalg.svd(numbers["products"][reader.path])[2][..., :new, :]
            size_of = rms(reader, reader.value) * reader.value.shape[-1] ** 0.5
            rows[reader.path] = (self.scale * size_of * directions).astype(reader.value.dtype)
        return numbers | {"rows": rows}

    def _entries(self, numbers: Any, new: int) -> dict[str, Any]:
        """The entries of new units, by the path of the array."""
        columns = {
            path: jnp.broadcast_to(column, (*column.shape[:-1], new))
            for path, column in numbers["columns"].items()
        }
        return columns | numbers["rows"]


def gradmax(
    *, batches: int = 1, scale: float = 1.0, gates: tuple[str, ...] = (), **sizes: int
) -> GradMax:
    """New hidden units for which the next gradient on some batches is largest (GradMax).

    Weights into new units are zero, so the function is kept; those out of them are the directions in
    which the loss would fall fastest: the first singular vectors of the mean product of what a branch
    reads with the gradient of what it writes. These products are measured by one backward pass a batch
    of the model with as many tiny probing units as the branch has inputs; a second one tells whether the
    new units learn.

    In a plan they are measured when the growth is due, on the stage's first batches (which the stage
    trains on afterwards), and charged for; elsewhere `growjax.fitting.fit` measures them.

    **Arguments**

    - `batches`: the number of batches.
    - `scale`: the norm of a new unit's weights, as a multiple of the root mean square of the old units'.
    - `gates`: the names of arrays whose activation multiplies the others (`("glu",)` in the models here),
      which are drawn, one column for all new units, instead of being zero.
    - one axis and its size, such as `mlp=1030`.

    Raises `GrowthError` for an axis whose units are not an activation of a product each, and where the
    activation has no slope at 0 (`relu`): new units would never learn.

    **Example**

        Stage(share=0.5, grow=gj.growth.gradmax(mlp=1030))
    """
    return GradMax(
        sizes=frozen_sizes(sizes), batches=batches, scale=scale, gates=values.tuples(gates)
    )


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
            names = ", ".join(slot.path.rpartition(".")[2] for slot in makers)
            faults.append(
                f"{module}: expected one matrix into {axis}, one out of it and at most one in gates, "
                f"got {len(makers)} ({names}), {len(readers)} and {len(multiplying)}; name in gates the "
                'one whose activation multiplies the other, such as gates=("glu",)'
            )
            continue
        units.append((makers[0], readers[0], multiplying[0] if multiplying else None))
    if not branches:
        faults.append(f"{axis}: no parameter has it")
    raise_all(GrowthError, f"GradMax finds no hidden units along {axis}:", faults)
    return units


def _gradient(
    measure: Measure, model: Any, axis: str, new: int, entries: dict[str, Any], of: list[Slot]
) -> tuple[Any, dict[str, Any]]:
    """The loss of the model with new units, and its gradient with respect to some grown arrays."""
    grown = maps.apply(_entry_map(axis, axes_of(model).size(axis), new, entries), model, None)
    arrays = {slot.path: get(grown, slot.steps) for slot in of}

    def make(arrays):
        return put(grown, {slot.steps: arrays[slot.path] for slot in of})

    return measure(make, arrays)


def _entry_map(axis: str, old: int, new: int, entries: dict[str, Any]) -> AxisMap:
    source = [*range(old), *[NONE] * new]
    return AxisMap(axis, source, init="zeros", finish=Entries(tuple(entries.items())))
