"""Tokens on disk, and refused if they have changed since they were written.

A folder that `prepare` made has a manifest with sizes and checksums. Files that do not match them are
refused, since a run that resumes on them would go on with other text than it began with.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from growjax import values
from growjax.data.files import DataFile, is_url
from growjax.data.sources import Document, FileSource
from growjax.data.tokenizers import Tokenizer
from growjax.data.vocabulary import Vocabulary
from growjax.errors import DataError, raise_all
from growjax.values import File, check, register
from growjax.values.codec import seal_of


FORMAT = 1
# The parts of a source; one that is trained on as a whole has the first alone
PARTS = ("training", "held_out")


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
            encode(Document(str(n), content), tokenizer) for n, content in enumerate(documents)
        ]
        arrays = [tokens for tokens, _ in encoded if len(tokens)]
        dtype = dtype_of(tokenizer.vocabulary)
        # The empty array keeps the dtype if there is no document
        tokens = np.concatenate([np.zeros(0, dtype), *(a.astype(dtype) for a in arrays)])
        starts = np.cumsum([0, *map(len, arrays)], dtype=np.int64)[:-1]
        digest = digest_of([hashlib.sha256(a.tobytes()).hexdigest() for a in (tokens, starts)])
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

    @property
    def prepared(self) -> "Prepared":
        """What `prepare` wrote of this corpus, as a source that a plan can name.

        Raises `DataError` for a corpus in memory.

        **Example**

            training, held_out = prepare(["one", "two"], ByteTokenizer(), "runs/cache")
            Plan(..., data=training.prepared)
        """
        if self.path is None:
            raise DataError("this corpus is in memory; `prepare` writes one that a plan can name")
        return Prepared(str(self.path.parent.parent))  # FOLDER/training/tokens.bin

    def bits_per_byte(self, nats: float) -> float:
        """A loss in nats per token as bits per byte of text, which compares across tokenizers."""
        return bits_per_byte(self, nats)


def load(folder: str | Path, *, verify: bool = True) -> tuple[Corpus, Corpus]:
    """The training corpus and the held-out corpus of a folder that `prepare` made.

    Raises `DataError` that lists every file that has changed since it was written, or if the source was
    prepared as a whole, for another validation set.
    """
    corpora = load_parts(folder, verify=verify)
    if len(corpora) < len(PARTS):
        raise DataError(
            f"{folder}: all of it is trained on, and nothing was held out; name a validation set"
        )
    return corpora["training"], corpora["held_out"]


def load_parts(folder: str | Path, *, verify: bool = True) -> dict[str, Corpus]:
    """The corpora of a folder by their parts: "training", and "held_out" unless all is trained on."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    dtype = np.dtype(manifest["dtype"])
    faults = []
    for part, entry in manifest["parts"].items():
        for name, file in entry["files"].items():
            faults += _file_faults(folder / part / name, file, verify)
    raise_all(DataError, f"the cache {folder} is damaged; delete it and it is made anew:", faults)
    vocabulary = _vocabulary(manifest["vocabulary"], folder)
    return {
        part: _open(folder / part, entry, dtype, vocabulary)
        for part, entry in manifest["parts"].items()
    }


@register
@dataclasses.dataclass(frozen=True)
class Prepared(FileSource):
    """A folder that `prepare` made, which trains without the text that it was made from.

    **Arguments**

    - `path`: the folder, as `growjax prepare` prints it; or a copy of it on another machine.

    **Example**

        Prepared("runs/cache/6f2c30f0b7f64f2d8a1f5a0f0a6b3d1e")
    """

    path: File

    def __post_init__(self):
        check(self, DataError)

    def files(self) -> list[DataFile]:
        if is_url(self.path):
            raise DataError(f"{self.path}: tokens are mapped into memory; copy it to this machine")
        return [DataFile("manifest.json", str(Path(self.path) / "manifest.json"))]

    def corpora(self, vocabulary: Vocabulary, *, verify: bool = True) -> dict[str, Corpus]:
        """The corpora by the names of their parts; raises `DataError` for those of another tokenizer."""
        self.files()  # refuses a URL
        corpora = load_parts(self.path, verify=verify)
        if corpora["training"].vocabulary.digest != vocabulary.digest:
            raise DataError(
                f"{self.path}: was prepared with another tokenizer; name that one, or the text itself"
            )
        return corpora

    def _read(self) -> Iterator[Document | str]:
        for part, corpus in load_parts(self.path).items():
            ends = [*corpus.starts[1:].tolist(), len(corpus)]
            for n, (start, end) in enumerate(zip(corpus.starts.tolist(), ends, strict=True)):
                yield Document(f"{part}:{n}", corpus.read(start, end))


def bits_per_byte(corpus: Any, nats: float) -> float:
    """A loss in nats per token of a corpus as bits per byte of its text."""
    if not corpus.text_bytes:
        raise DataError(
            "bits per byte: this corpus was given as tokens, so the size of its text is unknown"
        )
    return nats / math.log(2) * len(corpus) / corpus.text_bytes


def encode(document: Document, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
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


def dtype_of(vocabulary: Vocabulary) -> np.dtype:
    """The type of tokens in files: two bytes each if the vocabulary allows, or four."""
    return np.dtype("<u2" if vocabulary.size <= 1 << 16 else "<u4")


def _vocabulary(saved: dict[str, Any], folder: Path) -> Vocabulary:
    # Manifests written before values had tags hold the fields alone
    named = {"is": "growjax:Vocabulary", **saved}
    return values.from_dict(named, Vocabulary, error=DataError, source=str(folder))


# Manifests ---------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
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
    if seal != seal_of(manifest) or manifest.get("format") != FORMAT:
        raise DataError(
            f"{path}: was changed after it was written, or is of another version of growjax; delete the "
            "folder and it is made anew"
        )
    return manifest


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
        digest_of([file["sha256"] for file in part["files"].values()]),
        path,
    )


def digest_of(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
