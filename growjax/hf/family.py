"""A family of checkpoints: its table of rows, and its config.json in both directions."""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from growjax.axes import sizes
from growjax.errors import HuggingFaceError, raise_all
from growjax.hf.keys import is_tolerated
from growjax.hf.table import Row


# Names of activations in config.json, and in growjax. Of several names for one, the first is written
ACTIVATIONS: dict[str, str] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


# What families compute that no model here does, by the model_type
_LATENT = "its keys and values are projections of a latent vector, which no attention here has"
UNREAD = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2"), _LATENT),
    "gpt_oss": "its attention has sinks, trained scores of no key",
    "gemma3": "it reads images too; its text model alone, saved by itself, is a gemma3_text",
    **dict.fromkeys(("mamba", "mamba2", "jamba"), "it has layers without attention"),
    "qwen3_next": "it has layers of linear attention",
}

# Keys of config.json that would change what a model of any family computes
FIXED = {"per_layer_config": None}


class ConfigFile:
    """A config.json, read key by key; `check` raises all faults that were noted on the way.

    A method takes the spellings of one key, and a default for a file without any. Several spellings with
    different values are a fault, since readers disagree about which one wins. After a fault a method
    returns a harmless value, so that reading goes on to the next key.
    """

    def __init__(self, values: Mapping[str, Any], names: Iterable[str]):
        self.values, self.names, self.complaints = values, frozenset(names), []
        self.read: set[str] = set()

    @property
    def architecture(self) -> str:
        """The class of transformers that the file names first, or an empty string."""
        named = self.values.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    def get(self, *keys: str, default: Any = None) -> Any:
        """The value under one of these keys; null counts as absent."""
        self.read.update(keys)
        given = {key: self.values[key] for key in keys if self.values.get(key) is not None}
        if len({repr(value) for value in given.values()}) > 1:
            pairs = ", ".join(f"{key}={value!r}" for key, value in given.items())
            self.complaints.append(f"{keys[0]}: {pairs} are spellings of one key; keep one of them")
        return next(iter(given.values()), default)

    def size(self, *keys: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(*keys, default=default)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
            return value
        self.complaints.append(f"{keys[0]}: expected a positive integer, got {value!r}")
        return 1

    def count(self, *keys: str, default: int) -> int:
        """An integer that is not negative."""
        value = self.get(*keys, default=default)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31:
            return value
        self.complaints.append(f"{keys[0]}: expected an integer of at least 0, got {value!r}")
        return 0

    def number(self, *keys: str, default: float, zero: bool = False) -> float:
        """A positive number, or zero where it may be."""
        value = self.get(*keys, default=default)
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if real and (0 < value < math.inf or (zero and value == 0)):
            return float(value)
        wanted = "a number of at least 0" if zero else "a positive number"
        self.complaints.append(f"{keys[0]}: expected {wanted}, got {value!r}")
        return 1.0

    def flag(self, *keys: str, default: bool) -> bool:
        """True or false. Null is accepted only if the default is false, since some readers take it so."""
        value = self.get(*keys, default=default)
        if default and any(self.values.get(key, default) is None for key in keys):
            value = None
        if not isinstance(value, bool):
            self.complaints.append(f"{keys[0]}: expected true or false, got {value!r}")
        return bool(value)

    def activation(self, key: str, default: str) -> str:
        """An activation, by its name in growjax."""
        return self.known(key, self.get(key, default=default))

    def known(self, key: str, value: Any) -> str:
        """The name in growjax of the activation `value` of config.json."""
        if not isinstance(value, str) or value not in ACTIVATIONS:
            allowed = ", ".join(ACTIVATIONS)
            self.complaints.append(f"{key}: expected one of {allowed}, got {value!r}")
            return "relu"
        return ACTIVATIONS[value]

    def share(self, key: str, total: int, parts: int) -> int:
        """`total / parts`, which must be an integer."""
        if total % parts:
            self.complaints.append(f"{key}: {total} cannot be divided by {parts} heads")
        return max(total // parts, 1)

    def layers(self, *keys: str, default: int | None = None, noun: str = "layers") -> int:
        """A number of layers, at most that of tensors: so a hostile file cannot ask for a huge model."""
        value = self.size(*keys, default=default)
        if value > len(self.names):
            self.complaints.append(f"{keys[0]}: {value} {noun}, in {len(self.names)} tensors")
            return 1
        return value

    def labels(self) -> int:
        """The number of labels of a classifier: of their names, if there are any."""
        names = self.get("id2label")
        if isinstance(names, dict) and names:
            return len(names)
        return self.size("num_labels", default=2)

    def fixed(self, values: Mapping[str, Any]) -> None:
        """Note a fault for each of these keys that is present with another value than this.

        They are keys that change what the model computes, and growjax computes one value alone. Null
        stands for null, false or an empty list only, since readers take it for these.
        """
        self.read.update(values)
        for key, value in values.items():
            allowed = (value, None) if value in (None, False, []) else (value,)
            if self.values.get(key, value) not in allowed:
                self.complaints.append(
                    f"{key}: only {value!r} can be read, got {self.values[key]!r}"
                )

    def unread(self, ignored: Iterable[str] = ()) -> None:
        """Note a fault for each key that was not read, unless it is empty, `ignored` or tolerated."""
        ignored = tuple(ignored)
        for key, value in self.values.items():
            empty = value in (None, "", [], {})
            if key in self.read or empty or is_tolerated(key):
                continue
            if not any(fnmatch.fnmatchcase(key, pattern) for pattern in ignored):
                self.complaints.append(
                    f"{key}: an unknown key, with value {value!r}; if it changes nothing that the model "
                    f"computes, remove it from the file, or pass ignore=[{key!r}] to gj.hf.load"
                )

    def check(self, model_type: str) -> None:
        """Raise `HuggingFaceError` with all complaints."""
        raise_all(
            HuggingFaceError, f"config.json of this {model_type} cannot be read:", self.complaints
        )


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of checkpoints, and the model of `growjax.models` that computes the same function.

    **Fields**

    - `model_type`: the value of that key in config.json.
    - `architecture`: a function from a config to the class of transformers that computes it.
    - `prefix`: the prefix of tensor names, except those that begin with one of `heads`. Files may lack
      it, and it is not written for the architecture `base`.
    - `model`: growjax's class. `config_of`: a function from a model, grown or not, to its config.
    - `rows`: a function from a config to the table of rows, whose names lack the prefix.
    - `read`: a function from a `ConfigFile`, and one that compares two tensors, to a config.
    - `write`: a function from a config to keys of config.json.
    - `only`: fields of the config, with the one value that the family has.
    - `limits`: a function from a config to messages about everything else that the family lacks.
    - `fixed`: keys of config.json that must have this value if they are present.
    - `defaults`: keys to write without a source, since readers have other defaults.
    - `aliases`: other spellings of written keys, which transformers would prefer to them.
    - `ignored`: patterns of names of tensors that are not needed.
    - `renamed`: old endings of names, and the new ones.
    - `scale`: a function from a model's attention to the factor that the family multiplies scores by.
    - `accepts`: the classes of models that may be written, if not `model` alone.
    - `members`: some published checkpoints of the family, for people.
    - `growth`: what of it can be grown so that transformers still reads it, for people.
    - `fold_scales`: a function that folds the scales of a model's embedding and head into its weights.
    - `mixture`: whether its models are mixtures of experts.
    - `zero_biases`: whether biases that a model lacks are written as zeros.
    """

    model_type: str
    model: type
    architecture: Callable[[Any], str]
    rows: Callable[[Any], tuple[Row, ...]]
    read: Callable[[ConfigFile, Callable[[str, str], bool]], Any]
    write: Callable[[Any], dict[str, Any]]
    config_of: Callable[[Any], Any]
    limits: Callable[[Any], list[str]]
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    )
    aliases: tuple[str, ...] = ()
    prefix: str = ""
    heads: tuple[str, ...] = ()
    base: str = ""
    ignored: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scale: Callable[[Any], float] = lambda attention: attention.q.shape[-1] ** -0.5
    accepts: type | tuple[type, ...] | None = None
    members: str = ""
    growth: str = "embed together with heads, mlp, layers"
    fold_scales: Callable[[Any], Any] = lambda model: model
    mixture: bool = False
    zero_biases: bool = False


def read_config(family: Family, file: ConfigFile, same: Callable[[str, str], bool]) -> Any:
    """The configuration that a config.json describes; faults are noted in `file`."""
    quantised = file.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised
        file.complaints.append(
            f"quantization_config: the weights are quantised ({method}), and such cannot grow; take the "
            "repository that they were made from, or transformers' dequantize() and save_pretrained()"
        )
    file.fixed({**family.fixed, **FIXED})
    return family.read(file, same)


def activation_name(activation: str, default: str = "") -> str:
    """The name in config.json of growjax's activation: `default`, if that is one of its names."""
    names = [name for name, own_name in ACTIVATIONS.items() if own_name == activation]
    return default if default in names else names[0]


def with_spellings(keys: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.json, with the names of activations that `source` has for the same ones.

    Some readers of a family know no other name (vLLM, of Gemma).
    """
    spelled = dict(keys)
    for key, value in keys.items():
        known = [isinstance(x, str) and ACTIVATIONS.get(x) for x in (value, source.get(key))]
        if known[0] and known[0] == known[1]:
            spelled[key] = source[key]
    return spelled


def is_tied(
    file: ConfigFile,
    same: Callable[[str, str], bool],
    *,
    head: str,
    words: Iterable[str],
    default: bool,
    by_content: bool = False,
) -> bool:
    """Whether the head is tied to the embedding, by config.json, checked against the tensors.

    **Arguments**

    - `same`: says whether two tensors hold the same numbers.
    - `head`, `words`: the tensor of the head, and the possible names of the embedding.
    - `by_content`: if config.json says tied but the tensors differ, whether to believe the tensors (T5 as
      written by transformers 5). Otherwise that is a fault, since old and new readers would disagree.
    """
    tied = file.flag("tie_word_embeddings", default=default)
    words = [name for name in words if name in file.names]
    if not tied or head not in file.names or not words or same(head, words[0]):
        return tied
    if not by_content:
        file.complaints.append(
            f"tie_word_embeddings: true, but {head} differs from {words[0]}; set it to false if the "
            "model has a head of its own, or remove that tensor"
        )
    return not by_content


def config_sizes(model: Any) -> dict[str, Any]:
    """The sizes that all configurations have, from a model's arrays: a grown model has no config."""
    n = sizes(model)
    heads = n["kv_heads"] * n["group"]
    return {"heads": heads, **{name: n[name] for name in ("embed", "head_dim", "mlp", "vocab")}}


def epsilon(array: Any) -> float:
    """An epsilon as it stands in config.json: the shortest decimal that rounds to it in its dtype."""
    return float(str(np.asarray(array).ravel()[0]))
