"""Fine-tuning of encoders on GLUE and SuperGLUE, as it is conventionally done.

AdamW for three epochs (five below 10,000 examples) of batches of 32, a linear warm-up over a tenth of
the steps and a linear decay to nothing, no weight decay on biases and norms, gradients clipped at 1, and
a linear head on what the pooler makes of the first token (Devlin et al., "BERT", NAACL 2019). Small
tasks vary by points between seeds, so there are several: their median counts, and how far they spread.
The score of a run is that of its last epoch; the best epoch was chosen on the set it is scored on.

One convention is not kept: the models of growjax have no dropout, so there is none here either.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from growjax.axes import param, partition, sizes
from growjax.data import Tokenizer
from growjax.errors import EvalError, raise_all
from growjax.evals.glue import Example, GlueTask, headline, score
from growjax.evals.language import bucket
from growjax.evals.metrics import Scores
from growjax.models import BERT
from growjax.models.bert import Pooler
from growjax.nn import logits
from growjax.optim import matrices


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

    batch: int = 32
    rate: float = 5e-5
    epochs: int | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    length: int = 128
    b2: float = 0.999
    eps: float = 1e-6

    def __post_init__(self):
        wanted = [
            ("batch", "1 or more", self.batch >= 1),
            ("rate", "a positive rate", self.rate > 0),
            ("epochs", "1 or more, or None", self.epochs is None or self.epochs >= 1),
            ("warmup", "a share from 0 to 1", 0 <= self.warmup <= 1),
            ("weight_decay", "0 or more", self.weight_decay >= 0),
            ("clip", "a positive norm", self.clip > 0),
            ("length", "8 or more", self.length >= 8),
        ]
        faults = [
            f"{n}: expected {what}, got {getattr(self, n)}" for n, what, fine in wanted if not fine
        ]
        raise_all(EvalError, "this recipe cannot be used:", faults)

    def epochs_of(self, examples: int) -> int:
        """How often so many examples are gone through."""
        return self.epochs or (5 if examples < 10_000 else 3)

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, of those there are."""
        rise = round(self.warmup * steps)
        if step < rise:
            return self.rate * (step + 1) / rise
        return self.rate * (steps - step) / max(steps - rise, 1)


class Classifier(eqx.Module):
    """An encoder and a linear head on its pooled output: `model(tokens, types, mask) -> [outputs]`."""

    encoder: BERT
    pooler: Pooler
    weight: Float[Array, "embed outputs"] = param("embed -> outputs")
    bias: Float[Array, " outputs"] = param("-> outputs")

    def __init__(self, encoder: BERT, outputs: int, *, key: PRNGKeyArray):
        """The pooler of the encoder is taken over; without one a new one is drawn."""
        k_pooler, k_head = jax.random.split(key)
        embed = sizes(encoder)["embed"]
        self.pooler = Pooler(embed, key=k_pooler) if encoder.pooler is None else encoder.pooler
        # What only pre-training needs is not carried along, nor decayed
        unused = lambda m: (m.pooler, m.mlm, m.nsp, m.nsp_bias)  # noqa: E731
        self.encoder = eqx.tree_at(unused, encoder, (None,) * 4, is_leaf=lambda x: x is None)
        self.weight = 0.02 * jax.random.normal(k_head, (embed, outputs))
        self.bias = jnp.zeros(outputs)

    def __call__(self, tokens: Array, types: Array, mask: Array) -> Float[Array, " outputs"]:
        hidden = self.encoder(tokens, token_types=types, mask=mask).hidden
        return logits(self.pooler(hidden), self.weight) + self.bias


@dataclasses.dataclass(frozen=True)
class FineTuned:
    """What came of fine-tuning: the scores of every seed after every epoch, `runs[seed][epoch]`.

    With `last_only` a run has one entry, that of the last epoch.
    """

    task: str
    runs: tuple[tuple[Scores, ...], ...]

    @property
    def last(self) -> list[float]:
        """For each seed, one number for the last epoch: the mean of the task's metrics."""
        return [headline(epochs[-1]) for epochs in self.runs]

    @property
    def best(self) -> list[float]:
        """The same for its best epoch, which is chosen by what it is scored by."""
        return [max(map(headline, epochs)) for epochs in self.runs]

    def summary(self) -> Scores:
        """`score` (median of the seeds' last epochs), `lowest`, `highest`, `best_epoch`, each metric."""
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
    - `after_epoch`: is told the seed, the epoch and the scores.
    - `last_only`: score the last epoch alone, which is what counts; the best one is not known then.

    The last batch of an epoch may be smaller; no batch compiles anew. Raises `EvalError` for a model that
    is no encoder, and if something is lacking.

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
    length = min(recipe.length, sizes(model)["positions"])
    rows = [_encoded(tokenizer, example, task, length) for example in train]
    scored = {
        name: [_encoded(tokenizer, example, task, length) for example in examples]
        for name, examples in dev.items()
    }
    runs = []
    for seed in seeds:
        epochs, fresh = [], Classifier(model, task.outputs, key=jax.random.key(seed))
        loss = _label_loss if task.labels else _value_loss
        trained = train_epochs(fresh, rows, recipe, seed, _collated, loss)
        for epoch, classifier in enumerate(trained, 1):
            if last_only and epoch < recipe.epochs_of(len(rows)):
                continue
            found = {n: score(task, dev[n], _outputs(classifier, task, scored[n])) for n in dev}
            whole = next(iter(found.values())) if len(dev) == 1 else _named(found)
            epochs.append(whole)
            if after_epoch is not None:
                after_epoch(seed, epoch, whole)
        runs.append(tuple(epochs))
    return FineTuned(task.name, tuple(runs))


