"""The folders of a cache: written under another name first, by one process, and never seen half written.

A process that is killed leaves its temporary folder. It held a lock, which the operating system takes
from dead processes, so the next one sees that the folder is nobody's and removes it.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from growjax.errors import DataError
from growjax.values.codec import seal_of


_ABANDONED = 86_400.0  # seconds after which a temporary folder without a lock is nobody's


class Writer:
    """Appends documents to the files of one corpus, and computes their sizes and checksums."""

    def __init__(self, folder: Path, dtype: np.dtype, files: contextlib.ExitStack):
        folder.mkdir()
        self.dtype, self.tokens, self.documents, self.bytes = dtype, 0, 0, 0
        self.names = "tokens.bin", "starts.bin"
        self.opened = [files.enter_context((folder / name).open("wb")) for name in self.names]
        self.sums = [hashlib.sha256() for _ in self.names]
        self.sizes = [0 for _ in self.names]

    def add(self, tokens: np.ndarray, size: int) -> None:
        """Append one document of `size` bytes of text."""
        # For tokens.bin the tokens, for starts.bin the number of tokens before them
        data = tokens.astype(self.dtype).tobytes(), np.int64(self.tokens).tobytes()
        for i, part in enumerate(data):
            self.opened[i].write(part)
            self.sums[i].update(part)
            self.sizes[i] += len(part)
        self.tokens, self.bytes = self.tokens + len(tokens), self.bytes + size
        self.documents += 1

    def summary(self) -> dict[str, Any]:
        """The corpus's entry in the manifest, once all its files are on the disk."""
        for file in self.opened:
            file.flush()
            os.fsync(file.fileno())
        rows = zip(self.names, self.sizes, self.sums, strict=True)
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "files": {name: {"size": n, "sha256": s.hexdigest()} for name, n, s in rows},
        }


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump({**manifest, "seal": seal_of(manifest)}, file, indent=1)
        # On the disk before the folder is renamed, also if the machine loses power
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def cache_errors(target: Path) -> Iterator[None]:
    """Make an error of writing to the cache a `DataError`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{target}: the cache cannot be written: {error}") from error


# Temporary folders -------------------------------------------------------------------------------


@contextlib.contextmanager
def temporary_folder(cache: Path) -> Iterator[Path]:
    """A new folder in the cache, locked by this process and removed at the end unless it was renamed."""
    folder = cache / f".making-{secrets.token_hex(8)}"
    # Not by `tempfile`, whose folders no other user can read
    folder.mkdir()
    try:
        with (folder / "new").open("wb") as lock:
            _locked(lock)
            # From here on others look at it, and find it locked
            (folder / "new").rename(folder / "lock")
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _locked(file: Any) -> bool | None:
    """Lock an open file until it is closed; False if another has it, None if there are none."""
    try:
        import fcntl
    except ImportError:
        return None  # Windows
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None  # a file system without locks
    return True


def remove_abandoned(cache: Path) -> None:
    """Remove the temporary folders of processes that were killed."""
    for folder in cache.glob(".making-*"):
        with contextlib.suppress(OSError):
            old = time.time() - folder.stat().st_mtime > _ABANDONED
            try:
                with (folder / "lock").open("rb+") as lock:
                    free = _locked(lock)
            except FileNotFoundError:
                free = None  # just made, just renamed, or of an earlier version
            if free or (free is None and old):
                shutil.rmtree(folder)
