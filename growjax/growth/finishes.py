"""Finishes: rules that see a leaf before and after its map, and have the last word on its numbers.

An `AxisMap` gathers, multiplies and draws. What some methods add to that depends on the old numbers or
on several copies at once: noise that cancels between copies, rows drawn around the mean of the old ones.
"""

import abc
import dataclasses
import fnmatch
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from growjax.algebra import NONE, AxisMap
from growjax.axes import Axes, Role, Slot
from growjax.errors import GrowthError


@dataclasses.dataclass(frozen=True)
class Finish(abc.ABC):
    """A rule for `AxisMap(finish=...)`. Subclass it as a frozen dataclass with hashable fields.

    Optimizer state does not see it: moments move by the rest of the map.
    """

    def prepared(self, move: AxisMap, table: Axes) -> "Finish":
        """The rule that is applied to the leaves of a model: one may look at several of them first.

        `table` is that of the model before the map. By default it is the rule itself.
        """
        del move, table
        return self

    @abc.abstractmethod
    def applied(
        self, move: AxisMap, slot: Slot, old: Array, new: Array, *, key: PRNGKeyArray | None
    ) -> Array:
        """The final numbers of a leaf, like `new`, which has a dimension for each of `slot.dims`.

        `old` is the leaf before the map, `new` after it. `key` is the leaf's own, and None without a key.
        """

    def undetermined(self, move: AxisMap, role: Role) -> str:
        """Why the gradients of leaves with this role do not follow the map any more; "" if they do."""
        del move, role
        return ""


def drawn(*, key: PRNGKeyArray | None) -> PRNGKeyArray:
    """The key of a rule that draws; raises `GrowthError` if there is none."""
    if key is None:
        raise GrowthError("this operator draws new numbers: pass key=jax.random.key(...)")
    return key


def across(vector: Any, ndim: int, dim: int) -> Array:
    """A vector shaped to broadcast along one dimension of an `ndim`-dimensional array."""
    return jnp.asarray(vector).reshape([-1 if i == dim else 1 for i in range(ndim)])


def rms(slot: Slot, x: Array) -> Array:
    """The root of the mean square of a leaf, of each layer in a stack by itself (broadcastable).

    A constant to a gradient: that of the root at zeros is no number.
    """
    over = [i for i, dim in enumerate(slot.dims) if dim.role != "stack"]
    return jnp.sqrt(jnp.mean(jnp.square(jax.lax.stop_gradient(x)), over, keepdims=True))


def scaled(slot: Slot, x: Array, factor: Any) -> Array:
    """A leaf times a factor; where its module computes with `1 + w`, that is what is multiplied."""
    return slot.origin + factor * (x - slot.origin) if slot.origin else factor * x


@dataclasses.dataclass(frozen=True)
class Rows(Finish):
    """New rows of the tables and heads of a vocabulary, around the mean of the rows in use.

    - `used`: how many old rows are counted, from the first on.
    - `spread`: the multiple of their covariance that new rows are drawn with; 0 draws nothing.
    """

    used: int
    spread: float = 0.0

    def applied(self, move, slot, old, new, *, key):
        """Every NONE row of a parameter is the mean of old rows, plus a draw of their covariance."""
        if slot.kind != "param":
            return new
        for dim in slot.positions(move.axis):
            rows = jax.lax.slice_in_dim(old, 0, self.used, axis=dim)
            mean = jnp.mean(rows, dim, keepdims=True)
            value = jnp.broadcast_to(mean, new.shape)
            if self.spread:
                (ids,) = np.nonzero(move.source == NONE)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(drawn(key=key), jnp.asarray(ids))
                centred = jnp.moveaxis(rows - mean, dim, 0)

                def draw(key, centred=centred):
                    # Normal multiples of the centred rows have their covariance, and no factor of it
                    # has to be computed
                    normal = jax.random.normal(key, (self.used,), centred.dtype)
                    return jnp.tensordot(normal, centred, 1) * (self.spread / self.used) ** 0.5

                noise = jnp.moveaxis(jax.lax.map(draw, keys), 0, dim)
                index = (slice(None),) * dim + (ids,)
                value = value.at[index].add(noise)
            new = jnp.where(across(move.source == NONE, new.ndim, dim), value, new)
        return new


@dataclasses.dataclass(frozen=True)
class Places(Finish):
    """New rows of a table of positions, from the old rows from `first` on: "tile" or "interpolate"."""

    how: str
    first: int = 0

    def applied(self, move, slot, old, new, *, key):
        """Rows of the old table again and again, or on straight lines between its rows."""
        del key
        if slot.kind != "param":
            return new
        place = np.maximum(np.arange(move.length) - self.first, 0)
        for dim in slot.positions(move.axis):
            count = old.shape[dim] - self.first
            fresh = across(move.source == NONE, new.ndim, dim)
            if self.how == "tile":
                rows = jnp.take(old, self.first + place % count, axis=dim)
            else:
                at = place * (count - 1) / max(place[-1], 1)  # the ends stay the ends
                low = np.minimum(at.astype(int), max(count - 2, 0))
                weight = across((at - low).astype(old.dtype), new.ndim, dim)
                below = jnp.take(old, self.first + low, axis=dim)
                above = jnp.take(old, self.first + np.minimum(low + 1, count - 1), axis=dim)
                rows = below + weight * (above - below)
            new = jnp.where(fresh, rows, new)
        return new


