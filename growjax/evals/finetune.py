"""Fine-tuning of encoders on GLUE and SuperGLUE, as it is conventionally done.

AdamW for three epochs (five below 10,000 examples) of batches of 32, a linear warm-up over a tenth of
the steps and a linear decay to nothing, no weight decay on biases and norms, gradients clipped at 1, and
a linear head on the pooled first token (Devlin et al., "BERT", NAACL 2019). Scores on small tasks vary
by points between seeds, so each task is trained with several: the result is their median, lowest and
highest. The score of a run is that of its last epoch, since the best epoch would be chosen on the very
set that it is scored on.

It departs from the convention in one point: the models of growjax have no dropout.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from growjax.axes import param, partition, put, sizes
from growjax.data import Tokenizer
from growjax.errors import EvalError
from growjax.evals.glue import Example, GlueTask, headline, score
from growjax.evals.language import bucket, usable_positions
from growjax.evals.metrics import Scores
from growjax.models import BERT
from growjax.models.bert import Pooler
from growjax.nn import logits
from growjax.optim import matrices
from growjax.values import Size, at_least, check, positive, ranged


Model = TypeVar("Model", bound=eqx.Module)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an encoder is fine-tuned; the defaults are the convention.

    **Fields**

    - `rate`: the highest learning rate. Published choices are 2e-5 to 5e-5 for large encoders, up to
      3e-4 for small ones; choose it on the development set, and the same way for every model.
    - `epochs`: None is 3, or 5 if there are fewer than 10,000 examples.
    - `warmup`: the share of the steps in which the rate rises.
    - `length`: the longest input in tokens; a longer pair loses the end of its longer text.

    Raises `EvalError` that lists every field out of range.
    """

    batch: Size = 32
    rate: Annotated[float, positive("rate")] = 5e-5
    epochs: Size | None = None
    warmup: Annotated[float, ranged(0, 1, "a share")] = 0.1
    weight_decay: Annotated[float, at_least(0)] = 0.01
    clip: Annotated[float, positive("norm")] = 1.0
    length: Annotated[int, at_least(8)] = 128
    b2: float = 0.999
    eps: float = 1e-6

    def __post_init__(self):
        check(self, EvalError, "this recipe cannot be used:")

    def epochs_of(self, examples: int) -> int:
        """The number of epochs for a training set of this many examples."""
        return self.epochs or (5 if examples < 10_000 else 3)

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of step `step` (from 0) of `steps`: a linear rise, then a linear fall."""
        warmup = round(self.warmup * steps)
        if step < warmup:
            return self.rate * (step + 1) / warmup
        return self.rate * (steps - step) / max(steps - warmup, 1)


class Classifier(eqx.Module):
    """An encoder and a linear head on its pooled output: `model(tokens, types, mask) -> [outputs]`."""

    encoder: BERT
    pooler: Pooler
    weight: Float[Array, "embed outputs"] = param("embed -> outputs")
    bias: Float[Array, " outputs"] = param("-> outputs")

    def __init__(self, encoder: BERT, outputs: int, *, key: PRNGKeyArray):
        """Takes the encoder's own pooler; an encoder without one gets a freshly drawn pooler."""
        k_pooler, k_head = jax.random.split(key)
        embed = sizes(encoder)["embed"]
        self.pooler = Pooler(embed, key=k_pooler) if encoder.pooler is None else encoder.pooler
        self.encoder = without_heads(encoder)
        self.weight = 0.02 * jax.random.normal(k_head, (embed, outputs))
        self.bias = jnp.zeros(outputs)

    def __call__(self, tokens: Array, types: Array, mask: Array) -> Float[Array, " outputs"]:
        hidden = self.encoder(tokens, token_types=types, mask=mask).hidden
        return logits(self.pooler(hidden), self.weight) + self.bias


def without_heads(encoder: BERT) -> BERT:
    """An encoder without pooler and heads, which would otherwise decay and take memory."""
    heads = ("pooler", "mlm", "nsp", "nsp_bias", "classifier", "classifier_bias")
    return put(encoder, {(head,): None for head in heads})


@dataclasses.dataclass(frozen=True)
class FineTuned:
    """The scores of every seed after every epoch of fine-tuning, `runs[seed][epoch]`.

    With `last_only` a run has one entry, that of the last epoch.
    """

    task: str
    runs: tuple[tuple[Scores, ...], ...]

    @property
    def last(self) -> list[float]:
        """For each seed, the headline score of its last epoch: the mean of the task's metrics."""
        return [headline(epochs[-1]) for epochs in self.runs]

    @property
    def best(self) -> list[float]:
        """For each seed, the headline score of its best epoch; biased, since that score chooses it."""
        return [max(map(headline, epochs)) for epochs in self.runs]

    def summary(self) -> Scores:
        """Scores over the seeds, as a dict.

        `score`, `lowest` and `highest` are the median, least and greatest of `last`; `best_epoch` is the
        median of `best`; each metric of the task is the median over the last epochs.
        """
        names = self.runs[0][-1]
        medians = {n: float(np.median([epochs[-1][n] for epochs in self.runs])) for n in names}
        return {
            "score": float(np.median(self.last)),
            "lowest": min(self.last),
            "highest": max(self.last),
            "best_epoch": float(np.median(self.best)),
            "seeds": float(len(self.runs)),
            **medians,
        }


