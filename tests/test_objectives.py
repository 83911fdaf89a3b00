"""Objectives: what is cut out can be put back, counts are exact, draws are uniform, shapes are fixed."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from scipy import stats

from growjax.data import (
    MLM,
    UL2,
    ByteTokenizer,
    Causal,
    Denoiser,
    PrefixLM,
    SpanCorruption,
    Vocabulary,
    Window,
    batch_shapes,
    restore,
)
from growjax.data.denoising import (
    DENOISERS,
    corrupt,
    partition,
    span_counts,
    span_lengths,
    span_mask,
)
from growjax.errors import DataError


V = ByteTokenizer(sentinels=600).vocabulary
S0 = V.sentinels[0]
PAD, EOS, MASK = (V.specials[name] for name in ("pad", "eos", "mask"))

# Two letters a word: `w` starts it, `c` continues it
PAIRS = Vocabulary("pairs", "." * 4 + "wc" * 20, {"pad": 0, "mask": 1, "cls": 2, "sep": 3})

seeds = st.integers(0, 2**32 - 1)
rates = st.floats(0.02, 0.95)
spans = st.floats(1.0, 70.0)
MODES = st.sampled_from(["exact", "bernoulli"])


def rng(seed=0):
    return np.random.default_rng(seed)


def window(length, seed=0, documents=None, vocabulary=V):
    tokens = rng(seed).choice(vocabulary.text_ids, length).astype(np.int32)
    blank = np.zeros(length, np.int32)
    return Window(tokens, blank if documents is None else np.asarray(documents, np.int32))


def example(objective, seed=0, vocabulary=V, of=None):
    whole = objective.raw_length + objective.lookahead
    return objective(of or window(whole, seed, vocabulary=vocabulary), vocabulary, rng(seed))


def runs(mask):
    return int(np.sum(np.diff(np.concatenate([[0], np.asarray(mask, int)])) == 1))


def sentinels(tokens):
    return [int(t) for t in tokens if V.is_sentinel[t]]


# Spans ---------------------------------------------------------------------------------------


@hypothesis.given(st.integers(1, 700), rates, spans, seeds)
def test_a_mask_has_the_counted_tokens_and_spans(length, rate, span, seed):
    noise, parts = span_counts(length, rate, span)
    length = max(length, 2)
    mask = span_mask(length, noise, parts, rng(seed))
    assert (len(mask), mask.sum(), runs(mask)) == (length, noise, parts)
    assert not mask[0] and mask[-1]


@hypothesis.given(st.integers(2, 700), rates, spans, seeds)
def test_corrupting_loses_nothing_and_its_lengths_are_known(length, rate, span, seed):
    text = window(length, seed).tokens
    mask = span_mask(length, *span_counts(length, rate, span), rng(seed))
    inputs, targets = corrupt(text, mask, V)
    assert (len(inputs), len(targets)) == span_lengths(length, rate, span)
    assert restore(inputs, targets, V) == text.tolist()
    expected = list(range(S0, S0 - runs(mask), -1))
    assert sentinels(inputs) == sentinels(targets) == expected
    for side in (inputs, targets):
        assert side[-1] == EOS and np.sum(side == EOS) == 1


@hypothesis.given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_any_mask_can_be_undone(mask):
    """Also those that begin with a span or end without one, as rolled ones do."""
    text = window(len(mask)).tokens
    inputs, targets = corrupt(text, np.array(mask), V)
    assert restore(inputs, targets, V) == text.tolist()
    assert sentinels(targets) == list(range(S0, S0 - runs(mask), -1))
    assert len(targets) == sum(mask) + runs(mask) + 1


def test_the_numbers_are_those_of_t5():
    assert span_counts(568, 0.15, 3.0) == (85, 28)
    table = {
        (512, 0.15, 3): (568, 114, 28),
        (512, 0.15, 8): (588, 100, 11),
        (512, 0.15, 64): (600, 92, 1),
        (512, 0.5, 3): (767, 513, 128),
        (512, 0.5, 8): (908, 512, 57),
        (512, 0.5, 64): (1007, 513, 8),
        (1024, 0.15, 3): (1137, 229, 57),
        (256, 0.15, 3): (284, 58, 14),
        (128, 0.15, 3): (141, 29, 7),
    }
    made = {key: SpanCorruption(*key) for key in table}
    assert {k: (s.raw_length, s.targets_length, s.sentinels) for k, s in made.items()} == table


def test_there_are_never_more_spans_than_tokens_between_them():
    """T5's own numbers ask for three spans with one token between them here."""
    assert span_counts(4, 0.7, 1.0) == (3, 1)
    assert span_counts(1, 0.15, 3.0) == span_counts(2, 0.15, 3.0) == (1, 1)


