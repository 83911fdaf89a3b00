"""Dense maps: leaves that produce an axis take a matrix, and leaves that consume it take its dual.

The width half of LiGO (Wang et al., "Learning to Grow Pretrained Models for Efficient Transformer
Training", ICLR 2023) and of Mango (Pan et al. 2023), rotations of queries and keys, transplants.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar

import equinox as eqx
import numpy as np

from growjax import values
from growjax.algebra import AxisMap, linear
from growjax.axes import Axes
from growjax.cards import Card, Paper
from growjax.errors import GrowthError, raise_all
from growjax.growth.operator import Exactness, Operator


LIGO = Paper(
    "Learning to Grow Pretrained Models for Efficient Transformer Training",
    "Wang, Peihao and Panda, Rameswar and Hennigen, Lucas Torroba and Greengard, Philip and Karlinsky, "
    "Leonid and Feris, Rogerio and Cox, David Daniel and Wang, Zhangyang and Kim, Yoon",
    2023,
    "International Conference on Learning Representations",
    "2303.00980",
)


def matrix_faults(matrices: Any) -> Iterator[str]:
    """The errors in some matrices, by axis or path."""
    for axis, rows in matrices:
        shape = _shape(rows)
        if len(shape) != 2 or 0 in shape:
            yield f"{axis}: expected a matrix [new, old], got {values.short(rows)}"
        elif not all(values.fits(float, x) for row in rows for x in row):
            yield f"{axis}: expected finite numbers"


def _shape(rows: Any) -> tuple[int, ...]:
    try:
        return np.shape(rows)
    except ValueError:  # rows of several lengths
        return ()


Matrices = Annotated[
    tuple[tuple[str, Any], ...], values.Faults("a matrix [new, old] for an axis", matrix_faults)
]


@values.register
class Dense(Operator):
    """Multiply axes by matrices; see `dense`."""

    matrices: Matrices = eqx.field(static=True)
    dual: Matrices = eqx.field(static=True, default=())
    exact: bool = eqx.field(static=True, default=False)
    card: ClassVar[Card] = Card(
        use="A map that no other operator has: a rotation of the coordinates of heads, or matrices that "
        "you have learned.",
        traps=(
            "A matrix on an axis with an activation between its two sides (`mlp`) does not keep the "
            "function, whatever its dual.",
            "Second moments follow only where every row has one source, and are refused otherwise.",
        ),
        example="dense(head_dim=((0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 1), "
        "(1, 0, 0, 0)))",
        papers=(LIGO,),
    )

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        """By `exact`, the caller's word that only linear parts of the model touch these axes."""
        return "exact-given-init" if self.exact else "approximate"

    def maps(self, axes: Axes) -> list[AxisMap]:
        """One matrix and its dual an axis."""
        duals = dict(self.dual)
        faults = []
        for axis, rows in self.matrices:
            old = axes.size(axis)
            if len(rows[0]) != old:
                faults.append(f"{axis}: expected a matrix [new, {old}], got {_shape(rows)}")
        faults += [
            f"dual: {axis} has no matrix" for axis in duals if axis not in dict(self.matrices)
        ]
        raise_all(GrowthError, "these matrices do not fit the model:", faults)
        return [linear(axis, rows, duals.get(axis)) for axis, rows in self.matrices]


def dense(
    *,
    dual: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
    exact: bool = False,
    **matrices: Any,
) -> Dense:
    """Grow axes by matrices `[new, old]` of your own.

    Leaves that produce an axis, elementwise ones, tables along it and stacks are multiplied by the
    matrix, leaves that consume it by its dual `[new, old]`: `dual^T matrix = I`, by default that of least
    squares. First moments and averages of gradients follow the dual; second moments do where every row
    has one source, and are refused (`StateError`) where not.

    **Arguments**

    - `exact`: promise that the function is kept; the certificate then tests it. It is kept where only
      linear parts touch the axis: `head_dim` without rotary positions or QK-norm; not `mlp`, whose
      activation stands between the two sides.
    - `dual`: axis to matrix.

    Raises `GrowthError` for a matrix that does not fit, `AxisError` where it has no dual, or a wrong one.

    **Example**

        gj.dense(head_dim=rotation, exact=True)        # an orthogonal matrix
    """
    return Dense(values.tuples(matrices), values.tuples(dual), exact)
