"""Sources of text. A source is plain data, since a plan that holds it is saved as JSON.

Documents are read one at a time. A fault (bytes that are not UTF-8, a line without the field) does not
stop the reading at once: it goes on until it has the first few faults, and reports them together.
"""

import dataclasses
import gzip
import hashlib
import importlib
import json
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from growjax.errors import DataError, raise_all
from growjax.values import File, Range, base, check, register


_SHOWN_FAULTS = 5


def _is_pattern(glob: str) -> bool:
    """Whether a text is a pattern of files inside a folder, which an absolute one is not."""
    return bool(glob) and not Path(glob).is_absolute() and ".." not in Path(glob).parts


class Document(NamedTuple):
    """One document: text, its UTF-8 bytes, or tokens that are used as they are.

    Its name decides whether it is held out, so it does not depend on the path of the source's folder.
    """

    name: str
    content: str | bytes | Int[np.ndarray, " n"]


@base("a source such as Text('books')")
class Source(Protocol):
    """The interface of a source: a frozen value, so that a plan can hold it."""

    def documents(self) -> Iterator[Document]:
        """Its documents, always in the same order. Raises `DataError` that lists the first faults."""
        ...

    def fingerprint(self) -> str:
        """A string that changes when the documents change, made without reading them."""
        ...


@register
@dataclasses.dataclass(frozen=True)
class Text:
    """Text files in UTF-8, one document a file.

    **Arguments**

    - `path`: a file, or a folder, which is searched with its subfolders. Hidden files are left out.
    - `glob`: the pattern of the files of a folder.
    - `split`: the text that separates the documents of a file; None for one document a file.

    **Example**

        Text("books", glob="*.txt")
    """

    path: File
    glob: Annotated[str, Range("a pattern such as *.txt", _is_pattern)] = "*"
    split: str | None = None

    def __post_init__(self):
        check(self, DataError)

    def documents(self) -> Iterator[Document]:
        return _checked(self, self._read())

    def fingerprint(self) -> str:
        return _stat(self, _files(self.path, self.glob))

    def _read(self) -> Iterator[Document | str]:
        if self.split == "":
            raise DataError("split: expected the text between two documents, got an empty one")
        for name, file in _files(self.path, self.glob):
            line, pieces = 1, _pieces(file, self.split)
            for n, piece in enumerate(pieces):
                fault = _utf8_fault(piece)
                if fault is not None:
                    at = line + piece.count(b"\n", 0, fault)
                    yield f"{file}, line {at}: byte 0x{piece[fault]:02x} is not UTF-8"
                else:
                    yield Document(name if self.split is None else f"{name}#{n}", piece)
                line += piece.count(b"\n") + (self.split or "").count("\n")


@register
@dataclasses.dataclass(frozen=True)
class JSONL:
    """Files of one JSON object a line, one document each; `.gz` is unpacked while reading.

    **Arguments**

    - `path`: a file, or a folder with `*.jsonl`, `*.json` or either of them with `.gz`.
    - `field`: the key of the text in the object.

    **Example**

        JSONL("c4/train-00000.jsonl.gz")
    """

    path: File
    field: str = "text"

    def __post_init__(self):
        check(self, DataError)

    def documents(self) -> Iterator[Document]:
        return _checked(self, self._read())

    def fingerprint(self) -> str:
        return _stat(self, self._files())

    def _files(self) -> list[tuple[str, Path]]:
        return _files(self.path, "*.jsonl", "*.json", "*.jsonl.gz", "*.json.gz")

    def _read(self) -> Iterator[Document | str]:
        for name, file in self._files():
            opened = gzip.open(file) if file.suffix == ".gz" else file.open("rb")
            with opened as lines:
                for n, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    try:
                        yield Document(f"{name}:{n}", _field(line, self.field))
                    except _Fault as fault:
                        yield f"{file}, line {n}: {fault}"


@register
@dataclasses.dataclass(frozen=True)
class Parquet:
    """Parquet files, one document a row. Needs `pyarrow`: `pip install 'growjax[data]'`.

    **Arguments**

    - `path`: a file, or a folder with `*.parquet`.
    - `field`: the column of the text.

    **Example**

        Parquet("fineweb/sample", field="text")
    """

    path: File
    field: str = "text"

    def __post_init__(self):
        check(self, DataError)

    def documents(self) -> Iterator[Document]:
        return _checked(self, self._read())

    def fingerprint(self) -> str:
        return _stat(self, _files(self.path, "*.parquet"))

    def _read(self) -> Iterator[Document | str]:
        files = _files(self.path, "*.parquet")
        parquet = _library("pyarrow.parquet", self)
        for name, file in files:
            try:
                table = parquet.ParquetFile(file)
            except Exception as error:  # pyarrow raises a dozen types
                yield f"{file}: {error}"
                continue
            with table:
                columns = table.schema_arrow.names
                if self.field not in columns:
                    yield f"{file}: no column {self.field!r}; its columns are {', '.join(columns)}"
                    continue
                row = 0
                for batch in table.iter_batches(batch_size=256, columns=[self.field]):
                    for value in batch.column(0).to_pylist():
                        if isinstance(value, str):
                            yield Document(f"{name}:{row}", value)
                        else:
                            yield f"{file}, row {row}: {self.field!r} is {_kind(value)}, not text"
                        row += 1


