"""A part of a model that is a model of its own, and an operator on it: some layers, some hidden units."""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import numpy as np

from growjax.algebra import NONE, AxisMap
from growjax.axes import Axes, Slot, axes_of, put
from growjax.certificate.coordinates import steps
from growjax.deferred import Deferred
from growjax.growth.finishes import Finish, Multiplied, Noise
from growjax.growth.operator import Exactness, Operator, chain
from growjax.growth.upcycling import ExpertMap


# For each axis that is cut, the numbers of the coordinates that stay
Chosen = dict[str, tuple[int, ...]]
_Frozen = tuple[tuple[str, tuple[int, ...]], ...]

# The most coordinates that stay of an axis inside of a block, such as the hidden units
_UNITS = 64


class Part(Operator):
    """Another operator on a part of a model: its maps on the whole model, cut to some coordinates.

    **Fields**

    - `sizes`: the sizes of the whole model before it.
    - `before`, `after`: for each axis that is cut, the coordinates that there are before and after it.
    """

    operator: Operator
    sizes: tuple[tuple[str, int], ...] = eqx.field(static=True)
    before: _Frozen = eqx.field(static=True)
    after: _Frozen = eqx.field(static=True)

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """That of the operator."""
        return self.operator.exactness

    def maps(self, axes: Axes) -> list[AxisMap]:
        """The operator's maps, from the coordinates before to those after."""
        before, after = dict(self.before), dict(self.after)
        moves = []
        for move in self.operator.maps(axes.resized(dict(self.sizes))):
            if move.axis in before:
                move = _cut(move, before[move.axis], after[move.axis])
            moves.append(move)
        return moves

    def completed(self, model: Any) -> Any:
        """As the operator does."""
        return self.operator.completed(model)


def _cut(move: AxisMap, before: tuple[int, ...], after: tuple[int, ...]) -> AxisMap:
    """A map for some of the coordinates."""
    rows = np.asarray(after)
    source = [before.index(i) if i >= 0 else i for i in move.source[rows].tolist()]
    fields = ("share", "produced", "consumed", "elementwise", "branch", "active", "pace")
    values = {name: getattr(move, name) for name in fields}
    cut = {name: np.asarray(x)[rows] for name, x in values.items() if x is not None}
    return dataclasses.replace(move, source=np.asarray(source), **cut)


def choose(op: Operator, model: Any, grown: Any, most: int) -> Chosen | None:
    """A part of a model of at most `most` parameters when it is grown, or of one layer of each stack.

    Layers and units of which there are most copies come first. None if the operator cannot be cut: its
    maps of layers are no copies, or look at several leaves at once.
    """
    table, new = axes_of(model), axes_of(grown)
    stacks = [axis for axis in table.sizes if "stack" in table.roles(axis)]
    moves = [move for atom, axes in steps(op, shapes_in(model)) for move in atom.maps(axes)]
    known = all(type(move) in (AxisMap, ExpertMap) and not _reads_others(move) for move in moves)
    odd = {move.axis for move in moves if not _is_plain(move)} | {move.over for move in moves}
    if not stacks or not known or odd.intersection(stacks):
        return None
    chosen: Chosen = {}
    # Experts may be made of the hidden units of one
    mixes = any(type(move) is ExpertMap for move in moves)
    for axis in [] if mixes else _inner(table):
        if axis not in odd and table.size(axis) > _UNITS:
            counts = _copies(moves, axis, table.size(axis))
            chosen[axis] = tuple(sorted(_first(counts)[:_UNITS]))
    sizes = dict(new.sizes)
    for axis, rows in chosen.items():
        sizes[axis] = sum(_copies(moves, axis, table.size(axis))[list(rows)].tolist())
    for axis in stacks:
        sizes[axis] = 1
        each = sum(_count(slot, sizes) for slot in new.having(axis, "param"))
        counts, room = _copies(moves, axis, table.size(axis)), most // len(stacks)
        layers: list[int] = []
        for layer in _first(counts):
            room -= each * int(counts[layer])
            if layers and room < 0:
                break
            layers.append(layer)
        chosen[axis] = tuple(sorted(layers))
    return chosen


