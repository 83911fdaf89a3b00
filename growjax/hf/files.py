"""Folders of `config.json` and safetensors, read without trust and written whole.

A folder may come from anywhere. Nothing in it is executed or unpickled, nothing outside it is opened,
and sizes are checked before memory is taken: what a header promises must be what the file holds.
"""

import collections
import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from growjax.errors import HuggingFaceError, raise_all


CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Of text that is parsed. The longest header of a published shard is far below.
_LONGEST = 25_000_000
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
}
_SHOWN = 40


class Entry(NamedTuple):
    """One tensor of a folder: which file holds it, its type as safetensors call it, and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Folder:
    """An open folder: its `config` and the `tensors` in it, by name; `read` gives their numbers."""

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, Entry]):
        self.path, self.config, self.tensors = path, config, tensors
        self._handles: dict[Path, Any] = {}

    def read(self, name: str) -> np.ndarray:
        """One tensor; raises `HuggingFaceError` if it is not of floating point, or not finite."""
        entry = self.tensors[name]
        if entry.dtype not in _DTYPES:
            raise HuggingFaceError(
                f"{entry.file}: {name} is of type {entry.dtype}, expected one of {', '.join(_DTYPES)}"
            )
        array = self._handles[entry.file].get_tensor(name)
        if not np.isfinite(array).all():
            raise HuggingFaceError(f"{entry.file}: {name} holds numbers that are not finite")
        return array


@contextlib.contextmanager
def open_folder(path: str | Path) -> Iterator[Folder]:
    """Open a folder and check every header in it; no weight is read yet.

    Raises `HuggingFaceError` for everything that is wrong with the files, naming the file.
    """
    path = Path(path)
    if not path.is_dir():
        raise HuggingFaceError(
            f"{path}: expected a folder with {CONFIG} and {WEIGHTS}, and there is none; "
            "nothing is downloaded (`hf download NAME --local-dir FOLDER` does that)"
        )
    if not os.path.lexists(path / CONFIG):
        raise HuggingFaceError(f"{path}: expected {CONFIG}, and it is not there{_other_kind(path)}")
    config = read_json(inside(path, CONFIG))
    folder = Folder(path, config, {})
    with contextlib.ExitStack() as stack:
        for file in _weight_files(path):
            entries = _header(file)
            folder._handles[file] = stack.enter_context(_opened(file))
            twice = sorted(entries.keys() & folder.tensors.keys())
            raise_all(HuggingFaceError, f"{file}: these tensors are in another shard too:", twice)
            folder.tensors.update(entries)
        _check_index(folder)
        yield folder


def inside(folder: Path, name: str) -> Path:
    """The regular file `name` of a folder; raises `HuggingFaceError` if that leads out of it.

    The one place outside it that counts as inside is where the cache of the Hugging Face Hub keeps
    what the links of a snapshot point to.
    """
    if not name or name in (".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise HuggingFaceError(f"{folder}: {name!r} is not the name of a file in it")
    path, here = folder / name, folder.resolve()
    homes = [here, here.parent.parent / "blobs"] if here.parent.name == "snapshots" else [here]
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise HuggingFaceError(f"{path}: there is no such file") from error
    if not any(real.is_relative_to(home) for home in homes):
        raise HuggingFaceError(
            f"{path}: is a link to {real}, outside the folder; it is not followed"
        )
    if not real.is_file():
        raise HuggingFaceError(f"{path}: expected a file")
    return path


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON object (or list), strictly: no key twice, no NaN; or raises `HuggingFaceError`."""
    if path.stat().st_size > _LONGEST:
        raise HuggingFaceError(f"{path}: {path.stat().st_size:,} bytes are no plausible JSON")
    return _parsed(path, path.read_bytes(), kind)


def _parsed(path: Path, text: bytes, kind: type = dict) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            # One pass: a hostile header has millions of names
            counts = collections.Counter(name for name, _ in pairs)
            twice = sorted(name for name, count in counts.items() if count > 1)[:_SHOWN]
            raise ValueError(f"{', '.join(map(repr, twice))} is there twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number")

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:300] or type(error).__name__
        raise HuggingFaceError(f"{path}: not readable as JSON: {reason}") from error
    if not isinstance(found, kind):
        name = {dict: "object", list: "list"}[kind]
        raise HuggingFaceError(f"{path}: expected a JSON {name}, got a {type(found).__name__}")
    return found


def _weight_files(path: Path) -> list[Path]:
    """The one file of weights, or those that the index names."""
    if os.path.lexists(path / WEIGHTS):
        return [inside(path, WEIGHTS)]
    if not os.path.lexists(path / INDEX):
        raise HuggingFaceError(
            f"{path}: expected {WEIGHTS} or {INDEX}, found neither{_other_kind(path)}"
        )
    return [inside(path, name) for name in dict.fromkeys(_weight_map(path).values())]


