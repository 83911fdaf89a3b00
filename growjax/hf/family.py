"""What a family of checkpoints is: its rows, and its config.json in both directions."""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from growjax.errors import HuggingFaceError, raise_all
from growjax.hf.keys import is_tolerated
from growjax.hf.table import Row


# Both ways: names of activations there, and here. The first of several is the one that is written.
ACTIVATIONS: dict[str, str] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


class ConfigFile:
    """A config.json, read key by key; `check` raises everything that was wrong with it.

    A method takes the spellings of one key and a default for where none is there. Spellings that are
    there with different values are a fault: readers disagree about which one wins.
    """

    def __init__(self, values: Mapping[str, Any], names: Iterable[str]):
        self.values, self.names, self.complaints = values, frozenset(names), []
        self.read: set[str] = set()

    def get(self, *keys: str, default: Any = None) -> Any:
        """The value under one of these keys; null counts as not there."""
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

    def number(self, *keys: str, default: float) -> float:
        """A positive number."""
        value = self.get(*keys, default=default)
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if real and 0 < value < math.inf:
            return float(value)
        self.complaints.append(f"{keys[0]}: expected a positive number, got {value!r}")
        return 1.0

    def flag(self, *keys: str, default: bool) -> bool:
        """True or false. Null is the default only where that is false: some readers take it for that."""
        value = self.get(*keys, default=default)
        if default and any(self.values.get(key, default) is None for key in keys):
            value = None
        if not isinstance(value, bool):
            self.complaints.append(f"{keys[0]}: expected true or false, got {value!r}")
        return bool(value)

    def activation(self, key: str, default: str) -> str:
        """An activation, by its name here."""
        return self.known(key, self.get(key, default=default))

    def known(self, key: str, value: Any) -> str:
        """The name here of an activation that is called `value` there."""
        if not isinstance(value, str) or value not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            self.complaints.append(f"{key}: expected one of {known}, got {value!r}")
            return "relu"
        return ACTIVATIONS[value]

    def share(self, key: str, total: int, parts: int) -> int:
        """`total / parts`, which must be whole."""
        if total % parts:
            self.complaints.append(f"{key}: {total} cannot be divided by {parts} heads")
        return max(total // parts, 1)

    def layers(self, *keys: str, default: int | None = None) -> int:
        """A number of layers; as there is a tensor for each, a file bounds it."""
        value = self.size(*keys, default=default)
        if value > len(self.names):
            self.complaints.append(f"{keys[0]}: {value} layers, in {len(self.names)} tensors")
            return 1
        return value

    def fixed(self, values: Mapping[str, Any]) -> None:
        """Keys that change what is computed, and that must have one value if they are there.

        Null is not that value, unless false or null is: readers take it for false.
        """
        self.read.update(values)
        for key, value in values.items():
            allowed = (value, None) if value in (None, False) else (value,)
            if self.values.get(key, value) not in allowed:
                self.complaints.append(
                    f"{key}: only {value!r} can be read, got {self.values[key]!r}"
                )

    def unread(self, ignored: Iterable[str] = ()) -> None:
        """Complain of keys that nothing read, unless empty, `ignored` or known to be harmless."""
        ignored = tuple(ignored)
        for key, value in self.values.items():
            empty = value in (None, "", [], {})
            if key in self.read or empty or is_tolerated(key):
                continue
            if not any(fnmatch.fnmatchcase(key, pattern) for pattern in ignored):
                self.complaints.append(
                    f"{key}: an unknown key, {value!r} here; if it changes nothing that the model "
                    f"computes, remove it or pass ignore=[{key!r}]"
                )

    def check(self, model_type: str) -> None:
        """Raise `HuggingFaceError` with all complaints."""
        raise_all(
            HuggingFaceError, f"config.json of this {model_type} cannot be read:", self.complaints
        )


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of checkpoints and the model of `growjax.models` that computes what they do.

    **Fields**

    - `model_type`: as in config.json. `architecture`: the class there that computes what a model does.
    - `prefix`: of all names but those that begin like one of `heads`; it may be missing in a file, and
      is not written for the architecture `base`.
    - `model`: the class here; `config_of` reads its config off a model, whatever it grew from.
    - `rows`: the table, given a config; its names are without the prefix.
    - `read`, `write`: config.json to config, given also whether two tensors are the same; and back.
    - `only`: the choices of the config that the family can say. `limits`: what else it cannot, in words.
    - `fixed`: keys of config.json that must have this value if they are there.
    - `defaults`: keys that are written where no source has them, lest readers take their own.
    - `aliases`: other spellings of keys that are written, which would win over them in transformers.
    - `ignored`: patterns of names that hold nothing to be read. `renamed`: old endings and the new ones.
    - `scale`: what queries are multiplied by, given `head_dim`.
    - `settled`: the model with what its head is scaled by folded into its weights.
    - `zero_biases`: whether biases that a model has not are written as zeros.
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
    scale: Callable[[int], float] = lambda head_dim: head_dim**-0.5
    settled: Callable[[Any], Any] = lambda model: model
    zero_biases: bool = False


def activation_name(activation: str) -> str:
    """What an activation is called there."""
    return next(name for name, here in ACTIVATIONS.items() if here == activation)


def is_tied(
    file: ConfigFile,
    same: Callable[[str, str], bool],
    *,
    head: str,
    words: Iterable[str],
    default: bool,
    by_content: bool = False,
) -> bool:
    """Whether the head is the table of words: as config.json says, where the tensors bear it out.

    `by_content`: a head of its own is believed where config.json says that it is tied (T5 as written
    by transformers 5). Elsewhere old and new readers would disagree, so that is a complaint.
    """
    tied = file.flag("tie_word_embeddings", default=default)
    words = [name for name in words if name in file.names]
    if not tied or head not in file.names or not words or same(head, words[0]):
        return tied
    if not by_content:
        file.complaints.append(
            f"tie_word_embeddings: true, but {head} is there and is not {words[0]}; set it to false if "
            "the model has a head of its own, or remove that tensor"
        )
    return not by_content


def epsilon(array: Any) -> float:
    """An epsilon as it was written: the shortest decimal that gives the same number in its dtype."""
    return float(str(np.asarray(array).ravel()[0]))
