"""Preparing text: from whatever documents come in, once, in parallel, and for others to use."""

import fcntl
import io
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from rich.console import Console

from growjax.data import (
    JSONL,
    Blend,
    Blended,
    ByteTokenizer,
    Corpus,
    Document,
    Parquet,
    Prepared,
    Progress,
    StandardLibrary,
    Text,
    Tokens,
    load,
    parted,
    preparation,
    prepare,
    source_at,
)
from growjax.errors import DataError
from growjax.train.preparing import prepare_paths


BYTES = ByteTokenizer()


def text(*corpora: Any) -> str:
    return "".join(BYTES.decode(corpus.tokens) for corpus in corpora)


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if not path.name.startswith("."))


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n}.txt").write_text(f"Book {n}. " * (n % 7 + 1), encoding="utf-8")
    return folder


@pytest.fixture
def settled(monkeypatch):
    """As if the files had been written long ago."""
    monkeypatch.setattr(preparation, "_SETTLED", -3600.0)


# Documents ---------------------------------------------------------------------------------------


def test_documents_may_come_from_anything(tmp_path):
    documents = [f"number {n}" for n in range(30)]
    whole = prepare(documents, BYTES, tmp_path)
    assert text(*whole).count("<eos>") == 30
    for given in (
        (document for document in documents),
        tuple(documents),
        [document.encode() for document in documents],
        [Document(str(n), document) for n, document in enumerate(documents)],
        ({"text": document, "id": 0} for document in documents),
    ):
        for corpus, expected in zip(prepare(given, BYTES, tmp_path), whole, strict=True):
            np.testing.assert_array_equal(corpus.tokens, expected.tokens)
    assert len(folders(tmp_path)) == 1  # all of them are the same text
    tokens = [np.array([n, 7, 8]) for n in range(30)]
    assert len(prepare(tokens, BYTES, tmp_path)[0]) % 3 == 0
    # A name decides whether a document is held out, and none of these is like another's
    named = [Document(f"other {n}", document) for n, document in enumerate(documents)]
    assert prepare(named, BYTES, tmp_path)[1].digest != whole[1].digest


