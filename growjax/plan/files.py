"""Plans as files, and where two of them differ. The codec is that of `growjax.values`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from growjax import values
from growjax.errors import PlanError
from growjax.plan.plan import Plan


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan as JSON, for people as well. The file is whole as soon as it is there.

    Raises `PlanError` that lists what has no name to be saved under.
    """
    values.write(plan, path, error=PlanError)


def load_plan(path: str | Path, *, allow: Sequence[str] = ()) -> Plan:
    """Read a plan from JSON; raises `PlanError` that lists every fault.

    `allow` names the packages that a plan's own classes and functions may be imported from; see
    `growjax.values.allow`.
    """
    return values.read(path, Plan, allow=allow, error=PlanError)


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
