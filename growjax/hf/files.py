"""Folders of `config.json` and safetensors: reading of untrusted files, and atomic writing.

A folder may come from anywhere. Nothing in it is executed or unpickled, nothing outside it is opened,
and sizes in headers are checked against the files before memory is allocated.
"""

import collections
import contextlib
import json
import math
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from growjax.deferred import BLOCK
from growjax.errors import HuggingFaceError, raise_all


ADAPTER = "adapter_config.json"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# The most bytes of JSON that are parsed; the longest header of a published shard is far below
_LONGEST = 25_000_000
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
}
# The most faults that a message lists
_SHOWN = 40


class Entry(NamedTuple):
    """One tensor of a folder: its file, its dtype as safetensors spells it ("F32"), its shape, its place.

    `offset` is where its bytes begin in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Folder:
    """A folder whose headers were checked: its `config`, and its `tensors` by name; `read` reads one."""

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, Entry]):
        self.path, self.config, self.tensors = path, config, tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The array of a tensor, or the entries of its first dimension from `start` to `stop`.

        Raises `HuggingFaceError` if it is not floating point, or not finite.
        """
        entry = self.tensors[name]
        if entry.dtype not in DTYPES:
            raise HuggingFaceError(
                f"{entry.file}: {name} is of type {entry.dtype}, expected one of {', '.join(DTYPES)}"
            )
        dtype, shape = np.dtype(DTYPES[entry.dtype]), entry.shape
        if shape:
            shape = (len(range(shape[0])[start:stop]), *shape[1:])
        row = math.prod(shape[1:]) * dtype.itemsize
        # Not by a memory map: pages of it that were read once would count as memory of the process
        array = np.fromfile(
            entry.file, dtype, count=math.prod(shape), offset=entry.offset + start * row
        )
        if array.size != math.prod(shape):
            raise HuggingFaceError(f"{entry.file}: not whole: it ends within {name}")
        if not _is_finite(array):
            raise HuggingFaceError(f"{entry.file}: {name} holds numbers that are not finite")
        return array.reshape(shape)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers, read a block at a time."""
        shape = self.tensors[one].shape
        if shape != self.tensors[other].shape:
            return False
        if not shape:
            return np.array_equal(self.read(one), self.read(other))
        rows = max(1, BLOCK // max(8 * math.prod(shape[1:]), 1))
        return all(
            np.array_equal(self.read(one, i, i + rows), self.read(other, i, i + rows))
            for i in range(0, shape[0], rows)
        )


def _is_finite(array: np.ndarray) -> bool:
    if array.dtype != jnp.bfloat16:
        return bool(np.isfinite(array).all())
    # The exponent of an infinity or NaN is all ones; NumPy is far slower for a type that is not its own
    return not bool(((array.view(np.uint16) & 0x7F80) == 0x7F80).any())


@contextlib.contextmanager
def open_folder(path: str | Path) -> Iterator[Folder]:
    """Open a folder and check all its headers, without reading weights.

    A repository id such as "Qwen/Qwen3-0.6B" is looked up in the local cache of the Hugging Face Hub.
    Raises `HuggingFaceError` with the file and its fault.
    """
    path = located(path)
    if not os.path.lexists(path / CONFIG):
        raise HuggingFaceError(f"{path}: expected {CONFIG} in it, got none{_other_kind(path)}")
    config = read_json(inside(path, CONFIG))
    if os.path.lexists(path / ADAPTER):
        # Its readers apply the adapter to the weights beside it
        raise HuggingFaceError(f"{path}: expected a model alone{_other_kind(path)}")
    folder = Folder(path, config, {})
    with contextlib.ExitStack() as stack:
        for file in _weight_files(path):
            entries = _header(file)
            stack.enter_context(_opened(file))
            duplicates = sorted(entries.keys() & folder.tensors.keys())
            raise_all(
                HuggingFaceError, f"{file}: these tensors are in another shard too:", duplicates
            )
            folder.tensors.update(entries)
        _check_index(folder)
        yield folder


def located(path: str | Path) -> Path:
    """The folder of that path, or of a repository of that id in the local cache of the Hugging Face Hub.

    Raises `HuggingFaceError`, with the command to download it, if there is neither.
    """
    folder, name = Path(path), str(path)
    if folder.is_dir():
        return folder
    # Ids of old repositories, such as gpt2, have no owner
    if re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name):
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
        repository = cache / f"models--{name.replace('/', '--')}"
        main = repository / "refs" / "main"
        if main.is_file():
            snapshot = repository / "snapshots" / main.read_text(encoding="utf-8").strip()
            if snapshot.parent == repository / "snapshots" and snapshot.is_dir():
                return snapshot
        raise HuggingFaceError(
            f"{name}: no such folder, and not in the cache at {cache}; nothing is downloaded: run "
            f"`hf download {name}` first, which fills the cache"
        )
    raise HuggingFaceError(
        f"{folder}: expected a folder with {CONFIG} and {WEIGHTS}, got no folder; "
        "nothing is downloaded (`hf download NAME --local-dir FOLDER` does that)"
    )


def window_of(folder: str | Path) -> int | None:
    """How many tokens the model in a Hugging Face folder reads at once, or None for another folder."""
    config = Path(folder) / CONFIG if Path(folder).is_dir() else located(folder) / CONFIG
    values = read_json(config) if config.is_file() else {}
    for key in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(values.get(key), int):
            return values[key]
    return None


def inside(folder: Path, name: str) -> Path:
    """The regular file `name` of a folder; raises `HuggingFaceError` if it leads out of the folder.

    A snapshot in the cache of the Hugging Face Hub consists of links to its `blobs` folder, which is
    allowed as well.
    """
    # Names come from the folder itself (an index, modules.json), so they may be hostile
    if not name or name in (".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise HuggingFaceError(f"{folder}: {name!r} is not the name of a file in it")
    path, root = folder / name, folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise HuggingFaceError(f"{path}: does not exist") from error
    if not any(real.is_relative_to(parent) for parent in allowed):
        raise HuggingFaceError(
            f"{path}: is a link to {real}, outside the folder; it is not followed"
        )
    if not real.is_file():
        raise HuggingFaceError(f"{path}: expected a file")
    return path


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON object (or list), read strictly: `HuggingFaceError` for repeated keys and for NaN."""
    if path.stat().st_size > _LONGEST:
        raise HuggingFaceError(f"{path}: {path.stat().st_size:,} bytes are too many for JSON")
    return _parsed(path, path.read_bytes(), kind)


