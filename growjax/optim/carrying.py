"""Growth of optimizer state: every array moves by the scaling law that a probe measures."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from growjax import algebra, maps
from growjax.algebra import WEIGHT, AxisMap, Law
from growjax.axes import Axes, Slot, axes_of, get, partition, put
from growjax.errors import StateError, expect_one_of, raise_all
from growjax.growth.births import dealt_births, merged_births, moved_births
from growjax.growth.operator import Chain, Operator, atoms
from growjax.optim.age import grown_age
from growjax.optim.cells import Cell, cells
from growjax.optim.probe import Traits, probe
from growjax.values import check_key


def carry(
    op: Operator | Chain,
    state: Any,
    model: Any,
    *,
    optimizer: Any,
    key: PRNGKeyArray | None = None,
    copies: Literal["dual", "zero"] = "dual",
) -> Any:
    """The optimizer state of the grown model, for any optax transformation or rule of growjax.

    The optimizer runs on a toy (`growjax.optim.probe`) to measure how each array of its state scales;
    the names of arrays play no part. Each moves by the power of the map, or of its dual, that it scales
    with: averages of gradients by the share on the opposite side from the weights, averages of squared
    gradients by the square of that share, traces of normalised updates by its sign, and averages of the
    weights and differences between them as the weights do. Fresh coordinates start as in a fresh run:
    from zero, from the initial constant of an accumulator, or from their own weight. Step counts,
    schedules and hyper-parameters stay as they are, and so do sums over entries (a norm of gradients)
    unless coordinates are copied with their history. The births in the state of `growjax.optim.parts`
    record one more growth. Plain `optax.adam` corrects the zero moment of a new weight by the old step
    count, which moves it by up to 6.6 times the learning rate; `growjax.optim.adamw` counts an age for
    every coordinate instead.

    **Arguments**

    - `op`: the operator that `model` is about to be grown by.
    - `state`: the state that `optimizer.init(gj.partition(model)[0])` and later updates returned.
    - `optimizer`: the whole transformation that made `state`, or a `growjax.optim.Rule`.
    - `key`: the key of `gj.grow`; an average of the weights starts from fresh weights drawn with it.
    - `copies`: "dual": copied coordinates inherit the state of their source. "zero": they start anew, at
      age 0, as fresh coordinates do.

    Raises `StateError` that lists every array which cannot be carried: because copies or shares would
    change a norm or another mix of entries, because the array scales with no power of the gradients or
    weights (as gradients with weights added to them), or because it has another shape than its parameter,
    which grows (factored moments); also if the optimizer cannot be run on a toy. Clipping and the small
    constants of optimizers (`eps`) are neglected: a contribution that was clipped stays clipped.

    **Example**

        state = gj.carry(op, state, small, optimizer=tx, key=key)
        big = gj.grow(op, small, key=key)
    """
    if not isinstance(op, Operator | Chain):
        raise StateError(f"op: expected an operator such as gj.msg(mlp=2048), got {op!r}")
    check_key(key, StateError)
    expect_one_of(StateError, "copies", copies, ("dual", "zero"))
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise StateError(
            f"optimizer: expected the optax transformation or growjax.optim.Rule that made the state, "
            f"got {optimizer!r}"
        )
    optimizer = _hashable(optimizer)
    shapes = eqx.filter_eval_shape(lambda m: m, model)
    arrays = _probed_arrays(optimizer, state, shapes)
    # The model's values are needed only for an array that starts from fresh weights
    needs_values = any(traits.shaped and traits.initial is None for _, traits in arrays)
    model = model if needs_values else shapes
    return _jitted(op, jax.tree.leaves(state), model, key, optimizer, arrays, copies)


def _hashable(optimizer: Any) -> Any:
    """The optimizer; if it has no hash (a dataclass), its methods, which are told apart by object."""
    import optax

    try:
        hash(optimizer)
    except TypeError:
        return optax.GradientTransformation(optimizer.init, optimizer.update)
    return optimizer


class _ProbedArray(NamedTuple):
    """An array of the state: its place in the state, and its measured traits."""

    cell: Cell
    traits: Traits


def _probed_arrays(optimizer: Any, state: Any, model: Any) -> tuple[_ProbedArray, ...]:
    """Every leaf of a state with its traits; raises `StateError` if another optimizer made the state."""
    params = partition(model)[0]
    initial = _initial(optimizer, params)
    own, expected_cells = _named(initial, params), cells(initial, params)
    probed = probe(optimizer, params, expected_cells)
    if probed.averages:
        raise StateError(
            "optimizer: it only averages its input, so its state may be an average of gradients or of "
            "the weights. Give the whole chain, learning rate included, if it averages gradients; grow "
            "an average of the weights as the model: gj.grow(op, average, key=key)"
        )
    given = _named(state, params)
    faults = _differences(own, given)
    buffers = [slot.path for slot in axes_of(model).of_kind("buffer")]
    if any(name.endswith(f".{path}") for name in given for path in buffers):
        faults = [
            "the state covers buffers too; initialise the optimizer with gj.partition(model)[0]",
            *faults,
        ]
    raise_all(
        StateError,
        "state: expected the state that optimizer.init(gj.partition(model)[0]) and its updates return, "
        "for the whole transformation and this model:",
        faults,
    )
    remedy = "choose parameters by rank or by path, or initialise the optimizer again"
    all_traits = probed.required(expected_cells, remedy)
    shapes = {slot.steps: slot.value.shape for slot in axes_of(params).params()}
    arrays = []
    for cell, traits in zip(expected_cells, all_traits, strict=True):
        if traits.shaped and cell.steps is not None and own[cell.name].shape != shapes[cell.steps]:
            # The optimizer factors it at its true size, but not at the toy's
            traits = dataclasses.replace(traits, shaped=False, reach="leaf")
        arrays.append(_ProbedArray(cell, traits))
    return tuple(arrays)


def _initial(optimizer: Any, params: Any) -> Any:
    """The shapes of an optimizer's initial state."""
    try:
        return jax.eval_shape(optimizer.init, params)
    except Exception as error:  # a user's transformation may raise any exception
        raise StateError(
            f"optimizer: its init does not take gj.partition(model)[0]: {type(error).__name__}: {error}\n"
            "(if it wraps an optimizer that does, carry the inner state with the inner optimizer)"
        ) from error


