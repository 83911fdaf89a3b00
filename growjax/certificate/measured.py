"""Certificates: the effects of an operator on *this* model and *this* batch, as a printable record.

A certificate has four measurements:

- forward: how far outputs moved, in the training dtype and in float64. The noise floor beside it is the
  same for the small model with its coordinates permuted, which changes only the order of sums.
- poison: whether outputs stay bitwise the same for any values of closed new weights (0, N(0, 1), 42,
  1000).
- gradient: for an exact operator G, how far the transpose of G, applied to the grown model's gradient, is
  from the small model's gradient. This finds wrong scales that no forward pass shows.
- liveness: which new entries get no gradient after one and two steps, and which copies move exactly like
  their source and so never differ from it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from growjax import draws
from growjax.axes import axes_of, get, partition, put
from growjax.certificate.coordinates import (
    filled,
    new_coordinates,
    only_fills,
    shapes,
    steps,
)
from growjax.certificate.pieces import TURNS, in_pieces, repeats
from growjax.certificate.record import Certificate, Difference, agree
from growjax.cost import programs_in
from growjax.deferred import Deferred
from growjax.errors import GrowthError
from growjax.gates import check_level
from growjax.growth.operator import Chain, Operator, check_fitted
from growjax.models.config import QUICK
from growjax.values import check_key


# The fills of closed new coordinates: an offset, and the standard deviation of normal numbers around it
FILLS = {"0": (0.0, 0.0), "N(0, 1)": (0.0, 1.0), "42": (42.0, 0.0), "1000": (1000.0, 0.0)}

# The largest relative difference of outputs in float64 that the order of sums explains
SAME = 1e-9


def certify(
    op: Operator | Chain,
    model: Any,
    batch: Array | tuple[Array, ...],
    *,
    key: PRNGKeyArray | None = None,
    loss: Callable[[Any, Any], Array] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    level: float = 0.1,
) -> Certificate:
    """Certify an operator on a model and a batch. Neither is changed.

    **Arguments**

    - `op`, `key`: as for `gj.grow`.
    - `batch`: the model's input, with a leading batch dimension; a tuple for several inputs.
    - `loss`: `(model, batch) -> scalar`; by default a fixed smooth function of all outputs.
    - `forward`: `(model, batch) -> outputs`; by default the model under `vmap`. If an output has grown,
      its old entries are compared.
    - `level`: the level of gates while liveness is measured.

    **Example**

        print(gj.certify(gj.msg(mlp=2048), small, tokens, key=jax.random.key(0)))
    """
    check_fitted(op)
    check_key(key, GrowthError)
    leaves = [x for x in jax.tree.leaves(model) if eqx.is_inexact_array(x)]
    double = all(x.dtype == jnp.float64 for x in leaves)
    forward, big, turned = forward or call, shapes(op, model), permuted(model)
    programs = _programs(forward, loss, model, batch)
    # In the model's own dtype first
    with jax.enable_x64(double or jax.config.read("jax_enable_x64")):
        poison, after = _poison(op, model, batch, programs)
        if double:  # the measurement below is in the model's own dtype
            native = None
            outputs = lambda m: eqx.filter_eval_shape(forward, m, batch)  # noqa: E731
            shown = shown_outputs(outputs(model), outputs(big))
        else:
            if not (poison and all(poison.values()) and only_fills(op, model)):
                # Otherwise no bit of the outputs depends on closed coordinates, whatever they hold
                after = programs.outputs(_grown(op, model, key), batch)
            before, floor = programs.outputs(model, batch), programs.outputs(turned, batch)
            shown = shown_outputs(before.outputs, after.outputs)
            native = compared(before, after, floor, shown, coarsest(forward, model, batch))
    # Then everything in float64, which tells a wrong operator from rounding
    with jax.enable_x64(True):
        small = wide(model)
        # With float64 numbers a key draws others than with the model's own, so any key will do
        grown = _grown(op, small, key if key is None or double else draws.key(0))
        rows = jax.tree.map(_double, batch)
        before = programs.observed(small, rows, shown)
        after = programs.observed(grown, rows, shown)
        floor = programs.observed(wide(turned), rows, shown)
        if distance(before.outputs, floor.outputs)[1] > SAME:
            # An axis that the outside sees (what the model is called with has it): no symmetry
            floor = before
            native = native and dataclasses.replace(native, floor=0.0)
        exact = compared(before, after, floor, shown, "float64")
        gradient = None
        if op.exactness != "approximate":
            gradient = error(before.gradient, _pulled_back(op, small, key, after.gradient))
            # The transpose drops what new entries have alone, and with it NaN
            if np.isfinite(largest(before.gradient)) and not np.isfinite(largest(after.gradient)):
                gradient = np.inf
        if not agree(exact, gradient):
            # A model that casts to a dtype of its own rounds to that one in float64 as well
            everything = _Programs(forward, loss).outputs
            exact = dataclasses.replace(exact, dtype=coarsest(everything, small, rows))
        every = tuple(y.shape for y in jax.tree.leaves(after.outputs))
        kinds = (shown,) if loss is not None or shown == every else (shown, every)
        observe = lambda m, kind: programs.observed(m, rows, kind).gradient  # noqa: E731
        still = _still(before.gradient, model)
        dead, locked = _liveness(op, model, grown, after.gradient, still, kinds, observe, level)
    old, new = axes_of(model).sizes, axes_of(big).sizes
    return Certificate(
        operator=str(op),
        exactness=op.exactness,
        # An axis that the operator makes has one coordinate before
        axes={axis: (old.get(axis, 1), n) for axis, n in new.items() if old.get(axis, 1) != n},
        forward=(native, exact) if native else (exact,),
        poison=poison,
        gradient=gradient,
        dead=dead,
        locked=locked,
    )


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _jit(function: _Function) -> _Function:
    """`eqx.filter_jit` without costly optimisations, since a certificate runs a program only a few times.

    Matrix products are calls of a library, which are as fast either way. What needs no derivative (casts,
    permutations, levels of gates) is done by NumPy, without a program.
    """
    jit: Any = eqx.filter_jit
    return jit(function, compiler_options=QUICK)


class Observation(NamedTuple):
    """A model's outputs, loss (None: that of `probe`) and gradient on a batch."""

    outputs: Any
    loss: Array | None
    gradient: Any = None