@hypothesis.given(st.integers(3, 300), rates, spans, st.booleans())
def test_a_window_is_the_longest_that_fits(inputs, rate, span, roll):
    objective = SpanCorruption(inputs + roll, rate, span, roll)
    raw = objective.raw_length
    assert span_lengths(raw, rate, span)[0] <= inputs < span_lengths(raw + 1, rate, span)[0]


def test_every_composition_is_equally_likely():
    draw, n = rng(1), 4000
    seen = [tuple(partition(6, 3, draw).tolist()) for _ in range(n)]
    possible = [c for c in itertools.product(range(1, 5), repeat=3) if sum(c) == 6]
    assert len(possible) == 10 and set(seen) == set(possible)
    counts = [seen.count(c) for c in possible]
    assert stats.chisquare(counts).pvalue > 1e-3


def where_masked(roll, n=1500):
    """How often each of the tokens 0, 1, 2... of a window is in a span."""
    objective = SpanCorruption(40, 0.3, 3.0, roll)
    text = Window(np.arange(objective.raw_length, dtype=np.int32), np.zeros(1, np.int32))
    counts = np.zeros(objective.raw_length)
    for seed in range(n):
        out = example(objective, seed, of=text)
        inside = [t for t in out["targets"].tolist() if t < 256]
        counts[inside] += 1
    return counts, n * span_counts(objective.raw_length, 0.3, 3.0)[0]


def test_rolling_makes_every_token_equally_likely():
    counts, total = where_masked(roll=True)
    share = total / len(counts)
    # Tokens of a row exclude each other, so the counts scatter less than independent ones would
    assert counts.sum() == total
    assert np.abs(counts - share).max() < 5 * math.sqrt(share)


def test_without_rolling_the_first_token_is_never_cut_and_the_last_always():
    counts, _ = where_masked(roll=False, n=50)
    assert counts[0] == 0 and counts[-1] == 50


@hypothesis.given(st.integers(4, 200), rates, spans, st.booleans(), seeds)
def test_span_corruption_gives_an_encoder_and_a_decoder_the_same_text(
    inputs, rate, span, roll, seed
):
    objective = SpanCorruption(inputs, rate, span, roll)
    given = window(objective.raw_length, seed)
    out = example(objective, seed, of=given)
    assert restore(out["encoder_tokens"], out["targets"], V) == given.tokens.tolist()
    check_pair(out)
    assert runs(out["weights"]) == 1 and len(sentinels(out["targets"])) <= objective.sentinels
    if not roll:  # all of it is used, but for what the next longer window would not fit in
        assert out["decoder_mask"].all()


def check_pair(out):
    assert out["decoder_tokens"][0] == PAD
    np.testing.assert_array_equal(out["decoder_tokens"][1:], out["targets"][:-1])
    np.testing.assert_array_equal(out["weights"], out["decoder_mask"])
    np.testing.assert_array_equal(out["encoder_mask"], out["encoder_tokens"] != PAD)
    np.testing.assert_array_equal(out["decoder_mask"], out["targets"] != PAD)
    last = out["targets"][out["decoder_mask"]][-1], out["encoder_tokens"][out["encoder_mask"]][-1]
    assert last == (EOS, EOS)


def test_sentinels_never_run_out_unnoticed():
    few = ByteTokenizer(sentinels=2).vocabulary
    objective = SpanCorruption(64)
    with pytest.raises(DataError, match="needs 3 sentinels, and the tokenizer has 2"):
        objective(window(objective.raw_length), few, rng())
    with pytest.raises(DataError, match="holds sentinels"):
        objective(Window(np.full(objective.raw_length, S0), np.zeros(1)), V, rng())


def test_what_does_not_belong_together_is_not_restored():
    with pytest.raises(DataError, match="same sentinels"):
        restore([1, S0, EOS], [S0 - 1, 2, EOS], V)
    with pytest.raises(DataError, match="begin with a sentinel"):
        restore([1, S0, EOS], [2, S0, EOS], V)
    with pytest.raises(DataError, match="each end with eos"):
        restore([1, S0], [S0, 2, EOS], V)


# UL2 -----------------------------------------------------------------------------------------


