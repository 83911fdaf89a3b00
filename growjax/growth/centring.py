"""From LayerNorm to RMSNorm: a stream whose mean is zero has the one as the other.

Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", ICLR 2024.
"""

from typing import Any, ClassVar, Protocol, runtime_checkable

import equinox as eqx
import numpy as np

from growjax import values
from growjax.algebra import AxisMap
from growjax.axes import Axes, axes_of, get, put
from growjax.cards import Card, Paper
from growjax.errors import GrowthError, raise_all
from growjax.growth.operator import Exactness, Operator


_SLICED = Paper(
    "SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
    "Ashkboos, Saleh and Croci, Maximilian L. and Gennari do Nascimento, Marcelo and Hoefler, "
    "Torsten and Hensman, James",
    2024,
    "International Conference on Learning Representations",
    "2401.15024",
)


@runtime_checkable
class Centring(Protocol):
    """A norm that subtracts the mean, and can be told that there is none."""

    def uncentred(self) -> Any:
        """The norm that divides by the root of the mean square alone, with the same gain and bias."""
        ...


@values.register
class Centred(Operator):
    """A stream of mean zero under RMS norms; see `centred`."""

    axis: str = eqx.field(static=True, default="embed")
    exactness: ClassVar[Exactness] = "exact-given-init"
    card: ClassVar[Card] = Card(
        use="Before an operator that fits RMSNorm alone, such as `gj.zeros(embed=...)`, on a model with "
        "LayerNorm and a head of its own.",
        traps=(
            "The head must not be tied to the table: it would lose its mean too.",
            "Later updates do not keep the stream centred, and need not: the norms no longer subtract.",
        ),
        example="centred()",
        papers=(_SLICED,),
    )

    def maps(self, axes: Axes) -> list[AxisMap]:
        """What produces the stream loses its mean, and nothing else changes."""
        size, norms = axes.size(self.axis), axes.normalised(self.axis)
        roles = {
            slot.path: dim.role
            for slot in norms
            for dim in slot.dims
            if dim.axis == self.axis and dim.normalised
        }
        raise_all(
            GrowthError,
            f"the mean of {self.axis} cannot be taken out of this model:",
            [
                *(
                    f"{path}: its output is the stream (post-LN)"
                    for path in roles
                    if roles[path] == "produced"
                ),
                *(
                    f"{path}: the head that reads it is tied to the table, which would lose its mean"
                    for path in roles
                    if roles[path] == "consumed"
                ),
                *(
                    f"{slot.path}: this norm does not subtract the mean, which is part of its input"
                    for slot in axes.of_kind("buffer")
                    if self.axis in slot.spec.means
                ),
            ],
        )
        centre = np.eye(size) - 1 / size
        return [AxisMap(self.axis, np.arange(size), produced=centre, elementwise=np.ones(size))]

    def completed(self, model: Any) -> Any:
        """The model with norms that no longer subtract the mean."""
        places = {slot.steps[:-1] for slot in axes_of(model).normalised(self.axis)}
        norms = {place: get(model, place) for place in sorted(places, key=str)}
        raise_all(
            GrowthError,
            "these norms do not say how they are without their mean (`uncentred`):",
            [".".join(map(str, p)) for p, norm in norms.items() if not isinstance(norm, Centring)],
        )
        return put(model, {place: norm.uncentred() for place, norm in norms.items()})


def centred(axis: str = "embed") -> Centred:
    """Turn LayerNorm into RMSNorm with the function kept, so that more operators fit.

    The mean is taken out of all that adds to the residual stream (tables, and the last arrays of
    branches), and norms then have nothing to subtract. Norms keep gain and bias. Afterwards
    `gj.zeros(embed=...)` fits, for one, if they have no bias.

    Raises `GrowthError` for post-LN models, whose stream is a norm's output, for heads tied to the table,
    and where some norm is an RMSNorm already. Optimizer state of what lost its mean is refused
    (`StateError`): start it again.

    **Example**

        gj.chain(gj.growth.centred(), gj.zeros(embed=768))         # an untied GPT
    """
    return Centred(axis)
