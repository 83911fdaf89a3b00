"""The algebra of maps along one axis: how each multiplies the weights and gradients of a leaf.

Along its axis a map is linear, per side. The leaves that produce the axis are multiplied by P, those that
consume it by C and elementwise ones by E, each a matrix `[new, old]`. The function is the same where

    C^T P = I

on the old coordinates (fresh ones are closed by a gate, or by zeros on one side), and gradients, hence
first moments, move by the dual: those of producers by C, those of consumers by P. Nearly every method is
sparse: each row has one old coordinate (`source`) times a multiplier. The others are

    MEAN rows    the mean of the old coordinates, in leaves that produce the axis (LEMON)
    a matrix     P, C or E in full (`linear` finds C from P, or checks the one that it is given)
    above        new rows of leaves that produce the axis come from the next layer (bert2BERT's AKI)
    over         another axis is dealt out to the copies: keys are copied, queries only regrouped
    finish       a rule has the last word on every array (noise that cancels, rows drawn around the old)

Where a gradient does not follow from the old ones, `undetermined` says why, and state is refused.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray

from growjax.axes import Axes, Role, Slot
from growjax.errors import AxisError, raise_all


NONE = -1
MEAN = -2
Init = (
    Callable[[PRNGKeyArray, tuple[int, ...], Any], Array]
    | Literal["born", "normal", "zeros", "matched"]
)
Side = Literal["gradient", "weight"]
# How far C^T P may be from I, entry by entry: float32 matrices with some thousand rows stay below it
_TOLERANCE = 1e-5


class Power(NamedTuple):
    """`|x|^degree`, with the sign of `x` if `odd`; where `x` is 0 it is 0, whatever the degree.

    `odd` is None where the law is known for nonnegative numbers only.
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
    """How an array that belongs to a parameter moves with it: by powers of its multipliers, entrywise.

    - `gradient`, `weight`: the power of the multiplier of the parameter's gradients, and of its values,
      that multiplies the array; None if it does not depend on them, "unknown" if it is no power.
    - `origin`: distances from this number are scaled (the constant that a sum began with).
    """

    gradient: Power | Literal["unknown"] | None = None
    weight: Power | Literal["unknown"] | None = None
    origin: float = 0.0

    @property
    def linear_in(self) -> Side | None:
        """The only side that the array depends on, if linearly, so that sums of entries follow it too."""
        sides: list[tuple[Side, Any]] = [("gradient", self.gradient), ("weight", self.weight)]
        known: list[tuple[Side, Any]] = [pair for pair in sides if pair[1] is not None]
        if len(known) != 1 or known[0][1] != Power(1, odd=True):
            return None
        return known[0][0]


WEIGHT = Law(weight=Power(1, odd=True))
FIRST = Law(gradient=Power(1, odd=True))
SECOND = Law(gradient=Power(2))


