"""Longer contexts for rotary positions: their frequencies are a buffer, and an operator lowers them.

Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation", 2023; Peng,
Quesnelle, Fan, Shippole, "YaRN: Efficient Context Window Extension of Large Language Models", ICLR 2024.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from growjax import values
from growjax.algebra import AxisMap
from growjax.axes import Axes, axes_of, get, put
from growjax.cards import Card, Paper
from growjax.errors import GrowthError
from growjax.growth.finishes import Finish, across, scaled
from growjax.growth.operator import Exactness, Operator
from growjax.values import Size


How = Literal["interpolate", "ntk", "yarn"]


_INTERPOLATED = Paper(
    "Extending Context Window of Large Language Models via Positional Interpolation",
    "Chen, Shouyuan and Wong, Sherman and Chen, Liangjian and Tian, Yuandong",
    2023,
    arxiv="2306.15595",
)
_YARN = Paper(
    "YaRN: Efficient Context Window Extension of Large Language Models",
    "Peng, Bowen and Quesnelle, Jeffrey and Fan, Honglu and Shippole, Enrico",
    2024,
    "International Conference on Learning Representations",
    "2309.00071",
)


@runtime_checkable
class Stretchable(Protocol):
    """A module that keeps a record of how its frequencies came about (for a file, say)."""

    def stretched(self, by: "Context") -> Any:
        """The module, whose frequencies are stretched already, with the record to match."""
        ...


@dataclasses.dataclass(frozen=True)
class Lowered(Finish):
    """Lower frequencies, and for YaRN larger keys, which are the same as a colder softmax."""

    factor: float
    how: str
    length: int
    low: float
    high: float
    stream: str
    # Which coordinates of a head are turned, once the rule has seen the model
    turned: Any = None

    def prepared(self, move, table):
        """The rule with the coordinates that have a frequency."""
        buffers = [slot.value for slot in table.having(move.axis, "buffer") if slot.arrays()]
        return dataclasses.replace(self, turned=buffers[0] != 0)

    def applied(self, move, slot, old, new, *, key):
        """Buffers along the axis are frequencies; what consumes it without adding to the stream, keys."""
        del old, key
        if slot.kind == "buffer":
            return self.lowered(new)
        roles = {dim.axis: dim.role for dim in slot.dims}
        key_like = roles[move.axis] == "consumed" and roles.get(self.stream) != "produced"
        if slot.kind != "param" or not key_like or self.how != "yarn":
            return new
        larger = jnp.where(self.turned, (0.1 * math.log(self.factor) + 1) ** 2, 1)
        (dim,) = slot.positions(move.axis)
        return scaled(slot, new, across(larger.astype(new.dtype), new.ndim, dim))

    def lowered(self, frequencies: Any) -> Any:
        """The frequencies of the longer context."""
        if self.how == "interpolate":
            return frequencies / self.factor
        if self.how == "ntk":
            # A larger theta: the fastest pair stays as it is, the slowest is divided by the factor
            turned = frequencies > 0  # some coordinates of a head may not turn at all
            logs = jnp.log(jnp.where(turned, frequencies, 1))
            return frequencies * self.factor ** -(logs / jnp.minimum(jnp.min(logs), -1e-12))
        turns = self.length * frequencies / (2 * math.pi)
        weight = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return frequencies * (weight + (1 - weight) / self.factor)


@values.register
class Context(Operator):
    """A longer context by lower rotary frequencies; see `context`."""

    factor: Annotated[float, values.at_least(1)] = eqx.field(static=True)
    how: How = eqx.field(static=True, default="yarn")
    length: Size | None = eqx.field(static=True, default=None)
    low: Annotated[float, values.positive()] = eqx.field(static=True, default=1.0)
    high: Annotated[float, values.positive()] = eqx.field(static=True, default=32.0)
    axis: str = eqx.field(static=True, default="head_dim")
    stream: str = eqx.field(static=True, default="embed")
    exactness: ClassVar[Exactness] = "approximate"
    card: ClassVar[Card] = Card(
        use="Longer sequences than a model with rotary positions was trained with, followed by some "
        "training at the new length.",
        traps=(
            "Short sequences change as well: evaluate at the old length too.",
            "Frequencies that are scaled already must not be scaled again, and are refused.",
        ),
        example="context(2, how='interpolate')",
        by={"how": {"interpolate": (_INTERPOLATED,), "ntk": (_YARN,), "yarn": (_YARN,)}},
    )

    def __check_init__(self):
        values.check(self, GrowthError, "this context cannot be reached:", self._faults)

    def _faults(self) -> Iterator[str]:
        if self.how == "yarn" and self.length is None:
            yield "length: YaRN needs the context that the model was trained with"
        if not self.low < self.high:
            yield f"low, high: expected a low below the high, got {self.low}, {self.high}"

    def maps(self, axes: Axes) -> list[AxisMap]:
        """The same coordinates with other frequencies."""
        if not [slot for slot in axes.having(self.axis, "buffer") if slot.arrays()]:
            raise GrowthError(
                f"axis: no rotary frequencies along {self.axis!r}; gj.positions grows a learned table"
            )
        if self.how == "yarn":
            axes.size(self.stream)  # raises for a name that the model does not have
        rule = Lowered(self.factor, self.how, self.length or 0, self.low, self.high, self.stream)
        return [AxisMap(self.axis, np.arange(axes.size(self.axis)), finish=rule)]

    def completed(self, model: Any) -> Any:
        """The model with a record of its new frequencies, where it keeps one."""
        slots = [slot for slot in axes_of(model).having(self.axis, "buffer") if slot.arrays()]
        holders = {slot.steps[:-1]: get(model, slot.steps[:-1]) for slot in slots}
        return put(
            model,
            {p: h.stretched(self) for p, h in holders.items() if isinstance(h, Stretchable)},
        )


def context(
    factor: float,
    *,
    how: How = "yarn",
    length: int | None = None,
    low: float = 1.0,
    high: float = 32.0,
    axis: str = "head_dim",
    stream: str = "embed",
) -> Context:
    """Stretch rotary positions to `factor` times the context. Approximate: short texts change too.

    **Arguments**

    - `how`: `"interpolate"` divides all frequencies by the factor (position interpolation). `"ntk"`
      raises theta, so that the fastest pair stays and the slowest is divided. `"yarn"` divides those that
      turn less than `low` times in the trained context, keeps those that turn more than `high` times, and
      multiplies what is turned of queries and keys by `0.1 ln(factor) + 1` each (here: the keys by its
      square).
    - `length`: the trained context, in tokens, for `"yarn"`.
    - `low`, `high`: between them the divisor follows a line in the number of turns, as in the paper (in
      the published code it is a line in the index of the pair).
    - `axis`, `stream`: the axes of coordinates in a head and of the residual stream.

    Every rotation of the model is stretched, that of layers with a window (Gemma 3) too. The model needs
    some training at the new length. `growjax.hf.save` writes the new theta or scaling
    (YaRN's frequencies as Llama 3's rule, which they obey). Frequencies that are scaled already are
    refused.

    **Example**

        gj.growth.context(4, length=2048)              # YaRN, to 8192
        gj.growth.context(2, how="interpolate")
    """
    return Context(factor, how, length, low, high, axis, stream)
