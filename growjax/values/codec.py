"""The codec: values to plain dicts and JSON, and back.

    {"is": "growjax:Schedule", "peak": 0.002, "shape": "wsd"}
    {"is": "function", "name": "my_pkg.inits:orthogonal"}

The file of a value may end with a checksum of the rest, under the key "sha-256".

A value holds numbers, strings, True, False, None, tuples (lists in a file), dicts with strings for keys,
functions that have a name, and values. The key "is" holds the name of the class. Reading lists every
fault with its path in the data, and takes time and memory in proportion to the size of the file.
"""

import collections
import contextlib
import hashlib
import json
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from growjax.errors import FormatError, GrowjaxError, raise_all
from growjax.values import names, ranges


_DEPTH = 64  # the deepest nesting of values in values; Python's own recursion limit lies far above
_BYTES = 1 << 26  # the largest file, 64 MiB: clocks and plans have some thousand lines
_VALUES = 10_000  # the most values of a file: each takes up to a millisecond to check
_FAULTS = 30  # the most faults that one error lists
_SEAL = "sha-256"  # no name of a field, so no class can have it
# The result of reading data that have a fault. Not None, which is a value.
_INVALID: Any = object()


def to_dict(value: Any, *, error: type[GrowjaxError] = FormatError) -> Any:
    """Convert a value to numbers, strings, lists and dicts; `from_dict` is the inverse.

    Raises `error` that lists every part of the value that cannot be saved, with its path.

    **Example**

        json.dumps(gj.values.to_dict(plan))
    """
    complaints: list[str] = []
    saved = _written(value, "", 0, complaints)
    raise_all(error, f"this {type(value).__name__} cannot be saved:", complaints)
    return saved


def _written(value: Any, where: str, depth: int, complaints: list[str]) -> Any:
    """The plain form of the value at the path `where`; faults are added to `complaints`."""
    if value is None or isinstance(value, str | bool):
        return value
    if depth > _DEPTH:
        complaints.append(f"{where}: more than {_DEPTH} values in one another")
    elif isinstance(value, numbers.Real):
        # Also a NumPy number; `fits` refuses integers of more than 64 bits
        kind: Any = int if isinstance(value, numbers.Integral) else float
        if ranges.fits(kind, value):
            return kind(value)
        complaints.append(f"{_at(where)}{ranges.short(value)} is no number that a file can hold")
    elif names.is_function(value):
        try:
            return {"is": "function", "name": names.allow_function(value)}
        except FormatError as fault:
            complaints.append(f"{_at(where)}{fault}")
    elif names.is_value(value):
        return _fields_written(value, where, depth, complaints)
    elif isinstance(value, list | tuple):
        return [_written(x, f"{where}[{i}]", depth + 1, complaints) for i, x in enumerate(value)]
    elif isinstance(value, Mapping):
        saved = {}
        for key, x in value.items():
            # "is" marks a value, so a plain dict cannot have it as a key
            if isinstance(key, str) and key != "is":
                saved[key] = _written(x, _join(where, key), depth + 1, complaints)
            else:
                complaints.append(f"{_at(where)}{ranges.short(key)} cannot be a key")
        return saved
    else:
        complaints.append(
            f"{_at(where)}{ranges.short(value)} is no number, string, tuple, dict, function or value"
        )
    return None


def _fields_written(value: Any, where: str, depth: int, complaints: list[str]) -> Any:
    """The plain form of a value with fields: the name of its class, then each field."""
    cls = type(value)
    try:
        saved = {"is": names.tag_of(cls)}
    except FormatError as fault:
        complaints.append(f"{_at(where)}{fault}")
        return None
    for name in ranges.field_names(cls):
        saved[name] = _written(getattr(value, name), _join(where, name), depth + 1, complaints)
    return saved


def from_dict(
    saved: Any,
    expected: Any = Any,
    *,
    allow: Sequence[str] = (),
    error: type[GrowjaxError] = FormatError,
    source: str = "",
) -> Any:
    """Make the value that `to_dict` converted; `saved` may have gone through JSON in between.

    Raises `error` that lists every fault with its path: an unknown class or field, a value that its
    class refuses, a package that is not allowed.

    **Arguments**

    - `expected`: a class, or an annotation, that the value must fit.
    - `allow`: packages that may be imported for it, besides those of `gj.values.allow`.
    - `source`: the origin of the data, such as a file's path, for the message.

    **Example**

        gj.values.from_dict(json.loads(text), gj.Operator, allow=["my_pkg"])
    """
    reader = _Reader(allow)
    value = reader.read(saved, "", 0, expected)
    if not reader.count and not ranges.fits(expected, value):
        reader.fault("", f"expected {ranges.describe(expected)}, got {ranges.short(value)}")
    more = [f"and {reader.count - _FAULTS} more"] if reader.count > _FAULTS else []
    raise_all(error, f"{source or 'this value'} cannot be read:", [*reader.faults, *more])
    return value


