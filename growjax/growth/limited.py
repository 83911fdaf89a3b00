"""Width in some layers only.

Adila et al., "Grow, Don't Overwrite: Fine-tuning Without Forgetting", 2026, which grows the feed-forwards
of some layers.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from growjax import values
from growjax.algebra import AxisMap
from growjax.axes import Axes, Slot
from growjax.cards import Card, Paper
from growjax.errors import GrowthError, raise_all
from growjax.growth.finishes import Finish, across
from growjax.growth.operator import Chain, Exactness, Operator, check_fitted


_GROW = Paper(
    "Grow, Don't Overwrite: Fine-tuning Without Forgetting",
    "Adila, Dyah and Mazzawi, Hanna and Dherin, Benoit and Gonzalvo, Xavier",
    2026,
    arxiv="2603.08647",
)


class LimitedMap(AxisMap):
    """A map that acts in some layers of a stack: in the others new coordinates are 0 on both sides.

    - `stack`: the axis of the layers.
    - `layers`: the layers that grow.
    """

    stack: str = eqx.field(static=True, default="layers")
    layers: tuple[int, ...] = eqx.field(static=True, default=())

    def limited(self, slot: Slot, before: Any, after: Any, start: float) -> Any:
        """An array after the map, in the chosen layers; in the others the old entries, and `start`."""
        if slot.kind == "gate":
            return after
        resting = before
        for dim in slot.positions(self.axis):
            resting = jnp.take(resting, np.maximum(self.source, 0), axis=dim)
            resting = jnp.where(
                across(self.is_new(), resting.ndim, dim), jnp.asarray(start, resting.dtype), resting
            )
        (dim,) = [i for i, d in enumerate(slot.dims) if d.axis == self.stack]
        chosen = np.isin(np.arange(after.shape[dim]), self.layers)
        return jnp.where(across(chosen, after.ndim, dim), after, resting)


@dataclasses.dataclass(frozen=True)
class Limited(Finish):
    """Another rule, in the layers that grow."""

    rule: Finish

    def prepared(self, move, table):
        """The other rule, prepared."""
        return Limited(self.rule.prepared(move, table))

    def applied(self, move, slot, old, new, *, key):
        """What the other rule makes of the leaf; nothing in layers that do not grow."""
        return move.limited(slot, old, self.rule.applied(move, slot, old, new, key=key), 0.0)

    def undetermined(self, move, role):
        """What the other rule says."""
        return self.rule.undetermined(move, role)


def _layer_faults(layers: Any) -> Iterator[str]:
    if not layers or not all(values.fits(int, i) and i >= 0 for i in layers):
        yield f"layers: expected the numbers of some layers, such as (3, 7), got {values.short(layers)}"
    elif len(set(layers)) < len(layers):
        yield f"layers: expected each layer once, got {values.short(layers)}"


@values.register
class Within(Operator):
    """Another operator, in some layers of a stack; see `within`."""

    operator: Operator
    layers: Annotated[tuple[int, ...], values.Faults("some layers", _layer_faults)] = eqx.field(
        static=True
    )
    axis: str = eqx.field(static=True, default="layers")
    card: ClassVar[Card] = Card(
        use="More capacity in some layers, as for fine-tuning that should not forget: train only the new "
        "part.",
        traps=(
            "Layers that do not grow have the new coordinates as well, zero on both sides, which cost "
            "memory and time.",
            "They stay zero only where the activation is 0 at 0.",
        ),
        example="within(zeros(mlp=10), layers=(1,))",
        papers=(_GROW,),
    )

    def __check_init__(self):
        values.check(self, GrowthError)
        if isinstance(self.operator, Chain | Within):
            raise GrowthError(
                f"operator: expected one operator, got {self.operator}; chain those of its members"
            )
        check_fitted(self.operator)

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """That of the operator: in the other layers nothing changes."""
        return self.operator.exactness

    def maps(self, axes: Axes) -> list[AxisMap]:
        """The operator's maps, limited to the layers."""
        depth, moves = axes.size(self.axis), list(self.operator.maps(axes))
        faults = [
            f"layers: {i} is not among the {depth} {self.axis}" for i in self.layers if i >= depth
        ]
        for move in moves:
            if move.axis == self.axis:
                faults.append(f"{self.operator}: it grows {self.axis} themselves, and not in width")
                continue
            if type(move) is not AxisMap or move.mixes or move.over or move.has_means:
                faults.append(
                    f"{self.operator}: its map of {move.axis} is no map of copies and new rows"
                )
            faults += [
                f"{slot.path} averages over {move.axis}, and new zeros in layers that do not grow would "
                "change its mean; grow all layers"
                for slot in axes.normalised(move.axis)
            ]
            faults += [
                f"{slot.path} has {move.axis} and is shared by all {self.axis}: it grows in all or none"
                for slot in axes.having(move.axis)
                if slot.arrays() and not slot.positions(self.axis)
            ]
        raise_all(GrowthError, f"this cannot grow in some {self.axis} only:", faults)
        return [self._limited(move) for move in moves]

    def _limited(self, move: AxisMap) -> LimitedMap:
        fields = {f.name: getattr(move, f.name) for f in dataclasses.fields(AxisMap)}
        if move.finish is not None:
            fields["finish"] = Limited(move.finish)
        return LimitedMap(**fields, stack=self.axis, layers=self.layers)


def within(
    operator: Operator, *, layers: tuple[int, ...] | list[int], axis: str = "layers"
) -> Within:
    """Grow width in some layers of a stack only: `gj.copy`, `gj.zeros`, `gj.msg` and their like.

    All layers of a stack have arrays of one shape, so every layer gets the new coordinates. In layers
    that do not grow they are zero on both sides: they add nothing and, if the activation is 0 at 0 (as
    here every one is), never get a gradient, so that these layers stay as they were. They do cost memory
    and time. In a list of blocks that `gj.annotate` gives axes of their own, other layers stay small.

    **Arguments**

    - `operator`: grows an axis of the blocks, such as `mlp` or `heads`.
    - `layers`: the layers that grow.
    - `axis`: the axis of the stack.

    With `train="new"` in a stage of a plan this is G-Freeze of "Grow, Don't Overwrite", without it
    G-Train. Raises `GrowthError` for an axis that layers share, such as `embed`.

    **Example**

        gj.growth.within(gj.copy(mlp=2048), layers=(3, 7))
    """
    return Within(operator, values.tuples(layers), axis)
