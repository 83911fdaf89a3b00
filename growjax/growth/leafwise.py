"""Growth of large models without holding them whole: a leaf at a time, or a layer of it.

The operator is traced once on shapes. Each leaf of the grown model is then a small part of that program,
which needs one leaf of the old model, or a few. Where the part only gathers and multiplies (copies,
zeros, layers from layers), it is applied a layer at a time, or to a block of rows of a table. Where it
draws or adds up (noise, normal numbers, means), the numbers would depend on how the leaf is cut, so it is
made whole, and waits for its readers in a scratch file.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jaxtyping import PRNGKeyArray

from growjax import maps
from growjax.algebra import NONE, AxisMap
from growjax.axes import Axes, Slot, axes_of, put
from growjax.deferred import Deferred
from growjax.errors import GrowthError, raise_all
from growjax.growth.operator import Operator, atoms, check_operator
from growjax.values import check_key


Model = TypeVar("Model")

# Smaller leaves, in bytes, are made whole and stay in memory
SMALL = 2**20
# What a program may consist of that treats every layer, and every row of a table, by itself
_ROWWISE = {
    *(
        "gather",
        "concatenate",
        "broadcast_in_dim",
        "slice",
        "dynamic_slice",
        "reshape",
        "transpose",
    ),
    *("squeeze", "expand_dims", "convert_element_type", "copy", "iota", "select_n", "clamp", "pad"),
    *("mul", "add", "sub", "div", "max", "min", "rem", "lt", "le", "gt", "ge", "eq", "ne", "and"),
    *("or", "not"),
}


def grow_deferred(
    op: Operator,
    model: Model,
    scratch: str | Path,
    *,
    key: PRNGKeyArray | None = None,
    small: int = SMALL,
) -> Model:
    """Grow a model of `Deferred` leaves into another one, whose leaves are grown when they are read.

    Their numbers are bitwise those of `gj.grow`. Memory is that of one layer of a leaf, or of one leaf
    where the operator draws new numbers or adds old ones up.

    **Arguments**

    - `op`, `key`: as for `gj.grow`.
    - `scratch`: a folder for leaves that are made whole. They are there until it is removed, and it has
      to stay while the grown model is used.
    - `small`: leaves below so many bytes are arrays in memory.

    Raises `GrowthError` and whatever the operator's maps raise, before anything is read.
    """
    check_operator(op)
    check_key(key, GrowthError)
    inputs, program, outputs = _traced(op, model, key)
    plan, files = _plan(op, outputs.shapes_before, key), itertools.count()
    old = axes_of(model)

    def grown(slot: Slot, variable: Any) -> Any:
        shape, dtype = slot.value.shape, np.dtype(slot.value.dtype)
        if isinstance(variable, Literal):
            return jnp.asarray(variable.val, dtype)
        sources = dict(zip(program.jaxpr.invars, inputs, strict=True))
        if variable in sources:  # no map touches it
            return sources[variable]
        piece = _part(program, variable)
        whole = functools.partial(_whole, piece, sources)
        if not shape or math.prod(shape) * dtype.itemsize < small:
            return jnp.asarray(whole())
        before = old[slot.path].value if slot.path in old else None
        if isinstance(before, Deferred) and slot.kind == "param":
            rows = _rowwise(plan, slot, before, piece, key)
            if rows is not None:
                return Deferred(shape, dtype, rows, before.dim)
        return _spilled(shape, dtype, whole, Path(scratch) / f"leaf-{next(files)}")

    values: dict[tuple, Any] = {}
    for slot in axes_of(outputs.model).values():
        for steps, leaf in _arrays(slot):
            as_slot = dataclasses.replace(slot, value=leaf)
            values[steps] = grown(as_slot, outputs.variables[id(leaf)])
    return put(outputs.model, values)


def _arrays(slot: Slot) -> Iterator[tuple[tuple, Any]]:
    """The arrays of a slot with the steps to them: of a gate, those of its fields."""
    if slot.value is None:
        return
    if slot.kind != "gate":
        yield slot.steps, slot.value
        return
    for name in ("value", "new", "pace"):
        if getattr(slot.value, name) is not None:
            yield (*slot.steps, name), getattr(slot.value, name)


# The program -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """The grown model's shapes, and the variable of the program for each, by `id`."""

    model: Any
    variables: dict[int, Any]
    shapes_before: Any


def _traced(op: Operator, model: Any, key: Any) -> tuple[list[Any], ClosedJaxpr, _Outputs]:
    """The inputs of the program of a growth, the program, and its outputs."""
    shapes = jax.tree.map(_shape, model)
    is_input = lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)  # noqa: E731
    arrays, static = eqx.partition((op, shapes, key), is_input)
    inputs = jax.tree.leaves(eqx.filter((op, model, key), _is_leaf))
    leaves, tree = jax.tree.flatten(arrays)
    rest: list[Any] = []

    def run(leaves: Sequence[Any]) -> Any:
        op, model, key = eqx.combine(tree.unflatten(leaves), static)
        dynamic, others = eqx.partition(op(model, key=key), eqx.is_array)
        rest.append(others)
        return dynamic

    program, shaped = jax.make_jaxpr(run, return_shape=True)(leaves)
    variables = zip(jax.tree.leaves(shaped), program.jaxpr.outvars, strict=True)
    by_id = {id(shape): variable for shape, variable in variables}
    return inputs, program, _Outputs(eqx.combine(shaped, rest[0]), by_id, shapes)


def _is_leaf(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, Deferred)


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_leaf(x) else x


