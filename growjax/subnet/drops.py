"""Layers that are dropped by coins, more and more often: progressive layer dropping.

Zhang & He, NeurIPS 2020.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from growjax.algebra import AxisMap
from growjax.axes import Axes
from growjax.cards import Card, Paper
from growjax.subnet.base import Coins
from growjax.values import Range, positive, ranged, register, tuples


_SOME = Range("a stack, or some that share their coins", lambda axes: len(axes) > 0)


_DROPPING = Paper(
    "Accelerating Training of Transformer-Based Language Models with Progressive Layer Dropping",
    "Zhang, Minjia and He, Yuxiong",
    2020,
    "Advances in Neural Information Processing Systems",
    "2010.13369",
)


@register
class ProgressiveLayerDrop(Coins):
    """Layers dropped more and more often, deeper ones first; see `progressive_layer_drop`."""

    floor: Annotated[float, ranged(0, 1, "a probability", above=True)] = eqx.field(static=True)
    rate: Annotated[float, positive()] = eqx.field(static=True)
    inverse: bool = eqx.field(static=True, default=True)
    axis: str | Annotated[tuple[str, ...], _SOME] = eqx.field(static=True, default="layers")
    card: ClassVar[Card] = Card(
        use="Steps that become cheaper during training, deep layers first, under a rate that is larger "
        "than without.",
        traps=(
            "The saving is at most about a quarter of the layers at `floor=0.5`, and comes late.",
            "The published divisor of the branches and the code of No Train No Gain disagree: `inverse`.",
        ),
        example="progressive_layer_drop(floor=0.5, rate=0.001)",
        papers=(_DROPPING,),
    )

    @property
    def stacks(self) -> tuple[str, ...]:
        return (self.axis,) if isinstance(self.axis, str) else self.axis

    @property
    def scheduled(self) -> bool:
        """Layers are dropped more often with every step."""
        return True

    def theta(self, step) -> Float[Array, ""]:
        """The keep probability of the deepest layer: from 1 down to `floor`."""
        return (1 - self.floor) * jnp.exp(-self.rate * jnp.asarray(step, jnp.float32)) + self.floor

    def chances(self, layers: int, step) -> Float[Array, " layers"]:
        """`p_l = 1 - l/L (1 - theta)` for l = 1..L."""
        return 1 - jnp.arange(1, layers + 1) / layers * (1 - self.theta(step))

    def branches(self, on: Bool[Array, " layers"], step) -> Float[Array, " layers"] | None:
        """One over its chance for each layer, if asked for."""
        return 1 / self.chances(on.shape[0], step) if self.inverse else None

    def maps(self, axes: Axes, *, key: PRNGKeyArray, step) -> list[AxisMap]:
        """A flag for every layer and, if asked for, one over its probability on its branches."""
        return self.flags(axes, key=key, step=step)


def progressive_layer_drop(
    *,
    floor: float = 0.5,
    rate: float = 1e-3,
    inverse: bool = True,
    axis: str | Sequence[str] = "layers",
) -> ProgressiveLayerDrop:
    """Progressive layer dropping: keep probabilities fall from 1 to `floor` as `exp(-rate * step)`.

    **Arguments**

    - `rate`: DeepSpeed's is 1e-3; the paper's is 100 over the number of steps, No Train No Gain's 100
      (BERT) or 20 (T5) over it.
    - `inverse`: divide the branches of running layers by their probability, as published. The code of No
      Train No Gain does not (`inverse=False`). Evaluation uses the whole model.
    - `axis`: the stack of layers, or several equally deep ones that share their coins.

    **Example**

        drop = gj.progressive_layer_drop(rate=100 / steps)
        loss = lambda model, key, step: next_token_loss(drop(model, key=key, step=step), batch)
    """
    return ProgressiveLayerDrop(floor, rate, inverse, tuples(axis))
