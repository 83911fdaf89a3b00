"""Files of documents: found wherever they are, unpacked, cut in linear time, and named by every fault."""

import bz2
import gzip
import io
import lzma
import os
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from growjax.data import (
    JSONL,
    ByteTokenizer,
    HuggingFace,
    Parquet,
    StandardLibrary,
    Text,
    Tokens,
    prepare,
)
from growjax.data.files import counter, find, pieces
from growjax.errors import DataError


def contents(source):
    return {name: content for name, content in source.documents()}


def packed(suffix: str, data: bytes) -> bytes:
    if suffix == ".zst":
        pyarrow = pytest.importorskip("pyarrow")
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}[suffix](
        data
    )


SUFFIXES = ["", ".gz", ".bz2", ".xz", ".zst"]


@pytest.fixture
def memory():
    """fsspec's file system in memory, which all of a process share."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


# Compression -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_are_unpacked_while_they_are_read(tmp_path, suffix):
    (tmp_path / f"a.txt{suffix}").write_bytes(packed(suffix, b"one\n\ntwo"))
    # Two streams, one after the other, are one file for all of these formats
    two = packed(suffix, b'{"text": "1"}\n') + packed(suffix, b'{"text": "2"}\n')
    (tmp_path / f"b.jsonl{suffix}").write_bytes(two)
    text = Text(str(tmp_path), glob="*.txt*", split="\n\n")
    assert list(contents(text).values()) == [b"one", b"two"]
    name = f"b.jsonl{suffix}"
    assert contents(JSONL(str(tmp_path))) == {f"{name}:1": "1", f"{name}:2": "2"}


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
@pytest.mark.parametrize("damage", ["cut short", "not packed", "empty"])
def test_a_packed_file_that_is_not_whole_is_named(tmp_path, suffix, damage):
    whole = packed(suffix, bytes(range(128)) * 99)
    data = {"cut short": whole[:-9], "not packed": b"not packed at all", "empty": b""}[damage]
    (tmp_path / "b.txt").write_bytes(b"whole")
    (tmp_path / f"a.txt{suffix}").write_bytes(data)
    with pytest.raises(DataError, match=re.escape(f"a.txt{suffix}: ")):
        contents(Text(str(tmp_path)))


# Finding ---------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    for name in ("a.txt", "b/c.txt", "b/d.md", "b/e/f.txt", ".h/i.txt", "b/.j.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("", ["a.txt", "b/c.txt", "b/d.md", "b/e/f.txt"]),
        ("*.txt", ["a.txt"]),
        ("?.txt", ["a.txt"]),
        ("*/*.txt", ["b/c.txt"]),
        ("**/*.txt", ["a.txt", "b/c.txt", "b/e/f.txt"]),
        ("[b-z]", ["b/c.txt", "b/d.md", "b/e/f.txt"]),
        # The folder itself and each of its files: every document once
        ("**", ["a.txt", "b/c.txt", "b/d.md", "b/e/f.txt"]),
        ("b/c.txt", ["c.txt"]),
    ],
)
def test_a_folder_a_file_or_a_pattern(tree, memory, pattern, names):
    for name in ("a.txt", "b/c.txt", "b/d.md", "b/e/f.txt", ".h/i.txt", "b/.j.txt"):
        memory.pipe(f"/tree/{name}", name.encode())
    for root in (str(tree), f"file://{tree}", "memory://tree"):
        path = f"{root}/{pattern}".rstrip("/")
        # The same names wherever the files are, since names decide what is held out
        assert [file.name for file in find(path, "*")] == names, root
        read = contents(Text(path))
        assert list(read) == names
        assert bytes(read[names[0]]).decode().endswith(names[0].split("/")[-1])  # pyright: ignore


def test_the_pattern_of_a_folder_may_have_folders(tree):
    assert list(contents(Text(str(tree), "b/*.txt"))) == ["b/c.txt"]
    assert list(contents(Text(str(tree), "**/*.md"))) == ["b/d.md"]
    assert list(contents(Text(str(tree), "b/**/*.txt"))) == ["b/c.txt", "b/e/f.txt"]
    with pytest.raises(DataError, match=r"expected files like \*\.csv, got none"):
        contents(Text(str(tree), "*.csv"))
    with pytest.raises(DataError, match=r"expected files like \*, got none"):
        contents(Text(str(tree / "*.csv")))


def test_json_lines_are_not_read_as_text_by_mistake(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl.gz").write_bytes(packed(".gz", b'{"text": "two"}\n'))
    folder = str(tmp_path)
    with pytest.raises(
        DataError, match=r"has JSON lines in it, such as .*b\.jsonl\.gz; give JSONL\("
    ):
        contents(Text(folder))
    assert contents(Text(folder, "*.txt")) == {"a.txt": b"one"}
    # Whoever names them has them
    assert len(contents(Text(folder, "**/*"))) == 2
    assert list(contents(Text(f"{folder}/*.jsonl.gz"))) == ["b.jsonl.gz"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path, memory):
    (tmp_path / "a[1].txt").write_text("odd")
    (tmp_path / "a1.txt").write_text("even")
    assert contents(Text(str(tmp_path / "a[1].txt"))) == {"a[1].txt": b"odd"}
    memory.pipe("/x/a[2].txt", b"odd")
    assert contents(Text("memory://x/a[2].txt")) == {"a[2].txt": b"odd"}


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    far, here = tmp_path / "far", tmp_path / "here"
    far.mkdir()
    here.mkdir()
    (far / "a.txt").write_text("one")
    (here / "b.txt").symlink_to(far / "a.txt")
    (here / "link").symlink_to(far, target_is_directory=True)
    (here / "again").symlink_to(far, target_is_directory=True)
    (far / "back").symlink_to(here, target_is_directory=True)
    (here / "self").symlink_to(here, target_is_directory=True)
    names = ["again/a.txt", "b.txt", "link/a.txt"]
    assert [n for n in contents(Text(str(here))) if "back" not in n] == names
    assert len(contents(Text(str(here)))) < 10
    (here / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="here/gone: a link that leads nowhere"):
        contents(Text(str(here)))
    # A link that the pattern leaves out is none of the source's business
    assert list(contents(Text(str(here), "b.txt"))) == ["b.txt"]


def test_faults_at_urls_are_typed(memory, monkeypatch):
    with pytest.raises(DataError, match="memory://nowhere: expected a file or a folder"):
        contents(Text("memory://nowhere"))
    with pytest.raises(DataError, match="nothing://x: fsspec cannot list it: Protocol not known"):
        contents(Text("nothing://x"))
    with pytest.raises(DataError, match="copy the file to this machine"):
        contents(Tokens("memory://x.npy"))
    memory.pipe("/x/a.txt", b"fine")

    def fail(*_, **__):
        raise RuntimeError("the token has expired")

    monkeypatch.setattr(type(memory), "_open", fail)
    with pytest.raises(DataError, match="x/a.txt: the token has expired"):
        contents(Text("memory://x"))


def test_tables_at_urls(memory):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pa.table({"text": ["one", "two"]}), sink)
    memory.pipe("/t/a.parquet", sink.getvalue())
    documents = contents(Parquet("memory://t"))
    assert documents == {"a.parquet:0": "one", "a.parquet:1": "two"}


# What a cache goes by --------------------------------------------------------------------------


def test_contents_do_not_depend_on_the_place_or_the_time(tree, tmp_path_factory, memory):
    source = Text(str(tree), "*.txt")
    before = source.content()
    stamp = source.fingerprint()
    os.utime(tree / "a.txt", (1, 1))
    assert source.content() == before and source.fingerprint() != stamp
    moved = tmp_path_factory.mktemp("moved") / "tree"
    tree.rename(moved)
    assert Text(str(moved), "*.txt").content() == before
    for other in (
        Text(str(moved)),
        Text(str(moved), "*.txt", split="\n"),
        JSONL(str(moved / "a.txt")),
    ):
        assert other.content() != before
    old = (moved / "a.txt").stat()
    (moved / "a.txt").write_text("other")
    os.utime(moved / "a.txt", ns=(old.st_atime_ns, old.st_mtime_ns))
    # Neither its size nor its time of modification tells, and both notice
    moved_source = Text(str(moved), "*.txt")
    assert (moved / "a.txt").stat().st_size == old.st_size
    assert moved_source.content() != before
    memory.pipe("/x/a.txt", b"one")
    at_url = Text("memory://x")
    first = at_url.fingerprint(), at_url.content()
    memory.pipe("/x/a.txt", b"two")
    assert at_url.fingerprint() != first[0] and at_url.content() != first[1]
    assert StandardLibrary().content() == StandardLibrary().content()


@pytest.mark.parametrize("told", ["ETag", "Last-Modified", "size", None])
def test_a_text_at_a_url_that_changes_is_not_taken_for_its_old_one(
    tmp_path, memory, monkeypatch, told
):
    """Of https, fsspec's stamp is the URL alone; and a server need not tell more than that."""
    version, reads = [0], []
    real, opened = memory.info, memory.open

    def info(path, **kwargs):
        about = {key: real(path)[key] for key in ("name", "type")} | {"size": None}
        if told == "ETag":
            about["ETag"] = f'"{version[0]}"'
        if told == "Last-Modified":
            about["Last-Modified"] = f"Mon, 02 Nov 2026 10:00:0{version[0]} GMT"
        return about | ({"size": real(path)["size"]} if told == "size" else {})

    monkeypatch.setattr(type(memory), "info", lambda self, path, **kwargs: info(path, **kwargs))
    monkeypatch.setattr(type(memory), "ukey", lambda self, path: path)
    monkeypatch.setattr(
        type(memory), "open", lambda self, *a, **k: (reads.append(a), opened(*a, **k))[1]
    )
    for text in (b"one text", b"two text", b"three!!!"):
        memory.pipe("/x/a.txt", text * 9)
        for again in (False, True):
            reads.clear()
            training, _ = prepare(Text("memory://x/a.txt"), ByteTokenizer(), tmp_path)
            assert bytes(np.asarray(training.tokens[:8], np.uint8)) == text
            # What tells its version is read for the corpus alone, and not at all once that is made
            if told in ("ETag", "Last-Modified") and again:
                assert not reads
        version[0] += 1


