"""What every model's configuration must satisfy."""

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

from growjax.errors import AxisError, raise_all
from growjax.nn import ACTIVATIONS


def check_choices(config: Any) -> None:
    """Raise `AxisError` listing every size that is not positive and every choice that is not one."""
    complaints = []
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if hint in (int, int | None) and value is not None and value <= 0:
            complaints.append(f"{field.name}: expected a positive integer, got {value!r}")
        if get_origin(hint) is Literal and value not in get_args(hint):
            complaints.append(f"{field.name}: expected one of {get_args(hint)}, got {value!r}")
    if config.activation not in ACTIVATIONS:
        complaints.append(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, got {config.activation!r}"
        )
    kv_heads = getattr(config, "kv_heads", None)
    if kv_heads and config.heads % kv_heads:
        complaints.append(
            f"heads: {config.heads} query heads cannot share {kv_heads} kv_heads evenly"
        )
    raise_all(AxisError, f"{type(config).__name__} is not a model:", complaints)
