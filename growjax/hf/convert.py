"""`load` and `save`: the same rows in both directions, and every tensor and every leaf accounted for."""

import fnmatch
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from growjax.axes import Axes, axes_of, put, sizes
from growjax.errors import HuggingFaceError, raise_all
from growjax.hf.bert import BERT_
from growjax.hf.companions import copy_companions
from growjax.hf.family import ConfigFile, Family
from growjax.hf.files import (
    CONFIG,
    Folder,
    Tensor,
    inside,
    open_folder,
    read_json,
    shortened,
    write_json,
    write_weights,
    written_whole,
)
from growjax.hf.gpt2 import GPT2
from growjax.hf.llama import LLAMA
from growjax.hf.stock import buffers_of, shapes_of, stock
from growjax.hf.t5 import T5_
from growjax.hf.table import Row


FAMILIES = {family.model_type: family for family in (BERT_, GPT2, LLAMA, T5_)}
# Keys of config.json that would change what any family computes.
FIXED = {"quantization_config": None, "per_layer_config": None}
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def load(folder: str | Path, *, dtype: str | None = None, ignore: Sequence[str] = ()) -> Any:
    """The model in a Hugging Face folder: a BERT, GPT-2, Llama or T5 (also v1.1, UL2) with its weights.

    **Arguments**

    - `folder`: with `config.json` and `model.safetensors`, or shards and their index. Nothing is
      downloaded, executed or unpickled, and nothing outside the folder is read.
    - `dtype`: of the parameters; by default they stay as they are in the file. Epsilons and rotary
      frequencies are float32 at least.
    - `ignore`: patterns of tensors that may be left over, such as `"classifier.*"`, and of keys of
      `config.json` that change nothing, where the reader does not know them.

    Every tensor is used and every parameter is filled, or `HuggingFaceError` lists what is not; it is
    also what broken files, unknown configurations and numbers that are not finite raise.

    **Example**

        model = gj.hf.load("bert-base-uncased")
        hidden = model(tokens).hidden              # [T, embed]
    """
    with open_folder(folder) as found:
        family, names, same, config = _described(found, ignore)
        shapes = shapes_of(config, family)
        table = axes_of(shapes)
        rows = _rows_of(family, config, table)
        _check_coverage(found, names, rows, table, (*family.ignored, *ignore), dtype)
        values = {}
        for row in rows:
            for leaf, array in _filled(found, names, row, table, same, dtype).items():
                values[table[leaf].steps] = jnp.asarray(array)
    for path, value in buffers_of(config, family).items():
        if value is not None:
            values[table[path].steps] = value
    return put(shapes, values)


def config(folder: str | Path) -> Any:
    """The configuration that builds the model in a Hugging Face folder, such as a `GPTConfig`.

    Its tensors are not read, but for those that may be tied. Raises `HuggingFaceError` as `load` does.

    **Example**

        gj.Plan(model=gj.hf.config("gpt2"), start=Start("gpt2"), ...)
    """
    with open_folder(folder) as found:
        return _described(found)[-1]


def has_halves(folder: str | Path) -> bool:
    """Whether parameters in a Hugging Face folder are of 16 bits."""
    with open_folder(folder) as opened:
        return bool({entry.dtype for entry in opened.tensors.values()} & {"F16", "BF16"})


def with_dtype(model: Any, dtype: str) -> Any:
    """The model with its parameters in another type; epsilons and frequencies stay as they are."""
    slots = [slot for slot in axes_of(model).of_kind("param") if slot.value is not None]
    return put(model, {slot.steps: slot.value.astype(dtype) for slot in slots})


def _described(
    found: Folder, ignore: Sequence[str] = ()
) -> tuple[Family, dict[str, str], Callable[[str, str], bool], Any]:
    """The family, the names, whether two tensors are the same, and the configuration of a folder."""
    family = _family_of(found)
    names = _canonical(found, family)
    file = ConfigFile(found.config, names)

    def same(one: str, other: str) -> bool:
        one, other = names[one], names[other]
        if found.tensors[one].shape != found.tensors[other].shape:
            return False
        return np.array_equal(found.read(one), found.read(other))

    file.fixed({**family.fixed, **FIXED})
    config = family.read(file, same)
    file.unread(ignore)
    file.check(family.model_type)
    return family, names, same, config


