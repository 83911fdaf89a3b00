"""Span corruption and UL2: the input is a window with spans cut out, the target those spans.

The method is that of T5 (Raffel et al., 2020): the numbers of tokens and spans to cut out depend on the
window's length alone, and their places are uniform over all arrangements. So the lengths of inputs and
targets do not depend on the text, and every example has the same shapes.
"""

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Int

from growjax.data.objectives import LONGEST, Example, Length, Window, pair, prefixed
from growjax.data.vocabulary import Vocabulary
from growjax.errors import DataError
from growjax.values import Range, at_least, check, register


Rate = Annotated[float, Range("a share between 0 and 1", lambda x: 0 < x < 1)]
Span = Annotated[float, Range("a mean length of 1 or more", lambda x: x >= 1)]


# Spans -------------------------------------------------------------------------------------------


def span_counts(length: int, rate: float, span: float) -> tuple[int, int]:
    """How many tokens of a window are cut out, and in how many spans of `span` tokens on average.

    These are T5's numbers, with no more spans than tokens cut out, or tokens left to separate them.

    **Example**

        span_counts(568, 0.15, 3.0)     # (85, 28)
    """
    length = max(length, 2)
    noise = min(max(round(length * rate), 1), length - 1)
    return noise, min(max(round(noise / span), 1), noise, length - noise)


def span_lengths(length: int, rate: float, span: float) -> tuple[int, int]:
    """The lengths of inputs and targets in tokens, with their sentinels and one `eos` each.

    **Example**

        span_lengths(568, 0.15, 3.0)     # (512, 114)
    """
    noise, spans = span_counts(length, rate, span)
    return length - noise + spans + 1, noise + spans + 1


def partition(n: int, parts: int, rng: np.random.Generator) -> Int[np.ndarray, " parts"]:
    """Positive integers that sum to `n`, drawn uniformly from all such sequences of `parts`."""
    # Stars and bars: distinct cuts between n items in a row
    cuts = np.sort(rng.choice(n - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [n]]))


def span_mask(
    length: int, noise: int, spans: int, rng: np.random.Generator
) -> Bool[np.ndarray, " length"]:
    """True at the tokens to cut out, as T5 draws them: the first is always False, the last True."""
    # Runs of tokens left in and cut out, alternating: [spans, 2]
    runs = np.stack([partition(length - noise, spans, rng), partition(noise, spans, rng)], 1)
    return np.repeat(np.tile([False, True], spans), runs.ravel())


def corrupt(
    tokens: Int[np.ndarray, " n"], mask: Bool[np.ndarray, " n"], vocabulary: Vocabulary
) -> tuple[Int[np.ndarray, " i"], Int[np.ndarray, " t"]]:
    """Inputs and targets of a window.

    The inputs have a sentinel in place of each span, the targets each span behind its sentinel; `eos`
    ends both. Raises `DataError` for more spans than sentinels, and for text that contains sentinels.
    """
    if vocabulary.is_sentinel[tokens].any():
        raise DataError(
            "the text holds sentinels, which stand for spans that are cut out; another tokenizer made it"
        )
    # True at the first token of each span
    firsts = mask & ~np.concatenate([[False], mask[:-1]])
    spans = int(firsts.sum())
    vocabulary.require("span corruption", ("eos",), spans)
    sentinels, eos = vocabulary.sentinel_ids[:spans], vocabulary.specials["eos"]
    inputs = tokens.copy()
    inputs[firsts] = sentinels
    # A sentinel goes before the first token of each span among the tokens cut out
    targets = np.insert(tokens[mask], np.flatnonzero(firsts[mask]), sentinels)
    return np.append(inputs[~mask | firsts], eos), np.append(targets, eos)


def restore(
    inputs: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray, vocabulary: Vocabulary
) -> list[int]:
    """The tokens of the window that an example was made from: spans of the target put back in the input.

    Padding, the final `eos` and a mode token are dropped; without sentinels the target follows the
    input. Raises `DataError` unless both have the same sentinels in the same order.

    **Example**

        restore(example["encoder_tokens"], example["targets"], vocabulary)
    """
    source, target = (_without_end(tokens, vocabulary) for tokens in (inputs, targets))
    if source and source[0] in [vocabulary.specials.get(mode) for mode in MODES]:
        source = source[1:]
    sentinels = set(vocabulary.sentinels)
    order = [token for token in target if token in sentinels]
    if order != [token for token in source if token in sentinels] or len(set(order)) < len(order):
        raise DataError("restore: expected the same sentinels, once each, in inputs and targets")
    if not order:
        return source + target
    if target[0] not in sentinels:
        raise DataError("restore: expected targets that begin with a sentinel")
    spans: dict[int, list[int]] = {}
    current = target[0]
    for token in target:
        if token in sentinels:
            current = token
            spans[current] = []
        else:
            spans[current].append(token)
    restored: list[int] = []
    for token in source:
        restored += spans.get(token, [token])
    return restored


