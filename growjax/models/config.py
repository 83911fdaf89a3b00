"""What every model's configuration must satisfy."""

import dataclasses
import numbers
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax.numpy as jnp

from growjax.errors import AxisError, raise_all
from growjax.nn import ACTIVATIONS


def check_choices(config: Any, also: Iterable[str] = ()) -> None:
    """Raise `AxisError` with every size or constant that is not positive and every unknown choice.

    `also` are complaints of the model's own, reported in the same error.
    """
    complaints = []
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        whole = hint is int or (hint == int | None and value is not None)
        if whole and not _positive(value, numbers.Integral):
            complaints.append(f"{field.name}: expected a positive integer, got {value!r}")
        if hint is float and not _positive(value, numbers.Real):
            complaints.append(f"{field.name}: expected a positive number, got {value!r}")
        if get_origin(hint) is Literal and value not in get_args(hint):
            complaints.append(f"{field.name}: expected one of {get_args(hint)}, got {value!r}")
    if config.activation not in ACTIVATIONS:
        complaints.append(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, got {config.activation!r}"
        )
    if config.dtype is not None and not _floating(config.dtype):
        complaints.append(
            "dtype: expected None or a floating-point type such as 'bfloat16', "
            f"got {config.dtype!r}"
        )
    kv_heads = getattr(config, "kv_heads", None)
    if kv_heads and config.heads % kv_heads:
        complaints.append(
            f"heads: {config.heads} query heads cannot share {kv_heads} kv_heads evenly"
        )
    raise_all(AxisError, f"{type(config).__name__} is not a model:", [*complaints, *also])


def odd_rotary(head_dim: int) -> list[str]:
    """The complaint about a head that rotary positions cannot turn, if there is one."""
    fault = f"head_dim: rotary positions turn pairs, so it must be even, got {head_dim}"
    return [fault] if head_dim % 2 else []


def _positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


def _floating(name: str) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(name), jnp.floating)
    except TypeError:
        return False
