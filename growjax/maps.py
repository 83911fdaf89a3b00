"""AxisMap: one index map along one named axis, and all that follows from it.

    source   new index -> old index, or NONE for a coordinate that did not exist
    share    a multiplier per new index, taken by the leaves on one side of the axis

Every method in growjax is a list of these. For each leaf that carries the axis, `transport` gathers
by `source`, draws what is `NONE`, and applies `share`:

    weights        leaves on `side` ("consumed" by default) are multiplied by the share
    gradients      all other leaves are (the dual of the map)
    state          of an optimizer: by the power of either that it scales with (its `Law`)

so that copies of one coordinate with shares that sum to 1 compute what the one did, and their
gradients are what back-propagation will find. On a stack axis (`layers`) the side is that of the
residual stream: the leaves of the block that produce `via` take the share. Lookup axes (`vocab`,
`positions`) have none. A norm that averages over an axis whose new coordinates are held at zero by
their producers has its gain and epsilon rescaled. Gates, sharding, cost and names read the same table.

Checked in float64 by `tests/test_maps.py`: outputs, the transposed gradient, and the moments.
"""

import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray

from growjax.axes import Axes, DeclaredOutside, Slot, axes_of, put
from growjax.errors import AxisError, GateError, GrowthError, SubnetError, raise_all
from growjax.gates import Gate


NONE = -1
Init = Callable[[PRNGKeyArray, tuple[int, ...], Any], Array] | Literal["normal", "zeros", "matched"]
Side = Literal["gradient", "weight"]


class Power(NamedTuple):
    """`|x|^degree`, with the sign of `x` if `odd`; where `x` is 0 it is 0, whatever the degree.

    `odd` is None where that is known only of numbers that are not negative.
    """

    degree: float
    odd: bool | None = False

    def of(self, x: Array) -> Array:
        """The power of every number in an array."""
        if self.degree == 1 and self.odd:
            return x
        # Whole degrees are products, which round as the squares of an optimizer do
        whole = int(self.degree) if self.degree == int(self.degree) else self.degree
        sign = jnp.sign(x) if self.odd else 1
        return jnp.where(x == 0, 0, sign * jnp.abs(x) ** whole)


class Law(NamedTuple):
    """How an array that belongs to a parameter moves with it: what it scales with, entry by entry.

    - `gradient`, `weight`: by which power of what multiplies the parameter's gradients, and of what
      multiplies its values; None if it does not depend on them, "unknown" if by no power.
    - `origin`: what is scaled is the distance from this number (the constant that a sum began with).
    """

    gradient: Power | Literal["unknown"] | None = None
    weight: Power | Literal["unknown"] | None = None
    origin: float = 0.0


WEIGHT = Law(weight=Power(1, odd=True))
FIRST = Law(gradient=Power(1, odd=True))
SECOND = Law(gradient=Power(2))


class AxisMap(eqx.Module):
    """An index map along one axis.

    **Fields**

    - `axis`: the axis's name.
    - `source`: `[new]` old index of every new one, or `NONE`. In a sub-network it may be traced, and
      `[stack, new]` picks coordinates layer by layer.
    - `share`: `[new]` multipliers (None: all ones).
    - `side`: which leaves take the share: those that consume the axis, or those that produce it.
    - `via`: on a stack axis, the axis whose producers take the share (the residual stream).
    - `gated`: whether new coordinates are hidden behind the model's gates, at level 0.
    - `init`: how `NONE` coordinates are drawn: a callable `(key, shape, dtype) -> array` or a name.
    - `branch`: `[new]` multipliers of the residual branches of a stack axis (None: unchanged).
    - `active`: `[new]` flags of a stack axis: layers marked False are skipped.
    """

    axis: str = eqx.field(static=True)
    source: Any
    share: Any = None
    side: Literal["consumed", "produced"] = eqx.field(static=True, default="consumed")
    via: str = eqx.field(static=True, default="embed")
    gated: bool = eqx.field(static=True, default=False)
    init: Init = eqx.field(static=True, default="normal")
    branch: Any = None
    active: Any = None

    def __post_init__(self):
        if not isinstance(self.source, jax.Array):
            self.source = np.asarray(self.source, np.int32)

    @property
    def length(self) -> int:
        """The size of the axis afterwards."""
        return self.source.shape[-1]

    @property
    def traced(self) -> bool:
        """Whether `source` is only known at run time (sub-networks)."""
        return isinstance(self.source, jax.Array)

    def is_new(self) -> np.ndarray:
        """`[new]` True where a coordinate is not the first home of an old one."""
        first = np.zeros(self.length, bool)
        first[np.unique(self.source, return_index=True)[1]] = True
        return ~first | (self.source == NONE)

    def check(self, size: int) -> list[str]:
        """What is wrong with this map on an axis of `size` coordinates."""
        complaints = []
        if not self.traced:
            bad = sorted({int(i) for i in self.source.ravel() if not NONE <= i < size})
            if bad:
                complaints.append(f"source {bad} is not among the {size} old coordinates")
        if self.side not in ("consumed", "produced"):
            complaints.append(f"side: expected 'consumed' or 'produced', got {self.side!r}")
        if not (callable(self.init) or self.init in ("normal", "zeros", "matched")):
            complaints.append(
                "init must be a callable (key, shape, dtype) -> array or one of 'normal', 'zeros', "
                f"'matched', got {self.init!r}"
            )
        if self.share is not None and np.shape(self.share) != (self.length,):
            complaints.append(
                f"share has shape {np.shape(self.share)}, expected ({self.length},) as source"
            )
        return [f"axis {self.axis!r}: {complaint}" for complaint in complaints]


