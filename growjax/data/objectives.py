"""Training objectives: functions from a window of tokens to one training example.

An objective is plain data. Called with a window, a vocabulary and a random generator, it returns NumPy
arrays whose shapes depend on the objective alone, so that a stage compiles once.

Every example has `targets` and `weights`: the loss is the weighted mean of the cross-entropy over
positions; `weights` are 1 where a prediction counts and 0 elsewhere.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Bool, Int

from growjax.data.tokenizers import ByteTokenizer
from growjax.data.vocabulary import Vocabulary
from growjax.errors import DataError
from growjax.values import Range, Size, at_least, base, check, ranged, register


Example = dict[str, np.ndarray]

# The most tokens of an example: `batch_shapes` makes one to learn its shapes, which takes memory
LONGEST = 2**24
Length = Annotated[Size, Range("at most 2**24 tokens", lambda n: n <= LONGEST)]
_THREE = Range(
    "three probabilities that sum to 1",
    lambda share: min(share) >= 0 and abs(sum(share) - 1) < 1e-6,
)


class Window(NamedTuple):
    """Consecutive tokens of a corpus, and for each the number of its document in the window, from 0."""

    tokens: Int[np.ndarray, " n"]
    documents: Int[np.ndarray, " n"]


@base("an objective such as Causal(128)")
class Objective(Protocol):
    """The interface of an objective: a frozen, hashable value, so that a plan can hold it."""

    @property
    def raw_length(self) -> int:
        """How many tokens of the corpus one example uses up."""
        ...

    @property
    def lookahead(self) -> int:
        """How many tokens after those it also reads: 1 if the last one has a target, else 0."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the special tokens that it uses."""
        ...

    @property
    def sentinels(self) -> int:
        """The most sentinels that an example uses."""
        ...

    def __call__(self, window: Window, vocabulary: Vocabulary, rng: np.random.Generator) -> Example:
        """The example made from a window of `raw_length + lookahead` tokens."""
        ...


