"""The parts of a grown model, and at which rate and decay each of them trains.

A part is what one growth added, or what was there before the last one. An entry of an array belongs to
the part of its youngest coordinate (`growjax.growth.births`), so parts lie within arrays: the old rows of
a matrix may rest while its new ones train.
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
        """The multiple so many steps after the growth; the step may be traced, and an array."""
        steps, multiples = np.asarray(self.points, np.float32).T
        return jnp.interp(jnp.asarray(step, jnp.float32), steps, multiples)


Multiple = Annotated[float, at_least(0)]


@register
@dataclasses.dataclass(frozen=True)
class Part:
    """How one part of a model trains.

    - `rate`: a multiple of the learning rate. 0 holds the part still.
    - `decay`: a multiple of the weight decay.
    """

    rate: Multiple | Curve = 1.0
    decay: Multiple = 1.0

    def __post_init__(self):
        check(self, StateError)

    @property
    def frozen(self) -> bool:
        """Whether its entries stay as they are, bit by bit."""
        return not isinstance(self.rate, Curve) and self.rate == 0


Share = Part | Curve | Multiple


def _growth_faults(growths: Any) -> Iterator[str]:
    numbers = [number for number, _ in growths]
    if any(not fits(int, number) or number < 0 for number in numbers):
        yield f"growths: expected their numbers, 0 for the model's birth, got {numbers}"
    elif len(set(numbers)) < len(numbers):
        yield f"growths: expected each number once, got {numbers}"


@register
@dataclasses.dataclass(frozen=True)
class Parts:
    """How the parts of a model that has grown train: `Stage(train=...)`, `growjax.optim.parts`.

    **Fields**

    - `new`: what the last growth added.
    - `old`: all that was there before it.
    - `growths`: pairs of a number and what holds for that growth's coordinates instead, 0 being the
      model's birth.

    Each is a `Part`, or its rate alone: a multiple of the learning rate, where 0 holds the part still,
    or a `Curve` over the steps since that growth (for `old`: since the last one). Raises `StateError`
    that lists every field out of range.

    **Example**

        Parts(old=0.0)                                            # train the new part alone
        Parts(new=Curve(((0, 0.0), (100, 1.0))), old=Part(0.1, decay=0.0))
        Parts(growths=((1, 0.0),))                                # hold what the first growth added
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
        """Every part: "old" and "new", then the growths that have one of their own."""
        return {"old": _part(self.old), "new": _part(self.new)} | {
            number: _part(share) for number, share in self.growths
        }

    @property
    def freezes(self) -> bool:
        """Whether some part stays as it is."""
        return any(part.frozen for part in self.named().values())


def _part(share: Share) -> Part:
    return share if isinstance(share, Part) else Part(share)


# Entries -------------------------------------------------------------------------------------


# How many updates ago a growth was, by its number (None: the last one), for the entries of a leaf
Time = Callable[[Slot, int | None], Any]


class Division(NamedTuple):
    """Which part every entry of some parameters belongs to, at one step.

    - `births`: arrays of NumPy, or of a trace.
    - `time`: how many updates ago a growth was.
    """

    parts: Parts
    births: Births
    time: Time

    def frozen(self, params: Any) -> dict[tuple, Any]:
        """For every parameter which of its entries stay as they are: `{steps: mask}`, broadcastable."""
        masks = {}
        for slot, sizes in _leaves(params):
            mask: Any = np.zeros((1,) * len(slot.spec.groups), bool)
            for part, of in self._of(slot, sizes):
                mask = _where(of, part.frozen, mask)
            masks[slot.steps] = mask & self._grown
        return masks

    def rates(self, params: Any) -> dict[tuple, Any]:
        """The multiple of the learning rate of every entry, of parts that train: broadcastable.

        A part that is frozen counts 1 here. Leaves whose entries all train at the rate are left out.
        """

        def rate(slot: Slot, name: str | int, part: Part) -> Any:
            if not isinstance(part.rate, Curve):
                return 1.0 if part.frozen else part.rate
            return part.rate.at(self.time(slot, None if isinstance(name, str) else name))

        return self._multiples(params, rate)

    def decays(self, params: Any) -> dict[tuple, Any]:
        """The multiple of the weight decay of every entry, as `rates`."""
        return self._multiples(params, lambda slot, name, part: part.decay)

    def _multiples(self, params: Any, of: Callable[[Slot, str | int, Part], Any]) -> dict:
        named = self.parts.named()
        multiples = {}
        for slot, sizes in _leaves(params):
            values = [of(slot, name, part) for name, part in named.items()]
            if all(isinstance(value, float | int) and value == 1 for value in values):
                continue
            multiple: Any = np.ones((1,) * len(slot.spec.groups), np.float32)
            for (_, chosen), value in zip(self._of(slot, sizes), values, strict=True):
                multiple = jnp.where(chosen, jnp.asarray(value, jnp.float32), multiple)
            # Before the first growth nothing is old or new
            multiples[slot.steps] = jnp.where(self._grown, multiple, 1)
        return multiples

    @property
    def _grown(self) -> Any:
        return self.births.growths > 0

    def _of(self, slot: Slot, sizes: Mapping[str, int]) -> Iterator[tuple[Part, Any]]:
        """Every part and the entries of a leaf that are of it; a later one counts."""
        births = self.births.of_entries(slot, sizes)
        for name, part in self.parts.named().items():
            number = self.births.growths if isinstance(name, str) else name
            old = (births != number) & (births != MIXED)
            yield part, old if name == "old" else births == number


def _leaves(params: Any) -> Iterator[tuple[Slot, Mapping[str, int]]]:
    table = axes_of(params)
    for slot in table.of_kind("param"):
        if slot.arrays():
            yield slot, table.sizes


def _where(of: Any, value: bool, mask: Any) -> Any:
    xp = np if isinstance(of, np.ndarray) and isinstance(mask, np.ndarray) else jnp
    return xp.where(of, value, mask)


# Weight decay --------------------------------------------------------------------------------


class Decays:
    """Multiples of the weight decay for `decayed_weights`; `used` once somebody has asked for them."""

    def __init__(self, multiples: Mapping[tuple, Any]):
        self.multiples, self.used = multiples, False

    def of(self, tree: Any) -> Any:
        """What is to be added to updates for decay, times the multiple of every entry."""
        self.used = True
        times = {
            steps: x * jnp.asarray(multiple, x.dtype)
            for steps, multiple in self.multiples.items()
            if hasattr(x := find(tree, steps), "dtype")
        }
        return put(tree, times)


def decayed_weights(weight_decay: float, mask: Any = None) -> Any:
    """`optax.add_decayed_weights`, of which `growjax.optim.parts` can ask more or less for one part.

    An `optax.GradientTransformationExtraArgs` for parameters that carry axes. `growjax.optim.adamw` and
    the optimizers of plans have it already.

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
        # What it adds to nothing
        added, state = plain.update(jax.tree.map(jnp.zeros_like, updates), state, params)
        return jax.tree.map(jnp.add, updates, decays.of(added)), state

    return optax.GradientTransformationExtraArgs(plain.init, update)  # type: ignore[arg-type]
