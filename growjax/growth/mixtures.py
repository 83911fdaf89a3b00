"""Maps that were learned: a matrix for each side of an axis, and for the depth of each array (LiGO).

Wang et al., "Learning to Grow Pretrained Models for Efficient Transformer Training", ICLR 2023.
`growjax.fitting.ligo` learns them.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from growjax import values
from growjax.algebra import NONE, AxisMap
from growjax.axes import Axes
from growjax.cards import Card
from growjax.errors import GrowthError, raise_all
from growjax.growth.finishes import Finish
from growjax.growth.matrices import LIGO, Matrices, frozen, matrix_faults
from growjax.growth.operator import Exactness, Operator


@dataclasses.dataclass(frozen=True)
class Mixed(Finish):
    """Layers that are sums of old layers, with a matrix `[new, old]` for each array's path."""

    matrices: Any

    def applied(self, move, slot, old, new, *, key):
        """The sums over old layers; arrays without a matrix stay as they were gathered."""
        del key
        matrix = dict(self.matrices).get(slot.path)
        if slot.kind != "param" or matrix is None:
            return new
        (dim,) = slot.positions(move.axis)
        mixed = jnp.tensordot(jnp.asarray(matrix, old.dtype), old, axes=(1, dim))
        return jnp.moveaxis(mixed, 0, dim)

    def undetermined(self, move, role):
        """Sums of layers have no gradient of their own."""
        del role
        return f"new {move.axis} are sums of old ones"


def width_map(axis: str, produced: Any, consumed: Any) -> AxisMap:
    """The map of an axis by a matrix `[new, old]` for each side, which may be traced."""
    new, old = produced.shape
    source = np.where(np.arange(new) < old, np.arange(new), NONE)
    return AxisMap(axis, source, produced=produced, consumed=consumed)


def depth_map(axis: str, old: int, new: int, matrices: Any) -> AxisMap:
    """The map of a stack by a matrix for each array, which may be traced."""
    source = np.where(np.arange(new) < old, np.arange(new), NONE)
    return AxisMap(axis, source, init="zeros", finish=Mixed(matrices))


@values.register
class Learned(Operator):
    """Growth by learned matrices; see `learned`."""

    produced: Matrices = eqx.field(static=True, default=())
    consumed: Matrices = eqx.field(static=True, default=())
    depth: Annotated[
        tuple[tuple[str, Any], ...], values.Faults("matrices [new, old]", matrix_faults)
    ] = eqx.field(static=True, default=())
    stack: str = eqx.field(static=True, default="layers")
    exactness: ClassVar[Exactness] = "approximate"
    card: ClassVar[Card] = Card(
        use="Width and depth at once where some 100 steps of the large model may be spent before "
        "training (gj.fitting.ligo).",
        traps=(
            "The fit costs as much as its steps of the large model, and a comparison has to charge it.",
            "Optimizer state does not follow; start it anew.",
        ),
        example="learned(depth=(('blocks.block.mlp.up', ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))),))",
        papers=(LIGO,),
    )

    def maps(self, axes: Axes) -> list[AxisMap]:
        """A dense map for every axis of the width, then one for the depth."""
        consumed = dict(self.consumed)
        faults = []
        pairs = [(axis, rows, consumed.get(axis)) for axis, rows in self.produced]
        for axis, rows, other in pairs:
            if other is None or np.shape(other) != np.shape(rows):
                faults.append(
                    f"{axis}: expected a matrix for what consumes it too, of the same shape"
                )
            elif len(rows[0]) != axes.size(axis):
                faults.append(
                    f"{axis}: expected a matrix [new, {axes.size(axis)}], got {np.shape(rows)}"
                )
        faults += [
            f"{axis}: expected a matrix for what produces it too"
            for axis in consumed
            if axis not in dict(self.produced)
        ]
        paths = [s.path for s in axes.having(self.stack, "param")] if self.depth else []
        old = axes.size(self.stack) if self.depth else 0
        faults += [
            f"{path}: no array of {self.stack} has this path"
            for path, _ in self.depth
            if path not in paths
        ]
        faults += [
            f"{path}: expected a matrix [new, {old}], got {np.shape(rows)}"
            for path, rows in self.depth
            if np.shape(rows)[1] != old
        ]
        if len({len(rows) for _, rows in self.depth}) > 1:
            faults.append(f"depth: expected as many new {self.stack} in every matrix")
        raise_all(GrowthError, "these matrices do not fit the model:", faults)
        moves = [width_map(axis, np.asarray(p), np.asarray(c)) for axis, p, c in pairs]
        if self.depth:
            moves.append(depth_map(self.stack, old, len(self.depth[0][1]), self.depth))
        return moves


def learned(
    *,
    produced: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
    consumed: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
    depth: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
    stack: str = "layers",
) -> Learned:
    """Grow by learned matrices `[new, old]`: for both sides of an axis, and for the layers of an array.

    As `gj.dense`, but what consumes an axis has a matrix that is no dual of the other, so nothing keeps
    the function, and optimizer state is refused (`StateError`): start it again.

    **Arguments**

    - `produced`, `consumed`: axis to matrix.
    - `depth`: path of an array to the matrix that mixes its layers; others have zeros in new layers.
    - `stack`: the axis of the layers.

    `growjax.fitting.ligo` learns such an operator. Raises `GrowthError` for matrices that do not fit.
    """
    pairs: list[Any] = [
        x.items() if isinstance(x, Mapping) else x for x in (produced, consumed, depth)
    ]
    made, read, layers = (frozen(pair) for pair in pairs)
    return Learned(made, read, layers, stack)
