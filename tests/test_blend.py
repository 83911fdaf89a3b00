"""Sources that are mixed by weight: how often each is read, in which order, and exactly so again."""

import dataclasses
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from growjax.data import (
    MLM,
    Batches,
    Blend,
    Blended,
    ByteTokenizer,
    Causal,
    Corpus,
    Text,
    held_out_batch,
)
from growjax.data.batches import disjoint_windows, held_out_shares
from growjax.data.order import corpus_of, proportions
from growjax.errors import DataError
from growjax.plan.files import load_plan, save_plan
from growjax.train import CorpusFeed, Options, Step, train
from tests.runs import plan, steps


BYTES = ByteTokenizer()
WEIGHTS = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def numbered(first: int, tokens: int) -> Corpus:
    """A corpus whose tokens are consecutive numbers, so that it can be seen what is read."""
    corpus = Corpus.of([b"x"], BYTES)
    numbers = np.arange(first, first + tokens, dtype=np.uint32)
    return dataclasses.replace(corpus, tokens=numbers, starts=np.zeros(1, np.int64))


def mixed(weights: Any, sizes: Any) -> Blended:
    corpora = tuple(numbered(1000 * n, size) for n, size in enumerate(sizes))
    return Blended(corpora, tuple(weights), tuple(map(str, range(len(corpora)))))


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


# Arithmetic ------------------------------------------------------------------------------------


