"""Layers that are dropped by coins, and losses of early exits: LayerSkip.

Elhoushi et al., "LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding", ACL 2024.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from growjax.algebra import AxisMap
from growjax.axes import Axes, axes_of, get, put
from growjax.cards import Card, Paper
from growjax.errors import SubnetError
from growjax.maps import fold_in_name
from growjax.subnet.base import Coins, Model, check_draw, depth_of
from growjax.values import Size, at_least, check, ranged, register


_LAYERSKIP = Paper(
    "LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding",
    "Elhoushi, Mostafa and Shrivastava, Akshat and Liskovich, Diana and Hosmer, Basil and Wasti, "
    "Bram and Lai, Liangzhen and Mahmoud, Anas and Acun, Bilge and Agarwal, Saurabh and Roman, Ahmed "
    "and others",
    2024,
    "Annual Meeting of the Association for Computational Linguistics",
    "2404.16710",
)

Curriculum = Literal["fixed", "rotate", "gradual"]


@runtime_checkable
class Exiting(Protocol):
    """A stack of blocks that hands out what some blocks put out, such as `growjax.nn.Stacked`."""

    def exiting(self, exits: tuple[tuple[int, float], ...]) -> Any:
        """The stack with these exits: pairs of a block's number and its weight in the loss."""
        ...


