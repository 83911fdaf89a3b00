"""Order: batch n is a function of the seed, the cursor and n, and of nothing else."""

import collections
import dataclasses
import itertools
import threading
from pathlib import Path

import grain
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from growjax.data import (
    MLM,
    UL2,
    Batches,
    ByteTokenizer,
    Causal,
    Corpus,
    PrefixLM,
    SpanCorruption,
    Text,
    blocks_of,
    blocks_used,
    held_out_batch,
    prepare,
    windows_per_block,
)
from growjax.errors import DataError


BYTES = ByteTokenizer()
OBJECTIVES = [
    Causal(16),
    PrefixLM(16),
    MLM(18),
    SpanCorruption(16, roll=True),
    UL2(16, form="decoder"),
]


def numbered(tokens: int) -> Corpus:
    """A corpus of which every token is another one, so that it can be seen what is read."""
    text = np.zeros(tokens, np.uint32)
    corpus = Corpus.of([b"x" * 7] * (tokens // 8 + 1), BYTES)
    text[:] = np.arange(tokens)
    return dataclasses.replace(corpus, tokens=text, starts=np.zeros(1, np.int64))


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    texts = [rng.integers(97, 123, n).astype(np.uint8).tobytes() for n in range(1, 60)]
    return Corpus.of(texts, BYTES)


@pytest.fixture
def prepared(tmp_path):
    for n in range(30):
        (tmp_path / f"{n}.txt").write_text(f"{n} " * 50)
    return prepare(Text(str(tmp_path), "*.txt"), BYTES, tmp_path / "cache")


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def differ(left, right):
    return any(not np.array_equal(left[k], right[k]) for k in left)


def take(batches, steps, first=0):
    with batches.iterate(first) as stream:
        return [batch for _, batch in itertools.islice(stream, steps)]


# Arithmetic ------------------------------------------------------------------------------------


@hypothesis.given(st.integers(0, 50), st.integers(1, 20), st.integers(1, 90), st.integers(1, 90))
def test_the_cursor_is_after_the_last_block_that_was_touched(steps, batch, a, b):
    block, raw = max(a, b), min(a, b)
    each = windows_per_block(block, raw)
    assert each * raw <= block < (each + 1) * raw
    touched = {window // each for window in range(steps * batch)}
    assert blocks_used(steps, batch=batch, block=block, raw_length=raw) == len(touched)


def test_a_block_needs_the_token_after_it():
    assert [blocks_of(n, 8) for n in (0, 1, 8, 9, 16, 17)] == [0, 0, 0, 1, 1, 2]


# What is read ----------------------------------------------------------------------------------


@hypothesis.given(
    st.integers(20, 300),
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(0, 9),
)
def test_an_epoch_has_every_token_as_a_target_once(tokens, length, times, batch, seed):
    block = length * times
    hypothesis.assume(blocks_of(tokens, block))
    made = Batches(numbered(tokens), Causal(length, "concat"), batch, block, seed=seed)
    rows = blocks_of(tokens, block) * times
    targets = [made.batch_at(n)["targets"] for n in range(-(-rows // batch))]
    seen = np.concatenate(targets)[:rows].ravel()
    assert sorted(seen.tolist()) == list(range(1, blocks_of(tokens, block) * block + 1))


def test_windows_of_a_block_follow_each_other():
    made = Batches(numbered(1000), Causal(10, "concat"), 1, 40)
    first = [int(made.batch_at(n)["tokens"][0, 0]) for n in range(8)]
    assert np.diff(first[:4]).tolist() == np.diff(first[4:]).tolist() == [10] * 3
    assert first[0] % 40 == first[4] % 40 == 0


def firsts(batches, rows):
    """Which blocks come first in the order."""
    one = dataclasses.replace(batches, batch=1)
    return [int(one.batch_at(n)["tokens"][0, 0]) for n in range(rows)]


def test_every_epoch_and_every_seed_has_another_order():
    made = Batches(numbered(20 * 8 + 1), Causal(8, "concat"), 1)
    orders = [firsts(dataclasses.replace(made, seed=seed), 60) for seed in range(4)]
    epochs = [tuple(order[i : i + 20]) for order in orders for i in (0, 20, 40)]
    assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(range(0, 160, 8))}
    # No order comes twice: not as another epoch's, and not as another seed's next epoch
    assert len(set(epochs)) == len(epochs) == 12
    assert tuple(range(0, 160, 8)) not in epochs


def test_the_order_is_that_of_other_versions():
    """A run that was started under one version must be able to go on under the next one."""
    made = Batches(numbered(20 * 8 + 1), Causal(8, "concat"), 1, seed=7)
    order = [first // 8 for first in firsts(made, 22)]
    assert order == [*(3, 8, 11, 1, 16, 4, 9, 5, 15, 10, 19, 18, 14, 17, 12, 7, 0, 6, 2, 13), 19, 0]


def test_every_epoch_draws_anew():
    corpus = Corpus.of([b"a" * 33], BYTES)
    made = Batches(corpus, MLM(32, frame=False), 1)
    assert blocks_of(len(corpus), 32) == 1
    drawn = {made.batch_at(epoch)["weights"].tobytes() for epoch in range(8)}
    assert len(drawn) == 8


def test_every_row_draws_for_itself(corpus):
    alike = Corpus.of([b"a" * 4000], BYTES)
    weights = Batches(alike, MLM(32, frame=False), 64).batch_at(0)["weights"]
    assert len({row.tobytes() for row in weights}) == 64


# What has no say -------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("count", [2, 4])
def test_hosts_have_slices_of_the_same_batches(corpus, objective, count):
    whole = Batches(corpus, objective, 8, block=40, start=1, seed=3)
    hosts = [dataclasses.replace(whole, rank=r, count=count) for r in range(count)]
    for n in (0, 5, 30):
        parts = [host.batch_at(n) for host in hosts]
        joined = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        same(joined, whole.batch_at(n))
    for host, rank in zip(hosts, range(count), strict=True):
        streamed = take(host, 3, first=4)[2]
        rows = slice(rank * 8 // count, (rank + 1) * 8 // count)
        same(streamed, {k: v[rows] for k, v in whole.batch_at(6).items()})


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("threads", [0, 3])
def test_a_resumed_stage_goes_on_as_it_would_have(corpus, objective, threads):
    made = Batches(corpus, objective, 4, block=40, seed=1, threads=threads)
    steps = take(made, 9)
    for first in (0, 3, 8):
        fresh = dataclasses.replace(made)
        for n, batch in enumerate(take(fresh, 9 - first, first), first):
            same(batch, steps[n])
            same(batch, fresh.batch_at(n))
    assert differ(steps[0], steps[1])


def test_the_order_of_asking_has_no_say(corpus):
    made = Batches(corpus, UL2(16), 4, block=40)
    asked = {n: made.batch_at(n) for n in (7, 2, 5, 2, 0)}
    for n in (0, 2, 5, 7):
        same(asked[n], dataclasses.replace(made).batch_at(n))


def test_grain_can_save_and_restore_its_own_state(corpus):
    made = Batches(corpus, MLM(18), 4, block=40)
    iterator = iter(made.dataset())
    assert isinstance(made.dataset(), grain.IterDataset)
    for _ in range(3):
        next(iterator)
    other = iter(made.dataset())
    other.set_state(iterator.get_state())
    same(next(other), made.batch_at(3))


@hypothesis.given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 5), st.sampled_from([4, 5, 8, 16])),
        min_size=1,
        max_size=4,
    )
)
def test_stages_of_any_size_read_nothing_twice_and_pass_over_no_block(stages):
    """Within an epoch, whatever batch size and length each stage has."""
    corpus, block, cursor = numbered(16 * 200), 16, 0
    seen: collections.Counter[int] = collections.Counter()
    for steps, batch, length in stages:
        made = Batches(corpus, Causal(length, "concat"), batch, block, start=cursor, seed=2)
        for n in range(steps):
            seen.update(made.batch_at(n)["targets"].ravel().tolist())
        cursor = made.used(steps)
    assert max(seen.values()) == 1
    blocks = firsts(Batches(corpus, Causal(16, "concat"), 1, seed=2), cursor)
    assert {(target - 1) // 16 * 16 for target in seen} == set(blocks)


def test_a_stage_starts_where_the_last_one_ended(corpus):
    """Of the same size, it is what one longer stage would have had, and draws what that one had drawn."""
    long = Batches(corpus, MLM(18), 4, block=32, seed=5)
    after = dataclasses.replace(long, start=long.used(6))
    assert long.used(6) * 2 == 6 * 4
    for n in range(4):
        same(after.batch_at(n), long.batch_at(n + 6))
    seed = dataclasses.replace(long, seed=6)
    assert differ(seed.batch_at(0), long.batch_at(0))


# Streams ---------------------------------------------------------------------------------------


def test_a_stream_counts_and_ends_its_thread(corpus):
    before = threading.active_count()
    stream = Batches(corpus, Causal(16), 4).iterate(5)
    assert [n for n, _ in itertools.islice(stream, 3)] == [5, 6, 7]
    assert threading.active_count() == before + 1 and stream.waited > 0
    stream.close()
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(DataError, match="this stream is closed"):
        next(stream)


def test_a_stream_reads_no_further_ahead_than_it_may(corpus, monkeypatch):
    read = []
    monkeypatch.setattr(Corpus, "read", lambda self, a, b: read.append(a) or np.zeros(b - a, int))
    with Batches(corpus, Causal(16), 1).iterate(buffer=2) as stream:
        next(stream)
        for thread in threading.enumerate():
            if "prefetch" in thread.name:
                thread.join(0.2)
        assert 1 <= len(read) <= 1 + 2 + 1  # given, waiting, and one in the making


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    "harm, fault",
    [
        (Path.unlink, "No such file or directory, while it was read"),
        (lambda path: path.write_bytes(b"\0" * 10), "expected .* tokens, and the file now ends"),
    ],
)
def test_a_file_that_is_harmed_in_the_middle_is_named(prepared, threads, harm, fault):
    training, _ = prepared
    made = Batches(training, Causal(16), 4, threads=threads)
    before = threading.active_count()
    with made.iterate() as stream:
        next(stream)
        harm(training.path)
        assert f"{len(training)} tokens" in repr(training)
        with pytest.raises(DataError, match=f"tokens.bin: {fault}"):
            for _ in range(200):
                next(stream)
        with pytest.raises(DataError, match="closed"):
            next(stream)
    with pytest.raises(DataError, match=f"tokens.bin: {fault}"):
        made.batch_at(3)
    assert threading.active_count() <= before + threads  # Grain's readers end by themselves


def test_a_corpus_on_disk_gives_what_one_in_memory_gives(prepared):
    training, _ = prepared
    memory = dataclasses.replace(training, path=None)
    same(
        Batches(training, MLM(18), 4).batch_at(2),
        Batches(memory, MLM(18), 4).batch_at(2),
    )


# Held out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_held_out_rows_are_always_the_same(corpus, objective):
    once = held_out_batch(corpus, objective, 5)
    same(once, held_out_batch(corpus, objective, 5))
    assert {len(v) for v in once.values()} == {5}
    assert once.keys() == Batches(corpus, objective, 4).batch_at(0).keys()


def test_held_out_windows_are_evenly_spread():
    out = held_out_batch(numbered(101), Causal(10, "concat"), 4)
    assert out["tokens"][:, 0].tolist() == [0, 30, 60, 90]
    assert out["targets"][-1, -1] == 100


# Faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, match",
    [
        (dict(batch=0), "batch: expected an integer of 1 or more, got 0"),
        (dict(start=-1), "start: expected an integer of 0 or more, got -1"),
        (dict(batch=6, count=4), "batch: expected a multiple of the 4 hosts, got 6"),
        (dict(rank=2, count=2), "rank: expected one of 2 hosts, counted from 0, got 2"),
        (dict(block=8), "block: expected at least the 16 tokens of a window, got 8"),
        (dict(block=10**6), "corpus: expected at least 1000001 tokens, for one block"),
        (dict(objective=SpanCorruption(2000)), "needs 111 sentinels, and the tokenizer has 100"),
    ],
)
def test_a_wrong_argument_is_named(corpus, arguments, match):
    with pytest.raises(DataError, match=match):
        Batches(**{"corpus": corpus, "objective": Causal(16), "batch": 4, **arguments})


def test_all_faults_are_told_at_once(corpus):
    with pytest.raises(DataError, match="(?s)rank: .*batch: .*block: "):
        Batches(corpus, Causal(16), 5, block=3, rank=9, count=2)


def test_a_wrong_step_or_size_is_named(corpus):
    made = Batches(corpus, Causal(16), 4)
    for call in (made.batch_at, made.dataset, made.iterate):
        with pytest.raises(DataError, match="step: expected 0 or more, got -1"):
            call(-1)
    with pytest.raises(DataError, match="buffer: expected 1 or more"):
        made.iterate(buffer=0)
    with pytest.raises(DataError, match="(?s)rows: expected 1 or more.*the 5001 tokens"):
        held_out_batch(corpus, Causal(5000), 0)
    with pytest.raises(DataError, match="steps: expected 0 or more"):
        made.used(-1)
    with pytest.raises(DataError, match="batch: expected 1 or more"):
        blocks_used(1, batch=0, block=8, raw_length=8)
    with pytest.raises(DataError, match="take the longest raw_length"):
        windows_per_block(8, 9)
