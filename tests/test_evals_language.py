"""Likelihoods against models called one sequence at a time, and BLiMP on grammars that are known."""

import json
import math
import tarfile
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from growjax.data import ByteTokenizer
from growjax.errors import DataError, EvalError
from growjax.evals import LanguageModel, bits_per_byte, blimp, masked_bits
from growjax.evals import language as rooms
from growjax.models import (
    BERT,
    GPT,
    T5,
    BERTConfig,
    GPTConfig,
    Labels,
    Llama,
    LlamaConfig,
    T5Config,
)


TOKENIZER = ByteTokenizer(sentinels=0, multiple=1)
SPECIAL = TOKENIZER.vocabulary.specials
V = TOKENIZER.vocabulary.size
SIZES: dict = dict(embed=16, heads=2, head_dim=8, mlp=24, vocab=V)
KEY = jax.random.key(3)


def sharp(model):
    """Weights so large that tokens differ in likelihood by whole nats."""
    trained, rest = eqx.partition(model, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(lambda x: 3 * x, trained), rest)


GPT_32 = sharp(GPT(GPTConfig(layers=2, positions=32, **SIZES), key=KEY))
LLAMA = sharp(Llama(LlamaConfig(layers=2, kv_heads=1, **SIZES), key=KEY))
BERT_32 = sharp(BERT(BERTConfig(layers=2, positions=32, **SIZES), key=KEY))
PAIRS = T5(T5Config(encoder_layers=1, decoder_layers=2, **SIZES), key=KEY)
TEXTS = [("The cat", " sat"), ("", "x"), ("On a mat of straw ", "it lay"), ("b" * 40, "a cat")]


