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
_HANDFUL = 5


def find(folder: str | Path, *names: str) -> Path:
    """The first of some files that is in a folder, as it is or with `.xz`, `.gz` or `.bz2`.

    Raises `EvalError` that says what was looked for and what is there.
    """
    folder = Path(folder)
    for name in names:
        for end in ("", *_OPEN):
            if (folder / (name + end)).is_file():
                return folder / (name + end)
    there = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else ""
    raise EvalError(
        f"{folder}: expected {' or '.join(names)} in it (or with {', '.join(_OPEN)}); "
        + (f"there is {there}" if there else "there is no such folder, or it is empty")
    )


@contextlib.contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """A text file in UTF-8, open for reading; what is wrong with it is an `EvalError`."""
    try:
        with _OPEN.get(path.suffix, open)(path, "rb") as file:  # type: ignore[operator]
            # A byte-order mark, as MRPC has one, belongs to no column
            yield io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")
    except (UnicodeDecodeError, lzma.LZMAError, OSError, EOFError) as error:
        raise EvalError(f"{path}: cannot be read: {error}") from error


def read_text(path: Path) -> str:
    """The whole of a text file in UTF-8."""
    with _text(path) as file:
        return file.read()


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends; a line is what `\\n` ends and nothing else."""
    with _text(path) as file:
        for line in file:
            yield line.rstrip("\r\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise EvalError(f"{path}: is not JSON: {error}") from error


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one JSON object a line; raises `EvalError` with the first bad lines."""
    yield from _records(path, read_lines(path))


def read_archive(path: Path, end: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The records of every file under a folder, or in a tar archive, whose name has this end, by name."""
    if path.is_dir():
        for file in sorted(path.rglob(f"*{end}*")):
            name, *ends = file.name.partition(end)
            if ends[1] in ("", *_OPEN):
                yield name, list(read_records(file))
        return
    try:
        with tarfile.open(path) as archive:
            members = [m for m in archive.getmembers() if m.isfile() and m.name.endswith(end)]
            for member in sorted(members, key=lambda m: m.name):
                name, file = Path(member.name).name, archive.extractfile(member)
                assert file is not None
                lines = file.read().decode().split("\n")
                yield name.removesuffix(end), list(_records(Path(member.name), iter(lines)))
    except (OSError, tarfile.TarError) as error:
        raise EvalError(f"{path}: expected a folder or a tar archive: {error}") from error


def _records(path: Path, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    faults = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            record, fault = None, error.msg
        else:
            fault = f"expected an object, got {line[:20]!r}"
        if isinstance(record, dict):
            yield record
        else:
            faults.append(f"line {number}: {fault}")
            if len(faults) == _HANDFUL:
                break
    raise_all(EvalError, f"{path}: these lines are not JSON objects:", faults)