def _without_end(tokens: Sequence[int] | np.ndarray, vocabulary: Vocabulary) -> list[int]:
    """The tokens before the last `eos`, without it and the padding after it."""
    ids = [int(token) for token in tokens]
    eos = vocabulary.specials["eos"]
    if eos not in ids:
        raise DataError("restore: expected inputs and targets that each end with eos")
    last = len(ids) - 1 - ids[::-1].index(eos)
    return ids[:last]


@functools.lru_cache(maxsize=256)
def _longest(inputs: int, targets: int | None, rate: float, span: float | None, extra: int) -> int:
    """The longest window whose inputs and targets fit into these lengths; 1 if no window does.

    `extra` more tokens are reserved in each. `targets` None is no limit; `span` None is one span.
    """

    def too_long(length: int) -> bool:
        mean = span if span is not None else float(length)
        inputs_needed, targets_needed = span_lengths(length, rate, mean)
        if inputs_needed + extra > inputs:
            return True
        return targets is not None and targets_needed + extra > targets

    # Both lengths never fall as the window grows: so double until it is too long, then bisect
    high = 2
    while not too_long(high):
        high *= 2
    return bisect.bisect_left(range(high + 1), True, lo=2, key=too_long) - 1


# Span corruption ---------------------------------------------------------------------------------


@register
@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """Predict spans that were cut out (T5), for an encoder and a decoder.

    Gives `encoder_tokens` and `encoder_mask`, `[inputs_length]`, and `decoder_tokens`, `decoder_mask`,
    `targets` and `weights`, `[targets_length]`. A window has `raw_length` tokens, the most whose inputs
    fit, so hardly any padding is needed.

    **Arguments**

    - `inputs_length`: the length of the encoder's input in tokens.
    - `rate`: the share of the window that is cut out.
    - `span`: the mean length of a span.
    - `roll`: whether to rotate the window's mask by a random distance. Otherwise the first token is never
      cut out and the last one always is. It costs one token, for a span that the rotation cuts in two.

    **Example**

        SpanCorruption(512).raw_length, SpanCorruption(512).targets_length     # (568, 114)
    """

    inputs_length: Length
    rate: Rate = 0.15
    span: Span = 3.0
    roll: bool = False
    lookahead = 0
    needs = ("pad", "eos")

    def __post_init__(self):
        check(self, DataError, also=self._faults)

    def _faults(self) -> Iterator[str]:
        if self.raw_length < 2:
            yield f"inputs_length: {self.inputs_length} is too short for one span"
        if self.raw_length > LONGEST:
            yield f"inputs_length, rate: windows of {self.raw_length} tokens; expected at most 2**24"

    @property
    def raw_length(self) -> int:
        # A span that the rotation cuts in two needs one sentinel more, in inputs and targets
        return _longest(self.inputs_length, None, self.rate, self.span, int(self.roll))

    @property
    def targets_length(self) -> int:
        """The length of the decoder's targets in tokens."""
        return span_lengths(self.raw_length, self.rate, self.span)[1] + self.roll

    @property
    def sentinels(self) -> int:
        return span_counts(self.raw_length, self.rate, self.span)[1] + self.roll

    def __call__(self, window: Window, vocabulary: Vocabulary, rng: np.random.Generator) -> Example:
        length = len(window.tokens)
        mask = span_mask(length, *span_counts(length, self.rate, self.span), rng)
        if self.roll:
            mask = np.roll(mask, rng.integers(length))
        inputs, targets = corrupt(window.tokens, mask, vocabulary)
        return pair(inputs, targets, self.inputs_length, self.targets_length, vocabulary)


# UL2 ---------------------------------------------------------------------------------------------

MODES = ("R", "S", "X")


