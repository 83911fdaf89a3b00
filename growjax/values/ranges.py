"""The types and ranges of fields, declared by their annotations.

    peak: Annotated[float, positive("learning rate")]
    shape: Literal["linear", "cosine"] = "linear"
    clip: Annotated[float, positive("norm")] | None = 1.0

The annotation is a type, a `Literal`, a union, a tuple or a dict; `Annotated` adds a range. Numbers must
be finite, and True and False are not numbers. In this module a `hint` is such an annotation.
"""

import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin


# Integers of a file fit into 64 bits. A plan is checked with some arrays of one number per coordinate,
# so that sizes are bounded by the memory of a small machine: a larger one is a slip or an attack.
_WHOLE = 2**63
_LARGEST = 2**24
_SHOWN = 200  # characters of a value that a message shows
_PLAIN = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "True or False",
    type(None): "None",
}
_Class = TypeVar("_Class", bound=type)


class Range(NamedTuple):
    """A condition on a field's value, and its description for messages ("a positive number")."""

    description: str
    holds: Callable[[Any], bool]

    def __repr__(self) -> str:
        """The description alone: `help` prints it for every field of a plan."""
        return f"Range({self.description!r})"


class Faults(NamedTuple):
    """A condition whose function `of` lists the faults of a field's value, one line each."""

    description: str
    of: Callable[[Any], Iterable[str]]

    def holds(self, value: Any) -> bool:
        # Not `any(self.of(value))`: a fault may be an empty string
        return not any(True for _ in self.of(value))


def positive(noun: str = "number") -> Range:
    """Numbers above 0.

    **Example**

        peak: Annotated[float, positive("learning rate")]
    """
    return Range(f"a positive {noun}", lambda x: x > 0)


def at_least(least: float, noun: str = "") -> Range:
    """Numbers of `least` or more: `at_least(1, "steps")`."""
    return Range(f"{least} or more {noun}".rstrip(), lambda x: x >= least)


def ranged(
    low: float, high: float, noun: str = "a number", *, above: bool = False, below: bool = False
) -> Range:
    """Numbers from `low` to `high`; `above` excludes `low` itself, `below` excludes `high`.

    **Example**

        b1: Annotated[float, ranged(0, 1, "a rate", below=True)] = 0.9
    """
    if above:
        description = f"{noun} above {low} and {'below' if below else 'at most'} {high}"
    else:
        description = f"{noun} from {low} to {'below ' if below else ''}{high}"

    def holds(x: float) -> bool:
        return (low < x if above else low <= x) and (x < high if below else x <= high)

    return Range(description, holds)


def one_of(choices: Iterable[Any]) -> Range:
    """One of some names, for choices that are the keys of a table; otherwise use `Literal`."""
    choices = tuple(choices)
    return Range(f"one of {', '.join(map(repr, choices))}", lambda x: x in choices)


def _is_path(name: str) -> bool:
    """Whether the system takes a text as a path: no NUL, no half of a surrogate pair, not too long."""
    try:
        parts = os.fsencode(name).split(b"/")
    except UnicodeError:
        return False
    short_enough = len(name) < 4000 and all(len(part) <= 255 for part in parts)
    return bool(name) and "\0" not in name and short_enough


# The name of a plan or of a stage: it is printed, and drawn in figures
Name = Annotated[
    str,
    Range(
        f"a text of at most {_SHOWN} printable characters",
        lambda text: text.isprintable() and len(text) <= _SHOWN,
    ),
]
# Paths, which need not exist
Folder = Annotated[str, Range("the name of a folder", _is_path)]
File = Annotated[str, Range("the path of a file or folder", _is_path)]
# A size of an axis, a batch or a window
Size = Annotated[
    int,
    Range("a positive integer", lambda n: n > 0),
    Range("an integer of at most 2**24", lambda n: n <= _LARGEST),
]


# Classes that users extend ------------------------------------------------------------------------


class _Base(NamedTuple):
    description: str  # the description for messages
    members: frozenset[str] | None  # the members of a protocol; None for an ordinary class


_BASES: dict[type, _Base] = {}


def base(description: str) -> Callable[[_Class], _Class]:
    """Decorator for a class that users extend: files may name the classes that extend it.

    A protocol is extended by every class that has its members. `description` says in messages what an
    instance is.

    **Example**

        @base("an objective such as Causal(128)")
        class Objective(Protocol): ...
    """

    def mark(cls: _Class) -> _Class:
        members = None
        # Set by `typing.Protocol`
        if getattr(cls, "_is_protocol", False):
            own = {*vars(cls), *vars(cls).get("__annotations__", ())}
            members = frozenset(m for m in own if m == "__call__" or not m.startswith("_"))
        _BASES[cls] = _Base(description, members)
        return cls

    return mark


