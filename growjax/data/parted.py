"""The part of each document: trained on or held out, by its name alone; and a single one cut in two."""

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from growjax.data.corpus import PARTS
from growjax.data.sources import Document, Source
from growjax.errors import DataError


# The part of a document, its tokens and the bytes of its text
Encoded = tuple[str, np.ndarray, int]


def with_parts(
    documents: Iterable[Document], held_out: int | None
) -> Iterator[tuple[str, Document]]:
    """Each document that is not empty and its part, by its name; a single one is cut in two."""
    first, alone = None, True
    for document in documents:
        if not len(document.content):
            continue
        if first is None:
            # Waits until there is another one
            first = document
            continue
        if alone:
            alone = False
            yield _part(first, held_out), first
        yield _part(document, held_out), document
    if first is not None and alone:
        if held_out is None:
            yield "training", first
        else:
            yield from zip(PARTS, _cut(first, held_out), strict=True)


def _part(document: Document, held_out: int | None) -> str:
    # By its name alone, so that the choice does not depend on the other documents; the names of files
    # need not be UTF-8
    name = document.name.encode(errors="surrogateescape")
    if held_out is None or zlib.crc32(name) % held_out:
        return "training"
    return "held_out"


def _cut(document: Document, held_out: int) -> tuple[Document, Document]:
    """A document without its last part of one in `held_out`, and that part.

    A text is cut after a line if one ends near there, and between two characters otherwise.
    """
    content: Any = document.content
    data = content.encode() if isinstance(content, str) else content
    size = max(len(data) // held_out, 1)
    at = len(data) - size
    if not isinstance(data, np.ndarray):
        line = data.rfind(b"\n", max(at - size, 0), at)
        if line >= 0:
            at = line + 1
        # A byte of the form 10xxxxxx continues a character
        while at > 0 and data[at] & 0xC0 == 0x80:
            at -= 1
    return Document(document.name, data[:at]), Document(document.name, data[at:])


def parted(
    tokenised: Iterator[Encoded], parts: tuple[str, ...], source: Source
) -> Iterator[Encoded]:
    """The documents, of which the last one changes its part if no other is in that part."""
    pending: Encoded | None = None
    counts = dict.fromkeys(parts, 0)
    for document in tokenised:
        if not len(document[1]):
            continue
        if pending is not None:
            counts[pending[0]] += 1
            yield pending
        pending = document
    if pending is not None:
        part, tokens, size = pending
        lacking = [name for name in parts if name != part and not counts[name]]
        if lacking and counts[part]:
            part = lacking[0]
        counts[part] += 1
        yield part, tokens, size
    if not all(counts.values()):
        raise DataError(
            f"{source}: expected at least one document to train on and one to hold out, got "
            f"{sum(counts.values())} in all; cut the text into more documents"
        )
