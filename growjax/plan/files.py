"""Plans in files, by the codec of `growjax.values`, and the differences of two plans."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from growjax import values
from growjax.errors import PlanError
from growjax.plan.plan import Plan


def save_plan(plan: Plan, path: str | Path, *, sealed: bool = False) -> None:
    """Write a plan as indented JSON; the file is replaced in one step.

    `sealed` adds a checksum, so that an altered file is refused, as that of a run is. Raises `PlanError`
    that lists every class and function without a name in files.
    """
    values.write(plan, path, sealed=sealed, error=PlanError)


def load_plan(path: str | Path, *, allow: Sequence[str] = ()) -> Plan:
    """Read a plan from JSON; raises `PlanError` that lists every fault, or that its seal is broken.

    `allow` names packages, besides growjax, whose classes and functions the plan may use; see
    `growjax.values.allow`.
    """
    return values.read(path, Plan, allow=allow, error=PlanError)


def differences(old: Any, new: Any, where: str = "plan") -> Iterator[str]:
    """The differences of two saved plans, one line each, with the path of the field."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from differences(old.get(name), new.get(name), f"{where}.{name}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{where}[{i}]")
    elif old != new:
        yield f"{where}: was {old!r}, is {new!r}"