@register
class LayerSkip(Coins):
    """Layers dropped the more the deeper they are, and early exits; see `layer_skip`."""

    rate: Annotated[float, ranged(0, 1, "a probability")] = eqx.field(static=True)
    steps: Annotated[int, at_least(0, "steps")] = eqx.field(static=True, default=0)
    exits: Annotated[float, ranged(0, 1, "a weight")] = eqx.field(static=True, default=0.0)
    every: Size = eqx.field(static=True, default=1)
    axis: str = eqx.field(static=True, default="layers")
    summed: bool = eqx.field(static=True, default=False)
    curriculum: Curriculum = eqx.field(static=True, default="fixed")
    layers: Size | None = eqx.field(static=True, default=None)
    # Of the curriculum: how far the exits have rotated, or how many have come besides the last
    phase: Annotated[int, at_least(0)] | None = eqx.field(static=True, default=None)
    card: ClassVar[Card] = Card(
        use="A model whose first layers predict as well, for early exits or self-speculative decoding, "
        "trained from scratch or for a while at the end.",
        traps=(
            "Exits cost quality at the last layer: the paper keeps their weight small.",
            "Training from scratch needs a larger learning rate than without (the paper).",
            "An exit reads the final norm and head: keep both when you cut the model.",
            "With summed=True every exit reads all logits, which costs more than layers in small models.",
        ),
        example="layer_skip(rate=0.2, exits=0.2)",
        papers=(_LAYERSKIP,),
    )

    def __check_init__(self):
        check(self, SubnetError, "this cannot skip layers:", self._faults)

    def _faults(self) -> Iterator[str]:
        if self.curriculum != "fixed" and not self.summed:
            yield "curriculum: it is of exits whose losses are added; give summed=True"
        if self.curriculum == "gradual" and not (self.steps and self.layers):
            yield "steps, layers: exits come one by one; say over how many of each"
        if self.layers is not None and self.curriculum != "gradual":
            yield "layers: only exits that come one by one need their number"

    @property
    def stacks(self) -> tuple[str, ...]:
        return (self.axis,)

    @property
    def besides(self) -> "LayerSkip | None":
        """The exits, without any layer dropped."""
        return dataclasses.replace(self, rate=0.0) if self.summed else None

    @property
    def scheduled(self) -> bool:
        """Whether the rate rises."""
        return self.steps > 0 and self.rate > 0

    def at(self, step: int, *, seed: int = 0) -> "LayerSkip":
        """With the exits of one step."""
        check_draw(step, seed)
        if self.curriculum == "fixed" or self.phase is not None:
            return self
        return _in_phase(self, self._phase(step))

    def steady(self, step: int) -> float:
        """The next step with other exits."""
        if self.curriculum == "fixed" or self.phase is not None:
            return math.inf
        if self.curriculum == "rotate":
            return step + 1 if self.every > 1 else math.inf
        assert self.layers is not None
        now = self._phase(step)
        if now == self.layers - 1:
            return math.inf
        return max(step + 1, math.ceil((now + 1) * self.steps / (2 * self.layers)))

    def _phase(self, step: int) -> int:
        if self.curriculum == "rotate":
            return step % self.every
        assert self.layers is not None
        return min(2 * self.layers * step // self.steps, self.layers - 1)

    def dropped(self, layers: int, step) -> Float[Array, " layers"]:
        """The probability of dropping each layer: `rate S(t) (2 ** (l / (L - 1)) - 1)` for l < L."""
        deep = 2.0 ** (jnp.arange(layers) / max(layers - 1, 1)) - 1
        if not self.steps:
            return self.rate * deep
        done = jnp.clip(jnp.asarray(step, jnp.float32) / self.steps, 0, 1)
        return self.rate * (2**done - 1) * deep

    def depths(self, layers: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of layers after which there are exits, and the weight of each; they sum to 1."""
        if layers < 1:
            raise SubnetError(f"{self.axis}: expected layers to skip or to exit after, got none")
        depths = np.arange(1, layers + 1)
        last, phase = depths == layers, self.phase or 0
        if self.curriculum == "rotate":
            depths = depths[last | ((depths - 1 + phase) % self.every == 0)]
        else:
            depths = depths[(layers - depths) % self.every == 0]
        if self.curriculum == "gradual":
            depths = depths[depths >= layers - phase]
        weights = self.exits * (depths * (depths - 1) / 2)
        # The last layer counts by its own index on top, as if there were no other exit
        weights[-1] = layers - 1 + self.exits * (layers - 1) * (layers - 2) / 2
        total = weights.sum()
        return depths, weights / total if total else np.ones(len(depths)) / len(depths)

    def chances(self, layers: int, step) -> Float[Array, " layers"]:
        """The chance that no exit comes before a layer, times that of not dropping it."""
        stays = 1 - self.dropped(layers, step)
        if self.summed:
            return stays
        depths, odds = self.depths(layers)
        reached = np.array([odds[depths > i].sum() for i in range(layers)])
        return jnp.asarray(reached, jnp.float32) * stays

    def toss(self, layers: int, *, key: PRNGKeyArray, step) -> Bool[Array, " layers"]:
        """Which layers run: those that are not dropped, and come before the exit that is drawn."""
        runs = self.coins(layers, key=key) >= self.dropped(layers, step)
        if self.summed:
            return runs
        depths, odds = self.depths(layers)
        drawn = jax.random.choice(fold_in_name(key, "exit"), depths, p=jnp.asarray(odds))
        return runs & (jnp.arange(layers) < drawn)

    def branches(self, on: Bool[Array, " layers"], step) -> None:
        """No multiplier."""
        del on, step

    def maps(self, axes: Axes, *, key: PRNGKeyArray, step) -> list[AxisMap]:
        """A flag for every layer."""
        return self.flags(axes, key=key, step=step)

    def __call__(
        self, model: Model, *, key: PRNGKeyArray, step: int | Int[Array, ""] | None = None
    ) -> Model:
        """The model with its flags and, if their losses are added, its exits.

        Raises `SubnetError` for exits of a model whose layers are not `growjax.nn.Stacked`, of another
        number of layers than `layers`, and where they depend on the step.
        """
        model = super().__call__(model, key=key, step=step)
        if not self.summed:
            return model
        table = axes_of(model)
        layers = depth_of(table, self.axis)
        if self.curriculum != "fixed" and self.phase is None:
            raise SubnetError("exits change from step to step; take skip.at(step) first")
        if self.layers not in (None, layers):
            raise SubnetError(f"layers: the model has {layers} {self.axis}, expected {self.layers}")
        places = {s.steps[:-1] for s in table.of_kind("active") if s.own_axis == self.axis}
        stacks = {place: get(model, place) for place in places}
        if not stacks or not all(isinstance(stack, Exiting) for stack in stacks.values()):
            raise SubnetError(
                f"{self.axis}: the blocks of this model have no early exits; blocks of "
                "growjax.nn.Stacked have"
            )
        depths, weights = self.depths(layers)
        exits = tuple((int(d) - 1, float(w)) for d, w in zip(depths, weights, strict=True) if w > 0)
        return put(model, {place: stack.exiting(exits) for place, stack in stacks.items()})


@functools.lru_cache(maxsize=1024)
def _in_phase(skip: LayerSkip, phase: int) -> LayerSkip:
    """Cached: plans ask for every step of millions."""
    return dataclasses.replace(skip, phase=phase)


def layer_skip(
    *,
    rate: float = 0.1,
    steps: int = 0,
    exits: float = 0.0,
    every: int = 1,
    axis: str = "layers",
    summed: bool = False,
    curriculum: Curriculum = "fixed",
    layers: int | None = None,
) -> LayerSkip:
    """Drop layers with a rate that rises with depth, and train early exits (LayerSkip).

    All exits share the final norm and the head. The paper adds the losses of the exits, weighted
    (`summed=True`). Otherwise a step has the loss of one, drawn by these weights, so that its gradient is
    the same on average and it costs as much as the layers that it runs. The whole model is evaluated. The
    model of its first 8 layers has `jax.tree.map(lambda w: w[:8], model.blocks.block)` as its blocks.

    **Arguments**

    - `rate`: how often the last layer is dropped; layer l of L by `2 ** (l / (L - 1)) - 1` of it.
    - `steps`: the number of steps over which the rate rises from 0, by `2 ** (t / steps) - 1`; 0 has the
      whole rate from the first one.
    - `exits`: the weight of exits: of the exit after layer l (from 0), `exits` times the sum of the
      indices up to l; the last has its own index besides. 0 has no early exits.
    - `every`: exits are this many layers apart, counted from the last layer.
    - `axis`: the stack of layers.
    - `summed`: add the losses of all exits, in one pass through the layers. A step is charged for the
      layers that run, and for the logits of every exit.
    - `curriculum`: of exits that are added. `"fixed"` has the same at every step. `"rotate"` has at step
      t the last one and those after layers l with `(l + t) % every == 0`. `"gradual"` begins with the
      last one, and has one layer more every `steps / (2 layers)` steps. Each set of exits is a program.
    - `layers`: the number of layers, for `"gradual"`.

    Raises `SubnetError` for a curriculum of exits that are not added, or without its numbers.

    **Example**

        Stage(tokens=1e8, subnet=gj.layer_skip(rate=0.1, exits=0.1, every=4))
        Stage(tokens=1e8, subnet=gj.layer_skip(exits=0.2, every=8, summed=True, curriculum="rotate"))
    """
    return LayerSkip(rate, steps, exits, every, axis, summed, curriculum, layers)
