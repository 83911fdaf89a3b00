"""A tokenizer's special tokens, sentinels and word boundaries, which objectives depend on.

A vocabulary is plain data, stored next to the tokens that it describes, so a prepared corpus can be
trained on without the tokenizer that made it.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Int

from growjax.errors import DataError, raise_all
from growjax.values import check, register


@register
@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer, by their roles.

    **Fields**

    - `digest`: identifies the tokenizer.
    - `pieces`: a letter for each id. `w` starts a word; `c` continues the word before it; `l`, a letter
      for tokenizers of bytes, continues it if the token before is an `l` too; `.` is not text: a special
      token, a sentinel or unused.
    - `specials`: the ids of the special tokens that the tokenizer has, by name: `pad`, `bos`, `eos`,
      `mask`, `cls`, `sep`, and the mode tokens `R`, `S`, `X`.
    - `sentinels`: the ids that replace the first span that is cut out, the second, and so on.

    Raises `DataError` if the fields contradict each other.

    **Example**

        ByteTokenizer().vocabulary.specials["eos"]      # 258
    """

    digest: str
    pieces: str
    specials: dict[str, int]
    sentinels: tuple[int, ...] = ()

    def __post_init__(self):
        check(self, DataError, "this vocabulary is inconsistent:", lambda: _faults(self))

    @property
    def size(self) -> int:
        """One more than the largest id: how many rows an embedding needs at least."""
        return len(self.pieces)

    @functools.cached_property
    def is_text(self) -> Bool[np.ndarray, " size"]:
        """True at ids that stand for text."""
        return self._letters != ord(".")

    @functools.cached_property
    def is_sentinel(self) -> Bool[np.ndarray, " size"]:
        """True at sentinels."""
        mask = np.zeros(self.size, bool)
        mask[list(self.sentinels)] = True
        return mask

    @functools.cached_property
    def text_ids(self) -> Int[np.ndarray, " n"]:
        """The ids that stand for text."""
        return np.flatnonzero(self.is_text).astype(np.int32)

    @functools.cached_property
    def sentinel_ids(self) -> Int[np.ndarray, " n"]:
        """The sentinels, first one first."""
        return np.array(self.sentinels, np.int32)

    @property
    def separator(self) -> int:
        """The token after each document: `eos`, or `sep` for a tokenizer without one."""
        if "eos" in self.specials:
            return self.specials["eos"]
        if "sep" in self.specials:
            return self.specials["sep"]
        raise DataError(
            "documents: expected a tokenizer with an eos or a sep token to end them with, got one with "
            f"{', '.join(self.specials) or 'no special tokens'}"
        )

    def words(self, tokens: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """For each token the number of its word, from 0; a token that is not text is its own word."""
        letters = self._letters[tokens]
        before = np.concatenate([[ord(".")], letters[:-1]])[: len(letters)]  # empty if letters are
        # A token that continues the word before it; all others begin one
        joins = (letters == ord("c")) & (before != ord("."))
        joins |= (letters == ord("l")) & (before == ord("l"))
        return np.maximum(np.cumsum(~joins) - 1, 0)

    def require(self, who: str, specials: Iterable[str], sentinels: int = 0) -> None:
        """Raise `DataError` that lists the special tokens and sentinels missing for `who`."""
        missing = [
            f"it needs the special token {name!r}" for name in specials if name not in self.specials
        ]
        if sentinels > len(self.sentinels):
            missing.append(
                f"it needs {sentinels} sentinels, and the tokenizer has {len(self.sentinels)}; use "
                "shorter windows, fewer or longer spans, or ByteTokenizer(sentinels=...)"
            )
        raise_all(DataError, f"{who} does not fit the tokenizer:", missing)

    @functools.cached_property
    def _letters(self) -> np.ndarray:
        return np.frombuffer(self.pieces.encode("ascii"), np.uint8)


def _faults(vocabulary: Vocabulary) -> Iterator[str]:
    """The contradictions between the fields of a vocabulary."""
    unknown = sorted(set(vocabulary.pieces) - set("wcl."))
    if unknown:
        yield f"pieces: expected the letters w, c, l and '.', got {''.join(unknown)!r}"
    roles = [*vocabulary.specials.items(), *((f"sentinel {s}", s) for s in vocabulary.sentinels)]
    for name, i in roles:
        if not 0 <= i < vocabulary.size:
            yield f"{name}: expected an id below {vocabulary.size}, got {i}"
        elif vocabulary.pieces[i] != ".":
            yield f"{name}: id {i} is text according to `pieces`"
    if len(set(vocabulary.sentinels)) < len(vocabulary.sentinels):
        yield f"sentinels: expected each id once, got {vocabulary.sentinels}"
    shared = set(vocabulary.sentinels) & set(vocabulary.specials.values())
    if shared:
        yield f"sentinels: {sorted(shared)} are special tokens too"
