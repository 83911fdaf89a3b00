"""New coordinates closed by zeros on one side: exact, and alive from the first step.

Gesmundo & Maile, "Composable Function-preserving Expansions for Transformer Architectures", 2023.
"""

from typing import ClassVar

import equinox as eqx
import numpy as np

from growjax import values
from growjax.algebra import NONE, AxisMap, Init
from growjax.axes import Axes
from growjax.cards import Card, Paper
from growjax.errors import GrowthError, raise_all
from growjax.growth.operator import Exactness, Operator, Sizes, adds, frozen_sizes, resolve


_COMPOSABLE = Paper(
    "Composable Function-preserving Expansions for Transformer Architectures",
    "Gesmundo, Andrea and Maile, Kaitlin",
    2023,
    arxiv="2308.06103",
)


@values.register
class Zeros(Operator):
    """Fresh coordinates with zeros on one side; see `zeros`."""

    sizes: Sizes = eqx.field(static=True)
    init: Init = eqx.field(static=True, default="normal")
    exactness: ClassVar[Exactness] = "exact-given-init"
    card: ClassVar[Card] = Card(
        use="Width with fresh units that learn from the first step, without a ramp: hidden units and "
        "heads of any model, the residual stream under RMSNorm.",
        traps=(
            "Under LayerNorm the residual stream is refused; `gj.growth.centred` turns it into RMSNorm "
            "where the head is not tied.",
            "The epsilon of a norm has to change with its size; with the old one outputs move by "
            "more than rounding wherever activations are small.",
            'With `init="zeros"` nothing ever gets a gradient.',
        ),
        example="zeros(mlp=10)",
        papers=(_COMPOSABLE,),
    )

    def maps(self, axes: Axes) -> list[AxisMap]:
        """Fresh coordinates whose share is zero: in consumers, or in the stream's producers."""
        wanted = resolve(axes, dict(self.sizes))
        moves, complaints = [], []
        for axis, size in wanted.items():
            new = np.arange(size) >= axes.size(axis)
            normalised = bool(axes.normalised(axis))
            if axes.roles(axis) & {"stack", "lookup"}:
                complaints.append(f"{axis}: nothing consumes it; {adds(axes, axis)}")
            elif normalised and not axes.is_stream(axis):
                complaints.append(
                    f"{axis}: a norm averages over it, so both sides would have to be zero and could "
                    "never learn; use gj.msg"
                )
            complaints += [
                f"{axis}: {path} would let new coordinates through a norm that they pass as zeros"
                for path in _biases(axes, axis)
            ]
            moves.append(
                AxisMap(
                    axis,
                    np.where(new, NONE, np.arange(size)),
                    share=np.where(new, 0.0, 1.0),
                    side="produced" if normalised else "consumed",
                    init=self.init,
                )
            )
        raise_all(GrowthError, "these axes do not grow by zeros:", complaints)
        return moves


def _biases(axes: Axes, axis: str) -> list[str]:
    """Biases of RMS norms over an axis."""
    rms = {slot.steps[:-1] for slot in axes.of_kind("buffer") if axis in slot.spec.means}
    vectors = [
        slot
        for slot in axes.having(axis, "param")
        if slot.arrays() and [d.axis for d in slot.dims if d.role != "stack"] == [axis]
    ]
    return [
        slot.path
        for slot in vectors
        if slot.steps[:-1] in rms and not any(d.normalised for d in slot.dims)
    ]


def zeros(*, init: Init = "normal", **sizes: int) -> Zeros:
    """Grow width with fresh coordinates that nothing reads yet.

    For `mlp`, `heads` and `head_dim` the weights that consume new coordinates are zero; those that
    produce them are drawn by `init`. For `embed` the producers are zero, and RMS norms have their gain
    multiplied by sqrt(old/new) and their epsilon by old/new. LayerNorm, and a norm with a bias, cannot be
    corrected and raise `GrowthError`.

    With `init="zeros"` both sides are zero and nothing ever gets a gradient; `gj.certify` shows it.

    **Example**

        gj.zeros(mlp=2048, heads=8)
    """
    return Zeros(frozen_sizes(sizes), init)