def _named(found: Mapping[str, Scores]) -> Scores:
    return {f"{name}_{n}": x for name, scores in found.items() for n, x in scores.items()}


# Inputs ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Row:
    """The tokens of every choice, where the second text of each begins, and the target."""

    tokens: list[np.ndarray]
    second: list[int]
    target: float

    @property
    def length(self) -> int:
        return max(map(len, self.tokens))


def _encoded(tokenizer: Tokenizer, example: Example, task: GlueTask, length: int) -> _Row:
    special, tokens, second = tokenizer.vocabulary.specials, [], []
    for texts in example.choices:
        parts = [tokenizer.encode(text).tolist() for text in texts]
        # The longer one loses its end, token by token
        while sum(map(len, parts)) > length - 1 - len(parts):
            max(parts, key=len).pop()
        framed = [special["cls"], *parts[0], special["sep"]]
        second.append(len(framed))
        for part in parts[1:]:
            framed += [*part, special["sep"]]
        tokens.append(np.array(framed, np.int32))
    label = example.label
    if label is None:
        return _Row(tokens, second, 0.0)
    return _Row(tokens, second, task.labels.index(str(label)) if task.labels else float(label))


def _collated(rows: Sequence[_Row], size: int) -> dict[str, np.ndarray]:
    """A batch of `size` rows, each with its choices; rows that are not there weigh nothing."""
    shape = (size, len(rows[0].tokens), bucket(max(row.length for row in rows)))
    tokens, lengths, second = (
        np.zeros(shape, np.int32),
        np.zeros(shape[:2], int),
        np.zeros(shape[:2], int),
    )
    for i, row in enumerate(rows):
        for j, (ids, start) in enumerate(zip(row.tokens, row.second, strict=True)):
            tokens[i, j, : len(ids)], lengths[i, j], second[i, j] = ids, len(ids), start
    places = np.arange(shape[2])
    real = places < lengths[..., None]
    return {
        "tokens": tokens,
        "mask": real,
        "types": (real & (places >= second[..., None])).astype(np.int32),
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
    """A model with its head after each epoch over some rows, in an order of its seed.

    `collate` makes a batch of some rows and its size, with a `weight` for each; `loss` is that of every
    row of a batch.
    """
    epochs = recipe.epochs_of(len(rows))
    starts = range(0, len(rows), recipe.batch)
    trained, rest = partition(model)
    optimizer, update = _program(loss, recipe.clip, recipe.b2, recipe.eps, recipe.weight_decay)
    state, step, rng = optimizer.init(trained), 0, np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(rows))
        for start in starts:
            chosen = [rows[i] for i in order[start : start + recipe.batch]]
            rate = jnp.float32(recipe.rate_at(step, epochs * len(starts)))
            trained, state = update(trained, rest, state, collate(chosen, recipe.batch), rate)
            step += 1
        yield eqx.combine(trained, rest)


@functools.lru_cache
def _program(loss: Any, clip: float, b2: float, eps: float, decay: float) -> tuple[Any, Any]:
    """An optimizer and the step that uses it, the same ones for every seed and task."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(b2=b2, eps=eps),
        optax.add_decayed_weights(decay, matrices),
    )

    @eqx.filter_jit
    def update(trained, rest, state, batch, rate):
        def mean(trained):
            each = loss(eqx.combine(trained, rest), batch)
            return jnp.sum(each * batch["weight"]) / jnp.sum(batch["weight"])

        slopes = eqx.filter_grad(mean)(trained)
        updates, state = optimizer.update(slopes, state, trained)
        return jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), trained, updates), state

    return optimizer, update


def _label_loss(model: Classifier, batch: dict[str, Any]) -> Array:
    found, chosen = jax.vmap(_row(model))(batch), batch["target"].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(found, chosen)


def _value_loss(model: Classifier, batch: dict[str, Any]) -> Array:
    return (jax.vmap(_row(model))(batch)[:, 0] - batch["target"]) ** 2


def _row(model: Classifier) -> Callable[[Mapping[str, Array]], Array]:
    """The outputs for one example: those of its text, or one for each choice."""

    def read(row: Mapping[str, Array]) -> Array:
        return jax.vmap(model)(row["tokens"], row["types"], row["mask"]).reshape(-1)

    return read


@eqx.filter_jit
def _forward(model: Classifier, batch: dict[str, Any]) -> Array:
    return jax.vmap(_row(model))(batch)


def _outputs(
    model: Classifier, task: GlueTask, rows: Sequence[_Row], size: int = 32
) -> Float[np.ndarray, "n outputs"]:
    """What a classifier says of every example, in their order."""
    found = np.zeros((len(rows), task.outputs * task.choices))
    order = sorted(range(len(rows)), key=lambda i: rows[i].length)
    for start in range(0, len(rows), size):
        chosen = order[start : start + size]
        batch = _collated([rows[i] for i in chosen], size)
        found[chosen] = np.asarray(_forward(model, batch))[: len(chosen)]
    return found