@register
@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One part of UL2's mixture: span corruption with its own rate, span length and mode token.

    **Arguments**

    - `mode`: the token that begins its inputs: `"R"` regular, `"S"` sequential, `"X"` extreme.
    - `rate`: the share of the window that is cut out.
    - `span`: the mean length of a span; None for one span, which is then the end of the window.
    """

    mode: Literal["R", "S", "X"]
    rate: Rate
    span: Span | None = None

    def __post_init__(self):
        check(self, DataError)


# UL2's seven, as published
DENOISERS = (
    Denoiser("R", 0.15, 3.0),
    Denoiser("R", 0.15, 8.0),
    Denoiser("S", 0.25),
    Denoiser("X", 0.5, 3.0),
    Denoiser("X", 0.5, 8.0),
    Denoiser("X", 0.15, 64.0),
    Denoiser("X", 0.5, 64.0),
)


@register
@dataclasses.dataclass(frozen=True)
class UL2:
    """A mixture of denoisers, each with a mode token at the start (Tay et al., "UL2", 2023).

    Each example draws its denoiser. All denoisers read windows of one `raw_length`, the longest that fits
    each of them, and are padded. For an encoder-decoder the keys are those of `SpanCorruption`; for a
    decoder `[mode] inputs targets` form one row of `inputs_length + targets_length`, and the keys are
    those of `PrefixLM`.

    **Arguments**

    - `inputs_length`, `targets_length`: the lengths of inputs, with the mode token, and of targets in
      tokens; None is the length that the longest target needs.
    - `denoisers`, `weights`: the denoisers, and their relative frequencies; None is equal frequencies.
    - `split`: for denoisers with one span, `"fixed"` cuts out the last `rate` of the window, `"uniform"`
      an end of any length that fits.
    - `form`: `"seq2seq"` or `"decoder"`.

    **Example**

        UL2(512, 512, split="uniform")
    """

    inputs_length: Length
    targets_length: Length | None = None
    denoisers: tuple[Denoiser, ...] = DENOISERS
    weights: tuple[Annotated[float, at_least(0)], ...] | None = None
    split: Literal["fixed", "uniform"] = "fixed"
    form: Literal["seq2seq", "decoder"] = "seq2seq"
    lookahead = 0

    def __post_init__(self):
        check(self, DataError, also=self._faults)

    def _faults(self) -> Iterator[str]:
        if not self.denoisers:
            yield "denoisers: expected at least one"
            return
        lengths = f"inputs_length {self.inputs_length}, targets_length {self.targets_length}"
        if self.raw_length < 2:
            yield f"{lengths}: too short for a mode token and one span"
        if self.raw_length > LONGEST:
            yield f"{lengths}: windows of {self.raw_length} tokens; expected at most 2**24"
        yield from weight_faults(self.weights, len(self.denoisers))

    @property
    def raw_length(self) -> int:
        # One extra token is the mode token of the inputs. `_longest` reserves it in the targets too,
        # which have none: so their limit is one more
        targets = None if self.targets_length is None else self.targets_length + 1
        return min(_longest(self.inputs_length, targets, d.rate, d.span, 1) for d in self.denoisers)

    @property
    def written(self) -> int:
        """The length of the targets in tokens: `targets_length`, or that of the longest target."""
        if self.targets_length is not None:
            return self.targets_length
        raw = self.raw_length
        return max(span_lengths(raw, d.rate, d.span or raw)[1] for d in self.denoisers)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("pad", "eos", *sorted({d.mode for d in self.denoisers}))

    @property
    def sentinels(self) -> int:
        raw = self.raw_length
        return max(span_counts(raw, d.rate, d.span or raw)[1] for d in self.denoisers)

    def __call__(self, window: Window, vocabulary: Vocabulary, rng: np.random.Generator) -> Example:
        denoiser = self.denoisers[drawn_part(self.weights, len(self.denoisers), rng)]
        mask = self._mask(denoiser, len(window.tokens), rng)
        inputs, targets = corrupt(window.tokens, mask, vocabulary)
        inputs = np.concatenate([[vocabulary.specials[denoiser.mode]], inputs])
        if self.form == "seq2seq":
            return pair(inputs, targets, self.inputs_length, self.written, vocabulary)
        # A decoder reads inputs and targets as one row, and predicts what follows the inputs
        row, length = np.concatenate([inputs, targets]), self.inputs_length + self.written
        return prefixed(row, len(inputs), length, vocabulary.specials["pad"])

    def _mask(
        self, denoiser: Denoiser, length: int, rng: np.random.Generator
    ) -> Bool[np.ndarray, " length"]:
        if denoiser.span is None and self.split == "uniform":
            # Cut out an end of the window: the inputs hold the rest with mode, sentinel and eos, the
            # targets the end with sentinel and eos
            least, most = max(1, length + 3 - self.inputs_length), min(length - 1, self.written - 2)
            return np.arange(length) >= length - rng.integers(least, most + 1)
        counts = span_counts(length, denoiser.rate, denoiser.span or length)
        return span_mask(length, *counts, rng)


def drawn_part(weights: Sequence[float] | None, parts: int, rng: np.random.Generator) -> int:
    """The index of one of so many parts, drawn by their weights; None is equal ones."""
    shares = np.array(weights or [1.0] * parts)
    return int(rng.choice(parts, p=shares / shares.sum()))


def weight_faults(weights: Sequence[float] | None, parts: int) -> Iterator[str]:
    """The fault of weights that are not one for each of `parts`, or sum to 0."""
    if weights is not None and (len(weights) != parts or not sum(weights) > 0):
        yield f"weights: expected one of 0 or more for each of {parts} parts, got {weights!r}"