def test_a_text_that_changes_while_it_is_read_at_a_url_is_refused(tmp_path, memory, monkeypatch):
    """Even where the server tells nothing of its files."""
    real, opened, opens = memory.info, memory.open, []
    monkeypatch.setattr(
        type(memory),
        "info",
        lambda self, path, **k: {key: real(path)[key] for key in ("name", "type")},
    )
    monkeypatch.setattr(type(memory), "ukey", lambda self, path: path)

    def open_and_change(self, *args, **kwargs):
        opens.append(args)
        if len(opens) == 2:
            memory.pipe("/x/a.txt", b"the second" * 9)
        return opened(*args, **kwargs)

    memory.pipe("/x/a.txt", b"the first!" * 9)
    monkeypatch.setattr(type(memory), "open", open_and_change)
    with pytest.raises(DataError, match="changed while they were read"):
        prepare(Text("memory://x/a.txt"), ByteTokenizer(), tmp_path)


def test_a_stamp_notices_a_change_that_sets_its_time_back(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    source, old = Text(str(tmp_path)), (tmp_path / "a.txt").stat()
    stamp = source.fingerprint()
    (tmp_path / "b.txt").write_text("two")
    os.utime(tmp_path / "b.txt", ns=(old.st_atime_ns, old.st_mtime_ns))
    (tmp_path / "b.txt").rename(tmp_path / "a.txt")
    assert source.fingerprint() != stamp


def test_bytes_are_counted_as_they_lie_on_the_disk(tmp_path):
    data = gzip.compress(b"x" * 5000)
    (tmp_path / "a.txt.gz").write_bytes(data)
    counts: list[int] = []
    token = counter.set(counts.append)
    try:
        contents(Text(str(tmp_path)))
    finally:
        counter.reset(token)
    assert sum(counts) == len(data) == sum(file.size() for file in Text(str(tmp_path)).files())


# Cutting ---------------------------------------------------------------------------------------

ENDS = ["\n", "\r\n", "\r"]


class Chunks(io.BytesIO):
    """A stream that gives a few bytes at a time."""

    def __init__(self, data: bytes, chunk: int):
        super().__init__(data)
        self.chunk = chunk

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self.chunk)