def _named(state: Any, params: Any) -> dict[str, Any]:
    """The arrays of a state by their paths."""
    names = [cell.name for cell in cells(state, params)]
    return dict(zip(names, jax.tree.leaves(state), strict=True))


def _differences(expected: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """The names at which two states differ in shape: the first few, and the number of the others."""

    def shape(state: Mapping[str, Any], name: str) -> str:
        return f"shape {np.shape(state[name])}" if name in state else "nothing"

    faults = [
        f"state{name}: expected {shape(expected, name)}, got {shape(given, name)}"
        for name in dict.fromkeys([*expected, *given])
        if shape(expected, name) != shape(given, name)
    ]
    return _few(faults)


def _few(faults: list[str]) -> list[str]:
    return faults[:6] + ([f"and {len(faults) - 6} more"] if len(faults) > 6 else [])


def _params(table: Axes) -> dict[tuple, Slot]:
    return {slot.steps: slot for slot in table.params()}


# The maps ------------------------------------------------------------------------------------


class _Hop(NamedTuple):
    """One map of an operator, and the model before and after it.

    `keep`: whether copied coordinates inherit the state of their source; `arrays` are those of the state
    after it.
    """

    move: AxisMap
    before: Any
    after: Any
    keep: bool
    arrays: tuple[_ProbedArray, ...]
    key: PRNGKeyArray | None


@eqx.filter_jit
def _jitted(op, leaves: list, model, key, optimizer, arrays: tuple[_ProbedArray, ...], copies: str):
    hops, first, restarts = list[_Hop](), arrays, False
    for atom in atoms(op):
        for move in atom.maps(axes_of(model)):
            after = _grown(move, model, key)
            # Copies behind a gate at 0 have received no gradient yet, so they have no history to inherit
            keep = copies == "dual" and not move.gated
            if move.born:  # the model has other parameters now, and the state other arrays
                shapes = eqx.filter_eval_shape(lambda m: m, after)
                initial = _initial(optimizer, partition(shapes)[0])
                arrays, restarts = _probed_arrays(optimizer, initial, shapes), True
            hops.append(_Hop(move, model, after, keep, arrays, key))
            model = after
        model = atom.completed(model)
    params = partition(eqx.filter_eval_shape(lambda m: m, model))[0]
    own = _initial(optimizer, params)
    names = [cell.name for cell, _ in arrays]
    faults = [] if restarts else _misshapen(arrays, leaves, _named(own, params))
    for hop in hops:
        table = axes_of(hop.before)
        slots = _params(table)
        for cell, traits in () if hop.move.born else hop.arrays:
            reason = _fault(cell, traits, hop, table, slots)
            if reason:
                faults.append((cell.name, reason))
    raise_all(
        StateError,
        f"this optimizer state cannot be carried through {op}; initialise it again with "
        "optimizer.init(gj.partition(grown)[0]), or see the reason for each array:",
        _by_reason(faults),
    )
    before = first
    for hop in hops:
        if hop.move.born:
            leaves = _restarted(leaves, before, hop, optimizer)
        else:
            leaves = _carried(leaves, hop.arrays, hop, optimizer)
        before = hop.arrays
    leaves = _counted(leaves, arrays)
    expected = {name: np.zeros(np.shape(x)) for name, x in _named(own, params).items()}
    assert not _differences(expected, dict(zip(names, leaves, strict=True)))
    return jax.tree.unflatten(jax.tree.structure(own), leaves)


def _grown(move: AxisMap, model, key):
    """The model after a map; the shapes of it if the model is given by its shapes."""
    if _only_shapes(model):
        return eqx.filter_eval_shape(lambda m: maps.apply(move, m, key), model)
    return maps.apply(move, model, key)


def _only_shapes(model) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))


