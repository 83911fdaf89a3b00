"""Tokenising a source into a cache, once, for all runs that name the same text.

A corpus is written to a temporary folder next to its final one, which is renamed when it is complete.
So a folder with a manifest was complete once. The name of the folder is a digest of what the text is,
and not of where it lies or when it was written.

Documents are tokenised by several threads, and written in their order.
"""

import collections
import contextlib
import dataclasses
import hashlib
import math
import os
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

from growjax import values
from growjax.data.blend import Blend, Blended
from growjax.data.corpus import (
    FORMAT,
    PARTS,
    Corpus,
    Prepared,
    digest_of,
    dtype_of,
    encode,
    load_parts,
    read_manifest,
)
from growjax.data.files import counter
from growjax.data.folders import (
    Writer,
    cache_errors,
    remove_abandoned,
    temporary_folder,
    write_manifest,
)
from growjax.data.given import Spool, is_iterable, is_source, source_at
from growjax.data.parted import Encoded, parted, with_parts
from growjax.data.sources import Document, Source
from growjax.data.tokenizers import Tokenizer
from growjax.errors import DataError


_GROUP = 1 << 18  # bytes of text that one thread tokenises at once
_EVERY = 0.5  # seconds between two reports of progress
_DIGITS = 64  # of a SHA-256 in hexadecimal
_SETTLED = 2.0  # seconds after which a change of a file shows in its time of change


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the preparation of a source is.

    - `activity`: "reading" or "tokenising", and the source.
    - `done`, `total`: bytes on the disk that are read, and all of them, or None if that is unknown.
    - `documents`: the documents that are tokenised.
    - `seconds`: since its beginning.
    """

    activity: str
    done: int
    total: int | None
    documents: int
    seconds: float

    def __str__(self) -> str:
        speed = self.done / self.seconds if self.seconds > 0 else 0.0
        if not self.total or not speed:
            return f"{self.activity}: {self.documents:,} documents"
        left = max(self.total - self.done, 0) / speed
        return (
            f"{self.activity}: {min(self.done / self.total, 1):.0%} of {self.total / 1e6:,.1f} MB, "
            f"{speed / 1e6:,.1f} MB/s, {int(left) // 60}:{int(left) % 60:02} left"
        )


Report = Callable[[Progress], None]
# What may be given in place of a source
Given = Source | str | Path | Iterable[Any]


@overload
def prepare(
    source: Blend,
    tokenizer: Tokenizer,
    cache: str | Path,
    *,
    held_out: int = ...,
    validation: None = ...,
    verify: bool = ...,
    progress: Report | None = ...,
) -> tuple[Blended, Blended]: ...
@overload
def prepare(
    source: Given,
    tokenizer: Tokenizer,
    cache: str | Path,
    *,
    held_out: int = ...,
    validation: Given | None = ...,
    verify: bool = ...,
    progress: Report | None = ...,
) -> tuple[Corpus, Corpus]: ...
@overload
def prepare(
    source: Given | Blend,
    tokenizer: Tokenizer,
    cache: str | Path,
    *,
    held_out: int = ...,
    validation: Given | Blend | None = ...,
    verify: bool = ...,
    progress: Report | None = ...,
) -> tuple[Corpus | Blended, Corpus | Blended]: ...
def prepare(
    source: Any,
    tokenizer: Tokenizer,
    cache: str | Path,
    *,
    held_out: int = 20,
    validation: Any = None,
    verify: bool = True,
    progress: Report | None = None,
) -> Any:
    """The training corpus and the held-out corpus of a source, from `cache` or tokenised into it.

    **Arguments**

    - `source`: the text: a source such as `Text("books")`, several as a `Blend`, the path of files, or
      documents: a list or a generator of texts, or a data set of the library `datasets`. A generator is
      read once, into a file in the cache that nobody else sees.
    - `tokenizer`: how it is tokenised; by several threads if its `thread_safe` is True.
    - `cache`: a folder that many corpora can share, and many processes use at once.
    - `held_out`: a document is held out if the CRC-32 of its name is a multiple of this, about one in
      `held_out`. If no name is, the last document is held out; and of a single document, the end.
    - `validation`: the text to hold out, given as `source` is; then all of `source` is trained on.
    - `verify`: whether to read all files to compare checksums; otherwise only sizes are compared.
    - `progress`: called with a `Progress` about twice a second while text is read and tokenised.

    If the source is gone and `cache` has what was prepared of it, that is used, with a warning. Raises
    `DataError` if the source cannot be read or has too little to hold out from, or if the cache is
    damaged.

    **Example**

        training, held_out = prepare(StandardLibrary(), ByteTokenizer(), "runs/cache")
        training, held_out = prepare("books", ByteTokenizer(), "runs/cache", validation="new.txt")
    """
    if not isinstance(held_out, int) or held_out < 2:
        raise DataError(
            "held_out: expected a whole number of 2 or more, for one document in so many, got "
            f"{held_out!r}"
        )
    job = _Job(tokenizer, Path(cache), verify, progress)
    if validation is not None:
        training = job.parts(source, None)["training"]
        validating = job.parts(validation, None)["training"]
        if training.digest == validating.digest:
            raise DataError(
                f"validation: {validation} is the text that is trained on, so its loss says nothing of "
                "other texts; name another one, or none, and a part of the text is held out"
            )
        return training, validating
    parts = job.parts(source, held_out)
    if "held_out" not in parts:
        raise DataError(
            f"{source}: all of it is trained on, and nothing was held out; name a validation set"
        )
    return parts["training"], parts["held_out"]


@dataclasses.dataclass(frozen=True)
class _Job:
    """The arguments of `prepare` that are the same for every source."""

    tokenizer: Tokenizer
    cache: Path
    verify: bool
    progress: Report | None

    def parts(self, source: Any, held_out: int | None) -> dict[str, Any]:
        """The corpora of a source by their parts; with `held_out` None, all is for training."""
        if isinstance(source, Blend):
            parts = [self.parts(part, held_out) for part in source.sources]
            weights = source.weights or (1.0,) * len(parts)
            # A source that was prepared as a whole has no text that is held out
            names = set.intersection(*(set(part) for part in parts))
            return {
                name: Blended(tuple(part[name] for part in parts), weights, source.labels)
                for name in names
            }
        if isinstance(source, Prepared):
            return dict(source.corpora(self.tokenizer.vocabulary, verify=self.verify))
        with self._source(source) as opened:
            folder = self._folder(opened, held_out)
        return dict(load_parts(folder, verify=self.verify))

    @contextlib.contextmanager
    def _source(self, given: Any) -> Iterator[Source]:
        """The source that was given, at a path, or as documents, whose file is closed at the end."""
        if is_source(given):
            yield given
            return
        if isinstance(given, str | Path):
            yield source_at(given)
            return
        if not is_iterable(given):
            raise DataError(
                "source: expected one such as Text('books'), a path or documents (a list or generator "
                f"of texts, or one split of a data set), got {type(given).__name__}"
            )
        with cache_errors(self.cache):
            self.cache.mkdir(parents=True, exist_ok=True)
            spool = Spool(self.cache)
            with contextlib.closing(spool):
                spool.fill(given)
                yield spool

    def _folder(self, source: Source, held_out: int | None) -> Path:
        """The folder of a source in the cache, which is made if there is none."""
        try:
            stamp = source.fingerprint()
        except DataError as error:
            return self._without_source(source, held_out, error)
        content = self._content(source, stamp)
        target = self.cache / self._name(content, held_out)
        remove_abandoned(self.cache)
        if not target.exists():
            with cache_errors(target):
                self.cache.mkdir(parents=True, exist_ok=True)
                self._build(source, target, held_out, stamp, content)
        return target

    def _name(self, content: str, held_out: int | None) -> str:
        return digest_of([str(FORMAT), content, self.tokenizer.vocabulary.digest, str(held_out)])

    def _content(self, source: Source, stamp: str) -> str:
        """What identifies the documents of a source: a checksum of its files, if it can tell."""
        if not hasattr(source, "content"):
            return stamp
        # Files are read once for as long as no stamp of theirs changes
        note = self.cache / ".contents" / hashlib.sha256(stamp.encode()).hexdigest()[:32]
        with contextlib.suppress(OSError, ValueError):
            known = note.read_text(encoding="utf-8")
            # A machine that lost power may leave an empty file
            if len(known) == _DIGITS:
                return known
        source_files: Any = source
        with self._metered("reading", source):
            content = hashlib.sha256(source_files.content().encode()).hexdigest()
        if _changed(source) < time.time() - _SETTLED:
            # A cache that cannot be written to may still be read
            with contextlib.suppress(OSError):
                note.parent.mkdir(parents=True, exist_ok=True)
                partial = note.with_name(f"{note.name}.{secrets.token_hex(4)}")
                partial.write_text(content, encoding="utf-8")
                partial.replace(note)
        return content

    def _without_source(self, source: Source, held_out: int | None, error: DataError) -> Path:
        """The folder that was made from a source which cannot be found now; else raises `error`."""
        folders = []
        for path in sorted(self.cache.glob("[!.]*/manifest.json")):
            with contextlib.suppress(DataError):
                manifest = read_manifest(path.parent)
                same = manifest["source"] == repr(source) and manifest["held_out"] == held_out
                if same and manifest["vocabulary"]["digest"] == self.tokenizer.vocabulary.digest:
                    folders.append(path.parent)
        if len(folders) > 1:
            names = "\n  ".join(f"Prepared({str(folder)!r})" for folder in folders)
            raise DataError(
                f"{error}\nIt was prepared several times; name one as the source:\n  {names}"
            )
        if not folders:
            raise error
        warnings.warn(f"{error}; going on with {folders[0]}, prepared from it before", stacklevel=5)
        return folders[0]

    # Writing -------------------------------------------------------------------------------------

    def _build(
        self, source: Source, target: Path, held_out: int | None, stamp: str, content: str
    ) -> None:
        """Tokenise into a folder next to the target, and rename it to the target when it is complete."""
        dtype = dtype_of(self.tokenizer.vocabulary)
        parts = PARTS if held_out is not None else PARTS[:1]
        with temporary_folder(target.parent) as temporary:
            with contextlib.ExitStack() as files:
                writers = {part: Writer(temporary / part, dtype, files) for part in parts}
                with self._metered("tokenising", source) as meter:
                    tokenised = _tokenised(source.documents(), self.tokenizer, held_out, meter)
                    for part, tokens, size in parted(tokenised, parts, source):
                        writers[part].add(tokens, size)
                summaries = {part: writer.summary() for part, writer in writers.items()}
            same = source.fingerprint() == stamp
            if same and _changed(source) == math.inf:
                same = self._content(source, stamp) == content
            if not same:
                # The target is named after what they were before
                raise DataError(
                    f"{source}: its files changed while they were read; prepare it again"
                )
            write_manifest(
                temporary / "manifest.json",
                {
                    "format": FORMAT,
                    "source": repr(source),
                    "held_out": held_out,
                    "dtype": dtype.str,
                    "vocabulary": values.to_dict(self.tokenizer.vocabulary),
                    "parts": summaries,
                },
            )
            (temporary / "lock").unlink(missing_ok=True)
            try:
                temporary.rename(target)
            except OSError:
                if not target.exists():
                    raise
                # Another process has made the same corpus in the meantime; this copy is removed

    @contextlib.contextmanager
    def _metered(self, activity: str, source: Source) -> Iterator["_Meter"]:
        """Count the bytes that are read from the source's files inside the `with`, and report them."""
        files = source.files() if hasattr(source, "files") else []  # pyright: ignore
        total = sum(file.size() for file in files) or None
        meter = _Meter(self.progress, f"{activity} {source}", total)
        token = counter.set(meter.add)
        try:
            yield meter
        finally:
            counter.reset(token)
            meter.report()


