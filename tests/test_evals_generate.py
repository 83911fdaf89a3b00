"""Caches: a model that goes on where it was is the model that read everything at once."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax.axes import axes_of, put
from growjax.data import ByteTokenizer
from growjax.errors import AxisError, EvalError
from growjax.evals import LanguageModel, generate
from growjax.evals import generate as room
from growjax.models import (
    BERT,
    GPT,
    T5,
    BERTConfig,
    Decoder,
    DecoderConfig,
    GPTConfig,
    Llama,
    LlamaConfig,
    Sight,
    T5Config,
)
from growjax.nn import LongRotary
from growjax.testing import randomise


TOKENIZER = ByteTokenizer(sentinels=0, multiple=1)
SPECIAL = TOKENIZER.vocabulary.specials
V = TOKENIZER.vocabulary.size
SIZES: dict = dict(embed=8, heads=4, head_dim=4, mlp=12, vocab=V)
TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5])
SOURCE = np.array([8, 9, 7, 9, 3, 2, 0])

CASES: dict[str, Any] = {
    "gpt": (GPT, GPTConfig(layers=2, positions=64, **SIZES)),
    "gpt, post-norm": (GPT, GPTConfig(layers=2, positions=64, post_norm=True, **SIZES)),
    "gpt, rotary, QK-norm": (
        GPT,
        GPTConfig(layers=2, positions=64, position="rotary", qk_norm=True, tied=False, **SIZES),
    ),
    "llama, grouped": (Llama, LlamaConfig(layers=2, kv_heads=2, **SIZES)),
    "t5": (T5, T5Config(encoder_layers=1, decoder_layers=2, buckets=4, max_distance=6, **SIZES)),
}


def build(name: str) -> Any:
    """A model whose every parameter is off its initial value."""
    rng, (model, config) = np.random.default_rng(4), CASES[name]
    made = eqx.filter_eval_shape(model, config, key=jax.random.key(0))
    slots = [s for s in axes_of(made).values() if s.kind == "param" and s.value is not None]
    made = put(made, {s.steps: jnp.asarray(0.5 * rng.normal(size=s.value.shape)) for s in slots})
    real = eqx.filter_jit(model)(config, key=jax.random.key(0))
    return put(made, {s.steps: s.value for s in axes_of(real).of_kind("buffer")})


def whole(model, tokens):
    args = (SOURCE, tokens) if isinstance(model, T5) else (tokens,)
    kwargs = {"encoder_mask": SOURCE > 2} if isinstance(model, T5) else {}
    return eqx.filter_jit(model)(*map(jnp.asarray, args), **kwargs)


@eqx.filter_jit
def extend(model, tokens, cache, at):
    return model.extend(tokens, cache, at)


def in_parts(model, tokens, cuts, size=16):
    """Logits of a text that is read part by part."""
    if isinstance(model, T5):
        cache = model.cache(jnp.asarray(SOURCE), size, encoder_mask=jnp.asarray(SOURCE > 2))
    else:
        cache = model.cache(size)
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        logits, cache = extend(model, jnp.asarray(tokens[start:end]), cache, jnp.int32(start))
        parts.append(logits)
    return np.concatenate(parts)


@pytest.mark.parametrize("name", CASES)
def test_a_text_in_parts_is_the_text(name):
    with jax.enable_x64(True):
        model = build(name)
        expected = np.asarray(whole(model, TOKENS))
        assert expected.dtype == np.float64
        for cuts in ([4, 8], [1, 5]):
            ours = in_parts(model, TOKENS, cuts)
            assert np.abs(ours - expected).max() <= 1e-12 * np.abs(expected).max()


def test_gates_branches_and_skipped_layers_are_as_they_were():
    with jax.enable_x64(True):
        model = build("gpt")
        op = gj.chain(gj.msg(embed=10, mlp=14, heads=6), gj.msg(layers=3))
        grown = gj.ramp(gj.grow(op, model, key=jax.random.key(1)), 0.4)
        extra = dict(branch=jnp.array([0.5, 1.5, 2.0]), active=jnp.array([True, False, True]))
        for field, value in extra.items():
            grown = eqx.tree_at(
                lambda m, f=field: getattr(m.blocks, f), grown, value, is_leaf=lambda x: x is None
            )
        expected = whole(grown, TOKENS)
        ours = in_parts(grown, TOKENS, [3, 7])
        assert np.abs(ours - expected).max() <= 1e-12 * np.abs(expected).max()
        assert np.abs(expected - whole(model, TOKENS)).max() > 0.1


def test_what_comes_later_in_a_cache_is_not_seen():
    """Padding leaves keys and values behind; the next tokens are put over them one by one."""
    model = build("llama, grouped")
    dirty = jax.tree.map(lambda x: jnp.full_like(x, 9.0), model.cache(16))
    scores = [extend(model, jnp.asarray(TOKENS), cache, 0)[0] for cache in (dirty, model.cache(16))]
    assert np.array_equal(*scores)


def test_cross_attention_needs_something_to_read():
    model, x = build("t5"), jnp.ones((1, SIZES["embed"]))
    with pytest.raises(AxisError, match="memory: expected keys and values for the cross-attention"):
        model.decoder.extend(x, model.cache(jnp.asarray(SOURCE), 16).seen, None, 0)


def test_caches_in_bfloat16():
    model, config = CASES["llama, grouped"]
    half = model(dataclasses.replace(config, dtype="bfloat16"), key=jax.random.key(0))
    assert half.cache(8).keys.dtype == jnp.bfloat16
    expected = np.asarray(whole(half, TOKENS))
    error = np.abs(in_parts(half, TOKENS, [4, 8]) - expected).max()
    assert error <= 0.02 * np.abs(expected).max()


# Texts -------------------------------------------------------------------------------------------


PROMPTS = ["ab", "", "The quick brown", "x" * 70, "ab"]


def naive(model, prompt, new, pair=False):
    """The likeliest token after everything so far, again and again."""
    tokens = [*prompt.encode()][-(64 - new) :] or [SPECIAL["eos"]]
    read, tokens = (tokens, [SPECIAL["pad"]]) if pair else ([], tokens)
    forward, first = eqx.filter_jit(model), len(tokens)
    for _ in range(new):
        padded = jnp.array([*tokens, *[0] * (64 - len(tokens))])
        args = (jnp.array([*read, SPECIAL["eos"]]), padded) if pair else (padded,)
        tokens.append(int(forward(*args)[len(tokens) - 1].argmax()))
    written = tokens[first:]
    end = written.index(SPECIAL["eos"]) if SPECIAL["eos"] in written else new
    return TOKENIZER.decode([t for t in written[:end] if t < 256])


@pytest.mark.parametrize("name", ["gpt", "llama, grouped", "t5"])
def test_generate_is_the_naive_loop(name):
    model = build(name)
    language = LanguageModel(model, TOKENIZER, longest=64)
    prompts = PROMPTS if name != "t5" else PROMPTS[:3]
    expected = [naive(model, prompt, 20, name == "t5") for prompt in prompts]
    assert len(set(expected)) > 2
    assert generate(language, prompts, new=20) == expected


class Loop(eqx.Module):
    """Writes its alphabet in a circle, whatever else it reads: the token after `t` is `follow[t]`."""

    embedding: gj.nn.Embedding
    follow: Any = gj.buffer("[vocab]")

    def cache(self, size):
        return jnp.zeros(size)

    def extend(self, tokens, cache, at):
        return jax.nn.one_hot(self.follow[tokens], V) * 20.0, cache

    def __call__(self, tokens):
        return jax.nn.one_hot(self.follow[tokens], V) * 20.0


def looping(text, end=None):
    """A model that goes on with the text from wherever it is."""
    follow = np.full(V, ord("?"))
    for one, other in zip(text, text[1:] + text[:1], strict=True):
        follow[ord(one)] = ord(other)
    if end is not None:
        follow[ord(end)] = SPECIAL["eos"]
    table = gj.nn.Embedding(V, 4, key=jax.random.key(0))
    return LanguageModel(Loop(table, jnp.array(follow)), TOKENIZER, longest=64)


def test_a_text_ends_where_it_should():
    language = looping("abcdefgh")
    assert generate(language, ["a", "xxg"], new=5) == ["bcdef", "habcd"]
    assert generate(language, ["a", "b"], new=30, until=["efg", "d"]) == ["bc", "c"]
    assert generate(language, ["a"], new=20, until=["xyz"]) == ["bcdefghabcdefghabcde"]
    assert generate(looping("abcdefgh", "f"), ["a", "g"], new=30) == ["bcdef", "habcdef"]


def test_it_stops_working_when_all_texts_have_ended(monkeypatch):
    calls, write = [], room.__globals__["_write"]
    monkeypatch.setitem(room.__globals__, "_write", lambda *a: calls.append(1) or write(*a))
    assert generate(looping("abcdefgh"), ["a"], new=48, until=["d"]) == ["bc"]
    assert len(calls) == 1
    generate(looping("abcdefgh"), ["a"], new=48)
    assert len(calls) == 4


def test_a_batch_of_caches_has_its_layers_first():
    """A scan over layers takes them first; anything else would be turned around for every token."""
    inner = room.__globals__
    one = inner["_read"](build("gpt"), jnp.zeros((3, 5), int), 16)
    assert one.keys.shape == one.values.shape == (2, 3, 4, 16, 4)
    real = jnp.ones((3, 5), bool)
    pair = inner["_read_pair"](build("t5"), jnp.zeros((3, 5), int), real, 16)
    assert pair.seen.keys.shape == (2, 3, 4, 16, 4) and pair.crossed.keys.shape == (2, 3, 4, 5, 4)
    start = jnp.zeros(3, int)
    keys = jax.random.split(jax.random.key(0), 3)
    for name, cache in (("gpt", one), ("t5", pair)):
        draws = inner["_Draws"](jnp.float32(0), None, None)
        _, after = inner["_write"](build(name), cache, start, start, keys, draws)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, cache)


def test_short_prompts_go_along_with_long_ones(monkeypatch):
    """A step costs as much for one text as for many, so batches are few; answers keep their order."""
    widths, batch = [], room.__globals__["_batch"]

    def counted(language, prompts, width, *more):
        widths.append((len(prompts), width))
        return batch(language, prompts, width, *more)

    monkeypatch.setitem(room.__globals__, "_batch", counted)
    prompts = ["x" * n + "abcdefgh"[n % 8] for n in (1, 40, 3, 20, 2)]
    answers = generate(looping("abcdefgh"), prompts, new=2)
    assert answers == ["cd", "bc", "ef", "fg", "de"]
    assert widths == [(5, 48)]
    # 1,000 tokens hold 20 rows of 48 + 2, and three batches of 14 are as few; then 55 of 16 + 2
    language = looping("abcdefgh")
    object.__setattr__(language, "batch_tokens", 1000)
    widths.clear()
    assert (
        generate(language, [prompts[1]] * 12 + [prompts[0]] * 30, new=2)
        == ["bc"] * 12 + ["cd"] * 30
    )
    assert widths == [(14, 48), (28, 16)]


def test_prompts_on_both_sides_of_long_rotary_positions_are_read_apart():
    """Padding would make a short prompt a long one, whose positions are others."""

    def language(length):
        scaling = LongRotary((1.0, 2.0), (30.0, 4.0), length=length, magnitude=1.5)
        config = DecoderConfig(layers=1, kv_heads=2, pattern=(Sight(scaling=scaling),), **SIZES)
        made = Decoder(config, key=jax.random.key(0))
        return LanguageModel(randomise(made), TOKENIZER, longest=64)

    # 17 tokens would be padded to 24
    model, prompts = language(20), ["0123456789abcdefg", "y" * 33, "go on"]
    expected = generate(language(64), [prompts[0], prompts[2]], new=4)
    expected.insert(1, generate(language(1), [prompts[1]], new=4)[0])
    assert generate(model, prompts, new=4) == expected
    others = generate(language(1), prompts, new=4)
    assert expected[0] != others[0]
    with pytest.raises(EvalError, match="a prompt of 17 tokens and 5 new ones cross 20 tokens"):
        generate(model, prompts, new=5)


def test_drawing():
    """Drawn by likelihood: at a high temperature anything, at a low one what is likeliest."""
    language, key = looping("abcdefgh"), jax.random.key(5)
    cold = generate(language, ["a"], new=20, temperature=0.1, key=key)
    assert cold == generate(language, ["a"], new=20)
    hot = generate(language, ["a", "b", "a"], new=20, temperature=50.0, key=key)
    assert len(set(hot)) == 3
    assert generate(language, ["a"], new=20, temperature=50.0, key=key) == hot[:1]
    assert generate(language, ["a"], new=20, temperature=50.0, key=jax.random.key(6)) != hot[:1]


def test_drawing_among_the_likeliest():
    language, key = looping("abcdefgh"), jax.random.key(5)
    hot: dict = {"new": 20, "temperature": 50.0, "key": key}
    expected, free = generate(language, ["a"], new=20), generate(language, ["a"], **hot)
    # One token stays: the likeliest. A limit of neither kind draws as no limit
    assert generate(language, ["a"], top_k=1, **hot) == expected != free
    assert generate(language, ["a"], top_p=1e-4, **hot) == expected
    assert generate(language, ["a"], top_k=V, **hot) == free
    wrong: tuple[dict[str, Any], ...] = ({"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5})
    for limits in wrong:
        with pytest.raises(EvalError, match="an integer from 0 and a number above 0"):
            generate(language, ["a"], **hot, **limits)


def test_the_nucleus_is_of_what_top_k_leaves():
    scores = jnp.log(jnp.array([0.1, 0.4, 0.05, 0.3, 0.15]))

    def left(top_k, top_p):
        limited = room.__globals__["limited"](scores, jnp.int32(top_k), jnp.float32(top_p))
        stay = np.asarray(limited) > -np.inf
        np.testing.assert_array_equal(limited[stay], scores[stay])
        return np.flatnonzero(stay).tolist()

    assert left(0, 1.0) == [0, 1, 2, 3, 4] and left(2, 1.0) == [1, 3]
    assert left(0, 0.39) == [1] and left(0, 0.41) == [1, 3] and left(0, 0.72) == [1, 3, 4]
    # 0.4 of the 0.7 that two tokens have is more than half
    assert left(2, 0.55) == [1] and left(2, 0.6) == [1, 3]
    assert left(9, 1.0) == [0, 1, 2, 3, 4]


class Ends(ByteTokenizer):
    """Files that name two ends, of which neither is eos."""

    @property
    def ends(self):
        return (ord("d"), SPECIAL["sep"])


def test_a_text_ends_at_any_of_the_ends():
    language = looping("abcdefgh")
    two = LanguageModel(language.model, Ends(sentinels=0, multiple=1), longest=64)
    assert generate(two, ["a"], new=20) == ["bc"]
    # eos, which these files do not name, is not text either
    assert generate(looping("abcdefgh", "f"), ["g"], new=30) == ["habcdef"]


def test_what_cannot_be_written_is_refused():
    language = looping("ab")
    with pytest.raises(EvalError, match="from 1 to 63 tokens"):
        generate(language, ["a"], new=64)
    with pytest.raises(EvalError, match="needs a `key`"):
        generate(language, ["a"], new=2, temperature=1.0)
    encoder = BERT(BERTConfig(layers=1, positions=8, **SIZES), key=jax.random.key(0))
    with pytest.raises(EvalError, match="an encoder does not write"):
        generate(LanguageModel(encoder, TOKENIZER), ["a"], new=2)
