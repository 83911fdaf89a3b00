"""Layers that are dropped by coins: progressive layer dropping, and LayerSkip with its early exits.

Zhang & He, NeurIPS 2020; Elhoushi et al., "LayerSkip: Enabling Early Exit Inference and Self-Speculative
Decoding", ACL 2024.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from growjax.algebra import AxisMap
from growjax.axes import Axes
from growjax.cards import Card, Paper
from growjax.maps import fold_in_name
from growjax.subnet.base import Coins
from growjax.values import Range, Size, at_least, positive, ranged, register


_LAYERSKIP = Paper(
    "LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding",
    "Elhoushi, Mostafa and Shrivastava, Akshat and Liskovich, Diana and Hosmer, Basil and Wasti, "
    "Bram and Lai, Liangzhen and Mahmoud, Anas and Acun, Bilge and Agarwal, Saurabh and Roman, Ahmed "
    "and others",
    2024,
    "Annual Meeting of the Association for Computational Linguistics",
    "2404.16710",
)
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
    stacks = axis if isinstance(axis, str) else tuple(axis)
    return ProgressiveLayerDrop(floor, rate, inverse, stacks)


@register
class LayerSkip(Coins):
    """Layers dropped the more the deeper they are, and steps that exit early; see `layer_skip`."""

    rate: Annotated[float, ranged(0, 1, "a probability")] = eqx.field(static=True)
    steps: Annotated[int, at_least(0, "steps")] = eqx.field(static=True, default=0)
    exits: Annotated[float, ranged(0, 1, "a weight")] = eqx.field(static=True, default=0.0)
    every: Size = eqx.field(static=True, default=1)
    axis: str = eqx.field(static=True, default="layers")
    card: ClassVar[Card] = Card(
        use="A model whose first layers predict as well, for early exits or self-speculative decoding, "
        "trained from scratch or for a while at the end.",
        traps=(
            "Exits cost quality at the last layer: the paper keeps their weight small.",
            "Training from scratch needs a larger learning rate than without (the paper).",
            "An exit reads the final norm and head: keep both when you cut the model.",
        ),
        example="layer_skip(rate=0.2, exits=0.2)",
        papers=(_LAYERSKIP,),
    )

    @property
    def stacks(self) -> tuple[str, ...]:
        return (self.axis,)

    def dropped(self, layers: int, step) -> Float[Array, " layers"]:
        """The probability of dropping each layer: `rate S(t) (2 ** (l / (L - 1)) - 1)` for l < L."""
        deep = 2.0 ** (jnp.arange(layers) / max(layers - 1, 1)) - 1
        if not self.steps:
            return self.rate * deep
        done = jnp.clip(jnp.asarray(step, jnp.float32) / self.steps, 0, 1)
        return self.rate * (2**done - 1) * deep

    def depths(self, layers: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of layers after which a step may end, and the probability of each."""
        depths = np.arange(layers, 0, -self.every)[::-1]
        weights = self.exits * (depths * (depths - 1) / 2)
        # The last layer counts by its own index on top, as if there were no other exit
        weights[-1] = layers - 1 + self.exits * (layers - 1) * (layers - 2) / 2
        total = weights.sum()
        return depths, weights / total if total else np.ones(len(depths)) / len(depths)

    def chances(self, layers: int, step) -> Float[Array, " layers"]:
        """The chance that no exit comes before a layer, times that of not dropping it."""
        depths, odds = self.depths(layers)
        reached = np.array([odds[depths > i].sum() for i in range(layers)])
        return jnp.asarray(reached, jnp.float32) * (1 - self.dropped(layers, step))

    def toss(self, layers: int, *, key: PRNGKeyArray, step) -> Bool[Array, " layers"]:
        """Which layers run: those before the exit that are not dropped."""
        depths, odds = self.depths(layers)
        drawn = jax.random.choice(fold_in_name(key, "exit"), depths, p=jnp.asarray(odds))
        runs = self.coins(layers, key=key) >= self.dropped(layers, step)
        return runs & (jnp.arange(layers) < drawn)

    def branches(self, on: Bool[Array, " layers"], step) -> None:
        """No multiplier."""
        del on, step

    def maps(self, axes: Axes, *, key: PRNGKeyArray, step) -> list[AxisMap]:
        """A flag for every layer."""
        return self.flags(axes, key=key, step=step)


def layer_skip(
    *,
    rate: float = 0.1,
    steps: int = 0,
    exits: float = 0.0,
    every: int = 1,
    axis: str = "layers",
) -> LayerSkip:
    """Drop layers with a rate that rises with depth, and end some steps after fewer layers (LayerSkip).

    All exits share the final norm and the head. The paper adds the losses of the exits, weighted; here a
    step has the loss of one, drawn by these weights, so that its gradient is the same on average and it
    costs as much as the layers that it runs. The whole model is evaluated; its first layers are
    `gj.stack(layers=tuple(range(8)))` of it.

    **Arguments**

    - `rate`: how often the last layer is dropped; layer l of L by `2 ** (l / (L - 1)) - 1` of it.
    - `steps`: the number of steps over which the rate rises from 0, by `2 ** (t / steps) - 1`; 0 has the
      whole rate from the first one.
    - `exits`: the weight of exits: of the exit after layer l (from 0), `exits` times the sum of the
      indices up to l; the last has its own index besides. 0 has no early exits.
    - `every`: exits are this many layers apart, counted from the last layer.
    - `axis`: the stack of layers.

    **Example**

        Stage(tokens=1e8, subnet=gj.layer_skip(rate=0.1, exits=0.1, every=4))
    """
    return LayerSkip(rate, steps, exits, every, axis)
