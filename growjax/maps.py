"""Apply a map: one `AxisMap` along one named axis moves every leaf that has the axis.

    source   new index -> old index, or NONE for a coordinate that did not exist
    share    a multiplier per new index, taken by the leaves on one side of the axis

Every method in growjax is a list of these (`growjax.algebra` has the other fields of a map). For each
leaf that carries the axis, `apply` gathers by `source`, draws the `NONE` rows, and applies `share`:

    weights        leaves on `side` ("consumed" by default) are multiplied by the share
    gradients      all other leaves are (the dual of the map)
    state          of an optimizer: by the power of either that it scales with (its `Law`)

so that copies of one coordinate with shares that sum to 1 compute the function of the original, and
their moved gradients are those of back-propagation. On a stack axis (`layers`) the side is that of the
residual stream: the leaves of the block that produce `via` take the share. Lookup axes (`vocab`,
`positions`) have none. A norm that averages over an axis whose new coordinates are zeros (or the mean,
if it subtracts that) has its gain and epsilon rescaled. Gates, sharding, cost and names read the same
table. `tests/test_maps.py` and `tests/test_algebra.py` check outputs, gradients and moments in float64.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from growjax.algebra import (
    MEAN,
    NONE,
    WEIGHT,
    AxisMap,
    Init,
    Law,
    Power,
    factors,
    is_matrix,
    is_regrouped,
    mean_square,
    starts_anew,
)
from growjax.axes import Axes, DeclaredOutside, Slot, axes_of, put, recheck
from growjax.errors import AxisError, GateError, GrowthError, SubnetError, raise_all
from growjax.gates import Gate
from growjax.trees import replaced


def apply(move: AxisMap, model, key: PRNGKeyArray | None):
    """The model after one map: every leaf, gate and per-layer multiplier that has the axis.

    Raises `AxisError` for an unknown axis or a source out of range, `GateError` if the map needs
    gates and the model declares none or they are still open, `GrowthError` if a norm forbids the map.
    """
    model = move.opened(model)
    table = axes_of(model)
    raise_all(AxisError, "the map does not fit the model:", move.check(table.size(move.axis)))
    raise_all(GrowthError, f"axis {move.axis!r} has no such map:", _misfits(move, table))
    _check_gates(move, table)
    _check_takers(move, table)
    _check_norms(move, table)
    if move.finish is not None:
        move = dataclasses.replace(move, finish=move.finish.prepared(move, table))
    values: dict[tuple, Any] = {}
    for slot in table.having(move.axis):
        values[slot.steps] = moved(move, table, slot, key=key)
    for slot in _mean_buffers(move, table):
        values[slot.steps] = slot.value * mean_square(move)
    model = put(model, values)
    sizes = move.resized(table.sizes)
    model = replaced(model, DeclaredOutside, lambda module: module.resized(sizes))
    recheck(model)
    return model


def touched(move: AxisMap, model: Any) -> set[tuple]:
    """The steps of the leaves of a model that a map changes or adds; all others stay as they are."""
    table = axes_of(move.opened(model))
    return {slot.steps for slot in (*table.having(move.axis), *_mean_buffers(move, table))}


def _mean_buffers(move: AxisMap, table: Axes) -> list[Slot]:
    """The buffers that are added to a mean over the axis, if new coordinates shrink that mean."""
    buffers = [] if mean_square(move) is None else table.of_kind("buffer")
    return [s for s in buffers if move.axis in (*s.spec.means, *s.spec.variances)]


def carry_array(
    move: AxisMap,
    table: Axes,
    slot: Slot,
    array: Array,
    law: Law,
    *,
    fresh: Any = 0,
    copies: bool = True,
) -> Array:
    """An array of optimizer state, shaped like the parameter in `slot`, after one map.

    `table` is that of the model before the map. Coordinates that start anew hold `fresh`: a number, or
    the entries of an array of the new shape. They are those without a source and, with `copies=False`,
    those that are not the first home of their source. All others follow the law, whose powers must be
    known where `multiplied` lists them.
    """
    sizes = move.resized(table.sizes)
    starts = iter(slot.cut(fresh, sizes)) if np.ndim(fresh) else None

    def carried(part: Slot, x: Array) -> Array:
        x, start = _move(move, table, part, x, law, fresh=law.origin), next(starts or iter([fresh]))
        anew = {
            dim: starts_anew(move, part, dim, copies=copies, law=law)
            for dim in part.positions(move.axis)
        }
        # `_move` has filled fresh rows with the origin, but not means and copies
        done = copies and not move.has_means and starts is None and start == law.origin
        if done or not any(mask.any() for mask in anew.values()):
            return x
        x, start = part.split(x, sizes), jnp.asarray(start, x.dtype)
        start = part.split(start, sizes) if start.ndim else start
        return part.join(jnp.where(_crosses(anew, x.ndim), start, x))

    return slot.mapped(carried, array, table.sizes)


# One leaf ------------------------------------------------------------------------------------


def moved(move: AxisMap, table: Axes, slot: Slot, *, key: PRNGKeyArray | None) -> Any:
    """The value of one slot after a map, whatever its kind; `table` is that of the model before it."""
    own = slot.kind in ("gate", "branch", "active") and slot.own_axis == move.axis
    if slot.kind == "gate":
        if own and move.gated:
            return _new_gate(move, table, slot)
        if slot.value is None:
            return None
        value = _move(move, table, slot, slot.value.value, WEIGHT, fresh=1)
        pace = slot.value.pace
        pace = None if pace is None else _move(move, table, slot, pace, WEIGHT, fresh=1)
        return Gate(value, _move(move, table, slot, slot.value.new, WEIGHT, fresh=False), pace)
    if own and slot.kind in ("branch", "active"):
        given = move.branch if slot.kind == "branch" else move.active
        if slot.value is None:
            return given
        moved = _move(move, table, slot, slot.value, WEIGHT, fresh=1)
        return moved if given is None else moved * given
    if slot.value is None:
        return None

    def gather(part: Slot, x: Array) -> Array:
        y = _move(move, table, part, x, WEIGHT, fresh=_Fresh(move, part, key))
        if move.finish is None or not part.positions(move.axis):
            return y
        named = None if key is None else fold_in_name(key, f"{part.path}:{move.axis}:finish")
        old, new = part.split(x, table.sizes), part.split(y, move.resized(table.sizes))
        return part.join(move.finish.applied(move, part, old, new, key=named))

    moved = slot.mapped(gather, slot.value, table.sizes)
    return move.finished(slot, moved, key=key) if slot.kind == "param" else moved


def _move(move: AxisMap, table: Axes, slot: Slot, array: Array, law: Law, fresh: Any):
    """Gather one array along the axis and multiply it by the powers of its factors that its law has.

    `fresh` is the value of NONE coordinates: a number, or a `_Fresh` that draws them.
    """
    if not slot.positions(move.axis):
        return array
    x = before = slot.split(array, table.sizes)
    if is_regrouped(move, slot):
        return slot.join(_regrouped(move, table, slot, x))
    taken = []
    for dim, side, factor in factors(move, table, slot):
        power = law.gradient if side == "gradient" else law.weight
        if isinstance(power, Power):
            taken.append((dim, factor, power))
    mixed = {dim for dim, factor, _ in taken if is_matrix(factor)}
    where = [dim for dim in slot.positions(move.axis) if dim not in mixed]
    if move.traced:
        x = _gather_traced(move, slot, x, where)
    elif len(where) > 1 and isinstance(fresh, _Fresh) and np.any(move.source == NONE):
        for dim in where:
            x = _gather(move.source, x, dim, 0)
        drawn = {dim: move.source == NONE for dim in where}
        x = jnp.where(_crosses(drawn, x.ndim), fresh.cells(x, where), x)
    else:
        for dim in where:
            x = _gather(*_sources(move, slot, x, dim), dim, fresh)
    for dim, factor, power in taken:
        if isinstance(factor, jax.Array) or np.any(np.asarray(factor) != 1):
            slot.require_fractions(x, "multiplied")
        scale = power.of(jnp.asarray(factor, x.dtype))
        if dim in mixed and is_matrix(scale):
            step = functools.partial(_mixed, scale, dim=dim)
        else:
            step = functools.partial(
                jnp.multiply, scale if dim is None else _along(scale, x.ndim, dim)
            )
        origin = slot.origin if law == WEIGHT else law.origin
        x = origin + step(x - origin) if origin else step(x)
    return slot.join(move.limited(slot, before, x, law.origin))


def _sources(move: AxisMap, slot: Slot, x: Array, dim: int) -> tuple[np.ndarray, Array]:
    """The indices of a gather and the array it reads: with `above`, this layer beside the next."""
    source = move.rows(slot, dim)
    if np.any(source == MEAN):
        slot.require_fractions(x, "averaged")
    stacks = [i for i, d in enumerate(slot.dims) if d.role == "stack"]
    if not (move.above and stacks and slot.dims[dim].role == "produced"):
        return source, x
    layers = x.shape[stacks[-1]]
    above = jnp.take(x, np.minimum(np.arange(layers) + 1, layers - 1), axis=stacks[-1])
    source = np.where(move.is_new() & (source >= 0), source + x.shape[dim], source)
    return source, jnp.concatenate([x, above], axis=dim)


def _mixed(matrix: Array, x: Array, *, dim: int) -> Array:
    """A matrix `[new, old]` times one dimension of an array."""
    product = jnp.tensordot(matrix, x, axes=(1, dim), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(product, 0, dim)


def _regrouped(move: AxisMap, table: Axes, slot: Slot, x: Any) -> Any:
    """A leaf with both axes of a product: the same entries in the same order, in other groups."""
    pair = [slot.positions(axis)[0] for axis in (move.axis, move.over or "")]
    sizes = move.resized(table.sizes)
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    x = xp.moveaxis(x, pair, (0, 1))
    x = x.reshape(*(sizes[slot.dims[dim].axis] for dim in pair), *x.shape[2:])
    return xp.moveaxis(x, (0, 1), pair)


def _along(vector, ndim: int, dim: int):
    """A vector shaped to broadcast along one dimension of an `ndim`-dimensional array."""
    return vector.reshape(vector.shape + (1,) * (ndim - dim - 1))


def _crosses(chosen: dict[int, np.ndarray], ndim: int) -> np.ndarray:
    """Where any of several dimensions is at one of its chosen coordinates (broadcastable)."""
    masks = [_along(rows, ndim, dim) for dim, rows in chosen.items()]
    return functools.reduce(np.logical_or, masks)


def _gather(source: np.ndarray, x: Array, dim: int, fresh: Any) -> Array:
    """`x[source]` along `dim`: fresh coordinates where `source` is NONE, the mean where it is MEAN."""
    if np.any(source == MEAN):
        source = np.where(source == MEAN, x.shape[dim], source)
        x = jnp.concatenate([x, jnp.mean(x, dim, keepdims=True)], axis=dim)
    is_fresh = source == NONE
    if is_fresh.any():
        (ids,) = np.nonzero(is_fresh)
        if isinstance(fresh, _Fresh):
            block = fresh.slices(x, dim, ids)
        else:
            block = jnp.full((*x.shape[:dim], len(ids), *x.shape[dim + 1 :]), fresh, x.dtype)
        source = np.where(is_fresh, x.shape[dim] + np.cumsum(is_fresh) - 1, source)
        x = jnp.concatenate([x, block], axis=dim)
    if np.array_equal(source, np.arange(x.shape[dim])):
        return x
    cuts = np.flatnonzero(np.diff(source) != 1) + 1
    if dim and len(cuts) < 4:
        # Along a late dimension a gather goes entry by entry once a product is fused with it
        pieces = np.split(source, cuts)
        slices = [jax.lax.slice_in_dim(x, int(p[0]), int(p[-1]) + 1, axis=dim) for p in pieces]
        return jnp.concatenate(slices, axis=dim)
    return jnp.take(x, source, axis=dim, mode="clip")


def _gather_traced(move: AxisMap, slot: Slot, x: Array, where: list[int]) -> Array:
    """Gather at run time; sub-networks list distinct coordinates in ascending order."""
    take = functools.partial(jnp.take, mode="clip", unique_indices=True, indices_are_sorted=True)
    (dim,) = where
    if move.source.ndim == 1:
        return take(x, move.source, axis=dim)
    if slot.dims[0].role != "stack":
        raise SubnetError(
            f"{slot.path}: coordinates of {move.axis!r} differ layer by layer, but this leaf is shared "
            "by all layers; choose the same ones for every layer"
        )
    return jax.vmap(lambda array, source: take(array, source, axis=dim - 1))(x, move.source)


# Fresh coordinates ---------------------------------------------------------------------------


def fold_in_name(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """A key that depends on a name and on nothing else (not on the number of names)."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


