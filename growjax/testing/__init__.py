"""Property tests for operators and models, yours or growjax's own.

Strategies draw *descriptions* (an `Architecture`, an operator that fits it) from short fixed lists, so
that compiled programs are reused; arrays come from seeds. Assertions take an operator, a model and a
batch, compile once, and raise `AssertionError` with the largest deviation.

    from hypothesis import given
    from growjax import testing

    @given(testing.cases())
    def test_operators_keep_their_promises(case):
        testing.assert_contract(case.operator, case.model(), case.batch())

Needs hypothesis and chex (the `dev` extra).
"""

# ruff: noqa: E402 - a missing package is named before it is imported

from collections.abc import Callable
from typing import Any

from growjax.extras import require


require("growjax.testing", "chex", "hypothesis")

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from growjax import draws
from growjax.axes import axes_of, get, partition, put, sizes
from growjax.certificate import (
    call,
    distance,
    filled,
    new_coordinates,
    probe,
    shapes,
    shown_outputs,
)
from growjax.gates import Gate, ramp, settle
from growjax.growth import Chain, Operator, atoms
from growjax.testing.catalogue import ARCHITECTURES as ARCHITECTURES
from growjax.testing.catalogue import LENGTH as LENGTH
from growjax.testing.catalogue import TOY as TOY
from growjax.testing.catalogue import VOCAB as VOCAB
from growjax.testing.catalogue import Architecture as Architecture
from growjax.testing.catalogue import Batch as Batch
from growjax.testing.catalogue import Case as Case
from growjax.testing.catalogue import all_cases as all_cases
from growjax.testing.catalogue import architectures as architectures
from growjax.testing.catalogue import cases as cases
from growjax.testing.catalogue import drawn as drawn
from growjax.testing.catalogue import operators_for as operators_for
from growjax.testing.catalogue import randomise as randomise


# Assertions ----------------------------------------------------------------------------------


class _Observation(eqx.Module):
    """A grown model, its outputs, its gradient, and that gradient pulled back through the operator."""

    model: Any
    outputs: Any
    gradient: Any
    pulled_back: Any


def _fill(offset, spread) -> Callable:
    """A draw of new entries around `offset`, scattered by `spread`.

    The numbers are constants: random bits for every leaf would take long to compile.
    """

    def init(key, shape, dtype):
        wave = np.sin(1.0 + np.arange(int(np.prod(shape))) ** 2).reshape(shape)
        return (offset + 1.5 * spread * wave).astype(dtype)

    return init


_FILLS = {"zeros": (0.0, 0.0), "scattered": (0.0, 1.0), "42": (42.0, 0.0), "1000": (1000.0, 0.0)}


# A model is traced once, however many programs compute its outputs
_outputs = eqx.filter_jit(call)


@eqx.filter_jit
def _observe(op, model, batch, shown, offset, spread, opened, gradients) -> _Observation:
    """The observation of a model after `op` (None: as it is), with or without gradients."""
    fill = _fill(offset, spread)
    trained, rest = partition(model)

    def grow(trained):
        grown = eqx.combine(trained, rest)
        grown = grown if op is None else filled(op, grown, draws.key(0), fill)
        # Unless `opened`, gates keep their level, so that a wrong level after growth is noticed
        gates = [g for g in axes_of(grown).of_kind("gate") if g.value is not None]
        levels = {g.steps: jnp.where(opened, g.value.at(1.0).value, g.value.value) for g in gates}
        grown = put(grown, {g.steps: Gate(levels[g.steps], g.value.new) for g in gates})
        return partition(grown)

    if not gradients:  # half the program, for assertions about outputs alone
        grown = eqx.combine(*grow(trained))
        return _Observation(grown, _outputs(grown, batch), None, None)

    grown, transpose, others = jax.vjp(grow, trained, has_aux=True)

    def objective(grown):
        outputs = _outputs(eqx.combine(grown, others), batch)
        return probe(outputs, shown), outputs

    gradient, outputs = jax.grad(objective, has_aux=True)(grown)
    return _Observation(eqx.combine(grown, others), outputs, gradient, transpose(gradient)[0])


