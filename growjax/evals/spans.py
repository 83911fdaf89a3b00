"""Extractive question answering: an encoder that points at the answer in a text, as on SQuAD.

A text that is too long is read in windows that overlap, each behind the question. In training a window
without the answer points at its first token; that is also how a question without an answer is answered.
Of a token that several windows hold, the one counts in which it has the most context around it (Devlin et
al., "BERT", NAACL 2019).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from growjax.axes import param, sizes
from growjax.data import Tokenizer
from growjax.errors import EvalError, raise_all
from growjax.evals.finetune import FineTuned, Recipe, train_epochs
from growjax.evals.language import bucket
from growjax.evals.metrics import Scores, answers
from growjax.evals.questions import Question
from growjax.models import BERT
from growjax.nn import logits


@dataclasses.dataclass(frozen=True)
class SpanRecipe:
    """How questions are read and answers are found; the defaults are those of BERT on SQuAD.

    **Fields**

    - `training`: of the steps; its `length` is that of a window.
    - `stride`: how many tokens further the next window begins.
    - `query`: how many tokens of a question are read.
    - `candidates`: how many starts and ends of a window are paired.
    - `answer`: how many tokens an answer may have.
    - `threshold`: no answer is given if pointing nowhere scores so much more than the best answer; None
      always gives one (SQuAD 1.1).

    Raises `EvalError` that lists every field out of range.
    """

    training: Recipe = Recipe(rate=3e-5, epochs=2, length=384)
    stride: int = 128
    query: int = 64
    candidates: int = 20
    answer: int = 30
    threshold: float | None = None

    def __post_init__(self):
        room = self.training.length - self.query - 3
        wanted = [
            ("query", f"from 1 to {self.training.length - 4}", 1 <= self.query and room >= 1),
            ("stride", f"from 1 to {room}, what fits into a window", 1 <= self.stride <= room),
            ("candidates", "1 or more", self.candidates >= 1),
            ("answer", "1 or more", self.answer >= 1),
        ]
        faults = [
            f"{n}: expected {what}, got {getattr(self, n)}" for n, what, fine in wanted if not fine
        ]
        raise_all(EvalError, "this recipe cannot be used:", faults)


class Pointer(eqx.Module):
    """An encoder that scores every token as a start and as an end: `[T, 2]`."""

    encoder: BERT
    weight: Float[Array, "embed ends"] = param("embed -> ends")
    bias: Float[Array, " ends"] = param("-> ends")

    def __init__(self, encoder: BERT, *, key: PRNGKeyArray):
        unused = lambda m: (m.pooler, m.mlm, m.nsp, m.nsp_bias)  # noqa: E731
        self.encoder = eqx.tree_at(unused, encoder, (None,) * 4, is_leaf=lambda x: x is None)
        self.weight = 0.02 * jax.random.normal(key, (sizes(encoder)["embed"], 2))
        self.bias = jnp.zeros(2)

    def __call__(self, tokens: Array, types: Array, mask: Array) -> Float[Array, "T 2"]:
        hidden = self.encoder(tokens, token_types=types, mask=mask).hidden
        scores = logits(hidden, self.weight) + self.bias
        # Nobody may point at padding
        return jnp.where(mask[:, None], scores, jnp.finfo(scores.dtype).min / 2)


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a text behind its question.

    `first` is where the text begins among the `tokens`; `places` are the characters of its tokens, and
    `best` says of which of them this window has the most context. `target`: the first and last token of
    the answer, or 0 and 0.
    """

    question: int
    tokens: np.ndarray
    first: int
    places: np.ndarray
    best: np.ndarray
    target: tuple[int, int] = (0, 0)


def windows(
    tokenizer: Tokenizer, question: Question, number: int, recipe: SpanRecipe
) -> list[Window]:
    """The windows of one question, the first of its accepted answers marked in those that hold it."""
    special = tokenizer.vocabulary.specials
    query = tokenizer.encode(question.question)[: recipe.query]
    text, places = tokenizer.encode(question.context), tokenizer.places(question.context)
    room = recipe.training.length - len(query) - 3
    starts = [0]
    while starts[-1] + room < len(text):
        starts.append(starts[-1] + recipe.stride)
    spans = [(s, min(s + room, len(text))) for s in starts]
    # How much context each token has in each window
    tokens = np.arange(len(text))
    around = [
        np.where(
            (tokens >= s) & (tokens < e),
            np.minimum(tokens - s, e - 1 - tokens) + 0.01 * (e - s),
            -1.0,
        )
        for s, e in spans
    ]
    best = np.argmax(around, axis=0)
    answer = _tokens_of(question, places)
    found = []
    for i, (s, e) in enumerate(spans):
        framed = [special["cls"], *query, special["sep"], *text[s:e], special["sep"]]
        first, target = len(query) + 2, (0, 0)
        if answer is not None and s <= answer[0] and answer[1] < e:
            target = (answer[0] - s + first, answer[1] - s + first)
        ids = np.array(framed, np.int32)
        found.append(Window(number, ids, first, places[s:e], best[s:e] == i, target))
    return found


def _tokens_of(question: Question, places: np.ndarray) -> tuple[int, int] | None:
    """The first and the last token of the first accepted answer."""
    if not question.answers:
        return None
    start, end = question.starts[0], question.starts[0] + len(question.answers[0])
    touched = np.flatnonzero((places[:, 0] < end) & (places[:, 1] > start))
    return (int(touched[0]), int(touched[-1])) if len(touched) else None


