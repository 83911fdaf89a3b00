"""Tokens on disk: tokenised once, and never used unless they are what was written.

A corpus is prepared in a folder of its own, next to where it will be, and renamed when it is whole.
So a folder with a manifest was complete once, and a run that was killed leaves none. The manifest
holds sizes and checksums; what does not match them is refused, since it is no longer the text that
a run was started on.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from growjax import values
from growjax.data.sources import Document, Source
from growjax.data.tokenizers import Tokenizer
from growjax.data.vocabulary import Vocabulary
from growjax.errors import DataError, raise_all


_FORMAT = 1
_PARTS = ("training", "held_out")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """Documents one after the other, each ended by a separator.

    **Fields**

    - `tokens`: all of them; mapped, so only what is looked at is read.
    - `starts`: the offset of each document, the first one 0.
    - `vocabulary`: of the tokenizer that made them.
    - `text_bytes`: of UTF-8 text that went in; 0 if it was tokens already.
    - `digest`: tells two corpora apart: results on different ones do not compare.
    - `path`: the file with the tokens, or None if they are in memory.

    **Example**

        Corpus.of(["one", "two"], ByteTokenizer()).tokens.tolist()
        # [111, 110, 101, 258, 116, 119, 111, 258]
    """

    tokens: UInt[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " documents"]
    vocabulary: Vocabulary
    text_bytes: int
    digest: str
    path: Path | None = None

    @staticmethod
    def of(documents: Iterable[str | bytes | np.ndarray], tokenizer: Tokenizer) -> "Corpus":
        """A corpus in memory."""
        encoded = [
            _encode(Document(str(n), content), tokenizer) for n, content in enumerate(documents)
        ]
        arrays = [tokens for tokens, _ in encoded if len(tokens)]
        dtype = _dtype(tokenizer.vocabulary)
        tokens = np.concatenate([np.zeros(0, dtype), *(a.astype(dtype) for a in arrays)])
        starts = np.cumsum([0, *map(len, arrays)], dtype=np.int64)[:-1]
        digest = _digest([hashlib.sha256(a.tobytes()).hexdigest() for a in (tokens, starts)])
        return Corpus(tokens, starts, tokenizer.vocabulary, sum(n for _, n in encoded), digest)

    def __repr__(self) -> str:
        # Looks at no token: error reports print this, and the file may be what is wrong
        where = "in memory" if self.path is None else str(self.path)
        return f"Corpus({len(self)} tokens, {len(self.starts)} documents, {where})"

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Some tokens, as int32. Raises `DataError` if their file is gone, shorter, or holds no words.

        The file is read and not mapped: a mapped file that shrinks ends the process without a word.
        """
        if self.path is None:
            return np.asarray(self.tokens[start:stop]).astype(np.int32)
        dtype = self.tokens.dtype
        try:
            found = np.fromfile(self.path, dtype, stop - start, offset=start * dtype.itemsize)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}, while it was read") from error
        if len(found) < stop - start:
            raise DataError(
                f"{self.path}: expected {len(self)} tokens, and the file now ends before token {stop}"
            )
        if found.size and found.max() >= self.vocabulary.size:
            raise DataError(
                f"{self.path}: expected words below {self.vocabulary.size} between tokens {start} and "
                f"{stop}, got {found.max()}: the file was changed; delete its folder and it is made anew"
            )
        return found.astype(np.int32)

    def documents(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """For each of some tokens, the ordinal of its document, where that of the first one is 0."""
        first, last = np.searchsorted(self.starts, [start + 1, stop])
        marks = np.zeros(stop - start, np.int32)
        marks[self.starts[first:last] - start] = 1
        return np.cumsum(marks, dtype=np.int32)

    def bits_per_byte(self, nats: float) -> float:
        """A loss in nats per token as bits per byte of text, which compares across tokenizers."""
        if not self.text_bytes:
            raise DataError("bits per byte: this corpus was given as tokens; its text is not known")
        return nats / math.log(2) * len(self) / self.text_bytes


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    cache: str | Path,
    *,
    held_out: int = 20,
    verify: bool = True,
) -> tuple[Corpus, Corpus]:
    """The corpus to train on and the one held out; tokenises only what `cache` does not have yet.

    **Arguments**

    - `source`, `tokenizer`: what to read, and with what. A change of either is another entry.
    - `cache`: a folder that many corpora can share, and many processes use at once.
    - `held_out`: a document is held out if the CRC-32 of its name is a multiple of this: about one in
      `held_out`. If none is, the last one is.
    - `verify`: read everything once to compare checksums; otherwise only sizes are compared.

    Raises `DataError` if the source cannot be read, holds too little, or the cache is damaged.

    **Example**

        training, held_out = prepare(StandardLibrary(), ByteTokenizer(), "runs/cache")
    """
    if held_out < 2:
        raise DataError(
            f"held_out: expected 2 or more, for one document in so many, got {held_out}"
        )
    digests = [str(_FORMAT), source.fingerprint(), tokenizer.vocabulary.digest, str(held_out)]
    target = Path(cache) / _digest(digests)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _build(source, tokenizer, target, held_out)
    return load(target, verify=verify)


