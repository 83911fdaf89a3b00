"""Log-likelihoods of tokens, for decoders, encoder-decoders and encoders.

A program is compiled for one shape, and requests have many lengths. So requests are sorted, padded to
one of a few lengths, and run in batches of about the same number of tokens: a model compiles a handful
of programs for any number of requests, and only sums leave the device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from growjax.axes import sizes
from growjax.data import MLM, Tokenizer, Window
from growjax.errors import EvalError
from growjax.evals.metrics import Scores
from growjax.models import BERT
from growjax.models.protocol import Kind, kind_of, predictions, read_tokens, reads_beyond, unwrapped


Tokens = Sequence[int]
Row = dict[str, np.ndarray]


class Scored(NamedTuple):
    """The log-probability of some tokens, in nats, and whether each was the likeliest at its position."""

    logprob: float
    greedy: bool


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model with the tokenizer it was trained with: text in, likelihoods out.

    **Arguments**

    - `model`: a `GPT`, `Llama`, `T5` or `BERT`, or a decoder of your own, `model(tokens) -> logits`.
    - `tokenizer`: the one that the model was trained with.
    - `longest`: how many tokens it reads at once; None is as many as it has positions, or 1,024.
    - `framed`: whether a text begins as the files of its tokenizer say: with their prefix before every
      context, and with `bos`, if there is one, in place of an empty context. It is so for checkpoints
      from elsewhere. Otherwise nothing precedes a context, and the separator that `growjax.data` puts
      between documents stands for an empty one.
    - `batch_tokens`: how many tokens, padding included, go through the model at once.

    An encoder's likelihood is the pseudo-log-likelihood: the sum over the tokens, each masked while all
    others are seen (Salazar et al., "Masked Language Model Scoring", ACL 2020).

    Raises `EvalError` if the model does not fit the tokenizer or has no head, and `DataError` if the
    tokenizer lacks special tokens that the model needs.

    **Example**

        language = LanguageModel(model, ByteTokenizer())
        language.loglikelihoods([("2 + 2 =", " 4"), ("2 + 2 =", " 5")])
    """

    model: Any
    tokenizer: Tokenizer
    longest: int | None = None
    framed: bool = False
    batch_tokens: int = 8192

    def __post_init__(self):
        # An embedding may have more rows than the vocabulary has tokens, but not fewer
        vocabulary, rows = self.tokenizer.vocabulary, sizes(self.model).get("vocab")
        if rows is not None and vocabulary.size > rows:
            raise EvalError(
                f"tokenizer: its largest token is {vocabulary.size - 1}, and the embedding of the model "
                f"has {rows} rows; expected the tokenizer that the model was trained with"
            )
        if self.kind == "causal" and not getattr(unwrapped(self.model), "lm", True):
            raise EvalError(
                "model: a decoder scores tokens with its head of words, and this one has none; expected "
                'one with head="words"'
            )
        if self.kind == "causal" and callable(unwrapped(self.model)):
            last, first = ({"tokens": np.array([n], np.int32)} for n in (vocabulary.size - 1, 0))
            for read in reads_beyond(predictions, self.model, last, first):
                raise EvalError(
                    f"tokenizer: its largest token reads row {read.index} of an array of {read.size}; "
                    "expected the tokenizer that the model was trained with"
                )
        needs = {"causal": (), "seq2seq": ("pad", "eos"), "encoder": ("mask", "cls", "sep")}
        vocabulary.require(f"a {self.kind} model", needs[self.kind])
        if self.kind == "encoder" and getattr(self.model, "mlm", predictions) is None:
            raise EvalError(
                "model: an encoder scores tokens with its mlm_head; expected one with mlm_head=True"
            )

    @functools.cached_property
    def kind(self) -> Kind:
        """`"causal"` for a decoder, `"seq2seq"` for an encoder-decoder, or `"encoder"`."""
        return kind_of(self.model)

    @functools.cached_property
    def window(self) -> int:
        """How many tokens the model reads at once: its positions, or `longest` if that is less."""
        positions = usable_positions(self.model) or self.longest or 1024
        return min(positions, self.longest or positions)

    @property
    def _room(self) -> int:
        """How many tokens of a text fit the window, which for an encoder holds `cls` and `sep` too."""
        return self.window - 2 if self.kind == "encoder" else self.window

    @property
    def first(self) -> int:
        """The token in place of an empty context."""
        vocabulary = self.tokenizer.vocabulary
        if self.framed and "bos" in vocabulary.specials:
            return vocabulary.specials["bos"]
        return vocabulary.separator

    def encode(self, text: str) -> list[int]:
        """The tokens of a document, without special tokens."""
        return self.tokenizer.encode(text).tolist()

    def encode_prompt(self, text: str, *, framed: bool | None = None) -> list[int]:
        """The tokens of a prompt, in which spellings of special tokens are those tokens.

        A decoder's prompt that is `framed` (None: as the field says) begins with the tokenizer's prefix,
        unless it is spelled out already. Encoders and encoder-decoders have frames of their own.
        """
        tokens = self.tokenizer.encode_prompt(text).tolist()
        framed = self.framed if framed is None else framed
        if not framed or self.kind != "causal" or tokens[:1] == [self.first]:
            return tokens
        return [*self.tokenizer.prefix, *tokens]

    def loglikelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """How likely each continuation is after its context, which may be empty.

        Spaces at the end of a context are moved to the continuation, since tokenizers join them to the
        next word. A context that does not fit the window loses its beginning. Raises `EvalError` if a
        continuation does not fit.
        """
        return self.loglikelihoods_of_tokens([self.encode_pair(*pair) for pair in pairs])

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of a context and of its continuation, which are encoded as one text.

        Encoding the continuation by itself could give other tokens than in its place. The whole text is
        cut where the tokens of the context end. An encoder-decoder reads the two apart.
        """
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        if self.kind == "seq2seq":
            return self.encode_prompt(context), self.encode_prompt(continuation)
        if not context:
            return [], self.encode_prompt(continuation, framed=False)
        head, whole = self.encode_prompt(context), self.encode_prompt(context + continuation)
        return head, whole[len(head) :]

    def loglikelihoods_of_tokens(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Scored]:
        """As `loglikelihoods`, of pairs of token lists."""
        room = self._room
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > room:
            raise EvalError(
                f"continuation: one has {longest} tokens, and the model scores at most {room} in a "
                f"window of {self.window}; score it as a document, with `rolling`"
            )
        if self.kind == "encoder":
            return self._pseudo(pairs)
        to_row = self._pair if self.kind == "seq2seq" else self._causal
        rows = [to_row([*context], [*continuation]) for context, continuation in pairs]
        score = functools.partial(_score, self.model)
        totals = in_batches(score, rows, self.batch_tokens, self.window)
        scored = []
        for row, (logprob, likeliest) in zip(rows, totals, strict=True):
            scored.append(Scored(float(logprob), bool(likeliest == row["weights"].sum())))
        return scored

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of each whole text, in nats; every token is predicted once.

        A longer text than the window is read in windows, each beginning where the one before it ends. The
        context of a decoder's last window reaches back so that the window is full.
        """
        return self.rolling_of_tokens([self.encode(text) for text in texts])

    def rolling_of_tokens(self, texts: Sequence[Tokens]) -> list[float]:
        """As `rolling`, of token lists."""
        pairs, owner = [], []
        for i, text in enumerate(texts):
            for context, part in self._windows([*text]):
                pairs.append((context, part))
                owner.append(i)
        totals = [0.0] * len(texts)
        for i, scored in zip(owner, self.loglikelihoods_of_tokens(pairs), strict=True):
            totals[i] += scored.logprob
        return totals

    def _windows(self, tokens: list[int]) -> Iterable[tuple[list[int], list[int]]]:
        """`(context, part)` for each window of a text: every token is in one part."""
        if self.kind == "causal":
            shifted = [self.first, *tokens]  # shifted[i] is the token before tokens[i]
            for i in range(0, len(tokens), self.window):
                end = min(i + self.window, len(tokens))
                yield shifted[max(0, end - self.window) : i + 1], tokens[i:end]
        else:
            for i in range(0, len(tokens), self._room):
                yield [], tokens[i : i + self._room]

    def _causal(self, context: list[int], continuation: list[int]) -> Row:
        """A decoder's inputs, targets one token later, and weights: 1 on the continuation."""
        # Of n + 1 tokens the model reads the first n and predicts the last n
        whole = [*(context or [self.first]), *continuation][-(self.window + 1) :]
        weights = np.zeros(len(whole) - 1, bool)
        weights[len(weights) - len(continuation) :] = True
        return {"tokens": _ints(whole[:-1]), "targets": _ints(whole[1:]), "weights": weights}

    def _pair(self, context: list[int], continuation: list[int]) -> Row:
        """An encoder-decoder's inputs: it reads the context with `eos`, and `pad` starts the decoder."""
        special = self.tokenizer.vocabulary.specials
        inputs = [*context[-(self.window - 1) :], special["eos"]]
        shifted = [special["pad"], *continuation[:-1]][: len(continuation)]
        return {
            "encoder_tokens": _ints(inputs),
            "encoder_mask": np.ones(len(inputs), bool),
            "decoder_tokens": _ints(shifted),
            "targets": _ints(continuation),
            "weights": np.ones(len(continuation), bool),
        }

    def _pseudo(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Scored]:
        """Pseudo-log-likelihoods: one row for each token of a continuation, with that token masked."""
        special, rows, owner = self.tokenizer.vocabulary.specials, [], []
        for i, (context, continuation) in enumerate(pairs):
            text = [*context, *continuation][-self._room :]
            framed = _ints([special["cls"], *text, special["sep"]])
            # Index 0 is `cls`, so the text stands at 1 to len(text), its continuation at the end
            for place in range(max(1, len(text) - len(continuation) + 1), len(text) + 1):
                tokens = framed.copy()
                tokens[place] = special["mask"]
                rows.append(
                    {
                        "tokens": tokens,
                        "mask": np.ones(len(tokens), bool),
                        "place": np.int32(place),
                        "target": framed[place],
                    }
                )
                owner.append(i)
        totals, greedy = [0.0] * len(pairs), [True] * len(pairs)
        score = functools.partial(_score_masked, self.model)
        scored = in_batches(score, rows, self.batch_tokens, self.window)
        for i, (logprob, likeliest) in zip(owner, scored, strict=True):
            totals[i] += float(logprob)
            greedy[i] &= bool(likeliest)
        return list(map(Scored, totals, greedy))


