"""Layers that are run more than once: looped Transformers.

Dehghani et al., "Universal Transformers", ICLR 2019; Saunshi et al., "Reasoning with Latent Thoughts: On
the Power of Looped Transformers", ICLR 2025; Geiping et al., "Scaling up Test-Time Compute with Latent
Reasoning: A Recurrent Depth Approach", 2025 (a prelude, a core that is repeated, a coda).
"""

from collections.abc import Iterator
from typing import Annotated

import equinox as eqx
import numpy as np
from jaxtyping import PRNGKeyArray

from growjax.algebra import AxisMap
from growjax.axes import Axes
from growjax.errors import SubnetError, raise_all
from growjax.subnet.base import Subnet, depth_of
from growjax.values import at_least, register


@register
class Loop(Subnet):
    """Some layers several times over; see `loop`."""

    times: Annotated[int, at_least(1, "times")] = eqx.field(static=True)
    first: int = eqx.field(static=True, default=0)
    last: int = eqx.field(static=True, default=-1)
    axis: str = eqx.field(static=True, default="layers")

    def layers(self, depth: int) -> tuple[int, ...]:
        """The layers in the order in which a model of this depth runs them.

        Raises `SubnetError` if the loop does not fit. `gj.stack(layers=loop.layers(6))` makes a deeper
        model of it: the same function, whose layers are then free to differ.
        """
        raise_all(SubnetError, f"this loop does not fit {depth} {self.axis}:", self._faults(depth))
        layers = tuple(range(depth))
        first, end = self.first % depth, self.last % depth + 1
        return (*layers[:first], *layers[first:end] * self.times, *layers[end:])

    def _faults(self, depth: int) -> Iterator[str]:
        outside = [
            f"{name}: {i} is not among them"
            for name, i in (("first", self.first), ("last", self.last))
            if not -depth <= i < depth
        ]
        yield from outside
        if not outside and self.first % depth > self.last % depth:
            yield f"last: expected layer {self.first} or a later one, got {self.last}"

    def maps(self, axes: Axes, *, key: PRNGKeyArray, step) -> list[AxisMap]:
        """The layers, each as often as it is run."""
        path = self.layers(depth_of(axes, self.axis))
        return [AxisMap(self.axis, np.asarray(path))] if self.times > 1 else []


def loop(times: int, *, first: int = 0, last: int = -1, axis: str = "layers") -> Loop:
    """Run the layers from `first` to `last` several times over, with the same weights.

    The model is as large as it is and computes as much as a deeper one; every run of a layer adds to its
    gradient. Evaluate the looped model, since that is the trained one:
    `loop(model, key=key)`. (A plan judges the model itself.)

    **Arguments**

    - `times`: how often they are run, one round after the other.
    - `first`, `last`: the layers of the loop, both counted in (negative ones from the end).
    - `axis`: the stack of layers.

    Raises `SubnetError` when the loop does not fit the model.

    **Example**

        looped = gj.loop(3, first=1, last=-2)       # of 6 layers: 0, 1-4, 1-4, 1-4, 5
        loss = lambda model, key: next_token_loss(looped(model, key=key), batch)
    """
    return Loop(times, first, last, axis)