@hypothesis.given(
    st.lists(st.text("ab#", max_size=4), min_size=1, max_size=6),
    st.sampled_from(["\n\n", "\r\n\r\n", "\n#\n", "#"]),
    st.lists(st.sampled_from(ENDS), min_size=6, max_size=6),
    st.sampled_from([1, 2, 3, 7]),
)
def test_separators_in_any_form_of_line_ends(parts, split, ends, chunk):
    """Whatever the size of the chunks, in which a separator may stand across two."""
    hypothesis.assume(not any("#" in part for part in parts))
    plain = split.replace("\r\n", "\n")
    text = parts[0]
    for part, end in zip(parts[1:], ends, strict=False):
        text += plain.replace("\n", end) + part

    got = list(pieces(Chunks(text.encode(), chunk), split))
    assert b"".join(piece + separator for piece, separator in got) == text.encode()
    # Where parts are empty, an end of line of one separator may join that of the next
    if all(parts) or split == "#":
        assert [piece.decode() for piece, _ in got] == parts


def test_one_end_of_a_line_is_not_two():
    for text in (b"a\r\nb\r\n", b"a\rb\nc", b"a\r\n"):
        assert [piece for piece, _ in pieces(io.BytesIO(text), "\n\n")] == [text]
    cut = [piece for piece, _ in pieces(io.BytesIO(b"a\r\n\r\nb\n\rc\n\r\nd"), "\n\n")]
    assert cut == [b"a", b"b", b"c", b"d"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5])
