"""Updates of a model part by part: some at rates of their own, some held still, bit by bit.

What trains does so as if it were all that there is: to the optimizer, frozen entries have no gradient, no
weight and no history, so that norms which clip see only what moves. Meanwhile what it remembers of
frozen entries goes on under their own gradients. Once they thaw they move on, and are not kicked by
moments that have lagged behind the step count.

Rules that mix the entries of an array (factored moments, orthogonal steps) would take frozen rows for
small ones. Whether a rule does is found on a toy: entries must move as before where there are further
ones to which nothing is fed, and where others of the same array are fed something else, as long as
nothing is so large that it is clipped.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from growjax.algebra import WEIGHT
from growjax.axes import Slot, axes_of, find, put
from growjax.errors import StateError, raise_all
from growjax.growth import Births
from growjax.growth.births import over_entries
from growjax.optim.age import Since, youngest
from growjax.optim.cells import Cell, alike, cells
from growjax.optim.divided import Decays, Division, Parts, Share
from growjax.optim.probe import Kept, probe
from growjax.optim.rules import Rule
from growjax.optim.toy import (
    PERIOD,
    SIZE,
    Lane,
    Run,
    aside,
    every,
    leaves_of,
    narrowed,
    numbers,
    padded,
    toy,
    trial,
)


_NEAR, _TINY = 1e-8, 1e-5  # relative, in double precision; a size that nothing clips
_LONGEST = 257  # updates


class PartsState(NamedTuple):
    """The state of what `parts` wraps, the births of coordinates, and how long ago these were."""

    inner: Any
    births: Births
    since: Since


def parts(
    optimizer: Any,
    *,
    new: Share = 1.0,
    old: Share = 1.0,
    growths: Mapping[int, Share] | None = None,
) -> Any:
    """Train what growth added, and what was there before, each in its own way.

    **Arguments**

    - `optimizer`: an optax transformation, learning rate included, or a `growjax.optim.Rule`.
    - `new`, `old`: how what the last growth added and all else trains: a `Part`, or its rate, which is a
      multiple of the learning rate or a `Curve` over the steps since the last growth. 0 holds the part
      still, bit by bit; see `growjax.optim.held` for what that means to the optimizer.
    - `growths`: the same for the coordinates of some growths, by their numbers (0: the model's birth),
      with curves over the steps since that growth.

    Gives the same kind of thing. Its state keeps the births of coordinates, which `gj.carry` (so
    `gj.grow` of a `gj.State`) moves; before the first growth all trains as usual. Raises `StateError` for
    rules that mix frozen entries with others (Adafactor, Muon), for a `decay` that nothing in the
    chain takes (see `decayed_weights`), and for rates of rules that average.

    **Example**

        tx = growjax.optim.parts(growjax.optim.adamw(1e-3, weight_decay=0.1), old=0.0)
        state = gj.State(model, tx.init(gj.partition(model)[0]))
        state = gj.grow(gj.stack(layers=12), state, optimizer=tx, key=key)     # now the new layers alone

    Wu et al. (2024), "LLaMA Pro: Progressive LLaMA with Block Expansion", train the new layers alone.
    """
    import optax

    plan = Parts(new, old, tuple((growths or {}).items()))
    tx: Any = optimizer if isinstance(optimizer, Rule) else optax.with_extra_args_support(optimizer)

    def init(params):
        sizes = axes_of(params).sizes
        births = jax.tree.map(jnp.asarray, Births.original(params))
        zeros = {axis: jnp.zeros(size, jnp.int32) for axis, size in sizes.items()}
        return PartsState(tx.init(params), births, Since(zeros, jnp.zeros((), jnp.int32)))

    def update(updates, state: PartsState, params=None, **more):
        sizes = axes_of(updates).sizes

        def time(slot: Slot, growth: int | None):
            if growth is None:
                return state.since.last
            # Nothing is older than the oldest coordinate that is still there
            oldest = [jnp.max(steps) for steps in state.since.of.values() if steps.size]
            return youngest(slot, state.since.of, sizes, functools.reduce(jnp.maximum, oldest))

        division = Division(plan, state.births, time)
        # The transformation as it was given: what is known of it is remembered by the object
        updates, inner = divided(optimizer, tx, division, updates, state.inner, params, **more)
        since = jax.tree.map(lambda steps: steps + 1, state.since)
        return updates, PartsState(inner, state.births, since)

    if isinstance(optimizer, Rule):
        judged = optimizer.judged

        def evaluated(params, state: PartsState):
            return params if judged is None else judged(params, state.inner)

        return Rule(init, update, None if judged is None else evaluated)
    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def divided(
    optimizer: Any, tx: Any, division: Division, gradient: Any, state: Any, params: Any, **more: Any
) -> tuple[Any, Any]:
    """One update of an optimizer, part by part: `(updates, state)`.

    `tx` is the optimizer with an update that takes further arguments.
    """
    if params is None:
        raise StateError("params: parts are told apart in the parameters; give them to update")
    decays = Decays(division.decays(params))
    rates = division.rates(params)
    if rates and isinstance(optimizer, Rule) and optimizer.judged is not None:
        raise StateError(
            "rate: this rule averages its weights, which ties where they move to how far; its parts can "
            "be frozen (rate 0), and not slowed down"
        )
    if decays.multiples:
        more = {**more, "decays": decays}
    if not division.parts.freezes:
        updates, state = tx.update(gradient, state, params, **more)
    else:
        updates, state = _held(optimizer, tx, division, gradient, state, params, more)
    if decays.multiples and not decays.used:
        raise StateError(
            "decay: nothing in this optimizer takes a decay for each part; let weights decay by "
            "growjax.optim.decayed_weights or growjax.optim.adamw"
        )
    for steps, multiple in rates.items():
        u = find(updates, steps)
        updates = put(updates, {steps: u * jnp.asarray(multiple, u.dtype)})
    return updates, state


def _held(
    optimizer: Any, tx: Any, division: Division, gradient: Any, state: Any, params: Any, more: dict
) -> tuple[Any, Any]:
    """An update under which frozen entries stay as they are."""
    frozen = division.frozen(params)
    arrays = cells(state, params)
    kept = _kept(optimizer, params, arrays)
    refuse_mixing(optimizer, params, division)

    def without(tree: Any, blank: float = 0.0) -> Any:
        """A tree like the parameters with a number at its frozen entries; anything else as it is."""
        if not alike(tree, params):
            return tree
        values = {}
        for steps, mask in frozen.items():
            leaf = find(tree, steps)
            if hasattr(leaf, "dtype"):
                values[steps] = _pick(mask, blank, leaf)
        return put(tree, values)

    # What trains sees nothing of what does not, neither now nor in what is remembered
    leaves, structure = jax.tree.flatten(state)
    bare = []
    for cell, k, leaf in zip(arrays, kept, leaves, strict=True):
        if k.shaped and cell.steps is not None and k.initial is not None:
            leaf = _pick(frozen[cell.steps], k.initial, leaf)
        bare.append(leaf)
    hidden = {name: without(value) for name, value in more.items()}
    updates, moved = tx.update(
        without(gradient), structure.unflatten(bare), without(params), **hidden
    )
    _, watched = tx.update(gradient, state, params, **more)
    after = []
    for cell, k, old, own, other in zip(
        arrays, kept, leaves, jax.tree.leaves(moved), jax.tree.leaves(watched), strict=True
    ):
        if k.shaped and cell.steps is not None:
            # What holds weights, or how far they are apart, stays with the weights
            other = old if k.law == WEIGHT else other
            own = _pick(frozen[cell.steps], other, own)
        elif cell.steps is not None:
            whole = frozen[cell.steps]
            own = other if isinstance(whole, np.ndarray) and whole.all() else own
        after.append(own)
    # Minus zero: added to anything, a minus zero too, it leaves every bit
    return without(updates, -0.0), jax.tree.unflatten(jax.tree.structure(moved), after)


def _pick(mask: Any, chosen: Any, other: Any) -> Any:
    return jnp.where(mask, jnp.asarray(chosen, other.dtype), other)


def _kept(optimizer: Any, params: Any, arrays: list[Cell]) -> list[Kept]:
    """What every array of the state holds."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    kept = probe(optimizer, shapes, arrays).of(arrays)
    raise_all(
        StateError,
        "which parameters the optimizer keeps arrays for depends on their sizes, so what these hold is "
        "not known, and no part can be frozen:",
        [f"state{cell.name}" for cell, k in zip(arrays, kept, strict=True) if k is None],
    )
    return [k for k in kept if k is not None]


# Rules that mix ------------------------------------------------------------------------------


def refuse_mixing(optimizer: Any, params: Any, division: Division) -> None:
    """Raise `StateError` if a rule mixes frozen entries of an array with others.

    `params` are parameters or their shapes. With births that are traced any array may be divided.
    """
    births = division.births.of
    known = all(isinstance(numbers, np.ndarray) for numbers in births.values())
    table = axes_of(params)
    slots = [slot for slot in table.of_kind("param") if slot.arrays()]
    axes = [a for a in table.sizes if not known or len(np.unique(births[a])) > 1]
    frozen = division.frozen(params)

    def in_part(slot: Slot) -> bool:
        mask = frozen[slot.steps]
        if not isinstance(mask, np.ndarray):
            return bool(slot.dims)
        return bool(mask.any() and not mask.all())

    split = [slot for slot in slots if in_part(slot)]
    mixed = _mixed(optimizer, params, tuple(axes)) if split else set()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = cells(jax.eval_shape(optimizer.init, shapes), params) if split else []
    for cell, k in zip(state, _kept(optimizer, params, state) if split else [], strict=True):
        if cell.steps is not None and k.reach in ("leaf", "all"):
            mixed.add(cell.steps)
    raise_all(
        StateError,
        "this optimizer mixes the entries of an array (factored moments, orthogonal steps, norms of "
        "tensors), so none can be left out while others of the same array train. Freeze whole layers "
        "or arrays, or train by a rule that works entry by entry, such as AdamW:",
        [slot.path for slot in split if slot.steps in mixed],
    )


def _mixed(optimizer: Any, params: Any, axes: tuple[str, ...]) -> set[tuple]:
    """The parameters whose entries mix along one of these axes."""
    slots = leaves_of(params)
    leaves, structure = jax.tree.flatten(toy(params, SIZE))
    # Each axis by another number, so that the ratio of two sizes changes as well
    numbered = {axis: n for n, axis in enumerate(axes, 1)}
    more = {axis: numbered.get(axis, 0) for axis in axes_of(params).sizes}
    wide = toy(params, {axis: SIZE + n for axis, n in more.items()})
    found = _mixed_on_toy(
        optimizer, structure, tuple(leaves), jax.tree.structure(wide), tuple(more.items())
    )
    return {slot.steps for n, slot in enumerate(slots) if n in found}


@functools.lru_cache(maxsize=256)
def _mixed_on_toy(
    optimizer: Any, structure: Any, shapes: tuple, wide: Any, more: tuple[tuple[str, int], ...]
) -> frozenset[int]:
    slots = leaves_of(structure.unflatten(shapes))
    try:
        with aside():
            # Large enough to be clipped, and too small for it; weights as well, which decay may add
            arrays = [x.shape for x in shapes]
            trials = [trial(arrays, size, 0).lanes for size in (1.0, _TINY)]
            trials[1] = {
                name: Lane(lane.gradients, [_TINY * w for w in lane.weights])
                for name, lane in trials[1].items()
            }
            plain = [lanes["plain"] for lanes in trials]
            others = [_other_at(axis, trials[1], slots) for axis, n in more if n]
            small = Run(optimizer, structure, plain + others, updates=True)
            fed = [padded(lane, slots, dict(more)) for lane in plain]
            large = Run(optimizer, wide, fed, updates=True)
            return _differing(small, large, slots, dict(more))
    except StateError:
        raise
    except Exception as error:  # whatever a transformation of the user's may raise
        raise StateError(
            "optimizer: whether it mixes entries is seen by running it on a small copy of the "
            f"parameters, which failed: {type(error).__name__}: {error}"
        ) from error


def _differing(
    small: Run, large: Run, slots: list[Slot], more: Mapping[str, int]
) -> frozenset[int]:
    """The leaves whose entries mix, once anything has moved.

    The lanes of the smaller toy are two plain ones and, for every axis, the second one with other values
    at that axis's last coordinate.
    """
    differ: set[int] = set()
    for step in range(1, _LONGEST + 1):
        small.until(step)
        large.until(step)
        moved = False
        for n, (slot, a, b) in enumerate(
            zip(slots, numbers(small.updates), numbers(large.updates), strict=True)
        ):
            moved = moved or bool(np.any(a[:2]))
            if not _near(a[:2], np.stack([narrowed(x, slot, more) for x in b])):
                differ.add(n)
            for lane, axis in enumerate((axis for axis, extra in more.items() if extra), 2):
                first = ~_at_last(axis, slot)
                if slot.positions(axis) and not _near(a[1][first], a[lane][first]):
                    differ.add(n)
        # Some steps more than one: the first may be alike by chance, as signs are
        if moved and step > PERIOD:
            return frozenset(differ)
    raise StateError(
        f"optimizer: it moved nothing in {_LONGEST} updates of a toy, so whether it mixes entries cannot "
        "be seen"
    )


def _near(a: np.ndarray, b: np.ndarray) -> bool:
    return np.allclose(a, b, rtol=_NEAR, atol=_NEAR * np.abs(a).max(initial=0))


def _at_last(axis: str, slot: Slot) -> np.ndarray:
    """Which entries of a toy's leaf are at the last coordinate of an axis."""
    axes = [dim.axis for dim in slot.dims if not dim.literal]
    last = {
        name: np.arange(SIZE) == SIZE - 1 if name == axis else np.zeros(SIZE, bool) for name in axes
    }
    where = over_entries(slot, last, every(SIZE), np.logical_or, np.bool_(False))
    return np.broadcast_to(where, slot.value.shape)


def _other_at(axis: str, lanes: Mapping[str, Lane], slots: list[Slot]) -> Lane:
    """The plain lane, with other gradients and weights at the last coordinate of an axis."""

    def mixed(values: list[np.ndarray], others: list[np.ndarray]) -> list[np.ndarray]:
        return [
            np.where(_at_last(axis, slot), other, x)
            for slot, x, other in zip(slots, values, others, strict=True)
        ]

    plain = lanes["plain"]
    return Lane(
        mixed(plain.gradients, lanes["other gradients"].gradients),
        mixed(plain.weights, lanes["other weights"].weights),
    )
