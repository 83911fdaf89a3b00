"""Copying coordinates with shares that sum to one: exact with no gate at all.

Net2Net (Chen et al. 2016), bert2BERT's FPI (Chen et al. 2022), HyperCloning (Samragh et al. 2024).
"""

from typing import Annotated, ClassVar, Literal

import equinox as eqx
import numpy as np

from growjax import values
from growjax.algebra import AxisMap
from growjax.axes import Axes
from growjax.errors import GrowthError, raise_all
from growjax.growth.operator import (
    Exactness,
    Operator,
    SizesOrLists,
    frozen_sizes,
    split_lists,
)


@values.register
class Copy(Operator):
    """Duplicate coordinates and divide the weights that consume them; see `copy`."""

    sizes: SizesOrLists = eqx.field(static=True)
    order: Literal["cycle", "random"] = eqx.field(static=True, default="cycle")
    shares: Literal["equal", "random"] = eqx.field(static=True, default="equal")
    seed: Annotated[int, values.at_least(0)] = eqx.field(static=True, default=0)
    exactness: ClassVar[Exactness] = "exact-given-init"

    def maps(self, axes: Axes) -> list[AxisMap]:
        """Copies whose shares sum to one for every source."""
        lists, wanted = split_lists(axes, self.sizes)
        rng = np.random.default_rng(self.seed)
        moves = []
        for axis, size in {**wanted, **{axis: len(s) for axis, s in lists.items()}}.items():
            old = axes.size(axis)
            if axis in lists:
                source = np.asarray(lists[axis])
            elif self.order == "cycle":
                source = np.arange(size) % old
            else:
                source = np.concatenate([np.arange(old), rng.integers(0, old, size - old)])
            moves.append(AxisMap(axis, source, share=self._share(rng, source, old)))
        torn = {*lists, *(wanted if self.order == "random" else ())}
        faults = _refusals(axes, moves, torn)
        raise_all(GrowthError, "these copies would change the function:", faults)
        return moves

    def _share(self, rng: np.random.Generator, source: np.ndarray, old: int) -> np.ndarray:
        weight = (
            np.ones(len(source)) if self.shares == "equal" else rng.uniform(0.5, 1.5, len(source))
        )
        return weight / np.bincount(source, weight, minlength=old)[source]


def _refusals(axes: Axes, moves: list[AxisMap], torn: set[str]) -> list[str]:
    complaints = []
    for move in moves:
        axis, old = move.axis, axes.size(move.axis)
        counts = np.bincount(move.source, minlength=old)
        norms = [slot.path for slot in axes.normalised(axis) if slot.kind == "param"]
        if axes.roles(axis) & {"stack", "lookup"}:
            complaints.append(
                f"{axis}: nothing sums over it, so copies cannot share (see gj.stack)"
            )
        elif (counts == 0).any():
            lost = np.flatnonzero(counts == 0).tolist()
            complaints.append(f"{axis}: old coordinates {lost} have no copy and would be lost")
        elif norms and len(set(counts)) > 1:
            complaints.append(
                f"{axis}: copies are uneven ({counts.min()} to {counts.max()} of each), so the mean and "
                f"variance taken by {', '.join(norms)} would change; use a multiple of {old}, or gj.msg"
            )
        elif axis in torn and axes.having(axis, "buffer"):
            complaints.append(
                f"{axis}: {axes.having(axis, 'buffer')[0].path} ties its coordinates together (rotary "
                "pairs); give a size instead of a list, and copy in turn"
            )
    return complaints


def copy(
    *,
    order: Literal["cycle", "random"] = "cycle",
    shares: Literal["equal", "random"] = "equal",
    seed: int = 0,
    **sizes: int | tuple[int, ...],
) -> Copy:
    """Grow width by copies: to a size, or by an explicit tuple of source coordinates.

    Producers are copied as they are, consumers are divided so that the copies of one coordinate add up
    to it (`"exact-given-init"`). Any multiplicities on `mlp`, `heads` and `head_dim`; even ones on
    an axis that a norm averages over (`embed`), or `GrowthError` says why not.

    **Arguments**

    - `order`: new coordinates copy the old ones in turn, or at random (Net2Net).
    - `shares`: equal, or random ones that still sum to one: equal copies receive equal gradients for
      ever, unequal ones do not.
    - `seed`: for the two random choices.

    **Example**

        gj.copy(mlp=1536, shares="random")       # Net2Net wider
        gj.copy(embed=512, heads=8, mlp=2048)    # HyperCloning, from embed=256, heads=4, mlp=1024
    """
    return Copy(frozen_sizes(sizes), order, shares, seed)
