"""Losses that read logits a chunk at a time, against all logits at once: values, gradients, memory."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax.cost import flops, training_flops_per_token
from growjax.data import MLM, UL2, ByteTokenizer, Causal, Window
from growjax.data.objectives import batch_shapes
from growjax.errors import AxisError, PlanError
from growjax.evals import LanguageModel
from growjax.forecast.dryrun import dry_run
from growjax.models import BERT, GPT, T5, BERTConfig, Llama, LlamaConfig, T5Config
from growjax.models.protocol import predictions, read_tokens
from growjax.nn import Readout, cross_entropies, per_token
from growjax.nn.head import CHUNK, LARGE, MOST, chunk_of
from growjax.plan.losses import cross_entropy, drawn_loss
from tests import own
from tests.conftest import SEVERAL_DEVICES
from tests.runs import SMALL, plan, steps


CHUNKS = [1, 5, 8, 21, 99]
SHAPES = [(21, 6, 31), (16, 8, 16)]  # tokens, embed, vocab: chunks divide neither, and some of both


@pytest.fixture
def float64():
    with jax.enable_x64():
        yield


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of five tokens, whatever the vocabulary."""
    monkeypatch.setattr("growjax.nn.head.LARGE", 0)
    monkeypatch.setattr("growjax.nn.head.CHUNK", 5)


def draw(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def by_hand(logits, targets):
    """Cross-entropy as it is in books."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]


# The function --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("head", ["tied", "untied", "bias"])
def test_chunks_give_what_all_logits_give(shape, head):
    """So do the gradients by hidden states, head and bias, for sequences under `vmap`, with weights."""
    tokens, embed, vocab = shape
    tied = head == "tied"
    hidden, weight = draw(1, 2, tokens, embed), draw(2, *(vocab, embed) if tied else (embed, vocab))
    bias = draw(3, vocab) if head == "bias" else jnp.zeros(0)
    targets = jnp.asarray(np.random.default_rng(4).integers(0, vocab, (2, tokens)))
    targets = targets.at[0, 0].set(-1)  # the last word, as indexing has it
    weights = draw(5, 2, tokens) * (draw(6, 2, tokens) > 0)
    weights = weights.at[0, 0].set(1)

    def losses(hidden, weight, bias, chunk):
        def one(hidden, targets):
            readout = Readout(hidden, weight, bias if len(bias) else None, tied)
            if chunk is None:
                return by_hand(readout.logits(), targets)
            return per_token(cross_entropies, readout, targets, chunk=chunk)

        entropies = jax.vmap(one)(hidden, targets)
        return jnp.sum(entropies * weights), entropies

    run = jax.jit(jax.grad(losses, (0, 1, 2), has_aux=True), static_argnums=3)
    expected, right = run(hidden, weight, bias, None)
    for chunk in CHUNKS:
        gradient, plain = run(hidden, weight, bias, chunk)
        np.testing.assert_allclose(plain, right, rtol=0, atol=1e-12)
        for ours, theirs in zip(gradient, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("float64")
def test_it_is_differentiated_twice_forward_and_for_each_sequence_alone():
    hidden, weight, targets = draw(1, 2, 13, 6), draw(2, 17, 6), jnp.arange(26).reshape(2, 13) % 17

    def chunked(weight, hidden, targets):
        readout = Readout(hidden, weight, tied=True)
        return per_token(cross_entropies, readout, targets, chunk=4).sum()

    def plain(weight, hidden, targets):
        return by_hand(hidden @ weight.T, targets).sum()

    def answers(loss):
        gradient = jax.grad(loss)
        along = lambda w: jax.jvp(gradient, (w, hidden[0], targets[0]), (0.1 * w, hidden[1], zeros))  # noqa: E731
        zeros = np.zeros(13, jax.dtypes.float0)
        return *along(weight), jax.vmap(gradient, (None, 0, 0))(weight, hidden, targets)

    for ours, theirs in zip(answers(chunked), answers(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_targets_that_are_no_words_are_as_loud_as_ever():
    readout = Readout(jnp.ones((3, 2)), jnp.ones((2, 5)))
    losses = per_token(cross_entropies, readout, jnp.asarray([1, 5, 99]), chunk=2)
    assert np.isfinite(losses[0]) and np.isnan(losses[1:]).all()


def test_short_sequences_of_few_words_are_read_at_once():
    assert chunk_of(128, 30_522) == 128 and chunk_of(1, LARGE) == 1
    assert chunk_of(2048, 50_304) == CHUNK and chunk_of(2000, 50_304) == 250
    assert chunk_of(1024, 50_304) == CHUNK // 2 and chunk_of(1000, 50_304) == 125
    assert chunk_of(1024, 128_256) * 128_256 <= MOST and chunk_of(2048, 2**25) == 1


def test_heads_that_do_not_fit_are_refused():
    hidden = jnp.ones((3, 2))
    with pytest.raises(
        AxisError, match=r"weight: expected \[vocab, embed\] with embed=2, got \[2, 5\]"
    ):
        Readout(hidden, jnp.ones((2, 5)), tied=True)
    with pytest.raises(AxisError, match=r"(?s)weight: .*bias: expected \[7\], got \[5\]"):
        Readout(hidden, jnp.ones((3, 7)), jnp.ones(5))


# Models --------------------------------------------------------------------------------------------


class Reader(own.Mixer):
    """A user's model that gives its hidden states and its head."""

    def readout(self, example):
        return Readout(self.blocks(self.words[example["tokens"]]), self.head)


def reader(*, key):
    mixer = own.mixer(2, 16, key=key)
    return Reader(mixer.blocks, mixer.words, mixer.head)


ENCODER = BERTConfig(
    layers=1, embed=16, heads=2, head_dim=8, mlp=16, vocab=384, positions=16, nsp_head=False
)
PAIR = T5Config(
    encoder_layers=1, decoder_layers=1, embed=16, heads=2, head_dim=8, mlp=16, vocab=384
)
LLAMA = LlamaConfig(layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16, vocab=384)
MODELS = {
    "GPT": (lambda key: GPT(SMALL, key=key), Causal(13), gj.msg(mlp=24, embed=24)),
    "GPT, untied": (
        lambda key: GPT(dataclasses.replace(SMALL, tied=False, bias=True), key=key),
        Causal(13, packing="concat"),
        gj.msg(embed=24),
    ),
    "Llama": (lambda key: Llama(LLAMA, key=key), Causal(13), gj.msg(mlp=24)),
    "BERT": (lambda key: BERT(ENCODER, key=key), MLM(13), gj.msg(embed=24)),
    "T5": (lambda key: T5(PAIR, key=key), UL2(13), gj.msg(mlp=24)),
    "own": (lambda key: reader(key=key), Causal(13, packing="concat"), gj.msg(hidden=24)),
}


def example_of(objective) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    tokenizer = ByteTokenizer(sentinels=objective.sentinels)
    size = objective.raw_length + objective.lookahead
    text = tokenizer.encode("".join(f"{n} and {n * n}. " for n in range(99)))[:size]
    window = Window(text, (np.arange(size) > 6).astype(np.int32))
    return jax.tree.map(jnp.asarray, objective(window, tokenizer.vocabulary, rng))


@pytest.mark.usefixtures("float64", "small_chunks")
@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_the_loss_of_its_logits(name):
    """Through every kind of objective, with gates closed, halfway and open."""
    make, objective, op = MODELS[name]
    example = example_of(objective)
    # One program: eagerly, each draw and move of a leaf would compile its own
    draw = lambda: gj.grow(op, make(jax.random.key(0)), key=jax.random.key(1))  # noqa: E731
    grown = eqx.filter_jit(draw)()

    @eqx.filter_jit
    def gradients(model, level):
        model = gj.ramp(model, level)

        def loss(trained, of):
            losses, weights = of(eqx.combine(trained, rest), example)
            return jnp.sum(losses * weights), losses

        trained, rest = gj.partition(model)
        return [
            jax.grad(loss, has_aux=True)(trained, of) for of in (cross_entropy, from_all_logits)
        ]

    for level in (0.0, 0.4, 1.0):
        (ours, found), (theirs, right) = gradients(grown, level)
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-12)
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-10)