class AxisMap(eqx.Module):
    """A linear map along one axis; nearly always an index map with multipliers.

    **Fields**

    - `axis`: the axis's name.
    - `source`: `[new]` old index of every new one, `NONE` for a fresh coordinate, or `MEAN` (a mean in
      leaves that produce the axis, are looked up along it or stacked along it; fresh elsewhere). In a
      sub-network it may be traced, and `[stack, new]` picks coordinates layer by layer.
    - `share`: `[new]` multipliers of the leaves on one side (None: all ones).
    - `side`: which leaves take the share: those that consume the axis, or those that produce it.
    - `via`: on a stack axis, the axis whose producers take the share (the residual stream).
    - `gated`: whether new coordinates are hidden behind the model's gates, at level 0.
    - `pace`: `[new]` how many times as fast as the level of the gate each coordinate opens (None: 1).
    - `init`: how `NONE` coordinates are drawn: a callable `(key, shape, dtype) -> array` or a name.
    - `branch`: `[new]` multipliers of the residual branches of a stack axis (None: unchanged).
    - `active`: `[new]` flags of a stack axis: layers marked False are skipped.
    - `produced`, `consumed`, `elementwise`: the factor of the leaves of one role, where `share` for one
      side is not enough: `[new]` multipliers of the gathered coordinates, or a matrix `[new, old]` in
      place of the gather. Tables and stacks take the factor of producers, and so do elementwise leaves
      if it is a matrix and they have none of their own.
    - `above`: whether new rows of leaves that produce the axis come from the next layer of their stack,
      the last layer's from itself.
    - `over`: an axis that is divided among the copies. A leaf with both axes is reshaped instead of
      copied, so every coordinate is repeated in place, equally often: with `group`, two `kv_heads` of
      four queries become four of two.
    - `finish`: a `growjax.growth.Finish`, which changes each array after it was gathered and multiplied.
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
    produced: Any = None
    consumed: Any = None
    elementwise: Any = None
    above: bool = eqx.field(static=True, default=False)
    over: str | None = eqx.field(static=True, default=None)
    finish: Any = eqx.field(static=True, default=None)
    pace: Any = None

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

    @property
    def mixes(self) -> bool:
        """Whether a matrix stands for the leaves that produce the axis: rows need not have a source."""
        return is_matrix(self.produced)

    @property
    def born(self) -> bool:
        """Whether the map makes its axis: all coordinates are new, and their state starts anew."""
        return False

    def opened(self, model: Any) -> Any:
        """The model that the map is applied to: a map that makes its axis adds it here."""
        return model

    def finished(self, slot: Slot, array: Array, *, key: PRNGKeyArray | None) -> Array:
        """A parameter with the axis after the map; a map may redraw some of its entries here."""
        return array

    def limited(self, slot: Slot, before: Any, after: Any, start: float) -> Any:
        """Any array after the map; a map may keep some entries of `before` here."""
        return after

    @property
    def has_means(self) -> bool:
        """Whether some rows are means of the old ones."""
        return not self.traced and bool(np.any(self.source == MEAN))

    def by(self, role: Role) -> Any:
        """The factor of leaves' weights: multipliers `[new]`, a matrix `[new, old]`, or None."""
        own = getattr(self, role) if role in ("produced", "consumed", "elementwise") else None
        if own is None and role == self.side:
            return self.share
        if own is None and (role in ("lookup", "stack") or (role == "elementwise" and self.mixes)):
            return self.produced
        return own

    def dual(self, role: Role) -> Any:
        """The factor of leaves' gradients, as `by`; None where nothing multiplies them."""
        produced, consumed = self.by("produced"), self.by("consumed")
        if role == "produced":
            return consumed
        if role == "consumed":
            return produced
        if role in ("lookup", "stack") or is_matrix(produced) or is_matrix(consumed):
            return None
        factors = [factor for factor in (produced, consumed) if factor is not None]
        return factors[0] if len(factors) == 1 else produced * consumed if factors else None

    def rows(self, slot: Slot, dim: int) -> Any:
        """`source` for one dimension of a leaf: `MEAN` rows are `NONE` for leaves that take no means."""
        if not self.has_means or (
            slot.kind == "param" and slot.dims[dim].role in ("produced", "lookup", "stack")
        ):
            return self.source
        return np.where(self.source == MEAN, NONE, self.source)

    def is_new(self) -> np.ndarray:
        """`[new]` True where a coordinate is not the first home of an old one."""
        if self.born:
            return np.ones(self.length, bool)
        first = np.zeros(self.length, bool)
        first[np.unique(self.source, return_index=True)[1]] = True
        return ~first | (self.source < 0)

    def closed(self) -> np.ndarray:
        """`[new]` True where a new coordinate is hidden, so that its values do not change the outputs."""
        shut = np.full(self.length, self.gated)
        for factor in (self.share, self.produced, self.consumed):
            if factor is not None and not is_matrix(factor):
                shut |= np.asarray(factor) == 0
        return self.is_new() & shut

    def resized(self, sizes: dict[str, int]) -> dict[str, int]:
        """The sizes of a model's axes after the map."""
        after = {**sizes, self.axis: self.length}
        if self.over is not None:
            after[self.over] = sizes[self.axis] * sizes[self.over] // self.length
        return after

    def check(self, size: int) -> list[str]:
        """The errors of this map on an axis of `size` coordinates."""
        complaints = []
        if not self.traced:
            bad = sorted({int(i) for i in self.source.ravel() if not MEAN <= i < size})
            if bad:
                complaints.append(f"source {bad} is not among the {size} old coordinates")
        if self.side not in ("consumed", "produced"):
            complaints.append(f"side: expected 'consumed' or 'produced', got {self.side!r}")
        if not (callable(self.init) or self.init in ("born", "normal", "zeros", "matched")):
            complaints.append(
                "init must be a callable (key, shape, dtype) -> array or one of 'born', 'normal', "
                f"'zeros', 'matched', got {self.init!r}"
            )
        if self.share is not None and np.shape(self.share) != (self.length,):
            complaints.append(
                f"share has shape {np.shape(self.share)}, expected ({self.length},) as source"
            )
        if self.share is not None and getattr(self, self.side, None) is not None:
            complaints.append(f"share and {self.side} are two multipliers of the same leaves")
        for name in ("produced", "consumed", "elementwise"):
            shape = np.shape(getattr(self, name))
            if getattr(self, name) is not None and shape not in (
                (self.length,),
                (self.length, size),
            ):
                complaints.append(
                    f"{name} has shape {shape}, expected ({self.length},) as source or a matrix "
                    f"({self.length}, {size})"
                )
        if self.gated and (self.mixes or self.over):
            complaints.append("gated: a gate hides fresh coordinates and copies alone")
        return [f"axis {self.axis!r}: {complaint}" for complaint in complaints]


