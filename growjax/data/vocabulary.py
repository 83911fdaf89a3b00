"""What an objective needs to know about a tokenizer: special tokens, sentinels, and where words start.

It is plain data and is kept next to the tokens that it describes, so a prepared corpus can be trained
on without the tokenizer that made it.
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

    - `digest`: tells two tokenizers apart.
    - `pieces`: a letter for each id. `w` starts a word, `c` continues the one before it, `l` does so if
      that is an `l` too (a letter, for bytes); `.` is no text: a special token, a sentinel or unused.
    - `specials`: the ids of those that there are of `pad`, `bos`, `eos`, `mask`, `cls`, `sep`, and the
      mode tokens `R`, `S`, `X`.
    - `sentinels`: the ids that stand for the first span that is cut out, the second, and so on.

    Raises `DataError` if they contradict each other.

    **Example**

        ByteTokenizer().vocabulary.specials["eos"]      # 258
    """

    digest: str
    pieces: str
    specials: dict[str, int]
    sentinels: tuple[int, ...] = ()

    def __post_init__(self):
        check(self, DataError, "this is no vocabulary:", lambda: _faults(self))

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
        found = np.zeros(self.size, bool)
        found[list(self.sentinels)] = True
        return found

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
        """What stands after each document: `eos`, or `sep` where there is none."""
        if "eos" in self.specials:
            return self.specials["eos"]
        if "sep" in self.specials:
            return self.specials["sep"]
        raise DataError(
            "documents: expected a tokenizer with an eos or a sep token to end them with, this one has "
            f"{', '.join(self.specials) or 'no special tokens'}"
        )

    def words(self, tokens: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """For each token the ordinal of its word, from 0; what is no text is a word of its own."""
        letters = self._letters[tokens]
        before = np.concatenate([[ord(".")], letters[:-1]])[: len(letters)]
        joins = (letters == ord("c")) & (before != ord("."))
        joins |= (letters == ord("l")) & (before == ord("l"))
        return np.maximum(np.cumsum(~joins) - 1, 0)

    def require(self, who: str, specials: Iterable[str], sentinels: int = 0) -> None:
        """Raise `DataError` that lists the special tokens and sentinels which `who` needs in vain."""
        lacking = [
            f"it needs the special token {name!r}" for name in specials if name not in self.specials
        ]
        if sentinels > len(self.sentinels):
            lacking.append(
                f"it needs {sentinels} sentinels and there are {len(self.sentinels)}; use shorter "
                "windows, fewer or longer spans, or ByteTokenizer(sentinels=...)"
            )
        raise_all(DataError, f"{who} does not fit the tokenizer:", lacking)

    @functools.cached_property
    def _letters(self) -> np.ndarray:
        return np.frombuffer(self.pieces.encode("ascii"), np.uint8)


def _faults(vocabulary: Vocabulary) -> Iterator[str]:
    unknown = sorted(set(vocabulary.pieces) - set("wcl."))
    if unknown:
        yield f"pieces: expected the letters w, c, l and '.', got {''.join(unknown)!r}"
    taken = [*vocabulary.specials.items(), *((f"sentinel {s}", s) for s in vocabulary.sentinels)]
    for name, i in taken:
        if not 0 <= i < vocabulary.size:
            yield f"{name}: expected an id below {vocabulary.size}, got {i}"
        elif vocabulary.pieces[i] != ".":
            yield f"{name}: the pieces say that id {i} is text"
    if len(set(vocabulary.sentinels)) < len(vocabulary.sentinels):
        yield f"sentinels: expected each id once, got {vocabulary.sentinels}"
    both = set(vocabulary.sentinels) & set(vocabulary.specials.values())
    if both:
        yield f"sentinels: {sorted(both)} are special tokens too"
