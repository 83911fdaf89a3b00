"""Optimizer state through a growth operator: every array by the law that a probe finds."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from growjax import algebra, maps
from growjax.algebra import WEIGHT, AxisMap, Law
from growjax.axes import Axes, Slot, axes_of, partition
from growjax.errors import StateError, expect_one_of, raise_all
from growjax.growth.births import dealt_births, moved_births
from growjax.growth.operator import Chain, Operator, atoms
from growjax.optim.age import grown_age
from growjax.optim.cells import Cell, cells
from growjax.optim.probe import Kept, probe


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

    What each array holds is found by running the optimizer on a toy (`growjax.optim.probe`), never by
    what it is called. It moves by the power of the map, or of its dual, that it scales with: averages of
    gradients by the share on the opposite side from the weights, those of squares by its square,
    traces of normalised updates by its sign, averages of the weights and differences between such as the
    weights. Fresh coordinates start as a fresh run would start them: from zero, from the constant of
    an accumulator, from their own weight. Step counts, schedules and hyper-parameters stay as they are;
    the births that `growjax.optim.parts` keeps count one growth more.
    So does what sums over entries (a norm of gradients), as long as nothing is copied with its history.
    Under plain `optax.adam` a zero moment under an old step count moves new weights by up to 6.6 times
    the learning rate; `growjax.optim.adamw` keeps an age for every coordinate instead.

    **Arguments**

    - `op`: the operator that `model` is about to be grown by.
    - `state`: what `optimizer.init(gj.partition(model)[0])` and its updates gave.
    - `optimizer`: the whole transformation that made `state`, or a `growjax.optim.Rule`.
    - `key`: as for `gj.grow`; fresh weights are drawn with it where an average starts from them.
    - `copies`: copied coordinates follow their source, or start anew and young, as fresh ones do.

    Raises `StateError` that lists every array which cannot be carried: because copies or shares would
    change what it mixes (norms), because it scales with no power of what is multiplied (gradients with
    weights added to them), because it is not shaped like a parameter that grows (factored moments); or if
    the optimizer cannot be run on a toy. Clipping and the small constants of optimizers (`eps`) are
    not counted: what a clipped gradient added stays as it was clipped.

    **Example**

        state = gj.carry(op, state, small, optimizer=tx, key=key)
        big = gj.grow(op, small, key=key)
    """
    if not isinstance(op, Operator | Chain):
        raise StateError(f"op: expected an operator such as gj.msg(mlp=2048), got {op!r}")
    expect_one_of(StateError, "copies", copies, ("dual", "zero"))
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise StateError(
            f"optimizer: expected the optax transformation or growjax.optim.Rule that made the state, "
            f"got {optimizer!r}"
        )
    shapes = eqx.filter_eval_shape(lambda m: m, model)
    held = _held(optimizer, state, shapes)
    # Values are needed only where an average starts from fresh weights
    model = model if any(k.shaped and k.initial is None for _, k in held) else shapes
    return _jitted(op, jax.tree.leaves(state), model, key, optimizer, held, copies)


class _Held(NamedTuple):
    """An array of the state: where it stands, and what it holds."""

    cell: Cell
    kept: Kept


def _held(optimizer: Any, state: Any, model: Any) -> tuple[_Held, ...]:
    """What every leaf of a state holds; raises `StateError` if the state is not the optimizer's."""
    params = partition(model)[0]
    initial = _initial(optimizer, params)
    own, wanted = _named(initial, params), cells(initial, params)
    probed = probe(optimizer, params, wanted)
    if probed.averages:
        raise StateError(
            "optimizer: all that it does is to average what it is fed, so whether this is an average of "
            "gradients or of the weights cannot be told. Give the whole chain, learning rate included, "
            "if it averages gradients; grow an average of the weights as the model: gj.grow(op, average, "
            "key=key)"
        )
    given = _named(state, params)
    faults = _differences(own, given)
    buffers = [slot.path for slot in axes_of(model).of_kind("buffer")]
    if any(name.endswith(f".{path}") for name in given for path in buffers):
        faults = [
            "it covers buffers too; initialise the optimizer with gj.partition(model)[0]",
            *faults,
        ]
    raise_all(
        StateError,
        "state: expected what optimizer.init(gj.partition(model)[0]) and updates lead to, for the whole "
        "transformation and this model:",
        faults,
    )
    kept = probed.of(wanted)
    raise_all(
        StateError,
        "which parameters the optimizer keeps arrays for depends on their sizes, so a toy does not show "
        "what these hold; choose parameters by rank or by path, or start the optimizer again:",
        [f"state{cell.name}" for cell, k in zip(wanted, kept, strict=True) if k is None],
    )
    shapes = {slot.steps: slot.value.shape for slot in _params(axes_of(params)).values()}
    held = []
    for cell, k in zip(wanted, kept, strict=True):
        assert k is not None
        if k.shaped and cell.steps is not None and own[cell.name].shape != shapes[cell.steps]:
            # Factored at its true size, if not on the toy
            k = dataclasses.replace(k, shaped=False, reach="leaf")
        held.append(_Held(cell, k))
    return tuple(held)