def test_a_data_set_in_memory(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two", "three"], "n": [1, 2, 3]})
    expected = prepare(["one", "two", "three"], BYTES, tmp_path)
    for given in (rows, rows.to_iterable_dataset()):
        assert [c.digest for c in prepare(given, BYTES, tmp_path)] == [c.digest for c in expected]
    with pytest.raises(DataError, match=r"document 0: no field 'text'; it has 'n': give the texts"):
        prepare(rows.remove_columns("text"), BYTES, tmp_path)
    with pytest.raises(DataError, match="one split of a data set.*got DatasetDict"):
        prepare(datasets.DatasetDict(train=rows), BYTES, tmp_path)


def test_a_generator_is_read_once(tmp_path):
    calls = []

    def documents():
        calls.append(1)
        yield from ("one", "two", "three")

    prepare(documents(), BYTES, tmp_path)
    assert calls == [1] and len(folders(tmp_path)) == len(list(tmp_path.iterdir())) == 1


def test_faults_of_documents_have_their_numbers(tmp_path):
    given = ["fine", 5, "half \ud83d", b"\xff", np.zeros(2), {"body": "x"}, "never looked at"]
    with pytest.raises(DataError) as error:
        prepare(given, BYTES, tmp_path)
    for fault in (
        "a list cannot be read:",
        "document 1: expected a text, bytes or a flat array of tokens, got int",
        "document 2: has U+D83D at character 5",
        "document 3: byte 0xff at 0 is not UTF-8",
        "document 4: expected a text",
        "document 5: no field 'text'; it has 'body'",
    ):
        assert fault in str(error.value)
    for nothing in (5, None, b"text", {"train": ["a"]}):
        with pytest.raises(DataError, match="source: expected one such as Text"):
            prepare(nothing, BYTES, tmp_path)  # pyright: ignore
    with pytest.raises(DataError, match="at least one document that is not empty"):
        prepare([], BYTES, tmp_path)
    assert folders(tmp_path) == []


def test_a_path_names_its_source(tmp_path):
    for name, kind in [
        ("a.txt", Text),
        ("a.md.zst", Text),
        ("a.jsonl", JSONL),
        ("a.json.gz", JSONL),
        ("a.parquet", Parquet),
        ("a.npy", Tokens),
    ]:
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(b"")
        assert source_at(folder / name) == kind(str(folder / name))
        assert type(source_at(folder)) is kind
    with pytest.raises(DataError, match="has files for JSONL and .* and Tokens; name the source"):
        source_at(tmp_path)
    (tmp_path / "two.txt").write_text("one\n" * 30)
    training, held_out = prepare(tmp_path / "two.txt", BYTES, tmp_path / "cache")
    assert text(training, held_out) == "one\n" * 28 + "<eos>" + "one\n" * 2 + "<eos>"


# What is held out --------------------------------------------------------------------------------


@hypothesis.given(st.text(min_size=2, max_size=30), st.sampled_from([2, 3, 20]))
def test_a_single_document_is_cut_in_two(document, held_out):
    hypothesis.assume(len(document.encode()) > 1)
    parts = list(parted.with_parts([Document("0", document)], held_out))
    assert [part for part, _ in parts] == ["training", "held_out"]
    head, tail = (bytes(piece.content) for _, piece in parts)  # pyright: ignore
    assert head + tail == document.encode() and tail
    size = max(len(document.encode()) // held_out, 1)
    assert size <= len(tail) < 2 * size + 4
    assert head.decode() + tail.decode() == document


def test_a_single_document_is_cut_after_a_line(tmp_path):
    document = "a line\n" * 40
    training, held_out = prepare([document], BYTES, tmp_path, held_out=10)
    assert (
        text(training) == "a line\n" * 36 + "<eos>" and text(held_out) == "a line\n" * 4 + "<eos>"
    )


def test_the_last_document_fills_what_is_empty():
    def parts(names: list[str], held_out: int) -> list[str]:
        documents = [Document(name, "x") for name in names]
        encoded = ((part, np.zeros(1), 1) for part, _ in parted.with_parts(documents, held_out))
        return [part for part, _, _ in parted.parted(encoded, parted.PARTS, StandardLibrary())]

    # CRC-32 of "15" is even, and of "0" and "1" odd
    assert parts(["0", "1", "0"], 2) == ["training", "training", "held_out"]
    assert parts(["15", "15", "15"], 2) == ["held_out", "held_out", "training"]
    assert parts(["15", "0", "0"], 2) == ["held_out", "training", "training"]


def test_a_named_validation_set(books, tmp_path):
    cache = tmp_path / "cache"
    for given in (
        Text(str(books / "3.txt")),
        str(books / "3.txt"),
        [(books / "3.txt").read_text()],
    ):
        training, held_out = prepare(Text(str(books)), BYTES, cache, validation=given)
        assert len(training.starts) == 40 and len(held_out.starts) == 1
        assert text(held_out) == (books / "3.txt").read_text() + "<eos>"
    # All of a text as training data is another entry than most of it
    assert len(prepare(Text(str(books)), BYTES, cache)[0].starts) < 40
    whole = training.path.parent.parent  # pyright: ignore
    with pytest.raises(DataError, match="nothing was held out; name a validation set"):
        load(whole)
    with pytest.raises(DataError, match="nothing was held out; name a validation set"):
        prepare(Prepared(str(whole)), BYTES, cache)


# Caches ------------------------------------------------------------------------------------------


def test_the_text_that_is_trained_on_is_no_validation_set(books, tmp_path):
    with pytest.raises(DataError, match="is the text that is trained on"):
        prepare(Text(str(books)), BYTES, tmp_path / "cache", validation=Text(str(books)))


def test_names_of_files_need_not_be_utf_8(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for name in (b"caf\xe9.txt", b"b.txt"):
        (folder / os.fsdecode(name)).write_text("a line\n" * 20)
    assert all(map(len, prepare(Text(str(folder)), BYTES, tmp_path / "cache")))


def unreadable(monkeypatch):
    """Reading the content of files fails from here on."""

    def fail(*_, **__):
        raise AssertionError("the text was read")

    monkeypatch.setattr("growjax.data.files.DataFile.opened", fail)


def test_a_cache_goes_by_what_the_files_hold(books, tmp_path, settled, monkeypatch):
    cache = tmp_path / "cache"
    first = prepare(Text(str(books)), BYTES, cache)
    os.utime(books / "1.txt", (1, 1))
    moved = books.rename(tmp_path / "moved")
    copied = Path(shutil.copytree(moved, tmp_path / "copied"))
    for folder in (moved, copied):
        assert prepare(Text(str(folder)), BYTES, cache)[0].path == first[0].path
    assert len(folders(cache)) == 1
    with monkeypatch.context() as patched:
        # The checksums of files that nobody touched are known
        unreadable(patched)
        prepare(Text(str(copied)), BYTES, cache)
        os.utime(copied / "1.txt", (2, 2))
        with pytest.raises(AssertionError, match="the text was read"):
            prepare(Text(str(copied)), BYTES, cache)
    # A note that lost its content, with the power of its machine, is none
    prepare(Text(str(copied)), BYTES, cache)
    for note in (cache / ".contents").iterdir():
        note.write_bytes(b"")
    assert prepare(Text(str(copied)), BYTES, cache)[0].path == first[0].path
    before = (copied / "1.txt").stat()
    (copied / "1.txt").write_text("Kook 1. Book 1. ")
    os.utime(copied / "1.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "Kook 1. Book 1. " in text(*prepare(Text(str(copied)), BYTES, cache))


def test_files_that_changed_just_now_are_read_again(books, tmp_path, monkeypatch):
    """Their next change may have the same time, on file systems with coarse clocks."""
    cache = tmp_path / "cache"
    prepare(Text(str(books)), BYTES, cache)
    unreadable(monkeypatch)
    with pytest.raises(AssertionError, match="the text was read"):
        prepare(Text(str(books)), BYTES, cache)


def test_files_that_change_while_they_are_read_are_refused(books, tmp_path, monkeypatch):
    real = Text.documents

    def documents(self):
        (books / "39.txt").write_text("changed")
        return real(self)

    with monkeypatch.context() as patched:
        patched.setattr(Text, "documents", documents)
        with pytest.raises(DataError, match="changed while they were read"):
            prepare(Text(str(books)), BYTES, tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


def test_a_prepared_folder_trains_without_its_text(books, tmp_path):
    cache = tmp_path / "cache"
    training, held_out = prepare(Text(str(books)), BYTES, cache)
    (folder,) = folders(cache)
    shutil.rmtree(books)
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    source = Prepared(str(copied))
    for corpus, expected in zip(
        prepare(source, BYTES, tmp_path / "no"), (training, held_out), strict=True
    ):
        assert corpus.digest == expected.digest
    assert not (tmp_path / "no").exists()
    # As any source: its documents, which may be held out from anew
    tokens = np.concatenate([document.content for document in source.documents()])
    assert sorted(tokens.tolist()) == sorted([*training.tokens.tolist(), *held_out.tokens.tolist()])
    with pytest.raises(DataError, match="copied: was prepared with another tokenizer"):
        prepare(source, ByteTokenizer(sentinels=3), cache)
    with pytest.raises(DataError, match="manifest.json: the manifest"):
        prepare(Prepared(str(tmp_path / "nowhere")), BYTES, cache)
    with pytest.raises(DataError, match="copy it to this machine"):
        prepare(Prepared("gs://bucket/folder"), BYTES, cache)


def test_documents_in_memory_are_named_in_a_plan_by_what_was_prepared(tmp_path):
    texts = [f"Story {n}. " * 9 for n in range(40)]
    training, held_out = prepare(texts, ByteTokenizer(), tmp_path)
    again, _ = prepare(training.prepared, ByteTokenizer(), tmp_path / "elsewhere")
    assert again.digest == training.digest and held_out.prepared == training.prepared
    with pytest.raises(DataError, match="in memory"):
        assert Corpus.of(texts, ByteTokenizer()).prepared


def test_a_source_that_is_gone_is_replaced_by_what_was_prepared(books, tmp_path):
    cache = tmp_path / "cache"
    source = Text(str(books))
    before = prepare(source, BYTES, cache)
    other = prepare(source, BYTES, cache, held_out=7)
    hidden = books.rename(tmp_path / "hidden")
    with pytest.warns(
        UserWarning, match="books: expected a file or a folder, got neither; going on"
    ):
        assert prepare(source, BYTES, cache)[0].digest == before[0].digest
    with pytest.warns(UserWarning):
        assert prepare(source, BYTES, cache, held_out=7)[1].digest == other[1].digest
    for wrong in (Text(str(books), split="\n"), Text(str(tmp_path / "others"))):
        with pytest.raises(DataError, match="expected a file or a folder"):
            prepare(wrong, BYTES, cache)
    with pytest.raises(DataError, match="expected a file or a folder"):
        prepare(source, ByteTokenizer(sentinels=3), cache)
    # Which of two states of the text is meant, nobody can tell
    hidden.rename(books)
    (books / "1.txt").write_text("new")
    prepare(source, BYTES, cache)
    shutil.rmtree(books)
    with pytest.raises(
        DataError, match=r"prepared several times; name one.*\n  Prepared\('.*'\)\n  Pre"
    ):
        prepare(source, BYTES, cache)


def test_others_can_read_a_cache(books, tmp_path):
    cache, old = tmp_path / "cache", os.umask(0o027)
    try:
        prepare(Text(str(books)), BYTES, cache)
    finally:
        os.umask(old)
    for path in [cache, *cache.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o750 if path.is_dir() else 0o640), path


def test_what_killed_processes_left_is_removed(books, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    dead, alive, fresh, old = (
        cache / f".making-{name}" for name in ("dead", "alive", "fresh", "old")
    )
    for folder in (dead, alive, fresh, old):
        (folder / "training").mkdir(parents=True)
    for folder in (dead, alive):
        (folder / "lock").touch()
    os.utime(old, (1, 1))  # without a lock, as earlier versions left them
    with (alive / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare(Text(str(books)), BYTES, cache)
        assert sorted(cache.glob(".making-*")) == [alive, fresh]
    prepare(Text(str(books)), BYTES, cache)
    assert sorted(cache.glob(".making-*")) == [fresh]


def test_a_killed_preparation_leaves_nothing_behind(books, tmp_path):
    cache = tmp_path / "cache"
    code = (
        "import os, signal, sys\n"
        "from growjax.data import ByteTokenizer, Text, prepare\n"
        "class Doomed(ByteTokenizer):\n"
        "    def encode(self, text): os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare(Text(sys.argv[1]), Doomed(), sys.argv[2])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(books), str(cache)])
    assert ran.returncode == -9 and len(list(cache.glob(".making-*"))) == 1
    prepare(Text(str(books)), BYTES, cache)
    assert not list(cache.glob(".making-*")) and len(folders(cache)) == 1


# In parallel, with progress ------------------------------------------------------------------------


class Slow:
    """A tokenizer that waits for a second document to be tokenised at the same time."""

    def __init__(self, thread_safe: bool):
        self.thread_safe, self.vocabulary = thread_safe, BYTES.vocabulary
        self.barrier, self.alone = threading.Barrier(2), 0

    def encode(self, document: str | bytes) -> Any:
        try:
            self.barrier.wait(timeout=20 if self.thread_safe else 0.01)
        except threading.BrokenBarrierError:
            self.alone += 1
        return BYTES.encode(document)

    places, decode, encode_prompt = BYTES.places, BYTES.decode, BYTES.encode_prompt
    prefix, ends = BYTES.prefix, BYTES.ends


@pytest.mark.parametrize("thread_safe", [True, False])
def test_documents_are_tokenised_by_several_threads_in_their_order(
    tmp_path, monkeypatch, thread_safe
):
    monkeypatch.setattr(preparation, "_GROUP", 1)  # a document each
    monkeypatch.setattr(preparation.os, "cpu_count", lambda: 2)
    documents = [f"{n} " * (n % 5 + 1) for n in range(20)]
    tokenizer: Any = Slow(thread_safe)
    assert [c.digest for c in prepare(documents, tokenizer, tmp_path / "a")] == [
        c.digest for c in prepare(documents, BYTES, tmp_path / "b")
    ]
    assert (tokenizer.alone == 0) == thread_safe


def test_progress_is_told_all_the_time(books, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_EVERY", 0.0)
    seen: list[Progress] = []
    prepare(Text(str(books)), BYTES, tmp_path / "cache", progress=seen.append)
    size = sum(file.stat().st_size for file in books.iterdir())
    tokenising = [p for p in seen if p.activity.startswith("tokenising Text(")]
    reading = [p for p in seen if p.activity.startswith("reading Text(")]
    assert len(reading) + len(tokenising) == len(seen)
    for kind in (reading, tokenising):
        assert {p.total for p in kind} == {size} and kind[-1].done == size
        assert [p.done for p in kind] == sorted(p.done for p in kind) and len(kind) > 20
    assert tokenising[-1].documents == 40
    half = Progress("tokenising X", 50_000_000, 100_000_000, 7, 25.0)
    assert str(half) == "tokenising X: 50% of 100.0 MB, 2.0 MB/s, 0:25 left"
    assert str(Progress("tokenising X", 0, None, 1234, 1.0)) == "tokenising X: 1,234 documents"


def test_a_fault_ends_the_threads(books, tmp_path):
    (books / "5.txt").write_bytes(b"\xff")
    before = threading.active_count()
    with pytest.raises(DataError, match="5.txt, line 1"):
        prepare(Text(str(books)), BYTES, tmp_path / "cache")
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


# On the command line -------------------------------------------------------------------------------


def prepared(path: Any, cache: Path, **settings: Any) -> str:
    shown = io.StringIO()
    prepare_paths(str(path), cache, console=Console(file=shown, width=60), **settings)
    return shown.getvalue()


def test_prepare_prints_what_a_plan_says(books, tmp_path):
    shown = prepared(books, tmp_path / "cache")
    training, held_out = prepare(Text(str(books)), BYTES, tmp_path / "cache")
    assert f"{len(training):,} tokens to train on, in {len(training.starts)} documents\n" in shown
    assert f"{len(held_out):,} tokens held out, in" in shown
    names: dict[str, Any] = {"Text": Text, "Prepared": Prepared}
    for line in shown.splitlines()[2:]:
        # Either may be pasted into a plan
        fields = eval(f"dict({line.partition(': ')[2]})", names)
        assert fields["tokenizer"] == "bytes"
        assert prepare(fields["data"], BYTES, tmp_path / "cache")[0].digest == training.digest


def test_prepare_takes_a_validation_set_and_settings(books, tmp_path):
    shown = prepared(books, tmp_path / "cache", validation=str(books / "1.txt"), split=". ")
    assert "validation=Prepared(" in shown and "split='. '" in shown and "2 documents" in shown
    with pytest.raises(DataError, match="books: is read by Text, without field"):
        prepared(books, tmp_path / "cache", field="body")


def test_blends_are_prepared_source_by_source(books, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(books, other)
    blend = Blend((Text(str(books)), Text(str(other))), (3, 1))
    training, held_out = prepare(blend, BYTES, tmp_path / "cache")
    assert training.names == held_out.names == ("books", "other")
    assert training.weights == (3, 1) and len(folders(tmp_path / "cache")) == 1
    alone = prepare(Text(str(books)), BYTES, tmp_path / "cache")
    assert [c.digest for c in training.corpora] == [alone[0].digest] * 2
    whole, single = prepare(blend, BYTES, tmp_path / "cache", validation=["held out", "too"])
    assert isinstance(whole, Blended) and [len(c.starts) for c in whole.corpora] == [40, 40]
    assert isinstance(single, Corpus)
