"""Operators as text, in the form in which they print themselves."""

import ast
import inspect
from collections.abc import Callable
from typing import Any

from growjax.errors import GrowthError
from growjax.growth.centring import centred
from growjax.growth.copying import aki, copy
from growjax.growth.depth import fresh, solar, stack
from growjax.growth.entries import given, gradmax
from growjax.growth.limited import within
from growjax.growth.lookups import positions, vocabulary
from growjax.growth.lossless import lemon
from growjax.growth.masked import msg
from growjax.growth.matrices import dense
from growjax.growth.mixtures import learned, ligo
from growjax.growth.neighbours import between
from growjax.growth.operator import Chain, Operator, chain
from growjax.growth.regrouping import pool, regroup
from growjax.growth.rotary import context
from growjax.growth.transplants import transplant
from growjax.growth.upcycling import experts, upcycle
from growjax.growth.warming import warm
from growjax.growth.zeroed import zeros


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "aki": aki,
    "between": between,
    "centred": centred,
    "chain": chain,
    "context": context,
    "copy": copy,
    "dense": dense,
    "experts": experts,
    "fresh": fresh,
    "given": given,
    "gradmax": gradmax,
    "learned": learned,
    "lemon": lemon,
    "ligo": ligo,
    "msg": msg,
    "pool": pool,
    "positions": positions,
    "regroup": regroup,
    "solar": solar,
    "stack": stack,
    "transplant": transplant,
    "upcycle": upcycle,
    "vocabulary": vocabulary,
    "warm": warm,
    "within": within,
    "zeros": zeros,
}


def parse(text: str) -> Operator | Chain:
    """The operator that a text describes, with all its options; nothing in the text is executed.

    Calls of the operators' functions and of `chain`, with numbers, words (quoted or not), tuples and
    lists as arguments; whatever an operator prints of itself is read back. Raises `GrowthError` for any
    other text, naming the part that is not understood.

    **Example**

        parse("chain(copy(mlp=2048, shares=random), stack(layers=(0, 1, 1, 2), branch=zero))")
    """
    if not isinstance(text, str):
        raise GrowthError(
            f"text: expected an operator as text, such as 'copy(mlp=2048)', got {text!r}"
        )
    try:
        op = _value(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise GrowthError(f"op: {text!r} cannot be read: {error.msg}") from error
    if not isinstance(op, Operator | Chain):
        raise GrowthError(f"op: expected an operator such as copy(mlp=2048), got {text!r}")
    return op


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _called(node.func.id, node)
    if isinstance(node, ast.Name):
        return node.id  # a word, as a shell would pass it
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_value(element) for element in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise GrowthError(
            f"op: expected numbers, words, tuples and operators, got {ast.unparse(node)!r}"
        ) from error


def _called(name: str, node: ast.Call) -> Any:
    if name not in FUNCTIONS:
        raise GrowthError(f"op: expected one of {', '.join(FUNCTIONS)}, got {name!r}")
    function = FUNCTIONS[name]
    arguments = [_value(argument) for argument in node.args]
    options = {k.arg: _value(k.value) for k in node.keywords if k.arg is not None}
    if len(options) < len(node.keywords):
        raise GrowthError(f"op: {ast.unparse(node)!r} has an argument without a name")
    try:
        inspect.signature(function).bind(*arguments, **options)
    except TypeError as error:
        raise GrowthError(f"op: {name}: {error}") from error
    return function(*arguments, **options)
