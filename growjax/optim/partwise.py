"""Updates of a model part by part: some parts have their own rates, some are frozen, bit by bit.

The trained entries move as if the frozen ones did not exist: the optimizer gets zero gradients, zero
weights and a blank state for frozen entries, so that a norm it clips by covers the moving entries alone.
The state of frozen entries is updated by their own gradients in a second call of the optimizer. When
they thaw, their moments are up to date with the step count and do not kick them.

A rule that mixes the entries of an array (factored moments, orthogonal steps) would count frozen rows as
small ones. A run on a toy shows whether a rule mixes: entries of a rule that does not move alike when
the array has further entries with zero gradients, and when other entries of the array get other
gradients (all small enough that nothing is clipped).
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
from growjax.optim.age import Since, just_born, oldest, youngest
from growjax.optim.cells import Cell, alike, cells
from growjax.optim.divided import Decays, Division, Parts, Share
from growjax.optim.probe import Traits, probe
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
from growjax.trees import abstract


_NEAR = 1e-8  # relative tolerance, in double precision
_TINY = 1e-5  # the size of gradients and weights that no optimizer clips
_LONGEST = 257  # updates


class PartsState(NamedTuple):
    """The state of the inner optimizer, the births of coordinates, and the updates since each."""

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
    """Train the coordinates that growth added, and the older ones, at rates and decays of their own.

    **Arguments**

    - `optimizer`: an optax transformation, learning rate included, or a `growjax.optim.Rule`.
    - `new`, `old`: the settings of the coordinates that the last growth added, and of all others: a
      `Part`, or its rate, which is a multiple of the learning rate or a `Curve` over the steps since the
      last growth. A rate of 0 freezes the part, bit by bit; `growjax.optim.partwise` describes how the
      optimizer treats frozen entries.
    - `growths`: the same for the coordinates of single growths, by the growth's number (0: the model's
      birth), with curves over the steps since that growth.

    Returns an optimizer of the same type. Its state records the births of coordinates, which `gj.carry`
    (and `gj.grow` of a `gj.State`) updates; before the first growth all entries train as usual. Use it
    from the first step on; other settings later (to thaw a part) are another `parts` on the same state.
    Raises `StateError` for a state of another optimizer, for rules that mix frozen entries with others
    (Adafactor, Muon), for a `decay` that no transformation in the chain accepts (see `decayed_weights`),
    and for rates of rules that average.

    **Example**

        tx = growjax.optim.parts(growjax.optim.adamw(1e-3, weight_decay=0.1), old=0.0)
        state = gj.State(model, tx.init(gj.partition(model)[0]))
        state = gj.grow(gj.stack(layers=12), state, optimizer=tx, key=key)     # now the new layers alone

    Wu et al. (2024), "LLaMA Pro: Progressive LLaMA with Block Expansion", train the new layers alone.
    """
    import optax

    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise StateError(
            "optimizer: expected an optax transformation or a growjax.optim.Rule, got "
            f"{optimizer!r}"
        )
    if not isinstance(growths or {}, Mapping):
        raise StateError(
            f"growths: expected a dict of a growth's number to its part, got {growths!r}"
        )
    plan = Parts(new, old, tuple((growths or {}).items()))
    tx: Any = optimizer if isinstance(optimizer, Rule) else optax.with_extra_args_support(optimizer)

    def init(params):
        births = jax.tree.map(jnp.asarray, Births.original(params))
        return PartsState(tx.init(params), births, just_born(params))

    def update(updates, state: PartsState, params=None, **more):
        if not isinstance(state, PartsState):
            raise StateError(
                f"state: expected that of parts(...).init, got {type(state).__name__}; births count from "
                "the first step, so use parts(optimizer), which changes nothing yet, before a growth"
            )
        sizes = axes_of(updates).sizes

        def time(slot: Slot, growth: int | None):
            if growth is None:
                return state.since.last
            return youngest(slot, state.since.of, sizes, oldest(state.since.of))

        division = Division(plan, state.births, time)
        # The original transformation, not `tx`: probe results are cached by this object
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
        raise StateError(
            "params: expected the parameters, whose axes define the parts; give them to update"
        )
    decays = Decays(division.decays(params))
    rates = division.rates(params)
    if rates and isinstance(optimizer, Rule) and optimizer.judged is not None:
        raise StateError(
            "rate: this rule averages its weights, so a scaled update would no longer match the average; "
            "its parts can be frozen (rate 0), but not slowed down or sped up"
        )
    if decays.multiples:
        more = {**more, "decays": decays}
    if not division.parts.freezes:
        updates, state = tx.update(gradient, state, params, **more)
    else:
        updates, state = _frozen(optimizer, tx, division, gradient, state, params, more)
    if decays.multiples and not decays.used:
        raise StateError(
            "decay: nothing in this optimizer takes a decay for each part; decay the weights by "
            "growjax.optim.decayed_weights or growjax.optim.adamw"
        )
    for steps, multiple in rates.items():
        u = find(updates, steps)
        updates = put(updates, {steps: u * jnp.asarray(multiple, u.dtype)})
    return updates, state


def _frozen(
    optimizer: Any, tx: Any, division: Division, gradient: Any, state: Any, params: Any, more: dict
) -> tuple[Any, Any]:
    """An update that leaves frozen entries as they are."""
    frozen = division.frozen(params)
    arrays = cells(state, params)
    all_traits = _traits(optimizer, params, arrays)
    refuse_mixing(optimizer, params, division)

    def without(tree: Any, blank: float = 0.0) -> Any:
        """A tree like the parameters with `blank` at its frozen entries; any other tree as it is."""
        if not alike(tree, params):
            return tree
        values = {}
        for steps, mask in frozen.items():
            leaf = find(tree, steps)
            if hasattr(leaf, "dtype"):
                values[steps] = _pick(mask, blank, leaf)
        return put(tree, values)

    # One update without the gradients, the state and the weights of frozen entries moves the others
    leaves, structure = jax.tree.flatten(state)
    bare = []
    for cell, traits, leaf in zip(arrays, all_traits, leaves, strict=True):
        if traits.shaped and cell.steps is not None and traits.initial is not None:
            leaf = _pick(frozen[cell.steps], traits.initial, leaf)
        bare.append(leaf)
    hidden = {name: without(value) for name, value in more.items()}
    updates, moved = tx.update(
        without(gradient), structure.unflatten(bare), without(params), **hidden
    )
    # A second update with all of them gives the state of frozen entries
    _, watched = tx.update(gradient, state, params, **more)
    after = []
    for cell, traits, old, own, other in zip(
        arrays, all_traits, leaves, jax.tree.leaves(moved), jax.tree.leaves(watched), strict=True
    ):
        if traits.shaped and cell.steps is not None:
            # Averages of weights and differences between weights stay, as the frozen weights do
            other = old if traits.law == WEIGHT else other
            own = _pick(frozen[cell.steps], other, own)
        elif cell.steps is not None:
            mask = frozen[cell.steps]
            own = other if isinstance(mask, np.ndarray) and mask.all() else own
        after.append(own)
    # Adding -0.0 leaves every bit of a weight, also of a weight of -0.0, which +0.0 would turn into 0.0
    return without(updates, -0.0), jax.tree.unflatten(jax.tree.structure(moved), after)


def _pick(mask: Any, chosen: Any, other: Any) -> Any:
    return jnp.where(mask, jnp.asarray(chosen, other.dtype), other)


def _traits(optimizer: Any, params: Any, arrays: list[Cell]) -> list[Traits]:
    """The measured traits of every array of the state."""
    remedy = "to freeze a part, choose parameters by rank or by path"
    return probe(optimizer, abstract(params), arrays).required(arrays, remedy)


# Rules that mix ------------------------------------------------------------------------------


def refuse_mixing(optimizer: Any, params: Any, division: Division) -> None:
    """Raise `StateError` if a rule mixes frozen entries of an array with others.

    `params` are parameters or their shapes. If the births are traced, every array counts as divided.
    """
    births = division.births.of
    known = all(isinstance(numbers, np.ndarray) for numbers in births.values())
    table = axes_of(params)
    slots = table.params()
    axes = [a for a in table.sizes if not known or len(np.unique(births[a])) > 1]
    frozen = division.frozen(params)

    def in_part(slot: Slot) -> bool:
        mask = frozen[slot.steps]
        if not isinstance(mask, np.ndarray):
            return bool(slot.dims)
        return bool(mask.any() and not mask.all())

    split = [slot for slot in slots if in_part(slot)]
    if not split:
        return
    mixed = _mixed(optimizer, params, tuple(axes))
    state = cells(jax.eval_shape(optimizer.init, abstract(params)), params)
    for cell, traits in zip(state, _traits(optimizer, params, state), strict=True):
        if cell.steps is not None and traits.reach in ("leaf", "all"):
            mixed.add(cell.steps)
    raise_all(
        StateError,
        "this optimizer mixes the entries of an array (factored moments, orthogonal steps, norms of "
        "tensors), so it cannot train some of them and freeze the others. Freeze whole layers or arrays, "
        "or train by a rule that works entry by entry, such as AdamW:",
        [slot.path for slot in split if slot.steps in mixed],
    )


def _mixed(optimizer: Any, params: Any, axes: tuple[str, ...]) -> set[tuple]:
    """The parameters whose entries mix along one of these axes."""
    slots = leaves_of(params)
    leaves, structure = jax.tree.flatten(toy(params, SIZE))
    # Every axis grows by a number of its own, so that the ratio of two sizes changes as well
    numbered = {axis: n for n, axis in enumerate(axes, 1)}
    more = {axis: numbered.get(axis, 0) for axis in axes_of(params).sizes}
    wide = toy(params, {axis: SIZE + n for axis, n in more.items()})
    mixed = _mixed_on_toy(
        optimizer, structure, tuple(leaves), jax.tree.structure(wide), tuple(more.items())
    )
    return {slot.steps for n, slot in enumerate(slots) if n in mixed}


@functools.lru_cache(maxsize=256)
def _mixed_on_toy(
    optimizer: Any, structure: Any, shapes: tuple, wide: Any, more: tuple[tuple[str, int], ...]
) -> frozenset[int]:
    slots = leaves_of(structure.unflatten(shapes))
    try:
        with aside():
            # One trial with gradients that are clipped and one with gradients too small for it, with
            # small weights as well, since weight decay may add them to the gradients
            arrays = [x.shape for x in shapes]
            trials = [trial(arrays, size, 0).lanes for size in (1.0, _TINY)]
            trials[1] = {
                name: Lane(lane.gradients, [_TINY * w for w in lane.weights])
                for name, lane in trials[1].items()
            }
            plain = [lanes["plain"] for lanes in trials]
            others = [_other_at(axis, trials[1], slots) for axis, n in more if n]
            small = Run(optimizer, structure, plain + others, updates=True)
            wide_lanes = [padded(lane, slots, dict(more)) for lane in plain]
            large = Run(optimizer, wide, wide_lanes, updates=True)
            return _differing(small, large, slots, dict(more))
    except StateError:
        raise
    except Exception as error:  # a user's transformation may raise any exception
        raise StateError(
            "optimizer: growjax runs it on a small copy of the parameters to learn whether it mixes "
            f"entries, and this failed: {type(error).__name__}: {error}"
        ) from error


def _differing(
    small: Run, large: Run, slots: list[Slot], more: Mapping[str, int]
) -> frozenset[int]:
    """The numbers of the leaves whose entries mix.

    The lanes of the small toy are the two plain ones and, for every axis, a copy of the second plain one
    with other values at that axis's last coordinate. The lanes of the large toy are the two plain ones,
    padded with zeros.
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
        # Not after the first step: it may agree by chance, as the signs of updates do
        if moved and step > PERIOD:
            return frozenset(differ)
    raise StateError(
        f"optimizer: it moved nothing in {_LONGEST} updates of a toy, so it does not show whether it "
        "mixes entries"
    )


def _near(a: np.ndarray, b: np.ndarray) -> bool:
    return np.allclose(a, b, rtol=_NEAR, atol=_NEAR * np.abs(a).max(initial=0))


def _at_last(axis: str, slot: Slot) -> np.ndarray:
    """The mask of the entries of a toy's leaf at the last coordinate of an axis."""
    axes = [dim.axis for dim in slot.dims if not dim.literal]
    last = {
        name: np.arange(SIZE) == SIZE - 1 if name == axis else np.zeros(SIZE, bool) for name in axes
    }
    mask = over_entries(slot, last, every(SIZE), np.logical_or, np.bool_(False))
    return np.broadcast_to(mask, slot.value.shape)


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
