"""`load` and `save`: one table of rows for both directions, which must cover all tensors and leaves."""

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from growjax.axes import Axes, axes_of, put, sizes
from growjax.deferred import Deferred
from growjax.errors import AxisError, HuggingFaceError, raise_all
from growjax.hf.bert import ENCODERS
from growjax.hf.companions import copy_companions
from growjax.hf.families import DECODERS
from growjax.hf.family import UNREAD, ConfigFile, Family, read_config, with_spellings
from growjax.hf.files import (
    CONFIG,
    DTYPES,
    Folder,
    Tensor,
    Written,
    inside,
    located,
    open_folder,
    read_json,
    shortened,
    write_json,
    write_weights,
    written_whole,
)
from growjax.hf.gpt2 import GPT2
from growjax.hf.keys import is_tolerated
from growjax.hf.modernbert import MODERNBERT
from growjax.hf.stock import Inexpressible, buffers_of, check_keys, shapes_of, stock
from growjax.hf.t5 import PAIRS
from growjax.hf.table import Row


FAMILIES = {
    family.model_type: family for family in (*ENCODERS, MODERNBERT, GPT2, *DECODERS, *PAIRS)
}
_POSITIONS = "max_position_embeddings"
_FLOATS = ("F64", "F32", "F16", "BF16")
_STORED = ("float64", "float32", "float16", "bfloat16")


def load(folder: str | Path, *, dtype: str | None = None, ignore: Sequence[str] = ()) -> Any:
    """The model in a Hugging Face folder, with its weights; `growjax families` lists what is read.

    **Arguments**

    - `folder`: has `config.json` and `model.safetensors`, or shards and their index; or the id of a
      repository in the local cache of the Hugging Face Hub. Nothing is downloaded, executed or unpickled,
      and nothing outside the folder is read.
    - `dtype`: the dtype of the parameters; None is that of the file. Epsilons and rotary frequencies are
      float32 at least.
    - `ignore`: patterns of tensors that the model does not use, such as `"classifier.*"`, and of unknown
      keys of `config.json` that change nothing.

    Raises `HuggingFaceError` that lists all unused tensors and missing parameters, and for broken files,
    unknown configurations and numbers that are not finite.

    **Example**

        model = gj.hf.load("bert-base-uncased")
        hidden = model(tokens).hidden              # [T, embed]
    """
    model = load_deferred(folder, dtype=dtype, ignore=ignore)
    slots = [slot for slot in axes_of(model).values() if isinstance(slot.value, Deferred)]
    return put(model, {slot.steps: jnp.asarray(np.asarray(slot.value)) for slot in slots})


def load_deferred(
    folder: str | Path, *, dtype: str | None = None, ignore: Sequence[str] = ()
) -> Any:
    """The model in a Hugging Face folder with `Deferred` parameters, which are read when they are used.

    The arguments and errors are those of `load`, but that numbers which are not finite are an error
    when they are read. The folder has to stay as it is.
    """
    check_dtype(dtype)
    with open_folder(folder) as opened:
        family, names, same, config = _described(opened, ignore)
        shapes = shapes_of(config)
        table = axes_of(shapes)
        rows = _rows_of(family, config, table)
        ignored = (*family.ignored, *ignore)
        _check_coverage(opened, names, rows, table, ignored, dtype, family.base)
        values: dict[tuple, Any] = {}
        for row in rows:
            for leaf, array in _leaves(opened, names, row, table, same, dtype).items():
                values[table[leaf].steps] = array
    for path, value in buffers_of(config).items():
        if value is not None:
            values[table[path].steps] = value
    return put(shapes, values)


def config(folder: str | Path) -> Any:
    """The configuration that builds the model in a Hugging Face folder, such as a `GPTConfig`.

    It reads no tensors except a pair that may be tied. Raises `HuggingFaceError` as `load` does.

    **Example**

        gj.Plan(model=gj.hf.config("gpt2"), start=Start("gpt2"), ...)
    """
    with open_folder(folder) as opened:
        return _described(opened)[-1]


def has_halves(folder: str | Path) -> bool:
    """Whether a Hugging Face folder has parameters of 16 bits."""
    with open_folder(folder) as opened:
        return bool({entry.dtype for entry in opened.tensors.values()} & {"F16", "BF16"})


def check_dtype(dtype: str | None) -> None:
    """Raise `HuggingFaceError` for a dtype that parameters cannot have in a file; None is none."""
    if dtype is None or dtype in _STORED:
        if dtype != "float64" or jax.config.read("jax_enable_x64"):
            return
        raise HuggingFaceError("dtype: JAX has no float64 unless jax_enable_x64 is set")
    raise HuggingFaceError(f"dtype: expected one of {', '.join(_STORED)}, got {dtype!r}")


