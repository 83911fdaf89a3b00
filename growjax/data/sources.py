"""Sources of text. A source is plain data, since a plan that holds it is saved as JSON.

Documents are read one at a time. A fault (bytes that are not UTF-8, a line without the field) does not
stop the reading at once: it goes on until it has the first few faults, and reports them together.
"""

import abc
import dataclasses
import hashlib
import importlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from growjax.data.files import (
    DataFile,
    checksums,
    compressed,
    find,
    is_url,
    line_ends,
    pieces,
)
from growjax.errors import DataError, raise_all
from growjax.values import File, Range, base, check, register


_SHOWN_FAULTS = 5


def _is_pattern(glob: str) -> bool:
    """Whether a text is a pattern of files inside a folder, which an absolute one is not."""
    return bool(glob) and not Path(glob).is_absolute() and ".." not in Path(glob).parts


def _is_text(text: str) -> bool:
    """Whether this may stand in a file: it is not empty, and has no half of a character."""
    return bool(text) and text_fault(text) is None


class Document(NamedTuple):
    """One document: text, its UTF-8 bytes, or tokens that are used as they are.

    Its name decides whether it is held out, so it does not depend on the path of the source's folder.
    """

    name: str
    content: str | bytes | Int[np.ndarray, " n"]


@base("a source such as Text('books') or prepare(texts, ...)[0].prepared")
class Source(Protocol):
    """The interface of a source: a frozen value, so that a plan can hold it."""

    def documents(self) -> Iterator[Document]:
        """Its documents, always in the same order. Raises `DataError` that lists the first faults."""
        ...

    def fingerprint(self) -> str:
        """A string that changes when the documents change, made without reading them."""
        ...


