"""The check that a value's constructor runs."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx

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
    called only if each field fits by itself, so it need not check types. In a dataclass, lists are
    replaced by tuples and `Path`s by strings, as `from_dict` returns them.

    **Example**

        def __post_init__(self):
            check(self, PlanError, "this schedule cannot be used:")
    """
    fields = ranges.field_names(type(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, eqx.Module):
        for name in fields:
            # `object.__setattr__`, because the dataclass is frozen
            object.__setattr__(value, name, _plain(getattr(value, name)))
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


def _plain(value: Any) -> Any:
    """The value with lists, at any depth, replaced by tuples, and paths by strings."""
    # `type(...) is tuple` leaves named tuples alone: they are values of their own
    if isinstance(value, list) or type(value) is tuple:
        return tuple(map(_plain, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value