def bits_per_byte(language: LanguageModel, texts: Sequence[str]) -> Scores:
    """The negative log-likelihood of texts, in bits per byte of their UTF-8, and the perplexity.

    `{"bits_per_byte", "perplexity" (per token), "tokens", "bytes"}`; each text is a document of its own.
    Bits per byte compare models with different tokenizers; perplexities do not. For an encoder see
    `masked_bits`. Raises `EvalError` for an encoder, and without any text.
    """
    if language.kind == "encoder":
        raise EvalError("bits per byte: expected a decoder; an encoder has masked_bits")
    total = -sum(language.rolling(texts))
    tokens = sum(len(language.encode(text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    if not tokens:
        raise EvalError("bits per byte: expected some text, got none")
    return {
        "bits_per_byte": total / size / math.log(2),
        "perplexity": math.exp(min(total / tokens, 700)),  # exp(710) overflows float64
        "tokens": float(tokens),
        "bytes": float(size),
    }


def masked_bits(
    language: LanguageModel, texts: Sequence[str], *, rate: float = 0.15, seed: int = 0
) -> Scores:
    """An encoder's negative log-likelihood of masked tokens, in bits per token, and its accuracy on them.

    A share `rate` of the tokens of every window is masked, the same ones for every model with this
    tokenizer and `seed`. `{"masked_bits", "accuracy", "tokens"}`. Raises `EvalError` for a decoder, and
    without any text.
    """
    if language.kind != "encoder":
        raise EvalError("masked bits: expected an encoder; a decoder has bits_per_byte")
    rows, vocabulary = [], language.tokenizer.vocabulary
    for i, text in enumerate(texts):
        tokens, size = _ints(language.encode(text)), language.window - 2
        for j in range(0, len(tokens), size):
            part = tokens[j : j + size]
            rng = np.random.default_rng([seed, i, j])
            # Every chosen token becomes `mask`; training also leaves some, or draws another token
            objective = MLM(len(part) + 2, rate=rate, replace=(1.0, 0.0, 0.0))
            rows.append(objective(Window(part, np.zeros_like(part)), vocabulary, rng))
    score = functools.partial(_score, language.model)
    scored = in_batches(score, rows, language.batch_tokens, language.window)
    count = sum(int(row["weights"].sum()) for row in rows)
    if not count:
        raise EvalError("masked bits: expected some text, got none")
    return {
        "masked_bits": -sum(float(logprob) for logprob, _ in scored) / count / math.log(2),
        "accuracy": sum(float(likeliest) for _, likeliest in scored) / count,
        "tokens": float(count),
    }


# Batches -----------------------------------------------------------------------------------------


def usable_positions(model: Any) -> int | None:
    """The most tokens that a model has positions for; None if it has no table of them."""
    rows, padding = sizes(model).get("positions"), getattr(model, "padding", None)
    # RoBERTa's tokens are counted from the row after that of padding
    return rows if rows is None or padding is None else rows - padding - 1


def bucket(length: int, most: int | None = None) -> int:
    """The size that a length is padded to: 16, 24, 32, 48, 64, 96, 128 and so on, and `most` at most."""
    power = max(16, 1 << max(length - 1, 0).bit_length())  # the next power of two
    three_quarters = power * 3 // 4
    size = three_quarters if 16 < length <= three_quarters else power
    return size if most is None else min(size, most)


def batch_rows(members: int, most: int) -> int:
    """The number of rows, at most `most`, for equal batches that hold `members` with little padding.

    It is a power of two or a quarter, a half or three quarters more, so that there are few sizes. With
    many members it is `most`, whatever their number.
    """
    most = max(1, most)
    batches = -(-members // most)
    least = -(-members // batches)
    # An eighth of the next power of two is a quarter of the one below
    step = max(1, (1 << max(least - 1, 0).bit_length()) // 8)
    return min(most, -(-least // step) * step)


def in_batches(
    program: Callable[[dict[str, np.ndarray]], Any],
    rows: Sequence[Row],
    batch_tokens: int,
    window: int,
) -> list[tuple]:
    """Run a program over rows of any length, padded to a few shapes; its results in the rows' order.

    Rows of one bucket form batches of one size, longest buckets first; copies of its first row fill the
    last batch. All arrays of a row are padded to the same length, but those named `encoder_...` to one
    of their own, and arrays without a dimension not at all. No row is longer than the `window` of the
    model, and none is padded beyond it.
    """
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, row in enumerate(rows):
        encoder = bucket(len(row["encoder_tokens"]), window) if "encoder_tokens" in row else 0
        lengths = [len(x) for name, x in row.items() if x.ndim and "encoder" not in name]
        shapes.setdefault((encoder, bucket(max(lengths), window)), []).append(i)
    results: list[Any] = [None] * len(rows)
    for (encoder, length), members in sorted(shapes.items(), reverse=True):
        count = batch_rows(len(members), batch_tokens // (encoder + length))
        for i in range(0, len(members), count):
            chosen = members[i : i + count]
            filled = chosen + chosen[:1] * (count - len(chosen))
            batch = {}
            for name in rows[chosen[0]]:
                size = encoder if "encoder" in name else length
                batch[name] = np.stack([_padded(rows[r][name], size) for r in filled])
            outputs = jax.device_get(program(batch))
            for place, r in enumerate(chosen):
                results[r] = tuple(x[place] for x in outputs)
    return results


def _padded(x: np.ndarray, length: int) -> np.ndarray:
    return np.pad(x, (0, length - len(x))) if x.ndim else x


def _ints(tokens: Iterable[int]) -> np.ndarray:
    return np.array([*tokens], np.int32)


@eqx.filter_jit
def _score(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """The log-likelihood of each row's targets, and how many of them are the likeliest token."""

    def score(example):
        logprobs, likeliest = read_tokens(_logprobs, model, example, example["targets"])
        weighted = example["weights"] > 0
        # `where` and not a product: a logprob of -inf under weight 0 would give NaN
        return jnp.sum(jnp.where(weighted, logprobs, 0)), jnp.sum(likeliest & weighted)

    return jax.vmap(score)(batch)


@eqx.filter_jit
def _score_masked(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """The log-probability of each row's masked token, and whether it is the likeliest."""

    def score(example):
        if isinstance(model, BERT):
            # Apply the head at the masked position alone: logits over the whole vocabulary at every
            # position would be the largest array by far
            hidden = model(example["tokens"], mask=example["mask"]).hidden[example["place"]]
            scores = model.mlm(hidden[None], model.embedding)  # type: ignore[misc]
        else:
            scores = predictions(model, example)[example["place"]][None]
        logprobs, likeliest = _logprobs(scores, example["target"][None])
        return logprobs[0], likeliest[0]

    return jax.vmap(score)(batch)


def _logprobs(scores: Any, targets: Any) -> tuple[Any, Any]:
    """The log-probability of each target, and whether it is the likeliest token; in float32 or wider."""
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    logits = jnp.take_along_axis(wide, targets[:, None], axis=-1)[:, 0]
    return logits - jax.nn.logsumexp(wide, axis=-1), wide.argmax(-1) == targets