class _Fresh(NamedTuple):
    """Draws the fresh coordinates of one leaf, slice by slice along the axis.

    A slice's key is made of the leaf's path, the axis and its index, so other leaves, the number of
    hops and the number of devices do not change it. Buffers are never drawn: they repeat.
    """

    move: AxisMap
    slot: Slot
    key: PRNGKeyArray | None

    def slices(self, x: Array, dim: int, ids: np.ndarray) -> Array:
        """`x.shape` with `len(ids)` fresh coordinates along `dim`."""
        if self.slot.kind == "buffer" and not x.shape[dim]:
            more = [(0, len(ids) * (i == dim)) for i in range(x.ndim)]
            return jnp.pad(x, more, constant_values=self.slot.start)
        if self.slot.kind == "buffer":
            return jnp.take(x, ids % x.shape[dim], axis=dim)
        draws = self._each(self._draw(x, [dim]), jnp.asarray(ids))
        return jnp.moveaxis(draws, 0, dim)

    def cells(self, x: Array, dims: list[int]) -> Array:
        """Fresh values for all of `x`, where rows and columns along `dims` cross.

        A slice along one of them would depend on the number of hops.
        """
        index, draw = jnp.arange(self.move.length), self._draw(x, dims)
        draws = self._each(lambda i: jax.vmap(lambda j: draw(i, j))(index), index)
        return jnp.moveaxis(draws, (0, 1), dims)

    def _each(self, draw: Callable, ids: Array) -> Array:
        """The slices of some indices, in a loop: compilers are slow at draws that they fuse."""
        return jax.vmap(draw)(ids) if self._is_constant else jax.lax.map(draw, ids)

    @property
    def _is_constant(self) -> bool:
        born = self.move.init in ("born", "normal") and self.slot.init != "normal"
        return born or self.move.init == "zeros"

    def _draw(self, x: Array, dims: list[int]) -> Callable:
        shape = tuple(n for i, n in enumerate(x.shape) if i not in dims)
        sizes = [self.move.length if i in dims else n for i, n in enumerate(x.shape)]
        init = _initialiser(self.move.init, self.slot, x, dims, sizes)
        if self._is_constant:
            return lambda *index: init(None, shape, x.dtype)
        if self.key is None:
            raise GrowthError("this operator draws new coordinates: pass key=jax.random.key(...)")
        # One name for leaf and axis: every fold is a hash to compile.
        named = fold_in_name(self.key, f"{self.slot.path}:{self.move.axis}")

        def draw(*index):
            key = named
            for i in index:
                key = jax.random.fold_in(key, i)
            return init(key, shape, x.dtype)

        return draw


