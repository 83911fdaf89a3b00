"""Fine-tuning: what goes in, what a step does, and that it learns what can be learnt."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax.data import ByteTokenizer
from growjax.errors import DataError, EvalError
from growjax.evals import GLUE, Example, Recipe, fine_tune
from growjax.evals import finetune as room
from growjax.models import BERT, GPT, BERTConfig, GPTConfig


TOKENIZER = ByteTokenizer(sentinels=0, multiple=1)
SPECIAL = TOKENIZER.vocabulary.specials
CLS, SEP = SPECIAL["cls"], SPECIAL["sep"]
SIZES: dict = dict(embed=16, heads=2, head_dim=8, mlp=32, vocab=TOKENIZER.vocabulary.size)
MODEL = BERT(BERTConfig(layers=1, positions=32, **SIZES), key=jax.random.key(0))
RTE, COPA, STSB = GLUE["glue/rte"], GLUE["superglue/copa"], GLUE["glue/sts-b"]
QUICK = Recipe(batch=16, rate=3e-3, epochs=8, length=16)


def entailments(n: int, seed: int) -> list[Example]:
    """Whether the second text begins with an "x"."""
    rng, examples = np.random.default_rng(seed), []
    for i in range(n):
        first, label = "".join(rng.choice(list("abc"), 1 + i % 5)), int(rng.integers(2))
        examples.append(Example(((first, "xy"[label] + "z"),), RTE.labels[label]))
    return examples


# Inputs ------------------------------------------------------------------------------------------


def test_pairs_are_framed_and_the_longer_one_is_cut():
    row = room._encoded(TOKENIZER, Example((("abcdef", "xyz"),), "entailment"), RTE, 10)
    assert row.tokens[0].tolist() == [CLS, *b"abcd", SEP, *b"xyz", SEP]
    assert (row.second, row.target) == ([6], 0.0)
    batch = room._collated([row], 2)
    assert batch["types"][0, 0].tolist() == [0] * 6 + [1] * 4 + [0] * 6
    assert batch["mask"][0, 0].tolist() == [True] * 10 + [False] * 6
    assert batch["weight"].tolist() == [1.0, 0.0] and batch["tokens"].shape == (2, 1, 16)
    # RoBERTa's pairs have two separators in between
    row = room._encoded(TOKENIZER, Example((("abcdef", "xyz"),), "entailment"), RTE, 10, 2)
    assert row.tokens[0].tolist() == [CLS, *b"abc", SEP, SEP, *b"xyz", SEP] and row.second == [5]
    single = room._encoded(TOKENIZER, Example((("abcdef",),), 2.5), STSB, 6)
    assert single.tokens[0].tolist() == [CLS, *b"abcd", SEP] and single.target == 2.5
    assert room._collated([single], 1)["types"].max() == 0


def test_the_rate_rises_for_a_tenth_and_falls_to_nothing():
    recipe = Recipe(rate=1.0, warmup=0.1)
    rates = [recipe.rate_at(step, 100) for step in range(100)]
    np.testing.assert_allclose(rates[:11], [*np.arange(0.1, 1.05, 0.1), 1.0])
    np.testing.assert_allclose(np.diff(rates[10:]), -1 / 90)
    assert rates[-1] == pytest.approx(1 / 90)
    assert Recipe(rate=1.0, warmup=0.0).rate_at(0, 4) == 1.0


# Steps -------------------------------------------------------------------------------------------


def test_a_step_is_adamw_without_decay_on_biases_and_norms():
    classifier = room.Classifier(MODEL, 2, key=jax.random.key(1))
    trained, rest = gj.partition(classifier)
    optimizer, update = room._program(room._label_loss, 0.1, 0.999, 1e-6, 1.0)
    rows = [room._encoded(TOKENIZER, e, RTE, 16) for e in entailments(4, 0)]
    batch = room._collated(rows, 4)

    def loss(trained):
        model, total = eqx.combine(trained, rest), 0.0
        for row in rows:
            length = len(row.tokens[0])
            types = jnp.arange(length) >= row.second[0]
            scores = model(jnp.array(row.tokens[0]), types.astype(int), jnp.ones(length, bool))
            total -= jax.nn.log_softmax(scores)[int(row.target)]
        return total / 4

    slopes = eqx.filter_jit(eqx.filter_grad(loss))(trained)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(slopes)))
    assert norm > 0.1
    ours, _ = update(trained, rest, optimizer.init(trained), batch, jnp.float32(0.1))
    places = {
        "a matrix": (lambda m: m.weight, 1.0),
        "a matrix of the encoder": (lambda m: m.encoder.blocks.block.mlp.up, 1.0),
        "the pooler's": (lambda m: m.pooler.weight, 1.0),
        "a bias": (lambda m: m.bias, 0.0),
        "a norm": (lambda m: m.encoder.embedding_norm.weight, 0.0),
    }
    for name, (where, decay) in places.items():
        # Adam's first step is the sign of the gradient, but where that is nearly nothing
        g, p = np.asarray(where(slopes)) * 0.1 / norm, np.asarray(where(trained))
        expected = p - 0.1 * (g / (np.abs(g) + 1e-6) + decay * p)
        clear = np.abs(g) > 1e-5
        assert clear.mean() > 0.3
        np.testing.assert_allclose(
            np.asarray(where(ours))[clear], expected[clear], atol=2e-4, err_msg=name
        )


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    read: list[list[int]] = [[]]

    def collated(rows, size):
        read[-1].extend(int(row.target) for row in rows)
        return room._collated(rows, size)

    numbered = [Example((("a",),), float(i)) for i in range(20)]
    rows = [room._encoded(TOKENIZER, example, STSB, 8) for example in numbered]
    fresh = room.Classifier(MODEL, 1, key=jax.random.key(0))
    recipe = Recipe(batch=8, epochs=2, rate=1e-9)
    for seed in (0, 1, 0):
        for _ in room.train_epochs(fresh, rows, recipe, seed, collated, room._value_loss):
            read.append([])
    orders = read[:-1]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[:2] == orders[4:]
    assert len({tuple(order) for order in orders}) == 4


def test_rows_that_are_not_there_weigh_nothing():
    examples = entailments(3, 5)
    small, padded = (
        fine_tune(
            MODEL,
            TOKENIZER,
            STSB,
            [Example(e.choices, float(i)) for i, e in enumerate(examples)],
            {"dev": [Example(e.choices, float(i)) for i, e in enumerate(examples)]},
            recipe=Recipe(batch=batch, epochs=2, rate=1e-2),
            seeds=[0],
        )
        for batch in (3, 8)
    )
    for one, other in zip(small.runs[0], padded.runs[0], strict=True):
        np.testing.assert_allclose(list(one.values()), list(other.values()), atol=1e-4)


class CountTraces:
    """How often the forward pass of a classifier is traced."""

    def __enter__(self):
        self.count, self.real = 0, room.Classifier.__call__

        def counted(model, *args):
            self.count += 1
            return self.real(model, *args)

        room.Classifier.__call__ = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_):
        room.Classifier.__call__ = self.real  # type: ignore[method-assign]


# Learning ----------------------------------------------------------------------------------------


def test_what_can_be_learnt_is_learnt():
    """And nothing compiles anew for a batch, an epoch or a seed."""
    train, dev = entailments(80, 1), entailments(41, 2)
    told = []
    before = jax.tree.map(np.asarray, eqx.filter(MODEL, eqx.is_array))
    with CountTraces() as traces:
        tuned = fine_tune(
            MODEL,
            TOKENIZER,
            RTE,
            train,
            {"dev": dev},
            recipe=QUICK,
            seeds=[0, 1],
            after_epoch=lambda *args: told.append(args),
        )
    # One width: a program to train and one to score, each traced once
    assert traces.count == 2
    assert eqx.tree_equal(before, jax.tree.map(np.asarray, eqx.filter(MODEL, eqx.is_array)))
    assert min(tuned.last) == 1.0
    assert [(seed, epoch) for seed, epoch, _ in told] == [
        (s, e) for s in (0, 1) for e in range(1, 9)
    ]
    assert told[-1][2] == tuned.runs[1][-1]


def test_choices_and_values_can_be_learnt():
    rng, choices, values = np.random.default_rng(3), [], []
    for _ in range(96):
        label = int(rng.integers(2))
        texts = [("p", "yes"), ("p", "no")]
        choices.append(Example(tuple(texts[:: 1 if label == 0 else -1]), str(label)))
        count = int(rng.integers(1, 6))
        values.append(Example((("m" * count, "n" * (6 - count)),), float(count)))
    copa = fine_tune(
        MODEL, TOKENIZER, COPA, choices[:64], {"val": choices[64:]}, recipe=QUICK, seeds=[0]
    )
    assert copa.summary()["accuracy"] == 1.0
    longer = dataclasses.replace(QUICK, epochs=30)
    dev = {"dev": values[64:]}
    stsb, again = (
        fine_tune(MODEL, TOKENIZER, STSB, values[:64], dev, recipe=longer, seeds=seeds)
        for seeds in ([0, 1], [1])
    )
    assert stsb.summary()["pearson"] > 0.9
    # Every seed has its own head and order, and always the same
    assert stsb.runs[0] != stsb.runs[1] == again.runs[0]


def test_a_summary_is_of_the_last_epochs():
    runs = [[0.5, 0.9, 0.6], [0.1, 0.2, 0.8], [0.3, 0.7, 0.7]]
    tuned = room.FineTuned("t", tuple(tuple({"f1": x, "accuracy": x} for x in run) for run in runs))
    assert tuned.summary() == {
        "score": 0.7,
        "lowest": 0.6,
        "highest": 0.8,
        "best_epoch": 0.8,
        "seeds": 3.0,
        "f1": 0.7,
        "accuracy": 0.7,
    }


def test_models_without_a_pooler_and_sets_with_names():
    bare = BERT(
        BERTConfig(layers=1, positions=32, pooler=False, nsp_head=False, mlm_head=False, **SIZES),
        key=jax.random.key(0),
    )
    train = entailments(16, 1)
    dev = {"matched": train, "mismatched": train[:4]}
    recipe = Recipe(batch=16, epochs=1, length=16)
    tuned = fine_tune(bare, TOKENIZER, RTE, train, dev, recipe=recipe, seeds=[0])
    assert {"matched_accuracy", "mismatched_accuracy"} <= set(tuned.summary())


def test_the_last_epoch_alone_can_be_scored():
    train, told = entailments(16, 1), []
    recipe = Recipe(batch=16, epochs=2, length=16)
    whole, last = (
        fine_tune(
            MODEL,
            TOKENIZER,
            RTE,
            train,
            {"dev": train},
            recipe=recipe,
            seeds=[0],
            after_epoch=lambda *args: told.append(args[:2]),
            last_only=last_only,
        )
        for last_only in (False, True)
    )
    assert told == [(0, 1), (0, 2), (0, 2)]
    assert last.runs == (whole.runs[0][1:],) and last.last == whole.last


def test_what_does_not_fit_is_refused():
    train = entailments(2, 0)
    gpt = GPT(GPTConfig(layers=1, positions=8, **SIZES), key=jax.random.key(0))
    with pytest.raises(EvalError, match="expected a BERT to fine-tune, got a GPT"):
        fine_tune(gpt, TOKENIZER, RTE, train, {"dev": train})  # type: ignore[arg-type]
    with pytest.raises(EvalError, match="examples to train on"):
        fine_tune(MODEL, TOKENIZER, RTE, train, {"dev": []})
    with pytest.raises(EvalError, match=r"(?s)rate: expected.*length: expected"):
        Recipe(rate=0.0, length=3)

    class Bare:
        vocabulary = type(TOKENIZER.vocabulary)("d", "ww", {})

    with pytest.raises(DataError, match="'cls'"):
        fine_tune(MODEL, Bare(), RTE, train, {"dev": train})  # type: ignore[arg-type]
