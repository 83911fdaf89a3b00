"""Extractive question answering: an encoder scores where the answer begins and ends in a text (SQuAD).

A text longer than a window is read in overlapping windows, each behind the question. In training, the
target of a window without the answer is its first token, `cls`; scores there mean "no answer". A token
that stands in several windows counts only in the one with the most context around it (Devlin et al.,
"BERT", NAACL 2019).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from growjax.axes import param, sizes
from growjax.data import Tokenizer
from growjax.errors import EvalError
from growjax.evals.finetune import FineTuned, Recipe, separators, train_epochs, without_heads
from growjax.evals.language import bucket, usable_positions
from growjax.evals.metrics import Scores, answers
from growjax.evals.questions import Question
from growjax.models import BERT
from growjax.nn import logits
from growjax.values import Size, check


@dataclasses.dataclass(frozen=True)
class SpanRecipe:
    """How questions are read and answers are chosen; the defaults are those of BERT on SQuAD.

    **Fields**

    - `training`: the recipe of the training steps; its `length` is that of a window in tokens.
    - `stride`: the distance between the starts of windows, in tokens.
    - `query`: the most tokens of a question; the rest is cut off.
    - `candidates`: how many of a window's best starts and ends are paired.
    - `answer`: the most tokens of an answer.
    - `threshold`: the answer is empty if "no answer" scores this much more than the best span; None
      always gives a span (SQuAD 1.1).

    Raises `EvalError` that lists every field out of range.
    """

    training: Recipe = Recipe(rate=3e-5, epochs=2, length=384)
    stride: int = 128
    query: int = 64
    candidates: Size = 20
    answer: Size = 30
    threshold: float | None = None

    def __post_init__(self):
        # A window holds the question, `cls` and two `sep` besides text
        room = self.training.length - self.query - 3
        faults = []
        if not (1 <= self.query and room >= 1):
            faults.append(f"query: expected from 1 to {self.training.length - 4}, got {self.query}")
        if not 1 <= self.stride <= room:
            faults.append(
                f"stride: expected from 1 to {room}, the text of a window, got {self.stride}"
            )
        check(self, EvalError, "this recipe cannot be used:", faults)


class Pointer(eqx.Module):
    """An encoder that scores every token as a start and as an end: `[T, 2]`."""

    encoder: BERT
    weight: Float[Array, "embed ends"] = param("embed -> ends")
    bias: Float[Array, " ends"] = param("-> ends")

    def __init__(self, encoder: BERT, *, key: PRNGKeyArray):
        self.encoder = without_heads(encoder)
        self.weight = 0.02 * jax.random.normal(key, (sizes(encoder)["embed"], 2))
        self.bias = jnp.zeros(2)

    def __call__(self, tokens: Array, types: Array, mask: Array) -> Float[Array, "T 2"]:
        hidden = self.encoder(tokens, token_types=types, mask=mask).hidden
        scores = logits(hidden, self.weight) + self.bias
        # Padding gets (nearly) no probability: half the least number, so that a sum does not overflow
        return jnp.where(mask[:, None], scores, jnp.finfo(scores.dtype).min / 2)


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a text behind its question.

    **Fields**

    - `question`: the number of the question.
    - `tokens`: `cls`, the question, `sep`, the part of the text, `sep`.
    - `first`: the index of the text's first token.
    - `places`: `[text tokens, 2]`, the start and end of each text token in the context, in characters.
    - `best`: `[text tokens]`, whether the token has its most context in this window.
    - `target`: the indices of the answer's first and last token, or 0 and 0 without an answer.
    """

    question: int
    tokens: np.ndarray
    first: int
    places: np.ndarray
    best: np.ndarray
    target: tuple[int, int] = (0, 0)


def windows(
    tokenizer: Tokenizer, question: Question, number: int, recipe: SpanRecipe, between: int = 1
) -> list[Window]:
    """The windows of one question; a window's target is the first accepted answer, if whole there.

    `between` is the number of `sep` between the question and the text.
    """
    special = tokenizer.vocabulary.specials
    # The recipe leaves room for one `sep` in between
    longest = min(recipe.query, recipe.training.length - between - 3)
    query = tokenizer.encode(question.question)[:longest]
    text, places = tokenizer.encode(question.context), tokenizer.places(question.context)
    room = recipe.training.length - len(query) - 2 - between
    starts = [0]
    while starts[-1] + room < len(text):
        starts.append(starts[-1] + min(recipe.stride, room))
    bounds = [(start, min(start + room, len(text))) for start in starts]
    # The context of each token in each window, as BERT's script measures it: the shorter side, plus a
    # little for the window's length, which decides ties
    index = np.arange(len(text))
    context = []
    for start, end in bounds:
        inside = (index >= start) & (index < end)
        shorter = np.minimum(index - start, end - 1 - index)
        context.append(np.where(inside, shorter + 0.01 * (end - start), -1.0))
    best = np.argmax(context, axis=0)
    answer = _answer_tokens(question, places)
    parts = []
    for i, (start, end) in enumerate(bounds):
        framed = [special["cls"], *query, *[special["sep"]] * between, *text[start:end]]
        framed.append(special["sep"])
        first, target = len(query) + 1 + between, (0, 0)
        if answer is not None and start <= answer[0] and answer[1] < end:
            target = (answer[0] - start + first, answer[1] - start + first)
        tokens = np.array(framed, np.int32)
        parts.append(Window(number, tokens, first, places[start:end], best[start:end] == i, target))
    return parts