def _initialiser(init: Init, slot: Slot, x: Array, dims: list[int], sizes: list[int]) -> Callable:
    if callable(init):
        return init
    if init == "zeros" or (init != "matched" and slot.init == "zeros"):
        return lambda key, shape, dtype: jnp.zeros(shape, dtype)
    if init != "matched" and slot.init == "ones":
        return lambda key, shape, dtype: jnp.ones(shape, dtype)
    slot.require_fractions(x, "drawn")
    if init != "matched":
        fan_in = math.prod(slot.fan(sizes)) if init == "born" else 1
        deviation = 0.02 if fan_in == 1 else fan_in**-0.5
        return lambda key, shape, dtype: deviation * jax.random.normal(key, shape, dtype)
    if not x.size:
        raise GrowthError(f"{slot.path}: 'matched' follows old coordinates; give init='born'")
    # "matched": the mean and deviation of the old tensor, layer by layer unless layers are new. They
    # are constants to a gradient: that of the deviation of zeros is no number.
    over = [i for i, dim in enumerate(slot.dims) if dim.role != "stack" or i in dims]
    x = jax.lax.stop_gradient(x)
    mean, std = (jnp.squeeze(f(x, over, keepdims=True), dims) for f in (jnp.mean, jnp.std))
    return lambda key, shape, dtype: mean + std * jax.random.normal(key, shape, dtype)


