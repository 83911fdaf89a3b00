"""A plan or a probe from a file: JSON, or Python that defines it; of a plan, with changed fields."""

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from growjax.errors import FormatError, GrowjaxError, PlanError
from growjax.plan.files import load_plan
from growjax.plan.plan import Plan
from growjax.plan.probe import Probe
from growjax.values import from_dict, from_json, read, to_dict


T = TypeVar("T")


def read_plan(path: str | Path, changes: Sequence[str] = ()) -> Plan:
    """Read the plan in a JSON file, or the variable `plan` of a Python file, with some fields changed.

    `changes` have the form `rate.peak=1e-3` or `stages.1.tokens=4000`; a value is JSON or, if it is not,
    a string. Raises `PlanError` for a file without a plan, and for an unknown field.

    **Example**

        read_plan("plan.json", ["batch=16", "model.dtype=bfloat16"])
    """
    path = Path(path)
    plan = _defined(path, "plan", Plan) if path.suffix == ".py" else load_plan(path)
    if not changes:
        return plan
    saved = to_dict(plan)
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise PlanError(f"{change!r}: expected a change like batch=16")
        _set(saved, name, json_or_text(text))
    return from_dict(saved, Plan, error=PlanError, source=str(path))


def read_probe(path: str | Path) -> Probe:
    """Read the probe in a JSON file, or the variable `probe` of a Python file.

    Raises `PlanError` for a file without one.
    """
    path = Path(path)
    if path.suffix == ".py":
        return _defined(path, "probe", Probe)
    return read(path, Probe, error=PlanError)


def _defined(path: Path, name: str, kind: type[T]) -> T:
    """The value of a variable of a Python file; raises `PlanError` for a file without it."""
    try:
        value = getattr(_module(path), name, None)
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror or error}") from error
    except GrowjaxError:
        raise
    except (Exception, SystemExit) as error:
        # The user's file may raise anything
        raise PlanError(
            f"{path}{_line_in(path, error)}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(value, kind):
        raise PlanError(
            f"{path}: expected it to define `{name}`, a growjax.train.{kind.__name__}, got {value!r}"
        )
    return value


def _line_in(path: Path, error: BaseException) -> str:
    """The line of a file that an error came from, as `:LINE`; empty if it came from elsewhere."""
    if isinstance(error, SyntaxError):
        return f":{error.lineno}" if error.filename == str(path) else ""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f":{lines[-1]}" if lines else ""


def _module(path: Path) -> ModuleType:
    """Run a Python file as a module of its name, with its folder on the import path."""
    module, loaded = ModuleType(path.stem), sys.modules.get(path.stem)
    module.__file__, code = str(path), path.read_bytes()
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # Registered, so that files can name its classes by import path; another module of this name stays
    if loaded is None or getattr(loaded, "__file__", None) == str(path):
        sys.modules[path.stem] = module
    exec(compile(code, str(path), "exec"), vars(module))
    return module


def json_or_text(text: str) -> Any:
    """The value that a command line gives a field: JSON data, or the text itself."""
    try:
        return from_json(text)
    except FormatError:
        return text


def _set(saved: Any, name: str, value: Any) -> None:
    """Set the field of a saved plan at a path such as "stages.1.tokens"."""
    parent: Any = None
    key: Any = None
    node = saved
    for part in name.split("."):
        if isinstance(node, list):
            choices: Any = range(len(node))
            key = int(part) if part.isdigit() else part
        else:
            choices = node if isinstance(node, dict) else ()
            key = part
        if key not in choices:
            fields = ", ".join(map(str, choices))
            expected = f"expected one of {fields}" if fields else "this value has no fields"
            raise PlanError(f"{name}: unknown field {part!r}; {expected}")
        parent, node = node, node[key]
    parent[key] = value