def batch_shapes(objective: Objective, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a batch, from which a step can be compiled before any data is read.

    **Example**

        batch_shapes(Causal(128), 16)["tokens"].shape     # (16, 128)
    """
    # The shapes depend on the objective alone, so an example of any tokens has them
    vocabulary = ByteTokenizer(sentinels=objective.sentinels).vocabulary
    blank = np.zeros(objective.raw_length + objective.lookahead, np.int32)
    example = objective(Window(blank, blank), vocabulary, np.random.default_rng(0))
    return {k: jax.ShapeDtypeStruct((rows, *v.shape), v.dtype) for k, v in example.items()}


@register
@dataclasses.dataclass(frozen=True)
class Causal:
    """Predict every token from those before it.

    Gives `tokens`, `targets` and `weights`, and with `"segments"` also `segments` and `positions`, each
    `[length]`. Windows overlap by one token, so that every token of a block is a target once.

    **Arguments**

    - `length`: tokens per example.
    - `packing`: `"segments"` numbers the documents of a window from 0, restarts positions at each, and
      gives weight 0 to the first token of a document; `"concat"` treats the window as one document.

    **Example**

        Causal(1024, packing="concat")
    """

    length: Length
    packing: Literal["segments", "concat"] = "segments"
    lookahead = 1
    sentinels = 0
    needs = ()

    def __post_init__(self):
        check(self, DataError)

    @property
    def raw_length(self) -> int:
        return self.length

    def __call__(self, window: Window, vocabulary: Vocabulary, rng: np.random.Generator) -> Example:
        del vocabulary, rng
        tokens, documents = window
        if self.packing == "concat":
            # Without segments attention needs the causal mask alone
            weights = np.ones(self.length, np.float32)
            return {"tokens": tokens[:-1], "targets": tokens[1:], "weights": weights}
        segments = documents[:-1]
        index = np.arange(self.length, dtype=np.int32)
        firsts = np.concatenate([[True], segments[1:] != segments[:-1]])
        # For each token, the index of the first token of its document
        begins = np.maximum.accumulate(np.where(firsts, index, 0))
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "weights": (documents[1:] == segments).astype(np.float32),
            "segments": segments,
            "positions": index - begins,
        }


@register
@dataclasses.dataclass(frozen=True)
class PrefixLM:
    """Predict the rest of a window from a prefix of random length, uniform in [1, length - 1].

    For a decoder it gives the keys of `Causal`, and `prefix`, True where attention may be bidirectional.
    For an encoder-decoder it gives `encoder_tokens`, `encoder_mask`, `decoder_tokens`, `decoder_mask`,
    `targets` and `weights`, each `[length]`. A window is treated as one document.

    **Arguments**

    - `length`: tokens per example.
    - `form`: `"decoder"` or `"seq2seq"`.

    **Example**

        PrefixLM(512, form="seq2seq")
    """

    length: Annotated[Length, at_least(2, "tokens")]
    form: Literal["decoder", "seq2seq"] = "decoder"
    sentinels = 0

    def __post_init__(self):
        check(self, DataError)

    @property
    def raw_length(self) -> int:
        return self.length

    @property
    def lookahead(self) -> int:
        return int(self.form == "decoder")

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.form == "decoder" else ("pad", "eos")

    def __call__(self, window: Window, vocabulary: Vocabulary, rng: np.random.Generator) -> Example:
        prefix, tokens = int(rng.integers(1, self.length)), window.tokens
        if self.form == "seq2seq":
            eos = [vocabulary.specials["eos"]]
            inputs, targets = (np.append(t, eos) for t in (tokens[:prefix], tokens[prefix:]))
            return pair(inputs, targets, self.length, self.length, vocabulary)
        return prefixed(tokens, prefix, self.length)


@register
@dataclasses.dataclass(frozen=True)
class MLM:
    """Masked language modelling (Devlin et al., "BERT", 2019): predict some tokens from all others.

    Gives `tokens`, `targets`, `weights` and `mask` (False at padding), each `[length]`. Targets are 0
    where nothing is predicted. Special tokens are never predicted, and never replace others.

    **Arguments**

    - `length`: tokens per example, including `cls` and `sep`.
    - `rate`: the share of the tokens to predict.
    - `mode`: `"exact"` chooses `max(1, round(rate * length))` tokens of every row, as BERT did;
      `"bernoulli"` chooses each with probability `rate`, as RoBERTa's usual code does.
    - `whole_word`: whether all pieces of a word are chosen together. With `"exact"`, a word that would
      exceed the number is skipped; where every word of a row would, tokens are chosen one by one.
    - `replace`: the probabilities that a chosen token becomes `mask`, becomes a random text token, and
      stays; drawn for each token.
    - `max_predictions`: the most tokens chosen in a row, with `"exact"`.
    - `frame`: whether an example begins with `cls` and ends with `sep`.

    **Example**

        MLM(128, whole_word=True, max_predictions=20)
    """

    length: Length
    rate: Annotated[float, ranged(0, 1, "a share", above=True)] = 0.15
    mode: Literal["exact", "bernoulli"] = "exact"
    whole_word: bool = False
    replace: Annotated[tuple[float, float, float], _THREE] = (0.8, 0.1, 0.1)
    max_predictions: Size | None = None
    frame: bool = True
    lookahead = 0
    sentinels = 0

    def __post_init__(self):
        check(self, DataError, also=self._faults)

    def _faults(self) -> Iterator[str]:
        if self.frame and self.length < 3:
            yield f"length: expected 3 or more tokens, two of them cls and sep, got {self.length}"
        if self.max_predictions is not None and self.mode != "exact":
            yield f"max_predictions: is for mode='exact', got {self.max_predictions!r}"

    @property
    def raw_length(self) -> int:
        return self.length - 2 * self.frame

    @property
    def needs(self) -> tuple[str, ...]:
        return ("mask", "cls", "sep") if self.frame else ("mask",)

    @property
    def predictions(self) -> int:
        """The most tokens that `mode="exact"` chooses in a row; a row of few text tokens has fewer."""
        number = max(1, round(self.rate * self.length))
        return number if self.max_predictions is None else min(number, self.max_predictions)

    def __call__(self, window: Window, vocabulary: Vocabulary, rng: np.random.Generator) -> Example:
        v, tokens = vocabulary, window.tokens
        if self.frame:
            tokens = np.concatenate([[v.specials["cls"]], tokens, [v.specials["sep"]]])
        tokens = tokens.astype(np.int32)
        chosen = self._choose(tokens, v, rng)
        # One uniform draw for each token: below the first threshold it becomes `mask`, below the second
        # another token, and above it stays
        draw = rng.random(len(tokens))
        to_mask, to_other = np.cumsum(self.replace)[:2]
        masked = np.where(chosen & (draw < to_mask), np.int32(v.specials["mask"]), tokens)
        replaced = chosen & (draw >= to_mask) & (draw < to_other)
        masked[replaced] = rng.choice(v.text_ids, replaced.sum())
        pad = v.specials.get("pad", -1)
        return {
            "tokens": masked,
            "targets": np.where(chosen, tokens, 0),
            "weights": chosen.astype(np.float32),
            "mask": tokens != pad,
        }

    def _choose(
        self, tokens: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Bool[np.ndarray, " length"]:
        """True at the tokens to predict."""
        text = vocabulary.is_text[tokens]
        # A unit, which is chosen as a whole, is a word or a token; for each token the number of its unit
        units = vocabulary.words(tokens) if self.whole_word else np.arange(len(tokens))
        candidates, sizes = np.unique(units[text], return_counts=True)
        if self.mode == "bernoulli":
            chosen = candidates[rng.random(len(candidates)) < self.rate]
        else:
            if len(sizes) and sizes.min() > self.predictions:
                # No whole word fits, and a row without predictions would teach nothing
                units = np.arange(len(tokens))
                candidates = units[text]
                sizes = np.ones(len(candidates), int)
            order = rng.permutation(len(candidates))
            chosen = candidates[order[_greedy(sizes[order], self.predictions)]]
        return np.isin(units, chosen)


def _greedy(sizes: np.ndarray, budget: int) -> list[int]:
    """The indices of units, taken in order, skipping those that would exceed the budget of tokens."""
    taken: list[int] = []
    for i, size in enumerate(sizes.tolist()):
        if size <= budget:
            taken.append(i)
            budget -= size
        if not budget:
            break
    return taken


# Shared by objectives ------------------------------------------------------------------------------


def padded(tokens: np.ndarray, length: int, pad: int) -> Int[np.ndarray, " length"]:
    """The tokens, padded with `pad` to a length."""
    out = np.full(length, pad, np.int32)
    out[: len(tokens)] = tokens
    return out


def pair(
    inputs: np.ndarray,
    targets: np.ndarray,
    inputs_length: int,
    targets_length: int,
    vocabulary: Vocabulary,
) -> Example:
    """An example for an encoder that reads `inputs` and a decoder that predicts `targets`.

    The two are padded to `inputs_length` and `targets_length`. The decoder's input is `pad`, as in T5,
    and then the targets one position later.
    """
    pad = vocabulary.specials["pad"]
    mask = np.arange(targets_length) < len(targets)
    targets = padded(targets, targets_length, pad)
    return {
        "encoder_tokens": padded(inputs, inputs_length, pad),
        "encoder_mask": np.arange(inputs_length) < len(inputs),
        "decoder_tokens": np.concatenate([[pad], targets[:-1]], dtype=np.int32),
        "decoder_mask": mask,
        "targets": targets,
        "weights": mask.astype(np.float32),
    }


def prefixed(tokens: np.ndarray, prefix: int, length: int, pad: int = 0) -> Example:
    """An example for a decoder that reads a prefix of so many tokens and predicts the rest of a row."""
    row = padded(tokens, length + 1, pad)
    index = np.arange(length, dtype=np.int32)
    # The prediction at index i is of token i + 1: so the first that counts is made by the prefix's last
    weighted = (index >= prefix - 1) & (index < len(tokens) - 1)
    return {
        "tokens": row[:-1],
        "targets": row[1:],
        "weights": weighted.astype(np.float32),
        "segments": np.zeros(length, np.int32),
        "positions": index,
        "prefix": index < prefix,
    }
