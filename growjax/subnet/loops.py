"""Layers that are run more than once: looped Transformers.

Dehghani et al., "Universal Transformers", ICLR 2019; Saunshi et al., "Reasoning with Latent Thoughts: On
the Power of Looped Transformers", ICLR 2025; Geiping et al., "Scaling up Test-Time Compute with Latent
Reasoning: A Recurrent Depth Approach", 2025 (a prelude, a core that is repeated, a coda).
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar

import equinox as eqx
import numpy as np
from jaxtyping import PRNGKeyArray

from growjax.algebra import AxisMap
from growjax.axes import Axes
from growjax.cards import Card, Paper
from growjax.errors import SubnetError, raise_all
from growjax.subnet.base import Subnet, depth_of
from growjax.values import Size, at_least, faults, register


_UNIVERSAL = Paper(
    "Universal Transformers",
    "Dehghani, Mostafa and Gouws, Stephan and Vinyals, Oriol and Uszkoreit, Jakob and Kaiser, Lukasz",
    2019,
    "International Conference on Learning Representations",
    "1807.03819",
)
_LOOPED = Paper(
    "Reasoning with Latent Thoughts: On the Power of Looped Transformers",
    "Saunshi, Nikunj and Dikkala, Nishanth and Li, Zhiyuan and Kumar, Sanjiv and Reddi, Sashank J.",
    2025,
    "International Conference on Learning Representations",
    "2502.17416",
)
_RECURRENT = Paper(
    "Scaling up Test-Time Compute with Latent Reasoning: A Recurrent Depth Approach",
    "Geiping, Jonas and McLeish, Sean and Jain, Neel and Kirchenbauer, John and Singh, Siddharth and "
    "Bartoldson, Brian R. and Kailkhura, Bhavya and Bhatele, Abhinav and Goldstein, Tom",
    2025,
    arxiv="2502.05171",
)


@register
class Loop(Subnet):
    """Some layers several times over; see `loop`."""

    times: Annotated[int, at_least(1, "times")] = eqx.field(static=True)
    first: int = eqx.field(static=True, default=0)
    last: int = eqx.field(static=True, default=-1)
    axis: str = eqx.field(static=True, default="layers")
    card: ClassVar[Card] = Card(
        use="A deeper computation with the parameters of a shallow model, in training or at inference "
        "alone; its layers can be set free later by `gj.stack(layers=loop.layers(depth))`.",
        traps=(
            "A step costs as much as one of the deeper model.",
            "The looped model is the trained one: a plan judges the model without the loop.",
        ),
        example="loop(2)",
        papers=(_UNIVERSAL, _LOOPED),
        by={"core": (_RECURRENT,)},
    )

    @property
    def core(self) -> bool:
        """Whether layers before or after the loop run once."""
        return (self.first, self.last) != (0, -1)

    def layers(self, depth: int) -> tuple[int, ...]:
        """The layers in the order in which a model of this depth runs them.

        Raises `SubnetError` if the loop does not fit. `gj.stack(layers=loop.layers(6))` makes a deeper
        model of it: the same function, whose layers are then free to differ.
        """
        raise_all(SubnetError, "a loop is of a model's layers:", faults(Size, depth, "depth"))
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