class _Reader:
    """Reads the data of one file, and collects their faults."""

    def __init__(self, allow: Sequence[str]):
        self.allow = allow
        self.faults: list[str] = []  # the first `_FAULTS` of them
        self.count = 0  # all of them
        self.values = 0  # the values read so far, right or wrong

    def fault(self, where: str, complaint: object) -> Any:
        """Add a fault of the data at the path `where`; returns `_INVALID`."""
        self.count += 1
        if self.count <= _FAULTS:
            # The fault of a nested value may list several lines: indent them below their path
            self.faults.append(f"{_at(where)}{complaint}".replace("\n", "\n    "))
        return _INVALID

    def read(self, saved: Any, where: str, depth: int, hint: Any) -> Any:
        """The value of the data at the path `where`, or `_INVALID` after a fault.

        `hint` is the annotation that the value should fit.
        """
        if saved is None or isinstance(saved, str | bool | int | float):
            # Checked before a constructor sees it: some take a string from code (a path to a function,
            # say) where a file must hold {"is": "function", ...}, which is subject to `allow`
            complaint = next(ranges.faults(hint, saved, ""), None) or _no_number(saved)
            return saved if complaint is None else self.fault(where, complaint.removeprefix(": "))
        if depth > _DEPTH:
            return self.fault(where, f"more than {_DEPTH} values in one another")
        if isinstance(saved, list | tuple):
            inner = ranges.member_hints(hint, len(saved))
            members = [
                self.read(x, f"{where}[{i}]", depth + 1, inner[i]) for i, x in enumerate(saved)
            ]
            return _INVALID if any(x is _INVALID for x in members) else tuple(members)
        if not isinstance(saved, Mapping):
            return self.fault(where, f"{ranges.short(saved)} is nothing that JSON holds")
        # Only data that `from_json` read have this attribute
        for key in getattr(saved, "repeated", ()):
            self.fault(where, f"{ranges.short(key)} is repeated")
        if "is" in saved:
            return self._value(saved, where, depth, hint)
        inner = ranges.value_hint(hint)
        read = {k: self.read(v, _join(where, str(k)), depth + 1, inner) for k, v in saved.items()}
        return _INVALID if any(x is _INVALID for x in read.values()) else read

    def _value(self, saved: Mapping[str, Any], where: str, depth: int, hint: Any) -> Any:
        """The instance of the class, or the function, that the data name."""
        self.values += 1
        if self.values > _VALUES:
            # The first one too many is a fault; the rest are not looked at
            first = self.values == _VALUES + 1
            return (
                self.fault(where, f"more than {_VALUES:,} values in a file") if first else _INVALID
            )
        fields = {name: x for name, x in saved.items() if name != "is"}
        tag = saved["is"]
        if not isinstance(tag, str):
            return self.fault(where, f"'is': expected the name of a class, got {ranges.short(tag)}")
        try:
            if tag == "function":
                return self._function(fields)
            cls = names.resolve_class(tag, hint, self.allow)
        except FormatError as fault:
            return self.fault(where, fault)
        before = self.count
        known = ranges.field_names(cls)
        unknown = [ranges.short(name) for name in fields if name not in known]
        if unknown:
            has = ", ".join(known) or "no fields"
            self.fault(where, f"{cls.__name__} has no {', '.join(unknown)}; it has {has}")
        lacking = [name for name in ranges.required(cls) if name not in fields]
        if lacking:
            self.fault(where, f"{cls.__name__} lacks {', '.join(lacking)}")
        hints, read = ranges.hints(cls), {}
        for name, x in fields.items():
            if name in known:
                read[name] = self.read(x, _join(where, name), depth + 1, hints[name])
        if self.count > before:
            return _INVALID
        return self._made(cls, read, where)

    def _made(self, cls: type, fields: dict[str, Any], where: str) -> Any:
        """An instance of the class, its fields checked by its constructor and by its annotations."""
        try:
            value = cls(**fields)
        except GrowjaxError as fault:
            return self.fault(where, fault)
        except Exception as fault:
            # A user's class may raise anything for a field of the wrong type
            return self.fault(where, f"{cls.__name__}: {type(fault).__name__}: {fault}")
        # A user's class need not call `check`
        complaints = list(ranges.field_faults(value))
        for complaint in complaints:
            self.fault(where, complaint)
        return _INVALID if complaints else value

    def _function(self, fields: Mapping[str, Any]) -> Any:
        name = fields.get("name")
        if not isinstance(name, str) or len(fields) > 1:
            raise FormatError("a function has a name, an import path, and nothing else")
        return names.resolve_function(name, self.allow)


