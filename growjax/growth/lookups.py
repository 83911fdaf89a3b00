"""Larger tables: words of a vocabulary and learned positions.

Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021; Beltagy, Peters, Cohan,
"Longformer", 2020 (positions again and again).
"""

import math
from typing import Annotated, ClassVar, Literal

import equinox as eqx
import numpy as np

from growjax import values
from growjax.algebra import NONE, AxisMap, Init
from growjax.axes import Axes
from growjax.cards import Card, Paper
from growjax.errors import GrowthError, raise_all
from growjax.growth.finishes import Places, Rows
from growjax.growth.operator import Exactness, Operator, resolve
from growjax.values import Size


Words = Init | Literal["mean", "covariance"]


_HEWITT = Paper(
    "Initializing New Word Embeddings for Pretrained Language Models",
    "Hewitt, John",
    2021,
    url="https://nlp.stanford.edu/~johnhew/vocab-expansion.html",
)
_LONGFORMER = Paper(
    "Longformer: The Long-Document Transformer",
    "Beltagy, Iz and Peters, Matthew E. and Cohan, Arman",
    2020,
    arxiv="2004.05150",
)


@values.register
class Wording(Operator):
    """New words; see `vocabulary`."""

    written: ClassVar[str] = "vocabulary"

    size: Size = eqx.field(static=True)
    init: Words = eqx.field(static=True, default="mean")
    used: Size | None = eqx.field(static=True, default=None)
    gate: bool = eqx.field(static=True, default=False)
    spread: Annotated[float, values.at_least(0)] = eqx.field(static=True, default=1e-9)
    axis: str = eqx.field(static=True, default="vocab")
    card: ClassVar[Card] = Card(
        use="New words for a trained model: special tokens, another language, a padded table that is "
        "to be used.",
        traps=(
            "Random rows in the head take probability from every old word; the mean of the old rows "
            "takes `log(1 + new / old)` nats at most.",
            "Under a cap of the logits (Gemma 2) the mean comes close to the largest one: the bound is "
            "`log(1 + new)` there.",
            "Rows from the whole covariance break that bound; the 1e-9 of transformers matters.",
            "Padding rows are no words: give `used`, or they count in the mean and are never filled.",
        ),
        example="vocabulary(14)",
        by={"init": {"mean": (_HEWITT,), "covariance": (_HEWITT,)}},
    )

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """Behind a gate new words have no probability; without one the loss rises a little."""
        return "exact" if self.gate else "approximate"

    def maps(self, axes: Axes) -> list[AxisMap]:
        """The old rows in use, the new ones, and padding that nobody has taken."""
        rows = axes.size(self.axis)
        used = rows if self.used is None else self.used
        faults = []
        if "lookup" not in axes.roles(self.axis):
            faults.append(
                f"axis: no table is looked up along {self.axis!r}; give that of the words"
            )
        if used > rows:
            faults.append(f"used: expected at most the model's {rows} rows, got {used}")
        elif self.size < used:
            faults.append(f"size: {self.size} words are fewer than the {used} in use")
        raise_all(GrowthError, f"the vocabulary cannot grow to {self.size}:", faults)
        index = np.arange(max(rows, self.size))
        source = np.where((index >= used) & (index < self.size), NONE, index)
        if not np.any(source == NONE):
            return []
        if self.init not in ("mean", "covariance"):
            return [AxisMap(self.axis, source, gated=self.gate, init=self.init)]
        finish = Rows(used, self.spread if self.init == "covariance" else 0.0)
        return [AxisMap(self.axis, source, gated=self.gate, init="zeros", finish=finish)]

    def bound(self, axes: Axes, *, capped: bool = False) -> float | None:
        """The most that the loss of any old word can rise, in nats; None where nothing bounds it.

        0 behind a gate, `log(1 + new / old)` where new rows are the mean of the old ones. (With
        `"covariance"` and a small `spread` it is exceeded by next to nothing, with a large one by far.)
        With `capped`, for a model that caps its logits (`DecoderConfig(logit_cap=...)`, Gemma 2), it is
        `log(1 + new)`: the cap is applied to the mean of what it had not bent yet.
        """
        if not isinstance(axes, Axes):
            kind = type(axes).__name__
            raise GrowthError(f"axes: expected growjax.axes.axes_of(model), got a {kind}")
        old = axes.size(self.axis) if self.used is None else self.used
        if self.gate:
            return 0.0
        if self.init != "mean":
            return None
        return math.log(1 + self.size - old) if capped else math.log(self.size / old)