def bases() -> tuple[type, ...]:
    """The classes that users extend."""
    return tuple(_BASES)


def derives(cls: type, parent: type) -> bool:
    """Whether a class is a subclass, or has all members of a protocol."""
    entry = _BASES.get(parent)
    if entry is None or entry.members is None:
        try:
            return issubclass(cls, parent)
        except TypeError:
            # A protocol that is not marked by `base` has no instance check: anything is accepted
            return True
    return entry.members <= _members_of(cls)


def _members_of(cls: type) -> set[str]:
    """The attributes and fields of a class. (`hasattr` finds `__call__` on every class.)"""
    return {name for k in cls.__mro__ for name in (*vars(k), *vars(k).get("__annotations__", ()))}


# Hints --------------------------------------------------------------------------------------------


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The annotation of every field of a value's class; Any for one without."""
    names = field_names(cls)
    try:
        known = typing.get_type_hints(cls, include_extras=True)
    except Exception:
        # A forward reference to a name that is imported for type checkers only: nothing is checked
        known = {}
    return {name: known.get(name, Any) for name in names}


@functools.cache
def field_names(cls: type) -> tuple[str, ...]:
    """The fields that the constructor of a dataclass, an `eqx.Module` or a named tuple takes."""
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls) if field.init)
    return tuple(getattr(cls, "_fields", ()))


def fits(hint: Any, value: Any) -> bool:
    """Whether a value is of the type, and in the ranges, that an annotation declares."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(args[0], value) and all(rule.holds(value) for rule in _rules(hint))
    if hint is None or hint is type(None):
        return value is None
    if origin is Literal:
        return isinstance(value, str | int | None) and value in args
    if origin is Union or origin is types.UnionType:
        return any(fits(arg, value) for arg in args)
    if hint is bool or hint is str:
        return isinstance(value, hint)
    # A bool is an int in Python, and a NumPy number is not an int or a float
    if hint is int:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return whole and abs(int(value)) < _WHOLE
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and _finite(value)
    if origin is tuple:
        members = _members(args, value) if isinstance(value, tuple) else None
        return members is not None and all(fits(inner, x) for inner, x in members)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, Mapping) and all(
            fits(args[0], k) and fits(args[1], v) for k, v in value.items()
        )
    if origin is collections.abc.Callable or hint is Callable:
        return callable(value)
    return _is_instance(value, origin or hint)


def _rules(hint: Any) -> list[Range | Faults]:
    """The conditions of an `Annotated` hint; other metadata are somebody else's."""
    return [rule for rule in hint.__metadata__ if isinstance(rule, Range | Faults)]


def _finite(number: Any) -> bool:
    try:
        finite = math.isfinite(number)
    except OverflowError:
        # An integer too large for a float
        return False
    # A file holds integers of at most 64 bits, in the field of a float as well
    return finite and not (isinstance(number, numbers.Integral) and abs(int(number)) >= _WHOLE)


def _is_class(hint: Any) -> bool:
    """Whether this is a class that `isinstance` can check, and not a type variable or Any."""
    return isinstance(hint, type) and hint is not Any


def _is_instance(value: Any, cls: Any) -> bool:
    """`isinstance`, and for a protocol marked by `base` whether the value has its members."""
    if not _is_class(cls):
        return True
    entry = _BASES.get(cls)
    if entry is None or entry.members is None:
        try:
            return isinstance(value, cls)
        except TypeError:
            return True
    return entry.members <= {*getattr(value, "__dict__", ()), *_members_of(type(value))}


def _members(args: tuple[Any, ...], value: tuple[Any, ...]) -> list[tuple[Any, Any]] | None:
    """The pairs (hint, member) of a tuple; None if its length is not the declared one.

    `args` are the arguments of the annotation: of `tuple[int, ...]`, int and an ellipsis.
    """
    if len(args) == 2 and args[1] is Ellipsis:
        return [(args[0], x) for x in value]
    if not args:
        return []
    if len(args) != len(value):
        return None
    return list(zip(args, value, strict=True))


