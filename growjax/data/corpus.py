"""Tokens on disk: tokenised once, and refused if they have changed since.

A corpus is written to a temporary folder next to its final one, which is renamed when it is complete.
So a folder with a manifest was complete once, and a process that is killed leaves none. The manifest
holds sizes and checksums. Files that do not match them are refused, since a run that resumes on them
would go on with other text than it began with.
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

    - `tokens`: the tokens of all documents; memory-mapped, so only the parts in use are read.
    - `starts`: the offset of each document in tokens; the first is 0.
    - `vocabulary`: the vocabulary of the tokenizer that made the tokens.
    - `text_bytes`: the size of the text in UTF-8 bytes; 0 if the source was tokens already.
    - `digest`: identifies the corpus: results on corpora with other digests do not compare.
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
        # The empty array keeps the dtype if there is no document
        tokens = np.concatenate([np.zeros(0, dtype), *(a.astype(dtype) for a in arrays)])
        starts = np.cumsum([0, *map(len, arrays)], dtype=np.int64)[:-1]
        digest = _digest([hashlib.sha256(a.tobytes()).hexdigest() for a in (tokens, starts)])
        return Corpus(tokens, starts, tokenizer.vocabulary, sum(n for _, n in encoded), digest)

    def __repr__(self) -> str:
        # Reads no token: error reports print this, and a mapped file may be the cause of the error
        location = "in memory" if self.path is None else str(self.path)
        return f"Corpus({len(self)} tokens, {len(self.starts)} documents, {location})"

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """The tokens from `start` to `stop`, as int32.

        The file is read and not mapped: if a mapped file shrinks, the operating system kills the process.
        Raises `DataError` if the file is gone or shorter, or has tokens outside the vocabulary.
        """
        if self.path is None:
            return np.asarray(self.tokens[start:stop]).astype(np.int32)
        dtype = self.tokens.dtype
        try:
            tokens = np.fromfile(self.path, dtype, stop - start, offset=start * dtype.itemsize)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}, while it was read") from error
        if len(tokens) < stop - start:
            raise DataError(
                f"{self.path}: expected {len(self)} tokens, and the file now ends before token {stop}"
            )
        if tokens.size and tokens.max() >= self.vocabulary.size:
            raise DataError(
                f"{self.path}: expected ids below {self.vocabulary.size} in tokens {start} to {stop}, "
                f"got {tokens.max()}: the file was changed; delete its folder and it is made anew"
            )
        return tokens.astype(np.int32)

    def documents(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """For each token from `start` to `stop` the number of its document; the first one's is 0."""
        # Mark the tokens that begin a document, and count the marks up to each token
        first, last = np.searchsorted(self.starts, [start + 1, stop])
        marks = np.zeros(stop - start, np.int32)
        marks[self.starts[first:last] - start] = 1
        return np.cumsum(marks, dtype=np.int32)

    def bits_per_byte(self, nats: float) -> float:
        """A loss in nats per token as bits per byte of text, which compares across tokenizers."""
        if not self.text_bytes:
            raise DataError(
                "bits per byte: this corpus was given as tokens, so the size of its text is unknown"
            )
        return nats / math.log(2) * len(self) / self.text_bytes


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    cache: str | Path,
    *,
    held_out: int = 20,
    verify: bool = True,
) -> tuple[Corpus, Corpus]:
    """The training corpus and the held-out corpus of a source, from `cache` or tokenised into it.

    **Arguments**

    - `source`, `tokenizer`: the text, and how it is tokenised. Another of either is another cache entry.
    - `cache`: a folder that many corpora can share, and many processes use at once.
    - `held_out`: a document is held out if the CRC-32 of its name is a multiple of this, about one in
      `held_out`. If no name is, the last document is held out.
    - `verify`: whether to read all files to compare checksums; otherwise only sizes are compared.

    Raises `DataError` if the source cannot be read or has fewer than two documents, or if the cache is
    damaged.

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

    Raises `DataError` that lists every file that has changed since it was written.
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
    """Appends documents to the files of one corpus, and computes their sizes and checksums."""

    def __init__(self, folder: Path, dtype: np.dtype, files: contextlib.ExitStack):
        folder.mkdir()
        self.dtype, self.tokens, self.documents, self.bytes = dtype, 0, 0, 0
        self.names = "tokens.bin", "starts.bin"
        self.opened = [files.enter_context((folder / name).open("wb")) for name in self.names]
        self.sums = [hashlib.sha256() for _ in self.names]
        self.sizes = [0 for _ in self.names]

    def add(self, tokens: np.ndarray, size: int) -> None:
        """Append one document of `size` bytes of text."""
        # For tokens.bin the tokens, for starts.bin the number of tokens before them
        data = tokens.astype(self.dtype).tobytes(), np.int64(self.tokens).tobytes()
        for i, part in enumerate(data):
            self.opened[i].write(part)
            self.sums[i].update(part)
            self.sizes[i] += len(part)
        self.tokens, self.bytes = self.tokens + len(tokens), self.bytes + size
        self.documents += 1

    def summary(self) -> dict[str, Any]:
        """The corpus's entry in the manifest, once all its files are on the disk."""
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
    """Tokenise into a folder next to the target, and rename it to the target when it is complete."""
    dtype = _dtype(tokenizer.vocabulary)
    temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    try:
        with contextlib.ExitStack() as files:
            writers = {part: _Writer(temporary / part, dtype, files) for part in _PARTS}
            for part, tokens, size in _divided(source, tokenizer, held_out):
                writers[part].add(tokens, size)
            parts = {part: writer.summary() for part, writer in writers.items()}
        _write_manifest(
            temporary / "manifest.json",
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
            temporary.rename(target)
        except OSError:
            if not target.exists():
                raise
            # Another process has made the same corpus in the meantime; this copy is removed below
    except OSError as error:
        raise DataError(f"{target}: the cache cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _divided(
    source: Source, tokenizer: Tokenizer, held_out: int
) -> Iterator[tuple[str, np.ndarray, int]]:
    """`(part, tokens, bytes)` of every document; `part` is one of `_PARTS`."""
    # The last training document waits in `pending`: it is held out if no other document is
    pending, counts = None, dict.fromkeys(_PARTS, 0)
    for document in source.documents():
        tokens, size = _encode(document, tokenizer)
        if not len(tokens):
            continue
        # By its name alone, so that the choice does not depend on the other documents
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
            f"{source}: expected at least one document to train on and one to hold out, got "
            f"{sum(counts.values())} in all; cut the text into more documents"
        )