# Gates and norms -----------------------------------------------------------------------------


def _new_gate(move: AxisMap, table: Axes, slot: Slot) -> Gate:
    shape = [table.sizes[dim.axis] for dim in slot.dims[:-1]] + [move.length]
    new = jnp.broadcast_to(jnp.asarray(move.is_new()), shape)
    pace = None if move.pace is None else jnp.broadcast_to(jnp.asarray(move.pace, float), shape)
    return Gate((~new).astype(float), new, pace)


def _check_gates(move: AxisMap, table: Axes) -> None:
    if not move.gated:
        return
    mine = [slot for slot in table.of_kind("gate") if slot.own_axis == move.axis]
    if not mine:
        raise GateError(
            f"this model declares no gate on axis {move.axis!r}, so new coordinates cannot be hidden; "
            "use gj.copy or gj.zeros, or declare one with gj.gate (gj.annotate and gj.infer: gates=[...])"
        )
    raise_all(
        GateError,
        f"axis {move.axis!r} is still ramping; ramp it to 1 and settle it before growing it again:",
        [slot.path for slot in mine if slot.value is not None],
    )


def _misfits(move: AxisMap, table: Axes) -> list[str]:
    """Why a dense map, or one with `over`, does not fit this model."""
    slots = [slot for slot in table.having(move.axis) if slot.arrays()]
    faults = []
    if move.mixes or move.over is not None:
        faults += [
            f"{slot.path} is still ramping; ramp it to 1 and settle it first"
            for slot in table.of_kind("gate")
            if slot.arrays() and slot.own_axis in (move.axis, move.over)
        ]
    if move.mixes:
        faults += [
            f"{slot.path} ties its coordinates together (rotary pairs), so they cannot be mixed"
            for slot in slots
            if slot.kind in ("buffer", "branch", "active")
        ]
    if move.over is not None:
        old, inner, new = table.size(move.axis), table.size(move.over), move.length
        repeats = not new % old and not inner % (new // old)
        pools = move.mixes and not old % new  # fewer, each with the queries of several
        if not (repeats or pools) or np.any(move.source != np.arange(new) * old // new):
            faults.append(
                f"{old} {move.axis} of {inner} {move.over} each cannot become {new}: each is repeated in "
                f"place, so many times that {move.over} can be divided by it"
            )
        faults += [
            f"{slot.path} has {move.over} without {move.axis}, or one of them twice"
            for whole in table.having(move.over)
            for slot in whole.parts
            if slot.arrays()
            and slot.positions(move.over)
            and not len(slot.positions(move.over)) == 1 == len(slot.positions(move.axis))
        ]
    return faults


def _check_takers(move: AxisMap, table: Axes) -> None:
    """Raise `GrowthError` if no leaf takes the multipliers, which would then change nothing."""
    parts = [part for slot in table.having(move.axis, "param") for part in slot.parts]
    stack = "stack" in table.roles(move.axis)
    for role in ("consumed", "produced"):
        factor, axis = move.by(role), move.via if stack else move.axis
        idle = factor is None or isinstance(factor, jax.Array) or np.all(np.asarray(factor) == 1)
        wanted = "produced" if stack else role
        takers = [p for p in parts for d in p.dims if d.axis == axis and d.role == wanted]
        if idle or is_matrix(factor) or takers:
            continue
        where = ", ".join(part.path for part in parts)
        raise GrowthError(
            f"axis {move.axis!r}: no leaf can take its shares, since none has {axis} {wanted} (it is on "
            f"{where}). A leaf that reads an axis says so by an arrow, '{axis} ->', and so does the norm "
            "before a tied head; an axis that no leaf reads is an output: neither copied nor closed"
        )


def _check_norms(move: AxisMap, table: Axes) -> None:
    """Raise `GrowthError` unless norms over a padded axis can be corrected by their gain and epsilon.

    Zeros add nothing to a mean square (an RMS norm), and means nothing to a variance (a LayerNorm);
    every old coordinate has to count as often as any other.
    """
    if mean_square(move) is None:
        return
    raise_all(
        GateError,
        f"norms over {move.axis!r} are still ramping, so the effect of zeros on them changes; "
        "settle these gates first:",
        [s.path for s in table.of_kind("gate") if s.own_axis == move.axis and s.value is not None],
    )
    norms = [slot for slot in table.normalised(move.axis) if slot.kind == "param"]
    produced = move.by("produced")
    p = np.ones(move.length) if produced is None else np.asarray(produced, float)
    alive = (move.source >= 0) & (p != 0)
    counts = np.bincount(move.source[alive], p[alive] ** 2, minlength=table.size(move.axis))
    if norms and np.ptp(counts) > 1e-9 * counts.max():
        raise GrowthError(
            f"{move.axis}: old coordinates count {counts.min():g} to {counts.max():g} times, so the "
            f"statistics of {', '.join(sorted(slot.path for slot in norms))} would change; copy each "
            "equally often"
        )
    pads, means = bool((~alive).any()), move.has_means
    mends = {
        slot.steps[:-1]
        for slot in table.values()
        if (move.axis in slot.spec.means and not means)
        or (move.axis in slot.spec.variances and (means or not pads))
    }
    if means:  # a norm's output has another mean than its gain
        roles = {n.steps[:-1]: {d.role for d in n.dims if d.axis == move.axis} for n in norms}
        mends -= {place for place in mends if "produced" in roles.get(place, ())}
    kind, norm = "zeros", "an RMS norm with a gain and its epsilon as a buffer"
    if means:
        kind, norm = "means", "a LayerNorm before a branch, its epsilon a buffer (`<~axis>`),"
    raise_all(
        GrowthError,
        f"{kind} on {move.axis!r} change the statistics of these norms, and only {norm} can be "
        "corrected; use gj.msg or an even gj.copy instead:",
        sorted(s.path for s in norms if s.steps[:-1] not in mends or s.value is None),
    )
