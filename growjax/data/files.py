"""Files of documents: where they are, and their bytes, decompressed while they are read.

A path is that of a file, of a folder, or a pattern such as `books/*.txt.gz`, on this machine or at a URL
(`gs://`, `s3://`, `hf://`, `memory://`). Local files are opened by Python itself and all others by
fsspec, which is imported for the first URL. The last suffix of a name decides how a file is decompressed.
"""

import contextlib
import contextvars
import dataclasses
import email.utils
import fnmatch
import glob as globbing
import hashlib
import importlib
import io
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from growjax.errors import DataError


# A file is opened by name at `name.SUFFIX` as well as at `name`
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_CHUNK = 1 << 20  # bytes that are read at once
# What file systems of fsspec call the checksum of a file; a change of the file changes it
_CHECKSUMS = (
    *("md5Hash", "crc32c", "ETag", "etag", "sha256", "blob_id", "Content-MD5", "Digest"),
    *("sha", "hex"),  # of GitHub and git
)
# What they call the time of its last change
_TIMES = (
    *("mtime", "updated", "created", "modified", "modify", "modificationTime"),
    *("LastModified", "last_modified", "Last-Modified", "last_write_time"),
)

# Called with the number of each few bytes that are read from files, before they are decompressed
counter: contextvars.ContextVar[Callable[[int], None] | None] = contextvars.ContextVar(
    "counter", default=None
)