def _reads_others(move: AxisMap) -> bool:
    return move.finish is not None and type(move.finish).prepared is not Finish.prepared


def _is_plain(move: AxisMap) -> bool:
    """Whether a map does the same with some of the coordinates as with all."""
    by_itself = move.finish is None or isinstance(move.finish, Noise | Multiplied)
    dense = move.mixes or move.has_means or move.traced or move.over is not None
    return by_itself and not (dense or move.gated)


def _inner(table: Axes) -> list[str]:
    """The axes between two arrays of a block, whose coordinates know nothing of each other."""

    def roles(axis: str) -> set[str]:
        slots = [slot for slot in table.having(axis, "param") if slot.arrays()]
        return {dim.role for slot in slots for dim in slot.dims if dim.axis == axis}

    return [
        axis
        for axis in table.sizes
        if roles(axis) == {"consumed", "produced"}
        and not table.is_stream(axis)
        and not table.having(axis, "buffer")
        and not table.normalised(axis)
    ]


def _copies(moves: list[AxisMap], axis: str, size: int) -> np.ndarray:
    """How many coordinates each old coordinate of an axis becomes."""
    homes = np.arange(size)
    for move in moves:
        if move.axis == axis:
            homes = np.where(move.source < 0, NONE, homes[np.maximum(move.source, 0)])
    return np.bincount(homes[homes >= 0], minlength=size)


def _first(counts: np.ndarray) -> list[int]:
    """Coordinates in the order of their numbers of copies, most first."""
    return np.argsort(-counts, kind="stable").tolist()


def _count(slot: Slot, sizes: dict[str, int]) -> int:
    return sum(math.prod(d.size(sizes) for d in part.dims) for part in slot.parts if slot.arrays())


def cut(op: Operator, model: Any, chosen: Chosen) -> tuple[Operator, Any]:
    """The operator and the model of a part; leaves that are cut are arrays."""
    parts, before = [], chosen
    for atom, table in steps(op, shapes_in(model)):
        after = dict(before)
        for move in atom.maps(table):
            if move.axis in before:
                after[move.axis] = _after(move, before[move.axis])
        sizes = tuple(table.sizes.items())
        parts.append(Part(atom, sizes, tuple(before.items()), tuple(after.items())))
        before = after
    table, values = axes_of(model), {}
    for slot in table.values():
        if slot.arrays() and any(slot.positions(axis) for axis in chosen):
            values[slot.steps] = jax.tree.map(
                lambda x, s=slot: _taken(s, x, table, chosen), slot.value
            )
    return chain(*parts), put(model, values)


def _taken(slot: Slot, array: Any, table: Axes, chosen: Chosen) -> np.ndarray:
    """The entries of a leaf at the chosen coordinates."""
    axis = slot.dims[0].axis
    if isinstance(array, Deferred) and axis in chosen and not array.dim:
        array = np.concatenate([array.read(i, i + 1) for i in chosen[axis]])
        table = table.resized({axis: len(chosen[axis])})
        chosen = {name: rows for name, rows in chosen.items() if name != axis}

    def take(part: Slot, x: np.ndarray) -> np.ndarray:
        x = part.split(x, table.sizes)
        for name, rows in chosen.items():
            for dim in part.positions(name):
                x = np.take(x, rows, axis=dim)
        return part.join(x)

    return slot.mapped(take, np.asarray(array), table.sizes)


def _after(move: AxisMap, before: tuple[int, ...]) -> tuple[int, ...]:
    """The coordinates after a map that come from those before it, and as many fresh ones at most."""
    source = move.source.tolist()
    fresh = [n for n, i in enumerate(source) if i < 0][: len(before)]
    known = set(before)
    return tuple(n for n, i in enumerate(source) if i in known or n in fresh)


def shapes_in(model: Any) -> Any:
    """The model with shapes for its arrays, deferred or not."""
    is_array = lambda x: eqx.is_array(x) or isinstance(x, Deferred)  # noqa: E731
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x, model
    )
