"""The parts of a grown model, and the learning rate and weight decay of each.

A part is the coordinates that one growth added, or all those older than the last growth. An entry of an
array belongs to the part of its youngest coordinate (`growjax.growth.births`), so one array can have
several parts: the old rows of a matrix may be frozen while its new ones train.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from growjax.axes import Slot, axes_of, find, put
from growjax.errors import StateError
from growjax.growth import Births
from growjax.growth.births import MIXED
from growjax.values import Faults, at_least, check, fits, register


def _point_faults(points: Any) -> Iterator[str]:
    numbers = [fits(float, x) and x >= 0 for point in points for x in point]
    if not points or not all(len(point) == 2 for point in points) or not all(numbers):
        yield "points: expected pairs of a step and a multiple of the rate, both 0 or more"
    elif any(b[0] <= a[0] for a, b in zip(points, points[1:], strict=False)):
        yield f"points: expected steps that rise, got {[step for step, _ in points]}"


@register
@dataclasses.dataclass(frozen=True)
class Curve:
    """A multiple of the learning rate that changes with the steps since a growth.

    Straight lines between points `(step, multiple)`; constant before the first and after the last one.

    **Example**

        Curve(((0, 0.0), (100, 1.0)))                    # warm up again
        Curve(((0, 1.0), (200, 1.3), (1000, 1.0)))       # as SPARKLING does with new coordinates
    """

    points: Annotated[
        tuple[tuple[float, ...], ...],
        Faults("points such as ((0, 0.0), (100, 1.0))", _point_faults),
    ]

    def __post_init__(self):
        check(self, StateError)

    def at(self, step: Any) -> Array:
        """The multiple `step` steps after the growth, where `step` may be traced and may be an array."""
        steps, multiples = np.asarray(self.points, np.float32).T
        return jnp.interp(jnp.asarray(step, jnp.float32), steps, multiples)


Multiple = Annotated[float, at_least(0)]


@register
@dataclasses.dataclass(frozen=True)
class Part:
    """How one part of a model trains.

    - `rate`: a multiple of the learning rate. 0 freezes the part.
    - `decay`: a multiple of the weight decay.
    """

    rate: Multiple | Curve = 1.0
    decay: Multiple = 1.0

    def __post_init__(self):
        check(self, StateError)

    @property
    def frozen(self) -> bool:
        """Whether the entries of the part stay unchanged, bit by bit."""
        return not isinstance(self.rate, Curve) and self.rate == 0


Share = Part | Curve | Multiple


def _growth_faults(growths: Any) -> Iterator[str]:
    numbers = [number for number, _ in growths]
    if any(not fits(int, number) or number < 0 for number in numbers):
        yield f"growths: expected their numbers, from 0 for the model's birth, got {numbers}"
    elif len(set(numbers)) < len(numbers):
        yield f"growths: expected each number once, got {numbers}"


@register
@dataclasses.dataclass(frozen=True)
class Parts:
    """How the parts of a grown model train, for `Stage(train=...)` and `growjax.optim.parts`.

    **Fields**

    - `new`: the setting of the coordinates that the last growth added.
    - `old`: the setting of all older coordinates.
    - `growths`: pairs of a growth's number (0: the model's birth) and the setting of the coordinates that
      it added, which overrides `new` and `old`.

    A setting is a `Part`, or its rate alone: a multiple of the learning rate, where 0 freezes the part,
    or a `Curve` over the steps since that growth (for `old`: since the last one). Raises `StateError`
    that lists every field out of range.

    **Example**

        Parts(old=0.0)                                            # train the new part alone
        Parts(new=Curve(((0, 0.0), (100, 1.0))), old=Part(0.1, decay=0.0))
        Parts(growths=((1, 0.0),))                                # freeze what growth 1 added
    """

    new: Share = 1.0
    old: Share = 1.0
    growths: Annotated[
        tuple[tuple[int, Share], ...],
        Faults("pairs of a growth's number and how its part trains", _growth_faults),
    ] = ()

    def __post_init__(self):
        check(self, StateError)

    def named(self) -> dict[str | int, Part]:
        """Every part by its name: "old" and "new", then the numbers of the growths in `growths`."""
        return {"old": _part(self.old), "new": _part(self.new)} | {
            number: _part(share) for number, share in self.growths
        }

    @property
    def freezes(self) -> bool:
        """Whether some part is frozen."""
        return any(part.frozen for part in self.named().values())


def _part(share: Share) -> Part:
    return share if isinstance(share, Part) else Part(share)


# Entries -------------------------------------------------------------------------------------


# The updates since a growth, given by its number (None: the last one), for the entries of a leaf
Time = Callable[[Slot, int | None], Any]


class Division(NamedTuple):
    """The division of the entries of parameters into parts, at one step.

    - `births`: the births of coordinates; NumPy arrays, or traced ones.
    - `time`: the number of updates since a growth.
    """

    parts: Parts
    births: Births
    time: Time

    def frozen(self, params: Any) -> dict[tuple, Any]:
        """A mask of the frozen entries of every parameter, broadcastable to it: `{steps: mask}`."""
        table, masks = axes_of(params), {}
        for slot in table.params():
            mask: Any = np.zeros((1,) * len(slot.spec.groups), bool)
            for part, entries in self._entries(slot, table.sizes):
                mask = _where(entries, part.frozen, mask)
            masks[slot.steps] = mask & self._grown
        return masks

    def rates(self, params: Any) -> dict[tuple, Any]:
        """The multiples of the learning rate, by parameter and broadcastable to it.

        The entries of a frozen part have 1 here. Leaves whose multiples are all 1 are left out.
        """

        def rate(slot: Slot, name: str | int, part: Part) -> Any:
            if not isinstance(part.rate, Curve):
                return 1.0 if part.frozen else part.rate
            return part.rate.at(self.time(slot, None if isinstance(name, str) else name))

        return self._multiples(params, rate)

    def decays(self, params: Any) -> dict[tuple, Any]:
        """The multiples of the weight decay, in the form of `rates`."""
        return self._multiples(params, lambda slot, name, part: part.decay)

    def _multiples(self, params: Any, of: Callable[[Slot, str | int, Part], Any]) -> dict:
        named, table = self.parts.named(), axes_of(params)
        multiples = {}
        for slot in table.params():
            values = [of(slot, name, part) for name, part in named.items()]
            if all(isinstance(value, float | int) and value == 1 for value in values):
                continue
            multiple: Any = np.ones((1,) * len(slot.spec.groups), np.float32)
            for (_, entries), value in zip(self._entries(slot, table.sizes), values, strict=True):
                multiple = jnp.where(entries, jnp.asarray(value, jnp.float32), multiple)
            # A model that has not grown has no old or new entries
            multiples[slot.steps] = jnp.where(self._grown, multiple, 1)
        return multiples

    @property
    def _grown(self) -> Any:
        return self.births.growths > 0

    def _entries(self, slot: Slot, sizes: Mapping[str, int]) -> Iterator[tuple[Part, Any]]:
        """Every part with the mask of its entries in a leaf; later parts override earlier ones."""
        births = self.births.of_entries(slot, sizes)
        for name, part in self.parts.named().items():
            number = self.births.growths if isinstance(name, str) else name
            old = (births != number) & (births != MIXED)
            yield part, old if name == "old" else births == number


def _where(entries: Any, value: bool, mask: Any) -> Any:
    xp = np if isinstance(entries, np.ndarray) and isinstance(mask, np.ndarray) else jnp
    return xp.where(entries, value, mask)


# Weight decay --------------------------------------------------------------------------------


class Decays:
    """Multiples of the weight decay for `decayed_weights`; `used` is True once it has applied them."""

    def __init__(self, multiples: Mapping[tuple, Any]):
        self.multiples, self.used = multiples, False

    def of(self, tree: Any) -> Any:
        """The decay terms `tree`, each entry times its multiple."""
        self.used = True
        times = {
            steps: x * jnp.asarray(multiple, x.dtype)
            for steps, multiple in self.multiples.items()
            if hasattr(x := find(tree, steps), "dtype")
        }
        return put(tree, times)


def decayed_weights(weight_decay: float, mask: Any = None) -> Any:
    """`optax.add_decayed_weights` with a multiple of the decay for each part of `growjax.optim.parts`.

    An `optax.GradientTransformationExtraArgs` for parameters that carry axes. `growjax.optim.adamw` and
    the optimizers of plans include it.

    **Example**

        tx = optax.chain(optax.scale_by_lion(), optim.decayed_weights(0.1), optax.scale(-1e-4))
        tx = optim.parts(tx, new=optim.Part(decay=0.0))
    """
    import jax
    import optax

    plain = optax.add_decayed_weights(weight_decay, mask)

    def update(updates, state, params=None, *, decays: Decays | None = None, **_):
        if decays is None:
            return plain.update(updates, state, params)
        # Applied to updates of zero, it returns the decay terms alone
        added, state = plain.update(jax.tree.map(jnp.zeros_like, updates), state, params)
        return jax.tree.map(jnp.add, updates, decays.of(added)), state

    return optax.GradientTransformationExtraArgs(plain.init, update)  # type: ignore[arg-type]
