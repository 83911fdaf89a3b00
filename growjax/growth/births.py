"""Births: the number of the growth that every coordinate was born in, and masks of new entries.

A coordinate of the model as it was first drawn has the number 0, one that the first growth added 1, and
so on; a chain is one growth. Births move by the maps that move everything else: an old coordinate takes
its number along wherever a map puts it, and every further copy of it is new. An entry of an array
has the birth of the youngest of its coordinates: in an old row and a new column it is new.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Int

from growjax.algebra import AxisMap
from growjax.axes import Slot, axes_of, partition, put
from growjax.errors import GrowthError, StateError, raise_all
from growjax.growth.operator import Operator, atoms


# The birth of coordinates of several growths that `gj.regroup` merged: they are of no part
MIXED = 2**30


class Births(eqx.Module):
    """The number of the growth that each coordinate was born in.

    - `of`: `{axis: [size]}`, whole numbers; 0 is the birth of the model, `MIXED` that of coordinates
      merged from several growths.
    - `growths`: the number of growths so far.

    Arrays of NumPy or of JAX; under `jit` they may be traced.

    **Example**

        births = gj.Births.original(small).grown(op, small)
        births.of["layers"]          # [0, 0, 0, 1, 1, 1] after gj.stack(layers=6)
    """

    of: dict[str, Int[Any, " size"]]
    growths: Int[Any, ""]

    @staticmethod
    def original(model: Any) -> "Births":
        """The births of a model that has not grown."""
        sizes = axes_of(model).sizes
        return Births({axis: np.zeros(n, np.int32) for axis, n in sizes.items()}, np.int32(0))

    def grown(self, op: Operator, model: Any) -> "Births":
        """The births of the model that `op` makes of `model`, of which only shapes are looked at.

        Raises `StateError` if these births are not those of `model`.
        """
        self.check(model)
        number, of = self.growths + 1, dict(self.of)
        last = len(atoms(op)) - 1
        for n, atom in enumerate(atoms(op)):
            for move in atom.maps(axes_of(model)):
                if move.born:
                    # New are the axis, and any other that is cut into other coordinates
                    opened = eqx.filter_eval_shape(move.opened, model)
                    for axis, size in {**axes_of(opened).sizes, move.axis: move.length}.items():
                        if axis == move.axis or size != len(of[axis]):
                            of[axis] = np.full(size, number, np.int32)
                    continue
                old = len(of[move.axis])
                if move.over is not None and move.length < old:
                    # Several heads become one, and their queries stand behind each other in its group
                    xp = np if isinstance(of[move.over], np.ndarray) else jnp
                    of[move.over] = xp.tile(of[move.over], old // move.length)
                    of[move.axis] = merged_births(of[move.axis].reshape(move.length, -1), 1)
                    continue
                if move.over is not None:
                    of[move.over] = dealt_births(of[move.over], move.length // old)
                of[move.axis] = moved_births(of[move.axis], move, number)
            if n < last:
                model = grown_shapes(atom, model)
        return Births(of, number)

    def check(self, model: Any) -> None:
        """Raise `StateError` that lists every axis of the model without a birth for each coordinate."""
        sizes = axes_of(model).sizes
        have = {axis: np.shape(numbers)[0] for axis, numbers in self.of.items()}
        raise_all(
            StateError,
            "births: expected a number for every coordinate of the model (gj.Births.original(model) is "
            "for one that has not grown):",
            [
                f"{axis}: {have.get(axis, 0)} births, {sizes.get(axis, 0)} coordinates"
                for axis in {**sizes, **have}
                if have.get(axis) != sizes.get(axis)
            ],
        )

    def of_entries(self, slot: Slot, sizes: Mapping[str, int]) -> Any:
        """The growth that each entry of a leaf was born in, shaped to broadcast to it.

        Raises `StateError` for entries that were merged of several growths, unless births are traced:
        then such entries are of no part.
        """
        births = entry_births(slot, self.of, sizes)
        if not isinstance(births, Tracer) and np.any(np.asarray(births) == MIXED):
            raise StateError(
                f"{slot.path}: births: heads of several growths were merged when they were regrouped, so "
                "old entries cannot be told from new ones; regroup before heads grow, or train all of it"
            )
        return births

    def masks(self, model: Any, part: Literal["new", "old"] | int = "new") -> Any:
        """Which entries of the parameters are of one part: a tree like `gj.partition(model)[0]`.

        Boolean arrays. `part` is "new" (the last growth's; nothing before the first one), "old" (all
        others), or the number of a growth, 0 for the first model's. Raises `StateError` for
        births of another model and for merged ones, and `GrowthError` for another part, or a growth
        that has not been.
        """
        self.check(model)
        known = part in ("new", "old") or (isinstance(part, int) and not isinstance(part, bool))
        if not known:
            raise GrowthError(
                f"part: expected 'new', 'old' or the number of a growth, got {part!r}"
            )
        latest = None if isinstance(self.growths, Tracer) else int(np.max(self.growths))
        if isinstance(part, int) and latest is not None and not 0 <= part <= latest:
            raise GrowthError(f"part: expected a growth from 0 to {latest}, the latest, got {part}")
        params = partition(model)[0]
        table, masks = axes_of(params), {}
        for slot in table.params():
            births = self.of_entries(slot, table.sizes)
            if isinstance(part, str):
                chosen = (births == self.growths) & (self.growths > 0)
                chosen = ~chosen & (births != MIXED) if part == "old" else chosen
            else:
                chosen = births == part
            xp = np if isinstance(chosen, np.ndarray) else jnp
            masks[slot.steps] = xp.broadcast_to(chosen, slot.value.shape)
        return put(params, masks)

    def ranges(self) -> dict[int, dict[str, str]]:
        """For people: of every growth, the coordinates that it added: `{1: {"layers": "3-5"}}`."""
        words: dict[int, dict[str, str]] = {}
        for axis, numbers in self.of.items():
            numbers = np.asarray(numbers)
            for number in np.unique(numbers).tolist():
                if number:
                    words.setdefault(number, {})[axis] = _ranges(np.flatnonzero(numbers == number))
        return dict(sorted(words.items()))

    def runs(self) -> dict[str, list[list[int]]]:
        """For a file: the births of every axis as `[birth, how many in a row]`."""
        return {axis: _runs(np.asarray(numbers)) for axis, numbers in self.of.items()}


def new(op: Operator, model: Any) -> Any:
    """Which entries of the grown model's parameters `op` adds: masks, like its trained half.

    A tree like `gj.partition(grown)[0]` with a boolean array in place of every parameter: True at the
    entries that have a new coordinate, whether it is drawn or a copy. `model` is the one before growth,
    of which only shapes are looked at. `gj.Births` tells several growths apart.

    **Example**

        masks = gj.new(gj.stack(layers=6), small)
        masks.blocks.block.mlp.up[:, 0, 0]       # [False, False, False, True, True, True]
    """
    if not isinstance(op, Operator):
        raise GrowthError(f"op: expected an operator such as gj.msg(mlp=2048), got {op!r}")
    births = Births.original(model).grown(op, model)
    return births.masks(grown_shapes(op, model))


def grown_shapes(op: Operator, model: Any) -> Any:
    """The grown model without its numbers."""
    return eqx.filter_eval_shape(lambda m: op(m, key=jax.random.key(0)), model)


def moved_births(births: Any, move: AxisMap, number: Any) -> Any:
    """Births along the axis of a map after it; new coordinates are born in growth `number`.

    Where another axis is only dealt out to copies (`AxisMap.over`), these are as old as their sources:
    the queries that they hold are old ones.
    """
    xp = np if isinstance(births, np.ndarray) else jnp
    young = move.source < 0 if move.over is not None else move.is_new()
    if not births.shape[0]:
        return xp.full(move.length, number, births.dtype)
    old = births[np.maximum(move.source, 0)]
    return xp.where(young, xp.asarray(number, births.dtype), old)


def dealt_births(births: Any, parts: int) -> Any:
    """Births along an axis that is dealt out to several copies; `MIXED` where several come together."""
    return merged_births(births.reshape(parts, -1), 0)


def merged_births(births: Any, dim: int) -> Any:
    """Births of coordinates that come together along a dimension; `MIXED` unless they are the same."""
    xp = np if isinstance(births, np.ndarray) else jnp
    same = births.max(dim) == births.min(dim)
    return xp.where(same, births.max(dim), xp.asarray(MIXED, births.dtype))


def entry_births(slot: Slot, births: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    """The growth that each entry of a leaf was born in, shaped to broadcast to it."""
    named = [dim.axis for dim in slot.dims if not dim.literal]
    xp = np if all(isinstance(births[axis], np.ndarray) for axis in named) else jnp
    return over_entries(slot, births, sizes, xp.maximum, xp.int32(0))


def over_entries(
    slot: Slot, vectors: Mapping[str, Any], sizes: Mapping[str, int], combine: Callable, start: Any
) -> Any:
    """The numbers of each entry's coordinates, combined into one and shaped to broadcast to the leaf.

    `vectors` holds a number for every coordinate of every axis; `combine` starts from `start`.
    """
    wholes = []
    for part in slot.parts:
        total: Any = start.reshape((1,) * len(part.dims))
        for i, dim in enumerate(part.dims):
            if not dim.literal:
                vector = vectors[dim.axis].reshape((-1,) + (1,) * (len(part.dims) - i - 1))
                total = combine(total, vector)
        if not slot.spec.parts and all(count == 1 for count in slot.spec.groups):
            return total
        shape = [dim.size(sizes) for dim in part.dims]
        whole: Any = (np if isinstance(total, np.ndarray) else jnp).broadcast_to(total, shape)
        wholes.append(part.join(whole))
    return slot.paste(wholes)


def _runs(numbers: np.ndarray) -> list[list[int]]:
    cuts = np.flatnonzero(np.diff(numbers)) + 1
    return [[int(run[0]), len(run)] for run in np.split(numbers, cuts) if len(run)]


def _ranges(indices: np.ndarray) -> str:
    """Indices for people: `0, 3-5`; long lists are cut off."""
    pieces = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    words = [str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in pieces]
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")