def vocabulary(
    size: int,
    *,
    init: Words = "mean",
    used: int | None = None,
    gate: bool = False,
    spread: float = 1e-9,
    axis: str = "vocab",
) -> Wording:
    """Grow the vocabulary to `size` words: the table, the head and its bias, tied or not.

    A new row is the mean of the old rows, in the table and in the head. A new logit is then the mean of
    the old ones, which is at most their log-mean-exp, so the loss of any old word rises by
    `log(1 + new / old)` at most (`bound` of the operator), in any context, unless the logits are capped.
    New rows start their optimizer state anew.

    **Arguments**

    - `init`: `"mean"`; `"covariance"`, the mean plus a draw with `spread` times the covariance of the old
      rows; or the values of other operators (`"normal"`, `"matched"`, a callable), which nothing bounds.
    - `used`: how many of the model's rows are words; the rest is padding. New words take padding first,
      and padding counts in no mean. None: all rows. What probability the padding had that is taken behind
      a gate goes to the other words: their logits stay, and their losses fall.
    - `gate`: hide the new words behind a gate on the logits. At level 0 they have no probability, so the
      function of old text is kept whatever the new rows hold (`"exact"`); `gj.ramp` and `gj.settle` open
      it. A model needs a `gj.gate` on the axis, as all models here have.
    - `spread`: 1e-9, as in transformers. It is as small as that for a reason: the whole covariance
      (`spread=1.0`) gives some new words large logits, and breaks the bound.
    - `axis`: the name of the axis of words.

    Raises `GrowthError` for fewer words than there are.

    **Example**

        gj.vocabulary(50_304)                      # from 50_257 rows
        gj.vocabulary(50_280, used=50_257)         # 23 new words in a table that was padded to 50_304
    """
    return Wording(size, init, used, gate, spread, axis)


@values.register
class Positions(Operator):
    """Longer tables of learned positions; see `positions`."""

    size: Size = eqx.field(static=True)
    how: Literal["continue", "tile", "interpolate"] = eqx.field(static=True, default="continue")
    init: Init = eqx.field(static=True, default="matched")
    axis: str = eqx.field(static=True, default="positions")
    first: Annotated[int, values.at_least(0)] = eqx.field(static=True, default=0)
    card: ClassVar[Card] = Card(
        use="Longer sequences for a model with a table of learned positions.",
        traps=(
            "The new rows are untrained: a longer sequence is worse than a short one until they are.",
            "Interpolation moves the old positions, so that short sequences change too.",
            "Models that count from a later row, as RoBERTa does, need `first`.",
        ),
        example="positions(12)",
        by={"how": {"tile": (_LONGFORMER,)}},
    )

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """Interpolation moves the old positions too."""
        return "approximate" if self.how == "interpolate" else "exact-given-init"

    def maps(self, axes: Axes) -> list[AxisMap]:
        """The old rows and new ones, or new ones alone."""
        if self.axis not in axes.sizes or "lookup" not in axes.roles(self.axis):
            raise GrowthError(
                f"axis: no table is looked up along {self.axis!r}; gj.growth.context stretches rotary "
                "positions"
            )
        wanted, old = resolve(axes, {self.axis: self.size}), axes.size(self.axis)
        if self.first >= old:
            raise GrowthError(f"first: expected one of the model's {old} rows, got {self.first}")
        if not wanted:
            return []
        index = np.arange(self.size)
        stay = self.first if self.how == "interpolate" else old
        source = np.where(index < stay, index, NONE)
        if self.how != "continue":
            rule = Places(self.how, self.first)
            return [AxisMap(self.axis, source, init="zeros", finish=rule)]
        return [AxisMap(self.axis, source, init=self.init)]


def positions(
    size: int,
    *,
    how: Literal["continue", "tile", "interpolate"] = "continue",
    init: Init = "matched",
    axis: str = "positions",
    first: int = 0,
) -> Positions:
    """Grow a table of learned positions, so that the model reads longer sequences.

    **Arguments**

    - `how`: `"continue"` draws new rows by `init` behind the old ones; `"tile"` repeats the old rows
      (Longformer). Both keep the function of every sequence that fitted before. `"interpolate"` stretches
      the table, its ends to its new ends: old positions move too, and a jump is expected.
    - `init`: by default `"matched"`, with the mean and deviation of the old rows.
    - `axis`: the name of the axis of positions.
    - `first`: the row of the first position, for `"tile"` and `"interpolate"`. Rows before it stay. 2 in
      RoBERTa (`BERTConfig(padding=1)`), whose tokens are counted from there.

    New rows start their optimizer state anew. Rotary positions have no table: see `gj.growth.context`.

    **Example**

        gj.positions(2048, how="tile")         # from 1024
    """
    return Positions(size, how, init, axis, first)