def _answer_tokens(question: Question, places: np.ndarray) -> tuple[int, int] | None:
    """The first and the last text token of the first accepted answer."""
    if not question.answers:
        return None
    start, end = question.starts[0], question.starts[0] + len(question.answers[0])
    # All tokens that share a character with the answer
    touched = np.flatnonzero((places[:, 0] < end) & (places[:, 1] > start))
    return (int(touched[0]), int(touched[-1])) if len(touched) else None


def answer_of(
    question: Question,
    parts: Sequence[Window],
    scores: Sequence[Float[np.ndarray, "T 2"]],
    recipe: SpanRecipe,
) -> str:
    """The span with the highest start plus end score over all windows; empty if "no answer" wins.

    `parts` are the windows of the question, and `scores` the model's outputs for each.
    """
    best: tuple[float, int, int] | None = None  # score, first and last character
    # The score of "no answer" is that of `cls`, the least over the windows
    no_answer = min(float(outputs[0].sum()) for outputs in scores)
    for window, outputs in zip(parts, scores, strict=True):
        text = outputs[window.first : window.first + len(window.places)]
        begins = np.argsort(-text[:, 0], kind="stable")[: recipe.candidates]
        ends = np.argsort(-text[:, 1], kind="stable")[: recipe.candidates]
        for i in begins[window.best[begins]]:
            for j in ends[(ends >= i) & (ends < i + recipe.answer)]:
                total = float(text[i, 0] + text[j, 1])
                if best is None or total > best[0]:
                    best = total, int(window.places[i, 0]), int(window.places[j, 1])
    if best is None:
        return ""
    score, start, end = best
    if recipe.threshold is not None and no_answer - score > recipe.threshold:
        return ""
    return question.context[start:end]


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

    The scores are those of `growjax.evals.metrics.answers`; the other arguments are as in `fine_tune`. If
    some questions have no answer, set a `threshold` in the recipe, such as 0. Raises `EvalError` for a
    model that is not a BERT or has fewer positions than a window, and without questions or seeds.

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
    length, positions = recipe.training.length, usable_positions(model)
    if positions is not None and positions < length:
        raise EvalError(
            f"length: windows of {length} tokens are longer than the {positions} positions of the model"
        )
    between = separators(model)
    rows = [w for i, q in enumerate(train) for w in windows(tokenizer, q, i, recipe, between)]
    dev_windows = [windows(tokenizer, q, i, recipe, between) for i, q in enumerate(dev)]
    runs = []
    for seed in seeds:
        epochs, fresh = [], Pointer(model, key=jax.random.key(seed))
        collate = functools.partial(_collated, most=length)
        for pointer in train_epochs(fresh, rows, recipe.training, seed, collate, _loss):
            outputs = iter(_outputs(pointer, [w for parts in dev_windows for w in parts], length))
            predicted = []
            for question, parts in zip(dev, dev_windows, strict=True):
                scores = [next(outputs) for _ in parts]
                predicted.append(answer_of(question, parts, scores, recipe))
            epochs.append(answers(predicted, [question.answers for question in dev]))
            if after_epoch is not None:
                after_epoch(seed, len(epochs), epochs[-1])
        runs.append(tuple(epochs))
    return FineTuned("squad", tuple(runs))


def _collated(rows: Sequence[Window], size: int, most: int | None = None) -> dict[str, np.ndarray]:
    """A batch of `size` windows, padded to `most` tokens at most; rows beyond those given weigh 0."""
    length = bucket(max(len(row.tokens) for row in rows), most)
    tokens, positions = np.zeros((size, length), np.int32), np.arange(length)
    ends, firsts = np.zeros((size, 1), int), np.zeros((size, 1), int)
    target = np.zeros((size, 2), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)], target[i] = row.tokens, row.target
        ends[i], firsts[i] = len(row.tokens), row.first
    return {
        "tokens": tokens,
        "mask": positions < ends,
        # Token types: 0 for the question, 1 for the text
        "types": ((positions >= firsts) & (positions < ends)).astype(np.int32),
        "target": target,
        "weight": (np.arange(size) < len(rows)).astype(np.float32),
    }


def _loss(model: Pointer, batch: dict[str, Any]) -> Array:
    """The mean cross-entropy of the start and of the end of each row's answer, over the tokens."""
    scores = jax.vmap(model)(batch["tokens"], batch["types"], batch["mask"])
    logprobs = jax.nn.log_softmax(scores, axis=1)
    at_targets = jnp.take_along_axis(logprobs, batch["target"][:, None, :], axis=1)
    return -jnp.mean(at_targets, axis=(1, 2))


@eqx.filter_jit
def _forward(model: Pointer, batch: dict[str, Any]) -> Array:
    return jax.vmap(model)(batch["tokens"], batch["types"], batch["mask"])


def _outputs(model: Pointer, rows: Sequence[Window], most: int, size: int = 32) -> list[np.ndarray]:
    """The scores `[tokens, 2]` of every window, in the windows' order, in batches of similar lengths."""
    outputs: list[Any] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    for start in range(0, len(rows), size):
        members = order[start : start + size]
        batch = np.asarray(_forward(model, _collated([rows[i] for i in members], size, most)))
        for place, i in enumerate(members):
            outputs[i] = batch[place, : len(rows[i].tokens)]
    return outputs
