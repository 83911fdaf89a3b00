"""What may be given in place of a source: a path, a list, a generator, a data set in memory.

A source has a name for the cache and may be read again. A list or a generator has neither, so its
documents are read once into a file without a name, together with the checksum of all of them.
"""

import hashlib
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from growjax.data.files import COMPRESSED, find
from growjax.data.sources import (
    JSONL,
    Document,
    Source,
    Text,
    Tokens,
    checked,
    text_fault,
    utf8_fault,
)
from growjax.data.tables import Parquet
from growjax.errors import DataError


# The source of files by their suffixes, without one of `COMPRESSED`; of all others it is `Text`
_KINDS: dict[str, Any] = {".jsonl": JSONL, ".json": JSONL, ".parquet": Parquet, ".npy": Tokens}


def source_at(path: str | Path) -> Source:
    """The source for the files at a path, by their suffixes.

    Raises `DataError` if there are none, or files of several kinds.

    **Example**

        source_at("c4/train-*.jsonl.gz")     # JSONL('c4/train-*.jsonl.gz')
    """
    kinds = set()
    for file in find(str(path), "*"):
        name = Path(file.name)
        suffix = name.with_suffix("").suffix if name.suffix in COMPRESSED else name.suffix
        kinds.add(_KINDS.get(suffix, Text))
    if len(kinds) > 1:
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(
            f"{path}: has files for {names}; name the source yourself, such as "
            f"JSONL({str(path)!r}) or Text({str(path)!r}, glob='*.txt')"
        )
    return kinds.pop()(str(path))


class Spool:
    """The documents of an iterable, in a file without a name, which vanishes with this object.

    An item is a text, its bytes, an array of tokens, a `Document`, or a dict with the text in `text`, as
    the rows of a data set of the library `datasets` are. Documents without a name have their number.
    """

    # Kind of the content, bytes of the name, bytes of the content
    _HEADER = struct.Struct("<cIQ")

    def __init__(self, folder: Path):
        self._description = "documents"
        self._file: Any = tempfile.TemporaryFile(dir=folder)
        self._digest, self._count = hashlib.sha256(), 0

    def fill(self, items: Iterable[Any]) -> None:
        """Read all documents of an iterable; raises `DataError` that lists the first faults."""
        self._description = f"a {type(items).__name__}"
        for document in checked(self, _documents(items)):
            self._write(document)
            self._count += 1
        self._file.flush()

    def close(self) -> None:
        """Remove the documents."""
        self._file.close()

    def __repr__(self) -> str:
        return self._description

    def documents(self) -> Iterator[Document]:
        self._file.seek(0)
        for _ in range(self._count):
            kind, name, size = self._HEADER.unpack(self._file.read(self._HEADER.size))
            name, data = self._file.read(name).decode(), self._file.read(size)
            yield Document(name, np.frombuffer(data, np.int64) if kind == b"t" else data)

    def fingerprint(self) -> str:
        return f"documents {self._digest.hexdigest()}"

    def _write(self, document: Document) -> None:
        content, kind = document.content, b"b"
        if isinstance(content, np.ndarray):
            content, kind = content.astype(np.int64).tobytes(), b"t"
        elif isinstance(content, str):
            content = content.encode()
        name = document.name.encode()
        for data in (self._HEADER.pack(kind, len(name), len(content)), name, content):
            self._file.write(data)
            self._digest.update(data)


def _documents(items: Iterable[Any]) -> Iterator[Document | str]:
    """The documents of an iterable, and a text that describes the fault in place of any other item."""
    rows: Any = items
    columns = getattr(rows, "column_names", None)
    if isinstance(columns, list) and "text" in columns and hasattr(rows, "select_columns"):
        items = rows.select_columns(["text"])  # of `datasets`: other columns may be large
    for n, item in enumerate(items):
        name = str(n)
        if isinstance(item, Document):
            name, item = item
        elif isinstance(item, Mapping):
            if "text" not in item:
                fields = ", ".join(map(repr, item))
                yield (
                    f"document {n}: no field 'text'; it has {fields}: give the texts themselves, as "
                    "(row['FIELD'] for row in rows)"
                )
                continue
            item = item["text"]
        fault = _fault(item)
        yield Document(name, item) if fault is None else f"document {n}: {fault}"


def _fault(content: Any) -> str | None:
    """Why this is not the content of a document, or None."""
    if isinstance(content, str):
        return text_fault(content)
    if isinstance(content, bytes):
        at = utf8_fault(content)
        return None if at is None else f"byte 0x{content[at]:02x} at {at} is not UTF-8"
    if isinstance(content, np.ndarray) and content.ndim == 1 and content.dtype.kind in "ui":
        return None
    return f"expected a text, bytes or a flat array of tokens, got {type(content).__name__}"


def is_source(given: Any) -> bool:
    """Whether this has the methods of `Source`."""
    return hasattr(given, "documents") and hasattr(given, "fingerprint")


def is_iterable(given: Any) -> bool:
    """Whether documents may come out of this; a dict is a set of splits, and text has no documents."""
    return isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping)