@hypothesis.given(WEIGHTS, st.integers(0, 300))
def test_every_beginning_has_the_shares(weights, n):
    drawn = [corpus_of(i, weights) for i in range(n)]
    for corpus, weight in enumerate(weights):
        numbers = [number for source, number in drawn if source == corpus]
        # Each in its own order, without a gap
        assert numbers == list(range(len(numbers)))
        # Every corpus rounds what those before it have left, by less than one block
        assert abs(len(numbers) - n * weight / sum(weights)) < len(weights)
    if n and n % sum(weights) == 0:
        counts = [sum(source == corpus for source, _ in drawn) for corpus in range(len(weights))]
        assert counts == [n // sum(weights) * weight for weight in weights]


def test_weights_become_whole_shares():
    assert proportions((0.5, 0.3, 0.2)) == (5, 3, 2) == proportions((50, 30, 20))
    assert proportions((1 / 3, 2 / 3)) == (1, 2) and proportions((7,)) == (1,)
    # A source that is tiny beside another one stays tiny
    assert proportions((15e12, 3e6)) == (10**6, 1)
    assert proportions((0.5, 0.5, 1e-7)) == (500_000, 500_000, 1)
    shares = proportions((0.7123456, 0.2876544))
    assert abs(shares[0] / sum(shares) - 0.7123456) < 1e-6


# What is read ------------------------------------------------------------------------------------


def test_each_block_is_of_one_source_and_each_source_has_epochs_of_its_own():
    blend = mixed((2, 1), (8 * 4 + 1, 8 * 6 + 1))
    made = Batches(blend, Causal(8, "concat"), 1)
    firsts = [int(made.batch_at(n)["tokens"][0, 0]) for n in range(18)]
    ours = [first for first in firsts if first < 1000]
    assert len(ours) == 12 and len(firsts) - len(ours) == 6
    for epoch in range(3):
        assert sorted(ours[4 * epoch : 4 * epoch + 4]) == [0, 8, 16, 24]
    assert sorted(first - 1000 for first in firsts if first >= 1000) == list(range(0, 48, 8))
    assert ours[:4] != ours[4:8] or ours[4:8] != ours[8:]


def test_sources_of_one_length_have_orders_of_their_own():
    made = Batches(mixed((1, 1), (161, 161)), Causal(8, "concat"), 1)
    firsts = [int(made.batch_at(n)["tokens"][0, 0]) for n in range(40)]
    orders = [[f % 1000 for f in firsts if (f >= 1000) == second] for second in (False, True)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_a_blend_of_one_is_read_as_it_alone():
    corpus = Corpus.of([bytes(range(97, 123)) * 9] * 3, BYTES)
    for objective in (Causal(16), MLM(16)):
        alone, blend = (
            Batches(data, objective, 3, 32, seed=5)
            for data in (corpus, Blended((corpus,), (0.1,), ("a",)))
        )
        for n in range(4):
            same(alone.batch_at(n), blend.batch_at(n))


@pytest.mark.parametrize("before, batch, larger", [(0, 2, 6), (3, 4, 2)])
def test_three_sources_resume_across_a_change_of_the_batch(before, batch, larger):
    """Stages share one cursor, and any step of either can be the first of a session, on any host."""
    blend = mixed((0.5, 0.3, 0.2), (330, 170, 90))
    first = Batches(blend, Causal(8, "concat"), batch, 16, seed=before)
    second = dataclasses.replace(
        first, objective=Causal(16, "concat"), batch=larger, start=first.used(before + 1)
    )
    for stage in (first, second):
        whole = [stage.batch_at(n) for n in range(4)]
        # As a process that knows nothing of the one before
        with dataclasses.replace(stage).iterate(2) as resumed:
            for (n, again), expected in zip(resumed, whole[2:], strict=False):
                same(again, expected)
                halves = [
                    dataclasses.replace(stage, rank=rank, count=2).batch_at(n)["tokens"]
                    for rank in (0, 1)
                ]
                np.testing.assert_array_equal(np.concatenate(halves), expected["tokens"])
    # Blocks of the second stage go on with the shares of the first
    tokens = np.concatenate([second.batch_at(n)["tokens"] for n in range(4)])
    start = second.start
    drawn = [corpus_of(i, (5, 3, 2))[0] for i in range(start, start + len(tokens))]
    assert (tokens[:, 0] // 1000).tolist() == drawn and start == -(-(before + 1) * batch // 2)


def _firsts(blend, count, seed):
    made = Batches(blend, Causal(16, "concat"), 1, 16, seed=seed)
    return [made.batch_at(n)["tokens"][0, 0] for n in range(count)]


def test_the_order_is_that_of_other_versions():
    """A run that was started under one version must be able to go on under the next one."""
    firsts = [int(first) for first in _firsts(mixed((0.5, 0.3, 0.2), (97, 81, 65)), 12, 7)]
    assert firsts == [48, 1032, 80, 1016, 32, 2016, 16, 1000, 0, 2048, 64, 1048]


# Held-out ----------------------------------------------------------------------------------------


def test_held_out_windows_are_of_each_source_by_its_weight():
    blend = mixed((0.5, 0.3, 0.2), (200, 200, 200))
    objective = Causal(8, "concat")
    assert held_out_shares(blend, 10) == [5, 3, 2] and held_out_shares(blend, 1) == [0, 1, 0]
    # Weights without a common measure have shares beyond 64 bits
    assert held_out_shares(mixed((123457, 7654321, 999983), (40,) * 3), 256) == [4, 223, 29]
    assert held_out_shares(mixed((123457, 7654321, 999983, 31337), (40,) * 4), 64) == [1, 56, 7, 0]
    firsts = held_out_batch(blend, objective, 10)["tokens"][:, 0]
    assert (firsts // 1000).tolist() == [0] * 5 + [1] * 3 + [2] * 2
    alone = held_out_batch(blend.corpora[0], objective, 5)["tokens"]
    np.testing.assert_array_equal(held_out_batch(blend, objective, 10)["tokens"][:5], alone)
    # Half of the windows are of the first source, which has 24 of them
    assert disjoint_windows(blend, objective) == 48
    assert disjoint_windows(blend.corpora[0], objective) == 24


def test_each_source_has_a_held_out_loss(programs):
    texts = [[f"{n} is {n % 7}. " * 4 for n in range(40)], ["zzz " * 90, "zz z" * 50]]
    corpora = tuple(Corpus.of(documents, BYTES) for documents in texts)
    blend = Blended(corpora, (3, 1), ("numbers", "sleep"))
    of = plan(steps(2))
    records = list(
        train(of, CorpusFeed(of, blend, blend), options=Options(held_out=8), cache=programs)
    )
    (scores, held_out), *_ = (
        (r.scores, r.held_out) for r in records if isinstance(r, Step) and r.held_out is not None
    )
    assert scores is not None and list(scores) == ["held_out/numbers", "held_out/sleep"]
    # Every window has as many tokens as any other
    mean = (6 * scores["held_out/numbers"] + 2 * scores["held_out/sleep"]) / 8
    np.testing.assert_allclose(mean, held_out, rtol=1e-12)
    assert scores["held_out/numbers"] != scores["held_out/sleep"]


# Values and faults -------------------------------------------------------------------------------


def test_a_plan_names_a_blend_and_a_validation_set(tmp_path):
    blend = Blend((Text("books"), Text("web/*.gz"), Text("web")), (0.5, 0.3, 0.2))
    assert blend.labels == ("books", "*.gz", "web")
    assert Blend((Text("a/x"), Text("b/x"))).labels == ("x", "x 1")
    of = plan(steps(1), data=blend, validation=Text("new"))
    save_plan(of, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == of


def test_a_feed_reads_what_its_plan_names(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(f"{name} " * 300)
    sources = tuple(Text(str(tmp_path / name)) for name in ("a", "b"))
    of = plan(steps(1), data=Blend(sources, (3, 1)), validation=Text(str(tmp_path / "c")))
    made = CorpusFeed.of(of, tmp_path / "cache")
    assert isinstance(made.training, Blended) and made.training.weights == (3, 1)
    assert BYTES.decode(made.validation.read(0, 4)) == "c c "  # pyright: ignore
    assert made.held_out_parts(of.objective, 8) == {}
    # Another validation set is another run
    other = dataclasses.replace(of, validation=Text(str(tmp_path / "a")))
    assert CorpusFeed.of(other, tmp_path / "cache").digest != made.digest
    with pytest.raises(Exception, match="validation: the plan names no data to train on"):
        dataclasses.replace(of, data=None)


def test_faults_of_blends():
    with pytest.raises(
        DataError, match="(?s)weights: expected one for each of the 2.*names: expected"
    ):
        Blend((Text("a"), Text("b")), (1.0,), ("x", "x"))
    with pytest.raises(DataError, match="sources: expected at least one"):
        Blend(())
    with pytest.raises(DataError, match=r"weights\[0\]"):
        Blend((Text("a"),), (0.0,))
    one, other = (Corpus.of(["x"], ByteTokenizer(sentinels=n)) for n in (3, 4))
    with pytest.raises(
        DataError, match="(?s)weights: expected positive.*made by different tokenizers"
    ):
        Blended((one, other), (1, 0), ("a", "b"))
    with pytest.raises(DataError, match="as many weights and names as corpora"):
        Blended((one,), (1, 2), ("a",))
    small = mixed((1, 1), (100, 7))
    with pytest.raises(DataError, match="expected at least 9 tokens, for one block, got 7"):
        Batches(small, Causal(8), 1)
    with pytest.raises(DataError, match="corpus: expected the 9 tokens of a window, got 7"):
        held_out_batch(small, Causal(8), 2)


def test_the_digest_of_a_blend_is_of_corpora_and_shares():
    a, b = (Corpus.of([x * 9], BYTES) for x in "ab")
    digests = {
        Blended((a, b), (1, 2), ("a", "b")).digest,
        Blended((a, b), (2, 1), ("a", "b")).digest,
        Blended((b, a), (1, 2), ("b", "a")).digest,
    }
    assert len(digests) == 3
    assert Blended((a, b), (0.1, 0.2), ("x", "y")).digest in digests
    assert Blended((a, b), (1, 2), ("a", "b")).bits_per_byte(np.log(2)) == 20 / 18