def apply(move: AxisMap, model, key: PRNGKeyArray | None):
    """The model after one map: every leaf, gate and per-layer multiplier that has the axis.

    Raises `AxisError` for an unknown axis or a source out of range, `GateError` if gates are asked for
    and there are none or they are still open, `GrowthError` if a norm forbids the map.
    """
    table = axes_of(model)
    raise_all(AxisError, "the map does not fit the model:", move.check(table.size(move.axis)))
    _check_gates(move, table)
    _check_norms(move, table)
    values: dict[tuple, Any] = {}
    for slot in table.having(move.axis):
        values[slot.steps] = _transport_slot(move, table, slot, key)
    for slot in _mean_buffers(move, table):
        values[slot.steps] = slot.value * (table.size(move.axis) / move.length)
    model = put(model, values)
    if isinstance(model, DeclaredOutside):
        model = model.resized({**table.sizes, move.axis: move.length})
    _recheck(model)
    return model


def touched(move: AxisMap, table: Axes) -> set[tuple]:
    """The places of what a map changes; all other leaves stay as they are."""
    return {slot.steps for slot in (*table.having(move.axis), *_mean_buffers(move, table))}


def _mean_buffers(move: AxisMap, table: Axes) -> list[Slot]:
    """The buffers that are added to a mean over the axis, if new coordinates shrink that mean."""
    buffers = table.of_kind("buffer") if _zero_padded(move) else []
    return [slot for slot in buffers if move.axis in slot.spec.means]


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
    moved = _move(move, table, slot, array, law, fresh=law.origin)
    anew = (move.source == NONE) if copies else move.is_new()
    where = slot.positions(move.axis)
    if not anew.any() or (copies and not hasattr(fresh, "shape") and fresh == law.origin):
        return moved
    sizes = {**table.sizes, move.axis: move.length}
    x = slot.split(moved, sizes)
    fresh = jnp.asarray(fresh, x.dtype)
    if fresh.ndim:
        fresh = slot.split(fresh, sizes)
    return slot.join(jnp.where(_crosses(anew, x.ndim, where), fresh, x))


def multiplied(
    move: AxisMap, table: Axes, slot: Slot, *, copies: bool = True
) -> dict[Side, Literal["positive", "any"]]:
    """What a map multiplies, by anything but 1, in the entries of a parameter that do not start anew.

    With it whether all that it is multiplied by is positive, as far as is known.
    """
    anew = (move.source == NONE) if copies else move.is_new()
    sides: dict[Side, Literal["positive", "any"]] = {}
    for dim, side, factor in _factors(move, table, slot):
        if isinstance(factor, Tracer):
            sides[side] = "any"
            continue
        factor = np.asarray(factor) if dim is None else np.asarray(factor)[~anew]
        if np.any(factor != 1):
            positive = sides.get(side) != "any" and bool(np.all(factor >= 0))
            sides[side] = "positive" if positive else "any"
    return sides


# One leaf ------------------------------------------------------------------------------------


