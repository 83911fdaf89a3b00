"""Warm starts: old weights, made smaller, in the corner of a new model (shrink, pad and perturb).

Ash & Adams, "On Warm-Starting Neural Network Training", NeurIPS 2020; Mallik et al., "Warmstarting for
Scaling Language Models", 2024, and "When is Warmstarting Effective for Scaling Language Models?", 2026.
"""

from typing import Annotated, ClassVar

import equinox as eqx
import numpy as np

from growjax import values
from growjax.algebra import NONE, AxisMap
from growjax.axes import Axes
from growjax.cards import Card, Paper
from growjax.growth.finishes import Blend
from growjax.growth.operator import AnySizes, Exactness, Operator, frozen_sizes, resolve


_PERTURBED = Paper(
    "On Warm-Starting Neural Network Training",
    "Ash, Jordan T. and Adams, Ryan P.",
    2020,
    "Advances in Neural Information Processing Systems",
    "1910.08475",
)
_WARMSTARTED = Paper(
    "Warmstarting for Scaling Language Models",
    "Mallik, Neeratyoy and Janowski, Maciej and Hog, Johannes and Rakotoarison, Herilalaina and Klein, "
    "Aaron and Grabocka, Josif and Hutter, Frank",
    2024,
    arxiv="2411.07340",
)
_EFFECTIVE = Paper(
    "When is Warmstarting Effective for Scaling Language Models?",
    "Mallik, Neeratyoy and Janowski, Maciej and Hog, Johannes and Rakotoarison, Herilalaina and Klein, "
    "Aaron and Grabocka, Josif and Hutter, Frank",
    2026,
    arxiv="2605.13405",
)


@values.register
class Warm(Operator):
    """Shrunk old weights in a new model; see `warm`."""

    sizes: AnySizes = eqx.field(static=True)
    shrink: Annotated[float, values.ranged(0, 1)] = eqx.field(static=True, default=0.4)
    perturb: Annotated[float, values.at_least(0)] = eqx.field(static=True, default=1.0)
    exactness: ClassVar[Exactness] = "approximate"
    card: ClassVar[Card] = Card(
        use="A new run of a model about twice the size, when a small one is there already and its "
        "optimizer state is not.",
        traps=(
            "The loss starts near that of a new model: compare at equal cost, the small model's training "
            "included if it was made for this.",
            "Beyond a few times the size, starting from scratch is as good (the paper finds twice most "
            "reliable, under 20 tokens a parameter).",
        ),
        example="warm(mlp=12)",
        papers=(_PERTURBED, _WARMSTARTED, _EFFECTIVE),
    )

    def maps(self, axes: Axes) -> list[AxisMap]:
        """One map for every axis that grows, and one for some axis of every leaf that does not."""
        wanted = resolve(axes, dict(self.sizes))
        order = list(wanted)
        for slot in axes.of_kind("param"):
            named = [dim.axis for part in slot.parts for dim in part.dims if not dim.literal]
            if slot.arrays() and slot.init == "normal" and not set(named) & set(order):
                order.append(named[0])
        moves = []
        for axis in order:
            old, index = axes.size(axis), np.arange(wanted.get(axis, axes.size(axis)))
            source = np.where(index < old, index, NONE)
            finish = Blend(self.shrink, self.perturb, tuple(order))
            moves.append(AxisMap(axis, source, init="born", finish=finish))
        return moves


def warm(*, shrink: float = 0.4, perturb: float = 1.0, **sizes: int) -> Warm:
    """Start a larger model from a smaller one: `shrink * old + perturb * new`, entry by entry.

    Old matrices and tables stand in the corner of the new ones, multiplied by `shrink`, and a draw of a
    new model (variance 1 / fan-in) is added to all entries. Gains and biases stay, and new ones are
    those of a new model. The function is not kept; the warm start is meant for a new run (`gj.Plan` with
    `start`, optimizer state anew), and helps most for a model twice the size. Without sizes the model
    stays as large as it is: shrink and perturb.

    **Example**

        gj.warm(shrink=0.4, embed=512, heads=8, mlp=2048)     # from embed=256, heads=4, mlp=1024
    """
    return Warm(frozen_sizes(sizes), shrink, perturb)