def _parsed(path: Path, text: bytes, kind: type = dict) -> Any:
    """The value in the JSON text of a file, which must be of this type."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            # Counted in one pass, since a hostile header may have millions of names
            counts = collections.Counter(name for name, _ in pairs)
            repeated = sorted(name for name, count in counts.items() if count > 1)[:_SHOWN]
            raise ValueError(f"repeated keys: {', '.join(map(repr, repeated))}")
        return values

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:300] or type(error).__name__
        raise HuggingFaceError(f"{path}: not readable as JSON: {reason}") from error
    if not isinstance(value, kind):
        name = {dict: "object", list: "list"}[kind]
        raise HuggingFaceError(f"{path}: expected a JSON {name}, got a {type(value).__name__}")
    return value


def _weight_files(path: Path) -> list[Path]:
    """The single file of weights, or the shards that the index names."""
    if os.path.lexists(path / WEIGHTS):
        return [inside(path, WEIGHTS)]
    if not os.path.lexists(path / INDEX):
        raise HuggingFaceError(
            f"{path}: expected {WEIGHTS} or {INDEX}, got neither{_other_kind(path)}"
        )
    return [inside(path, name) for name in dict.fromkeys(_weight_map(path).values())]


def _other_kind(path: Path) -> str:
    """The end of a message: the other kind of checkpoint that a folder holds, and how to convert it."""

    def matching(*patterns: str) -> str:
        files = [file.name for pattern in patterns for file in sorted(path.glob(pattern))]
        return ", ".join(files[:3])

    if matching(ADAPTER, "adapter_model.*"):
        return (
            "; it holds an adapter (LoRA), not a model: merge it into its base first, with peft's "
            "merge_and_unload() and save_pretrained()"
        )
    if files := matching("*.gguf"):
        return (
            f"; {files} is quantised for llama.cpp: take the repository that it was made from, or "
            "transformers' from_pretrained(..., gguf_file=...) and save_pretrained()"
        )
    if files := matching(
        "model.*.safetensors", "diffusion_pytorch_model*", "consolidated*.safetensors"
    ):
        return (
            f"; {files} has another name: rename a variant such as fp16 to {WEIGHTS}, or its index to "
            f"{INDEX}; convert weights of another library to transformers' names first"
        )
    if files := matching("*.bin", "*.pt*"):
        return (
            f"; {files} is a pickle, which can run code and is never opened: convert it once, where you "
            "trust it, with transformers' save_pretrained(..., safe_serialization=True)"
        )
    return ""


def _weight_map(path: Path) -> dict[str, str]:
    """The index of a folder: the file of each tensor."""
    files = read_json(inside(path, INDEX)).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise HuggingFaceError(f"{path / INDEX}: expected a weight_map from tensors to file names")
    return files


def _check_index(folder: Folder) -> None:
    """Raise `HuggingFaceError` unless each tensor is in the shard that the index names."""
    if os.path.lexists(folder.path / WEIGHTS):
        return
    indexed = _weight_map(folder.path)
    actual = {name: entry.file.name for name, entry in folder.tensors.items()}
    complaints = [
        f"{name}: not in {file}" for name, file in indexed.items() if actual.get(name) != file
    ]
    complaints += [
        f"{name}: in {actual[name]}, not in the index" for name in actual.keys() - indexed.keys()
    ]
    raise_all(
        HuggingFaceError, f"{folder.path / INDEX} and the shards disagree:", shortened(complaints)
    )


def _header(file: Path) -> dict[str, Entry]:
    """The tensors in the header of a safetensors file.

    The file begins with the length of the header as a little-endian 64-bit integer, then has the header
    as JSON. The library safetensors checks the offsets in it.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _LONGEST):
            raise HuggingFaceError(
                f"{file}: a header of {length:,} bytes in a file of {size:,}: the file is cut off, or "
                "not safetensors"
            )
        header = _parsed(file, stream.read(length))
    header.pop("__metadata__", None)
    complaints, entries = [], {}
    for name, tensor in header.items():
        fields = tensor if isinstance(tensor, dict) else {}
        shape, dtype, place = (fields.get(key) for key in ("shape", "dtype", "data_offsets"))
        if not (isinstance(dtype, str) and isinstance(shape, list) and all(map(_is_size, shape))):
            complaints.append(f"{name}: expected a dtype and a shape")
        elif not (isinstance(place, list) and len(place) == 2 and all(map(_is_size, place))):
            complaints.append(f"{name}: expected data_offsets, where its bytes begin and end")
        else:
            entries[name] = Entry(file, dtype, tuple(shape), 8 + length + place[0])
    raise_all(HuggingFaceError, f"{file}: a broken header:", shortened(complaints))
    return entries


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A handle of the library safetensors on a file, which it checks."""
    library = safetensors()
    try:
        handle = library.safe_open(str(file), framework="numpy")
    except (library.SafetensorError, OSError, ValueError) as error:
        raise HuggingFaceError(f"{file}: not whole: {error}") from error
    with handle:
        yield handle


def safetensors() -> Any:
    """The library safetensors. Raises `HuggingFaceError` that says how to install it."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise HuggingFaceError(
            "weights are read and written by safetensors; pip install 'growjax[hf]'"
        ) from error
    return safetensors


