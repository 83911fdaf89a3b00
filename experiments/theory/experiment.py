"""What the experiments of this study have in common: networks that are made and measured once."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

from experiments import study
from experiments.study import Inputs, Key, Line
from experiments.text import LIBRARY
from experiments.theory.bytes import texts
from growjax.budget import t_interval
from growjax.data import StandardLibrary, Text
from growjax.report.rows import Answer


class Shared:
    """What the networks share: the text that some learn, read when one needs it."""

    def __init__(self, inputs: Inputs):
        self.text = inputs.text

    @property
    def name(self) -> str:
        return LIBRARY if self.text is None else self.text.stem

    @functools.cached_property
    def bytes(self) -> tuple[Array, Array]:
        """Bytes to train on, and bytes held out."""
        return texts(StandardLibrary() if self.text is None else Text(str(self.text)))


# Budget and arm of a network, and its parts: further arguments of `Experiment.line`
Network = tuple[str, str, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment.

    **Fields**

    - `sizes`: by name; each says its number of `seeds`.
    - `networks`: those of a size.
    - `line`: makes and measures one: `line(size, *arguments, seed)`, with the text's bytes after these if
      the experiment `reads`.
    - `answers`, `draw`: the answers that the lines give, and their figure, for a size.
    """

    title: str
    caption: str
    sizes: Mapping[str, Any]
    networks: Callable[[Any], Iterable[Network]]
    line: Callable[..., Line]
    answers: Callable[[Any, Sequence[Line]], list[Answer]]
    draw: Callable[[Any, Sequence[Line]], Figure]
    reads: bool = False


@dataclasses.dataclass(frozen=True)
class Cell(study.Cell):
    """One network of an experiment."""

    key: Key
    about: Experiment
    size: Any
    arguments: tuple[Any, ...]

    def settings(self, shared: Shared) -> Line:
        return {"text": shared.name} if self.about.reads else {}

    def run(self, shared: Shared) -> Line:
        text = (shared.bytes,) if self.about.reads else ()
        return self.about.line(self.size, *self.arguments, self.key[3], *text)


def table(lines: Sequence[Line], *names: str) -> np.ndarray:
    """A number of each line, `[seeds, budgets]`; `names` is the path to it, such as "end", "mean"."""
    budgets = list(dict.fromkeys(line["budget"] for line in lines))
    seeds = sorted({line["seed"] for line in lines})
    values = np.full((len(seeds), len(budgets)), np.nan)
    for line in lines:
        value: Any = line
        for name in names:
            value = value[name]
        # None stands for a number that was not finite
        place = seeds.index(line["seed"]), budgets.index(line["budget"])
        values[place] = np.nan if value is None else value
    return values


def half_interval(values: np.ndarray) -> np.ndarray:
    """Half of the 95% t-interval of each column; NaN where a network diverged."""
    intervals = [
        t_interval(column.tolist()) if np.isfinite(column).all() else (np.nan, np.nan)
        for column in values.T
    ]
    return np.array([(high - low) / 2 for low, high in intervals])
