"""A traced program, compared with itself at another size: which constants follow the size of an axis."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import numpy as np

from growjax.trace.dims import Node, unify
from growjax.trace.roles import Roles
from growjax.trace.values import Op, Value
from growjax.trace.walk import Walk


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced model: its parameters, in order, its outputs and the tape between them.

    `rows` are the other inputs, those of the batch.
    """

    inputs: list[Value]
    rows: list[Value]
    outputs: list[Value]
    tape: list[Op]


def trace(run: Callable[[Sequence[Any], Any], Any], arrays: Sequence[Any], batch: Any) -> Program:
    """Trace `run(arrays, batch)` without computing anything, and walk it.

    `arrays` may be shapes. Exceptions of `run` pass through.
    """
    shapes = [jax.ShapeDtypeStruct(np.shape(x), x.dtype) for x in arrays]

    def arrays_of(*arguments):
        return jax.tree.leaves(eqx.filter(run(*arguments), eqx.is_array))

    closed = jax.make_jaxpr(arrays_of)(shapes, batch)
    inputs = [Value([Node(n) for n in x.shape]) for x in shapes]
    rows = [Value([Node(n, data=True) for n in np.shape(x)]) for x in jax.tree.leaves(batch)]
    walk = Walk()
    outputs = walk.run(closed, [*inputs, *rows])
    return Program(inputs, rows, outputs, walk.tape)


def live(program: Program) -> set[int]:
    """The ids of the values that depend on inputs; all others are constants of the program."""
    ids = {id(value) for value in (*program.inputs, *program.rows)}
    count = 0
    while count < len(ids):  # again for loops, whose carry may start as a constant
        count = len(ids)
        for op in program.tape:
            if any(id(value) in ids for value in (*op.ins, *op.beside, *_predicates(op))):
                ids |= {id(value) for value in (op.ins[:1] if op.kind == "equal" else op.outs)}
    return ids


def tie(program: Program, groups: Sequence[Sequence[int]]) -> None:
    """Make the dimensions of parameters that are stacked, or repeat each other, one and the same."""
    for first, *rest in groups:
        for other in rest:
            pairs = zip(program.inputs[first].nodes, program.inputs[other].nodes, strict=True)
            for a, b in pairs:
                unify(a, b)


def sources(node: Node, factors: Mapping[Node, int]) -> np.ndarray:
    """The old index of every new one along a dimension in which some atoms are repeated so often."""
    node = node.root
    if node.structure is None:
        return np.tile(np.arange(node.size), factors.get(node, 1))
    if node.structure == "sum":
        starts = np.cumsum([0, *(part.root.size for part in node.parts)])
        ends = zip(starts, node.parts, strict=False)
        return np.concatenate([start + sources(part, factors) for start, part in ends])
    index = np.zeros(1, int)
    for part in node.parts:
        mine = sources(part, factors)
        index = (index[:, None] * part.root.size + mine[None, :]).ravel()
    return index


def grown_shape(value: Value, factors: Mapping[Node, int]) -> tuple[int, ...]:
    """The shape of a value once some atoms are repeated."""
    return tuple(len(sources(node, factors)) for node in value.nodes)


class Differs(Exception):
    """The program at another size is not the same program."""


def powers(small: Program, large: Program, atom: Node, factor: int) -> dict[int, Fraction]:
    """By which power of an axis's size each constant of the program follows it, by the value's id.

    Raises `Differs` where the larger program has other operations, other shapes than follow from the
    axis, or constants that are no copies of the old ones.
    """
    if len(small.tape) != len(large.tape):
        raise Differs("the program has other operations at another size")
    exponents: dict[int, Fraction] = {}
    moving = live(small)
    for a, b in zip(small.tape, large.tape, strict=True):
        if (a.name, len(a.ins), len(a.outs)) != (b.name, len(b.ins), len(b.outs)):
            raise Differs("the program has other operations at another size")
        for x, y in zip([*a.ins, *a.outs], [*b.ins, *b.outs], strict=True):
            if y.shape != (expected := grown_shape(x, {atom: factor})):
                raise Differs(f"{a.name} gives {list(y.shape)} where {list(expected)} was expected")
            if power := _power(x, y, {atom: factor}):
                exponents[id(x)] = power
        _same_settings(a, b)
        grows = [x.shape for x in a.outs] != [y.shape for y in b.outs]
        if a.name == "random" and grows and not any(id(key) in moving for key in a.beside):
            raise Differs("the program draws as many random numbers, by a key that is a constant")
    return exponents