def from_all_logits(model, example):
    return by_hand(predictions(model, example), example["targets"]), example["weights"]


@pytest.mark.usefixtures("small_chunks")
def test_what_hides_behind_closed_gates_never_shows_in_a_bit(key):
    example, losses = example_of(Causal(13)), []
    for fill in (0.0, 42.0, 1000.0):
        op = gj.msg(
            embed=24, mlp=24, init=lambda key, shape, dtype, x=fill: jnp.full(shape, x, dtype)
        )
        grown = gj.grow(op, GPT(SMALL, key=key), key=key)
        losses.append(eqx.filter_jit(cross_entropy)(gj.ramp(grown, 0.0), example)[0])
    assert np.isfinite(losses).all() and (losses[0] == losses[1]).all()
    assert (losses[1] == losses[2]).all()


def test_labels_are_drawn_alike_however_many_tokens_are_read(monkeypatch, key):
    model, example = GPT(SMALL, key=key), example_of(Causal(13))
    example["key"] = jax.random.key_data(key)
    whole, _ = drawn_loss(model, example)
    monkeypatch.setattr("growjax.nn.head.LARGE", 0)
    monkeypatch.setattr("growjax.nn.head.CHUNK", 5)
    np.testing.assert_allclose(drawn_loss(model, example)[0], whole, rtol=1e-5)
    other = drawn_loss(model, {**example, "key": jax.random.key_data(jax.random.key(9))})[0]
    assert np.abs(other - whole).max() > 0.01


