"""Random heads and hidden units: RaPTr's width form (Panigrahi et al., ICLR 2025)."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from growjax.algebra import AxisMap
from growjax.axes import Axes
from growjax.cards import Card
from growjax.errors import SubnetError, raise_all
from growjax.maps import fold_in_name
from growjax.subnet.base import Subnet
from growjax.subnet.paths import RAPTR
from growjax.values import Faults, Size, faults, register, tuples


def _faults(counts: Any) -> Iterator[str]:
    """The errors in how many units of each axis are chosen."""
    if not counts:
        yield "counts: expected at least one axis and how many of its units are chosen, such as mlp=512"
    for axis, count in counts:
        yield from faults(Size, count, axis)


@register
class RandomPart(Subnet):
    """Random heads and hidden units of every layer; see `random_part`."""

    counts: Annotated[tuple[tuple[str, Any], ...], Faults("counts such as mlp=512", _faults)] = (
        eqx.field(static=True)
    )
    scale: Literal["none", "sqrt", "linear"] = eqx.field(static=True, default="none")
    per_layer: bool = eqx.field(static=True, default=True)
    card: ClassVar[Card] = Card(
        use="Cheaper steps by some of the heads and hidden units of every layer, where layers are few.",
        traps=(
            "Sums over fewer units are smaller: the whole model computes something else than its parts "
            "were trained for, unless `scale` makes up for it.",
        ),
        example="random_part(mlp=3)",
        papers=(RAPTR,),
    )

    def maps(self, axes: Axes, *, key: PRNGKeyArray, step) -> list[AxisMap]:
        """A selection along each axis, layer by layer."""
        counts, complaints = units(axes, dict(self.counts))
        raise_all(SubnetError, "this part does not fit the model:", complaints)
        return [self._map(axes, axis, count, key) for axis, count in counts.items()]

    def _map(self, axes: Axes, axis: str, count: int, key: PRNGKeyArray) -> AxisMap:
        size, key = axes.size(axis), fold_in_name(key, f"part:{axis}")

        def draw(key):
            return jnp.sort(jax.random.permutation(key, size)[:count])

        stacks = {slot.dims[0].axis for slot in axes.having(axis) if slot.dims[0].role == "stack"}
        if self.per_layer and len(stacks) == 1:
            source = jax.vmap(draw)(jax.random.split(key, axes.size(stacks.pop())))
        else:
            source = draw(key)
        factor = {"none": None, "sqrt": (size / count) ** 0.5, "linear": size / count}[self.scale]
        share = None if factor is None else np.full(count, factor)
        return AxisMap(axis, source, share=share)


def units(axes: Axes, counts: dict[str, int]) -> tuple[dict[str, int], list[str]]:
    """Of each axis that gets smaller, how many of its units stay; and the counts that do not fit."""
    counts, complaints = dict(counts), []
    if "heads" in counts and "heads" not in axes.sizes and "group" in axes.sizes:
        heads, group = counts.pop("heads"), axes.size("group")
        counts["kv_heads"] = heads // group
        if heads % group:
            complaints.append(f"heads: {heads} are not whole groups of {group} queries")
    for axis, count in counts.items():
        size = axes.size(axis)
        if not 0 < count <= size:
            complaints.append(f"{axis}: expected between 1 and {size}, got {count}")
        elif axes.normalised(axis) or axes.roles(axis) & {"stack", "lookup"}:
            complaints.append(f"{axis}: only units that norms do not average over can be left out")
    return {axis: n for axis, n in counts.items() if n < axes.size(axis)}, complaints


def random_part(
    *,
    scale: Literal["none", "sqrt", "linear"] = "none",
    per_layer: bool = True,
    **counts: int,
) -> RandomPart:
    """Random heads and hidden units (RaPTr's width form): `random_part(heads=4, mlp=512)`.

    The residual stream, embeddings and norms stay whole, and output biases are added once. Grouped
    queries are chosen by whole groups. `scale` multiplies the weights that consume chosen units by
    the square root or the value of size/count. `per_layer=False` (always so where layers of several
    stacks share the axis) chooses the same units in every layer.

    **Example**

        part, path = gj.random_part(heads=4, mlp=512), gj.random_path(6)
        smaller = part(path(model, key=key), key=key)
    """
    return RandomPart(tuples(counts), scale, per_layer)