class _Study:
    """An operator on a model and a batch: one compiled program, whose results are cached."""

    def __init__(self, op: Operator | Chain, model, batch: Batch, *, gradients: bool = True):
        self.op, self.model, self.batch, self._gradients = op, model, batch, gradients
        with jax.enable_x64(True):
            models = model, shapes(op, model)
            self._shown = shown_outputs(
                *(eqx.filter_eval_shape(_outputs, m, batch) for m in models)
            )
        self._observations: dict[tuple, _Observation] = {}

    @property
    def small(self) -> _Observation:
        """The model before it is grown."""
        return self._observed(None, "zeros", False)

    def big(self, fill: str = "scattered", *, opened: bool = False) -> _Observation:
        """The grown model, its closed new coordinates filled and, if `opened`, its gates at 1."""
        return self._observed(self.op, fill, opened)

    def _observed(self, op, fill: str, opened: bool) -> _Observation:
        key = (op is None, fill, opened)
        if key not in self._observations:
            with jax.enable_x64(True):
                # As arrays, so that one program serves all fills
                offset, spread, level = map(jnp.asarray, (*_FILLS[fill], opened))
                subject = (op, self.model, self.batch, self._shown)
                observation = _observe(*subject, offset, spread, level, self._gradients)
                self._observations[key] = observation
        return self._observations[key]

    def preserves(self, rtol: float | None = None) -> None:
        _assert_same("outputs", self.small.outputs, self.big().outputs, rtol)

    def independent(self) -> None:
        first = self.big("zeros").outputs
        for fill in ("scattered", "42", "1000"):
            other = self.big(fill).outputs
            chex.assert_trees_all_equal(first, other, custom_message=f"filled with {fill}")

    def gradient(self, rtol: float = 1e-10) -> None:
        small, big = self.small.gradient, self.big().pulled_back
        scale = max(float(np.abs(np.asarray(g)).max()) for g in jax.tree.leaves(small))
        for slot in axes_of(self.model).of_kind("param"):
            expected, actual = get(small, slot.steps), get(big, slot.steps)
            if expected is not None:
                gap = float(np.abs(np.asarray(expected) - np.asarray(actual)).max()) / scale
                assert gap <= rtol, (
                    f"{slot.path}: transposed gradient is off by {gap:.1e} (> {rtol:.0e})"
                )

    def still(self) -> None:
        # Entries at new coordinates of any axis, in every array that has the axis
        gradient = jax.tree.map(np.asarray, self.big().gradient)
        new, _ = new_coordinates(self.op, self.model)
        table = axes_of(self.big().model)
        for slot in table.of_kind("param"):
            g = get(gradient, slot.steps)
            pieces = [] if g is None else slot.cut(g, table.sizes)
            for part, x in zip(slot.parts, pieces, strict=g is not None):
                x = part.split(x, table.sizes)
                for i, dim in enumerate(part.dims):
                    if dim.axis in new:
                        moved = np.compress(new[dim.axis], x, axis=i)
                        assert not moved.any(), f"{part.path}: new {dim.axis} have a gradient"

    def settles(self, rtol: float | None = None) -> None:
        with jax.enable_x64(True):
            big = self.big(opened=True)
            settled = settle(big.model)
            assert all(slot.value is None for slot in axes_of(settled).of_kind("gate"))
            plain = _outputs(settled, self.batch)
        _assert_same("outputs at gate 1", plain, big.outputs, rtol)


def assert_preserves(
    op: Operator | Chain, model, batch: Batch, *, rtol: float | None = None
) -> None:
    """The grown model computes the same outputs.

    `rtol` is relative to the largest output: 1e-12 for a float64 model and 2e-5 for float32 by default.
    Closed new coordinates (behind gates or zeros) are filled with scattered numbers of order one.
    """
    _Study(op, model, batch, gradients=False).preserves(rtol)


def assert_independent(op: Operator | Chain, model, batch: Batch) -> None:
    """Outputs are bitwise the same for any values in closed new coordinates: 0, order one, 42, 1000."""
    _Study(op, model, batch, gradients=False).independent()


def assert_gradient(op: Operator | Chain, model, batch: Batch, *, rtol: float = 1e-10) -> None:
    """The transpose of the operator takes the grown model's gradient to the small model's."""
    _Study(op, model, batch).gradient(rtol)


def assert_still(op: Operator | Chain, model, batch: Batch) -> None:
    """Behind gates at 0 every new entry has a gradient of exactly zero."""
    _Study(op, model, batch).still()