def fine_tune(
    model: BERT,
    tokenizer: Tokenizer,
    task: GlueTask,
    train: Sequence[Example],
    dev: Mapping[str, Sequence[Example]],
    *,
    recipe: Recipe | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    after_epoch: Callable[[int, int, Scores], None] | None = None,
    last_only: bool = False,
) -> FineTuned:
    """Fine-tune an encoder on one task, once for each seed, and score it after every epoch.

    **Arguments**

    - `model`: is not changed; every seed starts from it.
    - `train`, `dev`: examples (see `read_task`); with several development sets, as MNLI has, the name of
      each stands before its metrics.
    - `seeds`: of the head and of the order of the examples.
    - `after_epoch`: called with the seed, the epoch (from 1) and the scores, after each epoch.
    - `last_only`: score the last epoch alone, which saves time; `FineTuned.best` is then that epoch too.

    The last batch of an epoch is filled up with rows of weight 0, so one program serves all batches of
    a length. Raises `EvalError` for a model that is not a BERT, and without examples, development sets
    or seeds.

    **Example**

        task = GLUE["glue/rte"]
        train, dev = (read_task(task, "data/glue", split) for split in ("train", "dev"))
        fine_tune(model, tokenizer, task, train, {"dev": dev}).summary()["score"]
    """
    if not isinstance(model, BERT):
        raise EvalError(f"{task.name}: expected a BERT to fine-tune, got a {type(model).__name__}")
    tokenizer.vocabulary.require("fine-tuning", ("cls", "sep"))
    if not train or not dev or not all(dev.values()) or not seeds:
        raise EvalError(f"{task.name}: expected examples to train on and to score by, and a seed")
    recipe = recipe or Recipe()
    most = usable_positions(model)
    length = recipe.length if most is None else min(recipe.length, most)
    between = separators(model)
    rows = [_encoded(tokenizer, example, task, length, between) for example in train]
    dev_rows = {
        name: [_encoded(tokenizer, example, task, length, between) for example in examples]
        for name, examples in dev.items()
    }
    runs = []
    for seed in seeds:
        epochs, fresh = [], Classifier(model, task.outputs, key=jax.random.key(seed))
        loss = _label_loss if task.labels else _value_loss
        collate = functools.partial(_collated, most=length)
        trained = train_epochs(fresh, rows, recipe, seed, collate, loss)
        for epoch, classifier in enumerate(trained, 1):
            if last_only and epoch < recipe.epochs_of(len(rows)):
                continue
            scores: Scores = {}
            for name, examples in dev.items():
                of_set = score(task, examples, _outputs(classifier, task, dev_rows[name], length))
                # With several sets, as MNLI has, the name of the set stands before each metric
                prefix = f"{name}_" if len(dev) > 1 else ""
                scores |= {prefix + metric: value for metric, value in of_set.items()}
            epochs.append(scores)
            if after_epoch is not None:
                after_epoch(seed, epoch, scores)
        runs.append(tuple(epochs))
    return FineTuned(task.name, tuple(runs))


# Inputs ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Row:
    """One example: the tokens of each choice, the index where its second text begins, and the target.

    `target` is the index of the label, or the value of a regression.
    """

    tokens: list[np.ndarray]
    second: list[int]
    target: float

    @property
    def length(self) -> int:
        return max(map(len, self.tokens))


def separators(model: BERT) -> int:
    """The number of `sep` between two texts: 1 in BERT, 2 in RoBERTa."""
    return 1 if model.padding is None else 2


def _encoded(
    tokenizer: Tokenizer, example: Example, task: GlueTask, length: int, between: int = 1
) -> _Row:
    """An example as BERT reads it: `cls`, the first text, `sep`, then for a pair the second, `sep`.

    `between` is the number of `sep` between the texts of a pair.
    """
    special, tokens, second = tokenizer.vocabulary.specials, [], []
    for texts in example.choices:
        parts = [tokenizer.encode(text).tolist() for text in texts]
        # Beside the texts stand one `cls`, the separators and a `sep` at the end; the longer text loses
        # its end, one token at a time
        while sum(map(len, parts)) > length - 2 - between * (len(parts) - 1):
            max(parts, key=len).pop()
        framed = [special["cls"], *parts[0], special["sep"]]
        second.append(len(framed))
        for part in parts[1:]:
            framed += [special["sep"]] * (between - 1) + [*part, special["sep"]]
        tokens.append(np.array(framed, np.int32))
    label = example.label
    if label is None:
        return _Row(tokens, second, 0.0)
    return _Row(tokens, second, task.labels.index(str(label)) if task.labels else float(label))