def options(hint: Any) -> Iterator[Any]:
    """The alternatives of an annotation, without their ranges."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from options(args[0])
    elif origin is Union or origin is types.UnionType:
        for arg in args:
            yield from options(arg)
    else:
        yield hint


def member_hints(hint: Any, n: int) -> list[Any]:
    """The hints of the n members of a list that is read for a tuple so annotated."""
    for option in options(hint):
        args = get_args(option)
        if get_origin(option) is tuple and args:
            if len(args) == 2 and args[1] is Ellipsis:
                return [args[0]] * n
            # A list longer or shorter than declared is refused as a whole, by `fits`; until then
            # members without a hint are read as anything
            return [*args, *[Any] * n][:n]
    return [Any] * n


def value_hint(hint: Any) -> Any:
    """The hint of the values of a dict so annotated."""
    for option in options(hint):
        if get_origin(option) in (dict, collections.abc.Mapping):
            return get_args(option)[1]
    return Any


def required(cls: type) -> tuple[str, ...]:
    """The fields without a default in the constructor of a class."""
    try:
        parameters = inspect.signature(cls).parameters
    except (TypeError, ValueError):
        return ()
    fields = field_names(cls)
    return tuple(n for n, p in parameters.items() if p.default is p.empty and n in fields)


def admits(hint: Any, cls: type) -> bool:
    """Whether a field annotated with `hint` may hold an instance of a class."""
    return any(_admits(option, cls) for option in options(hint))


def _admits(hint: Any, cls: type) -> bool:
    origin = get_origin(hint)
    if origin in (Literal, tuple, dict, collections.abc.Mapping) or hint in _PLAIN or hint is None:
        return False
    if origin is collections.abc.Callable:
        return "__call__" in _members_of(cls)
    parent = origin or hint
    return derives(cls, parent) if _is_class(parent) else True


def describe(hint: Any) -> str:
    """An annotation in words, for messages: "a number", "one of 'linear', 'cosine'"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        rules = _rules(hint)
        return rules[0].description if rules else describe(args[0])
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is Union or origin is types.UnionType:
        # The choices of all `Literal`s in a union are joined into one list
        choices: list[Any] = []
        others: list[str] = []
        for arg in args:
            if get_origin(arg) is Literal:
                choices += get_args(arg)
            else:
                others.append(describe(arg))
        first = [describe(Literal[tuple(choices)])] if choices else []
        return " or ".join(dict.fromkeys([*first, *others]))
    if origin is tuple:
        inside = [describe(arg) for arg in args if arg is not Ellipsis]
        return f"a tuple of {', '.join(inside)}" if inside else "an empty tuple"
    if origin in (dict, collections.abc.Mapping):
        return "a dict of names"
    if origin is collections.abc.Callable:
        return "a function"
    if hint in _PLAIN:
        return _PLAIN[hint]
    if hint is None:
        return "None"
    parent = origin or hint
    if parent in _BASES:
        return _BASES[parent].description
    return f"a {getattr(parent, '__name__', parent)}"


def _expected(hint: Any, value: Any) -> str:
    """The expected value in words, for a value that does not fit: the first range that it violates."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated and fits(args[0], value):
        return next(rule.description for rule in _rules(hint) if not rule.holds(value))
    if origin is Union or origin is types.UnionType:
        # `X | None`
        others = [arg for arg in args if arg is not type(None)]
        if len(others) == 1:
            return f"{_expected(others[0], value)} or None"
    return describe(hint)


def faults(hint: Any, value: Any, where: str) -> Iterator[str]:
    """The faults of a value under an annotation, one line each; none if it fits.

    `where` is the path of the value, such as `stages[0].grow`. The fault of one member of a tuple is
    reported at the member.
    """
    if fits(hint, value):
        return
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(value, tuple) and origin in (Union, types.UnionType, Annotated):
        # If one alternative alone is a tuple, that is the one that was meant
        tuples = [arg for arg in args if any(get_origin(o) is tuple for o in options(arg))]
        if len(tuples) == 1 and not fits(tuples[0], value):
            yield from faults(tuples[0], value, where)
            return
    if origin is tuple and isinstance(value, tuple):
        members = _members(args, value)
        if members is not None:
            for i, (inner, x) in enumerate(members):
                yield from faults(inner, x, f"{where}[{i}]")
            return
    if origin is Annotated and fits(args[0], value):
        detailed = [rule for rule in _rules(hint) if isinstance(rule, Faults)]
        if detailed:
            yield from (line for rule in detailed for line in rule.of(value))
            return
    yield f"{where}: expected {_expected(hint, value)}, got {short(value)}"


def field_faults(value: Any) -> Iterator[str]:
    """The faults of every field of a value under its annotation, one line each."""
    for name, hint in hints(type(value)).items():
        yield from faults(hint, getattr(value, name, None), name)


def short(value: Any) -> str:
    """The text of a value for a message, cut to its first characters if it is long."""
    # Python refuses to print integers of more than 4300 digits
    if isinstance(value, int) and abs(value) >= _WHOLE:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception as error:
        # A user's `__repr__` may raise anything, and so does a very long integer inside a value
        return f"a {type(value).__name__} ({type(error).__name__})"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
