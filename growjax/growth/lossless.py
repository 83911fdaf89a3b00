"""LEMON: width of any size, exact, with copies that nothing keeps equal.

Wang et al., "LEMON: Lossless Model Expansion", ICLR 2024.
"""

from typing import Annotated, ClassVar, Literal

import equinox as eqx
import numpy as np

from growjax import values
from growjax.algebra import MEAN, NONE, AxisMap
from growjax.axes import Axes
from growjax.cards import Card, Paper
from growjax.errors import GrowthError, raise_all
from growjax.growth.finishes import Noise
from growjax.growth.operator import Exactness, Operator, Sizes, frozen_sizes, resolve


_LEMON = Paper(
    "LEMON: Lossless Model Expansion",
    "Wang, Yite and Su, Jiahao and Lu, Hanlin and Xie, Cong and Liu, Tianyi and Yuan, Jianbo and Lin, "
    "Haibin and Sun, Ruoyu and Yang, Hongxia",
    2024,
    "International Conference on Learning Representations",
    "2310.07999",
)


@values.register
class Lemon(Operator):
    """Copies with random weights that sum to the old ones; see `lemon`."""

    sizes: Sizes = eqx.field(static=True)
    noise: Annotated[float, values.at_least(0)] = eqx.field(static=True, default=1.0)
    init: Literal["born", "normal"] = eqx.field(static=True, default="born")
    exactness: ClassVar[Exactness] = "exact-given-init"
    card: ClassVar[Card] = Card(
        use="Width to a size that is no multiple of the old one, exact also under LayerNorm, for a run "
        "whose optimizer starts anew.",
        traps=(
            "Optimizer state cannot be carried: the random parts have no gradient in the old model.",
            "The paper keeps the peak of the learning rate and decays it faster; the schedule of a "
            "run from scratch loses most of the gain.",
        ),
        example="lemon(embed=12, mlp=10)",
        papers=(_LEMON,),
    )

    def maps(self, axes: Axes) -> list[AxisMap]:
        """Copies in turn; under norms whole turns alone, and a rest that the norms do not see."""
        wanted = resolve(axes, dict(self.sizes))
        raise_all(
            GrowthError,
            "nothing sums over these axes, so copies cannot share (see gj.stack):",
            [axis for axis in wanted if axes.roles(axis) & {"stack", "lookup"}],
        )
        finish = Noise(self.noise, "projected") if self.noise else None
        moves = []
        # Norms' axes last: noise is measured by weights, which have no free rows before
        for axis in sorted(wanted, key=lambda axis: bool(axes.normalised(axis))):
            old, size = axes.size(axis), wanted[axis]
            whole = size // old * old if axes.normalised(axis) else size
            copies = np.arange(size) < whole
            centred = any(axis in slot.spec.variances for slot in axes.of_kind("buffer"))
            source = np.where(copies, np.arange(size) % old, MEAN if centred else NONE)
            counts = np.bincount(source[copies], minlength=old)
            share = np.where(copies, 1 / counts[np.maximum(source, 0)], 1.0)
            # A rest of zeros is a multiplier of producers; a mean is a row of its own
            closed = np.where(copies, 1.0, 0.0) if not (copies.all() or centred) else None
            moves.append(
                AxisMap(
                    axis, source, produced=closed, consumed=share, init=self.init, finish=finish
                )
            )
        return moves


def lemon(*, noise: float = 1.0, init: Literal["born", "normal"] = "born", **sizes: int) -> Lemon:
    """Grow width to any size with the function kept and no two copies alike, also where norms average.

    Coordinates are copied in turn, and what consumes the copies of one is random with a fixed sum. On
    the residual stream only whole turns are copied: the rest is the mean of the stream under LayerNorm,
    and 0 under RMSNorm, so that statistics follow by a known factor, which gain and epsilon take out.
    Weights that read the rest are free.

    **Arguments**

    - `noise`: the deviation of the random parts, as a multiple of the root mean square of the weights.
    - `init`: how weights that read the rest are drawn.

    The paper keeps the peak learning rate and decays it faster. It grows depth by layers with closed
    branches: chain `gj.stack(layers=..., branch="zero")`. Optimizer state cannot be carried through
    random parts. Raises `GrowthError` for norms that cannot be corrected, and `AxisError` for an odd size
    of rotary heads.

    **Example**

        gj.lemon(embed=640, heads=10, mlp=2560)        # from embed=384, heads=6, mlp=1536
    """
    return Lemon(frozen_sizes(sizes), noise, init)