@pytest.mark.usefixtures("small_chunks")
def test_likelihoods_are_those_of_all_logits(monkeypatch, key):
    pairs = [("7 and 49 is", " 56"), ("", "7 and 49"), ("a", "zz")]
    model = GPT(SMALL, key=key)
    likelihoods = LanguageModel(model, ByteTokenizer()).loglikelihoods(pairs)
    jax.clear_caches()
    monkeypatch.setattr("growjax.nn.head.LARGE", LARGE)
    whole = LanguageModel(model, ByteTokenizer()).loglikelihoods(pairs)
    jax.clear_caches()
    np.testing.assert_allclose(
        [s.logprob for s in likelihoods], [s.logprob for s in whole], rtol=1e-5
    )
    assert [s.greedy for s in likelihoods] == [s.greedy for s in whole]


@pytest.mark.usefixtures("small_chunks")
def test_a_subclass_with_other_logits_is_read_by_these(key):
    class Bold(GPT):
        def predict(self, example):
            return 2 * super().predict(example)

    class Loud(GPT):
        def __call__(self, tokens, **how):
            return 2 * super().__call__(tokens, **how)

    class Plain(GPT):
        """As its parent."""

    example = example_of(Causal(13))
    expected = by_hand(2 * predictions(GPT(SMALL, key=key), example), example["targets"])
    bold, loud, same = (cls(SMALL, key=key) for cls in subclasses(Bold, Loud, Plain))
    for model in (bold, loud):
        np.testing.assert_allclose(cross_entropy(model, example)[0], expected, rtol=1e-5)
    assert "scan" in str(jax.make_jaxpr(lambda: cross_entropy(same, example))())


def subclasses(*classes: Any) -> tuple[Any, ...]:
    return classes


def test_a_readout_that_is_none_is_refused(key):
    class Wrong(Reader):
        def readout(self, example):
            return self.head

    mixer = own.mixer(2, 16, key=key)
    example = example_of(Causal(13, packing="concat"))
    with pytest.raises(PlanError, match="Wrong.readout: expected a growjax.nn.Readout, got"):
        read_tokens(cross_entropies, Wrong(mixer.blocks, mixer.words, mixer.head), example)


# On many devices -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layouts():
    """Losses under every layout, in a process that has eight devices."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hosts", "heads"],
        env={**os.environ, **SEVERAL_DEVICES, "JAX_NUM_CPU_DEVICES": "8"},
        cwd=Path(gj.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_every_layout_gives_the_losses_of_all_logits(layouts, head):
    """The vocabulary split over devices among them; the later steps show the gradients."""
    whole = layouts[head].pop("whole")
    assert len(layouts[head]) == {"tied": 6, "untied": 3}[head] and whole[2] < whole[0]
    for layout, losses in layouts[head].items():
        np.testing.assert_allclose(losses, whole, rtol=2e-5, err_msg=layout)


# What it takes -------------------------------------------------------------------------------------


LONG = dataclasses.replace(SMALL, vocab=9001, positions=64, remat="nothing")


def largest(jaxpr) -> int:
    """The number of elements of the largest array in a program, and in those inside it."""
    most = max((v.aval.size for e in jaxpr.eqns for v in e.outvars), default=0)
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                most = max(most, largest(inner)) if hasattr(inner, "eqns") else most
    return most


def test_all_logits_are_never_there_at_once(monkeypatch, key):
    """Forward and backward: in the program as it is traced, and in the memory of the compiled one."""
    monkeypatch.setattr("growjax.nn.head.LARGE", 2**19)
    monkeypatch.setattr("growjax.nn.head.CHUNK", 8)
    model, rows = GPT(LONG, key=key), batch_shapes(Causal(64), 4)

    def gradient(of):
        def loss(trained, rest, rows):
            model = eqx.combine(trained, rest)
            return jnp.sum(jax.vmap(lambda row: of(model, row)[0])(rows))

        return jax.jit(jax.grad(loss)).trace(*gj.partition(model), rows)

    logits = 4 * 64 * 9001
    chunked, whole = gradient(cross_entropy), gradient(from_all_logits)
    assert largest(whole.jaxpr) >= logits > 4 * largest(chunked.jaxpr)
    compiled: Any = [x.lower().compile().memory_analysis() for x in (chunked, whole)]
    small, large = (x.temp_size_in_bytes for x in compiled)
    assert small < 4 * logits < large and large > 3 * small


def test_a_run_is_charged_the_same_and_as_xla_counts(monkeypatch):
    """Whatever the chunk, and lengths that it does not divide."""
    whole = plan(steps(2), objective=Causal(13), batch=4)
    before = [training_flops_per_token(whole.build(), 13), whole.flops]
    tokens = jax.ShapeDtypeStruct((13,), "int32")
    rows = {"tokens": tokens, "targets": tokens, "weights": tokens}
    count = flops(cross_entropy, whole.build(), rows)
    monkeypatch.setattr("growjax.nn.head.LARGE", 0)
    monkeypatch.setattr("growjax.nn.head.CHUNK", 4)
    jax.clear_caches()
    chunked = plan(steps(2), objective=Causal(13), batch=4)
    assert [training_flops_per_token(chunked.build(), 13), chunked.flops] == before
    assert flops(cross_entropy, chunked.build(), rows) == count
    forecast = dry_run(chunked)
    forecast.check()
    assert forecast.stages[0].xla_ratio == pytest.approx(1, rel=0.02)
