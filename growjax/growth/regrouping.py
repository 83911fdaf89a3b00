"""Regrouping: more keys and values for the same queries, from grouped queries towards multi-head.

Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
EMNLP 2023, the other way round.
"""

from typing import ClassVar

import equinox as eqx
import numpy as np

from growjax import values
from growjax.algebra import AxisMap
from growjax.axes import Axes
from growjax.cards import Card, Paper
from growjax.errors import GrowthError, raise_all
from growjax.growth.operator import Exactness, Operator, Sizes, frozen_sizes, resolve


_GROUPED = Paper(
    "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
    "Ainslie, Joshua and Lee-Thorp, James and de Jong, Michiel and Zemlyanskiy, Yury and Lebrón, "
    "Federico and Sanghai, Sumit",
    2023,
    "Conference on Empirical Methods in Natural Language Processing",
    "2305.13245",
)


@values.register
class Regroup(Operator):
    """Repeat coordinates of one axis, and divide another among them; see `regroup`."""

    sizes: Sizes = eqx.field(static=True)
    over: str = eqx.field(static=True, default="group")
    exactness: ClassVar[Exactness] = "exact-given-init"
    card: ClassVar[Card] = Card(
        use="More keys and values for the queries there are: from multi-query or grouped queries towards "
        "multi-head attention, with the function kept.",
        traps=(
            "Keys and values must be repeated in place and queries dealt out to them: tiling gives "
            "queries another one's keys.",
            "The cache of keys and values grows with them.",
        ),
        example="regroup(kv_heads=2)",
        papers=(_GROUPED,),
    )

    def maps(self, axes: Axes) -> list[AxisMap]:
        """Every coordinate repeated in place, on the product of the two axes."""
        axes.size(self.over)
        if len(self.sizes) > 1:
            raise GrowthError(
                f"{self.over} can be divided among the copies of one axis at a time, got "
                f"{', '.join(axis for axis, _ in self.sizes)}"
            )
        wanted = resolve(axes, dict(self.sizes))
        _check_shared(axes, list(wanted), self.over)
        return [
            AxisMap(axis, np.arange(size) * axes.size(axis) // size, over=self.over)
            for axis, size in wanted.items()
        ]


def _check_shared(axes: Axes, names: list[str], over: str) -> None:
    """Raise `GrowthError` unless coordinates of an axis are shared by another's, as keys by queries.

    Leaves without the other axis write what is shared, and whatever reads it has the other axis too.
    """
    for axis in names:
        faults, shared, read = [], False, False
        for part in (part for slot in axes.having(axis, "param") for part in slot.parts):
            roles = {dim.axis: dim.role for dim in part.dims}
            role, other = roles.get(axis), roles.get(over)
            shared |= role == "produced" and other is None
            read |= role == "consumed"
            if role in ("stack", "lookup"):
                faults.append(f"{part.path}: {axis} are run or chosen one by one")
            elif role == "consumed" and other is None:
                faults.append(f"{part.path} has no {over}, and would read every copy")
            elif role == "produced" and other == "consumed":
                faults.append(f"{part.path} is summed over {over}, for each of {axis} by itself")
        if read and not (shared or faults):
            faults.append(f"no array has {axis} without {over}")
        raise_all(GrowthError, f"{axis} are not shared by {over}, as keys are by queries:", faults)


def regroup(*, over: str = "group", **sizes: int) -> Regroup:
    """Grow the number of key and value heads at a fixed number of queries.

    Keys and values are repeated in place; queries and output weights are dealt out to the copies, so
    the function is kept without any share. The copies see different queries and do not stay equal. How
    the gradient of one divides into theirs is not known, so optimizer state of keys and values is
    refused (`StateError`): start it again.

    Raises `GrowthError` unless `over` can be divided by the number of copies, and for axes that are not
    shared as keys and values are.

    **Example**

        gj.regroup(kv_heads=8)         # from 2 keys of 16 queries each to 8 of 4
    """
    return Regroup(frozen_sizes(sizes), over)


@values.register
class Pool(Operator):
    """Means of neighbouring keys and values; see `pool`."""

    sizes: Sizes = eqx.field(static=True)
    over: str = eqx.field(static=True, default="group")
    exactness: ClassVar[Exactness] = "approximate"
    card: ClassVar[Card] = Card(
        use="A smaller cache of keys and values for inference, before some more training.",
        traps=("The loss jumps; the paper trains on for 5% of the steps.",),
        example="pool(kv_heads=1)",
        papers=(_GROUPED,),
    )

    def maps(self, axes: Axes) -> list[AxisMap]:
        """A mean over each run of neighbours, whose queries become one group."""
        axes.size(self.over)
        if len(self.sizes) > 1:
            raise GrowthError(
                f"{self.over} takes the queries of one axis at a time, got "
                f"{', '.join(axis for axis, _ in self.sizes)}"
            )
        moves, wanted = [], resolve(axes, dict(self.sizes), shrink=True)
        _check_shared(axes, list(wanted), self.over)
        for axis, size in wanted.items():
            old = axes.size(axis)
            if size > old or old % size:
                raise GrowthError(
                    f"{axis}: {old} of them do not fall into {size} equal runs of neighbours; give a "
                    f"divisor of {old}"
                )
            run = np.arange(old) // (old // size)
            mean = (run == np.arange(size)[:, None]) * (size / old)
            moves.append(
                AxisMap(axis, np.arange(size) * (old // size), produced=mean, over=self.over)
            )
        return moves


def pool(*, over: str = "group", **sizes: int) -> Pool:
    """Fewer keys and values for the same queries: from multi-head attention to grouped queries.

    Each run of neighbouring keys, and of values, becomes its mean, and their queries share it. The
    function is not kept; the paper trains on for 5% of the steps. A smaller cache, and no smaller model
    otherwise: it is the only operator that shrinks an axis. Optimizer state of keys and values is refused
    (`StateError`), as means have no gradient of their own: start it again.

    **Example**

        gj.growth.pool(kv_heads=2)         # from 8 keys and 8 queries to 2 groups of 4
    """
    return Pool(frozen_sizes(sizes), over)
