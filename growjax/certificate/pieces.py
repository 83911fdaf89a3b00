"""Programs of unrolled layers, in pieces: XLA's time grows with the square of their length."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from growjax.models.config import QUICK


# Fewer turns than this are compiled as one program
TURNS = 8


def repeats(function: Callable[..., Any], *args: Any) -> bool:
    """Whether a part of a function's program repeats `TURNS` times, as that of unrolled layers does."""
    closed, _ = _traced(function, *eqx.partition(args, eqx.is_array))
    return _repetition([_kind(eqn) for eqn in closed.jaxpr.eqns])[2] > 0


def in_pieces(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with the part of its program that repeats compiled once.

    The program is cut into what comes before the repetitions, each of them, and what comes after. Pieces
    that compute the same share a program. Gradients can be taken of the result; it is not for `jax.jit`.
    """
    plans: dict[Any, tuple[ClosedJaxpr, Any, list[tuple[Jaxpr, Callable]], Any]] = {}
    compiled: list[tuple[Any, Callable]] = []

    def run(*args: Any) -> Any:
        arrays, static = eqx.partition(args, eqx.is_array)
        leaves, tree = jax.tree.flatten(arrays)
        types = [(x.shape, x.dtype) for x in leaves]
        key = (tree, *types, *map(id, jax.tree.leaves(static)), jax.config.read("jax_enable_x64"))
        if key not in plans:
            closed, shapes = _traced(function, arrays, static)
            pieces = [(piece, _compiled(piece, compiled)) for piece in _cut(closed.jaxpr)]
            # What is in `static` stays, so that no other object gets its `id`
            plans[key] = closed, jax.tree.structure(shapes), pieces, static
        closed, outputs, pieces, _ = plans[key]
        values = dict(zip(closed.jaxpr.invars, leaves, strict=True))
        values |= dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        read = lambda x: x.val if isinstance(x, Literal) else values[x]  # noqa: E731
        for piece, program in pieces:
            values |= zip(piece.outvars, program(*map(read, piece.invars)), strict=True)
        return jax.tree.unflatten(outputs, map(read, closed.jaxpr.outvars))

    return run


def _traced(function: Callable[..., Any], arrays: Any, static: Any) -> tuple[ClosedJaxpr, Any]:
    """The program of a function, and the shapes of its outputs."""
    of = lambda arrays: function(*eqx.combine(arrays, static))  # noqa: E731
    return jax.make_jaxpr(of, return_shape=True)(arrays)


def _cut(jaxpr: Jaxpr) -> list[Jaxpr]:
    """The pieces of a program, in order."""
    begin, period, turns = _repetition([_kind(eqn) for eqn in jaxpr.eqns])
    places = [0, *(begin + i * period for i in range(turns + 1)), len(jaxpr.eqns)]
    needed = {x for x in jaxpr.outvars if not isinstance(x, Literal)}
    pieces = []
    for start, stop in zip(reversed(places[:-1]), reversed(places[1:]), strict=True):
        eqns = jaxpr.eqns[start:stop]
        made = dict.fromkeys(x for eqn in eqns for x in eqn.outvars)
        used = dict.fromkeys(
            x for eqn in eqns for x in eqn.invars if not isinstance(x, Literal) and x not in made
        )
        outputs = [x for x in made if x in needed]
        if eqns:
            pieces.append(jaxpr.replace(constvars=[], invars=[*used], outvars=outputs, eqns=eqns))
        needed = (needed - made.keys()) | used.keys()
    return pieces[::-1]


def _repetition(kinds: Sequence[Any]) -> tuple[int, int, int]:
    """Where a sequence begins to repeat, the length of a turn, how many there are; zeros if it does not.

    The repetition that covers most counts; of several that cover nearly as much, that of shorter turns.
    """
    best, covered = (0, 0, 0), 0.0
    for period in range(1, len(kinds) // TURNS + 1):
        run = 0
        for i in range(len(kinds) - period + 1):
            if i < len(kinds) - period and kinds[i] == kinds[i + period]:
                run += 1
                continue
            turns = run // period + 1
            if turns >= TURNS and turns * period > 1.1 * covered:
                best, covered = (i - run, period, turns), turns * period
            run = 0
    return best


def _kind(eqn: Any) -> Any:
    """What equations of equal layers have in common."""
    return eqn.primitive, tuple(str(x.aval) for x in (*eqn.invars, *eqn.outvars))


# Programs of pieces -------------------------------------------------------------------------------


def _compiled(piece: Jaxpr, compiled: list[tuple[Any, Callable]]) -> Callable:
    """The program of a piece: that of an equal one, or a new one."""
    form = _form(piece)
    for other, program in compiled:
        if _same(form, other):
            return program
    compiled.append((form, _program(piece)))
    return compiled[-1][1]


def _form(piece: Jaxpr) -> Any:
    """A piece without the names of its variables; equal forms compute the same."""
    number: dict[Any, int] = {}

    def name(x: Any) -> Any:
        if isinstance(x, Literal):
            return "literal", str(x.aval), getattr(x.val, "tobytes", lambda: x.val)()
        return number.setdefault(x, len(number)), str(x.aval)

    eqns = [
        (eqn.primitive, list(eqn.params.items()), [name(x) for x in (*eqn.invars, *eqn.outvars)])
        for eqn in piece.eqns
    ]
    return [name(x) for x in piece.invars], eqns, [name(x) for x in piece.outvars]


def _same(form: Any, other: Any) -> bool:
    """Whether two forms are equal; programs inside of them (of `jax.jit`, say) have to be one object.

    JAX traces equal calls once. Where it does not, pieces are compiled twice, and are still right.
    """
    if form is other:
        return True
    if isinstance(form, list | tuple) and type(form) is type(other) and len(form) == len(other):
        return all(map(_same, form, other))
    # An array as a parameter has no truth
    equal = form == other
    return equal if isinstance(equal, bool) else False


def _program(piece: Jaxpr) -> Callable:
    """A piece compiled quickly, and its derivative too: JAX takes no options for programs in others."""
    function = jaxpr_as_fun(ClosedJaxpr(piece, []))
    jit = functools.partial(jax.jit, compiler_options=QUICK)
    inputs, outputs = _differentiable(piece.invars), _differentiable(piece.outvars)

    @jit
    def ahead(*values):
        numbers, rest = _split(values, inputs)
        of = lambda *numbers: _split(function(*_merged(numbers, rest, inputs)), outputs)  # noqa: E731
        return jax.vjp(of, *numbers, has_aux=True)

    back = jit(lambda pull, gradients: pull(gradients))
    program = jax.custom_vjp(jit(function))

    def forward(*values):
        results, pull, rest = ahead(*values)
        return _merged(results, rest, outputs), pull

    def backward(pull, gradients):
        of_numbers = back(pull, _split(gradients, outputs)[0])
        return tuple(_merged(of_numbers, [None] * inputs.count(False), inputs))

    program.defvjp(forward, backward)
    return program


def _differentiable(variables: Sequence[Any]) -> list[bool]:
    return [jnp.issubdtype(x.aval.dtype, jnp.inexact) for x in variables]


def _split(values: Sequence[Any], chosen: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    pairs = list(zip(values, chosen, strict=True))
    return [x for x, yes in pairs if yes], [x for x, yes in pairs if not yes]


def _merged(some: Sequence[Any], others: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
    """What `_split` has split."""
    one, other = iter(some), iter(others)
    return [next(one) if yes else next(other) for yes in chosen]