def with_dtype(model: Any, dtype: str) -> Any:
    """The model with its parameters in another dtype; epsilons and frequencies stay as they are.

    Raises `HuggingFaceError` for a dtype that files do not have.
    """
    check_dtype(dtype)
    slots = [slot for slot in axes_of(model).of_kind("param") if slot.value is not None]
    return put(model, {slot.steps: slot.value.astype(dtype) for slot in slots})


def _described(
    folder: Folder, ignore: Sequence[str] = ()
) -> tuple[Family, dict[str, str], Callable[[str, str], bool], Any]:
    """The family of a folder, the names of its tensors, a function, and its configuration.

    The names are those of `_canonical`; the function says whether two tensors hold the same numbers.
    """
    family = _family_of(folder)
    names = _canonical(folder, family)
    # What the caller ignores is no sign of a head
    shown = [n for n in names if not any(fnmatch.fnmatchcase(n, pattern) for pattern in ignore)]
    file = ConfigFile(folder.config, shown)

    def same(one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers."""
        return folder.equal(names[one], names[other])

    config = read_config(family, file, same)
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
    progress: Written = lambda name, done, total: None,
) -> None:
    """Write a BERT, GPT, decoder or T5 as a folder that `transformers` loads, with equal outputs.

    **Arguments**

    - `folder`: must be empty or absent. It appears under its name only when all files are written.
    - `source`: the folder that the model came from. Its tokenizer, its licence and the modules of
      sentence-transformers are copied, and the other keys of its `config.json` (special tokens, dropout
      rates) are taken over, without `auto_map`, whose code is not copied.
    - `shard`: the largest size of a file of weights, in bytes; several files get an index.
    - `keys`: keys of `config.json` besides those that the model determines: special ids, or
      `max_position_embeddings`, which a `Llama` with its rotary positions does not have.
    - `more`: further files, texts by file name, such as a `README.md`.
    - `progress`: called as the weights are written, with the name of a tensor, the bytes that are written
      and those to write in all.

    A grown model is written as a stock one: open gates, branch multipliers and scales are folded into
    its weights. Raises `GateError` while gates are not open, and `HuggingFaceError` that lists every
    property that the family cannot express (another `head_dim` than it derives, epsilons that differ,
    QK-norms).

    **Example**

        gj.hf.save(gj.grow(gj.copy(embed=768, heads=24), model), "grown", source="all-MiniLM-L6-v2")
    """
    source = None if source is None else located(source)
    source_keys = {} if source is None else read_json(inside(source, CONFIG))
    origin = source_keys.get("model_type")
    family, model, config = _written_as(model, origin)
    table = axes_of(model)
    # transformers' model without a head is not inside another, so its names have no prefix
    prefix = "" if family.architecture(config) == family.base else family.prefix
    tensors: dict[str, Tensor] = {}
    for row in _rows_of(family, config, table):
        for place in row.places(table):
            tensor = _tensor(row, place, table)
            for name in row.names(place)[: None if row.all_names else 1]:
                tensors[name if name.startswith(family.heads) else prefix + name] = tensor
    dtype = str(model.embedding.table.dtype)
    # transformers would prefer an alias to the key written here, and the code of auto_map to its own
    for stale in (*family.aliases, "auto_map"):
        source_keys.pop(stale, None)
    if origin != family.model_type:
        # No source, or one of another family (of the dense model of a mixture), whose keys are others
        taken = {k: v for k, v in source_keys.items() if k == _POSITIONS or is_tolerated(k)}
        source_keys = {**family.defaults, **taken}
    own_keys = {**(keys or {}), **with_spellings(family.write(config), source_keys)} | {
        "model_type": family.model_type,
        "architectures": [family.architecture(config)],
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    told = source_keys | own_keys
    count = own_keys.get("num_labels")
    if count is not None and len(told.get("id2label") or ()) not in (0, count):
        # Names of the labels of another head, which would count
        told = {k: value for k, value in told.items() if k not in ("id2label", "label2id")}
    names = {name.removeprefix(family.prefix): tensor for name, tensor in tensors.items()}
    check_keys(family, told, names, config, dtype)
    with written_whole(folder) as partial:
        write_json(partial / CONFIG, told)
        write_weights(partial, tensors, shard, progress)
        if source is not None:
            copy_companions(source, partial, sizes(model)["embed"])
        for name, text in (more or {}).items():
            (partial / name).write_text(text, encoding="utf-8")


def _written_as(model: Any, preferred: str | None) -> tuple[Family, Any, Any]:
    """The first family that can express a model, the model as a stock one of that family, and its config.

    Several families may share a class. With a source, only its family, `preferred`, will do, since
    tokenizers and further keys are taken from it; but a dense model that became a mixture is of another
    family. Raises `HuggingFaceError` with the reasons of the family that comes closest if none can
    express the model.
    """
    matching = [f for f in FAMILIES.values() if isinstance(model, f.accepts or f.model)]
    if not matching:
        known = ", ".join(dict.fromkeys(family.model.__name__ for family in FAMILIES.values()))
        raise HuggingFaceError(f"model: expected one of {known}, got a {type(model).__name__}")
    mixture = "experts" in axes_of(model).sizes
    matching = [family for family in matching if family.mixture == mixture]
    if not matching:
        raise HuggingFaceError(
            f"model: this {type(model).__name__} has {axes_of(model).size('experts')} experts, and no "
            "family here has mixtures of its class; a Llama or Decoder of experts can be written. Save a "
            "checkpoint of the run, or of the model (eqx.tree_serialise_leaves)"
        )
    errors = []
    matching = [f for f in matching if f.model_type == preferred] or matching
    for family in matching:
        try:
            return family, *stock(model, family)
        except HuggingFaceError as error:
            errors.append(error)
        except AxisError as error:  # no configuration of its class describes the model
            errors.append(HuggingFaceError(str(error)))
    nearest = min(errors, key=lambda e: (not isinstance(e, Inexpressible), str(e).count("\n")))
    if len(errors) == 1:
        raise nearest
    others = ", ".join(family.model_type for family in matching)
    raise HuggingFaceError(f"{nearest}\n(the nearest of {others})")


def _family_of(folder: Folder) -> Family:
    """The family that the config of a folder names. Raises `HuggingFaceError` for an unknown one."""
    kind = folder.config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known, reason = ", ".join(FAMILIES), ""
        if isinstance(kind, str) and kind in UNREAD:
            reason = f": {UNREAD[kind]}"
        raise HuggingFaceError(
            f"{folder.path / CONFIG}: model_type: expected one of {known}, got {kind!r}{reason}"
        )
    return FAMILIES[kind]


def _canonical(folder: Folder, family: Family) -> dict[str, str]:
    """The names of the tensors in the file, by their names in the family's table.

    The latter lack prefixes, and have new endings in place of old ones.
    """
    names: dict[str, str] = {}
    duplicates = []
    wrapper = _wrapper_prefix(folder)
    for name in folder.tensors:
        canonical = name.removeprefix(wrapper).removeprefix(family.prefix)
        for old, new in family.renamed.items():
            if canonical.endswith(old):
                canonical = canonical.removesuffix(old) + new
        if canonical in names:
            duplicates.append(f"{name} and {names[canonical]}")
        names[canonical] = name
    raise_all(HuggingFaceError, f"{folder.path}: the same tensor twice:", shortened(duplicates))
    return names


def _wrapper_prefix(folder: Folder) -> str:
    """The prefix that torch.compile or DataParallel left on every name, with a warning if any."""
    prefix, names = "", list(folder.tensors)
    # Wrappers can be nested: module._orig_mod.
    while names and (match := re.match(r"(_orig_mod|module)\.", names[0][len(prefix) :])):
        if not all(name.startswith(prefix + match[0]) for name in names):
            return prefix
        prefix += match[0]
    if prefix:
        warnings.warn(
            f"{folder.path}: every tensor is called {prefix}*, as torch.compile or DataParallel name it; "
            "the prefix is ignored",
            stacklevel=2,
        )
    return prefix


def _rows_of(family: Family, config: Any, table: Axes) -> list[Row]:
    """The rows of a family whose leaves this model has."""
    rows = family.rows(config)
    return [row for row in rows if all(_has(table, leaf) for leaf in row.leaves)]


def _has(table: Axes, leaf: str) -> bool:
    return leaf in table and table[leaf].value is not None


def _check_coverage(
    folder: Folder,
    names: Mapping[str, str],
    rows: Sequence[Row],
    table: Axes,
    ignored: Sequence[str],
    dtype: str | None,
    base: str,
) -> None:
    """Raise `HuggingFaceError` unless the tensors of a folder are those of the rows.

    Every tensor must be used or match a pattern of `ignored`, every row have a tensor, with the right
    shape and a floating type.
    """
    complaints, used = [], set()
    for row in rows:
        shape, types = row.shape(table), set()
        for place in row.places(table):
            spellings = row.names(place)
            present = [name for name in spellings if name in names]
            used.update(present)
            if not present:
                complaints.append(f"{spellings[0]}: not in the file")
            for name in present:
                entry = folder.tensors[names[name]]
                types.add(entry.dtype)
                if entry.dtype not in _FLOATS:
                    complaints.append(
                        f"{name}: is of type {entry.dtype}, expected one of {', '.join(_FLOATS)}; "
                        "quantised weights cannot grow"
                    )
                if entry.shape != shape:
                    complaints.append(
                        f"{name}: expected the shape {list(shape)}, got {list(entry.shape)}"
                    )
        # The tensors of a row become one stacked array, which has one type
        if dtype is None and len(types) > 1:
            complaints.append(
                f"{row.name}: {', '.join(sorted(types))} in different layers; pass dtype="
            )
        if dtype is None and "F64" in types and not jax.config.read("jax_enable_x64"):
            complaints.append(f"{row.name}: is of type F64; enable x64, or pass dtype='float32'")
    unused = [
        f"{name}: is not a tensor of this model"
        for name in names
        if name not in used and not any(fnmatch.fnmatchcase(name, p) for p in ignored)
    ]
    faults = sorted(complaints) + sorted(unused)
    raise_all(
        HuggingFaceError,
        f"{folder.path} does not hold the model that its config.json describes:",
        [*shortened(faults), *(_hints(folder, base, bool(complaints)) if faults else [])],
    )


def _hints(folder: Folder, base: str, incomplete: bool) -> list[str]:
    """Advice for an architecture whose tensors differ from those of growjax's model.

    `base` is the class without a head that is read as such.
    """
    architectures = folder.config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if re.search(r"For(Sequence|Token|Question|Multiple)", name):
        patterns = "['classifier.*', 'score.*', 'qa_outputs.*', ...]"
        return [f"to read this {name} without its head, pass ignore={patterns}"]
    if incomplete and name.endswith("Model") and name != base:
        return [
            f"{name} has no head, and growjax's model has one; save it with its head, or set "
            "tie_word_embeddings to true if the head is the embedding"
        ]
    return []


def _leaves(
    folder: Folder,
    names: Mapping[str, str],
    row: Row,
    table: Axes,
    same: Callable[[str, str], bool],
    dtype: str | None,
) -> dict[str, Deferred]:
    """The arrays of a row's leaves, by path, with all layers and experts stacked."""
    spellings: dict[tuple[int, ...], str] = {}
    for place in row.places(table):
        present = [name for name in row.names(place) if name in names]
        differing = [] if row.all_names else [n for n in present[1:] if not same(present[0], n)]
        raise_all(
            HuggingFaceError,
            f"{folder.path}: {present[0]} is in it under other names too, with other numbers:",
            differing,
        )
        spellings[place] = names[present[0]]
    # Of a ModernBERT of one layer, which is its first, there are no others
    one = next(iter(spellings.values()), None) or next(iter(names.values()))
    own = DTYPES[folder.tensors[one].dtype]
    to = np.dtype(own if dtype is None else jnp.dtype(dtype))
    return {
        leaf: _leaf(folder, spellings, row, table, number, to)
        for number, leaf in enumerate(row.leaves)
    }


def _leaf(
    folder: Folder,
    spellings: Mapping[tuple[int, ...], str],
    row: Row,
    table: Axes,
    number: int,
    dtype: np.dtype,
) -> Deferred:
    """One leaf of a row, read a layer at a time, or some of the first dimension of its one tensor."""
    shape = table[row.leaves[number]].value.shape

    def layers(start: int, stop: int) -> np.ndarray:
        array = np.empty((stop - start, *shape[1:]), dtype)
        for place, name in spellings.items():
            if start <= place[0] < stop:
                tensor = folder.read(name).astype(dtype, copy=False)
                array[(place[0] - start, *place[1:])] = row.unpack(table, tensor)[number]
        return array

    def whole(start: int, stop: int) -> np.ndarray:
        tensor = folder.read(spellings[()]).astype(dtype, copy=False)
        return row.unpack(table, tensor)[number][start:stop]

    if () not in spellings:
        return Deferred(shape, dtype, layers)
    if (rows := row.rows(table)) is None:
        return Deferred(shape, dtype, whole)
    axis, dim = rows

    def entries(start: int, stop: int) -> np.ndarray:
        tensor = folder.read(spellings[()], start, stop).astype(dtype, copy=False)
        return row.unpack(table.resized({axis: stop - start}), tensor)[number]

    return Deferred(shape, dtype, entries, dim)


def _tensor(row: Row, place: tuple[int, ...], table: Axes) -> Tensor:
    """The tensor of one place, which is made when it is written: so one is in memory at a time."""
    leaves = [table[leaf].value for leaf in row.leaves]
    dtype, shape = np.dtype(np.result_type(*(x.dtype for x in leaves))), row.shape(table)

    def make() -> np.ndarray:
        arrays = [x if isinstance(x, Deferred) else np.asarray(x) for x in leaves]
        return row.pack(table, [array[place] for array in arrays])

    leaf, rows = leaves[0], row.rows(table)
    if rows is None or not isinstance(leaf, Deferred) or leaf.dim != rows[1]:
        return Tensor(dtype, shape, make)

    def parts() -> Iterator[np.ndarray]:
        for start, stop in leaf.blocks():
            yield row.pack(table.resized({rows[0]: stop - start}), [leaf.read(start, stop)])

    return Tensor(dtype, shape, make, parts)
