"""Tokenizers behind one small interface: bytes, and files of the `tokenizers` library.

A tokenizer turns a document into ids of text alone. Special tokens are put in by the corpus and the
objectives; a document that spells one out (`"</s>"`) is text like any other.
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
    """What a tokenizer can do."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Its tokens, by their roles; `vocabulary.digest` tells it from others."""
        ...

    def encode(self, text: str | bytes) -> Int[np.ndarray, " n"]:
        """The ids of a document, without special tokens."""
        ...

    def places(self, text: str) -> Int[np.ndarray, "n 2"]:
        """For each token of a text, the characters from which and before which it stands there."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some ids, for people to read."""
        ...


# Bytes -------------------------------------------------------------------------------------------

_BYTE_SPECIALS = ("pad", "bos", "eos", "mask", "cls", "sep", "R", "S", "X")


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token a byte of UTF-8, then the special tokens, and at the very end the sentinels.

    **Arguments**

    - `sentinels`: how many; the first is the last id, and they descend from there, as T5's do.
    - `multiple`: the vocabulary is padded to a multiple of this, between specials and sentinels.

    **Example**

        ByteTokenizer().encode("grow").tolist()     # [103, 114, 111, 119]
        ByteTokenizer().vocabulary.size             # 384
    """

    sentinels: int = 100
    multiple: int = 128

    def __post_init__(self):
        if self.sentinels < 0 or self.multiple < 1:
            raise DataError(
                "ByteTokenizer: expected sentinels of 0 or more and a multiple of 1 or more, got "
                f"{self.sentinels} and {self.multiple}"
            )

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        used = 256 + len(_BYTE_SPECIALS) + self.sentinels
        size = -(-used // self.multiple) * self.multiple
        # Bytes above 127 are parts of letters in almost all text that is not English
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
        names = {i: f"<{name}>" for name, i in vocabulary.specials.items()}
        names |= {i: f"<{n}>" for n, i in enumerate(vocabulary.sentinels)}
        parts = (bytes([t]) if t < 256 else names.get(t, f"<?{t}>").encode() for t in tokens)
        return b"".join(parts).decode(errors="replace")


# Files of the `tokenizers` library -----------------------------------------------------------------

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

    def __init__(self, inner: Any, specials: Mapping[str, str] | None = None):
        # A file may have been saved with them, and would then cut every document short.
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        text = inner.to_str()
        ids = inner.get_vocab(with_added_tokens=True)
        added = {t["content"] for t in json.loads(text)["added_tokens"] if t["special"]}
        named = _named(ids, specials or {})
        found = [(_SENTINEL.fullmatch(token), i) for token, i in ids.items()]
        ordered = sorted((int(m[1] or m[2]), i) for m, i in found if m)
        self.vocabulary = Vocabulary(
            digest=hashlib.sha256((text + json.dumps(named)).encode()).hexdigest()[:16],
            pieces=_pieces(ids, added | {t for t in ids if _UNUSED.fullmatch(t)}, named.values()),
            specials=named,
            sentinels=tuple(i for _, i in ordered),
        )

    def encode(self, text: str | bytes) -> Int[np.ndarray, " n"]:
        text = text.decode() if isinstance(text, bytes) else text
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

    def places(self, text: str) -> Int[np.ndarray, "n 2"]:
        found = self._inner.encode(text, add_special_tokens=False).offsets
        return np.array(found, int).reshape(-1, 2)

    def decode(self, tokens: Iterable[int]) -> str:
        return self._inner.decode([int(t) for t in tokens], skip_special_tokens=False)


def load_tokenizer(
    spec: str | Path, *, specials: Mapping[str, str] | None = None, lowercase: bool = True
) -> Tokenizer:
    """A tokenizer by name or file.

    **Arguments**

    - `spec`: `"bytes"`; a JSON file of the library `tokenizers`; or a BERT vocabulary, `vocab.txt`.
      Files need that library: `pip install 'growjax[data]'`.
    - `specials`: spellings of special tokens that are not the usual ones, such as
      `{"cls": "<s>", "sep": "</s>"}` for RoBERTa.
    - `lowercase`: whether the model of a `vocab.txt` is an uncased one.

    Raises `DataError` if the file is missing or is not a tokenizer.

    **Example**

        load_tokenizer("bytes").encode("a").tolist()     # [97]
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if not path.is_file():
        raise DataError(f"tokenizer: expected 'bytes' or a file, and {str(spec)!r} is no file")
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
            f"tokenizer {path}: expected a JSON file of the library tokenizers or a vocab.txt; it "
            f"says {error}"
        ) from error
    return LibraryTokenizer(inner, specials)


def _named(ids: Mapping[str, int], given: Mapping[str, str]) -> dict[str, int]:
    """The ids of the special tokens that there are, by their names here."""
    wrong = [f"{name}={token!r}" for name, token in given.items() if token not in ids]
    if wrong or set(given) - set(_SPELLINGS):
        raise DataError(
            f"specials: expected names among {', '.join(_SPELLINGS)} and tokens of the vocabulary, "
            f"got {', '.join(wrong) or ', '.join(given)}"
        )
    spelled = {name: (given[name],) if name in given else _SPELLINGS[name] for name in _SPELLINGS}
    first = {name: next((ids[t] for t in ts if t in ids), None) for name, ts in spelled.items()}
    return {name: i for name, i in first.items() if i is not None}


def _pieces(ids: Mapping[str, int], special: set[str], named: Iterable[int]) -> str:
    """A letter for each id (see `Vocabulary`), by how the vocabulary marks the parts of words."""
    letters = ["."] * (max(ids.values()) + 1)
    mark = next((m for m in ("Ġ", "▁") if any(t.startswith(m) for t in ids)), None)
    for token, i in ids.items():
        if token in special or _SENTINEL.fullmatch(token):
            continue
        if mark is None:
            letters[i] = "c" if token.startswith("##") and len(token) > 2 else "w"
        else:
            # The mark is a space before a word; a line's end (Ċ) is no part of the word before it
            letters[i] = "w" if token.startswith((mark, "Ċ")) else "c"
    for i in named:
        letters[i] = "."
    return "".join(letters)
