"""Several sources in one run, by weight: each block of tokens comes from one of them.

Which source the next block is from follows from its number alone, so the position of a run in all its
sources is still one integer.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from growjax.data.corpus import Corpus, bits_per_byte, digest_of
from growjax.data.order import proportions
from growjax.data.sources import Source
from growjax.data.vocabulary import Vocabulary
from growjax.errors import DataError, raise_all
from growjax.values import Name, check, positive, register


@register
@dataclasses.dataclass(frozen=True)
class Blend:
    """Sources that are mixed by weight: a plan's `data`, or a source for `prepare`.

    Every source is tokenised and held out from by itself. Smaller ones are read more often than once,
    in another order each time; larger ones only in part.

    **Arguments**

    - `sources`: the sources.
    - `weights`: the share of the training tokens that comes from each, up to a common factor; None is
      equal shares.
    - `names`: for their held-out losses; None takes the last part of each path.

    **Example**

        Blend((Text("books"), JSONL("web/*.jsonl.zst"), Text("code")), weights=(0.5, 0.3, 0.2))
    """

    sources: tuple[Source, ...]
    weights: tuple[Annotated[float, positive()], ...] | None = None
    names: tuple[Name, ...] | None = None

    def __post_init__(self):
        check(self, DataError, "these sources cannot be mixed:", self._faults)

    def _faults(self) -> Iterator[str]:
        count = len(self.sources)
        if not count:
            yield "sources: expected at least one, got none"
        for name, values in (("weights", self.weights), ("names", self.names)):
            if values is not None and len(values) != count:
                yield f"{name}: expected one for each of the {count} sources, got {len(values)}"
        if self.names is not None and len(set(self.names)) < len(self.names):
            yield f"names: expected each once, got {', '.join(self.names)}"

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each source: as given, or the last part of its path."""
        if self.names is not None:
            return self.names
        labels: list[str] = []
        for source in self.sources:
            path = getattr(source, "path", None) or getattr(source, "name", None)
            label = Path(path).name if path else type(source).__name__
            # A number tells those apart that have the same
            labels.append(label if label not in labels else f"{label} {len(labels)}")
        return tuple(labels)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Blended:
    """Corpora that are mixed by weight; see `Blend`.

    - `corpora`: of the same vocabulary.
    - `weights`: the share of the tokens from each, up to a common factor.
    - `names`: of the corpora.

    Raises `DataError` if they do not fit each other.

    **Example**

        Blended((books, web), (0.7, 0.3), ("books", "web"))
    """

    corpora: tuple[Corpus, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...]

    def __post_init__(self):
        faults = []
        if not len(self.corpora) == len(self.weights) == len(self.names) > 0:
            faults.append("expected as many weights and names as corpora, and at least one")
        if any(not weight > 0 for weight in self.weights):
            faults.append(f"weights: expected positive numbers, got {self.weights}")
        if len({corpus.vocabulary.digest for corpus in self.corpora}) > 1:
            faults.append("corpora: they were made by different tokenizers")
        raise_all(DataError, "these corpora cannot be mixed:", faults)

    def __repr__(self) -> str:
        shares = zip(self.names, self.weights, self.corpora, strict=True)
        return f"Blended({', '.join(f'{w:g} of {name}: {c!r}' for name, w, c in shares)})"

    def __len__(self) -> int:
        """The number of tokens of all corpora."""
        return sum(map(len, self.corpora))

    @property
    def vocabulary(self) -> Vocabulary:
        return self.corpora[0].vocabulary

    @property
    def text_bytes(self) -> int:
        """The size of the text of all corpora in UTF-8 bytes; 0 if one was given as tokens."""
        sizes = [corpus.text_bytes for corpus in self.corpora]
        return sum(sizes) if all(sizes) else 0

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the corpora and their shares."""
        shares = map(str, proportions(self.weights))
        return digest_of([*(corpus.digest for corpus in self.corpora), *shares])

    def bits_per_byte(self, nats: float) -> float:
        """A loss in nats per token as bits per byte of text, over all corpora together."""
        return bits_per_byte(self, nats)


def corpora_of(corpus: Corpus | Blended) -> tuple[Corpus, ...]:
    """The corpora that are mixed, or the only one."""
    return corpus.corpora if isinstance(corpus, Blended) else (corpus,)


def shares_of(corpus: Corpus | Blended) -> tuple[int, ...]:
    """The share of the blocks from each corpus, as integers."""
    return proportions(corpus.weights) if isinstance(corpus, Blended) else (1,)