def shortened(complaints: Iterable[str]) -> list[str]:
    """The first complaints of a list, and the number of the others."""
    complaints = list(complaints)
    more = len(complaints) - _SHOWN
    return complaints if more <= 0 else [*complaints[:_SHOWN], f"and {more:,} more"]


# Writing -----------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """A tensor to be written: dtype and shape, and a function that makes it when it is needed.

    `parts` makes it in parts along its first dimension instead, where it is large.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    parts: Callable[[], Iterator[np.ndarray]] | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary folder to write into, renamed to `path` at the end, or removed after an error.

    Raises `HuggingFaceError` if `path` exists already and is not an empty folder, or cannot be made.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise HuggingFaceError(f"{path}: exists already, and nothing is overwritten")
    # Next to the target, so that renaming does not cross file systems. A killed process leaves one, and
    # the next may have its number, as in a container
    partial = path.absolute().with_name(f".{path.absolute().name}.{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise HuggingFaceError(f"{path}: cannot be made: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# Told after every part of a tensor: its name, the bytes that are written, and those to write in all
Written = Callable[[str, int, int], None]


def write_weights(
    folder: Path,
    tensors: Mapping[str, Tensor],
    shard: int,
    progress: Written = lambda name, done, total: None,
) -> None:
    """Write tensors in files of at most `shard` bytes (or of one tensor), with an index if several."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if groups[-1] and used + tensor.size > shard:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += tensor.size
    total, done = sum(tensor.size for tensor in tensors.values()), 0

    def written(name: str, size: int) -> None:
        nonlocal done
        done += size
        progress(name, done, total)

    weight_map = {}
    for i, names in enumerate(groups):
        alone = len(groups) == 1
        file = WEIGHTS if alone else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        _write_file(folder / file, {name: tensors[name] for name in names}, written)
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_file(
    path: Path, tensors: Mapping[str, Tensor], written: Callable[[str, int], None]
) -> None:
    """Write one file of safetensors, a tensor at a time, so that one tensor is in memory and not all.

    The library would have all of them at once. Like it, this puts wider types first, so that every tensor
    is aligned to its own type; those of one type stay in order.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    spellings = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": spellings[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.size],
        }
        at += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            if tensor.parts is None:
                _write_part(file, name, tensor, tensor.make(), tensor.shape)
                written(name, tensor.size)
                continue
            rows = 0
            for part in tensor.parts():
                _write_part(file, name, tensor, part, (len(part), *tensor.shape[1:]))
                rows += len(part)
                written(name, part.nbytes)
            if rows != tensor.shape[0]:
                raise HuggingFaceError(f"{name}: expected {tensor.shape[0]} rows, got {rows}")


def _write_part(
    file: Any, name: str, tensor: Tensor, array: np.ndarray, shape: tuple[int, ...]
) -> None:
    """Write the bytes of a part of a tensor, which must have this shape."""
    if array.shape != shape or array.dtype != tensor.dtype:
        raise HuggingFaceError(
            f"{name}: expected {tensor.dtype} of shape {shape}, got {array.dtype} of shape {array.shape}"
        )
    if not np.isfinite(array).all():
        raise HuggingFaceError(
            f"{name}: has numbers that are not finite in {array.dtype}, and would not be read again"
            + (" (bfloat16 has the range of float32)" if array.dtype == np.float16 else "")
        )
    # The bytes of a strided array would be out of order
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON, indented and with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
