"""Nested models: the first hidden units of every layer are a model of their own.

MatFormer: Devvrit et al., "MatFormer: Nested Transformer for Elastic Inference", NeurIPS 2024.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import equinox as eqx
import numpy as np
from jaxtyping import PRNGKeyArray

from growjax.algebra import AxisMap
from growjax.axes import Axes
from growjax.cards import Card, Paper
from growjax.errors import SubnetError, raise_all
from growjax.subnet.base import Subnet, check_draw
from growjax.subnet.parts import units
from growjax.values import Faults, Size, fits, register, short, tuples


_MATFORMER = Paper(
    "MatFormer: Nested Transformer for Elastic Inference",
    "{Devvrit} and Kudugunta, Sneha and Kusupati, Aditya and Dettmers, Tim and Chen, Kaifeng and "
    "Dhillon, Inderjit and Tsvetkov, Yulia and Hajishirzi, Hannaneh and Kakade, Sham and Farhadi, "
    "Ali and Jain, Prateek",
    2024,
    "Advances in Neural Information Processing Systems",
    "2310.07707",
)


def _faults(sizes: Any) -> Iterator[str]:
    """The errors in some lists of sizes, by axis."""
    if not sizes:
        yield "sizes: expected at least one axis with its sizes, such as mlp=(512, 1024, 2048)"
    for axis, several in sizes:
        whole = isinstance(several, tuple) and several and all(fits(Size, n) for n in several)
        if not whole or list(several) != sorted(set(several)):
            yield f"{axis}: expected sizes that rise, such as (512, 1024), got {short(several)}"
    if len({len(several) for _, several in sizes if isinstance(several, tuple)}) > 1:
        yield "sizes: the axes shrink together, so each needs as many sizes as the others"


@register
class Nested(Subnet):
    """The first units of every layer; see `nested`."""

    sizes: Annotated[
        tuple[tuple[str, Any], ...], Faults("sizes such as mlp=(512, 1024)", _faults)
    ] = eqx.field(static=True)
    card: ClassVar[Card] = Card(
        use="One model to train, and several sizes of it to deploy: each step trains one size, and the "
        "first units of every layer are a model of that size.",
        traps=(
            "Every size is trained in its share of the steps alone: the whole model ends worse than one "
            "that was trained by itself at the same cost.",
            "Units are not sorted by their importance: a model that was not trained so is not nested.",
        ),
        example="nested(mlp=3)",
        papers=(_MATFORMER,),
    )

    @property
    def count(self) -> int:
        """The number of sizes."""
        return len(self.sizes[0][1])

    def at(self, step: int, *, seed: int = 0) -> "Nested":
        """One of the sizes, each as often as the others."""
        check_draw(step, seed)
        if self.count == 1:
            return self
        chosen = int(np.random.default_rng([seed, step, 0x3E5]).integers(self.count))
        return Nested(tuple((axis, (several[chosen],)) for axis, several in self.sizes))

    def steady(self, step: int) -> float:
        """The next step may have another size."""
        return math.inf if self.count == 1 else step + 1

    def maps(self, axes: Axes, *, key: PRNGKeyArray, step) -> list[AxisMap]:
        """The first coordinates along each axis."""
        del key, step
        if self.count > 1:
            raise SubnetError(
                f"sizes: {self.count} of them; take nested.at(step, seed=...) first, which chooses one"
            )
        counts, complaints = units(axes, {axis: size for axis, (size,) in self.sizes})
        raise_all(SubnetError, "this part does not fit the model:", complaints)
        return [AxisMap(axis, np.arange(count)) for axis, count in counts.items()]


def nested(**sizes: int | Sequence[int]) -> Nested:
    """The first hidden units and heads of every layer, at one of some sizes in each step (MatFormer).

    A step costs what a model of its size does. `nested(mlp=512)(model, key=key)` is the model to deploy,
    with the function that was trained; the last size is usually the whole model's.

    **Arguments**

    - `mlp=(512, 1024, 2048)`: the sizes of an axis, rising; of several axes the first sizes go together,
      then the second ones. Only units that norms do not average over. Grouped queries go with
      their group.

    Raises `SubnetError` for sizes that do not rise, and when one does not fit the model.

    **Example**

        part = gj.nested(mlp=(512, 1024, 2048))       # Stage(subnet=part) draws one of them a step
        small = gj.nested(mlp=512)(model, key=key)
    """
    several = ((axis, tuples(size)) for axis, size in sizes.items())
    return Nested(tuple((axis, n if isinstance(n, tuple) else (n,)) for axis, n in several))