def test_a_line_may_end_in_the_next_chunk(chunk):
    text = b"ab\r\n\r\ncd\r\n\r\nef"
    assert [piece for piece, _ in pieces(Chunks(text, chunk), "\n\n")] == [b"ab", b"cd", b"ef"]


def test_a_file_without_separators_is_looked_at_once(monkeypatch):
    """Searching all that was read again at every chunk took time that is quadratic in the file."""
    searched = 0

    class Pattern:
        def __init__(self, pattern):
            self.pattern = re.compile(pattern)

        def search(self, data, start):
            nonlocal searched
            searched += len(data) - start
            return self.pattern.search(data, start)

    class Regex:
        escape, compile = re.escape, Pattern

    monkeypatch.setattr("growjax.data.files.re", Regex)
    monkeypatch.setattr("growjax.data.files._CHUNK", 100)
    text = b"x" * 20_000
    assert [piece for piece, _ in pieces(io.BytesIO(text), "\n\n")] == [text]
    assert searched < 2 * len(text)
    searched = 0
    assert len(list(pieces(io.BytesIO(b"y\n\n" * 5000), "\n\n"))) == 5001
    # Every separator that is found ends one search, of the rest of its chunk
    assert searched < 100 * 15_000


@pytest.mark.parametrize("end", ENDS)
def test_faults_have_the_right_line_whatever_ends_lines(tmp_path, end):
    text = end.join(["one", "", "two", "", "bad \udcff"]).encode(errors="surrogateescape")
    (tmp_path / "a.txt").write_bytes(text)
    for split in (None, "\n\n"):
        with pytest.raises(DataError, match="a.txt, line 5: byte 0xff is not UTF-8"):
            contents(Text(str(tmp_path), split=split))


# Faults of documents ---------------------------------------------------------------------------


def test_half_of_a_character_is_a_fault_with_its_line(tmp_path):
    lines = ['{"text": "fine \\ud83d\\ude00"}', '{"text": "half \\ud83d"}', "[" * 100_000]
    lines.append('{"text": ' + "9" * 5000 + "}")
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as error:
        contents(JSONL(str(tmp_path)))
    assert "a.jsonl, line 2: 'text' has U+D83D at character 5: half of a" in str(error.value)
    assert "a.jsonl, line 3: Python cannot read it: " in str(error.value)
    assert "a.jsonl, line 4: Python cannot read it: " in str(error.value)
    assert "line 1" not in str(error.value)


def test_an_empty_separator_is_refused_when_it_is_made():
    with pytest.raises(DataError, match="split: expected the text between two documents"):
        Text("books", split="")
    with pytest.raises(DataError, match="split: expected the text between two documents"):
        Text("books", split="\ud800")


def test_the_split_of_a_saved_data_set_is_looked_at(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [str(n) for n in range(20)]})
    rows.save_to_disk(str(tmp_path / "one"))
    few = datasets.Dataset.from_dict({"text": ["x", "y"]})
    datasets.DatasetDict(train=rows, test=few).save_to_disk(str(tmp_path / "two"))
    for split, expected in [
        ("train", [str(n) for n in range(20)]),
        ("train[:10%]", ["0", "1"]),
        ("train[18:]", ["18", "19"]),
        ("train[:1]+train[-1:]", ["0", "19"]),
    ]:
        for name in ("one", "two"):
            source = HuggingFace(str(tmp_path / name), split=split)
            assert list(contents(source).values()) == expected
    both = HuggingFace(str(tmp_path / "two"), split="train[:5%]+test")
    assert list(contents(both).values()) == ["0", "x", "y"]
    assert both.content() != HuggingFace(str(tmp_path / "two"), split="test").content()
    for split in ("train[:10%", "nothing"):
        with pytest.raises(DataError, match="the library datasets cannot load it"):
            contents(HuggingFace(str(tmp_path / "two"), split=split))
