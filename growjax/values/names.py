"""The names of classes and functions in files, and which of them a file may use.

A class of growjax has a name like `growjax:Plan`, any other class its import path, `my_pkg.ops:Widen`.
Names hold the module, so that two classes with the same bare name stay apart. A format number above 1
follows the name: `growjax:Plan@2`.

A file may come from a stranger, so reading it must not run the stranger's code:

- a class is instantiated only if it is registered, or if it extends a base that growjax has for users
  (`ranges.base`);
- a function is used only if it is registered, or if code of this process has put it into a value;
- a package is imported only if it is allowed by name (`allow`). Any class or function of an allowed
  package may be used as well.
"""

import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

import equinox as eqx

from growjax.errors import FormatError
from growjax.values import ranges


_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_Thing = TypeVar("_Thing", bound=Callable)
# The clock files that are committed with results were written when classes had bare names
_LEGACY = {name: f"growjax:{name}" for name in ("FlopsClock", "DepthClock", "MeasuredClock")}
# Importing this module imports, and so registers, every class of growjax that files hold
_ALL = "growjax.plan.files"

_registry: dict[str, Any] = {}  # name -> class or function
_names: dict[Any, str] = {}  # class or function -> name
_formats: dict[str, int] = {}  # name -> format number
_allowed: set[str] = set()  # packages that files may import
_allowed_functions: set[str] = set()  # import paths of functions that files may name


@overload
def register(thing: _Thing, *, name: str | None = None, format: int = 1) -> _Thing: ...
@overload
def register(*, name: str | None = None, format: int = 1) -> Callable[[_Thing], _Thing]: ...
def register(thing: Any = None, *, name: str | None = None, format: int = 1) -> Any:
    """Decorator that lets files hold a class, or name a function, wherever it is defined.

    Needed for a class that extends no base of growjax, and for one without an import path: defined in a
    function, in a notebook, or in the script that is run.

    **Arguments**

    - `name`: the name in files; by default `module:Name`.
    - `format`: raise it when the meaning of a field changes; files of another format are refused.

    **Example**

        @gj.register
        @dataclasses.dataclass(frozen=True)
        class Widen:
            factor: int
    """
    if name is not None and not _PATH.fullmatch(name):
        raise FormatError(f"name: expected one like my_pkg.ops:Widen, got {name!r}")
    if name is not None and name.startswith("growjax:"):
        raise FormatError(f"name: {name!r} is reserved for growjax; give your own package's")
    if thing is None:
        return functools.partial(register, name=name, format=format)
    if name is None:
        own = thing.__module__.partition(".")[0] == "growjax"
        name = f"growjax:{thing.__name__}" if own else f"{thing.__module__}:{thing.__qualname__}"
    _registry[name], _names[thing], _formats[name] = thing, name, format
    return thing


