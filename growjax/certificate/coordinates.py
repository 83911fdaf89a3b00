"""The coordinates that an operator adds, read off its maps."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import numpy as np

from growjax import maps
from growjax.algebra import NONE
from growjax.axes import axes_of
from growjax.growth.operator import Operator, atoms
from growjax.optim.carrying import finishes


def shapes(op, model):
    """The grown model, with shapes and dtypes in place of arrays."""
    with jax.enable_x64(True):  # float64 models keep their dtype; others are not widened
        return eqx.filter_eval_shape(lambda m: op(m, key=jax.random.key(0)), model)


def steps(op, model):
    """Each single operator of `op`, with the axis table of the model that it is applied to."""
    *others, last = atoms(op)
    for atom in others:
        yield atom, axes_of(model)
        model = shapes(atom, model)
    yield last, axes_of(model)


def filled(op, model, key, fill: Callable):
    """The grown model, with every closed new coordinate drawn by `fill` instead."""
    for atom in atoms(op):
        for move in atom.maps(axes_of(model)):
            closed = move.closed()
            if closed.any():
                source = np.where(closed, NONE, move.source)
                move = dataclasses.replace(move, source=source, init=fill, finish=None)
            model = maps.apply(move, model, key)
        model = atom.completed(model)
    return model


def only_fills(op, model) -> bool:
    """Whether `filled` differs from the operator by the numbers of new coordinates alone.

    A finish that has the last word, or a call of the operator's own, would see other numbers.
    """
    return all(
        type(atom).__call__ is Operator.__call__ and not any(map(finishes, atom.maps(table)))
        for atom, table in steps(op, model)
    )


def new_coordinates(op, model):
    """For every grown axis, a mask of its new coordinates, and the index of each one's source.

    The source of a copy is the first coordinate with the same old index; that of a fresh coordinate is
    itself. In a chain, coordinates that an earlier operator added stay new.
    """
    new: dict[str, np.ndarray] = {}
    homes: dict[str, np.ndarray] = {}
    for atom, table in steps(op, model):
        # Masks of another length are of axes that an operator has cut into other coordinates
        new = {axis: mask for axis, mask in new.items() if len(mask) == table.size(axis)}
        for move in atom.maps(table):
            if move.born:
                new[move.axis] = move.is_new()
            else:
                before = new.get(move.axis, np.zeros(table.size(move.axis), bool))
                inherited = np.append(before, False)[np.maximum(move.source, 0)]
                new[move.axis] = move.is_new() | inherited
            first: dict[int, int] = {}
            home = []
            for i, source in enumerate(map(int, move.source)):
                home.append(i if source < 0 else first.setdefault(source, i))
            homes[move.axis] = np.asarray(home)
            if move.over is not None:  # its coordinates are dealt out: none has a place of its own
                new.pop(move.over, None)
    sizes = axes_of(shapes(op, model)).sizes
    return {axis: m for axis, m in new.items() if m.any() and len(m) == sizes[axis]}, homes