def answer_of(
    question: Question,
    parts: Sequence[Window],
    scores: Sequence[Float[np.ndarray, "T 2"]],
    recipe: SpanRecipe,
) -> str:
    """The text that all windows together point at; empty if pointing nowhere scores higher."""
    found: tuple[float, int, int] | None = None
    nowhere = min(float(points[0].sum()) for points in scores)
    for window, points in zip(parts, scores, strict=True):
        own = points[window.first : window.first + len(window.places)]
        begins = np.argsort(-own[:, 0], kind="stable")[: recipe.candidates]
        ends = np.argsort(-own[:, 1], kind="stable")[: recipe.candidates]
        for i in begins[window.best[begins]]:
            for j in ends[(ends >= i) & (ends < i + recipe.answer)]:
                total = float(own[i, 0] + own[j, 1])
                if found is None or total > found[0]:
                    found = total, int(window.places[i, 0]), int(window.places[j, 1])
    if found is None or (recipe.threshold is not None and nowhere - found[0] > recipe.threshold):
        return ""
    return question.context[found[1] : found[2]]


def fine_tune_spans(
    model: BERT,
    tokenizer: Tokenizer,
    train: Sequence[Question],
    dev: Sequence[Question],
    *,
    recipe: SpanRecipe | None = None,
    seeds: Sequence[int] = (0,),
    after_epoch: Callable[[int, int, Scores], None] | None = None,
) -> FineTuned:
    """Fine-tune an encoder on questions about texts, and score its answers after every epoch.

    Exact match and F1 as in `growjax.evals.metrics.answers`; the rest is as in `fine_tune`. If there are
    questions without an answer set a `threshold`, such as 0. Raises `EvalError` if something is lacking.

    **Example**

        train, dev = (read_squad(f"squad/{name}-v1.1.json") for name in ("train", "dev"))
        fine_tune_spans(model, tokenizer, train, dev).summary()["f1"]
    """
    if not isinstance(model, BERT):
        raise EvalError(f"spans: expected a BERT to fine-tune, got a {type(model).__name__}")
    tokenizer.vocabulary.require("reading questions", ("cls", "sep"))
    if not train or not dev or not seeds:
        raise EvalError("spans: expected questions to train on and to score by, and a seed")
    recipe = recipe or SpanRecipe()
    length, positions = recipe.training.length, sizes(model)["positions"]
    if positions < length:
        raise EvalError(
            f"length: windows of {length} tokens are longer than the {positions} positions of the model"
        )
    rows = [w for i, q in enumerate(train) for w in windows(tokenizer, q, i, recipe)]
    asked = [windows(tokenizer, q, i, recipe) for i, q in enumerate(dev)]
    runs = []
    for seed in seeds:
        epochs, fresh = [], Pointer(model, key=jax.random.key(seed))
        for pointer in train_epochs(fresh, rows, recipe.training, seed, _collated, _loss):
            points = _points(pointer, [w for parts in asked for w in parts])
            given = []
            for question, parts in zip(dev, asked, strict=True):
                scores, points = points[: len(parts)], points[len(parts) :]
                given.append(answer_of(question, parts, scores, recipe))
            epochs.append(answers(given, [question.answers for question in dev]))
            if after_epoch is not None:
                after_epoch(seed, len(epochs), epochs[-1])
        runs.append(tuple(epochs))
    return FineTuned("squad", tuple(runs))


def _collated(rows: Sequence[Window], size: int) -> dict[str, np.ndarray]:
    length = bucket(max(len(row.tokens) for row in rows))
    tokens, places = np.zeros((size, length), np.int32), np.arange(length)
    ends, firsts = np.zeros((size, 1), int), np.zeros((size, 1), int)
    target = np.zeros((size, 2), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)], target[i] = row.tokens, row.target
        ends[i], firsts[i] = len(row.tokens), row.first
    return {
        "tokens": tokens,
        "mask": places < ends,
        "types": ((places >= firsts) & (places < ends)).astype(np.int32),
        "target": target,
        "weight": (np.arange(size) < len(rows)).astype(np.float32),
    }


def _loss(model: Pointer, batch: dict[str, Any]) -> Array:
    scores = jax.vmap(model)(batch["tokens"], batch["types"], batch["mask"])
    logp = jax.nn.log_softmax(scores, axis=1)
    chosen = jnp.take_along_axis(logp, batch["target"][:, None, :], axis=1)
    return -jnp.mean(chosen, axis=(1, 2))


@eqx.filter_jit
def _forward(model: Pointer, batch: dict[str, Any]) -> Array:
    return jax.vmap(model)(batch["tokens"], batch["types"], batch["mask"])


def _points(model: Pointer, rows: Sequence[Window], size: int = 32) -> list[np.ndarray]:
    """The scores of every window, in their order."""
    found: list[Any] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    for start in range(0, len(rows), size):
        chosen = order[start : start + size]
        scores = np.asarray(_forward(model, _collated([rows[i] for i in chosen], size)))
        for place, i in enumerate(chosen):
            found[i] = scores[place, : len(rows[i].tokens)]
    return found