def is_matrix(factor: Any) -> bool:
    """Whether a factor mixes old coordinates, or may do so, instead of multiplying one."""
    return factor is not None and np.ndim(factor) == 2


def _one_source(matrix: Any) -> bool:
    """Whether no row of a matrix mixes several old coordinates."""
    return not isinstance(matrix, Tracer) and bool(np.all(np.count_nonzero(matrix, axis=1) <= 1))


# Dense maps ----------------------------------------------------------------------------------


def linear(axis: str, matrix: Any, dual: Any = None) -> AxisMap:
    """The map that takes producers of an axis by a matrix `[new, old]`, and its consumers by the dual.

    Without a `dual` `[new, old]` it is the one of least squares, `P (P^T P)^-1`. A matrix whose rows have
    one entry each becomes an ordinary map, with sources and multipliers.

    Raises `AxisError` if the old coordinates cannot be told apart afterwards (the rank is too low), or
    if `dual^T matrix` is not the identity.

    **Example**

        linear("head_dim", rotation)            # consumers take the rotation too
    """
    names = {"matrix": matrix} if dual is None else {"matrix": matrix, "dual": dual}
    arrays = {name: np.asarray(rows, float) for name, rows in names.items()}
    faults = [
        f"{name}: expected finite numbers [new, old] as the matrix, got shape {rows.shape}"
        for name, rows in arrays.items()
        if rows.ndim != 2 or not np.isfinite(rows).all() or rows.shape != np.shape(matrix)
    ]
    raise_all(AxisError, f"axis {axis!r} has no such map:", faults)
    p = arrays["matrix"]
    old = p.shape[1]
    if dual is None and (rank := int(np.linalg.matrix_rank(p))) < old:
        raise AxisError(
            f"axis {axis!r}: the matrix has rank {rank}, so {old} old coordinates cannot be told apart "
            "afterwards, and nothing can read them; give a matrix of full rank"
        )
    c = arrays["dual"] if dual is not None else _least_squares(p)
    off = np.abs(c.T @ p - np.eye(old))
    if off.max() > _TOLERANCE:
        i, j = np.unravel_index(int(off.argmax()), off.shape)
        raise AxisError(
            f"axis {axis!r}: dual^T matrix differs from the identity by {off.max():.1e} at [{i}, {j}], "
            "so consumers of the axis would not read its old coordinates; give no dual for that of least "
            "squares"
        )
    own = np.where((p != 0).sum(1) == 1, np.argmax(p != 0, axis=1), NONE)
    if (own != NONE).all() and not np.any(c[p == 0]):
        rows = np.arange(len(p))
        produced, consumed = (x[rows, own] if np.any(x[rows, own] != 1) else None for x in (p, c))
        return AxisMap(axis, own, produced=produced, consumed=consumed)
    return AxisMap(axis, own, produced=p, consumed=c)


