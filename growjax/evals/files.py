"""Local files of data sets, compressed or not."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from growjax.errors import EvalError, raise_all


_OPEN = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
_SHOWN_FAULTS = 5


def find(folder: str | Path, *names: str) -> Path:
    """The first of some files that a folder has, plain or compressed (`.xz`, `.gz`, `.bz2`).

    Raises `EvalError` with the expected names and those that the folder has.
    """
    folder = Path(folder)
    for name in names:
        for suffix in ("", *_OPEN):
            path = folder / (name + suffix)
            if path.is_file():
                return path
    present = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else ""
    raise EvalError(
        f"{folder}: expected {' or '.join(names)} in it (or with {', '.join(_OPEN)}), got "
        + (present or "no such folder, or an empty one")
    )


@contextlib.contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file, plain or compressed, open for reading. Raises `EvalError` if it is damaged."""
    try:
        with _OPEN.get(path.suffix, open)(path, "rb") as file:  # type: ignore[operator]
            # utf-8-sig drops a byte-order mark, which MRPC's files begin with; with newline="\n" a
            # carriage return within a text does not end a line
            yield io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")
    except (UnicodeDecodeError, lzma.LZMAError, OSError, EOFError) as error:
        raise EvalError(f"{path}: cannot be read: {error}") from error


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, plain or compressed."""
    with _text(path) as file:
        return file.read()


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends; only `\\n` ends a line."""
    with _text(path) as file:
        for line in file:
            yield line.rstrip("\r\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises `EvalError` if it is not JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise EvalError(f"{path}: is not JSON: {error}") from error


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one JSON object a line. Raises `EvalError` with the first bad lines."""
    yield from _records(path, read_lines(path))


def read_archive(path: Path, end: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """`(name, records)` of each file with this suffix under a folder, or in a tar archive, by name.

    `end` is the suffix, such as `".jsonl"`; names are without it. Files in a folder may be compressed.
    """
    if path.is_dir():
        for file in sorted(path.rglob(f"*{end}*")):
            name, _, compression = file.name.partition(end)
            if compression in ("", *_OPEN):
                yield name, list(read_records(file))
        return
    try:
        with tarfile.open(path) as archive:
            members = [m for m in archive.getmembers() if m.isfile() and m.name.endswith(end)]
            for member in sorted(members, key=lambda m: m.name):
                name, file = Path(member.name).name, archive.extractfile(member)
                assert file is not None  # extractfile is None for folders alone
                lines = file.read().decode().split("\n")
                yield name.removesuffix(end), list(_records(Path(member.name), iter(lines)))
    except (OSError, tarfile.TarError) as error:
        raise EvalError(f"{path}: expected a folder or a tar archive: {error}") from error


def _records(path: Path, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON object of each line that is not blank; after the last, `EvalError` for the others."""
    faults = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            faults.append(f"line {number}: {error.msg}")
        else:
            if isinstance(record, dict):
                yield record
            else:
                faults.append(f"line {number}: expected an object, got {line[:20]!r}")
        if len(faults) == _SHOWN_FAULTS:
            break
    raise_all(EvalError, f"{path}: these lines are not JSON objects:", faults)