def load(folder: str | Path, *, verify: bool = True) -> tuple[Corpus, Corpus]:
    """The two corpora of a folder that `prepare` made.

    Raises `DataError` that lists every file which is not as it was written.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    dtype = np.dtype(manifest["dtype"])
    faults = []
    for part in _PARTS:
        for name, file in manifest["parts"][part]["files"].items():
            faults += _file_faults(folder / part / name, file, verify)
    raise_all(DataError, f"the cache {folder} is damaged; delete it and it is made anew:", faults)
    vocabulary = _vocabulary(manifest["vocabulary"], folder)
    training, held_out = (
        _open(folder / part, manifest["parts"][part], dtype, vocabulary) for part in _PARTS
    )
    return training, held_out


# Writing -----------------------------------------------------------------------------------------


class _Writer:
    """Appends documents to the files of one corpus, and knows their sizes and checksums."""

    def __init__(self, folder: Path, dtype: np.dtype, files: contextlib.ExitStack):
        folder.mkdir()
        self.dtype, self.tokens, self.documents, self.bytes = dtype, 0, 0, 0
        self.names = "tokens.bin", "starts.bin"
        self.opened = [files.enter_context((folder / name).open("wb")) for name in self.names]
        self.sums = [hashlib.sha256() for _ in self.names]
        self.sizes = [0 for _ in self.names]

    def add(self, tokens: np.ndarray, size: int) -> None:
        data = tokens.astype(self.dtype).tobytes(), np.int64(self.tokens).tobytes()
        for i, part in enumerate(data):
            self.opened[i].write(part)
            self.sums[i].update(part)
            self.sizes[i] += len(part)
        self.tokens, self.bytes = self.tokens + len(tokens), self.bytes + size
        self.documents += 1

    def summary(self) -> dict[str, Any]:
        for file in self.opened:
            file.flush()
            os.fsync(file.fileno())
        rows = zip(self.names, self.sizes, self.sums, strict=True)
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "files": {name: {"size": n, "sha256": s.hexdigest()} for name, n, s in rows},
        }


def _build(source: Source, tokenizer: Tokenizer, target: Path, held_out: int) -> None:
    """Tokenise into a folder next to the target and rename it, whole or not at all."""
    dtype = _dtype(tokenizer.vocabulary)
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        with contextlib.ExitStack() as files:
            writers = {part: _Writer(work / part, dtype, files) for part in _PARTS}
            for part, tokens, size in _divided(source, tokenizer, held_out):
                writers[part].add(tokens, size)
            parts = {part: writer.summary() for part, writer in writers.items()}
        _write_manifest(
            work / "manifest.json",
            {
                "format": _FORMAT,
                "source": repr(source),
                "held_out": held_out,
                "dtype": dtype.str,
                "vocabulary": values.to_dict(tokenizer.vocabulary),
                "parts": parts,
            },
        )
        try:
            work.rename(target)
        except OSError:
            if not target.exists():
                raise
            # Another process has made the same one in the meantime; ours is removed below
    except OSError as error:
        raise DataError(f"{target}: the cache cannot be written: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _divided(
    source: Source, tokenizer: Tokenizer, held_out: int
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Every document's part, tokens and bytes. One is kept back: it may be the last."""
    pending, counts = None, dict.fromkeys(_PARTS, 0)
    for document in source.documents():
        tokens, size = _encode(document, tokenizer)
        if not len(tokens):
            continue
        if zlib.crc32(document.name.encode()) % held_out == 0:
            counts["held_out"] += 1
            yield "held_out", tokens, size
            continue
        if pending is not None:
            counts["training"] += 1
            yield "training", *pending
        pending = tokens, size
    if pending is not None:
        part = "training" if counts["held_out"] else "held_out"
        counts[part] += 1
        yield part, *pending
    if not all(counts.values()):
        raise DataError(
            f"{source}: expected at least one document to train on and one to hold out, found "
            f"{sum(counts.values())} in all; cut the text into more documents"
        )


def _encode(document: Document, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """A document's tokens with the separator, and its bytes; an empty one has neither."""
    vocabulary, content = tokenizer.vocabulary, document.content
    if isinstance(content, np.ndarray):
        if len(content) and not 0 <= content.min() <= content.max() < vocabulary.size:
            raise DataError(
                f"{document.name}: expected tokens from 0 to {vocabulary.size - 1}, got "
                f"{content.min()} to {content.max()}"
            )
        return content, 0
    data = content.encode() if isinstance(content, str) else content
    if not data:
        return np.zeros(0, np.int32), 0
    return np.append(tokenizer.encode(content), vocabulary.separator), len(data)


def _dtype(vocabulary: Vocabulary) -> np.dtype:
    return np.dtype("<u2" if vocabulary.size <= 1 << 16 else "<u4")


def _vocabulary(saved: dict[str, Any], folder: Path) -> Vocabulary:
    # Corpora that were prepared before values had names say the fields alone
    named = {"is": "growjax:Vocabulary", **saved}
    return values.from_dict(named, Vocabulary, error=DataError, source=str(folder))


# Manifests ---------------------------------------------------------------------------------------


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump({**manifest, "seal": _seal(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        seal = manifest.pop("seal")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(
            f"{path}: expected the manifest of a prepared corpus; it cannot be read ({error}). Delete "
            "the folder and it is made anew"
        ) from error
    if seal != _seal(manifest) or manifest.get("format") != _FORMAT:
        raise DataError(
            f"{path}: it was changed after it was written, or is of another version. Delete the folder "
            "and it is made anew"
        )
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _file_faults(path: Path, expected: dict[str, Any], verify: bool) -> Iterator[str]:
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            yield f"{path}: expected {expected['size']} bytes, found {size}"
        elif verify and _sha256(path) != expected["sha256"]:
            yield f"{path}: its checksum is not the one in the manifest"
    except OSError as error:
        yield f"{path}: {error.strerror or error}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(folder: Path, part: dict[str, Any], dtype: np.dtype, vocabulary: Vocabulary) -> Corpus:
    path = folder / "tokens.bin"
    return Corpus(
        np.memmap(path, dtype, mode="r", shape=(part["tokens"],)),
        np.fromfile(folder / "starts.bin", np.int64),
        vocabulary,
        part["bytes"],
        _digest([file["sha256"] for file in part["files"].values()]),
        path,
    )


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
