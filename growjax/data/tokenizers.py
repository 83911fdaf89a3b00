"""Tokenizers behind one small interface: bytes, and files of the `tokenizers` library.

A tokenizer turns a document into ids of text alone. The corpus and the objectives add special tokens; a
document that contains the spelling of one (`"</s>"`) is tokenised like any other text.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from growjax.data.vocabulary import Vocabulary
from growjax.errors import DataError


class Tokenizer(Protocol):
    """The interface of a tokenizer.

    One with an attribute `thread_safe` that is True is called by several threads at once.
    """

    @property
    def vocabulary(self) -> Vocabulary:
        """Its tokens, by their roles; `vocabulary.digest` identifies it."""
        ...

    def encode(self, text: str | bytes) -> Int[np.ndarray, " n"]:
        """The ids of a document, without special tokens."""
        ...

    def places(self, text: str) -> Int[np.ndarray, "n 2"]:
        """For each token of a text, its start and end in the text, in characters."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some ids, with special tokens as readable names."""
        ...


# Bytes -------------------------------------------------------------------------------------------

_BYTE_SPECIALS = ("pad", "bos", "eos", "mask", "cls", "sep", "R", "S", "X")


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token for each byte of UTF-8, then the special tokens, and at the very end the sentinels.

    **Arguments**

    - `sentinels`: how many; the first sentinel is the last id, and they descend from there, as T5's do.
    - `multiple`: the vocabulary's size is a multiple of this; unused ids stand before the sentinels.

    **Example**

        ByteTokenizer().encode("grow").tolist()     # [103, 114, 111, 119]
        ByteTokenizer().vocabulary.size             # 384
    """

    sentinels: int = 100
    multiple: int = 128
    thread_safe = True

    def __post_init__(self):
        if self.sentinels < 0 or self.multiple < 1:
            raise DataError(
                "ByteTokenizer: expected sentinels of 0 or more and a multiple of 1 or more, got "
                f"{self.sentinels} and {self.multiple}"
            )

    @property
    def vocabulary(self) -> Vocabulary:
        # The protocol declares a read-only property, which a cached_property is not to a type checker
        return self._vocabulary

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        used = 256 + len(_BYTE_SPECIALS) + self.sentinels
        size = -(-used // self.multiple) * self.multiple  # rounded up
        # Bytes above 127 are parts of characters, which are almost always letters
        letters = "".join("l" if b > 127 or chr(b).isalnum() else "w" for b in range(256))
        return Vocabulary(
            digest=f"bytes-{self.sentinels}-{self.multiple}",
            pieces=letters + "." * (size - 256),
            specials={name: 256 + i for i, name in enumerate(_BYTE_SPECIALS)},
            sentinels=tuple(range(size - 1, size - 1 - self.sentinels, -1)),
        )

    def encode(self, text: str | bytes) -> Int[np.ndarray, " n"]:
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def places(self, text: str) -> Int[np.ndarray, "n 2"]:
        # A byte of the form 10xxxxxx continues a character
        starts = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
        characters = np.cumsum(starts) - 1
        return np.stack([characters, characters + 1], 1)

    def decode(self, tokens: Iterable[int]) -> str:
        vocabulary = self.vocabulary
        # Special tokens are written as <eos> or <0>, and unused ids as <?300>
        names = {i: f"<{name}>" for name, i in vocabulary.specials.items()}
        names |= {i: f"<{n}>" for n, i in enumerate(vocabulary.sentinels)}
        parts = (bytes([t]) if t < 256 else names.get(t, f"<?{t}>").encode() for t in tokens)
        return b"".join(parts).decode(errors="replace")


# Files of the `tokenizers` library -----------------------------------------------------------------

# The usual spellings of each special token; the first that a vocabulary has is used
_SPELLINGS = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    "bos": ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>"),
    "eos": ("</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|end_of_text|>"),
    "mask": ("<mask>", "[MASK]"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "R": ("[R]", "[NLU]"),
    "S": ("[S]", "[S2S]"),
    "X": ("[X]", "[NLG]"),
}
_SENTINEL = re.compile(r"<extra_id_(\d+)>|<sentinel_(\d+)>")
_UNUSED = re.compile(r"\[unused\d+\]|\[UNK\]|<unk>")


class LibraryTokenizer:
    """A tokenizer of the library `tokenizers`; see `load_tokenizer`."""

    thread_safe = True  # whether `encode` may be called by several threads at once

    def __init__(self, inner: Any, specials: Mapping[str, str] | None = None):
        # A file may have been saved with truncation and padding, which would alter documents
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        text = inner.to_str()
        ids = inner.get_vocab(with_added_tokens=True)
        added = {t["content"] for t in json.loads(text)["added_tokens"] if t["special"]}
        special_ids = _special_ids(ids, specials or {})
        sentinels = []
        for token, i in ids.items():
            match = _SENTINEL.fullmatch(token)
            if match:
                sentinels.append((int(match[1] or match[2]), i))
        not_text = added | {token for token in ids if _UNUSED.fullmatch(token)}
        self.vocabulary = Vocabulary(
            digest=hashlib.sha256((text + json.dumps(special_ids)).encode()).hexdigest()[:16],
            pieces=_pieces(ids, not_text, special_ids.values()),
            specials=special_ids,
            sentinels=tuple(i for _, i in sorted(sentinels)),
        )

    def encode(self, text: str | bytes) -> Int[np.ndarray, " n"]:
        text = text.decode() if isinstance(text, bytes) else text
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

    def places(self, text: str) -> Int[np.ndarray, "n 2"]:
        offsets = self._inner.encode(text, add_special_tokens=False).offsets
        return np.array(offsets, int).reshape(-1, 2)  # also for a text without tokens

    def decode(self, tokens: Iterable[int]) -> str:
        return self._inner.decode([int(t) for t in tokens], skip_special_tokens=False)


def load_tokenizer(
    spec: str | Path, *, specials: Mapping[str, str] | None = None, lowercase: bool = True
) -> Tokenizer:
    """A tokenizer by name or file.

    **Arguments**

    - `spec`: `"bytes"`; a JSON file of the library `tokenizers`; or a BERT vocabulary, `vocab.txt`.
      Files need that library: `pip install 'growjax[data]'`.
    - `specials`: unusual spellings of special tokens, such as `{"cls": "<s>", "sep": "</s>"}` for
      RoBERTa.
    - `lowercase`: whether a `vocab.txt` belongs to an uncased model, so that text is lower-cased.

    Raises `DataError` if the file is missing or is not a tokenizer.

    **Example**

        load_tokenizer("bytes").encode("a").tolist()     # [97]
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if not path.is_file():
        raise DataError(f"tokenizer: expected 'bytes' or a file, and {str(spec)!r} is not a file")
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            f"tokenizer {path}: reading it needs the library tokenizers; pip install 'growjax[data]'"
        ) from error
    try:
        if path.suffix == ".txt":
            bert = tokenizers.BertWordPieceTokenizer(str(path), lowercase=lowercase)
            inner = tokenizers.Tokenizer.from_str(bert.to_str())
        else:
            inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise DataError(
            f"tokenizer {path}: expected a JSON file of the library tokenizers or a vocab.txt, got an "
            f"error of the library: {error}"
        ) from error
    return LibraryTokenizer(inner, specials)