@register
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Text that is tokenised already; the tokens are used as they are, without added separators.

    **Arguments**

    - `path`: an `.npy` file of integers; or a folder with `tokens.npy` and, for more than one document,
      `starts.npy` with the offset of each in tokens.
    - `separator`: the id that ends each document, for files without `starts.npy`.

    **Example**

        Tokens("owt/train.npy", separator=50256)
    """

    path: File
    separator: int | None = None

    def __post_init__(self):
        check(self, DataError)

    def documents(self) -> Iterator[Document]:
        return _checked(self, self._read())

    def fingerprint(self) -> str:
        return _stat(self, [(f.name, f) for f in self._paths() if f.exists()])

    def _paths(self) -> tuple[Path, ...]:
        """The file of tokens, and for a folder that of offsets, which may not exist."""
        path = Path(self.path)
        return (path / "tokens.npy", path / "starts.npy") if path.is_dir() else (path,)

    def _read(self) -> Iterator[Document | str]:
        path = self._paths()[0]
        tokens = _integers(path)
        starts = self._starts(tokens)
        stops = np.append(starts[1:], len(tokens))
        for n, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            yield Document(f"{path.name}:{n}", tokens[start:stop])

    def _starts(self, tokens: np.ndarray) -> np.ndarray:
        """The offsets of the documents: from their file, after each separator, or 0 alone."""
        path, *offsets = self._paths()
        if offsets and offsets[0].exists():
            file = offsets[0]
            starts = np.asarray(_integers(file)).astype(np.int64)
            if not starts.size or starts[0] != 0 or np.any(np.diff(starts) < 0):
                raise DataError(f"{file}: expected offsets that ascend from 0")
            if starts[-1] > len(tokens):
                raise DataError(
                    f"{file}: expected offsets up to the {len(tokens)} tokens of {path}, got {starts[-1]}"
                )
            return starts
        if self.separator is not None:
            ends = _indices(tokens, self.separator) + 1
            # A separator at the very end begins no document
            return np.concatenate([[0], ends[ends < len(tokens)]])
        return np.zeros(1, np.int64)


@register
@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A split of a data set of the library `datasets`: `pip install 'growjax[data]'`.

    **Arguments**

    - `name`: the name of the data set; or a local folder of data files, or one saved by `save_to_disk`.
    - `split`: such as `"train"` or `"train[:10%]"`. For a saved folder, the split in it, if any.
    - `field`: the column of the text.
    - `config`, `revision`: the variant of the data set, and its version.

    **Example**

        HuggingFace("roneneldan/TinyStories", split="train")
    """

    name: str
    split: str = "train"
    field: str = "text"
    config: str | None = None
    revision: str | None = None

    def __post_init__(self):
        check(self, DataError)

    def documents(self) -> Iterator[Document]:
        return _checked(self, self._read())

    def fingerprint(self) -> str:
        path = Path(self.name)
        if path.exists():
            return _stat(self, _files(self.name, "*"))
        # The library's own fingerprint of a data set, which has no public name
        rows = self._load()
        return _digest(repr(self), getattr(rows, "_fingerprint", ""), str(len(rows)))

    def _load(self) -> Any:
        datasets, path = _library("datasets", self), Path(self.name)
        try:
            if (path / "state.json").exists():
                return datasets.load_from_disk(self.name)
            if (path / "dataset_dict.json").exists():
                return datasets.load_from_disk(self.name)[self.split]
            return datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision
            )
        except Exception as error:  # the network, a cache or a builder may raise anything
            raise DataError(
                f"{self.name} (split {self.split!r}): the library datasets cannot load it: {error}"
            ) from error

    def _read(self) -> Iterator[Document | str]:
        rows = self._load()
        if self.field not in rows.column_names:
            columns = ", ".join(rows.column_names)
            yield f"{self.name}: no column {self.field!r}; its columns are {columns}"
            return
        for n, row in enumerate(rows.select_columns([self.field])):
            value = row[self.field]
            if isinstance(value, str):
                yield Document(f"{self.split}:{n}", value)
            else:
                yield f"{self.name}, row {n}: {self.field!r} is {_kind(value)}, not text"


