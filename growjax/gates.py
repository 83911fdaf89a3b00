"""Gates: how new coordinates are hidden, ramped open and settled (masked structural growth).

A gate is a vector along one axis: 1 on old coordinates and a level from 0 to 1 on new ones. At 0 the
grown model computes what the small one did, whatever the new weights hold; at 1 it is the ordinary
larger model. Where a gate multiplies is written in `growjax.nn`, once for each part.
Yao et al., "Masked Structural Growth for 2x Faster Language Model Pre-training", ICLR 2024.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from growjax.axes import Slot, axes_of, put
from growjax.errors import GateError, raise_all


Model = TypeVar("Model")


class Gate(eqx.Module):
    """Hides the new coordinates of an axis: `value` is 1 on old ones and the level on new ones.

    Never trained. `new` remembers which coordinates the gate was made for, so that any level can
    follow any other. `pace` is how many times as fast as the level each coordinate opens; None is 1.
    """

    value: Float[Array, "..."]
    new: Bool[Array, "..."]
    pace: Float[Array, "..."] | None = None

    def at(self, level) -> "Gate":
        """The same gate at `level` in [0, 1] (a traced scalar does not recompile), or at one of each
        coordinate.
        """
        one = jnp.ones_like(self.value)
        level = jnp.asarray(level, one.dtype)
        if self.pace is not None:
            level = jnp.minimum(level * self.pace, 1)
        return Gate(jnp.where(self.new, level, one), self.new, self.pace)


def gated(x: Array, gate: Gate | None, dim: int = -1) -> Array:
    """Multiply dimension `dim` of `x` by a gate's value; `None` is the identity."""
    if gate is None:
        return x
    value = jax.lax.stop_gradient(gate.value).astype(x.dtype)
    return x * value.reshape(value.shape + (1,) * (-dim - 1))


def _gates(model, axes: Sequence[str] | None) -> list[Slot]:
    table = axes_of(model)
    if isinstance(axes, str) or not isinstance(axes, Sequence | None):
        raise GateError(f"axes: expected a list of names such as ['mlp'], got {axes!r}")
    held = [slot for slot in table.of_kind("gate") if slot.value is not None]
    gated = {slot.own_axis for slot in held}
    names = {name: table.named(name) for name in axes or ()}
    ungated = [name for name, stand in names.items() if gated.isdisjoint(stand)]
    if ungated or not held:
        which = f" on {', '.join(ungated)}" if ungated else ""
        raise GateError(f"this model has no gate{which}: it was not grown by gates, or is settled")
    chosen = gated if axes is None else {axis for stand in names.values() for axis in stand}
    return [slot for slot in held if slot.own_axis in chosen]


def check_level(level) -> None:
    """Raise `GateError` for concrete levels outside [0, 1]; a traced one cannot be seen."""
    if isinstance(level, Tracer):
        return
    try:
        numbers = np.asarray(level, float)
    except (TypeError, ValueError):
        numbers = np.asarray(np.nan)
    if not np.all((numbers >= 0) & (numbers <= 1)):
        raise GateError(f"level: expected a number in [0, 1], got {level}")


def ramp(model: Model, level: Any, *, axes: Sequence[str] | None = None) -> Model:
    """Set every gate of a model to a level; `gj.ramp`, which also takes a `gj.State`, says more."""
    check_level(level)
    chosen, length = _gates(model, axes), np.shape(level)
    raise_all(
        GateError,
        f"level: expected a number, or one for every coordinate of an axis, got shape {length}:",
        [
            f"{slot.path}: {slot.value.value.shape[-1]} {slot.own_axis}"
            for slot in chosen
            if length not in ((), slot.value.value.shape[-1:])
        ],
    )
    return put(model, {slot.steps: slot.value.at(level) for slot in chosen})


def settle(model: Model, *, axes: Sequence[str] | None = None) -> Model:
    """Drop the gates of a model that are fully open; see `gj.settle`, which also takes a `gj.State`."""
    held = _gates(model, axes)
    if any(isinstance(slot.value.value, Tracer) for slot in held):
        raise GateError("settle changes the structure of the model: call it outside jit")
    raise_all(
        GateError,
        "only gates at 1 can be settled; ramp these first:",
        [
            f"{slot.path}: level {float(jnp.min(slot.value.value)):g}"
            for slot in held
            if not bool(jnp.all(slot.value.value == 1))
        ],
    )
    return put(model, {slot.steps: None for slot in held})


def is_gated(model: Any) -> bool:
    """Whether any axis of the model is behind gates."""
    return any(slot.arrays() for slot in axes_of(model).of_kind("gate"))


def opened(model: Model, level: Any) -> Model:
    """The model with its gates, if it has any, at this level: `ramp` for any stage of a run."""
    return ramp(model, level) if is_gated(model) else model


def ungated(model: Model) -> Model:
    """The model without its gates: `settle` for shapes and under jit, where nobody can see levels."""
    return put(model, {slot.steps: None for slot in axes_of(model).of_kind("gate")})
