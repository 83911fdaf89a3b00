"""Data: sources tell what is wrong, corpora are the text, and a damaged cache is never used."""

import gzip
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from growjax import data
from growjax.data import (
    JSONL,
    ByteTokenizer,
    Corpus,
    Parquet,
    StandardLibrary,
    Text,
    Tokens,
    Vocabulary,
    load_tokenizer,
    prepare,
)
from growjax.errors import DataError
from growjax.values import from_dict, to_dict


BYTES = ByteTokenizer()
EOS = BYTES.vocabulary.specials["eos"]


def write(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def contents(source: Any) -> dict[str, Any]:
    return {name: content for name, content in source.documents()}


def folders(cache: Path) -> list[Path]:
    """The folders of corpora in a cache, without what is its own."""
    return [path for path in cache.iterdir() if not path.name.startswith(".")]


@pytest.fixture
def books(tmp_path):
    """Forty documents, of which the CRC-32 holds some out."""
    folder = tmp_path / "books"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n}.txt").write_text(f"Book {n}. " * (n % 7 + 1), encoding="utf-8")
    return folder


def test_a_plan_can_name_its_data_without_loading_grain():
    code = "import sys, growjax.data as d; d.Causal(8), d.Text('x'); print('grain' in sys.modules)"
    root = Path(data.__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert ran.stdout.strip() == "False"


# Tokenizers ----------------------------------------------------------------------------------


@hypothesis.given(st.text())
def test_bytes_come_back(text):
    tokens = BYTES.encode(text)
    assert len(tokens) == len(text.encode()) and BYTES.vocabulary.is_text[tokens].all()
    assert BYTES.decode(tokens) == text


def test_the_byte_vocabulary_is_laid_out_as_promised():
    v = BYTES.vocabulary
    assert v.size == 384 and v.sentinels[0] == 383 and v.sentinels[-1] == 284
    names = ["pad", "bos", "eos", "mask", "cls", "sep", "R", "S", "X"]
    assert [v.specials[n] for n in names] == list(range(256, 265))
    assert v.is_text.sum() == 256 and v.is_sentinel.sum() == 100
    assert BYTES.decode([104, 105, EOS, 383, 270]) == "hi<eos><0><?270>"
    many = ByteTokenizer(sentinels=400).vocabulary
    assert many.size % 128 == 0 and len(many.sentinels) == 400 and many.digest != v.digest
    assert from_dict(json.loads(json.dumps(to_dict(v)))) == v


@pytest.fixture
def bpe(tmp_path):
    """A byte-level tokenizer that was saved to cut texts short and to pad them."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    special = ["<pad>", "</s>", "<mask>", "<extra_id_1>", "<extra_id_0>"]
    made.train_from_iterator(
        ["a tree grows and a tree grows"] * 9, vocab_size=290, special_tokens=special
    )
    made.enable_truncation(4)
    made.enable_padding(length=4)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer_file(bpe):
    tokenizer = load_tokenizer(bpe)
    v = tokenizer.vocabulary
    text = "a tree grows </s> and <mask> grows too"
    tokens = tokenizer.encode(text)
    assert len(tokens) > 4 and tokenizer.decode(tokens) == text
    # What a document spells out is no special token
    assert v.is_text[tokens].all()
    assert v.specials == {"pad": 0, "eos": 1, "mask": 2} and v.sentinels == (4, 3)
    np.testing.assert_array_equal(tokenizer.encode(text.encode()), tokens)
    words = v.words(tokenizer.encode("a tree grows"))
    assert words.max() == 2
    assert load_tokenizer(bpe).vocabulary == v
    renamed = load_tokenizer(bpe, specials={"sep": "</s>"}).vocabulary
    assert renamed.specials["sep"] == 1 and renamed.digest != v.digest


def test_a_bert_vocabulary(tmp_path):
    pytest.importorskip("tokenizers")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] [unused0] grow ##ing tree ##s"
    write(tmp_path, vocab_txt=words.replace(" ", "\n"))
    tokenizer = load_tokenizer(tmp_path / "vocab.txt")
    v = tokenizer.vocabulary
    assert v.specials == {"pad": 0, "mask": 4, "cls": 2, "sep": 3} and v.separator == 3
    tokens = tokenizer.encode("Growing trees tree")
    assert tokens.tolist() == [6, 7, 8, 9, 8]
    assert v.words(tokens).tolist() == [0, 0, 1, 1, 2]
    assert v.text_ids.tolist() == [6, 7, 8, 9]
    # A piece that begins with the mark of another kind of vocabulary changes nothing
    write(tmp_path, vocab_txt=f"{words} Ġ ▁".replace(" ", "\n"))
    assert load_tokenizer(tmp_path).vocabulary.words(tokens).tolist() == [0, 0, 1, 1, 2]


def test_a_tokenizer_that_is_none(tmp_path):
    with pytest.raises(DataError, match="a file or a folder, and 'nowhere' is neither"):
        load_tokenizer("nowhere")
    with pytest.raises(DataError, match="sentinels of 0 or more and a multiple of 1"):
        ByteTokenizer(sentinels=-1)
    pytest.importorskip("tokenizers")
    write(tmp_path, bad_json="{}")
    with pytest.raises(DataError, match=r"bad.json: expected a JSON file of the library"):
        load_tokenizer(tmp_path / "bad.json")


def test_a_vocabulary_that_contradicts_itself_is_refused():
    with pytest.raises(DataError, match="(?s)pieces: expected.*eos: expected an id below 3") as e:
        Vocabulary("d", "wq.", {"eos": 7, "pad": 0}, (2, 2))
    assert "id 0 is text according to" in str(e.value) and "each id once" in str(e.value)
    with pytest.raises(DataError, match="an eos or a sep token"):
        _ = Vocabulary("d", "w", {}).separator


# Sources -------------------------------------------------------------------------------------


def test_a_folder_of_text(tmp_path):
    write(tmp_path, a_txt="one", b__c_txt="two", b__d_md="three", x__y_txt="four")
    (tmp_path / "x").rename(tmp_path / ".hidden")
    assert contents(Text(str(tmp_path))) == {"a.txt": b"one", "b/c.txt": b"two", "b/d.md": b"three"}
    assert list(contents(Text(str(tmp_path), "*.md"))) == ["b/d.md"]
    assert contents(Text(str(tmp_path / "a.txt"))) == {"a.txt": b"one"}


@hypothesis.given(st.lists(st.text("ab\n", max_size=5), min_size=1, max_size=6), st.integers(1, 7))
def test_a_file_is_cut_where_it_says(tmp_path_factory, parts, chunk):
    """Whatever is read at once: a separator may stand across two chunks."""
    text = "|#|".join(parts)
    hypothesis.assume(text)
    folder = write(tmp_path_factory.mktemp("cut"), all_txt=text)
    pieces = list(contents(Text(str(folder), split="|#|")).values()) if any(parts) else []
    assert [piece.decode() for piece in pieces] == (parts if any(parts) else [])


def test_a_separator_may_stand_across_chunks(tmp_path):
    head = "x" * ((1 << 20) - 1)
    write(tmp_path, all_txt=head + "|#|tail")
    assert [len(c) for c in contents(Text(str(tmp_path), split="|#|")).values()] == [len(head), 4]


def test_bytes_that_are_no_text_are_named_with_their_lines(tmp_path):
    write(tmp_path, a_txt=b"fine\n\nbad \xff", b_txt="fine", c_txt=b"\xfe")
    with pytest.raises(DataError, match="cannot be read") as error:
        contents(Text(str(tmp_path)))
    assert "a.txt, line 3: byte 0xff is not UTF-8" in str(error.value)
    assert "c.txt, line 1: byte 0xfe is not UTF-8" in str(error.value)
    assert "b.txt" not in str(error.value)
    with pytest.raises(DataError, match="a.txt, line 3: byte 0xff"):
        contents(Text(str(tmp_path), split="\n\n"))


def test_faults_are_gathered_up_to_a_handful(tmp_path):
    for n in range(9):
        (tmp_path / f"{n}.txt").write_bytes(b"fine" if n in (0, 2) else b"\xff")
    given = []
    with pytest.raises(DataError) as error:
        given += (document.name for document in Text(str(tmp_path)).documents())
    assert str(error.value).count("is not UTF-8") == 5
    assert given == ["0.txt"]  # nothing is worked on after the first fault


@pytest.mark.parametrize("packed", [False, True])
def test_jsonl(tmp_path, packed):
    lines = b'{"text": "one"}\n\n{"id": 1, "text": "\\u0000two"}\n'
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(lines) if packed else lines)
    want = {f"{path.name}:1": "one", f"{path.name}:3": "\0two"}
    assert contents(JSONL(str(path))) == contents(JSONL(str(tmp_path))) == want


def test_every_kind_of_bad_line_is_named(tmp_path):
    lines = [b'{"text": 1}', b'{"other": ""}', b"[]", b"{", b'{"text": "\xff"}']
    write(tmp_path, a_jsonl=b'{"text": "fine"}\n' + b"\n".join(lines))
    with pytest.raises(DataError) as error:
        contents(JSONL(str(tmp_path)))
    for n, fault in [
        (2, "'text' is a int, not text"),
        (3, "no field 'text'; it has 'other'"),
        (4, "expected an object, got a list"),
        (5, "Expecting property name"),
        (6, "byte 0xff is not UTF-8"),
    ]:
        assert f"a.jsonl, line {n}: {fault}" in str(error.value)


def test_a_packed_file_that_is_cut_short(tmp_path):
    whole = gzip.compress(b"".join(b'{"text": "many"}\n' for _ in range(99)))
    write(tmp_path, a_jsonl_gz=whole[: len(whole) // 2])
    with pytest.raises(DataError, match="Compressed file ended"):
        contents(JSONL(str(tmp_path)))


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {n}" for n in range(600)]  # more than one batch
    (tmp_path / "bad").mkdir()
    parquet.write_table(pa.table({"text": texts, "n": range(600)}), tmp_path / "a.parquet")
    documents = contents(Parquet(str(tmp_path)))
    assert list(documents.values()) == texts and list(documents)[599] == "a.parquet:599"
    with pytest.raises(DataError, match="a.parquet: no column 'body'; its columns are text, n"):
        contents(Parquet(str(tmp_path), "body"))
    with pytest.raises(DataError, match="a.parquet, row 0: 'n' is a int, not text"):
        contents(Parquet(str(tmp_path), "n"))
    bad = pa.array([b"text", b"\xff"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": bad}), tmp_path / "bad" / "c.parquet")
    with pytest.raises(DataError, match="c.parquet, row 1: 'text' is not UTF-8: "):
        contents(Parquet(str(tmp_path / "bad")))
    write(tmp_path, b_parquet="no parquet")
    with pytest.raises(DataError, match="b.parquet: "):
        contents(Parquet(str(tmp_path)))


def test_tokens(tmp_path):
    tokens = np.array([5, 6, 0, 7, 0], np.uint16)
    np.save(tmp_path / "tokens.npy", tokens)
    path = str(tmp_path / "tokens.npy")
    assert [c.tolist() for c in contents(Tokens(path)).values()] == [[5, 6, 0, 7, 0]]
    assert [c.tolist() for c in contents(Tokens(path, 0)).values()] == [[5, 6, 0], [7, 0]]
    np.save(tmp_path / "starts.npy", np.array([0, 4]))
    documents = [c.tolist() for c in contents(Tokens(str(tmp_path))).values()]
    assert documents == [[5, 6, 0, 7], [0]]
    np.save(tmp_path / "starts.npy", np.array([0, 9]))
    with pytest.raises(DataError, match="offsets up to the 5 tokens of .*tokens.npy, got 9"):
        contents(Tokens(str(tmp_path)))
    np.save(tmp_path / "starts.npy", np.array([1, 2]))
    with pytest.raises(DataError, match="starts.npy: expected offsets that ascend from 0"):
        contents(Tokens(str(tmp_path)))


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 2), int), np.array([{}], object)])
def test_files_that_hold_no_tokens_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match="a.npy: expected a (flat|NumPy)"):
        contents(Tokens(str(tmp_path / "a.npy")))


def test_a_pickle_is_never_loaded(tmp_path):
    """Loading one could run anything; this one would have made a flat array of integers."""
    (tmp_path / "a.npy").write_bytes(pickle.dumps(np.arange(4)))
    with pytest.raises(DataError, match="a.npy: expected a NumPy file"):
        contents(Tokens(str(tmp_path / "a.npy")))


def test_hugging_face_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})
    rows.save_to_disk(str(tmp_path / "saved"))
    source = data.HuggingFace(str(tmp_path / "saved"))
    assert contents(source) == {"train:0": "one", "train:1": "two"}
    assert source.fingerprint() == source.fingerprint()
    with pytest.raises(DataError, match="no column 'body'; its columns are text, n"):
        contents(data.HuggingFace(str(tmp_path / "saved"), field="body"))


def test_the_standard_library_is_always_there():
    documents = contents(StandardLibrary())
    assert {"json/decoder.py", "topics/if.txt"} <= set(documents)
    assert not any("test" in name.split("/") for name in documents)
    assert StandardLibrary().fingerprint() == StandardLibrary().fingerprint()


@pytest.mark.parametrize("kind", [Text, JSONL, Parquet])
def test_a_source_that_is_not_there_or_empty(tmp_path, kind):
    with pytest.raises(DataError, match="nowhere: expected a file or a folder"):
        contents(kind(str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="expected files like .*, got none"):
        contents(kind(str(tmp_path)))
    if kind is not Parquet:
        write(tmp_path, **({"a_txt": ""} if kind is Text else {"a_jsonl": '\n{"text": ""}\n'}))
        with pytest.raises(DataError, match="at least one document that is not empty"):
            contents(kind(str(tmp_path)))


def test_a_file_that_vanishes_while_reading_is_named(books):
    documents = Text(str(books)).documents()
    next(documents)
    (books / "39.txt").unlink()
    with pytest.raises(DataError, match="39.txt: No such file"):
        list(documents)


# Corpora -------------------------------------------------------------------------------------


@hypothesis.given(st.lists(st.text(max_size=5), min_size=1, max_size=8))
def test_a_corpus_is_its_documents_with_a_separator_after_each(texts):
    corpus = Corpus.of(texts, BYTES)
    filled = [t for t in texts if t]
    assert BYTES.decode(corpus.tokens) == "".join(f"{t}<eos>" for t in filled)
    assert corpus.text_bytes == sum(len(t.encode()) for t in filled)
    ends = [*corpus.starts[1:], len(corpus)] if filled else []
    cut = zip(corpus.starts, ends, strict=True)
    assert [BYTES.decode(corpus.tokens[a : b - 1]) for a, b in cut] == filled
    if filled:
        whole = np.repeat(np.arange(len(filled)), np.diff([*corpus.starts, len(corpus)]))
        for start, stop in itertools.combinations(range(0, len(corpus) + 1, 3), 2):
            part = whole[start:stop]
            np.testing.assert_array_equal(corpus.documents(start, stop), part - part[0])


def test_a_prepared_corpus_is_the_text(books, tmp_path):
    training, held_out = prepare(Text(str(books)), BYTES, tmp_path / "cache", held_out=5)
    files = sorted(books.iterdir())
    out = [f for f in files if zlib.crc32(f.name.encode()) % 5 == 0]
    assert 2 < len(out) < 20
    for corpus, part in [(held_out, out), (training, [f for f in files if f not in out])]:
        alike = Corpus.of([f.read_text() for f in part], BYTES)
        np.testing.assert_array_equal(corpus.tokens, alike.tokens)
        np.testing.assert_array_equal(corpus.starts, alike.starts)
        assert (corpus.digest, corpus.text_bytes) == (alike.digest, alike.text_bytes)
        assert corpus.vocabulary == BYTES.vocabulary and corpus.tokens.dtype == np.uint16
        np.testing.assert_array_equal(corpus.read(3, 9), alike.tokens[3:9])
    assert held_out.bits_per_byte(np.log(2)) == len(held_out) / held_out.text_bytes


def test_a_cache_is_made_once_and_anew_for_anything_else(books, tmp_path, monkeypatch):
    cache, source = tmp_path / "cache", Text(str(books))
    prepare(source, BYTES, cache)
    with monkeypatch.context() as patched:
        patched.setattr(Text, "documents", None)  # would fail if it were read again
        prepare(source, BYTES, cache)
    prepare(source, ByteTokenizer(sentinels=3), cache)
    prepare(source, BYTES, cache, held_out=7)
    before = (books / "1.txt").stat()
    (books / "1.txt").write_text("Changed " * 2)
    os.utime(books / "1.txt", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert (books / "1.txt").stat().st_size == before.st_size
    training, _ = prepare(source, BYTES, cache)
    assert "Changed " in BYTES.decode(training.tokens)
    assert len(folders(cache)) == 4
    assert not list(cache.glob(".making-*"))


def test_something_is_always_held_out(tmp_path):
    write(tmp_path, a__0_txt="one", a__1_txt="two", a__2_txt="")
    training, held_out = prepare(Text(str(tmp_path / "a")), BYTES, tmp_path / "c", held_out=10**6)
    assert BYTES.decode(training.tokens) == "one<eos>"
    assert BYTES.decode(held_out.tokens) == "two<eos>"
    (tmp_path / "a/1.txt").unlink()
    (tmp_path / "a/0.txt").write_text("o")
    with pytest.raises(DataError, match="one to hold out, got 1 in all"):
        prepare(Text(str(tmp_path / "a")), BYTES, tmp_path / "c")
    for wrong in (1, 2.5, "5"):
        with pytest.raises(DataError, match="held_out: expected a whole number of 2 or more"):
            prepare(Text(str(tmp_path / "a")), BYTES, tmp_path / "c", held_out=wrong)  # type: ignore


def test_a_source_with_a_fault_leaves_no_cache(books, tmp_path):
    (books / "5.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="5.txt, line 1"):
        prepare(Text(str(books)), BYTES, tmp_path / "cache")
    assert folders(tmp_path / "cache") == list((tmp_path / "cache").glob(".making-*")) == []


def test_tokens_are_taken_as_they_are(tmp_path):
    np.save(tmp_path / "t.npy", np.array([5, 6, 0, 7, 0, 8, 9]))
    training, held_out = prepare(Tokens(str(tmp_path / "t.npy"), 0), BYTES, tmp_path / "c")
    assert training.tokens.tolist() + held_out.tokens.tolist() == [5, 6, 0, 7, 0, 8, 9]
    with pytest.raises(DataError, match="was given as tokens"):
        training.bits_per_byte(1.0)
    np.save(tmp_path / "t.npy", np.array([5, 384, 0, 7]))
    with pytest.raises(DataError, match="t.npy:0: expected tokens from 0 to 383, got 0 to 384"):
        prepare(Tokens(str(tmp_path / "t.npy")), BYTES, tmp_path / "c")


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["training", "held_out"])
@pytest.mark.parametrize("name", ["tokens.bin", "starts.bin"])
@pytest.mark.parametrize(
    "damage, fault, sizes_tell",
    [
        (truncate, "bytes, got", True),
        (Path.unlink, "No such file", True),
        (flip, "its checksum is not the one", False),
    ],
)
def test_a_damaged_cache_is_refused(books, tmp_path, part, name, damage, fault, sizes_tell):
    source, cache = Text(str(books)), tmp_path / "cache"
    prepare(source, BYTES, cache)
    (folder,) = folders(cache)
    damage(folder / part / name)
    with pytest.raises(DataError, match=f"{part}/{name}: .*{fault}"):
        prepare(source, BYTES, cache)
    if sizes_tell:
        with pytest.raises(DataError, match=f"{part}/{name}: .*{fault}"):
            prepare(source, BYTES, cache, verify=False)
    shutil.rmtree(folder)  # as the message says
    prepare(source, BYTES, cache)


def test_a_changed_manifest_is_refused(books, tmp_path):
    source, cache = Text(str(books)), tmp_path / "cache"
    prepare(source, BYTES, cache)
    (folder,) = folders(cache)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["parts"]["training"]["bytes"] += 1
    for text, fault in [
        (json.dumps(manifest), "changed after"),
        ("{", "cannot be"),
        ("[]", "cannot"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=f"manifest.json: .*{fault}"):
            prepare(source, BYTES, cache)
    path.unlink()
    with pytest.raises(DataError, match="manifest.json: .*No such file"):
        prepare(source, BYTES, cache)


def test_two_processes_may_prepare_the_same_corpus(books, tmp_path):
    source, cache, digests = Text(str(books)), tmp_path / "cache", []
    barrier = threading.Barrier(4)

    def work():
        barrier.wait()
        digests.append(prepare(source, BYTES, cache)[0].digest)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 4 and len(set(digests)) == 1 and len(folders(cache)) == 1
