"""Masked structural growth: every dimension, at any size, behind gates. Exact whatever is inside.

Yao, Zhang, Li, Wang, "Masked Structural Growth for 2x Faster Language Model Pre-training", ICLR 2024.
"""

import dataclasses
from typing import ClassVar, Literal

import equinox as eqx
import numpy as np

from growjax import values
from growjax.algebra import NONE, AxisMap, Init
from growjax.axes import Axes
from growjax.cards import Card, Paper
from growjax.errors import GrowthError, raise_all
from growjax.growth.depth import MASKED, Order, sources
from growjax.growth.operator import Exactness, Operator, Sizes, frozen_sizes, resolve


_PRORES = Paper(
    "Progressive Residual Warmup for Language Model Pretraining",
    "Chen, Tianhao and Xu, Xin and Yin, Lu and Chen, Hao and Wang, Yang and Diao, Shizhe and Yang, Can",
    2026,
    arxiv="2603.05369",
)


@values.register
class MSG(Operator):
    """Grow axes behind gates at level 0; see `msg`."""

    sizes: Sizes = eqx.field(static=True)
    init: Init | Literal["copy"] = eqx.field(static=True, default="normal")
    order: Order = eqx.field(static=True, default="repeat")
    opens: Literal["together", "in turn"] = eqx.field(static=True, default="together")
    exactness: ClassVar[Exactness] = "exact"
    card: ClassVar[Card] = Card(
        use="Any axis to any size in the middle of training, with a loss that does not jump whatever the "
        "new weights hold; the ramp of the gates sets how fast they count.",
        traps=(
            "While gates are between 0 and 1 the model computes something that neither size does: keep "
            "the ramp short, and evaluate at its end.",
            'With `init="zeros"` both sides of new units are zero and never learn, at any level.',
            "A gated model costs as much as the large one from its first step.",
        ),
        example="msg(mlp=10)",
        papers=(MASKED,),
        by={"opens": {"in turn": (_PRORES,)}},
    )

    def maps(self, axes: Axes) -> list[AxisMap]:
        """Identity on the old coordinates; new ones are fresh or copied, and gated."""
        wanted = resolve(axes, dict(self.sizes))
        raise_all(
            GrowthError,
            "rows of a table that is indexed, and experts, have no gate for msg; gj.vocabulary, "
            "gj.positions and gj.experts grow these axes:",
            [axis for axis in wanted if "lookup" in axes.roles(axis)],
        )
        moves = []
        for axis, size in wanted.items():
            old = axes.size(axis)
            copied = "stack" in axes.roles(axis) and self.init in ("normal", "copy")
            if copied:
                source = sources(self.order, old, size)
            elif self.init == "copy":
                source = np.arange(size) % old
            else:
                source = np.where(np.arange(size) < old, np.arange(size), NONE)
            init = "normal" if self.init == "copy" else self.init
            move = AxisMap(axis, source, gated=True, init=init)
            if self.opens == "in turn" and "stack" in axes.roles(axis):
                new = move.is_new()
                # The first of n new layers is open after an n-th of the ramp, the last at its end
                pace = np.where(new, new.sum() / np.maximum(np.cumsum(new), 1), 1.0)
                move = dataclasses.replace(move, pace=pace)
            moves.append(move)
        return moves


def msg(
    *,
    init: Init | Literal["copy"] = "normal",
    order: Order = "repeat",
    opens: Literal["together", "in turn"] = "together",
    **sizes: int,
) -> MSG:
    """Grow any axes (`embed`, `mlp`, `heads`, `layers`, ...) to new sizes behind gates at 0.

    The grown model computes the same function for any content of the new weights (`"exact"`);
    `gj.ramp` then opens the gates over some steps and `gj.settle` drops them.

    **Arguments**

    - `init`: the values of new weights: `"normal"` (deviation 0.02, biases 0, gains 1), `"zeros"`,
      `"matched"` (mean and deviation of the old tensor), `"copy"` (old coordinates in turn) or a
      callable `(key, shape, dtype) -> array`. With `"zeros"` both sides of new hidden units, heads
      and their coordinates are zero, so that they never get a gradient, at any level.
    - `order`: which layer each new layer copies (see `gj.stack`); as in the paper, layers are copied
      unless `init` asks for something else.
    - `opens`: new layers open together, or in turn from the first one up: of n new layers, number l is at
      `min(level * n / l, 1)`. From a model without layers these are the levels of ProRes (Chen et al.
      2026), whose layers all exist from the start: `gj.msg(layers=12, init="born", opens="in turn")`. It
      multiplies both branches of a layer by them, where the gate here mixes the layer's output with its
      input; at 0 and at 1 they are the same.

    **Example**

        big = gj.grow(gj.msg(mlp=2048, heads=8), small, key=key)
        big = gj.settle(gj.ramp(big, 1.0))
    """
    return MSG(frozen_sizes(sizes), init, order, opens)