def _changed(source: Any) -> float:
    """When a file of a source was changed last; see `DataFile.changed`. 0 for a source without files."""
    files = source.files() if hasattr(source, "files") else []
    return max((file.changed() for file in files), default=0.0)


class _Meter:
    """Counts bytes and documents, and reports them every now and then."""

    def __init__(self, progress: Report | None, activity: str, total: int | None):
        self._progress, self._activity, self._total = progress, activity, total
        self._lock = threading.Lock()  # several threads read files
        self._start = self._last = time.monotonic()
        self._done = self._documents = 0

    def add(self, done: int = 0, documents: int = 0) -> None:
        """Add bytes that were read from a file, and documents that were tokenised."""
        with self._lock:
            self._done, self._documents = self._done + done, self._documents + documents
            due = time.monotonic() - self._last >= _EVERY
            if due:
                self._last = time.monotonic()
        if due:
            self.report()

    def report(self) -> None:
        """Report now."""
        if self._progress is not None:
            seconds = time.monotonic() - self._start
            numbers = self._done, self._total, self._documents, seconds
            self._progress(Progress(self._activity, *numbers))


# Tokenising --------------------------------------------------------------------------------------


def _tokenised(
    documents: Iterable[Document], tokenizer: Tokenizer, held_out: int | None, meter: _Meter
) -> Iterator[Encoded]:
    """Documents that are not empty, tokenised and in their order; groups of them by several threads."""
    workers = (os.cpu_count() or 1) if getattr(tokenizer, "thread_safe", False) else 1
    waiting: collections.deque[Future[list[Encoded]]] = collections.deque()
    pool = ThreadPoolExecutor(workers)

    def encoded(group: list[tuple[str, Document]]) -> list[Encoded]:
        return [(part, *encode(document, tokenizer)) for part, document in group]

    try:
        for group in _groups(with_parts(documents, held_out)):
            waiting.append(pool.submit(encoded, group))
            # So few that they fit into memory, and enough for all threads
            while len(waiting) > 2 * workers or (waiting and waiting[0].done()):
                done = waiting.popleft().result()
                meter.add(documents=len(done))
                yield from done
        while waiting:
            done = waiting.popleft().result()
            meter.add(documents=len(done))
            yield from done
    finally:
        pool.shutdown(cancel_futures=True)


def _groups(documents: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    """Documents in groups of about `_GROUP` bytes."""
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document[1].content)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group