def _misshapen(
    arrays: tuple[_ProbedArray, ...], leaves: list, own: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """The arrays whose shape must change although they are not shaped like a parameter.

    `own`: the arrays of the optimizer's state for the grown model, by name.
    """
    faults = []
    for (cell, traits), leaf in zip(arrays, leaves, strict=True):
        if cell.name not in own:
            faults.append((cell.name, "does not exist in the optimizer's state at the new size"))
        elif not traits.shaped and cell.axis is None and own[cell.name].shape != np.shape(leaf):
            faults.append(
                (
                    cell.name,
                    "is not shaped like its parameter, which grows (factored, or of several steps)",
                )
            )
    names = {cell.name for cell, _ in arrays}
    added = [name for name in own if name not in names]
    return faults + [
        (name, "exists in the optimizer's state only at the new size") for name in added
    ]


def _by_reason(faults: list[tuple[str, str]]) -> list[str]:
    """One line for each reason: the arrays that it applies to, and the reason."""
    # A dict of dicts: names without repeats, in their order
    names: dict[str, dict[str, None]] = {}
    for name, reason in faults:
        names.setdefault(reason, {})[f"state{name}"] = None
    lines = []
    for reason, affected in names.items():
        first = ", ".join(list(affected)[:3])
        more = f" and {len(affected) - 3} more" if len(affected) > 3 else ""
        lines.append(f"{first}{more}: {reason}")
    return lines


def _fault(cell: Cell, traits: Traits, hop: _Hop, table: Axes, slots: dict[tuple, Slot]) -> str:
    """The reason why an array cannot follow a map; empty if it can."""
    move = hop.move
    if cell.axis is not None and cell.axis == move.over and cell.counts == "age":
        return f"counts the updates of {move.over}, which the map deals out to the copies of {move.axis}"
    if cell.axis is not None or traits.law == WEIGHT:
        return ""
    mixes = traits.reach in ("leaf", "all")
    # The parameters that the array may depend on: its own, or all of them
    own = slots.get(cell.steps) if cell.steps is not None and traits.reach != "all" else None
    touched = list(slots.values()) if own is None else [own]
    touched = [part for slot in touched for part in slot.parts if part.positions(move.axis)]
    if touched and not traits.additive:
        return f"depends on the number of {move.axis} (a mean, or a factor that depends on a shape)"
    if touched and mixes and _repeats(move, table, hop.keep):
        return (
            f"mixes entries of {'its parameter' if traits.reach == 'leaf' else 'several parameters'}, so "
            f"copies of {move.axis} that inherit their state would change it; gj.msg and "
            'copies="zero" start them anew'
        )
    if not mixes and not traits.shaped:
        return ""
    for slot in touched:
        if traits.law.gradient is not None:
            reason = algebra.undetermined(move, table, slot, copies=hop.keep)
            if reason:
                return f"follows gradients: {reason}"
        for side, by in algebra.multiplied(move, table, slot, copies=hop.keep).items():
            power = traits.law.gradient if side == "gradient" else traits.law.weight
            if by == "mixed" and power is not None and traits.law.linear_in is None:
                return (
                    f"is not linear in gradients or weights alone, and the map of {move.axis} sums "
                    f"{side}s over several old coordinates; it can follow maps with one source for "
                    "each new coordinate"
                )
            if power == "unknown" or (power is not None and power.odd is None and by == "any"):
                return (
                    f"{_unknown(traits, side)}; the map of {move.axis} multiplies {side}s, "
                    "gj.msg does not"
                )
    return ""


def _unknown(traits: Traits, side: str) -> str:
    if traits.reach == "nothing":
        return f"did not change in {traits.updates} updates of a toy, so how it scales is not known"
    if traits.reach != "entry":
        return f"mixes {side}s of several entries"
    return f"scales with no power of the {side}s (something is added to them, or each of them is clipped)"


def _repeats(move: AxisMap, table: Axes, keep: bool) -> bool:
    """Whether the map repeats or drops coordinates that have a history of gradients."""
    lost = np.setdiff1d(np.arange(table.size(move.axis)), move.source)
    return bool(lost.size or (keep and np.any(move.is_new() & (move.source >= 0))))


def _carried(leaves: list, arrays: tuple[_ProbedArray, ...], hop: _Hop, optimizer: Any) -> list:
    """The arrays of a state after one map, which all of them can follow."""
    table = axes_of(hop.before)
    slots = _params(table)
    growths = {
        cell.node: leaf
        for leaf, (cell, _) in zip(leaves, arrays, strict=True)
        if cell.counts == "growths"
    }
    carried = []
    for i, (leaf, (cell, traits)) in enumerate(zip(leaves, arrays, strict=True)):
        slot = slots.get(cell.steps) if cell.steps is not None else None
        merges = hop.move.over is not None and hop.move.length < table.size(hop.move.axis)
        if merges and cell.axis in (hop.move.axis, hop.move.over):
            leaf = _merged(leaf, cell, hop.move, table.size(hop.move.axis))
        elif cell.axis == hop.move.axis and cell.counts == "age":
            leaf = grown_age(leaf, hop.move, keep=hop.keep)
        elif cell.axis is not None and cell.axis == hop.move.over:
            parts = hop.move.length // table.size(hop.move.axis)
            if cell.counts == "birth":
                leaf = dealt_births(leaf, parts)
            else:
                # A merged coordinate is as young as the youngest of its sources
                leaf = leaf.reshape(parts, -1).min(0)
        elif cell.axis == hop.move.axis:
            number = 0 if cell.counts == "since" else growths[cell.node] + 1
            leaf = moved_births(leaf, hop.move, number)
        elif traits.shaped and slot is not None and slot.positions(hop.move.axis):
            # An average of the weights has no history of gradients: copies follow their source
            average = traits.law == WEIGHT and traits.initial is None
            copies, fresh = hop.keep or average, traits.initial
            if fresh is None and _has_young(hop.move, slot, traits.law, copies):
                fresh = _started(optimizer, hop.after)[i]
            fresh = 0 if fresh is None else fresh
            if average and finishes(hop.move):
                moved = _finished(hop, slot, leaf)
                leaf = moved_average(hop.move, table, slot, leaf, fresh=fresh, moved=moved)
            else:
                leaf = maps.carry_array(
                    hop.move, table, slot, leaf, traits.law, fresh=fresh, copies=copies
                )
        carried.append(leaf)
    return carried


def _merged(leaf: Any, cell: Cell, move: AxisMap, old: int) -> Any:
    """Births or ages along the two axes of a map that merges coordinates of one into groups."""
    if cell.axis == move.over:
        return jnp.tile(leaf, old // move.length)
    rows = leaf.reshape(move.length, -1)
    return merged_births(rows, 1) if cell.counts == "birth" else rows.min(1)


def finishes(move: AxisMap) -> bool:
    """Whether a map does more to a parameter than to gather, multiply and fill it."""
    return move.finish is not None or type(move).finished is not AxisMap.finished


def moved_average(
    move: AxisMap, table: Axes, slot: Slot, average: Any, *, fresh: Any, moved: Any = None
) -> Any:
    """An average of a parameter after a map: `fresh` where it starts anew, the map elsewhere.

    `moved` is what the map makes of an average in the parameter's place. It is needed where the map
    `finishes`: a shrink or a gain changes the old coordinates of the weights, and so of their average.
    """
    gather = functools.partial(maps.carry_array, move, table, slot, law=WEIGHT)
    if moved is None:
        return gather(average, fresh=fresh)
    if not np.ndim(fresh):
        return moved
    started = gather(jnp.zeros_like(average), fresh=jnp.ones(fresh.shape, average.dtype))
    return jnp.where(started == 1, fresh, moved)


def _finished(hop: _Hop, slot: Slot, average: Any) -> Any:
    """What the map of a hop makes of an average in its parameter's place."""

    def concrete(x):
        # Only this parameter is read, but a map is applied to a model of arrays
        return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

    model = put(jax.tree.map(concrete, hop.before), {slot.steps: average})
    return get(maps.apply(hop.move, model, hop.key), slot.steps)


def _restarted(leaves: list, before: tuple[_ProbedArray, ...], hop: _Hop, optimizer: Any) -> list:
    """The arrays of a state after a map that makes its axis: those of new parameters start anew."""
    params = partition(eqx.filter_eval_shape(lambda m: m, hop.after))[0]
    own, table = _named(_initial(optimizer, params), params), axes_of(hop.after)
    made = {slot.steps for slot in table.params() if slot.positions(hop.move.axis)}
    old = {cell.name: leaf for leaf, (cell, _) in zip(leaves, before, strict=True)}
    growths = {cell.node: old[cell.name] for cell, _ in before if cell.counts == "growths"}
    started, fresh = None, []
    for i, (cell, traits) in enumerate(hop.arrays):
        shape, dtype = own[cell.name].shape, own[cell.name].dtype
        if cell.name in old and cell.steps not in made and np.shape(old[cell.name]) == shape:
            fresh.append(old[cell.name])
        elif cell.axis is not None:
            number = growths[cell.node] + 1 if cell.counts == "birth" else 0
            fresh.append(jnp.full(shape, number, dtype))
        elif traits.initial is not None:
            fresh.append(jnp.full(shape, traits.initial, dtype))
        else:
            started = _started(optimizer, hop.after) if started is None else started
            fresh.append(started[i])
    return fresh


def _has_young(move: AxisMap, slot: Slot, law: Law, copies: bool) -> bool:
    """Whether some entries of an array start anew."""
    return any(
        algebra.starts_anew(move, part, dim, copies=copies, law=law).any()
        for part in slot.parts
        for dim in part.positions(move.axis)
    )


def _counted(leaves: list, arrays: tuple[_ProbedArray, ...]) -> list:
    """The arrays with the whole operator, all its maps together, counted as one growth."""
    after = []
    for leaf, (cell, _) in zip(leaves, arrays, strict=True):
        if cell.counts == "growths":
            leaf = leaf + 1
        after.append(jnp.zeros_like(leaf) if cell.counts == "last" else leaf)
    return after


def _started(optimizer: Any, model) -> list:
    """The arrays of an optimizer's initial state for a model."""
    if _only_shapes(model):
        raise StateError(
            "model: fresh coordinates of this state start from their weights; give the model itself, not "
            "its shapes"
        )
    return jax.tree.leaves(optimizer.init(partition(model)[0]))
