"""Tokenizers behind one small interface: bytes, and files of the `tokenizers` library.

A tokenizer turns a document into ids of text alone. The corpus and the objectives add special tokens; a
document that contains the spelling of one (`"</s>"`) is tokenised like any other text. In a prompt the
spelling is the token, since a prompt is written by whoever asks.
"""

import abc
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from jaxtyping import Int

from growjax.data.chat import render
from growjax.data.tokenizer_files import (
    ROLES,
    TOKENIZER,
    WORDPIECE,
    WORDS,
    TokenizerFiles,
    class_of,
    complete,
    converted,
    read_files,
)
from growjax.data.vocabulary import Vocabulary
from growjax.errors import DataError
from growjax.extras import load


class Tokenizer(Protocol):
    """The interface of a tokenizer.

    One with an attribute `thread_safe` that is True is called by several threads at once.
    """

    @property
    def vocabulary(self) -> Vocabulary:
        """Its tokens, by their roles; `vocabulary.digest` identifies it."""
        ...

    @property
    def prefix(self) -> tuple[int, ...]:
        """The special tokens that its files put before a text, such as Llama's `bos`."""
        ...

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text that is generated."""
        ...

    def encode(self, text: str | bytes) -> Int[np.ndarray, " n"]:
        """The ids of a document, without special tokens: what spells one is text."""
        ...

    def encode_prompt(self, text: str) -> Int[np.ndarray, " n"]:
        """The ids of a prompt, in which the spelling of a special token is that token; no `prefix`."""
        ...

    def places(self, text: str) -> Int[np.ndarray, "n 2"]:
        """For each token of a text, its start and end in the text, in characters."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some ids, with special tokens as readable names."""
        ...


# Bytes -------------------------------------------------------------------------------------------

_BYTE_SPECIALS = ("pad", "bos", "eos", "mask", "cls", "sep", "R", "S", "X")


class _Bytes(abc.ABC):
    """One token for each byte of UTF-8; the first has the id `offset`."""

    offset: int
    thread_safe = True  # whether `encode` may be called by several threads at once

    @property
    def vocabulary(self) -> Vocabulary:
        # The protocol declares a read-only property, which a cached_property is not to a type checker
        return self._vocabulary

    @functools.cached_property
    @abc.abstractmethod
    def _vocabulary(self) -> Vocabulary:
        """The vocabulary, made once."""

    @property
    def names(self) -> dict[str, int]:
        """The spellings of its special tokens and sentinels in prompts, and their ids."""
        names = {}
        for name, i in self.vocabulary.specials.items():
            # As `_SPELLINGS` has them, so that a file with these names is read alike
            names[f"[{name}]" if name in ("R", "S", "X") else f"<{name}>"] = i
        return names | {f"<extra_id_{n}>": i for n, i in enumerate(self.vocabulary.sentinels)}

    @property
    def prefix(self) -> tuple[int, ...]:
        return ()

    @property
    def ends(self) -> tuple[int, ...]:
        return (self.vocabulary.separator,)

    def encode(self, text: str | bytes) -> Int[np.ndarray, " n"]:
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32) + self.offset

    def encode_prompt(self, text: str) -> Int[np.ndarray, " n"]:
        names = self.names
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        encoded = [[names[part]] if part in names else self.encode(part) for part in parts]
        return np.concatenate(encoded).astype(np.int32)

    def places(self, text: str) -> Int[np.ndarray, "n 2"]:
        # A byte of the form 10xxxxxx continues a character
        starts = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
        characters = np.cumsum(starts) - 1
        return np.stack([characters, characters + 1], 1)

    def decode(self, tokens: Iterable[int]) -> str:
        vocabulary, offset = self.vocabulary, self.offset
        # Special tokens are written as <eos> or <0>, and unused ids as <?300>
        names = {i: f"<{name}>" for name, i in vocabulary.specials.items()}
        names |= {i: f"<{n}>" for n, i in enumerate(vocabulary.sentinels)}
        parts = []
        for t in tokens:
            is_byte = offset <= t < offset + 256
            parts.append(bytes([t - offset]) if is_byte else names.get(t, f"<?{t}>").encode())
        return b"".join(parts).decode(errors="replace")


