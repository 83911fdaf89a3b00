"""The indices at which a program reads its arrays, for one example and without running the program.

JAX clips an index that an array does not have, so a table with too few rows for its inputs is read
wrongly without an error. Indices follow from the example alone, so they are computed here operation by
operation, from shapes of the parameters.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from growjax.trace.loops import scanned


class Read(NamedTuple):
    """One read along one dimension of an array.

    `size` is the number of indices that the dimension has, and `index` the largest one that is read, or
    None if it depends on parameters or on the carry of a loop.
    """

    size: int
    index: int | None


_Lazy = Callable[[], Any]  # computes an array when it is called; None if it is unknown


def reads(run: Callable[[Any, Any], Any], shapes: Any, example: Any) -> list[Read]:
    """Every read of `run(arrays, example)`, in the program's order.

    `shapes` are those of the arrays, and `example` has values. A read that fills in a number for the
    indices that an array does not have is left out: that is deliberate.

    **Example**

        table = jax.ShapeDtypeStruct((9, 4), "float32")
        reads(lambda table, tokens: table[tokens], table, np.array([2, 30]))
        # [Read(size=9, index=30)]
    """
    closed = jax.make_jaxpr(run)(shapes, example)
    unknown = [_unknown] * len(jax.tree.leaves(shapes))
    known = [functools.partial(np.asarray, x) for x in jax.tree.leaves(example)]
    made: list[Read] = []
    with jax.ensure_compile_time_eval():
        _walk(closed.jaxpr, _constants(closed), [*unknown, *known], made)
    return made


def _unknown() -> None:
    return None


def _constants(closed: core.ClosedJaxpr) -> list[_Lazy]:
    return [lambda x=x: x for x in closed.consts]


def _walk(
    jaxpr: core.Jaxpr, constants: Sequence[_Lazy], inputs: Sequence[_Lazy], made: list[Read]
) -> list[_Lazy]:
    """Add the reads of a jaxpr to `made`; returns its outputs, of which nothing is computed yet."""
    values: dict[Any, _Lazy] = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= dict(zip(jaxpr.invars, inputs, strict=True))

    def value(atom: Any) -> _Lazy:
        return (lambda: atom.val) if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        ins = [value(atom) for atom in eqn.invars]
        values |= dict(zip(eqn.outvars, _equation(eqn, ins, made), strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _equation(eqn: Any, ins: list[_Lazy], made: list[Read]) -> list[_Lazy]:
    name, params, nothing = eqn.primitive.name, eqn.params, [_unknown] * len(eqn.outvars)
    if name == "gather":
        fill = params["fill_value"]
        if fill is None or np.isnan(fill):
            indices, dims = ins[1](), params["dimension_numbers"].start_index_map
            columns = [None] * len(dims) if indices is None else np.moveaxis(indices, -1, 0)
            made += _along(eqn, params["slice_sizes"], dims, columns)
        return nothing
    if name == "dynamic_slice":
        made += _along(
            eqn, params["slice_sizes"], range(len(ins) - 1), [start() for start in ins[1:]]
        )
        return nothing
    if name == "scan":
        fixed, starts, rows = scanned(params, ins)
        inner = [*fixed, *[_unknown] * len(starts), *map(_row, rows)]
        _walk(params["jaxpr"].jaxpr, _constants(params["jaxpr"]), inner, made)
        return nothing
    if name == "cond":
        for branch in params["branches"]:
            _walk(branch.jaxpr, _constants(branch), ins[1:], made)
        return nothing
    for inner in params.values():
        if isinstance(inner, core.ClosedJaxpr):
            jaxpr, constants = inner.jaxpr, _constants(inner)
        elif isinstance(inner, core.Jaxpr):
            jaxpr, constants = inner, []
        else:
            continue
        # A loop's indices follow its carry, and a kernel's and a shard's are of parts of arrays
        if name in ("while", "pallas_call", "shard_map") or len(jaxpr.invars) != len(ins):
            return nothing
        return _walk(jaxpr, constants, ins, made)

    @functools.cache
    def results() -> Sequence[Any]:
        arrays = [x() for x in ins]
        if any(array is None for array in arrays):
            return [None] * len(eqn.outvars)
        out = eqn.primitive.bind(*arrays, **params)
        return out if eqn.primitive.multiple_results else [out]

    return [lambda n=n: results()[n] for n in range(len(eqn.outvars))]


def _along(eqn: Any, slices: Sequence[int], dims: Sequence[int], indices: Sequence[Any]):
    """A read for each dimension; a slice of several entries has fewer first indices."""
    shape = eqn.invars[0].aval.shape
    for d, index in zip(dims, indices, strict=True):
        largest = None if index is None or not np.size(index) else int(np.max(index))
        yield Read(shape[d] - slices[d] + 1, largest)


def _row(values: _Lazy) -> _Lazy:
    """One row of what a loop goes through: that with the largest number."""

    def row() -> Any:
        rows = values()
        if rows is None:
            return None
        rows = np.asarray(rows)
        return rows[np.argmax(rows.reshape(len(rows), -1).max(1))] if rows.size else None

    return row