def _special_ids(ids: Mapping[str, int], spellings: Mapping[str, str]) -> dict[str, int]:
    """The ids of the special tokens that a vocabulary has, by growjax's names for them.

    `spellings` go before the usual ones.
    """
    wrong = [f"{name}={token!r}" for name, token in spellings.items() if token not in ids]
    if wrong or set(spellings) - set(_SPELLINGS):
        raise DataError(
            f"specials: expected names among {', '.join(_SPELLINGS)} and tokens of the vocabulary, "
            f"got {', '.join(wrong) or ', '.join(spellings)}"
        )
    special_ids = {}
    for name, usual in _SPELLINGS.items():
        candidates = (spellings[name],) if name in spellings else usual
        matching = [token for token in candidates if token in ids]
        if matching:
            special_ids[name] = ids[matching[0]]
    return special_ids


def _pieces(ids: Mapping[str, int], not_text: set[str], special_ids: Iterable[int]) -> str:
    """A letter for each id (see `Vocabulary`), by how the vocabulary marks the parts of words."""
    letters = ["."] * (max(ids.values()) + 1)
    # Byte-level BPE writes a space before a word as Ġ, SentencePiece as ▁; WordPiece has no such mark,
    # but ## before a part of a word that is not the first
    mark = next((m for m in ("Ġ", "▁") if any(t.startswith(m) for t in ids)), None)
    for token, i in ids.items():
        if token in not_text or _SENTINEL.fullmatch(token):
            continue
        if mark is None:
            letters[i] = "c" if token.startswith("##") and len(token) > 2 else "w"
        else:
            # A line's end (Ċ in byte-level BPE) is not part of the word before it
            letters[i] = "w" if token.startswith((mark, "Ċ")) else "c"
    for i in special_ids:
        letters[i] = "."
    return "".join(letters)