@register
@dataclasses.dataclass(frozen=True)
class StandardLibrary:
    """The sources and help topics of this Python's standard library, which need no download.

    **Example**

        next(StandardLibrary().documents()).name     # '__future__.py'
    """

    def documents(self) -> Iterator[Document]:
        return _checked(self, self._read())

    def fingerprint(self) -> str:
        return _stat(self, _library_files(), sys.version)

    def _read(self) -> Iterator[Document | str]:
        for name, file in _library_files():
            yield Document(name, file.read_bytes())
        try:
            topics = importlib.import_module("pydoc_data.topics").topics
        except ImportError:
            return
        for name, text in sorted(topics.items()):
            yield Document(f"topics/{name}.txt", text)


def _library_files() -> list[tuple[str, Path]]:
    """The names and paths of the source files of the standard library."""
    # Installed packages and tests differ from machine to machine, and tests are half of the bytes.
    excluded = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for file in root.rglob("*.py"):
        name = file.relative_to(root)
        if not excluded & set(name.parts) and name.parts[0] != "pydoc_data":
            files.append((name.as_posix(), file))
    return sorted(files)


# Reading: a `_read` yields a string in place of a document that has a fault -----------------------


def _checked(source: Source, items: Iterator[Document | str]) -> Iterator[Document]:
    """Pass documents on until the first fault, which is a string; raise it with the next few."""
    faults: list[str] = []
    empty = True
    try:
        for item in items:
            if isinstance(item, str):
                faults.append(item)
            elif not faults:
                empty = empty and not len(item.content)
                yield item
            if len(faults) == _SHOWN_FAULTS:
                break
    except (OSError, EOFError, zlib.error) as error:  # the last two from a truncated .gz
        file, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        faults.append(f"{file or 'a file'}: {reason or error}")
    raise_all(DataError, f"{source} cannot be read:", faults)
    if empty:
        raise DataError(f"{source}: expected at least one document that is not empty, got none")


def _files(path: str, *globs: str) -> list[tuple[str, Path]]:
    """`(name, file)` of a file, or of the files of a folder that are not hidden, sorted by name.

    Names are paths relative to the folder.
    """
    root = Path(path)
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise DataError(f"{path}: expected a file or a folder, got neither")
    files = {}
    for glob in globs:
        for file in root.rglob(glob):
            name = file.relative_to(root)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                files[name.as_posix()] = file
    if not files:
        raise DataError(f"{path}: expected files like {' or '.join(globs)}, got none")
    return sorted(files.items())


def _pieces(file: Path, split: str | None) -> Iterator[bytes]:
    """A whole file, or its parts between separators, without holding all of them in memory."""
    with file.open("rb") as opened:
        if split is None:
            yield opened.read()
            return
        rest = b""  # the beginning of a part that ends in a later chunk
        while chunk := opened.read(1 << 20):
            *complete, rest = (rest + chunk).split(split.encode())
            yield from complete
        yield rest


def _utf8_fault(data: bytes) -> int | None:
    """The index of the first byte that is not UTF-8, or None."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


class _Fault(Exception):
    """A fault in one line of a file."""


def _field(line: bytes, field: str) -> str:
    """The text in a field of a line's JSON object. Raises `_Fault`."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise _Fault(f"byte 0x{line[error.start]:02x} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise _Fault(f"{error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise _Fault(f"expected an object, got {_kind(record)}")
    if field not in record:
        raise _Fault(f"no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}")
    if not isinstance(record[field], str):
        raise _Fault(f"{field!r} is {_kind(record[field])}, not text")
    return record[field]


def _integers(file: Path) -> np.ndarray:
    """A flat array of integers, memory-mapped; pickled files, which can run code, are refused."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file}: expected a NumPy file of integers: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "ui":
        raise DataError(
            f"{file}: expected a flat array of integers, got {array.dtype}{list(array.shape)}"
        )
    return array


def _indices(tokens: np.ndarray, value: int) -> np.ndarray:
    """The indices of a value, searched in parts, since the array may be larger than memory."""
    size = 1 << 24
    parts = [np.flatnonzero(tokens[i : i + size] == value) + i for i in range(0, len(tokens), size)]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _library(name: str, source: Source) -> Any:
    """An optional module, or `DataError` that names the extra to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        library = name.partition(".")[0]
        raise DataError(
            f"{source}: reading it needs {library}; pip install 'growjax[data]'"
        ) from error


def _kind(value: Any) -> str:
    """The type of a value, for messages."""
    return "null" if value is None else f"a {type(value).__name__}"


def _stat(source: Source, files: list[tuple[str, Path]], *more: str) -> str:
    """The fingerprint of a source from the names, sizes and modification times of its files."""
    lines = []
    for name, file in files:
        stat = file.stat()
        lines.append(f"{name} {stat.st_size} {stat.st_mtime_ns}")
    return _digest(repr(source), *more, *lines)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