class _Programs(eqx.Module):
    """What is observed of a model, small or grown."""

    forward: Callable = eqx.field(static=True)
    loss: Callable | None = eqx.field(static=True)

    def outputs(self, model, batch) -> Observation:
        outputs = self.forward(model, batch)
        return Observation(outputs, None if self.loss is None else self.loss(model, batch))

    def observed(self, model, batch, shown: "Shown") -> Observation:
        trained, rest = partition(model)

        def loss_of(trained):
            model = eqx.combine(trained, rest)
            outputs = self.forward(model, batch)
            loss = probe(outputs, shown) if self.loss is None else self.loss(model, batch)
            return loss, outputs

        (loss, outputs), gradient = jax.value_and_grad(loss_of, has_aux=True)(trained)
        return Observation(outputs, loss, gradient)


class _Whole(_Programs):
    """The same, each as one program."""

    outputs = _jit(_Programs.outputs)
    observed = _jit(_Programs.observed)


def _programs(forward: Callable, loss: Callable | None, model, batch) -> _Programs:
    """Whole programs; or in pieces, where many layers are unrolled."""
    table = axes_of(model)
    stacks = [size for axis, size in table.sizes.items() if "stack" in table.roles(axis)]
    if max(stacks, default=0) >= TURNS and repeats(forward, model, batch):
        return _Programs(in_pieces(forward), None if loss is None else in_pieces(loss))
    return _Whole(forward, loss)


@_jit
def _grown(op, model, key):
    return op(model, key=key)


@_jit
def _pulled_back(op, model, key, gradient):
    """The transpose of the operator, applied to a gradient of the grown model."""
    trained, rest = partition(model)

    def grow(trained):
        return partition(op(eqx.combine(trained, rest), key=key))[0]

    return jax.vjp(grow, trained)[1](gradient)[0]