def likelihood(logits, targets):
    """The sum of log-probabilities, and whether each target is the largest."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    greedy = bool(np.all(logits.argmax(-1) == targets))
    return sum(logp[i, t] for i, t in enumerate(targets)), greedy


def run(model, *rows) -> Any:
    """What a model makes of one sequence or pair, in one shape for all lengths."""
    length = len(rows[-1])
    padded = [np.array([*row, *[0] * (32 - len(row))]) for row in rows]
    real = np.arange(32) < len(rows[0])
    masks = {BERT: {"mask": real}, T5: {"encoder_mask": real}}.get(type(model), {})
    return jax.tree.map(lambda x: x[:length], eqx.filter_jit(model)(*padded, **masks))


def agree(ours, expected):
    assert [s.greedy for s in ours] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([s.logprob for s in ours], [e for e, _ in expected], rtol=2e-5)


def encoded(context, continuation):
    spaces = len(context) - len(context.rstrip())
    cut = len(context) - spaces
    return [*context[:cut].encode()], [*(context[cut:] + continuation).encode()]


@pytest.mark.parametrize("model, window", [(GPT_32, 32), (LLAMA, 20)])
def test_decoders(model, window):
    language = LanguageModel(model, TOKENIZER, longest=None if window == 32 else window)
    assert language.window == window
    expected = []
    for before, after in [encoded(*text) for text in TEXTS]:
        whole = [*(before or [SPECIAL["eos"]]), *after][-(window + 1) :]
        expected.append(likelihood(run(model, whole[:-1])[-len(after) :], whole[-len(after) :]))
    agree(language.loglikelihoods(TEXTS), expected)


class Framed(ByteTokenizer):
    """Files that put `bos` before a text."""

    @property
    def prefix(self):
        return (self.vocabulary.specials["bos"],)


def test_a_framed_text_begins_as_the_files_say():
    language = LanguageModel(LLAMA, Framed(sentinels=0, multiple=1), framed=True)
    bos, eos = SPECIAL["bos"], SPECIAL["eos"]
    assert language.first == bos and LanguageModel(LLAMA, TOKENIZER).first == eos
    assert language.encode_pair("a", "b") == ([bos, *b"a"], [*b"b"])
    # Nor twice, where the prompt spells it; an empty context is bos by itself
    assert language.encode_pair("<bos>a", "b") == ([bos, *b"a"], [*b"b"])
    assert language.encode_pair("", "b") == ([], [*b"b"])
    assert LanguageModel(LLAMA, language.tokenizer).encode_pair("a", "b") == ([*b"a"], [*b"b"])
    expected = []
    for before, after in [encoded(*text) for text in TEXTS[:3]]:
        whole = [bos, *before, *after]
        expected.append(likelihood(run(LLAMA, whole[:-1])[-len(after) :], whole[-len(after) :]))
    agree(language.loglikelihoods(TEXTS[:3]), expected)
    # A document is text, whatever it spells
    assert language.encode("<bos>") == [*b"<bos>"]


@pytest.mark.parametrize("model, room", [(GPT_32, 32), (PAIRS, 24), (BERT_32, 30)])
def test_a_continuation_that_does_not_fit_is_refused(model, room):
    language = LanguageModel(model, TOKENIZER, longest=24 if model is PAIRS else None)
    with pytest.raises(
        EvalError, match=rf"one has {room + 1} tokens, .* at most {room} in a window"
    ):
        language.loglikelihoods([("a", "b"), ("a", "b" * (room + 1))])


def test_greedy_is_what_the_model_would_say():
    language = LanguageModel(GPT_32, TOKENIZER)
    tokens = [*b"abc"]
    for _ in range(3):
        tokens.append(int(run(GPT_32, tokens)[-1].argmax()))
    (score,) = language.loglikelihoods_of_tokens([([*b"abc"], tokens[3:])])
    assert score.greedy
    wrong = [*tokens[3:5], (tokens[5] + 1) % V]
    assert not language.loglikelihoods_of_tokens([([*b"abc"], wrong)])[0].greedy


def test_pairs():
    language, expected = LanguageModel(PAIRS, TOKENIZER, longest=24), []
    for before, after in [encoded(*text) for text in TEXTS]:
        shifted = [SPECIAL["pad"], *after[:-1]]
        logits = run(PAIRS, [*before[-23:], SPECIAL["eos"]], shifted)
        expected.append(likelihood(logits, after))
    agree(language.loglikelihoods(TEXTS), expected)


def test_encoders_mask_one_token_at_a_time():
    language, expected = LanguageModel(BERT_32, TOKENIZER), []
    for before, after in [encoded(*text) for text in TEXTS]:
        whole = [SPECIAL["cls"], *[*before, *after][-30:], SPECIAL["sep"]]
        total, greedy = 0.0, True
        for place in range(len(whole) - 1 - len(after), len(whole) - 1):
            hidden = [SPECIAL["mask"] if i == place else t for i, t in enumerate(whole)]
            one, best = likelihood(run(BERT_32, hidden).mlm_logits[place][None], [whole[place]])
            total, greedy = total + one, greedy and best
        expected.append((total, greedy))
    agree(language.loglikelihoods(TEXTS), expected)


def test_shapes_are_few():
    """Requests of 40 lengths, in any order, compile one program for each of four buckets."""
    language = LanguageModel(GPT(GPTConfig(layers=1, positions=64, **SIZES), key=KEY), TOKENIZER)
    requests = [("a" * (1 + i % 40), "b" * (1 + i % 7)) for i in range(300)]
    with CountTraces() as traces:
        scores = language.loglikelihoods(requests)
        assert traces.count == 4
        again = language.loglikelihoods(requests[::-1])
        assert traces.count == 4
    assert again[::-1] == scores


def test_lengths_are_padded_by_half_at_most():
    lengths = [rooms.bucket(n) for n in range(1, 129)]
    assert sorted(set(lengths)) == [16, 24, 32, 48, 64, 96, 128]
    assert all(n <= length <= max(16, 1.5 * n) for n, length in enumerate(lengths, 1))


def test_batches_are_nearly_full_and_their_sizes_few():
    assert [rooms.batch_rows(n, 32) for n in (1, 5, 32, 33, 48, 1000)] == [1, 5, 32, 20, 24, 32]
    assert rooms.batch_rows(7, 0) == 1
    for members in range(1, 400):
        rows = rooms.batch_rows(members, 64)
        assert -(-members // rows) * rows <= max(1.25 * members, members + 1)
    assert {rooms.batch_rows(n, 64) for n in range(600, 2000)} == {64}


class CountTraces:
    """How often a program of this room is traced, and so compiled."""

    def __enter__(self):
        self.count, self.real = 0, rooms.read_tokens

        def counted(*args):
            self.count += 1
            return self.real(*args)

        rooms.read_tokens = counted
        return self

    def __exit__(self, *_):
        rooms.read_tokens = self.real


def test_batches_do_not_change_likelihoods():
    whole = LanguageModel(GPT_32, TOKENIZER).loglikelihoods(TEXTS * 3)
    single = LanguageModel(GPT_32, TOKENIZER, batch_tokens=1).loglikelihoods(TEXTS)
    np.testing.assert_allclose(
        [s.logprob for s in whole], 3 * [s.logprob for s in single], rtol=1e-5
    )


# Bits --------------------------------------------------------------------------------------------


def test_bits_per_byte_by_hand():
    """Windows of 32: every byte is predicted once; the last window reaches back."""
    text = "The quick brown fox jumps over the lazy d\u00f6g"
    tokens = [SPECIAL["eos"], *text.encode()]
    total = 0.0
    total += likelihood(run(GPT_32, tokens[:32]), tokens[1:33])[0]
    total += likelihood(run(GPT_32, tokens[-33:-1])[-12:], tokens[-12:])[0]
    measured = bits_per_byte(LanguageModel(GPT_32, TOKENIZER), [text])
    assert measured["bytes"] == measured["tokens"] == len(text) + 1 == 44
    assert measured["bits_per_byte"] == pytest.approx(-total / 44 / math.log(2), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(-total / 44), rel=1e-5)


def test_a_model_of_nothing_needs_the_whole_alphabet():
    flat = eqx.tree_at(lambda m: m.embedding.table, LLAMA, jnp.zeros((V, 16)))
    flat = eqx.tree_at(lambda m: m.head, flat, jnp.zeros((16, V)))
    measured = bits_per_byte(LanguageModel(flat, TOKENIZER), ["any text", "at all"])
    assert measured["bits_per_byte"] == pytest.approx(math.log2(V), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(V, rel=1e-4)


def test_rows_are_not_padded_beyond_the_positions():
    few = GPT(GPTConfig(layers=2, positions=20, **SIZES), key=KEY)
    assert LanguageModel(few, TOKENIZER).rolling(["a" * 20])[0] < 0
    robust = BERT(BERTConfig(layers=2, positions=22, padding=1, **SIZES), key=KEY)
    language = LanguageModel(robust, TOKENIZER)
    assert language.window == rooms.usable_positions(robust) == 20
    assert masked_bits(language, ["a" * 30])["tokens"] > 0
    assert [rooms.bucket(n, 20) for n in (3, 17, 20)] == [16, 20, 20]


def test_masked_bits():
    language = LanguageModel(BERT_32, TOKENIZER)
    text = "It was a bright cold day in April, and the clocks were striking thirteen."
    measured = masked_bits(language, [text], seed=1)
    assert measured == masked_bits(language, [text], seed=1)
    assert measured["masked_bits"] != masked_bits(language, [text], seed=2)["masked_bits"]
    # Windows of 30, 30 and 13 tokens and two special ones: round(.15 * 32) twice, round(.15 * 15)
    assert measured["tokens"] == 5 + 5 + 2
    silent = eqx.tree_at(lambda m: m.mlm.decoder_bias, BERT_32, jnp.zeros(V).at[32].set(1e4))
    sure = masked_bits(LanguageModel(silent, TOKENIZER), [" " * 70])
    assert sure["masked_bits"] == pytest.approx(0, abs=1e-3) and sure["accuracy"] == 1


def test_each_kind_has_its_own_bits():
    with pytest.raises(EvalError, match="an encoder has masked_bits"):
        bits_per_byte(LanguageModel(BERT_32, TOKENIZER), ["a"])
    with pytest.raises(EvalError, match="a decoder has bits_per_byte"):
        masked_bits(LanguageModel(GPT_32, TOKENIZER), ["a"])
    with pytest.raises(EvalError, match="expected some text"):
        bits_per_byte(LanguageModel(GPT_32, TOKENIZER), [""])


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        EvalError, match="its largest token is 383, and the embedding .* has 265 rows"
    ):
        LanguageModel(GPT_32, ByteTokenizer())
    headless = BERT(BERTConfig(layers=1, positions=8, mlm_head=False, **SIZES), key=KEY)
    with pytest.raises(EvalError, match="expected one with mlm_head=True"):
        LanguageModel(headless, TOKENIZER)
    labelled = GPT(GPTConfig(layers=1, positions=8, head=Labels(3), **SIZES), key=KEY)
    with pytest.raises(EvalError, match="with its head of words, and this one has none"):
        LanguageModel(labelled, TOKENIZER)

    class Bare:
        vocabulary = type(TOKENIZER.vocabulary)("d", "ww", {})

    with pytest.raises(DataError, match="mask"):
        LanguageModel(BERT_32, Bare())  # type: ignore[arg-type]


# BLiMP -------------------------------------------------------------------------------------------


def write_pairs(folder, name, term, pairs):
    rows = [{"sentence_good": g, "sentence_bad": b, "linguistics_term": term} for g, b in pairs]
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def pairs(tmp_path):
    """Two phenomena; good sentences have an "a" where the bad ones have a "z"."""
    folder = tmp_path / "data"
    write_pairs(folder, "one", "islands", [("an a", "an z"), ("z to a", "z to z")])
    write_pairs(folder, "two", "islands", [("b a", "b z"), ("z", "a"), ("a", "z"), ("q", "q")])
    write_pairs(folder, "three", "s-selection", [("z", "a")])
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_blimp(kind, packed, pairs, tmp_path):
    """A model that prefers "a" to "z" everywhere; the tie counts as wrong."""
    bias = jnp.zeros(V).at[ord("a")].set(9.0).at[ord("z")].set(-9.0)
    if kind == "causal":
        model = eqx.tree_at(lambda m: m.norm.bias, GPT_32, jnp.ones(16) * 5)
        table = 0.01 * model.embedding.table + bias[:, None]
        model = eqx.tree_at(lambda m: m.embedding.table, model, table)
    else:
        model = eqx.tree_at(lambda m: m.mlm.decoder_bias, BERT_32, bias * 10)
    path = pairs
    if packed:
        path = tmp_path / "blimp.tar.xz"
        with tarfile.open(path, "w:xz") as archive:
            archive.add(pairs, "blimp/data")
    language = LanguageModel(model, TOKENIZER)
    measured = blimp(language, path)
    assert measured == {
        "accuracy": (1 + 1 / 2 + 0) / 3,
        "phenomenon/argument_structure": 0.0,
        "phenomenon/islands": 0.75,
        "paradigm/one": 1.0,
        "paradigm/three": 0.0,
        "paradigm/two": 0.5,
    }
    assert blimp(language, path, limit=1)["accuracy"] == 2 / 3


def test_blimp_needs_its_files(tmp_path):
    language = LanguageModel(GPT_32, TOKENIZER)
    with pytest.raises(EvalError, match="got none"):
        blimp(language, tmp_path)
    with pytest.raises(EvalError, match="expected a folder or a tar archive"):
        blimp(language, tmp_path / "missing")
    (tmp_path / "x.jsonl").write_text('{"good": "a"}\n')
    with pytest.raises(EvalError, match="x has no 'sentence_good'"):
        blimp(language, tmp_path)
