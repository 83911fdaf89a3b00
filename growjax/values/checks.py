"""The one check that a value runs when it is made."""

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
    """Raise `error` that lists every field which does not hold what its annotation declares.

    To be called when a value is made: from `__post_init__`, or an `eqx.Module`'s `__check_init__`.
    `also` are complaints about what fields are together, or a function that says them; a function is
    asked only if each field fits. In a dataclass a list becomes a tuple, and a `Path` a string: what they
    will be when the value is read back.

    **Example**

        def __post_init__(self):
            check(self, PlanError, "this schedule cannot be used:")
    """
    fields = ranges.field_names(type(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, eqx.Module):
        for name in fields:
            object.__setattr__(value, name, _plain(getattr(value, name)))
    for name in fields:
        if names.is_function(getattr(value, name, None)):
            # Code gave it, or a file that may: what is saved with it can be read again
            with contextlib.suppress(FormatError):
                names.trust(getattr(value, name))
    complaints = list(ranges.field_faults(value))
    if not callable(also):
        complaints += also
    elif not complaints:
        complaints += also()
    raise_all(error, headline or f"this {type(value).__name__} cannot be used:", complaints)


def _plain(value: Any) -> Any:
    """Lists, wherever they are, as tuples; and paths as strings."""
    if isinstance(value, list) or type(value) is tuple:
        return tuple(map(_plain, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value