def _no_number(saved: Any) -> str | None:
    """The fault of a number where no annotation declares one: NaN, infinity, more than 64 bits."""
    if isinstance(saved, str | None) or ranges.fits(int | float, saved) or isinstance(saved, bool):
        return None
    return f"no number: {ranges.short(saved)}"


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


# Files --------------------------------------------------------------------------------------------


class _Pairs(dict):
    """An object of a JSON file, and those of its keys that the file repeats."""

    repeated: tuple[str, ...] = ()


def _pairs(items: list[tuple[str, Any]]) -> _Pairs:
    """The object of these keys and values; `json` itself silently drops all but the last of a key."""
    pairs = _Pairs(items)
    if len(pairs) < len(items):
        counts = collections.Counter(key for key, _ in items)
        pairs.repeated = tuple(key for key, count in counts.items() if count > 1)
    return pairs


def from_json(
    text: str | bytes, *, source: str = "", error: type[GrowjaxError] = FormatError
) -> Any:
    """Parse a JSON text into data for `from_dict`; raises `error` if it is not JSON."""
    try:
        return json.loads(text, object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as fault:
        reason = "too deep" if isinstance(fault, RecursionError) else fault
        raise error(f"{source or 'this text'}: not JSON: {reason}") from fault


def seal_of(saved: Any) -> str:
    """The SHA-256 of data that JSON holds, as 64 hexadecimal digits; the order of keys does not count."""
    return hashlib.sha256(json.dumps(saved, sort_keys=True).encode()).hexdigest()


def write(
    value: Any,
    path: str | Path,
    *,
    sealed: bool = False,
    error: type[GrowjaxError] = FormatError,
) -> None:
    """Write a value as indented JSON. The file is replaced in one step, and never seen half written.

    `sealed` adds a checksum, which `read` compares: for files that nobody should edit.
    """
    path, saved = Path(path), to_dict(value, error=error)
    if sealed:
        saved = {**saved, _SEAL: seal_of(saved)}
    write_text(path, json.dumps(saved, indent=1) + "\n", error=error)


def write_text(path: str | Path, text: str, *, error: type[GrowjaxError] = FormatError) -> None:
    """Write a file in one step, so that it is never seen half written, and make its folder.

    Raises `error` if it cannot be written; a file that was there before stays as it was.
    """
    path = Path(path)
    # Written under another name and then renamed; the process number keeps two writers apart
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            # Such as /dev/stdout, which nothing may take the place of
            path.write_text(text, encoding="utf-8")
            return
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as fault:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise error(f"{path}: could not be written: {fault.strerror or fault}") from fault


def read(
    path: str | Path,
    expected: Any = Any,
    *,
    allow: Sequence[str] = (),
    error: type[GrowjaxError] = FormatError,
) -> Any:
    """Read a value that `write` wrote; raises `error` that lists every fault, or for a broken seal.

    **Example**

        gj.values.read("plan.json", gj.Plan, allow=["my_pkg"])
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > _BYTES:
            raise error(f"{path}: {size:,} bytes are more than a value takes")
        text = path.read_bytes()
    except OSError as fault:
        raise error(f"{path}: {fault.strerror or fault}") from fault
    saved = from_json(text, source=str(path), error=error)
    if isinstance(saved, dict) and _SEAL in saved:
        seal = saved.pop(_SEAL)
        if seal != seal_of(saved):
            raise error(
                f"{path}: it was changed after it was written: its checksum is not {ranges.short(seal)}. "
                f"Put the original back or, if it was meant to change, remove {_SEAL!r} from it"
            )
    return from_dict(saved, expected, allow=allow, error=error, source=str(path))