def _transport_slot(move: AxisMap, table: Axes, slot: Slot, key):
    """The new value of one slot, whatever its kind."""
    own = slot.kind in ("gate", "branch", "active") and slot.own_axis == move.axis
    if slot.kind == "gate":
        if own and move.gated:
            return _new_gate(move, table, slot)
        if slot.value is None:
            return None
        value = _move(move, table, slot, slot.value.value, WEIGHT, fresh=1)
        return Gate(value, _move(move, table, slot, slot.value.new, WEIGHT, fresh=False))
    if own and slot.kind in ("branch", "active"):
        given = move.branch if slot.kind == "branch" else move.active
        if slot.value is None:
            return given
        kept = _move(move, table, slot, slot.value, WEIGHT, fresh=1)
        return kept if given is None else kept * given
    if slot.value is None:
        return None
    return _move(move, table, slot, slot.value, WEIGHT, fresh=_Fresh(move, slot, key))


def _move(move: AxisMap, table: Axes, slot: Slot, array: Array, law: Law, fresh: Any):
    """Gather one array along the axis and multiply by what its side and its law call for.

    `fresh` is what a NONE coordinate holds: a number, or a `_Fresh` that draws it.
    """
    x = slot.split(array, table.sizes)
    where = slot.positions(move.axis)
    if move.traced:
        x = _gather_traced(move, slot, x, where)
    elif len(where) > 1 and isinstance(fresh, _Fresh) and np.any(move.source == NONE):
        for dim in where:
            x = _gather(move.source, x, dim, 0)
        x = jnp.where(_crosses(move.source == NONE, x.ndim, where), fresh.cells(x, where), x)
    else:
        for dim in where:
            x = _gather(move.source, x, dim, fresh)
    for dim, side, factor in _factors(move, table, slot):
        power = law.gradient if side == "gradient" else law.weight
        if isinstance(power, Power):
            scale = power.of(jnp.asarray(factor, x.dtype))
            scale = scale if dim is None else _along(scale, x.ndim, dim)
            x = law.origin + (x - law.origin) * scale if law.origin else x * scale
    return slot.join(x)


def _factors(move: AxisMap, table: Axes, slot: Slot) -> Iterator[tuple[int | None, Side, Any]]:
    """What a map multiplies a leaf by: its weights or its gradients, along which dimension or all."""
    if slot.kind != "param":
        return
    where = slot.positions(move.axis)
    for dim in where if move.share is not None else ():
        role = slot.dims[dim].role
        if role == "stack":
            takes = any(d.axis == move.via and d.role == "produced" for d in slot.dims)
        else:
            takes = role == move.side
        if role != "lookup":
            yield dim, "weight" if takes else "gradient", move.share
    if _zero_padded(move) and any(slot.dims[dim].normalised for dim in where):
        scale = (table.size(move.axis) / move.length) ** 0.5
        yield None, "weight", scale
        yield None, "gradient", 1 / scale


def _along(vector, ndim: int, dim: int):
    """A vector shaped to broadcast along one dimension of an `ndim`-dimensional array."""
    return vector.reshape(vector.shape + (1,) * (ndim - dim - 1))


def _crosses(chosen: np.ndarray, ndim: int, where: list[int]) -> np.ndarray:
    """Where any of several dimensions is at a chosen coordinate (broadcastable)."""
    return functools.reduce(np.logical_or, [_along(chosen, ndim, dim) for dim in where])


def _gather(source: np.ndarray, x: Array, dim: int, fresh: Any) -> Array:
    """`x[source]` along `dim`, with fresh coordinates where `source` is NONE."""
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

    def take(array, source, axis):
        return jnp.take(
            array, source, axis=axis, mode="clip", unique_indices=True, indices_are_sorted=True
        )

    (dim,) = where
    if move.source.ndim == 1:
        return take(x, move.source, dim)
    if slot.dims[0].role != "stack":
        raise SubnetError(
            f"{slot.path}: coordinates of {move.axis!r} differ layer by layer, but this leaf is shared "
            "by all layers; choose the same ones for every layer"
        )
    return jax.vmap(lambda array, source: take(array, source, dim - 1))(x, move.source)


# Fresh coordinates ---------------------------------------------------------------------------