def _byte_letters() -> str:
    """The letter of each byte (see `Vocabulary`)."""
    # Bytes above 127 are parts of characters, which are almost always letters
    return "".join("l" if b > 127 or chr(b).isalnum() else "w" for b in range(256))


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(_Bytes):
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
    offset: ClassVar[int] = 0

    def __post_init__(self):
        if self.sentinels < 0 or self.multiple < 1:
            raise DataError(
                "ByteTokenizer: expected sentinels of 0 or more and a multiple of 1 or more, got "
                f"{self.sentinels} and {self.multiple}"
            )

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        used = 256 + len(_BYTE_SPECIALS) + self.sentinels
        size = -(-used // self.multiple) * self.multiple  # rounded up
        return Vocabulary(
            digest=f"bytes-{self.sentinels}-{self.multiple}",
            pieces=_byte_letters() + "." * (size - 256),
            specials={name: 256 + i for i, name in enumerate(_BYTE_SPECIALS)},
            sentinels=tuple(range(size - 1, size - 1 - self.sentinels, -1)),
        )


@dataclasses.dataclass(frozen=True)
class ByT5Tokenizer(_Bytes):
    """The tokenizer of ByT5: `pad`, `eos` and an unknown token, then the bytes, then the sentinels.

    The first sentinel has the first id after the bytes, as in `transformers`. Xue et al., "ByT5: Towards
    a Token-Free Future with Pre-trained Byte-to-Byte Models", TACL 2022.

    **Example**

        ByT5Tokenizer().encode("grow").tolist()     # [106, 117, 114, 122]
    """

    sentinels: int = 125
    offset: ClassVar[int] = 3

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        first = self.offset + 256
        return Vocabulary(
            digest=f"byt5-{self.sentinels}",
            pieces="." * self.offset + _byte_letters() + "." * self.sentinels,
            specials={"pad": 0, "eos": 1},
            sentinels=tuple(range(first, first + self.sentinels)),
        )

    @property
    def names(self) -> dict[str, int]:
        return {**super().names, "</s>": 1, "<unk>": 2}


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
    """A tokenizer of the library `tokenizers`; see `load_tokenizer`.

    `files` is what the files beside it say. `chat_template` is their template of conversations, or None.
    """

    thread_safe = True  # whether `encode` may be called by several threads at once

    def __init__(
        self,
        inner: Any,
        specials: Mapping[str, str] | None = None,
        files: TokenizerFiles | None = None,
    ):
        files = TokenizerFiles() if files is None else files
        # A file may have been saved with truncation and padding, which would alter documents
        inner.no_truncation()
        inner.no_padding()
        complete(inner, files)
        text = inner.to_str()
        inner.encode_special_tokens = True
        self._inner, self.chat_template = inner, files.chat_template
        self._letters = files.letters
        ids = inner.get_vocab(with_added_tokens=True)
        added = {t["content"] for t in json.loads(text)["added_tokens"] if t["special"]}
        special_ids = _special_ids(ids, specials or {}, files)
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
        # As in transformers 5, the post-processor decides, and not the key add_bos_token
        self.prefix = _prefix(inner)
        own_ends = [special_ids[name] for name in ("eos", "sep") if name in special_ids][:1]
        self.ends = tuple(dict.fromkeys([*files.ends, *own_ends]))

    def encode(self, text: str | bytes) -> Int[np.ndarray, " n"]:
        text = text.decode() if isinstance(text, bytes) else text
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_prompt(self, text: str) -> Int[np.ndarray, " n"]:
        return np.array(self._of_prompts.encode(text, add_special_tokens=False).ids, np.int32)

    def places(self, text: str) -> Int[np.ndarray, "n 2"]:
        offsets = self._inner.encode(text, add_special_tokens=False).offsets
        return np.array(offsets, int).reshape(-1, 2)  # also for a text without tokens

    def decode(self, tokens: Iterable[int]) -> str:
        return self._inner.decode([int(t) for t in tokens], skip_special_tokens=False)

    def spelling(self, token: int) -> str:
        """The spelling of a token in the vocabulary."""
        return self._inner.id_to_token(token)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """A conversation as a prompt, by the template of its files; see `growjax.data.chat.render`.

        Raises `DataError` if there is no template.
        """
        if self.chat_template is None:
            raise DataError("chat: the files of this tokenizer have no chat template")
        tokens = {f"{name}_token": self.spelling(i) for name, i in self.vocabulary.specials.items()}
        return render(self.chat_template, messages, tokens=tokens, **options)

    def to_json(self) -> str:
        """The text of its `tokenizer.json`."""
        return self._inner.to_str()

    @functools.cached_property
    def _of_prompts(self) -> Any:
        """A copy that reads the spelling of a special token as that token."""
        copy = type(self._inner).from_str(self._inner.to_str())
        copy.encode_special_tokens = self._letters
        return copy


def load_tokenizer(
    spec: str | Path, *, specials: Mapping[str, str] | None = None, lowercase: bool | None = None
) -> Tokenizer:
    """A tokenizer by name, file or folder.

    **Arguments**

    - `spec`: `"bytes"`; `"byt5"`; a Hugging Face folder, whose files say which tokens have which roles;
      a JSON file of the library `tokenizers` by itself, where spellings decide; or a BERT vocabulary,
      `vocab.txt`. Files need that library: `pip install 'growjax[data]'`. A folder with `spiece.model`,
      `tokenizer.model` or `vocab.json` and `merges.txt` alone is converted by transformers
      (`pip install 'growjax[tokenizers]'`).
    - `specials`: unusual spellings of special tokens, such as `{"cls": "<s>", "sep": "</s>"}` for
      RoBERTa. They go before what the files say.
    - `lowercase`: whether a `vocab.txt` belongs to an uncased model, so that text is lower-cased; None is
      what the folder says, or true.

    Raises `DataError` if there is no such file, or if it is not a tokenizer.

    **Example**

        load_tokenizer("bytes").encode("a").tolist()     # [97]
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec == "byt5":
        return ByT5Tokenizer()
    path, files = Path(spec), TokenizerFiles()
    if path.is_dir():
        folder, files = path, read_files(path)
        names = (TOKENIZER, WORDS) if class_of(folder) in WORDPIECE else (TOKENIZER,)
        candidates = [folder / name for name in names if (folder / name).is_file()]
        if not candidates and class_of(folder) == "ByT5Tokenizer":
            return ByT5Tokenizer()
        if not candidates:
            has_pair = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
            has_words = has_pair or (folder / WORDS).is_file()
            if not has_words and not any(folder.glob("*.model")):
                raise DataError(
                    f"tokenizer {folder}: expected {TOKENIZER}, {WORDS}, spiece.model, tokenizer.model "
                    "or vocab.json with merges.txt in the folder, got none"
                )
            inner, roles = converted(folder)
            return LibraryTokenizer(inner, specials, dataclasses.replace(files, roles=roles))
        path = candidates[0]
    if not path.is_file():
        raise DataError(
            f"tokenizer: expected 'bytes', 'byt5', a file or a folder, and {str(spec)!r} is neither"
        )
    tokenizers = load("tokenizers", f"tokenizer {path}: reading it")
    try:
        if path.suffix == ".txt":
            lowercase = files.lowercase if lowercase is None else lowercase
            bert = tokenizers.BertWordPieceTokenizer(
                str(path),
                lowercase=lowercase,
                strip_accents=files.strip_accents,
                handle_chinese_chars=files.chinese_characters,
            )
            inner = tokenizers.Tokenizer.from_str(bert.to_str())
        else:
            inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise DataError(
            f"tokenizer {path}: expected a JSON file of the library tokenizers or a vocab.txt, got an "
            f"error of the library: {error}"
        ) from error
    return LibraryTokenizer(inner, specials, files)


def _prefix(inner: Any) -> tuple[int, ...]:
    """The special tokens that the post-processor of a tokenizer puts before a text."""
    # A vocabulary of words may not know the first text, and give it no token
    for text in ("a", *sorted(inner.get_vocab(with_added_tokens=False))[:100]):
        framed = inner.encode(text)
        if 0 in framed.special_tokens_mask:
            return tuple(framed.ids[: framed.special_tokens_mask.index(0)])
    return ()


def _special_ids(
    ids: Mapping[str, int], spellings: Mapping[str, str], files: TokenizerFiles
) -> dict[str, int]:
    """The ids of the special tokens that a vocabulary has, by growjax's names for them.

    `spellings` go before the roles in the files, these before the defaults of the tokenizer's class, and
    the usual spellings are for what nothing says.
    """
    roles = files.roles
    wrong = [f"{name}={token!r}" for name, token in spellings.items() if token not in ids]
    if wrong or set(spellings) - set(_SPELLINGS):
        raise DataError(
            f"specials: expected names among {', '.join(_SPELLINGS)} and tokens of the vocabulary, "
            f"got {', '.join(wrong) or ', '.join(spellings)}"
        )
    absent = [
        f"{name}_token={token!r}" for name, token in roles.items() if token and token not in ids
    ]
    absent += [repr(token) for token in files.others if token not in ids]
    if absent:
        raise DataError(
            f"tokenizer: its files name {', '.join(absent)}, which the vocabulary lacks; save the "
            "tokenizer again where its model comes from"
        )
    special_ids = {}
    for name, usual in _SPELLINGS.items():
        if name in spellings:
            candidates = (spellings[name],)
        elif name in roles:
            candidates = (roles[name],)
        elif files.defaults is not None and name in ROLES:
            candidates = (files.defaults.get(name),)
        else:
            candidates = usual
        matching = [ids[token] for token in candidates if token and token in ids]
        if matching:
            special_ids[name] = matching[0]
    return special_ids


def _pieces(ids: Mapping[str, int], not_text: set[str], special_ids: Iterable[int]) -> str:
    """A letter for each id (see `Vocabulary`), by how the vocabulary marks the parts of words."""
    letters = ["."] * (max(ids.values()) + 1)
    # Byte-level BPE writes a space before a word as Ġ, SentencePiece as ▁; WordPiece has no such mark,
    # but ## before a part of a word that is not the first. A vocabulary may have a few pieces that begin
    # with another one's mark, as a letter of some text.
    counts = {m: sum(token.startswith(m) for token in ids) for m in ("Ġ", "▁", "##")}
    mark = max(counts, key=lambda m: counts[m])
    for token, i in ids.items():
        if token in not_text or _SENTINEL.fullmatch(token):
            continue
        if mark == "##" or not counts[mark]:
            letters[i] = "c" if token.startswith("##") and len(token) > 2 else "w"
        else:
            # A line's end (Ċ in byte-level BPE) is not part of the word before it
            letters[i] = "w" if token.startswith((mark, "Ċ")) else "c"
    for i in special_ids:
        letters[i] = "."
    return "".join(letters)