def _least_squares(matrix: np.ndarray) -> np.ndarray:
    """The smallest C with C^T P = I."""
    gram = matrix.T @ matrix
    if np.array_equal(gram, np.diag(np.diag(gram))):  # without rounding where nothing is summed
        return matrix / np.diag(gram)
    return np.linalg.pinv(matrix).T


def _preserves(move: AxisMap, old: int) -> bool:
    """Whether C^T P = I on the old coordinates."""
    sides = []
    for factor in (move.by("consumed"), move.by("produced")):
        if isinstance(factor, Tracer):
            return False
        if not is_matrix(factor):
            # MEAN and NONE, -2 and -1, count from the end
            rows = np.concatenate([np.eye(old), np.full((1, old), 1 / old), np.zeros((1, old))])
            factor = rows[move.source] * np.reshape(1 if factor is None else factor, (-1, 1))
        sides.append(np.asarray(factor, float))
    return bool(np.all(np.abs(sides[0].T @ sides[1] - np.eye(old)) <= _TOLERANCE))


# The factors of one leaf ---------------------------------------------------------------------


def is_regrouped(move: AxisMap, slot: Slot) -> bool:
    """Whether a leaf has both axes of a map on a product of two, so that it is only reshaped."""
    return move.over is not None and bool(slot.positions(move.over))


def factors(move: AxisMap, table: Axes, slot: Slot) -> Iterator[tuple[int | None, Side, Any]]:
    """The factors by which a map multiplies a leaf: its dimension (None: all of it), side and factor.

    A factor is a vector of multipliers, or a matrix in place of the gather.
    """
    if slot.kind != "param" or is_regrouped(move, slot):
        return
    where = slot.positions(move.axis)
    for dim in where:
        role = slot.dims[dim].role
        if role == "stack" and move.produced is None:
            takes = any(d.axis == move.via and d.role == "produced" for d in slot.dims)
            takes = takes if slot.closes is None else slot.closes
            if move.share is not None:
                yield dim, "weight" if takes else "gradient", move.share
        else:
            weight, gradient = move.by(role), move.dual(role)
            if weight is not None:
                yield dim, "weight", weight
            if gradient is not None:
                yield dim, "gradient", gradient
    grown = mean_square(move)
    if grown is not None and any(slot.dims[dim].normalised for dim in where):
        scale = grown**0.5
        yield None, "weight", scale
        yield None, "gradient", 1 / scale


def mean_square(move: AxisMap) -> float | None:
    """The factor by which a map multiplies mean squares over its axis; None if it leaves norms alone.

    Copies add to them, and rows of zeros, or of means under a norm that subtracts the mean, do not. Only
    maps with a factor for producers, or with means, have one.
    """
    produced = move.by("produced")
    if move.traced or is_matrix(produced) or (produced is None and not move.has_means):
        return None
    weights = np.where(move.source < 0, 0.0, 1.0 if produced is None else np.asarray(produced))
    return float(np.sum(weights**2) / move.length)


def multiplied(
    move: AxisMap, table: Axes, slot: Slot, *, copies: bool = True
) -> dict[Side, Literal["positive", "any", "mixed"]]:
    """The sides that a map multiplies by anything but 1, in entries that do not start anew.

    Each with whether all multipliers are nonnegative, as far as is known, or whether several entries are
    summed ("mixed").
    """
    sides: dict[Side, Literal["positive", "any", "mixed"]] = {}
    for dim, side, factor in factors(move, table, slot):
        if is_matrix(factor) and not _one_source(factor):
            sides[side] = "mixed"
        elif sides.get(side) == "mixed":
            continue
        elif isinstance(factor, Tracer):
            sides[side] = "any"
        else:
            factor = np.asarray(factor)
            if dim is not None and not is_matrix(factor):
                factor = factor[~starts_anew(move, slot, dim, copies=copies)]
            if np.any(factor != 1):
                positive = sides.get(side) != "any" and bool(np.all(factor >= 0))
                sides[side] = "positive" if positive else "any"
    where = slot.positions(move.axis)
    if copies and any(np.any(move.rows(slot, dim) == MEAN) for dim in where if move.has_means):
        sides["weight"] = "mixed"  # gradients along these rows start anew
    return sides