def save(
    model: Any,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    shard: int = 5 * 10**9,
    keys: Mapping[str, Any] | None = None,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write a BERT, GPT, Llama or T5 as a folder that `transformers` loads, with equal outputs.

    **Arguments**

    - `folder`: must be empty or not there; it gets its name when it is whole.
    - `source`: the folder that the model came from: its tokenizer is copied, and what its `config.json`
      says besides sizes (special tokens, dropout rates) is kept. Its licence and the modules of
      sentence-transformers are copied too; `auto_map` is not, since its code is not.
    - `shard`: the largest size of a file, in bytes; more than one get an index.
    - `keys`: of `config.json`, besides those that say what the model computes: special ids, or
      `max_position_embeddings`, which the rotary positions of a `Llama` do not say.
    - `more`: texts to write beside it, by file name, such as a `README.md`.

    A grown model is written as a stock one: open gates, branch multipliers and scales are folded into
    its weights. Raises `GateError` while gates are not open, and `HuggingFaceError` with everything that
    the family cannot say (a `head_dim` that it derives, epsilons that differ, QK-norms).

    **Example**

        gj.hf.save(gj.grow(gj.copy(embed=768, heads=24), model), "grown", source="all-MiniLM-L6-v2")
    """
    kept = {} if source is None else read_json(inside(Path(source), CONFIG))
    family, model, config = _written_as(model, kept.get("model_type"))
    table = axes_of(model)
    prefix = "" if family.architecture(config) == family.base else family.prefix
    tensors: dict[str, Tensor] = {}
    for row in _rows_of(family, config, table):
        for layer in range(_layers(row, table)):
            tensor = _tensor(row, layer, table)
            for name in row.names(layer)[: None if row.all_names else 1]:
                tensors[name if name.startswith(family.heads) else prefix + name] = tensor
    dtype = str(np.asarray(model.embedding.table).dtype)
    for stale in (*family.aliases, "auto_map"):  # code that would be read instead of the library's
        kept.pop(stale, None)
    if source is None:
        kept = dict(family.defaults)
    written = {**(keys or {}), **family.write(config)} | {
        "model_type": family.model_type,
        "architectures": [family.architecture(config)],
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    with written_whole(folder) as partial:
        write_json(partial / CONFIG, kept | written)
        write_weights(partial, tensors, shard)
        if source is not None:
            copy_companions(Path(source), partial, sizes(model)["embed"])
        for name, text in (more or {}).items():
            (partial / name).write_text(text, encoding="utf-8")


def _written_as(model: Any, preferred: str | None) -> tuple[Family, Any, Any]:
    """The first family that can say a model, the model as a stock one of it, and its config.

    Several families may share a class. That of the source comes first; where none can say the model, the
    reasons of each are given.
    """
    matching = [family for family in FAMILIES.values() if family.model is type(model)]
    if not matching:
        known = ", ".join(dict.fromkeys(family.model.__name__ for family in FAMILIES.values()))
        raise HuggingFaceError(f"model: expected one of {known}, got a {type(model).__name__}")
    errors = []
    for family in sorted(matching, key=lambda family: family.model_type != preferred):
        try:
            return family, *stock(model, family)
        except HuggingFaceError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise HuggingFaceError("\n".join(str(error) for error in errors))


def _family_of(folder: Folder) -> Family:
    kind = folder.config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise HuggingFaceError(
            f"{folder.path / CONFIG}: model_type: expected one of {known}, got {kind!r}"
        )
    return FAMILIES[kind]


def _canonical(folder: Folder, family: Family) -> dict[str, str]:
    """The names of a file by how the table spells them."""
    found: dict[str, str] = {}
    twice = []
    wrapped = _wrapper(folder)
    for name in folder.tensors:
        ours = name.removeprefix(wrapped).removeprefix(family.prefix)
        for old, new in family.renamed.items():
            ours = ours.removesuffix(old) + new if ours.endswith(old) else ours
        if ours in found:
            twice.append(f"{name} and {found[ours]}")
        found[ours] = name
    raise_all(HuggingFaceError, f"{folder.path}: the same tensor twice:", shortened(twice))
    return found


def _wrapper(folder: Folder) -> str:
    """The prefix that wrappers of torch left on every name; a warning says that it is not read."""
    prefix, names = "", list(folder.tensors)
    while names and (common := re.match(r"(_orig_mod|module)\.", names[0][len(prefix) :])):
        prefix += common[0]
        if not all(name.startswith(prefix) for name in names):
            return prefix.removesuffix(common[0])
    if prefix:
        warnings.warn(
            f"{folder.path}: every tensor is called {prefix}*, as torch.compile or DataParallel leave "
            "it; the names are read without that",
            stacklevel=2,
        )
    return prefix


def _rows_of(family: Family, config: Any, table: Axes) -> list[Row]:
    """The rows of what this model has."""
    rows = family.rows(config)
    return [row for row in rows if all(_has(table, leaf) for leaf in row.leaves)]


def _has(table: Axes, leaf: str) -> bool:
    return leaf in table and table[leaf].value is not None


def _layers(row: Row, table: Axes) -> int:
    return table.size(table[row.leaves[0]].dims[0].axis) if row.layered else 1


def _check_coverage(
    folder: Folder,
    names: Mapping[str, str],
    rows: Sequence[Row],
    table: Axes,
    ignored: Sequence[str],
    dtype: str | None,
) -> None:
    """Every tensor used or ignored, every leaf filled, every shape and type as it must be."""
    complaints, used = [], set()
    for row in rows:
        shape, kinds = row.shape(table), set()
        for layer in range(_layers(row, table)):
            spellings = row.names(layer)
            there = [name for name in spellings if name in names]
            used.update(there)
            if not there:
                complaints.append(f"{spellings[0]}: not in the file")
            for name in there:
                entry = folder.tensors[names[name]]
                kinds.add(entry.dtype)
                if entry.dtype not in _NAMES:
                    complaints.append(f"{name}: is of type {entry.dtype}, expected a floating one")
                if entry.shape != shape:
                    complaints.append(
                        f"{name}: expected the shape {list(shape)}, got {list(entry.shape)}"
                    )
        if dtype is None and len(kinds) > 1:
            complaints.append(
                f"{row.name}: {', '.join(sorted(kinds))} in different layers; pass dtype="
            )
        if dtype is None and "F64" in kinds and not jax.config.read("jax_enable_x64"):
            complaints.append(f"{row.name}: is of type F64; enable x64, or pass dtype='float32'")
    left = [
        f"{name}: nothing in this model is called so"
        for name in names
        if name not in used and not any(fnmatch.fnmatchcase(name, p) for p in ignored)
    ]
    raise_all(
        HuggingFaceError,
        f"{folder.path} does not hold this model, as its config.json describes it:",
        [*shortened(sorted(complaints) + sorted(left)), *_hints(folder, bool(complaints))],
    )


def _hints(folder: Folder, incomplete: bool) -> list[str]:
    """What to do about an architecture whose tensors are not those of the model here."""
    architectures = folder.config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if re.search(r"For(Sequence|Token|Question|Multiple)", name):
        return [f"{name} has a head that is not read; pass ignore=['classifier.*', 'score.*', ...]"]
    if incomplete and re.search(r"(Encoder)?Model$", name):
        return [
            f"{name} has no head, and the model here has one; save it with its head, or, where the head "
            "is the embedding, set tie_word_embeddings to true"
        ]
    return []


def _filled(
    folder: Folder,
    names: Mapping[str, str],
    row: Row,
    table: Axes,
    same: Callable[[str, str], bool],
    dtype: str | None,
) -> dict[str, np.ndarray]:
    """The leaves of a row, from all its layers."""
    found: dict[str, np.ndarray] = {}
    layers = _layers(row, table)
    for layer in range(layers):
        there = [name for name in row.names(layer) if name in names]
        differing = [] if row.all_names else [n for n in there[1:] if not same(there[0], n)]
        raise_all(
            HuggingFaceError,
            f"{folder.path}: {there[0]} is there under other names too, with other numbers:",
            differing,
        )
        tensor = folder.read(names[there[0]])
        tensor = tensor if dtype is None else tensor.astype(jnp.dtype(dtype))
        for leaf, array in zip(row.leaves, row.unpack(table, tensor), strict=True):
            if not row.layered:
                found[leaf] = array
                continue
            if leaf not in found:
                found[leaf] = np.empty((layers, *array.shape), array.dtype)
            found[leaf][layer] = array
    return found


def _tensor(row: Row, layer: int, table: Axes) -> Tensor:
    """The tensor of one layer, to be made when it is written."""
    leaves = [table[leaf].value for leaf in row.leaves]
    size = sum(leaf.nbytes for leaf in leaves) // _layers(row, table)

    def make() -> np.ndarray:
        arrays = [np.asarray(leaf) for leaf in leaves]
        arrays = [array[layer] for array in arrays] if row.layered else arrays
        return row.pack(table, arrays)

    return Tensor(size, make)
