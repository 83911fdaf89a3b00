"""Certificates of large models, which are never held whole.

Outputs are measured on all weights, a layer at a time: of the model, of the grown one as it is written,
and of both in float64. What needs gradients (gradient, poison, liveness) is measured on a part, which is
a model of its own: some layers and some hidden units of the old model, and what becomes of them.
"""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from growjax import draws
from growjax.axes import axes_of, put
from growjax.certificate.coordinates import steps
from growjax.certificate.measured import (
    SAME,
    Observation,
    call,
    certify,
    compared,
    distance,
    permuted,
    shown_outputs,
    wide,
)
from growjax.certificate.part import choose, cut, shapes_in
from growjax.certificate.record import Certificate
from growjax.cost import parameters
from growjax.deferred import Deferred
from growjax.growth.leafwise import SMALL, grow_deferred
from growjax.growth.operator import Operator
from growjax.models.config import QUICK
from growjax.nn import Stacked


# Told of the work: a text, and the share of it that is done where it is in the midst of it
Progress = Callable[[str, float | None], None]

# Bytes that a certificate in memory takes for each parameter of the grown model: eight numbers of float64
_EACH = 64
# Rows of the vocabulary that are read: the first ones, among which special tokens are, and random ones
_FIRST, _ROWS = 64, 256