def starts_anew(
    move: AxisMap, slot: Slot, dim: int, *, copies: bool, law: Law = FIRST
) -> np.ndarray:
    """`[new]` True where state along a dimension of a leaf has no history, and starts as in a fresh run.

    That is where there is no source and, with `copies=False`, where a coordinate is not the first home of
    its source. Means and mixtures of the old coordinates have the history of weights, not of gradients.
    """
    if is_regrouped(move, slot):
        return np.zeros(move.length, bool)
    if not copies:
        return move.is_new()
    role = slot.dims[dim].role
    if law.gradient is None and law.weight is not None:
        summed = is_matrix(move.by(role))
        return np.zeros(move.length, bool) if summed else move.rows(slot, dim) == NONE
    if role in ("produced", "consumed") and is_matrix(move.dual(role)):
        return np.zeros(move.length, bool)
    return move.source < 0


def undetermined(move: AxisMap, table: Axes, slot: Slot, *, copies: bool = True) -> str:
    """Why gradients of a grown leaf do not follow from those of the old one; "" where they do.

    Coordinates that start anew are left out.
    """
    if slot.kind != "param" or is_regrouped(move, slot):
        return ""
    axis = move.axis
    for dim in slot.positions(axis):
        role = slot.dims[dim].role
        inherited = ~starts_anew(move, slot, dim, copies=copies)
        if move.finish is not None and (reason := move.finish.undetermined(move, role)):
            return reason
        if move.over is not None and move.length > table.size(axis):
            return f"each copy of {axis} is read by a part of {move.over} alone"
        if move.above and role == "produced" and np.any(inherited & move.is_new()):
            return f"new {axis} come from the next layer, and their consumers from their own"
        dense = is_matrix(move.by("produced")) or is_matrix(move.by("consumed"))
        own = move.by(role) if role == "elementwise" else move.produced
        if role not in ("produced", "consumed") and (dense or own is not None):
            return f"this map of {axis} has a dual only for leaves that produce or consume it"
        if dense and not _preserves(move, table.size(axis)):
            return f"the dense map of {axis} has no dual: C^T P is not the identity"
        if _mixed_by_norms(move, table, role):
            return (
                f"norms over {axis} mix the gradients of its coordinates, and their copies have unequal "
                "shares (equal ones have a dual) or their means no history"
            )
    return ""


def _mixed_by_norms(move: AxisMap, table: Axes, role: Role) -> bool:
    """Whether norms over the axis keep gradients of producers from following the factor of consumers.

    The gradient that leaves a norm has lost its mean and its part along the activations. Both are sums
    over the axis, to which a copy adds by the square of the producers' factor p. Copies follow only if
    the consumers' factor c is proportional to p: otherwise the two parts of a gradient would have to be
    known apart.
    """
    produced, consumed = move.by("produced"), move.by("consumed")
    if move.traced or not table.normalised(move.axis):
        return False
    if is_matrix(produced) or is_matrix(consumed):
        return role in ("produced", "consumed")
    if role != "produced" or isinstance(produced, Tracer) or isinstance(consumed, Tracer):
        return False
    if move.has_means:
        return True
    ones = np.ones(move.length)
    p = ones if produced is None else np.asarray(produced, float)
    c = ones if consumed is None else np.asarray(consumed, float)
    alive = (move.source >= 0) & (p != 0)
    ratio = c[alive] / p[alive]
    return bool(alive.any() and np.ptp(ratio) > 1e-9 * np.abs(ratio).max())