def allow(*packages: str) -> None:
    """Let files that this process reads import these packages, and use their classes and functions.

    That runs code of the packages. The `growjax` commands take `--allow my_pkg`.

    **Example**

        gj.values.allow("my_pkg")
    """
    wrong = [p for p in packages if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", p)]
    if wrong:
        raise FormatError(f"allow: expected names of packages such as my_pkg, got {wrong}")
    _allowed.update(packages)


def allow_option(data: Any = None) -> str:
    """What a proposed command must end with to read the same files: " --allow my_pkg", or nothing.

    `data`, a value as it is in a file (`to_dict`), adds the packages of its own classes and functions.
    """
    packages = sorted({*_allowed, *_packages(data)})
    return f" --allow {' '.join(packages)}" if packages else ""


def _packages(data: Any) -> Iterator[str]:
    """The packages, besides growjax, of the classes and functions in a value as it is in a file."""
    if isinstance(data, Mapping):
        names = [data.get("is"), data.get("name") if data.get("is") == "function" else None]
        for name in names:
            package = name.partition(":")[0].partition(".")[0] if isinstance(name, str) else ""
            if isinstance(name, str) and ":" in name and package != "growjax":
                yield package
    if isinstance(data, Mapping | list | tuple):
        for item in data.values() if isinstance(data, Mapping) else data:
            yield from _packages(item)


def is_value(value: Any) -> bool:
    """Whether this is an instance of a class that files can hold with its fields."""
    cls = type(value)
    return bool(ranges.field_names(cls)) or isinstance(value, eqx.Module) or _is_dataclass(cls)


def is_function(value: Any) -> bool:
    """Whether this is a function, wrapped by JAX or Equinox or not; a class is none."""
    return callable(value) and hasattr(value, "__qualname__") and not isinstance(value, type)


def _is_dataclass(cls: type) -> bool:
    return hasattr(cls, "__dataclass_fields__")


def tag_of(cls: type) -> str:
    """The name of a class in files, with its format number; raises `FormatError` if it has none."""
    name = _names.get(cls)
    if name is None:
        name = f"{cls.__module__}:{cls.__qualname__}"
        if _loaded(name) is not cls:
            raise FormatError(
                f"{name}: no import leads to this class; move it to a module, or decorate it with "
                "@gj.register"
            )
        if not _extends(cls):
            raise FormatError(
                f"{name}: it extends nothing that a file may hold; decorate it with @gj.register"
            )
    elif _registry[name] is not cls:
        raise FormatError(f"{name}: this class was defined again, and the newer one has the name")
    number = _formats.get(name, 1)
    return name if number == 1 else f"{name}@{number}"


def path_of(function: Any) -> str:
    """The name of a function in files; raises `FormatError` if it has none."""
    name = _names.get(function) if _hashable(function) else None
    if name is not None:
        return name
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    path = f"{module}:{name}"
    if module is None or name is None or _loaded(path) is not function:
        raise FormatError(
            f"{ranges.short(function)}: no import leads to this function; move it to a module, decorate "
            "it with @gj.register, or use a name that growjax knows"
        )
    return path


def allow_function(function: Any) -> str:
    """Let files that this process reads name a function that its own code uses; returns the name."""
    path = path_of(function)
    _allowed_functions.add(path)
    return path


def resolve_class(tag: str, hint: Any = Any, allowed: Sequence[str] = ()) -> type:
    """The class that a file names, for a field declared as `hint`.

    Raises `FormatError` if the class is unknown, not allowed, of another format, or no instance of it
    fits the field.
    """
    name, numbered, number = _LEGACY.get(tag, tag).partition("@")
    if name not in _registry and name.startswith("growjax:"):
        importlib.import_module(_ALL)
    cls = _registry.get(name)
    if cls is None:
        if ":" not in name:
            raise FormatError(
                f"{ranges.short(tag)} is a name of growjax 0.1, whose files are not read any more; make "
                "the plan anew"
            )
        if name.startswith("growjax:"):
            raise FormatError(
                f"growjax has no {name.removeprefix('growjax:')!r}; is it a newer one's?"
            )
        cls = _imported(name, allowed)
        own = _names.get(cls) if isinstance(cls, type) else None
        if own is not None:
            # Its own name has its format number, which another path to it would evade
            raise FormatError(f"{name}: its name in files is {own}")
        if not isinstance(cls, type) or not _extends(cls):
            raise FormatError(
                f"{name} is nothing that a file may hold; its own code can decorate it with @gj.register"
            )
    elif not isinstance(cls, type):
        raise FormatError(f"{name} is a function, and no class")
    known = _formats.get(name, 1)
    # A name without a number is of format 1. The number is cut for the message: it may be any text.
    if numbered and number != str(known):
        raise FormatError(
            f"{ranges.short(tag)}: of format {number[:9]}, and format {known} is read"
        )
    if not numbered and known != 1:
        raise FormatError(f"{name}: of format 1, and format {known} is read")
    if not ranges.admits(hint, cls):
        raise FormatError(f"expected {ranges.describe(hint)}, and it is a {name}")
    return cls


def resolve_function(path: str, allowed: Sequence[str] = (), *, code: bool = False) -> Any:
    """The function at an import path; raises `FormatError` if a file may not name it.

    `code` says that the path comes from this process's own code and not from a file: any is allowed.
    """
    if path in _registry:
        return _registry[path]
    if not _PATH.fullmatch(path):
        raise FormatError(f"expected an import path such as my_pkg.models:build, got {path!r}")
    package = path.partition(":")[0]
    if not code and path not in _allowed_functions and not _is_allowed(package, allowed):
        raise FormatError(_refusal(path, "and a function that a file names is code to run"))
    function = _import(path)
    home = getattr(function, "__module__", None)
    if not callable(function):
        raise FormatError(f"{path}: expected a function, and it is {ranges.short(function)}")
    # A module may hold a function of another one, as `my_pkg.os.system` would be
    if not code and path not in _allowed_functions and not _is_allowed(str(home), allowed):
        raise FormatError(f"{path}: it is of {home}, which is not allowed")
    return function


def _hashable(value: Any) -> bool:
    return getattr(value, "__hash__", None) is not None


def _extends(cls: type) -> bool:
    """Whether a class extends a base for users, and has fields."""
    if not (_is_dataclass(cls) or hasattr(cls, "_fields")):
        return False
    return any(ranges.derives(cls, parent) for parent in ranges.bases())


def _is_allowed(package: str, allowed: Sequence[str]) -> bool:
    """Whether a package, or a package that contains it, is allowed: here or for the whole process."""
    names = {*_allowed, *allowed}
    return any(package == name or package.startswith(f"{name}.") for name in names)


def _refusal(path: str, why: str) -> str:
    package = path.partition(":")[0].partition(".")[0]
    return (
        f"{path}: the package {package!r} is not allowed, {why}; if you trust it, give --allow {package} "
        f"(in code, gj.values.allow({package!r}))"
    )


def _imported(path: str, allowed: Sequence[str]) -> Any:
    """The class or other object at an import path that a file names, if its package is allowed."""
    if not _PATH.fullmatch(path):
        raise FormatError(f"expected a name like my_pkg.ops:Widen, got {ranges.short(path)}")
    package = path.partition(":")[0]
    if package not in sys.modules and not _is_allowed(package, allowed):
        raise FormatError(_refusal(path, "nor is it imported"))
    return _import(path)


def _import(path: str) -> Any:
    """Import the module of an import path and return its class or function."""
    module, _, name = path.partition(":")
    try:
        thing = importlib.import_module(module)
        for attribute in name.split("."):
            thing = getattr(thing, attribute)
    except Exception as error:
        # Importing a module runs it, which may raise anything
        raise FormatError(f"{path}: cannot be imported: {type(error).__name__}: {error}") from error
    return thing


def _loaded(path: str) -> Any:
    """The class or function at an import path, without importing; None if its module is not loaded."""
    module, _, name = path.partition(":")
    thing = sys.modules.get(module)
    for attribute in name.split("."):
        thing = getattr(thing, attribute, None)
    return thing