@dataclasses.dataclass(frozen=True)
class Noise(Finish):
    """Noise on what consumes an axis, which cancels between the copies of each coordinate.

    - `size`: its deviation, as a multiple of the root mean square of the copied weights.
    - `kind`: `"paired"` adds a draw to one copy and subtracts it from the next, and an odd last copy
      stays as it is (HyperCloning). `"projected"` draws for every copy, and subtracts the mean (LEMON).
    """

    size: float
    kind: str

    def applied(self, move, slot, old, new, *, key):
        """Noise on every consumed dimension: copies of one coordinate have one value, so it cancels."""
        del old
        if slot.kind != "param":
            return new
        scale = self.size * rms(slot, new)
        for dim in slot.positions(move.axis):
            if slot.dims[dim].role == "consumed":
                here = jax.random.fold_in(drawn(key=key), dim)
                normal = jax.random.normal(here, new.shape, new.dtype)
                new = new + scale * self._cancelling(move.source, normal, dim)
        return new

    def _cancelling(self, source: np.ndarray, normal: Array, dim: int) -> Array:
        """Unit noise whose sum over the copies of each old coordinate is 0."""
        group = copy_groups(source, paired=self.kind == "paired")
        count = np.bincount(group[group >= 0], minlength=len(source))
        lone = (group < 0) | (count[group] < 2)
        # Less the mean of n draws, the variance is 1 - 1/n
        unit = np.where(lone, 0.0, np.sqrt(count[group] / np.maximum(count[group] - 1, 1)))
        moved = jnp.moveaxis(normal, dim, 0)
        sums = (
            jnp.zeros_like(moved)
            .at[np.where(lone, 0, group)]
            .add(moved * across(~lone, moved.ndim, 0))
        )
        mean = sums[group] / across(np.maximum(count[group], 1).astype(normal.dtype), moved.ndim, 0)
        unit = across(unit.astype(normal.dtype), moved.ndim, 0)
        return jnp.moveaxis((moved - mean) * unit, 0, dim)

    def undetermined(self, move, role):
        """Copies of producers get the noise of their consumers with their gradients."""
        del move
        if role in ("produced", "elementwise"):
            return (
                "copies are read with different noise, so each has a gradient of its own; only their sum "
                "follows"
            )
        return ""


def copy_groups(source: np.ndarray, *, paired: bool = False) -> np.ndarray:
    """`[new]` a number that copies of one old coordinate share; -1 where there is no source.

    With `paired` the first two copies of a coordinate share one, the next two another, and so on.
    """
    groups: dict[tuple[int, int], int] = {}
    ranks: dict[int, int] = {}
    numbers = []
    for old in map(int, source):
        rank = ranks.get(old, 0)
        ranks[old] = rank + 1
        share = (old, rank // 2 if paired else 0)
        numbers.append(-1 if old < 0 else groups.setdefault(share, len(groups)))
    return np.asarray(numbers)


@dataclasses.dataclass(frozen=True)
class Blend(Finish):
    """Old weights, shrunk, plus those of a new model; gains and biases stay (`gj.warm`).

    `order` are the axes whose maps reach a leaf: the last of those that it has blends it.
    """

    shrink: float
    perturb: float
    order: tuple[str, ...]

    def applied(self, move, slot, old, new, *, key):
        """New entries are 0 before the draw is added, so that it is added to all of them alike."""
        del old
        if slot.kind != "param" or slot.init != "normal":
            return new
        where = slot.positions(move.axis)
        for dim in where:
            new = jnp.where(across(np.asarray(move.source) == NONE, new.ndim, dim), 0, new)
        if move.axis != [axis for axis in self.order if slot.positions(axis)][-1]:
            return new
        fan_in = math.prod(slot.fan(new.shape))
        deviation = self.perturb * (0.02 if fan_in == 1 else fan_in**-0.5)
        return self.shrink * new + deviation * jax.random.normal(
            drawn(key=key), new.shape, new.dtype
        )


@dataclasses.dataclass(frozen=True)
class Multiplied(Finish):
    """Multipliers of some arrays in new layers: pairs of a name or pattern of paths, and a number."""

    scales: tuple[tuple[str, float], ...]

    def applied(self, move, slot, old, new, *, key):
        """The product of all multipliers that match the array, at new coordinates."""
        del old, key
        if slot.kind != "param":
            return new
        scale = math.prod(number for name, number in self.scales if matches(slot.path, name))
        for dim in slot.positions(move.axis):
            factor = np.where(move.is_new(), scale, 1.0).astype(new.dtype)
            new = scaled(slot, new, across(factor, new.ndim, dim))
        return new


def matches(path: str, name: str) -> bool:
    """Whether an array is meant: by the last part of its path, by its whole path, or by a pattern."""
    return path.rpartition(".")[2] == name or fnmatch.fnmatchcase(path, name)