def _collated(rows: Sequence[_Row], size: int, most: int | None = None) -> dict[str, np.ndarray]:
    """A batch of `size` rows, `[rows, choices, tokens]`; rows beyond those given have weight 0.

    Rows are padded to `most` tokens at most (None: to any number).
    """
    shape = (size, len(rows[0].tokens), bucket(max(row.length for row in rows), most))
    tokens = np.zeros(shape, np.int32)
    lengths, second = np.zeros(shape[:2], int), np.zeros(shape[:2], int)
    for i, row in enumerate(rows):
        for j, (ids, start) in enumerate(zip(row.tokens, row.second, strict=True)):
            tokens[i, j, : len(ids)], lengths[i, j], second[i, j] = ids, len(ids), start
    positions = np.arange(shape[2])
    mask = positions < lengths[..., None]
    return {
        "tokens": tokens,
        "mask": mask,
        # Token types: 0 up to the first `sep`, 1 in the second text
        "types": (mask & (positions >= second[..., None])).astype(np.int32),
        "target": np.array([row.target for row in rows] + [0] * (size - len(rows)), np.float32),
        "weight": (np.arange(size) < len(rows)).astype(np.float32),
    }


# Training ----------------------------------------------------------------------------------------


def train_epochs(
    model: Model,
    rows: Sequence[Any],
    recipe: Recipe,
    seed: int,
    collate: Callable[[Sequence[Any], int], dict[str, np.ndarray]],
    loss: Callable[[Model, dict[str, Any]], Float[Array, " batch"]],
) -> Iterator[Model]:
    """The trained model after each epoch; `seed` decides the order of the rows.

    **Arguments**

    - `model`: an encoder with its head; all its parameters are trained.
    - `collate`: `(rows, size) -> batch`, padded to `size` rows, with a `weight` of 0 or 1 for each.
    - `loss`: `(model, batch) -> [batch]`, the loss of each row.
    """
    epochs = recipe.epochs_of(len(rows))
    starts = range(0, len(rows), recipe.batch)
    trained, rest = partition(model)
    optimizer, update = _program(loss, recipe.clip, recipe.b2, recipe.eps, recipe.weight_decay)
    state, step, rng = optimizer.init(trained), 0, np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(rows))
        for start in starts:
            members = [rows[i] for i in order[start : start + recipe.batch]]
            rate = jnp.float32(recipe.rate_at(step, epochs * len(starts)))
            trained, state = update(trained, rest, state, collate(members, recipe.batch), rate)
            step += 1
        yield eqx.combine(trained, rest)


# Cached: `filter_jit` compiles once per function object, so all seeds and tasks share one step
@functools.lru_cache
def _program(loss: Any, clip: float, b2: float, eps: float, decay: float) -> tuple[Any, Any]:
    """The optimizer and the jitted training step of a recipe."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(b2=b2, eps=eps),
        optax.add_decayed_weights(decay, matrices),
    )

    @eqx.filter_jit
    def update(trained, rest, state, batch, rate):
        def mean_loss(trained):
            losses = loss(eqx.combine(trained, rest), batch)
            return jnp.sum(losses * batch["weight"]) / jnp.sum(batch["weight"])

        gradients = eqx.filter_grad(mean_loss)(trained)
        updates, state = optimizer.update(gradients, state, trained)
        return jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), trained, updates), state

    return optimizer, update


def _label_loss(model: Classifier, batch: dict[str, Any]) -> Array:
    scores, labels = _scores(model, batch), batch["target"].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels)


def _value_loss(model: Classifier, batch: dict[str, Any]) -> Array:
    return (_scores(model, batch)[:, 0] - batch["target"]) ** 2


def _scores(model: Classifier, batch: dict[str, Any]) -> Float[Array, "batch outputs"]:
    """The outputs of every row of a batch: one for each label, or one for each choice.

    A row has an axis of choices; with one choice the outputs are the labels', and with several each
    choice has a single output, so flattening `[choices, outputs]` serves both.
    """

    def outputs(row: Mapping[str, Array]) -> Array:
        return jax.vmap(model)(row["tokens"], row["types"], row["mask"]).reshape(-1)

    return jax.vmap(outputs)(batch)


_forward = eqx.filter_jit(_scores)


def _outputs(
    model: Classifier, task: GlueTask, rows: Sequence[_Row], most: int, size: int = 32
) -> Float[np.ndarray, "n outputs"]:
    """The outputs of a classifier for every row, in the rows' order, in batches of similar lengths."""
    outputs = np.zeros((len(rows), task.outputs * task.choices))
    order = sorted(range(len(rows)), key=lambda i: rows[i].length)
    for start in range(0, len(rows), size):
        members = order[start : start + size]
        batch = _collated([rows[i] for i in members], size, most)
        outputs[members] = np.asarray(_forward(model, batch))[: len(members)]
    return outputs