def assert_settles(op: Operator | Chain, model, batch: Batch, *, rtol: float | None = None) -> None:
    """With every gate at 1, the gated model computes the outputs of the settled one, without gates."""
    _Study(op, model, batch, gradients=False).settles(rtol)


def assert_same_growth(
    left: Operator | Chain, right: Operator | Chain, model, *, key: PRNGKeyArray
):
    """Two ways to grow give bitwise the same parameters, such as two steps and one.

    Gates are opened and settled after each operator of a chain, as in a run.
    """
    with jax.enable_x64(True):
        one, two = _settled_growth(left, model, key), _settled_growth(right, model, key)
    assert sizes(one) == sizes(two), f"{sizes(one)} against {sizes(two)}"
    chex.assert_trees_all_equal(*(jax.tree.leaves(partition(grown)[0]) for grown in (one, two)))


def _settled_growth(op, model, key):
    """The model grown by each operator of `op`, with gates opened and dropped after each."""
    for atom in atoms(op):
        model = eqx.filter_jit(atom)(model, key=key)
        if any(slot.value is not None for slot in axes_of(model).of_kind("gate")):
            model = settle(ramp(model, 1.0))
    return model


def assert_carries(op: Operator | Chain, model, batch: Batch, tx, *, rtol: float = 1e-10) -> None:
    """Optimizer state carried through an exact copy is the state that the grown model would have.

    It takes one step of `tx` (an optax transformation without a global norm) with the small and with the
    grown model, and compares every array. So a moment that is scaled by the wrong power of the share
    fails.
    """
    from growjax.optim import carry

    study = _Study(op, model, batch)
    small, big = study.small, study.big()

    @eqx.filter_jit  # one program: eagerly, every leaf would compile its own for each operation
    def states(model, small, big):
        trained = partition(model)[0]
        grown = partition(op(model, key=jax.random.key(0)))[0]
        state = tx.update(small, tx.init(trained), trained)[1]
        carried = carry(op, state, model, optimizer=tx, key=jax.random.key(0))
        return carried, tx.update(big, tx.init(grown), grown)[1]

    with jax.enable_x64(True):
        carried, direct = states(model, small.gradient, big.gradient)
    chex.assert_trees_all_equal_structs(carried, direct)
    # A part is a whole moment of the model, or a scalar. Arrays are compared relative to the largest
    # entry of their part, since some (the gradient of a key's bias) are zero up to rounding
    parts = [
        jax.tree_util.tree_leaves_with_path(
            state, is_leaf=lambda node: isinstance(node, type(model))
        )
        for state in (direct, carried)
    ]
    for (path, expected), (_, actual) in zip(*parts, strict=True):
        pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True)
        pairs = [(np.asarray(a, float), np.asarray(b, float)) for a, b in pairs]
        scale = max((np.abs(a).max() for a, _ in pairs), default=0) or 1.0
        gap = max((np.abs(a - b).max() for a, b in pairs), default=0) / scale
        name = jax.tree_util.keystr(path)
        assert gap <= rtol, (
            f"state{name}: carried is off by {gap:.1e} of its largest entry (> {rtol})"
        )


def assert_contract(op: Operator | Chain, model, batch: Batch) -> None:
    """Everything that an operator's exactness class promises on this model."""
    study = _Study(op, model, batch)
    if op.exactness == "approximate":
        outputs = jax.tree.leaves(study.big().outputs)
        assert all(np.isfinite(np.asarray(y)).all() for y in outputs)
        return
    study.preserves()
    study.gradient()
    study.independent()
    gated = any(s.value is not None for s in axes_of(study.big().model).of_kind("gate"))
    if op.exactness == "exact" and gated:
        study.still()
        study.settles()


def _assert_same(name: str, expected, actual, rtol: float | None) -> None:
    """Raise `AssertionError` if outputs differ by more than `rtol`, or than rounding in their dtype."""
    leaves = [x for x in jax.tree.leaves(expected) if eqx.is_inexact_array(x)]
    wide = all(x.dtype == jnp.float64 for x in leaves)
    rtol = rtol or (1e-12 if wide else 2e-5)
    absolute, relative = distance(expected, actual)
    assert relative <= rtol, (
        f"{name} moved by {absolute:.1e}, {relative:.1e} relative (> {rtol:.0e})"
    )