def _other_kind(path: Path) -> str:
    """What a folder without a readable checkpoint holds instead, and what to do about it."""

    def named(*patterns: str) -> str:
        files = [file.name for pattern in patterns for file in sorted(path.glob(pattern))]
        return ", ".join(files[:3])

    if named("adapter_config.json", "adapter_model.*"):
        return (
            "; it holds an adapter (LoRA), not a model: merge it into its base first, with peft's "
            "merge_and_unload() and save_pretrained()"
        )
    if files := named("*.gguf"):
        return (
            f"; {files} is quantised for llama.cpp: take the repository that it was made from, or "
            "transformers' from_pretrained(..., gguf_file=...) and save_pretrained()"
        )
    if files := named(
        "model.*.safetensors", "diffusion_pytorch_model*", "consolidated*.safetensors"
    ):
        return (
            f"; {files} has another name: a variant such as fp16 is read once it is called {WEIGHTS}, "
            "weights of another library must be converted to transformers' names first"
        )
    if files := named("*.bin", "*.pt*"):
        return (
            f"; {files} is a pickle, which can run code and is never opened: convert it once, where you "
            "trust it, with transformers' save_pretrained(..., safe_serialization=True)"
        )
    return ""


def _weight_map(path: Path) -> dict[str, str]:
    found = read_json(inside(path, INDEX)).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise HuggingFaceError(f"{path / INDEX}: expected a weight_map from tensors to file names")
    return found


def _check_index(folder: Folder) -> None:
    """What the index says is where must be there."""
    if os.path.lexists(folder.path / WEIGHTS):
        return
    said = _weight_map(folder.path)
    there = {name: entry.file.name for name, entry in folder.tensors.items()}
    complaints = [
        f"{name}: not in {file}" for name, file in said.items() if there.get(name) != file
    ]
    complaints += [
        f"{name}: in {there[name]}, not in the index" for name in there.keys() - said.keys()
    ]
    raise_all(
        HuggingFaceError, f"{folder.path / INDEX} and the shards disagree:", shortened(complaints)
    )


def _header(file: Path) -> dict[str, Entry]:
    """The tensors that a file says it holds. Its offsets are checked by the library that reads it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _LONGEST):
            raise HuggingFaceError(
                f"{file}: a header of {length:,} bytes in a file of {size:,}: it is cut off, or no "
                "safetensors"
            )
        said = _parsed(file, stream.read(length))
    said.pop("__metadata__", None)
    complaints, found = [], {}
    for name, tensor in said.items():
        shape = tensor.get("shape") if isinstance(tensor, dict) else None
        dtype = tensor.get("dtype") if isinstance(tensor, dict) else None
        if isinstance(dtype, str) and isinstance(shape, list) and all(map(_is_size, shape)):
            found[name] = Entry(file, dtype, tuple(shape))
        else:
            complaints.append(f"{name}: expected a dtype and a shape")
    raise_all(HuggingFaceError, f"{file}: a broken header:", shortened(complaints))
    return found


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    library = safetensors()
    try:
        handle = library.safe_open(str(file), framework="numpy")
    except (library.SafetensorError, OSError, ValueError) as error:
        raise HuggingFaceError(f"{file}: not whole: {error}") from error
    with handle:
        yield handle


def safetensors() -> Any:
    """The library of that name; raises `HuggingFaceError` that says how to install it."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise HuggingFaceError(
            "weights are read and written by safetensors; pip install 'growjax[hf]'"
        ) from error
    return safetensors


def shortened(complaints: Iterable[str]) -> list[str]:
    """The first complaints, and how many there are more."""
    found = list(complaints)
    more = len(found) - _SHOWN
    return found if more <= 0 else [*found[:_SHOWN], f"and {more:,} more"]


# Writing -----------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """A tensor to be written: its size in bytes, and a function that makes it when it is its turn."""

    size: int
    make: Callable[[], np.ndarray]


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A folder to write into, which gets its name once it is whole, or is gone.

    Raises `HuggingFaceError` if there is something under that name already.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise HuggingFaceError(f"{path}: is there already, and nothing is overwritten")
    partial = path.absolute().with_name(f".{path.absolute().name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_weights(folder: Path, tensors: Mapping[str, Tensor], shard: int) -> None:
    """Write tensors in files of at most `shard` bytes (or of one tensor), with an index if several."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if groups[-1] and used + tensor.size > shard:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += tensor.size
    where = {}
    for i, names in enumerate(groups):
        alone = len(groups) == 1
        file = WEIGHTS if alone else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        # Strided arrays would be written by their buffer and read by their shape
        arrays = {name: np.ascontiguousarray(tensors[name].make()) for name in names}
        safetensors().numpy.save_file(arrays, str(folder / file), metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(groups) > 1:
        total = sum(tensor.size for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON for people as well."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