@hypothesis.given(st.integers(24, 200), st.sampled_from(["fixed", "uniform"]), st.booleans(), seeds)
def test_every_denoiser_can_be_undone(inputs, split, capped, seed):
    for denoiser in DENOISERS:
        objective = UL2(inputs, inputs // 2 if capped else None, (denoiser,), split=split)
        given = window(objective.raw_length, seed)
        out = example(objective, seed, of=given)
        assert out["encoder_tokens"][0] == V.specials[denoiser.mode]
        assert restore(out["encoder_tokens"], out["targets"], V) == given.tokens.tolist()
        check_pair(out)
        if denoiser.span is None:  # one span, which is an end of the window
            cut = [t for t in out["targets"].tolist() if t < 256]
            assert given.tokens.tolist()[-len(cut) :] == cut
            if split == "fixed":
                assert len(cut) == span_counts(len(given.tokens), 0.25, 1e9)[0]


@hypothesis.given(st.integers(24, 120), seeds)
def test_as_a_decoder_the_same_text_is_in_one_row(inputs, seed):
    pairs, row = UL2(inputs), UL2(inputs, form="decoder")
    given = window(pairs.raw_length, seed)
    apart, joined = example(pairs, seed, of=given), example(row, seed, of=given)
    read = apart["encoder_tokens"][apart["encoder_mask"]]
    written = apart["targets"][apart["decoder_mask"]]
    np.testing.assert_array_equal(joined["tokens"][joined["prefix"]], read)
    np.testing.assert_array_equal(joined["targets"][joined["weights"] > 0], written)
    assert len(joined["tokens"]) == inputs + pairs.written


def test_a_mixture_draws_its_parts_as_often_as_it_says():
    parts = (Denoiser("R", 0.15, 3.0), Denoiser("S", 0.25), Denoiser("X", 0.5, 8.0))
    objective = UL2(40, denoisers=parts, weights=(2, 1, 1))
    n = 1200
    modes = [int(example(objective, seed)["encoder_tokens"][0]) for seed in range(n)]
    counts = [modes.count(V.specials[m]) for m in "RSX"]
    assert sum(counts) == n and stats.chisquare(counts, [n / 2, n / 4, n / 4]).pvalue > 1e-3


def test_a_uniform_split_is_uniform_over_what_fits():
    objective = UL2(20, 16, (Denoiser("S", 0.25),), split="uniform")
    raw = objective.raw_length
    cut = [int(example(objective, s)["weights"].sum()) - 2 for s in range(1500)]
    possible = range(max(1, raw + 3 - 20), min(raw - 1, 14) + 1)
    assert set(cut) == set(possible)
    assert stats.chisquare([cut.count(n) for n in possible]).pvalue > 1e-3


# Causal and prefix -----------------------------------------------------------------------------


@hypothesis.given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_a_causal_row_keeps_documents_apart(sizes, data):
    documents = np.repeat(np.arange(len(sizes)), sizes)
    hypothesis.assume(len(documents) > 1)
    length = data.draw(st.integers(1, len(documents) - 1))
    given = window(length + 1, documents=documents[: length + 1])
    out = example(Causal(length), of=given)
    np.testing.assert_array_equal(out["segments"], documents[:length])
    for i in range(length):
        start = int(np.argmax(documents == documents[i]))
        assert out["positions"][i] == i - start
        assert (out["tokens"][i], out["targets"][i]) == (given.tokens[i], given.tokens[i + 1])
        assert out["weights"][i] == (documents[i] == documents[i + 1])


def test_concat_packing_knows_no_documents():
    out = example(Causal(6, "concat"), of=window(7, documents=[0, 0, 1, 1, 1, 2, 2]))
    assert out.keys() == {"tokens", "targets", "weights"} and out["weights"].all()
    assert np.array_equal(out["tokens"][1:], out["targets"][:-1])


@hypothesis.given(st.integers(2, 60), seeds)
def test_a_prefix_is_not_asked_for_and_sees_no_target(length, seed):
    given = window(length + 1, seed)
    out = example(PrefixLM(length), seed, of=given)
    prefix = int(out["prefix"].sum())
    assert 1 <= prefix <= length - 1 and out["prefix"][:prefix].all()
    asked = np.flatnonzero(out["weights"])
    assert asked.tolist() == list(range(prefix - 1, length))
    np.testing.assert_array_equal(out["targets"][asked], given.tokens[prefix:])


@hypothesis.given(st.integers(2, 60), seeds)
def test_a_prefix_pair_is_the_window_in_two(length, seed):
    given = window(length, seed)
    out = example(PrefixLM(length, form="seq2seq"), seed, of=given)
    assert restore(out["encoder_tokens"], out["targets"], V) == given.tokens.tolist()
    assert 2 <= out["encoder_mask"].sum() <= length
    check_pair(out)


def test_prefixes_of_all_lengths_are_equally_likely():
    seen = [int(example(PrefixLM(7), s)["prefix"].sum()) for s in range(1200)]
    assert stats.chisquare([seen.count(n) for n in range(1, 7)]).pvalue > 1e-3
    assert set(seen) == set(range(1, 7))


# Masked language modelling -----------------------------------------------------------------------


@hypothesis.given(st.integers(1, 80), st.floats(0.01, 1.0), st.none() | st.integers(1, 20), seeds)
def test_exact_masking_chooses_exactly_so_many(length, rate, most, seed):
    objective = MLM(length, rate, max_predictions=most, frame=False)
    given = window(length, seed)
    out = example(objective, seed, of=given)
    chosen = out["weights"] > 0
    wanted = max(1, round(rate * length))
    assert chosen.sum() == min(wanted, most or wanted)
    np.testing.assert_array_equal(out["tokens"][~chosen], given.tokens[~chosen])
    np.testing.assert_array_equal(out["targets"], np.where(chosen, given.tokens, 0))
    changed = out["tokens"][chosen]
    assert np.all((changed == MASK) | V.is_text[changed])


@hypothesis.given(seeds, MODES, st.booleans())
def test_special_tokens_are_never_chosen(seed, mode, whole_word):
    tokens = window(30, seed).tokens
    tokens[::3] = [EOS, PAD, S0, MASK, EOS, PAD, S0 - 1, EOS, EOS, EOS]
    objective = MLM(32, 0.9, mode=mode, whole_word=whole_word)
    out = example(objective, seed, of=Window(tokens, np.zeros(30)))
    chosen = out["weights"] > 0
    assert not chosen[0] and not chosen[-1] and not chosen[1:-1][::3].any()
    assert out["tokens"][0] == V.specials["cls"] and out["tokens"][-1] == V.specials["sep"]
    np.testing.assert_array_equal(out["mask"][1:-1], tokens != PAD)


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
@pytest.mark.parametrize("whole_word", [False, True])
def test_a_row_of_specials_is_left_as_it_is(mode, whole_word):
    tokens = np.full(9, EOS, np.int32)
    objective = MLM(9, 0.5, mode=mode, whole_word=whole_word, frame=False)
    out = example(objective, of=Window(tokens, np.zeros(9)))
    assert not out["weights"].any()
    np.testing.assert_array_equal(out["tokens"], tokens)


def test_chosen_tokens_are_replaced_as_often_as_it_says():
    objective = MLM(512, 0.5, frame=False)
    masked = unchanged = swapped = 0
    for seed in range(20):
        given = window(512, seed)
        out = example(objective, seed, of=given)
        chosen = out["weights"] > 0
        new, old = out["tokens"][chosen], given.tokens[chosen]
        masked += np.sum(new == MASK)
        unchanged += np.sum(new == old)
        swapped += np.sum((new != old) & (new != MASK))
    counts, n = [masked, swapped, unchanged], 20 * 256
    chance = 0.1 / 256  # of drawing the same token again
    expected = [0.8 * n, (0.1 - chance) * n, (0.1 + chance) * n]
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_bernoulli_masking_lets_the_number_vary():
    objective = MLM(100, 0.15, mode="bernoulli", frame=False)
    counts = [example(objective, seed)["weights"].sum() for seed in range(400)]
    z = (np.mean(counts) - 15) / math.sqrt(100 * 0.15 * 0.85 / 400)
    assert abs(z) < 4 and np.std(counts) > 2


@hypothesis.given(st.integers(2, 60), st.floats(0.05, 1.0), seeds, MODES)
def test_whole_words_are_chosen_or_not(length, rate, seed, mode):
    objective = MLM(length, rate, mode=mode, whole_word=True, frame=False)
    given = window(length, seed, vocabulary=PAIRS)
    out = example(objective, seed, PAIRS, of=given)
    chosen = out["weights"] > 0
    word = np.cumsum([i == 0 or PAIRS.pieces[t] == "w" for i, t in enumerate(given.tokens)])
    smallest = min(np.sum(word == w) for w in set(word.tolist()))
    if mode == "exact" and smallest > objective.predictions:
        # No word fits, so its tokens are chosen one by one
        assert chosen.sum() == objective.predictions
        return
    for w in set(word.tolist()):
        assert len(set(chosen[word == w].tolist())) == 1
    if mode == "exact":
        assert chosen.sum() <= objective.predictions
        left = [np.sum(word == w) for w in set(word[~chosen].tolist())]
        # Nothing that was passed over would still have fitted
        assert min(left, default=length) + chosen.sum() > objective.predictions or chosen.all()


def test_words_of_bytes_are_letters_in_a_row():
    text = ByteTokenizer().encode("can't élan 42")
    words = V.words(text)
    cut = [bytes(text[words == w].astype(np.uint8)).decode() for w in range(words.max() + 1)]
    assert cut == ["can", "'", "t", " ", "élan", " ", "42"]
    assert V.words(np.array([EOS, 97, EOS, 97, 98])).tolist() == [0, 1, 2, 3, 3]
    assert V.words(np.zeros(0, int)).tolist() == []


# All of them ---------------------------------------------------------------------------------

ALL = [
    Causal(1),
    Causal(33),
    PrefixLM(2),
    PrefixLM(33, form="seq2seq"),
    MLM(3),
    MLM(32, whole_word=True),
    MLM(32, mode="bernoulli", frame=False),
    SpanCorruption(3),
    SpanCorruption(64),
    SpanCorruption(64, roll=True),
    UL2(64),
    UL2(64, 48, split="uniform"),
    UL2(64, form="decoder"),
]


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_shapes_depend_on_nothing_but_the_objective(objective):
    promised = batch_shapes(objective, 4)
    V.require("it", objective.needs, objective.sentinels)
    for seed in range(12):
        out = example(objective, seed)
        assert {k: (4, *v.shape) for k, v in out.items()} == {
            k: v.shape for k, v in promised.items()
        }
        assert {k: v.dtype for k, v in out.items()} == {k: v.dtype for k, v in promised.items()}
        assert {v.dtype.name for v in out.values()} <= {"int32", "float32", "bool"}


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_the_same_generator_gives_the_same_example(objective):
    once, again = example(objective, 5), example(objective, 5)
    assert all(np.array_equal(once[k], again[k]) for k in once)


@pytest.mark.parametrize("objective", [o for o in ALL if o.needs], ids=str)
def test_what_is_needed_is_what_is_used(objective):
    """With only the special tokens it names, an objective works; without one, it is named."""
    specials = {name: V.specials[name] for name in objective.needs}
    few = Vocabulary("few", V.pieces, specials, V.sentinels[: objective.sentinels])
    for seed in range(12):
        example(objective, seed, few)
    for name in objective.needs:
        less = {k: v for k, v in specials.items() if k != name}
        with pytest.raises(DataError, match=f"'{name}'"):
            Vocabulary("less", V.pieces, less, V.sentinels).require("it", objective.needs)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: Causal(0), "length: expected a positive integer, got 0"),
        (lambda: Causal(4, "both"), "packing: expected one of 'segments', 'concat'"),  # type: ignore[arg-type]
        (lambda: PrefixLM(1), "length: expected 2 or more tokens, got 1"),
        (lambda: PrefixLM(4, "encoder"), "form: expected one of"),  # type: ignore[arg-type]
        (lambda: MLM(2), "length: expected 3 or more tokens"),
        (lambda: MLM(8, 0.0), "rate: expected a share above 0"),
        (lambda: MLM(8, replace=(0.8, 0.1, 0.2)), "three probabilities that sum to 1"),
        (lambda: MLM(8, mode="bernoulli", max_predictions=2), "is for mode='exact'"),
        (lambda: SpanCorruption(2), "inputs_length: 2 is too short"),
        (lambda: SpanCorruption(64, 1.0), "rate: expected a share between 0 and 1"),
        (lambda: SpanCorruption(64, span=0.5), "span: expected a mean length of 1"),
        (lambda: UL2(2), "too short for a mode token"),
        (lambda: UL2(64, denoisers=()), "denoisers: expected at least one"),
        (lambda: UL2(64, weights=(1.0,)), "weights: expected one of 0 or more for each"),
        (lambda: UL2(64, weights=(2.0,) * 6 + (-1.0,)), r"weights\[6\]: expected 0 or more"),
        (lambda: Denoiser("Q", 2.0), "(?s)mode: expected one of 'R', 'S', 'X'.*rate"),  # type: ignore[arg-type]
        (lambda: Causal(2**30), r"length: expected an integer of at most 2\*\*24"),
        (lambda: SpanCorruption(2**23, rate=1 - 1e-9), r"windows of \d+ tokens; expected at most"),
        (lambda: UL2(2**23, denoisers=(Denoiser("R", 1 - 1e-9),)), "expected at most 2"),
    ],
)
def test_a_wrong_argument_is_named(make, match):
    with pytest.raises(DataError, match=match):
        make()