def _part(program: ClosedJaxpr, variable: Any) -> ClosedJaxpr:
    """The part of a program that computes one of its outputs, with the inputs that this needs."""
    needed, eqns = {variable}, []
    for eqn in reversed(program.jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            eqns.append(eqn)
            needed.update(x for x in eqn.invars if not isinstance(x, Literal))
    jaxpr = program.jaxpr
    pairs = zip(jaxpr.constvars, program.consts, strict=True)
    constants = {x: value for x, value in pairs if x in needed}
    part = jaxpr.replace(
        constvars=[*constants],
        invars=[x for x in jaxpr.invars if x in needed],
        outvars=[variable],
        eqns=eqns[::-1],
    )
    return ClosedJaxpr(part, [*constants.values()])


def _primitives(jaxpr: Jaxpr) -> Iterator[str]:
    """The names of the operations of a program, those inside of its calls included."""
    for eqn in jaxpr.eqns:
        inner = [x for x in eqn.params.values() if isinstance(x, ClosedJaxpr)]
        if eqn.primitive.name not in ("pjit", "jit") or not inner:
            yield eqn.primitive.name
        for closed in inner:
            yield from _primitives(closed.jaxpr)


def _whole(piece: ClosedJaxpr, sources: dict[Any, Any]) -> np.ndarray:
    """A leaf of the grown model, from the leaves that it needs."""
    arrays = [sources[x] for x in piece.jaxpr.invars]
    _check_finite(arrays)
    # The key is no array to NumPy
    arrays = [np.asarray(x) if isinstance(x, Deferred) else x for x in arrays]
    return np.asarray(jax.jit(jaxpr_as_fun(piece))(*arrays)[0])


def _check_finite(arrays: Sequence[Any]) -> None:
    """Raise `GrowthError` for arrays in memory that are not finite; files are checked when read."""
    held = [x for x in arrays if isinstance(x, np.ndarray | jax.Array)]
    floating = [x for x in held if jnp.issubdtype(x.dtype, jnp.floating)]
    faults = [f"{x.dtype}{list(x.shape)}" for x in floating if not np.isfinite(np.asarray(x)).all()]
    raise_all(GrowthError, "these arrays are not finite, and 0 times infinity is not 0:", faults)


def _spilled(
    shape: tuple[int, ...], dtype: np.dtype, make: Callable[[], np.ndarray], file: Path
) -> Deferred:
    """A leaf that is made whole when it is first read, and then read from a file."""
    row = int(np.prod(shape[1:])) * dtype.itemsize

    def read(start: int, stop: int) -> np.ndarray:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            np.ascontiguousarray(make()).tofile(partial)
            partial.replace(file)
        count = (stop - start) * row // dtype.itemsize
        array = np.fromfile(file, dtype, count=count, offset=start * row)
        return array.reshape(stop - start, *shape[1:])

    return Deferred(shape, dtype, read)


# Rows --------------------------------------------------------------------------------------------

# The maps of an operator in order, each with the axis table of the model that it is applied to
_Plan = list[tuple[AxisMap, Axes]]


def _plan(op: Operator, model: Any, key: Any) -> _Plan | None:
    """The maps of an operator; None if one of them is of another kind, which may change the structure."""
    plan: _Plan = []
    for atom in atoms(op):
        table = axes_of(model)
        for move in atom.maps(table):
            if type(move) is not AxisMap:
                return None
            plan.append((move, table))
            table = table.resized(move.resized(table.sizes))
        model = atom(model, key=key)
    return plan


def _rowwise(
    plan: _Plan | None, slot: Slot, before: Deferred, piece: ClosedJaxpr, key: Any
) -> Callable[[int, int], np.ndarray] | None:
    """A function that makes some rows of a grown leaf by themselves; None if that may change a number."""
    axis, stacked = slot.dims[before.dim].axis, slot.dims[before.dim].role == "stack"
    # A leaf with the axis twice (a square), with blocks, or with joined axes before it has no rows
    alone = all(count == 1 for count in slot.spec.groups[: before.dim + 1])
    plain = len(slot.positions(axis)) == 1 and not slot.spec.parts and alone
    if plan is None or not plain or slot.origin or not set(_primitives(piece.jaxpr)) <= _ROWWISE:
        return None
    moves = [(move, table) for move, table in plan if slot.positions(move.axis)]
    for move, _ in moves:
        dense = any(x is not None for x in (move.produced, move.consumed, move.elementwise))
        if move.finish is not None or move.above or move.gated or move.traced:
            return None
        if move.axis == axis and (dense or not stacked):
            return None

    @functools.lru_cache
    def program(fresh: tuple[bool, ...]) -> Callable[..., Any]:
        """Rows through all maps; those of the axis itself have one row each, fresh or not."""

        def run(rows: Any, shares: Sequence[Any]) -> Any:
            at, count = 0, rows.shape[before.dim]
            for move, table in moves:
                if move.axis == axis:
                    move = dataclasses.replace(
                        move, source=[NONE if fresh[at] else 0], share=shares[at]
                    )
                    at += 1
                part = dataclasses.replace(slot, value=rows)
                rows = maps.moved(move, table.resized({axis: count}), part, key=key)
            return rows

        return jax.jit(run)

    dtype = np.dtype(slot.value.dtype)

    def read(start: int, stop: int) -> np.ndarray:
        if not any(move.axis == axis for move, _ in moves):
            return np.asarray(program(())(before.read(start, stop), ()))
        return np.concatenate([row(i) for i in range(start, stop)])

    def row(number: int) -> np.ndarray:
        fresh, shares = [], []
        for move, _ in reversed(moves):
            if move.axis == axis:
                own = None if move.share is None else np.asarray(move.share)[number : number + 1]
                shares.append(None if own is None else own.astype(dtype))
                number = int(move.source[number])
                fresh.append(number < 0)
                number = max(number, 0)
        rows = before.read(number, number + 1)
        return np.asarray(program((*fresh[::-1],))(rows, shares[::-1]))

    return read