class FileSource(abc.ABC):
    """The part that sources of files have in common; a subclass writes `files` and `_read`.

    Besides the methods of `Source`, it has those that let a cache go by what the files hold.
    """

    def documents(self) -> Iterator[Document]:
        return checked(self, self._read())

    def fingerprint(self) -> str:
        return digest(repr(self), *(file.stamp() for file in self.files()))

    def content(self) -> str:
        """A string that changes when the documents do, and not when their files are moved or touched.

        All files are read, unless they are at a URL whose file system tells their checksums.
        """
        return digest(self._options(), *checksums(self.files()))

    @abc.abstractmethod
    def files(self) -> list[DataFile]:
        """The files of the source, in the order in which they are read."""

    def _options(self) -> str:
        """The source without the place of its files."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # pyright: ignore
        return repr((type(self).__name__, {k: v for k, v in fields.items() if k != "path"}))

    @abc.abstractmethod
    def _read(self) -> Iterator[Document | str]:
        """The documents, and in place of a document that has a fault a text that describes it."""


@register
@dataclasses.dataclass(frozen=True)
class Text(FileSource):
    """Text files in UTF-8, one document a file; `.gz`, `.bz2`, `.xz` and `.zst` are unpacked.

    **Arguments**

    - `path`: a file; a folder, which is searched with its subfolders; or a pattern of either, such as
      `books/*.txt`. On this machine, or at a URL that fsspec opens (`gs://`, `s3://`, `hf://`). Hidden
      files are left out.
    - `glob`: the pattern of the files of a folder; without one, a folder with `*.jsonl` is refused.
    - `split`: the text that separates the documents of a file; None for one document a file. The ends of
      lines in it stand for those of Unix, Windows and old Macs.

    **Example**

        Text("books", glob="*.txt")
        Text("gs://corpora/wiki-*.txt.zst", split="\\n\\n")
    """

    path: File
    glob: Annotated[str, Range("a pattern such as *.txt", _is_pattern)] = "*"
    split: Annotated[str, Range("the text between two documents", _is_text)] | None = None

    def __post_init__(self):
        check(self, DataError)

    def files(self) -> list[DataFile]:
        files = find(self.path, self.glob)
        # Read as text, braces and field names would be learnt
        lines = [file.path for file in files if ".jsonl" in Path(file.name).suffixes]
        if lines and self.glob == "*" and ".jsonl" not in self.path:
            raise DataError(
                f"{self.path}: has JSON lines in it, such as {lines[0]}; give JSONL({self.path!r}) for "
                "the texts in them, glob='*.txt' for the other files, a Blend for both, or glob='**/*' "
                "if JSON itself is the text"
            )
        return files

    def _read(self) -> Iterator[Document | str]:
        for file in self.files():
            with file.opened() as stream:
                if self.split is None:
                    parts = iter([(stream.read(), b"")])
                else:
                    parts = pieces(stream, self.split)
                line = 1
                for n, (part, separator) in enumerate(parts):
                    fault = utf8_fault(part)
                    if fault is not None:
                        at = line + line_ends(part[:fault])
                        yield f"{file.path}, line {at}: byte 0x{part[fault]:02x} is not UTF-8"
                    else:
                        yield Document(
                            file.name if self.split is None else f"{file.name}#{n}", part
                        )
                    line += line_ends(part) + line_ends(separator)


@register
@dataclasses.dataclass(frozen=True)
class JSONL(FileSource):
    """Files of one JSON object a line, one document each; compressed files are unpacked, as in `Text`.

    **Arguments**

    - `path`: a file; a folder with `*.jsonl` or `*.json`, which may be compressed; or a pattern of
      either. On this machine or at a URL, as in `Text`.
    - `field`: the key of the text in the object.

    **Example**

        JSONL("c4/train-*.jsonl.gz")
    """

    path: File
    field: str = "text"

    def __post_init__(self):
        check(self, DataError)

    def files(self) -> list[DataFile]:
        return find(self.path, *compressed("*.jsonl", "*.json"))

    def _read(self) -> Iterator[Document | str]:
        for file in self.files():
            with file.opened() as lines:
                for n, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    try:
                        yield Document(f"{file.name}:{n}", _field(line, self.field))
                    except _Fault as fault:
                        yield f"{file.path}, line {n}: {fault}"


@register
@dataclasses.dataclass(frozen=True)
class Tokens(FileSource):
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

    def files(self) -> list[DataFile]:
        if is_url(self.path):
            raise DataError(
                f"{self.path}: tokens are mapped into memory; copy the file to this machine"
            )
        files = [DataFile(path.name, str(path)) for path in self._paths() if path.exists()]
        if not files:
            raise DataError(f"{self._paths()[0]}: expected a NumPy file of integers, got none")
        return files

    def _paths(self) -> tuple[Path, ...]:
        """The file of tokens, and for a folder that of offsets, which may not exist."""
        path = Path(self.path)
        return (path / "tokens.npy", path / "starts.npy") if path.is_dir() else (path,)

    def _read(self) -> Iterator[Document | str]:
        self.files()  # refuses a URL
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
class StandardLibrary(FileSource):
    """The sources and help topics of this Python's standard library, which need no download.

    **Example**

        next(StandardLibrary().documents()).name     # '__future__.py'
    """

    def files(self) -> list[DataFile]:
        # Installed packages and tests differ from machine to machine, and tests are half of the bytes.
        excluded = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
        root = Path(sysconfig.get_paths()["stdlib"])
        files = []
        for path in root.rglob("*.py"):
            name = path.relative_to(root)
            if not excluded & set(name.parts) and name.parts[0] != "pydoc_data":
                files.append(DataFile(name.as_posix(), str(path)))
        return sorted(files, key=lambda file: file.name)

    def _options(self) -> str:
        # For the help topics, which are in no file
        return f"StandardLibrary {sys.version}"

    def _read(self) -> Iterator[Document | str]:
        for file in self.files():
            with file.opened() as stream:
                yield Document(file.name, stream.read())
        try:
            topics = importlib.import_module("pydoc_data.topics").topics
        except ImportError:
            return
        for name, text in sorted(topics.items()):
            yield Document(f"topics/{name}.txt", text)


# Reading -----------------------------------------------------------------------------------------


def checked(source: Any, items: Iterator[Document | str]) -> Iterator[Document]:
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
    except OSError as error:
        faults.append(f"{error.filename or 'a file'}: {error.strerror or error}")
    raise_all(DataError, f"{source} cannot be read:", faults)
    if empty:
        raise DataError(f"{source}: expected at least one document that is not empty, got none")


def text_fault(value: Any) -> str | None:
    """Why a value is no text, or None: it may be of another type, or hold half of a character."""
    if not isinstance(value, str):
        return f"is {'null' if value is None else f'a {type(value).__name__}'}, not text"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        return f"has U+{code:04X} at character {error.start}: half of a surrogate pair is not text"
    return None


def digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()


def utf8_fault(data: bytes) -> int | None:
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
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits, or thousands of values in each other
        raise _Fault(f"Python cannot read it: {error}") from error
    if not isinstance(record, dict):
        raise _Fault(f"expected an object, got a {type(record).__name__}")
    if field not in record:
        raise _Fault(f"no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}")
    fault = text_fault(record[field])
    if fault is not None:
        raise _Fault(f"{field!r} {fault}")
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
