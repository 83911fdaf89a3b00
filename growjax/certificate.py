"""Certificates: what an operator did to *this* model on *this* batch, as a printable record.

Four questions, each answered by computation:

- forward: how far did outputs move, in the training dtype and in float64, next to the noise floor of
  the machine (the same model with its coordinates permuted, which changes only the order of sums)?
- poison: do outputs stay bitwise the same whatever the new weights hold (0, N(0, 1), 42, 1000)?
- gradient: for an exact operator G, is the transpose of G, applied to the grown model's gradient, the
  small model's gradient? This sees wrong scales that no forward pass shows.
- liveness: which new entries still get no gradient after one and two steps, and which copies move
  exactly like their source and so will never differ from it?
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from growjax import maps
from growjax.algebra import NONE, AxisMap
from growjax.axes import axes_of, get, partition, put
from growjax.gates import ramp
from growjax.growth.operator import Chain, Exactness, Operator, atoms


# What closed new coordinates are filled with: an offset, and normal numbers of some spread around it
FILLS = {"0": (0.0, 0.0), "N(0, 1)": (0.0, 1.0), "42": (42.0, 0.0), "1000": (1000.0, 0.0)}

# The largest relative difference of outputs in float64 that the order of sums explains
_SAME = 1e-9


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far outputs and loss moved: largest absolute and relative (to the largest output)."""

    dtype: str
    absolute: float
    relative: float
    loss: float
    floor: float

    @property
    def limit(self) -> float:
        """What rounding explains: 1e-12 in float64, else 16 of the dtype's steps; or 16 floors."""
        steps = 1e-12 if self.dtype == "float64" else 16 * float(jnp.finfo(self.dtype).eps)
        return max(steps, 16 * self.floor)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The record that `certify` returns; `str` prints it, `to_dict` stores it.

    - `axes`: axis to (old size, new size).
    - `forward`: one `Difference` per dtype.
    - `poison`: fill to whether outputs are bitwise those of the first fill (empty: nothing is drawn).
    - `gradient`: largest relative error of the transposed gradient, float64 (None: not exact).
    - `dead`: axis to the share of its new entries without gradient after one and after two steps.
    - `locked`: axis to the number of copies that moved exactly like their source.
    """

    operator: str
    exactness: Exactness
    axes: dict[str, tuple[int, int]]
    forward: tuple[Difference, ...]
    poison: dict[str, bool]
    gradient: float | None
    dead: dict[str, tuple[float, float]]
    locked: dict[str, int]

    @property
    def passed(self) -> bool:
        """Whether the operator kept what its exactness class promises (nothing, if approximate)."""
        if self.exactness == "approximate":
            return True
        kept = all(d.relative <= d.limit for d in self.forward)
        grown = self.gradient is None or self.gradient <= 1e-10
        return kept and grown and all(self.poison.values())

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, ready for JSON."""
        return {**dataclasses.asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        verdict = "keeps its promise" if self.passed else "BREAKS ITS PROMISE"
        verdict = "a jump is expected" if self.exactness == "approximate" else verdict
        sizes = ", ".join(f"{axis} {a} -> {b}" for axis, (a, b) in self.axes.items())
        lines = [f"{self.operator}: {self.exactness}, {verdict}", f"  axes      {sizes or 'none'}"]
        lines += [
            f"  forward   {d.dtype}: outputs {d.absolute:.1e} abs, {d.relative:.1e} rel "
            f"(noise floor {d.floor:.1e}), loss {d.loss:+.1e}"
            for d in self.forward
        ]
        if self.poison:
            same = [fill for fill, ok in self.poison.items() if ok]
            other = [fill for fill, ok in self.poison.items() if not ok]
            text = f"bitwise equal under {', '.join(same)}" if same else "never equal"
            lines.append(f"  poison    {text}" + (f"; CHANGED by {', '.join(other)}" * bool(other)))
        if self.gradient is not None:
            lines.append(f"  gradient  transpose agrees to {self.gradient:.1e}")
        for axis, (one, two) in self.dead.items():
            lock = f"; {self.locked[axis]} locked to their source" if self.locked.get(axis) else ""
            lines.append(
                f"  liveness  {axis}: {one:.0%} of new entries without gradient after one step, "
                f"{two:.0%} after two{lock}"
            )
        return "\n".join(lines)


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
    - `batch`: what the model is called with, with a leading batch dimension (a tuple for several).
    - `loss`: `(model, batch) -> scalar`; by default a fixed smooth function of all outputs.
    - `forward`: `(model, batch) -> outputs`; by default the model under `vmap`. Where an output has
      grown, its old corner is compared.
    - `level`: where gates stand while liveness is measured.

    **Example**

        print(gj.certify(gj.msg(mlp=2048), small, tokens, key=jax.random.key(0)))
    """
    forward = forward or call
    programs = _Programs(forward, loss, shown_outputs(forward, op, model, batch))
    permuted = _permuted(model)
    with jax.enable_x64(True):
        small = _wide(model)
        grown = _grown(op, small, key)
        before, after = programs.observed(small, batch), programs.observed(grown, batch)
        floor = programs.observed(_wide(permuted), batch)
        if distance(before.outputs, floor.outputs)[1] > _SAME:
            # An axis that the outside sees (what the model is called with has it): no symmetry
            permuted, floor = model, before
        exact = _difference(before, after, floor)
        gradient = None
        if op.exactness != "approximate":
            gradient = _error(before.gradient, _pulled_back(op, small, key, after.gradient))
        dead, locked = _liveness(op, model, grown, batch, programs, level)
    leaves = [x for x in jax.tree.leaves(model) if eqx.is_inexact_array(x)]
    double = all(x.dtype == jnp.float64 for x in leaves)
    forward_lines = (exact,)
    with jax.enable_x64(double or jax.config.read("jax_enable_x64")):
        poison = _poison(op, model, batch, programs)
        if not double:
            models = model, _grown(op, model, key), permuted
            native = _difference(*(programs.outputs(each, batch) for each in models))
            forward_lines = (native, exact)
    old, new = axes_of(model).sizes, axes_of(shapes(op, model)).sizes
    return Certificate(
        operator=str(op),
        exactness=op.exactness,
        axes={axis: (n, new[axis]) for axis, n in old.items() if new[axis] != n},
        forward=forward_lines,
        poison=poison,
        gradient=gradient,
        dead=dead,
        locked=locked,
    )


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _jit(function: _Function) -> _Function:
    """`eqx.filter_jit` without costly optimisations: a certificate's programs run a few times each.

    Matrix products are library calls either way.
    """
    cheap = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    jit: Any = eqx.filter_jit
    return jit(function, compiler_options=cheap)


class _Observation(NamedTuple):
    """What a model computes on a batch."""

    outputs: Any
    loss: Array
    gradient: Any = None


class _Programs(eqx.Module):
    """What is computed of a small and of a grown model: one program each, whatever they hold."""

    forward: Callable = eqx.field(static=True)
    loss: Callable | None = eqx.field(static=True)
    shown: "Shown" = eqx.field(static=True)

    @_jit
    def outputs(self, model, batch) -> _Observation:
        loss, outputs = self._loss(model, batch)
        return _Observation(outputs, loss)

    @_jit
    def observed(self, model, batch) -> _Observation:
        trained, rest = partition(model)
        loss = lambda trained: self._loss(eqx.combine(trained, rest), batch)  # noqa: E731
        (loss, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        return _Observation(outputs, loss, gradient)

    def _loss(self, model, batch):
        outputs = self.forward(model, batch)
        loss = probe(outputs, self.shown) if self.loss is None else self.loss(model, batch)
        return loss, outputs


@_jit
def _grown(op, model, key):
    return op(model, key=key)


@_jit
def _pulled_back(op, model, key, gradient):
    """A gradient of the grown model, taken back through the operator."""
    trained, rest = partition(model)

    def grow(trained):
        return partition(op(eqx.combine(trained, rest), key=key))[0]

    return jax.vjp(grow, trained)[1](gradient)[0]


def call(model, batch):
    """The model under `vmap` on a batch: an array, or a tuple of several inputs."""
    return jax.vmap(model)(*batch) if isinstance(batch, tuple) else jax.vmap(model)(batch)


Shown = tuple[tuple[int, ...] | None, ...]


def shown_outputs(forward: Callable, op, model, batch) -> Shown:
    """What a loss may look at: the shapes of the outputs that `op` leaves as they are.

    An output that grew shows copies one by one, so a loss of it is not symmetric in them. If every
    output grows, their old corners are used all the same.
    """

    def of(model):
        with jax.enable_x64(True):
            return [y.shape for y in jax.tree.leaves(eqx.filter_eval_shape(forward, model, batch))]

    before, after = of(model), of(shapes(op, model))
    none = not any(a == b for a, b in zip(before, after, strict=True))
    return tuple(a if none or a == b else None for a, b in zip(before, after, strict=True))


def probe(outputs, shown: Shown) -> Array:
    """A fixed smooth function of the shown outputs."""
    total = jnp.zeros(())
    for y, shape in zip(jax.tree.leaves(outputs), shown, strict=True):
        if shape is not None:
            y = y[tuple(map(slice, shape))].astype(jnp.promote_types(y.dtype, jnp.float32))
            ripple = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
            total = total + jnp.mean(jnp.sin(y) * ripple + y * ripple**2)
    return total


def _difference(before, after, floor) -> Difference:
    """Two observations, and a third that differs from the first by rounding alone."""
    absolute, relative = distance(before.outputs, after.outputs)
    leaves = [leaf for leaf in jax.tree.leaves(before.outputs) if eqx.is_inexact_array(leaf)]
    loss = float(after.loss) - float(before.loss)
    noise = distance(before.outputs, floor.outputs)[1]
    return Difference(str(jnp.result_type(*leaves)), absolute, relative, loss, noise)


def distance(before, after) -> tuple[float, float]:
    """Largest absolute and relative (to the largest entry) difference, on the common corner."""
    worst = (0.0, 0.0)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        b = np.asarray(b[tuple(map(slice, a.shape))], np.float64)
        a = np.asarray(a, np.float64)
        gap, size = float(np.abs(b - a).max()), float(np.abs(a).max())
        gap = gap if np.isfinite(gap) else np.inf
        worst = (max(worst[0], gap), max(worst[1], gap / size if size else gap))
    return worst


@_jit
def _permuted(model):
    """The same function with hidden units and heads in reverse order."""
    table = axes_of(model)
    for axis, size in table.sizes.items():
        inner = {"consumed", "produced"} <= table.roles(axis) and not table.is_stream(axis)
        if inner and not table.having(axis, "buffer"):
            model = maps.apply(AxisMap(axis, np.arange(size)[::-1]), model, None)
    return model


def _poison(op, model, batch, programs: _Programs) -> dict[str, bool]:
    """Whether outputs are bitwise the same under every fill of what the operator leaves free."""
    if not any(m.closed().any() for atom, before in steps(op, model) for m in atom.maps(before)):
        return {}
    first, same = None, {}
    for name, (offset, spread) in FILLS.items():
        grown = _poisoned(op, model, jnp.asarray(offset), jnp.asarray(spread))
        outputs = jax.tree.map(np.asarray, jax.tree.leaves(programs.outputs(grown, batch).outputs))
        first = outputs if first is None else first
        same[name] = all(np.array_equal(a, b) for a, b in zip(first, outputs, strict=True))
    return same


@_jit
def _poisoned(op, model, offset, spread):
    def fill(key, shape, dtype):
        return (offset + spread * jax.random.normal(key, shape)).astype(dtype)

    # The default generator is a long program for every leaf; this one is an instruction
    return filled(op, model, jax.random.key(0, impl="unsafe_rbg"), fill)


def steps(op, model):
    """Each single operator with the axis table it is applied to."""
    for atom in atoms(op):
        yield atom, axes_of(model)
        model = shapes(atom, model)


def filled(op, model, key, fill: Callable):
    """The grown model with every closed new coordinate filled by `fill` instead."""
    for atom in atoms(op):
        for move in atom.maps(axes_of(model)):
            closed = move.closed()
            if closed.any():
                source = np.where(closed, NONE, move.source)
                move = dataclasses.replace(move, source=source, init=fill)
            model = maps.apply(move, model, key)
    return model


def _error(expected, found) -> float:
    expected, found = (jax.tree.map(np.asarray, tree) for tree in (expected, found))
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, found)
    return float(max(jax.tree.leaves(gaps)) / _largest(expected))


def _largest(tree) -> float:
    return max(float(np.abs(g).max()) for g in jax.tree.leaves(tree))


def _liveness(op, model, grown, batch, programs: _Programs, level: float):
    """Zero gradients and locked copies of new coordinates, over two steps of gradient descent."""
    new, homes = new_coordinates(op, model)
    if any(slot.value is not None for slot in axes_of(grown).of_kind("gate")):
        grown = ramp(grown, level)
    trained, rest = partition(grown)
    start = trained = jax.tree.map(np.asarray, trained)
    zero = []
    for _ in range(2):
        moved = eqx.combine(trained, rest)
        gradient = jax.tree.map(np.asarray, programs.observed(moved, batch).gradient)
        zero.append(_dead(grown, gradient, new))
        scale = 1e-3 / _largest(gradient)
        trained = jax.tree.map(lambda p, g: p - scale * g, trained, gradient)  # noqa: B023
    change = jax.tree.map(lambda a, b: a - b, trained, start)
    locked = {axis: _locked(grown, change, axis, new[axis], homes[axis]) for axis in new}
    return {axis: (zero[0][axis], zero[1][axis]) for axis in new}, locked


def new_coordinates(op, model):
    """For every grown axis: which coordinates are new, and where the source of each lives now."""
    new: dict[str, np.ndarray] = {}
    homes: dict[str, np.ndarray] = {}
    for atom, table in steps(op, model):
        for move in atom.maps(table):
            before = new.get(move.axis, np.zeros(table.size(move.axis), bool))
            kept = before[np.maximum(move.source, 0)]
            new[move.axis] = move.is_new() | kept
            first = {int(s): i for i, s in reversed(list(enumerate(move.source)))}
            homes[move.axis] = np.asarray(
                [first[int(s)] if s >= 0 else i for i, s in enumerate(move.source)]
            )
            if move.over is not None:  # its coordinates are dealt out: none has a place of its own
                new.pop(move.over, None)
    return {axis: mask for axis, mask in new.items() if mask.any()}, homes


def _dead(model, gradient, new: dict[str, np.ndarray]) -> dict[str, float]:
    """Per axis, the share of entries at new coordinates whose gradient is exactly zero."""
    table, shares = axes_of(model), {}
    for axis, mask in new.items():
        zero = total = 0
        for slot in table.having(axis, "param"):
            g = get(gradient, slot.steps)
            if g is None:
                continue
            for part, piece in zip(slot.parts, slot.cut(g, table.sizes), strict=True):
                piece = np.asarray(part.split(piece, table.sizes))
                lookups = tuple(i for i, dim in enumerate(part.dims) if dim.role == "lookup")
                # A row nobody looked up is not dead
                alive = np.any(piece != 0, axis=lookups, keepdims=True)
                for dim in part.positions(axis)[:1]:
                    new_ones = np.compress(mask, alive, axis=dim)
                    zero, total = zero + int((~new_ones).sum()), total + new_ones.size
        shares[axis] = zero / total
    return shares


def _locked(model, change, axis: str, new: np.ndarray, homes: np.ndarray) -> int:
    """How many new coordinates changed exactly as the coordinate they were copied from."""
    table = axes_of(model)
    same = new & (homes != np.arange(len(homes)))
    for slot in table.having(axis, "param"):
        delta = get(change, slot.steps)
        if delta is None:
            continue
        for part, piece in zip(slot.parts, slot.cut(delta, table.sizes), strict=True):
            piece = np.asarray(part.split(piece, table.sizes))
            for dim in part.positions(axis):
                gap = np.abs(piece - np.take(piece, homes, axis=dim))
                others = tuple(i for i in range(piece.ndim) if i != dim)
                same = same & (gap.max(axis=others) <= 1e-9 * np.abs(delta).max())
    return int(same.sum())


def shapes(op, model):
    """The grown model without its numbers."""
    with jax.enable_x64(True):  # float64 models keep their dtype; others are not widened
        return eqx.filter_eval_shape(lambda m: op(m, key=jax.random.key(0)), model)


@_jit
def _wide(model):
    """The model in float64; a static `dtype` that overrides it is dropped."""
    model = jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, model)
    return put(model, {("dtype",): None}) if getattr(model, "dtype", None) else model