def _encode(document: Document, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """A document's tokens with the separator, and the bytes of its text; nothing for an empty one.

    A document of tokens is taken as it is, without a separator, and counts 0 bytes.
    """
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
    """The type of tokens in files: two bytes each if the vocabulary allows, or four."""
    return np.dtype("<u2" if vocabulary.size <= 1 << 16 else "<u4")


def _vocabulary(saved: dict[str, Any], folder: Path) -> Vocabulary:
    # Manifests written before values had tags hold the fields alone
    named = {"is": "growjax:Vocabulary", **saved}
    return values.from_dict(named, Vocabulary, error=DataError, source=str(folder))


# Manifests ---------------------------------------------------------------------------------------


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump({**manifest, "seal": _seal(manifest)}, file, indent=1)
        # On the disk before the folder is renamed, also if the machine loses power
        file.flush()
        os.fsync(file.fileno())


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, without its seal. Raises `DataError` if it is not as it was written."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        seal = manifest.pop("seal")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(
            f"{path}: the manifest of a prepared corpus cannot be read ({error}); delete the folder and "
            "it is made anew"
        ) from error
    if seal != _seal(manifest) or manifest.get("format") != _FORMAT:
        raise DataError(
            f"{path}: was changed after it was written, or is of another version of growjax; delete the "
            "folder and it is made anew"
        )
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    """The checksum of a manifest's contents, which tells whether it was edited."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _file_faults(path: Path, expected: dict[str, Any], verify: bool) -> Iterator[str]:
    """The difference of a file from its entry in the manifest; checksums only with `verify`."""
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            yield f"{path}: expected {expected['size']} bytes, got {size}"
        elif verify and _sha256(path) != expected["sha256"]:
            yield f"{path}: its checksum is not the one in the manifest"
    except OSError as error:
        yield f"{path}: {error.strerror or error}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(folder: Path, part: dict[str, Any], dtype: np.dtype, vocabulary: Vocabulary) -> Corpus:
    """One corpus of a folder, given its entry in the manifest."""
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