def is_url(path: str) -> bool:
    """Whether a path is a URL, which fsspec opens."""
    return "://" in path


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A file that was found.

    - `name`: its path relative to the folder that was searched, so that it does not depend on that one.
    - `path`: where it is, for the reader of a message.
    - `system`: the file system of fsspec that has it, or None for a local file.
    """

    name: str
    path: str
    system: Any = None

    @contextlib.contextmanager
    def opened(self, *, decompress: bool = True) -> Iterator[io.BufferedReader]:
        """The bytes of the file. Errors while it is read are `OSError`s that name it."""
        try:
            with contextlib.ExitStack() as stack:
                raw = stack.enter_context(self._raw())
                stream: Any = io.BufferedReader(_Counted(raw), _CHUNK)
                suffix = Path(self.name).suffix
                if decompress and suffix in COMPRESSED:
                    if not stream.peek(1):
                        raise EOFError("an empty file, and not one that was compressed")
                    stream = stack.enter_context(_decompressed(stream, suffix))
                yield stream
        except Exception as error:
            # All but the first are of files that were cut short, or are not what their suffix says
            reading = isinstance(error, OSError | EOFError | zlib.error)
            if not reading and type(error).__name__ != "LZMAError":
                raise
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise OSError(getattr(error, "errno", None), reason, self.path) from error

    def _raw(self) -> Any:
        """The bytes of the file as they are stored."""
        if self.system is None:
            return open(self.path, "rb", buffering=0)
        with _as_os_error():
            return self.system.open(self.path, "rb")

    def size(self) -> int:
        """Its size on the disk, in bytes."""
        if self.system is None:
            return os.stat(self.path).st_size
        return int(self.system.info(self.path).get("size") or 0)

    def stamp(self) -> str:
        """A text that changes when the file does, made without reading it."""
        if self.system is not None:
            # The `ukey` of some systems, such as that of https, is their URL alone
            info = self.system.info(self.path)
            names = ("size", *_CHECKSUMS, *_TIMES)
            known = [f"{name} {info[name]}" for name in names if name in info]
            return " ".join([self.name, self.system.ukey(self.path), *known])
        stat = os.stat(self.path)
        # Who writes a file can set its time of modification, but not that of its last change
        times = f"{stat.st_mtime_ns} {stat.st_ctime_ns}"
        return f"{self.name} {stat.st_size} {times} {stat.st_ino}"

    def changed(self) -> float:
        """When the file was changed last, in seconds since 1970: not before its stamp shows it.

        0 at a URL whose file system tells a checksum or an exact time, and infinity at one that tells
        neither, where only reading the file shows a change.
        """
        if self.system is None:
            return os.stat(self.path).st_ctime
        info = self.system.info(self.path)
        if any(info.get(name) for name in _CHECKSUMS):
            return 0.0
        # Of https, in whole seconds
        date = email.utils.parsedate_tz(str(info.get("Last-Modified")))
        if date is not None:
            return float(email.utils.mktime_tz(date))
        return 0.0 if any(info.get(name) for name in _TIMES) else math.inf

    def checksum(self) -> str:
        """A checksum of its bytes: from its file system if that has one, or else by reading it."""
        info = {} if self.system is None else self.system.info(self.path)
        for name in _CHECKSUMS:
            if info.get(name):
                return f"{name} {info[name]}"
        with self.opened(decompress=False) as stream:
            return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Make any error an `OSError`: the clients of clouds raise errors of their own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(None, str(error) or type(error).__name__) from error


class _Counted(io.RawIOBase):
    """A stream of bytes that tells the `counter` how many were read."""

    def __init__(self, raw: Any):
        self._raw, self._count = raw, counter.get()

    def readinto(self, buffer: Any) -> int:
        with _as_os_error():
            data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        if self._count is not None:
            self._count(len(data))
        return len(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._raw.seekable()

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()


def _decompressed(stream: Any, suffix: str) -> Any:
    """The decompressed bytes of a stream; all but .zst by Python itself."""
    name = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "pyarrow"}[suffix]
    try:
        module: Any = importlib.import_module(name)
    except ImportError as error:
        # Some builds of Python lack bz2 or lzma
        install = "pip install 'growjax[data]'" if suffix == ".zst" else "this Python lacks it"
        raise DataError(f"reading {suffix} needs the module {name}; {install}") from error
    if suffix == ".zst":
        unpacked: Any = module.CompressedInputStream(module.PythonFile(stream, "r"), "zstd")
    else:
        unpacked = module.open(stream)
    return io.BufferedReader(unpacked, _CHUNK)


def compressed(*globs: str) -> tuple[str, ...]:
    """These patterns of names, and those of the same files compressed."""
    return globs + tuple(glob + suffix for glob in globs for suffix in COMPRESSED)


# Finding files -----------------------------------------------------------------------------------


def find(path: str, *globs: str) -> list[DataFile]:
    """The files at a path, sorted by name.

    Of a folder these are the files in it and in its subfolders, also those that links lead to, whose
    names fit one of `globs`; hidden ones are left out. A pattern may name files and folders. Raises
    `DataError` if there are none, or a link leads nowhere.
    """
    try:
        files = _found_at_url(path, globs) if is_url(path) else _found_here(path, globs)
    except OSError as error:
        raise DataError(f"{error.filename or path}: {error.strerror or error}") from error
    if files is None:
        raise DataError(f"{path}: expected a file or a folder, got neither")
    if not files:
        raise DataError(f"{path}: expected files like {' or '.join(globs)}, got none")
    return sorted(files, key=lambda file: file.name)


def _found_here(path: str, globs: tuple[str, ...]) -> list[DataFile] | None:
    """The files of this machine at a path or pattern, or None if nothing is there."""
    if os.path.isfile(path):
        return [DataFile(os.path.basename(path), path)]
    if os.path.isdir(path):
        return [DataFile(name, os.path.join(path, name)) for name in _inside(path, globs)]
    if not globbing.has_magic(path):
        return None
    root = _root(path)
    files = {}
    for match in globbing.glob(path, recursive=True):
        inside = [""] if os.path.isfile(match) else list(_inside(match, globs))
        for inner in inside:
            file = os.path.join(match, inner) if inner else match
            # "books/**" matches the folder itself as well as each file: one name for both
            name = os.path.relpath(file, root or ".").replace(os.sep, "/")
            files[name] = DataFile(name, file)
    return list(files.values())


def _inside(folder: str, globs: tuple[str, ...]) -> Iterator[str]:
    """The names of the files in a folder that fit one of these patterns, relative to the folder."""
    for name in _walk(folder, "", frozenset()):
        if any(_fits(name.split("/"), ["**", *glob.split("/")]) for glob in globs):
            if not os.path.exists(os.path.join(folder, name)):
                raise OSError(None, "a link that leads nowhere", os.path.join(folder, name))
            yield name


def _walk(folder: str, name: str, around: frozenset[str]) -> Iterator[str]:
    """The names of everything in a folder that is neither hidden nor a folder, with subfolders."""
    here = os.path.join(folder, name)
    real = os.path.realpath(here)
    if real in around:
        return  # a link to a folder that this one is in
    for entry in sorted(os.listdir(here)):
        path, inner = os.path.join(here, entry), f"{name}/{entry}" if name else entry
        if entry.startswith("."):
            continue
        if os.path.isdir(path):
            yield from _walk(folder, inner, around | {real})
        elif os.path.isfile(path) or os.path.islink(path):
            yield inner


def _fits(parts: list[str], patterns: list[str]) -> bool:
    """Whether the parts of a path fit patterns, of which `**` stands for any number of folders."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return _fits(parts, patterns[1:]) or (bool(parts) and _fits(parts[1:], patterns))
    if not parts or not fnmatch.fnmatchcase(parts[0], patterns[0]):
        return False
    return _fits(parts[1:], patterns[1:])


