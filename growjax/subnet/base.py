"""Sub-networks: values that select a part of a model's parameters for one step."""

import abc
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from growjax import maps
from growjax.algebra import AxisMap
from growjax.axes import Axes, axes_of
from growjax.cards import Card
from growjax.errors import SubnetError, raise_all
from growjax.maps import fold_in_name
from growjax.values import at_least, base, check, check_key, faults


Model = TypeVar("Model")


@base("a sub-network such as gj.random_path(6)")
class Subnet(eqx.Module):
    """A sub-network of a model: subclass it and write `maps`.

    `SubnetError` lists every field whose value does not fit its annotation.
    """

    # When to use it, its traps and its papers: for `gj.cite` and for its page
    card: ClassVar[Card] = Card()

    def __check_init__(self):
        check(self, SubnetError)

    @abc.abstractmethod
    def maps(self, axes: Axes, *, key: PRNGKeyArray, step) -> Sequence[AxisMap]:
        """The selections for one draw."""

    def at(self, step: int, *, seed: int = 0) -> "Subnet":
        """The sub-network of one step, whose sizes do not depend on the step; by default itself.

        Runs on the host: each size has a compiled step of its own.
        """
        check_draw(step, seed)
        return self

    def steady(self, step: int) -> float:
        """The step up to which `at` surely gives what it gives at `step` (exclusive)."""
        del step
        return math.inf

    @property
    def scheduled(self) -> bool:
        """Whether a draw depends on the step, which calls then need."""
        return False

    def __call__(
        self, model: Model, *, key: PRNGKeyArray, step: int | Int[Array, ""] | None = None
    ) -> Model:
        """The smaller model for this key (and, if the method has a schedule, this step).

        Raises `SubnetError` for what is no key, for a method with a schedule and no step, and where the
        sub-network does not fit the model.
        """
        check_key(key, SubnetError)
        for move in self.maps(axes_of(model), key=key, step=self._step(step)):
            model = maps.apply(move, model, None)
        return model

    def running(
        self, model, *, key: PRNGKeyArray, step: int | Int[Array, ""] | None = None
    ) -> dict[str, Bool[Array, " layers"]]:
        """Of each stack that loses layers, which of them run for this key; see `growjax.optim.freeze`."""
        table, flags = axes_of(model), {}
        for move in self.maps(table, key=key, step=self._step(step)):
            if "stack" in table.roles(move.axis):
                chosen = jnp.zeros(table.size(move.axis), bool).at[move.source].set(True)
                flags[move.axis] = chosen if move.active is None else move.active
        return flags

    def _step(self, step: int | Int[Array, ""] | None) -> int | Int[Array, ""]:
        if step is None and self.scheduled:
            raise SubnetError(
                f"step: {type(self).__name__} changes from step to step, and would stay at its first "
                "one; pass step=..."
            )
        return 0 if step is None else step


class Coins(Subnet):
    """A sub-network that skips each layer by a coin of its own: subclass it and write `chances`.

    All layers' weights stay in the program, and `lax.cond` skips those that the coins leave out, so one
    program serves every draw. `tossed` gives the draws of many steps at once, to count the FLOPs of
    the layers that a run draws.
    """

    @property
    def tosses(self) -> bool:
        """Whether layers are drawn by coins (False: a fixed number of layers)."""
        return True

    @property
    def besides(self) -> "Subnet | None":
        """A sub-network that runs every layer and does what this one does besides; None for nothing.

        A step is charged for it in full, whatever the coins say.
        """
        return None

    @property
    @abc.abstractmethod
    def stacks(self) -> tuple[str, ...]:
        """The stacks of layers that share the coins."""

    @abc.abstractmethod
    def chances(self, layers: int, step) -> Any:
        """The probability [layers] of running each layer, at a step or its traced number."""

    @abc.abstractmethod
    def branches(self, on: Bool[Array, " layers"], step) -> Float[Array, " layers"] | None:
        """The multiplier of each layer's branches, given which run; None multiplies nothing."""

    def coins(self, layers: int, *, key: PRNGKeyArray) -> Float[Array, " layers"]:
        """A uniform number for each layer; it runs where this is below its chance."""
        return jax.random.uniform(fold_in_name(key, "coins"), (layers,))

    def flags(self, axes: Axes, *, key: PRNGKeyArray, step) -> list[AxisMap]:
        """The maps of one draw: the same flags along every stack."""
        layers = {axis: depth_of(axes, axis) for axis in self.stacks}
        if len(set(layers.values())) > 1:
            raise SubnetError(f"axis: stacks that share their coins are equally deep, got {layers}")
        n = layers[self.stacks[0]]
        on = self.toss(n, key=key, step=step)
        branch = self.branches(on, step)
        return [AxisMap(axis, np.arange(n), active=on, branch=branch) for axis in self.stacks]

    def toss(self, layers: int, *, key: PRNGKeyArray, step) -> Bool[Array, " layers"]:
        """Which layers run, for one draw."""
        return self.coins(layers, key=key) < jnp.asarray(self.chances(layers, step), jnp.float32)

    def tossed(
        self, layers: int, seed: int, first: int, count: int
    ) -> Bool[np.ndarray, "count layers"]:
        """Which layers run at each of the steps from `first` on."""
        steps = jnp.arange(first, first + count)
        return np.asarray(
            jax.vmap(lambda i: self.toss(layers, key=step_key(seed, i), step=i))(steps)
        )


def step_key(seed: int, step: int | Int[Array, ""]) -> PRNGKeyArray:
    """The key of one training step: the same on every host and after every restart."""
    return jax.random.fold_in(fold_in_name(jax.random.key(seed), "subnet"), step)


def depth_of(axes: Axes, axis: str) -> int:
    """The number of layers along a stack axis."""
    size = axes.size(axis)
    if "stack" not in axes.roles(axis):
        raise SubnetError(f"axis: expected a stack of blocks such as 'layers', got {axis!r}")
    return size


def check_draw(step: Any, seed: Any = 0) -> None:
    """Raise `SubnetError` unless the step and the seed of a draw are whole numbers of 0 or more."""
    number = Annotated[int, at_least(0)]
    wrong = [*faults(number, step, "step"), *faults(number, seed, "seed")]
    raise_all(SubnetError, "a sub-network cannot be taken at this step:", wrong)
