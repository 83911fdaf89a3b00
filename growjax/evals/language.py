"""What a model thinks of a text: log-likelihoods of tokens, for decoders, pairs and encoders alike.

Requests have every length there is, and a program is compiled for one. So they are sorted, padded to
the next of a few lengths, and run in batches of the same number of tokens: a model compiles a handful of
programs however many requests it gets, and only sums leave the device.
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
from growjax.models.protocol import Kind, kind_of, predictions


Tokens = Sequence[int]
Row = dict[str, np.ndarray]


class Scored(NamedTuple):
    """The log-probability of some tokens, in nats, and whether each of them was the likeliest."""

    logprob: float
    greedy: bool


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model and the tokenizer it was trained with, as tasks see them: text in, likelihoods out.

    **Arguments**

    - `model`: a `GPT`, `Llama`, `T5` or `BERT`, or a decoder of your own, `model(tokens) -> logits`.
    - `tokenizer`: what it was trained with.
    - `longest`: how many tokens it reads at once; None is as many as it has positions, or 1,024.
    - `start`: the token before a text; None is what `growjax.data` puts between documents.
    - `always`: whether `start` stands before a context as well, as Llama was trained.
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
    start: int | None = None
    always: bool = False
    batch_tokens: int = 8192

    def __post_init__(self):
        vocabulary, rows = self.tokenizer.vocabulary, sizes(self.model).get("vocab")
        if rows is not None and vocabulary.size > rows:
            raise EvalError(
                f"tokenizer: its largest token is {vocabulary.size - 1}, and the embedding of the model "
                f"has {rows} rows; expected the tokenizer it was trained with"
            )
        needs = {"causal": (), "seq2seq": ("pad", "eos"), "encoder": ("mask", "cls", "sep")}
        vocabulary.require(f"a {self.kind} model", needs[self.kind])
        if self.kind == "encoder" and getattr(self.model, "mlm", predictions) is None:
            raise EvalError(
                "model: an encoder says how likely a token is through its mlm_head; it is off"
            )

    @functools.cached_property
    def kind(self) -> Kind:
        """How the model reads: a decoder, an encoder and a decoder, or an encoder."""
        return kind_of(self.model)

    @functools.cached_property
    def window(self) -> int:
        """How many tokens the model reads at once."""
        positions = sizes(self.model).get("positions", self.longest or 1024)
        return min(positions, self.longest or positions)

    @property
    def first(self) -> int:
        """The token before a text."""
        return self.tokenizer.vocabulary.separator if self.start is None else self.start

    def begun(self, context: list[int]) -> list[int]:
        """A context with the token before a text in front of it, if there should be one."""
        needed = not context or (self.always and context[0] != self.first)
        return [self.first, *context] if needed else context

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""
        return self.tokenizer.encode(text).tolist()

    def loglikelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """How likely each continuation is after its context, which may be empty.

        Spaces at the end of a context are moved to the continuation, as tokenizers join them to the next
        word. What does not fit into the window is cut off on the left.
        """
        return self.loglikelihoods_of_tokens([self.encode_pair(*pair) for pair in pairs])

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of a context, and those of the whole text after as many of them."""
        bare = context.rstrip()
        context, continuation = bare, context[len(bare) :] + continuation
        if self.kind == "seq2seq":
            return self.encode(context), self.encode(continuation)
        before, whole = self.encode(context), self.encode(context + continuation)
        return before, whole[len(before) :]

    def loglikelihoods_of_tokens(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Scored]:
        """The same, of tokens."""
        if self.kind == "encoder":
            return self._pseudo(pairs)
        make = self._pair if self.kind == "seq2seq" else self._causal
        rows = [make([*context], [*continuation]) for context, continuation in pairs]
        found = in_batches(functools.partial(_score, self.model), rows, self.batch_tokens)
        counts = [row["weights"].sum() for row in rows]
        return [
            Scored(float(x), bool(right == n)) for (x, right), n in zip(found, counts, strict=True)
        ]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of each whole text, in nats: in windows, each token is predicted once.

        A window begins where the one before it ends, and the last one reaches back to be full.
        """
        pairs, owner = [], []
        for i, text in enumerate(texts):
            for context, part in self._windows(self.encode(text)):
                pairs.append((context, part))
                owner.append(i)
        totals = [0.0] * len(texts)
        for i, scored in zip(owner, self.loglikelihoods_of_tokens(pairs), strict=True):
            totals[i] += scored.logprob
        return totals

    def _windows(self, tokens: list[int]) -> Iterable[tuple[list[int], list[int]]]:
        """Parts of a text, and what is seen before each."""
        if self.kind == "encoder":
            size = self.window - 2
            yield from (([], tokens[i : i + size]) for i in range(0, len(tokens), size))
        elif self.kind == "seq2seq":
            yield from (
                ([], tokens[i : i + self.window]) for i in range(0, len(tokens), self.window)
            )
        else:
            before = [self.first, *tokens]
            for i in range(0, len(tokens), self.window):
                end = min(i + self.window, len(tokens))
                yield before[max(0, end - self.window) : i + 1], tokens[i:end]

    def _causal(self, context: list[int], continuation: list[int]) -> Row:
        whole = [*self.begun(context), *continuation][-(self.window + 1) :]
        weights = np.zeros(len(whole) - 1, bool)
        weights[max(0, len(weights) - len(continuation)) :] = True
        return {"tokens": _ints(whole[:-1]), "targets": _ints(whole[1:]), "weights": weights}

    def _pair(self, context: list[int], continuation: list[int]) -> Row:
        special = self.tokenizer.vocabulary.specials
        inputs = [*context[-(self.window - 1) :], special["eos"]]
        targets = continuation[-self.window :]
        return {
            "encoder_tokens": _ints(inputs),
            "encoder_mask": np.ones(len(inputs), bool),
            "decoder_tokens": _ints([special["pad"], *targets[:-1]][: len(targets)]),
            "targets": _ints(targets),
            "weights": np.ones(len(targets), bool),
        }

    def _pseudo(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Scored]:
        special, rows, owner = self.tokenizer.vocabulary.specials, [], []
        for i, (context, continuation) in enumerate(pairs):
            text = [*context, *continuation][-(self.window - 2) :]
            framed = _ints([special["cls"], *text, special["sep"]])
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
        found = in_batches(functools.partial(_score_masked, self.model), rows, self.batch_tokens)
        for i, (total, best) in zip(owner, found, strict=True):
            totals[i] += float(total)
            greedy[i] &= bool(best)
        return list(map(Scored, totals, greedy))


def bits_per_byte(language: LanguageModel, texts: Sequence[str]) -> Scores:
    """What a text costs: bits per byte of its UTF-8, which no tokenizer can flatter, and perplexity.

    `{"bits_per_byte", "perplexity" (per token), "tokens", "bytes"}`; each text is a document of its own.
    For an encoder see `masked_bits`. Raises `EvalError` for an encoder, and if there is no text.
    """
    if language.kind == "encoder":
        raise EvalError("bits per byte are those of a decoder; an encoder has masked_bits")
    total = -sum(language.rolling(texts))
    tokens = sum(len(language.encode(text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    if not tokens:
        raise EvalError("bits per byte: expected some text, got none")
    return {
        "bits_per_byte": total / size / math.log(2),
        "perplexity": math.exp(min(total / tokens, 700)),
        "tokens": float(tokens),
        "bytes": float(size),
    }


def masked_bits(
    language: LanguageModel, texts: Sequence[str], *, rate: float = 0.15, seed: int = 0
) -> Scores:
    """What masked tokens cost an encoder, in bits per token, and how many of them it gets right.

    A share `rate` of the tokens of every window is masked, the same ones for every model with this
    tokenizer and `seed`. `{"masked_bits", "accuracy", "tokens"}`. Raises `EvalError` for a decoder, and
    if there is no text.
    """
    if language.kind != "encoder":
        raise EvalError("masked bits are those of an encoder; a decoder has bits_per_byte")
    rows, vocabulary = [], language.tokenizer.vocabulary
    for i, text in enumerate(texts):
        tokens, size = _ints(language.encode(text)), language.window - 2
        for j in range(0, len(tokens), size):
            part = tokens[j : j + size]
            rng = np.random.default_rng([seed, i, j])
            objective = MLM(len(part) + 2, rate=rate, replace=(1.0, 0.0, 0.0))
            rows.append(objective(Window(part, np.zeros_like(part)), vocabulary, rng))
    found = list(in_batches(functools.partial(_score, language.model), rows, language.batch_tokens))
    count = sum(int(row["weights"].sum()) for row in rows)
    if not count:
        raise EvalError("masked bits: expected some text, got none")
    return {
        "masked_bits": -sum(float(total) for total, _ in found) / count / math.log(2),
        "accuracy": sum(float(right) for _, right in found) / count,
        "tokens": float(count),
    }


# Batches -----------------------------------------------------------------------------------------


def bucket(length: int) -> int:
    """The shape that a length is padded to: a power of two from 16 on, or one and a half of one."""
    whole = max(16, 1 << max(length - 1, 0).bit_length())
    return whole * 3 // 4 if 16 < length <= whole * 3 // 4 else whole


def batch_rows(members: int, most: int) -> int:
    """How many rows the batches of some members have: alike, and nearly full, if there are few of them.

    A power of two or a quarter, a half or three quarters more, so that sizes stay few. Of many members
    it is `most`, whatever their number.
    """
    most = max(1, most)
    least = -(-members // -(-members // most))
    step = max(1, (1 << max(least - 1, 0).bit_length()) // 8)
    return min(most, -(-least // step) * step)


def in_batches(
    program: Callable[[dict[str, np.ndarray]], Any], rows: Sequence[Row], batch_tokens: int
) -> list[tuple]:
    """Run a program over rows of any length, padded to a few shapes; its results in the rows' order.

    Rows of one bucket go together, longest buckets first, and always the same number of them: the last
    batch is filled up with copies of its first row. Arrays named `encoder_...` have a length of their
    own, arrays without a dimension none.
    """
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, row in enumerate(rows):
        read = bucket(len(row["encoder_tokens"])) if "encoder_tokens" in row else 0
        own = bucket(max(len(x) for name, x in row.items() if x.ndim and "encoder" not in name))
        shapes.setdefault((read, own), []).append(i)
    results: list[Any] = [None] * len(rows)
    for (read, own), members in sorted(shapes.items(), reverse=True):
        count = batch_rows(len(members), batch_tokens // (read + own))
        for i in range(0, len(members), count):
            chosen = members[i : i + count]
            filled = chosen + chosen[:1] * (count - len(chosen))
            batch = {
                name: np.stack(
                    [_padded(rows[r][name], read if "encoder" in name else own) for r in filled]
                )
                for name in rows[chosen[0]]
            }
            found = jax.device_get(program(batch))
            for place, r in enumerate(chosen):
                results[r] = tuple(x[place] for x in found)
    return results


def _padded(x: np.ndarray, length: int) -> np.ndarray:
    return np.pad(x, (0, length - len(x))) if x.ndim else x


def _ints(tokens: Iterable[int]) -> np.ndarray:
    return np.array([*tokens], np.int32)


@eqx.filter_jit
def _score(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """The log-likelihood of each row's targets, and how many of them are the likeliest token."""

    def one(example):
        chosen, best = _chosen(predictions(model, example), example["targets"])
        counts = example["weights"] > 0
        return jnp.sum(jnp.where(counts, chosen, 0)), jnp.sum(best & counts)

    return jax.vmap(one)(batch)


@eqx.filter_jit
def _score_masked(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    def one(example):
        if isinstance(model, BERT):
            # The head reads one place; what the model makes of the others is compiled away
            hidden = model(example["tokens"], mask=example["mask"]).hidden[example["place"]]
            scores = model.mlm(hidden[None], model.embedding)  # type: ignore[misc]
        else:
            scores = predictions(model, example)[example["place"]][None]
        chosen, best = _chosen(scores, example["target"][None])
        return chosen[0], best[0]

    return jax.vmap(one)(batch)


def _chosen(scores: Any, targets: Any) -> tuple[Any, Any]:
    """The log-probability of each target, and whether nothing is likelier."""
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    logits = jnp.take_along_axis(wide, targets[:, None], axis=-1)[:, 0]
    return logits - jax.nn.logsumexp(wide, axis=-1), wide.argmax(-1) == targets