def _root(pattern: str) -> str:
    """The folder that a pattern searches: all of it before its first part with a wildcard."""
    parts = pattern.split("/")
    first = next(n for n, part in enumerate(parts) if globbing.has_magic(part))
    return "/".join(parts[:first]) + ("/" if first == 1 and not parts[0] else "")


def _found_at_url(path: str, globs: tuple[str, ...]) -> list[DataFile] | None:
    """The files at a URL, or at a pattern of URLs, or None if nothing is there."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise DataError(f"{path}: reading it needs fsspec; pip install 'growjax[data]'") from error
    try:
        system, root = url_to_fs(path)
        matches = system.glob(root) if globbing.has_magic(root) else []
        top = _root(root) if matches else root
        if not matches:
            try:
                if system.info(root)["type"] == "file":
                    return [DataFile(root.rsplit("/", 1)[-1], root, system)]
            except FileNotFoundError:
                return None
        files = {}
        for match in matches or [root]:
            alone = DataFile(_relative(match, top), match, system)
            for file in [alone] if system.isfile(match) else _below(system, match, top, globs):
                files[file.name] = file
        return [file for file in files.values() if not _hidden(file.name)]
    except Exception as error:
        # Such as a package for this kind of URL that is missing, or what a cloud's own client raises
        raise DataError(
            f"{path}: fsspec cannot list it: {error or type(error).__name__}"
        ) from error


def _below(system: Any, folder: str, top: str, globs: tuple[str, ...]) -> list[DataFile]:
    """The files of a folder of fsspec that fit; their names are relative to `top`."""
    files = []
    for path in system.find(folder):
        parts = _relative(path, folder).split("/")
        if any(_fits(parts, ["**", *glob.split("/")]) for glob in globs):
            files.append(DataFile(_relative(path, top), path, system))
    return files


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _relative(path: str, folder: str) -> str:
    return path.removeprefix(folder.rstrip("/")).lstrip("/")


# Contents ----------------------------------------------------------------------------------------


def checksums(files: list[DataFile]) -> list[str]:
    """The name and the checksum of each file, several of which are read at once."""
    context = contextvars.copy_context()

    def line(file: DataFile) -> str:
        # Threads do not inherit the `counter`
        return f"{file.name} {context.copy().run(file.checksum)}"

    with ThreadPoolExecutor() as pool:
        return list(pool.map(line, files))


def pieces(stream: Any, split: str) -> Iterator[tuple[bytes, bytes]]:
    """The parts of a stream between separators, each with the separator after it; b"" after the last.

    A line's end in `split` stands for any of LF, CRLF and CR. Each byte is looked at once, however long
    the parts are.
    """
    lines = split.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    # Atomic, so that the two bytes of one CRLF are never taken for two ends of lines
    pattern = re.compile(rb"(?>\r\n|\r|\n)".join(re.escape(line.encode()) for line in lines))
    longest = len(split.encode()) + len(lines) - 1
    rest = bytearray()  # what was read and not passed on yet
    searched = 0  # no separator begins before this index of `rest`
    ended = False
    while not ended:
        chunk = stream.read(_CHUNK)
        ended = not chunk
        rest += chunk
        start = 0
        while match := pattern.search(rest, max(searched, start)):
            first, last = match.span()
            if last == len(rest) and not ended:
                break  # it may end in a CR whose LF is in the next chunk
            yield bytes(rest[start:first]), bytes(rest[first:last])
            start = last
        del rest[:start]
        # A separator that ends in the next chunk begins in the last few bytes of this one
        searched = max(len(rest) - longest, 0)
    yield bytes(rest), b""


def line_ends(data: bytes) -> int:
    """How many lines end in some bytes, in any of LF, CRLF and CR."""
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")