def _same_settings(a: Op, b: Op) -> None:
    """Raise `Differs` where an operation has other settings at another size, or reads other constants."""
    lengths = [dict(op.options or ()).get("length") for op in (a, b)]
    if a.kind == "carry" and lengths[0] != lengths[1]:
        raise Differs("a loop of the program runs as often as its size")
    # The settings of others are shapes, which have been compared
    if a.kind not in ("shape", "dot", "opaque", "carry", "equal") and (
        (a.kind, a.options) != (b.kind, b.options)
    ):
        raise Differs(f"a setting of {a.name} follows its size")
    keys = (a.beside, b.beside) if a.name == "random" else ((), ())
    for x, y in zip([*keys[0], *_predicates(a)], [*keys[1], *_predicates(b)], strict=True):
        if x.known is not None and y.known is not None and np.shape(x.known) == np.shape(y.known):
            if not np.array_equal(x.known, y.known):
                name = "random numbers" if a.name == "random" else a.name
                raise Differs(f"a constant that decides on {name} follows its size")


def _predicates(op: Op) -> list[Value]:
    """The values by which an operation chooses between others."""
    return [value for value, *_ in op.groups if isinstance(value, Value)]


def _power(x: Value, y: Value, factors: Mapping[Node, int]) -> Fraction:
    if x.known is None or y.known is None:
        return Fraction(0)
    known = np.asarray(x.known)
    if known.ndim == len(x.nodes):
        known = known[np.ix_(*(sources(node, factors) for node in x.nodes))]
    if np.array_equal(known, y.known, equal_nan=known.dtype.kind in "fc"):
        return Fraction(0)
    with np.errstate(all="ignore"):
        ratio = np.asarray(y.known, float) / np.asarray(known, float)
    ratio = ratio[np.asarray(known) != 0]
    if known.dtype.kind not in "fiu" or not ratio.size or np.ptp(ratio) > 1e-6 * abs(ratio[0]):
        raise Differs("a constant array of the program is not a copy of the old one")
    (factor,) = factors.values()
    if ratio[0] <= 0:
        raise Differs("a constant of the program changes its sign with the size")
    power = Fraction(math.log(ratio[0], factor)).limit_denominator(12)
    if not math.isclose(float(factor) ** float(power), ratio[0], rel_tol=1e-5):
        raise Differs("a constant of the program follows the size by no power")
    return power


def multiplicity(node: Node, atom: Node) -> int | None:
    """By which power of the size of an atom the number of entries along a dimension grows.

    None if by no power, since other entries stand beside those of the atom.
    """
    node = node.root
    if node is atom or node.structure is None:
        return int(node is atom)
    parts = [multiplicity(part, atom) for part in node.parts]
    known = [power for power in parts if power is not None]
    if len(known) < len(parts) or (node.structure == "sum" and len(set(known)) > 1):
        return None
    return sum(known) if node.structure == "prod" else known[0]


def unbalanced(
    program: Program, roles: Roles, atom: Node, constants: Mapping[int, Fraction]
) -> list[tuple[str, tuple[int, ...]]]:
    """Why equal copies of an axis would change the outputs, with the parameters nearby; empty if not.

    Every value has a power of the number of copies: a mean has 0, because the sum and the number that it
    is divided by both follow the size.
    """
    scale: dict[int, Fraction] = {}
    faults: list[tuple[str, tuple[int, ...]]] = []
    means = collections.Counter((id(s.op), s.atom) for s in roles.means.values())
    sums = collections.Counter((id(s.op), s.atom) for s in roles.sums)

    def of(value: Value) -> Fraction:
        return scale.get(id(value), Fraction(0)) + constants.get(id(value), Fraction(0))

    def fault(why: str, op: Op) -> None:
        if not faults:  # the first one is the cause of the others
            faults.append((why, roles.near.get(id((op.outs or op.ins)[0]), ())))

    for op in program.tape:
        ins = [of(value) for value in op.ins]
        live = [e for e, value in zip(ins, op.ins, strict=True) if not value.zero]
        result = live[0] if live else Fraction(0)
        if op.kind in ("mul", "dot"):
            result = sum(ins, Fraction(0))
        elif op.kind == "div":
            result = ins[0] - ins[1]
        elif isinstance(op.kind, tuple):
            result = ins[0] * Fraction(op.kind[1])
        elif op.kind in ("add", "equal", "shape") and len(set(live)) > 1:
            fault("the program adds a number that follows its size to one that does not", op)
        elif op.kind in ("bent", "opaque") and any(live):
            fault(f"a sum or a constant that follows its size goes through {op.name}", op)
            result = Fraction(0)
        if op.kind in ("dot", "sum"):
            here = id(op), atom
            for d, _ in op.pairs if means[here] else ():
                power = multiplicity(op.ins[0].nodes[d], atom)
                if power is None or means[here] < sums[here]:
                    fault("the program sums over it and over other entries at once", op)
                else:
                    result += power
        for value in op.outs:
            scale[id(value)] = result
    for value in program.outputs:
        if of(value):
            fault("the outputs would follow its size", program.tape[-1])
    return faults