def _initial(optimizer: Any, params: Any) -> Any:
    """The shapes of the state that an optimizer starts from."""
    try:
        return jax.eval_shape(optimizer.init, params)
    except Exception as error:  # whatever a transformation of the user's may raise
        raise StateError(
            f"optimizer: its init does not take gj.partition(model)[0]: {type(error).__name__}: {error}\n"
            "(of a wrapper that takes something else, carry what is inside it by the optimizer inside it)"
        ) from error


def _named(state: Any, params: Any) -> dict[str, Any]:
    """The arrays of a state by their paths."""
    names = [cell.name for cell in cells(state, params)]
    return dict(zip(names, jax.tree.leaves(state), strict=True))


def _differences(expected: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Where the names or shapes of two states differ: the first few places, and how many there are."""

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
    return {slot.steps: slot for slot in table.of_kind("param") if slot.arrays()}


# The maps ------------------------------------------------------------------------------------


class _Hop(NamedTuple):
    """One map of an operator: the model before and after it, and whether copies keep their history."""

    move: AxisMap
    before: Any
    after: Any
    keep: bool


@eqx.filter_jit
def _jitted(op, leaves: list, model, key, optimizer, held: tuple[_Held, ...], copies: str):
    hops = []
    for atom in atoms(op):
        for move in atom.maps(axes_of(model)):
            after = _grown(move, model, key)
            # Behind a gate at 0 copies receive no gradient yet, so nothing has been averaged.
            hops.append(_Hop(move, model, after, copies == "dual" and not move.gated))
            model = after
    params = partition(eqx.filter_eval_shape(lambda m: m, model))[0]
    own = _initial(optimizer, params)
    names = [cell.name for cell, _ in held]
    faults = _misshapen(held, leaves, _named(own, params))
    for hop in hops:
        faults += [(cell.name, why) for cell, kept in held if (why := _fault(cell, kept, hop))]
    raise_all(
        StateError,
        f"this optimizer state cannot be carried through {op}; start it again with "
        "optimizer.init(gj.partition(grown)[0]), or see what is said of each array:",
        _by_reason(faults),
    )
    for hop in hops:
        leaves = _carried(leaves, held, hop, optimizer)
    leaves = _counted(leaves, held)
    expected = {name: np.zeros(np.shape(x)) for name, x in _named(own, params).items()}
    assert not _differences(expected, dict(zip(names, leaves, strict=True)))
    return jax.tree.unflatten(jax.tree.structure(own), leaves)


def _grown(move: AxisMap, model, key):
    """The model after a map, or its shapes if only those are known."""
    if _only_shapes(model):
        return eqx.filter_eval_shape(lambda m: maps.apply(move, m, key), model)
    return maps.apply(move, model, key)


def _only_shapes(model) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))


def _misshapen(
    held: tuple[_Held, ...], leaves: list, own: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """The arrays that would have to change their shape and are not shaped like a parameter."""
    faults = []
    for (cell, kept), leaf in zip(held, leaves, strict=True):
        if cell.name not in own:
            faults.append((cell.name, "is not kept at the new size"))
        elif not kept.shaped and cell.axis is None and own[cell.name].shape != np.shape(leaf):
            faults.append(
                (
                    cell.name,
                    "is not shaped like its parameter, which grows (factored, or of several steps)",
                )
            )
    names = {cell.name for cell, _ in held}
    return faults + [(name, "is kept at the new size alone") for name in own if name not in names]


def _by_reason(faults: list[tuple[str, str]]) -> list[str]:
    """One line for each reason: the arrays that it holds for, and the reason."""
    names: dict[str, dict[str, None]] = {}
    for name, why in faults:
        names.setdefault(why, {})[f"state{name}"] = None
    lines = []
    for why, arrays in names.items():
        first = ", ".join(list(arrays)[:3])
        more = f" and {len(arrays) - 3} more" if len(arrays) > 3 else ""
        lines.append(f"{first}{more}: {why}")
    return lines


def _fault(cell: Cell, kept: Kept, hop: _Hop) -> str:
    """Why an array cannot follow a map; nothing if it can."""
    move, table = hop.move, axes_of(hop.before)
    if cell.axis is not None and cell.axis == move.over and cell.counts == "age":
        return f"counts what {move.over} have seen, and these are dealt out to the copies of {move.axis}"
    if cell.axis is not None or kept.law == WEIGHT:
        return ""
    slots = _params(table)
    mixes = kept.reach in ("leaf", "all")
    # What an array may depend on: its own parameter, or all of them
    own = slots.get(cell.steps) if cell.steps is not None and kept.reach != "all" else None
    touched = list(slots.values()) if own is None else [own]
    touched = [part for slot in touched for part in slot.parts if part.positions(move.axis)]
    if touched and not kept.additive:
        return f"depends on how many {move.axis} there are (a mean, or a factor that depends on a shape)"
    if touched and mixes and _repeats(move, table, hop.keep):
        return (
            f"mixes entries of {'its parameter' if kept.reach == 'leaf' else 'several parameters'}, so "
            f"copies of {move.axis} that keep their history would change it; gj.msg and "
            'copies="zero" start them anew'
        )
    if not mixes and not kept.shaped:
        return ""
    for slot in touched:
        if kept.law.gradient is not None:
            why = algebra.undetermined(move, table, slot, copies=hop.keep)
            if why:
                return f"follows gradients: {why}"
        for side, by in algebra.multiplied(move, table, slot, copies=hop.keep).items():
            power = kept.law.gradient if side == "gradient" else kept.law.weight
            if by == "mixed" and kept.law.linear_in is None:
                return (
                    f"is not linear in what the dense map of {move.axis} sums, {side}s of several old "
                    "coordinates for a new one; it can follow a map with one source for each"
                )
            if power == "unknown" or (power is not None and power.odd is None and by == "any"):
                return (
                    f"{_unknown(kept, side)}; the map of {move.axis} multiplies {side}s, "
                    "gj.msg does not"
                )
    return ""


def _unknown(kept: Kept, side: str) -> str:
    if kept.reach == "nothing":
        return f"did not change in {kept.updates} updates of a toy, so what it holds is not known"
    if kept.reach != "entry":
        return f"mixes {side}s of several entries"
    return f"scales with no power of the {side}s (something is added to them, or each of them is clipped)"


def _repeats(move: AxisMap, table: Axes, keep: bool) -> bool:
    """Whether coordinates that have a history are repeated or lost."""
    lost = np.setdiff1d(np.arange(table.size(move.axis)), move.source)
    return bool(lost.size or (keep and np.any(move.is_new() & (move.source >= 0))))


def _carried(leaves: list, held: tuple[_Held, ...], hop: _Hop, optimizer: Any) -> list:
    """The arrays of a state after one map that they can follow."""
    table = axes_of(hop.before)
    slots = _params(table)
    counted = zip(leaves, held, strict=True)
    growths = {c.node: leaf for leaf, (c, _) in counted if c.counts == "growths"}
    carried = []
    for i, (leaf, (cell, kept)) in enumerate(zip(leaves, held, strict=True)):
        slot = slots.get(cell.steps) if cell.steps is not None else None
        if cell.axis == hop.move.axis and cell.counts == "age":
            leaf = grown_age(leaf, hop.move, keep=hop.keep)
        elif cell.axis is not None and cell.axis == hop.move.over:
            parts = hop.move.length // table.size(hop.move.axis)
            if cell.counts == "birth":
                leaf = dealt_births(leaf, parts)
            else:
                # What was merged is as young as the youngest of it
                leaf = leaf.reshape(parts, -1).min(0)
        elif cell.axis == hop.move.axis:
            number = 0 if cell.counts == "since" else growths[cell.node] + 1
            leaf = moved_births(leaf, hop.move, number)
        elif kept.shaped and slot is not None and slot.positions(hop.move.axis):
            # An average of the weights has no history of gradients: copies follow their source
            average = kept.law == WEIGHT and kept.initial is None
            copies, fresh = hop.keep or average, kept.initial
            if fresh is None and _has_young(hop.move, slot, kept.law, copies):
                fresh = _started(optimizer, hop.after)[i]
            leaf = maps.carry_array(
                hop.move,
                table,
                slot,
                leaf,
                kept.law,
                fresh=0 if fresh is None else fresh,
                copies=copies,
            )
        carried.append(leaf)
    return carried


def _has_young(move: AxisMap, slot: Slot, law: Law, copies: bool) -> bool:
    """Whether some entries of an array start anew."""
    return any(
        algebra.starts_anew(move, part, dim, copies=copies, law=law).any()
        for part in slot.parts
        for dim in part.positions(move.axis)
    )


def _counted(leaves: list, held: tuple[_Held, ...]) -> list:
    """The arrays once all maps of an operator are done: together they are one growth."""
    after = []
    for leaf, (cell, _) in zip(leaves, held, strict=True):
        if cell.counts == "growths":
            leaf = leaf + 1
        after.append(jnp.zeros_like(leaf) if cell.counts == "last" else leaf)
    return after


def _started(optimizer: Any, model) -> list:
    """The arrays that an optimizer starts from on a model."""
    if _only_shapes(model):
        raise StateError(
            "model: fresh coordinates of the state start from their weights; give the model itself, not "
            "its shapes"
        )
    return jax.tree.leaves(optimizer.init(partition(model)[0]))