def call(model, batch):
    """The model under `vmap` on a batch: an array, or a tuple of several inputs."""
    inputs = batch if isinstance(batch, tuple) else (batch,)
    # JAX would print the whole model for the name of its function
    return jax.vmap(lambda *inputs: model(*inputs))(*inputs)


# For each output the shape that a loss uses, or None for an output that it ignores
Shown = tuple[tuple[int, ...] | None, ...]


def shown_outputs(before, after) -> Shown:
    """The shapes of the outputs that a loss uses, those that do not grow; shapes of outputs will do.

    A grown output contains copies as separate entries, so a loss of it is not symmetric in the copies. If
    every output grows, the loss uses the old entries of all. Raises `GrowthError` if none has fractions.
    """
    if not any(jnp.issubdtype(y.dtype, jnp.inexact) for y in jax.tree.leaves(before)):
        dtypes = ", ".join(sorted({str(y.dtype) for y in jax.tree.leaves(before)})) or "nothing"
        raise GrowthError(f"forward: expected outputs with fractions, such as logits, got {dtypes}")
    pairs = [
        (a.shape, b.shape)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    ]
    all_grow = not any(a == b for a, b in pairs)
    return tuple(a if all_grow or a == b else None for a, b in pairs)


def probe(outputs, shown: Shown) -> Any:
    """A fixed smooth function of the shown outputs, which serves as a loss; by NumPy of its arrays."""
    total: Any = 0.0
    for y, shape in zip(jax.tree.leaves(outputs), shown, strict=True):
        if shape is not None:
            xp: Any = np if isinstance(y, np.ndarray) else jnp
            y = y[tuple(map(slice, shape))].astype(jnp.promote_types(y.dtype, jnp.float32))
            y = xp.where(xp.isinf(y), 0, y)  # masked logits
            # A weight for each entry, and a nonlinear and a linear term, so that nothing cancels
            ripple = xp.cos(xp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
            total = total + xp.mean(xp.sin(y) * ripple + y * ripple**2)
    return total


def coarsest(function: Callable, *args: Any) -> str:
    """The dtype with the largest rounding error in which a function holds or computes any number.

    Logits are often accumulated in a finer dtype than that of the activations, whose rounding they carry.
    """
    epsilons = {}

    def walk(jaxpr):
        for x in (*jaxpr.invars, *jaxpr.constvars, *(x for eqn in jaxpr.eqns for x in eqn.outvars)):
            dtype = getattr(x.aval, "dtype", None)
            if dtype is not None and jnp.issubdtype(dtype, jnp.inexact):
                epsilons[str(dtype)] = float(jnp.finfo(dtype).eps)
        for eqn in jaxpr.eqns:
            for inner in programs_in(eqn.params):
                walk(inner)

    walk(eqx.filter_make_jaxpr(function)(*args)[0].jaxpr)
    return max(epsilons, key=lambda dtype: epsilons[dtype])


def compared(before, after, floor, shown: Shown, dtype: str) -> Difference:
    """The difference of two observations; `floor` differs from the first by rounding in `dtype` alone."""
    before, after, floor = (jax.tree.map(np.asarray, each) for each in (before, after, floor))
    absolute, relative = distance(before.outputs, after.outputs)
    losses = [
        float(probe(each.outputs, shown) if each.loss is None else each.loss)
        for each in (before, after)
    ]
    noise = distance(before.outputs, floor.outputs)[1]
    return Difference(dtype, absolute, relative, losses[1] - losses[0], noise)


def distance(before, after) -> tuple[float, float]:
    """The largest absolute difference, and the largest relative to its array's largest entry.

    Of an array that has another shape now, the entries that both have are compared.
    """
    absolute, relative = 0.0, 0.0
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        b, a = b[tuple(map(slice, a.shape))], a[tuple(map(slice, b.shape))]
        b, a = np.asarray(b, np.float64), np.asarray(a, np.float64)
        # A masked logit is infinite before and after; the scale is that of the others
        with np.errstate(invalid="ignore"):
            gap = float(np.where(a == b, 0, np.abs(b - a)).max(initial=0))
        size = float(np.abs(a[np.isfinite(a)]).max(initial=0))
        # NaN would be lost in max(); infinity is larger than any limit
        gap = gap if np.isfinite(gap) else np.inf
        absolute = max(absolute, gap)
        relative = max(relative, gap / size if size else gap)
    return absolute, relative


def permuted(model):
    """The same function with hidden units and heads in reverse order."""
    table = axes_of(model)
    # Only axes between two arrays of a block can be permuted; a buffer would have to follow
    inner = {
        axis
        for axis in table.sizes
        if {"consumed", "produced"} <= table.roles(axis)
        and not table.is_stream(axis)
        and not table.having(axis, "buffer")
    }

    def flipped(slot, x, sizes):
        def reversed_in(part, x):
            turned = tuple(i for i, dim in enumerate(part.dims) if dim.axis in inner)
            return part.join(np.flip(part.split(x, sizes), turned))

        return slot.mapped(reversed_in, x, sizes)

    def flip(slot):
        def of(x):
            if not isinstance(x, Deferred):
                return flipped(slot, np.asarray(x), table.sizes)
            axis = slot.dims[x.dim].axis
            rows = lambda x, start, stop: flipped(slot, x, {**table.sizes, axis: stop - start})  # noqa: E731
            return x.by_rows(rows)

        return of

    slots = {s.steps: s for axis in inner for s in table.having(axis) if s.arrays()}
    return put(model, {steps: jax.tree.map(flip(s), s.value) for steps, s in slots.items()})


def _poison(op, model, batch, programs: _Programs) -> tuple[dict[str, bool], Any]:
    """For each fill of closed new coordinates, whether outputs are bitwise those of the first fill.

    Also what was observed with the first; None without closed coordinates.
    """
    if not any(m.closed().any() for atom, before in steps(op, model) for m in atom.maps(before)):
        return {}, None
    first, same = None, {}
    for name, (offset, spread) in FILLS.items():
        grown = _poisoned(op, model, np.float32(offset), np.float32(spread))
        observed = jax.tree.map(np.asarray, programs.outputs(grown, batch))
        first = observed if first is None else first
        pairs = [jax.tree.leaves(each.outputs) for each in (first, observed)]
        same[name] = all(np.array_equal(a, b) for a, b in zip(*pairs, strict=True))
    return same, first


@_jit
def _poisoned(op, model, offset, spread):
    """The grown model with closed new coordinates of this offset and spread."""

    def fill(key, shape, dtype):
        normal = lambda: offset + spread * jax.random.normal(key, shape, jnp.float32)  # noqa: E731
        return jax.lax.cond(spread > 0, normal, lambda: jnp.full(shape, offset)).astype(dtype)

    return filled(op, model, draws.key(0), fill)


def error(expected, actual) -> float:
    """The largest difference between the arrays of two trees, relative to the largest expected entry.

    It is absolute where all are 0, and NaN if any entry is.
    """
    expected, actual = (jax.tree.map(np.asarray, tree) for tree in (expected, actual))
    return largest(jax.tree.map(np.subtract, actual, expected)) / (largest(expected) or 1.0)


def largest(tree) -> float:
    """The largest absolute entry of the arrays of a tree; NaN if any entry is."""
    # Not by max() of Python, which loses NaN unless it comes first
    return float(np.max([np.abs(g).max(initial=0) for g in jax.tree.leaves(tree)], initial=0))


def _still(gradient, model) -> set[str]:
    """The parameters whose gradient is nothing but rounding: keys' biases, which a softmax cancels."""
    least = 1e-13 * largest(gradient)
    sizes = {
        slot.path: largest(get(gradient, slot.steps)) for slot in axes_of(model).of_kind("param")
    }
    return {path for path, size in sizes.items() if 0 < size <= least}


def _liveness(op, model, grown, gradient, still: set[str], kinds, observe: Callable, level: float):
    """The shares of dead entries and numbers of locked copies, by axis, over two steps of descent.

    **Arguments**

    - `gradient`: that of the grown model for the first of `kinds`, with its gates at their first level.
    - `still`: parameters that never have a gradient, grown or not, which are left out.
    - `kinds`: the outputs that a loss uses: first those in which copies are alike, which tell what is
      locked, and last all, which tell what is dead.
    - `observe`: a function from a model and one of these to a gradient.
    """
    new, homes = new_coordinates(op, model)
    check_level(level)
    gates = [slot for slot in axes_of(grown).of_kind("gate") if slot.value is not None]
    levels = {(*s.steps, "value"): np.where(s.value.new, level, 1.0) for s in gates}
    grown = put(grown, levels)
    trained, rest = partition(grown)
    trained = jax.tree.map(np.asarray, trained)
    zero, change = [], None
    for kind in kinds:
        moved, shares = trained, []
        for step in range(2):
            if step or gates or kind != kinds[0]:
                gradient = observe(eqx.combine(moved, rest), kind)
            gradient = jax.tree.map(np.asarray, gradient)
            shares.append(_dead(grown, gradient, new, still))
            top = largest(gradient)
            scale = 1e-3 / top if top else 0.0  # the largest change of a parameter is 1e-3
            moved = jax.tree.map(lambda p, g: p - scale * g, moved, gradient)  # noqa: B023
        zero = shares
        change = change or jax.tree.map(lambda a, b: a - b, moved, trained)
    locked = {axis: _locked(grown, change, axis, new[axis], homes[axis]) for axis in new}
    return {axis: (zero[0][axis], zero[1][axis]) for axis in new}, locked


def _dead(model, gradient, new: dict[str, np.ndarray], still: set[str]) -> dict[str, float]:
    """For each axis, the share of entries at new coordinates whose gradient is 0, or not finite.

    Rows of a table are left out along the axis of the rows: those that the batch lacks have none.
    """
    table, shares = axes_of(model), {}
    for axis, mask in new.items():
        zero = total = 0
        for slot in table.having(axis, "param"):
            g = get(gradient, slot.steps)
            if g is None or slot.path in still:
                continue
            for part, piece in zip(slot.parts, slot.cut(g, table.sizes), strict=True):
                piece = np.asarray(part.split(piece, table.sizes))
                # Along another axis one gradient in any row is enough
                lookups = tuple(
                    i
                    for i, dim in enumerate(part.dims)
                    if dim.role == "lookup" and dim.axis != axis
                )
                looked_up = any(d.axis == axis and d.role == "lookup" for d in part.dims)
                if looked_up and all(dim.role != "consumed" for dim in part.dims):
                    continue  # experts are looked up as well, and consume
                alive = np.any((piece != 0) & np.isfinite(piece), axis=lookups, keepdims=True)
                # A square matrix has the axis twice; it is counted along the first
                for dim in part.positions(axis)[:1]:
                    new_ones = np.compress(mask, alive, axis=dim)
                    zero, total = zero + int((~new_ones).sum()), total + new_ones.size
        shares[axis] = zero / total if total else 0.0
    return shares


def _locked(model, change, axis: str, new: np.ndarray, homes: np.ndarray) -> int:
    """The number of new coordinates that changed exactly like their source in every array."""
    table = axes_of(model)
    same = new & (homes != np.arange(len(homes)))
    for slot in table.having(axis, "param"):
        delta = get(change, slot.steps)
        if delta is None or not delta.size:  # in a stack without layers nothing moves
            same = same & (delta is None)
            continue
        for part, piece in zip(slot.parts, slot.cut(delta, table.sizes), strict=True):
            piece = np.asarray(part.split(piece, table.sizes))
            for dim in part.positions(axis):
                gap = np.abs(piece - np.take(piece, homes, axis=dim))
                others = tuple(i for i in range(piece.ndim) if i != dim)
                same = same & (gap.max(axis=others) <= 1e-9 * np.abs(delta).max())
    return int(same.sum())


def _double(x):
    """Inputs as wide as the model: some operations (convolutions) take no two dtypes."""
    return np.asarray(x, np.float64) if eqx.is_inexact_array_like(x) else x


def wide(model):
    """The model in float64, without a static `dtype`, which would make it compute in another."""

    def widened(x):
        if isinstance(x, Deferred):
            return x.astype(np.float64)
        return np.asarray(x).astype(np.float64) if eqx.is_inexact_array(x) else x

    model = jax.tree.map(widened, model)
    return put(model, {("dtype",): None}) if getattr(model, "dtype", None) else model