def certify_deferred(
    op: Operator,
    model: Any,
    grown: Any,
    batch: Callable[[Any], Any],
    scratch: str | Path,
    *,
    key: PRNGKeyArray,
    seed: int = 0,
    least: int = SMALL,
    most: int = 2**30,
    progress: Progress = lambda text, share: None,
) -> Certificate:
    """Certify the growth of a model of `Deferred` leaves into `grown`, by `grow_deferred`.

    A model that needs less than `most` bytes is read whole, and certified as by `certify`, and so is one
    whose operator cannot be cut to a part. Otherwise the certificate says what its `part` is.

    **Arguments**

    - `batch`: a function from a model, whose vocabulary may have been cut to some rows, to its input.
    - `key`, `scratch`: as for `grow_deferred`.
    - `seed`: chooses the rows of the vocabulary.
    - `least`: the `small` of `grow_deferred`.
    """
    large = _EACH * parameters(grown) > most
    chosen = choose(op, model, grown, most // _EACH) if large else None
    if chosen is None:
        progress(f"certifying {op} on all {parameters(model):,} parameters, in memory", None)
        return certify(op, _held(model), batch(model), key=key)
    ids = rows_of(op, model, seed)
    part_op, part = cut(op, with_rows(model, ids), chosen)
    progress(f"certifying {op} on a part", None)
    tokens = batch(part)
    certificate = certify(part_op, _held(part), tokens, key=key)
    del part

    def observed(name: str, model: Any) -> Observation:
        progress(f"running {name}", None)
        told = lambda share: progress(f"running {name}", share)  # noqa: E731
        return Observation(streamed(with_rows(model, ids), tokens, told), None)

    before = observed("the model", model)
    after = observed("the grown model", grown)
    floor = observed("the model, permuted", permuted(model))
    shown = shown_outputs(before.outputs, after.outputs)
    native = compared(before, after, floor, shown, certificate.forward[0].dtype)
    with jax.enable_x64(True):
        small = wide(model)
        big = grow_deferred(op, small, Path(scratch) / "wide", key=draws.key(0), small=least)
        before = observed("the model in float64", small)
        after = observed("the grown model in float64", big)
        floor = observed("the model in float64, permuted", permuted(small))
        if distance(before.outputs, floor.outputs)[1] > SAME:
            # An axis that the outside sees is no symmetry (see `certify`)
            floor, native = before, dataclasses.replace(native, floor=0.0)
        exact = compared(before, after, floor, shown, certificate.forward[-1].dtype)
    old, new = axes_of(model).sizes, axes_of(grown).sizes
    return dataclasses.replace(
        certificate,
        operator=str(op),
        axes={axis: (old.get(axis, 1), n) for axis, n in new.items() if old.get(axis, 1) != n},
        forward=(exact,) if native.dtype == exact.dtype else (native, exact),
        part=chosen,
    )


# Outputs a layer at a time -----------------------------------------------------------------------


def rows_of(op: Operator, model: Any, seed: int) -> np.ndarray | None:
    """Some rows of the vocabulary, the first ones and random ones; None if the operator moves any."""
    size = axes_of(model).sizes.get("vocab", 0)
    moves = [move for atom, axes in steps(op, shapes_in(model)) for move in atom.maps(axes)]
    if size <= _ROWS or any(move.axis == "vocab" for move in moves):
        return None
    drawn = np.random.default_rng(seed).choice(size - _FIRST, _ROWS - _FIRST, replace=False)
    return np.concatenate([np.arange(_FIRST), np.sort(drawn) + _FIRST])


def with_rows(model: Any, ids: np.ndarray | None) -> Any:
    """The model with these rows of its vocabulary alone, which are read; None for all."""
    if ids is None:
        return model
    values: dict[tuple, Any] = {}
    for slot in axes_of(model).having("vocab"):
        array = slot.value
        for dim in slot.positions("vocab") if slot.arrays() else []:
            if isinstance(array, Deferred) and array.dim == dim:
                array = np.concatenate([array.read(int(i), int(i) + 1) for i in ids], axis=dim)
            else:
                array = np.take(np.asarray(array), ids, axis=dim)
        values[slot.steps] = array
    return put(model, values)


def _held(model: Any, stacks: Collection[str] = ()) -> Any:
    """The model with arrays for deferred leaves, but for those of these stacks."""
    slots = [s for s in axes_of(model).values() if isinstance(s.value, Deferred)]
    return put(model, {s.steps: np.asarray(s.value) for s in slots if s.steps[0] not in stacks})


class _Streamed(Stacked):
    """A stack of `Deferred` leaves that reads one layer, runs it, and forgets it."""

    told: Callable[[float], None] = eqx.field(static=True, default=lambda share: None)

    def with_exits(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Stacked` does, a layer at a time."""
        total = None
        depth = next(x.shape[0] for x in jax.tree.leaves(self.block) if hasattr(x, "shape"))
        for number in range(depth):
            self.told(number / depth)
            x, auxiliary, _ = _run(self._layer(number), x, args, kwargs)
            if auxiliary is not None:
                total = auxiliary if total is None else total + auxiliary
        return x, total, None

    def _layer(self, number: int) -> Stacked:
        """The stack of one layer."""

        def cut(x: Any) -> Any:
            if isinstance(x, Deferred):
                return x.read(number, number + 1)
            return x[number : number + 1] if eqx.is_array(x) or isinstance(x, np.ndarray) else x

        layer = object.__new__(Stacked)
        for field in dataclasses.fields(Stacked):
            value = getattr(self, field.name)
            static = field.metadata.get("static", False)
            value = value if static else jax.tree.map(cut, value)
            object.__setattr__(layer, field.name, value)
        return layer


_jit: Any = eqx.filter_jit


@_jit(compiler_options=QUICK)
def _run(layer: Stacked, x: Any, args: Any, kwargs: Any) -> Any:
    return layer.with_exits(x, *args, **kwargs)


def streamed(model: Any, batch: Any, told: Callable[[float], None] = lambda share: None) -> Any:
    """The outputs of a model of `Deferred` leaves on a batch, with one layer in memory at a time.

    `told` gets the share of a stack's layers that have run.
    """
    stacks = {name: x for name, x in vars(model).items() if isinstance(x, Stacked)}
    model = _held(model, stacks)
    for name, stack in stacks.items():
        layers = object.__new__(_Streamed)
        for field in dataclasses.fields(Stacked):
            object.__setattr__(layers, field.name, getattr(stack, field.name))
        object.__setattr__(layers, "told", told)
        model = put(model, {(name,): layers})
    model = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, model)
    return jax.tree.map(np.asarray, call(model, batch))
