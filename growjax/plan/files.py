"""Plans as JSON: every value by the name of its class, and back again.

Only classes that a plan may hold are ever made, and only from their own fields: reading a file cannot
run anything.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from growjax import budget, data, growth, select, subnet
from growjax.errors import GrowjaxError, PlanError
from growjax.growth import Chain, Operator
from growjax.models import BERTConfig, GPTConfig, LlamaConfig, T5Config
from growjax.nn import RotaryScaling
from growjax.parallel import Layout
from growjax.plan.optimizer import Optimizer
from growjax.plan.plan import Plan
from growjax.plan.schedule import Schedule
from growjax.plan.stages import Stage, Start


def _classes(module: Any) -> list[type]:
    """The plain-data classes that a module offers."""
    found = [value for value in vars(module).values() if isinstance(value, type)]
    return [cls for cls in found if dataclasses.is_dataclass(cls)]


_KNOWN: dict[str, type] = {
    cls.__name__: cls
    for cls in [
        *(Plan, Stage, Start, Schedule, Optimizer, Layout),
        *(GPTConfig, BERTConfig, LlamaConfig, RotaryScaling, T5Config),
        *_classes(data),
        *(c for c in _classes(budget) if issubclass(c, budget.Clock)),
        *(budget.Op, budget.Timing),
        *(c for c in _classes(select) if issubclass(c, select.Selector)),
        *(c for c in _classes(subnet) if issubclass(c, subnet.Subnet)),
        *(subnet.PathSchedule, subnet.PathStage),
    ]
}


def to_dict(value: Any) -> Any:
    """A plan, or a part of one, as numbers, strings, lists and dicts; `from_dict` is its inverse.

    Raises `PlanError` for what has no name to be saved under (`GrowthError` for a callable `init`).

    **Example**

        json.dumps(to_dict(plan))
    """
    if isinstance(value, Operator | Chain):
        return growth.to_dict(value)
    names = _field_names(value)
    if names is not None:
        if type(value) is not _KNOWN.get(type(value).__name__):
            known = ", ".join(sorted(_KNOWN))
            raise PlanError(f"{value!r} cannot be saved in a plan; known are {known}")
        fields = {name: to_dict(getattr(value, name)) for name in names}
        return {"is": type(value).__name__} | fields
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise PlanError(f"{value!r} cannot be saved in a plan: it is no number, string or list of them")


def from_dict(saved: Any) -> Any:
    """What `to_dict` wrote, also after a trip through JSON; raises `PlanError` for anything else."""
    if isinstance(saved, list):
        return tuple(from_dict(item) for item in saved)
    if not isinstance(saved, Mapping):
        return saved
    if "op" in saved:
        return growth.from_dict(saved)
    fields = {name: value for name, value in saved.items() if name != "is"}
    cls = _KNOWN.get(saved.get("is", ""))
    if cls is None:
        raise PlanError(
            f"no part of a plan is called {saved.get('is')!r}: {', '.join(sorted(_KNOWN))}"
        )
    unknown = sorted(fields.keys() - set(cls_fields(cls)))
    if unknown:
        raise PlanError(
            f"{cls.__name__} has no {', '.join(unknown)}; it has {', '.join(cls_fields(cls))}"
        )
    try:
        return cls(**{name: from_dict(value) for name, value in fields.items()})
    except TypeError as error:
        raise PlanError(f"{cls.__name__}: {error}") from error


def cls_fields(cls: type) -> tuple[str, ...]:
    """The names of the fields of a dataclass or named tuple."""
    named = getattr(cls, "_fields", None)
    return named if named is not None else tuple(f.name for f in dataclasses.fields(cls))


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan as JSON, for people as well. The file is whole as soon as it is there."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(to_dict(plan), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def load_plan(path: str | Path) -> Plan:
    """Read a plan from JSON; raises `PlanError` if it is not one."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        plan = from_dict(saved)
    except (OSError, ValueError) as error:
        if isinstance(error, GrowjaxError):
            raise
        raise PlanError(f"{path}: not a plan in JSON: {error}") from error
    if not isinstance(plan, Plan):
        raise PlanError(f"{path}: expected a plan, found {type(plan).__name__}")
    return plan


def differences(old: Any, new: Any, where: str = "plan") -> Iterator[str]:
    """Where two saved plans differ, one line each."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from differences(old.get(name), new.get(name), f"{where}.{name}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{where}[{i}]")
    elif old != new:
        yield f"{where}: was {old!r}, is {new!r}"


def _field_names(value: Any) -> tuple[str, ...] | None:
    is_named_tuple = isinstance(value, tuple) and hasattr(value, "_fields")
    if is_named_tuple or dataclasses.is_dataclass(value):
        return cls_fields(type(value))
    return None