def fold_in_name(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """A key that depends on a name and on nothing else (not on how many names there are)."""
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
        if self.slot.kind == "buffer":
            return jnp.take(x, ids % x.shape[dim], axis=dim)
        draws = jax.vmap(self._draw(x, [dim]))(jnp.asarray(ids))
        return jnp.moveaxis(draws, 0, dim)

    def cells(self, x: Array, dims: list[int]) -> Array:
        """Fresh values for all of `x`, where rows and columns along `dims` cross.

        A slice along one of them would depend on the number of hops.
        """
        index = jnp.arange(self.move.length)
        draw = self._draw(x, dims)
        draws = jax.vmap(lambda i: jax.vmap(lambda j: draw(i, j))(index))(index)
        return jnp.moveaxis(draws, (0, 1), dims)

    def _draw(self, x: Array, dims: list[int]) -> Callable:
        shape = tuple(n for i, n in enumerate(x.shape) if i not in dims)
        init = _initialiser(self.move.init, self.slot, x, dims)
        constant = self.move.init == "zeros" or (
            self.move.init == "normal" and self.slot.init != "normal"
        )
        if constant:
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


def _initialiser(init: Init, slot: Slot, x: Array, dims: list[int]) -> Callable:
    if callable(init):
        return init
    if init == "zeros" or (init == "normal" and slot.init == "zeros"):
        return lambda key, shape, dtype: jnp.zeros(shape, dtype)
    if init == "normal" and slot.init == "ones":
        return lambda key, shape, dtype: jnp.ones(shape, dtype)
    if init == "normal":
        return lambda key, shape, dtype: 0.02 * jax.random.normal(key, shape, dtype)
    # "matched": the mean and deviation of the old tensor, layer by layer where layers are kept.
    over = [i for i, dim in enumerate(slot.dims) if dim.role != "stack" or i in dims]
    mean = jnp.squeeze(jnp.mean(x, over, keepdims=True), dims)
    std = jnp.squeeze(jnp.std(x, over, keepdims=True), dims)
    return lambda key, shape, dtype: mean + std * jax.random.normal(key, shape, dtype)


# Gates and norms -----------------------------------------------------------------------------


def _new_gate(move: AxisMap, table: Axes, slot: Slot) -> Gate:
    new = move.is_new()
    shape = [table.sizes[dim.axis] for dim in slot.dims[:-1]] + [move.length]
    new = jnp.broadcast_to(jnp.asarray(new), shape)
    return Gate((~new).astype(float), new)


def _check_gates(move: AxisMap, table: Axes) -> None:
    if not move.gated:
        return
    mine = [slot for slot in table.of_kind("gate") if slot.own_axis == move.axis]
    if not mine:
        raise GateError(
            f"this model declares no gate on axis {move.axis!r}, so new coordinates cannot be hidden; "
            "use gj.copy or gj.zeros, or declare one with gj.gate"
        )
    raise_all(
        GateError,
        f"axis {move.axis!r} is still ramping; ramp it to 1 and settle it before growing it again:",
        [slot.path for slot in mine if slot.value is not None],
    )


def _zero_padded(move: AxisMap) -> bool:
    """Whether producers hold the new coordinates at zero, so that means over the axis shrink."""
    return move.side == "produced" and move.share is not None


def _check_norms(move: AxisMap, table: Axes) -> None:
    """A zero-padded axis needs a norm whose epsilon is data and which subtracts no mean."""
    if not _zero_padded(move):
        return
    raise_all(
        GateError,
        f"norms over {move.axis!r} are still ramping, so what zeros do to their statistics changes; "
        "settle these gates first:",
        [s.path for s in table.of_kind("gate") if s.own_axis == move.axis and s.value is not None],
    )
    mends = {slot.steps[:-1] for slot in table.values() if move.axis in slot.spec.means}
    raise_all(
        GrowthError,
        f"zeros on {move.axis!r} change the statistics of these norms, and only an RMS norm with its "
        "epsilon as a buffer can be corrected; use gj.msg or an even gj.copy instead:",
        sorted(
            slot.path
            for slot in table.normalised(move.axis)
            if slot.kind == "param" and slot.steps[:-1] not in mends
        ),
    )


def _recheck(node) -> None:
    """What a module demands of its sizes when it is built, it demands after growth too."""
    children: Any = ()
    if isinstance(node, eqx.Module):
        for cls in type(node).__mro__:
            if "__check_init__" in vars(cls):
                cls.__check_init__(node)
        children = vars(node).values()
    elif isinstance(node, list | tuple):
        children = node
    elif isinstance(node, dict):
        children = node.values()
    for child in children:
        _recheck(child)
