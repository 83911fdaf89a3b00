"""The checks of arguments: of a value's fields, by its constructor, and of keys."""

import contextlib
import dataclasses
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from growjax.errors import FormatError, GrowjaxError, raise_all
from growjax.values import names, ranges


def check(
    value: Any,
    error: type[GrowjaxError],
    headline: str | None = None,
    also: Iterable[str] | Callable[[], Iterable[str]] = (),
) -> None:
    """Raise `error` that lists every field whose value does not fit its annotation.

    Call it at the end of construction: from `__post_init__`, or an `eqx.Module`'s `__check_init__`.
    `also` are faults of several fields together, or a function that returns them; the function is
    called only if each field fits by itself, so it need not check types. Integers beyond 32 bits in
    fields of floats are replaced by floats. In a dataclass that is no module, so are lists by tuples and
    `Path`s by strings, as `from_dict` returns them.

    **Example**

        def __post_init__(self):
            check(self, PlanError, "this schedule cannot be used:")
    """
    fields = ranges.field_names(type(value))
    module = isinstance(value, eqx.Module)
    if dataclasses.is_dataclass(value):
        for name, hint in ranges.hints(type(value)).items():
            stated = getattr(value, name)
            if not module or isinstance(stated, numbers.Integral):
                # `object.__setattr__`, because dataclasses and modules are frozen
                object.__setattr__(value, name, _plain(stated, hint))
    for name in fields:
        if names.is_function(getattr(value, name, None)):
            # The function comes from code, or from a file that was allowed to name it. Either way it is
            # trusted from here on, so that this process can read the value back from a file. A
            # function without an import path stays untrusted; it cannot be saved anyway.
            with contextlib.suppress(FormatError):
                names.allow_function(getattr(value, name))
    complaints = list(ranges.field_faults(value))
    if not callable(also):
        complaints += also
    elif not complaints:
        complaints += also()
    raise_all(error, headline or f"this {type(value).__name__} cannot be used:", complaints)


def tuples(value: Any) -> Any:
    """Lists, ranges, arrays and mappings (as their pairs) as tuples, at any depth: for a hashable field.

    Numbers of NumPy become Python's. Anything else stays as it is, so that `check` names what is wrong:
    `tuple(value)` would raise a `TypeError`, and take a text apart.
    """
    if isinstance(value, np.ndarray | np.generic | jax.Array) and not isinstance(value, Tracer):
        return _rows(np.asarray(value).tolist(), np.ndim(value))
    if isinstance(value, Mapping):
        value = tuple(value.items())
    return tuple(map(tuples, value)) if isinstance(value, list | tuple | range) else value


def _rows(lists: Any, depth: int) -> Any:
    """Lists in lists, so deep, as tuples: the rows of large matrices are taken whole."""
    if depth < 2:
        return tuple(lists) if depth else lists
    return tuple(_rows(row, depth - 1) for row in lists)


def _plain(value: Any, hint: Any) -> Any:
    """The value as files return it: tuples for lists, at any depth, and strings for paths.

    JAX takes Python's integers as int32, so larger ones become floats where the hint says a float.
    """
    # `type(...) is tuple` leaves named tuples alone: they are values of their own
    if isinstance(value, list) or type(value) is tuple:
        hints = ranges.member_hints(hint, len(value))
        return tuple(_plain(member, inner) for member, inner in zip(value, hints, strict=True))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral) and 2**31 <= abs(int(value)) < 2**63:
        choices = [*ranges.options(hint)]
        return float(value) if float in choices and int not in choices else value
    return value


def check_key(key: Any, error: type[GrowjaxError]) -> None:
    """Raise `error` for what is no single key, typed or raw, and not None.

    JAX would raise a `TypeError` deep inside a map.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    raw = dtype is not None and dtype == jnp.uint32
    if key is not None and not (typed and shape == () or raw and len(shape or ()) == 1):
        raise error(
            f"key: expected one key such as jax.random.key(0), got {ranges.short(key)}"
            + (f" of shape {shape}; use jax.vmap for several" if typed else "")
        )
