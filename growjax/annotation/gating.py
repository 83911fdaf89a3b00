"""Gates for models that have none: each gate is multiplied into the arrays on one side of its axis.

    an inner axis (mlp, heads)   the arrays that consume it
    an axis that norms average   the arrays that produce it; and `eqx.nn.LayerNorm` and `RMSNorm` are
                                 replaced by norms whose statistics are weighted by the gate
    a stack (layers)             the arrays that produce the residual stream, layer by layer

At gate 0 the outputs do not depend on the new coordinates, whatever values they have; at 1 the gate has
no effect. In between, masked norms are those of MSG (Yao et al. 2024), and a layer's branch is scaled.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from growjax.axes import Axes, Slot, get, put
from growjax.gates import Gate


class MaskedNorm(eqx.Module):
    """An `eqx.nn.LayerNorm` or `RMSNorm` whose statistics, and output, are weighted by a gate."""

    norm: eqx.nn.LayerNorm | eqx.nn.RMSNorm
    gate: Array

    def __call__(self, x: Array, state: Any = None, *, key: Any = None) -> Any:
        """Normalise `x`, with the call of the norm that this one replaces."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        h, c = x.astype(wide), self.gate.astype(wide)
        weights = c / jnp.sum(c)
        if isinstance(self.norm, eqx.nn.LayerNorm):
            h = h - jnp.sum(weights * h)
        h = h * jax.lax.rsqrt(jnp.sum(weights * h * h) + self.norm.eps)
        if self.norm.weight is not None:
            h = h * self.norm.weight.astype(wide)
        if self.norm.bias is not None:
            h = h + self.norm.bias.astype(wide)
        out = (h * c).astype(x.dtype)
        return out if state is None else (out, state)

    @property
    def weight(self) -> Any:
        """The gain of the norm."""
        return self.norm.weight

    @property
    def bias(self) -> Any:
        """The bias of the norm."""
        return self.norm.bias

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the norm's input."""
        return self.norm.shape

    @property
    def eps(self) -> float:
        """The constant that is added to the variance."""
        return self.norm.eps


def faults(model: Any, table: Axes, axes: Iterable[str], stream: str) -> list[str]:
    """Why some axes cannot be gated from outside, a line each."""
    complaints = []
    for axis in axes:
        roles = table.roles(axis)
        slots = [slot for slot in table.having(axis) if slot.kind != "gate"]
        if not slots:
            complaints.append(f"unknown axis {axis!r}; this model has {', '.join(table.sizes)}")
        elif "stack" in roles:
            complaints += _stack_faults(table, axis, stream)
        elif "lookup" in roles:
            complaints.append(f"{axis!r}: rows of a table that is indexed have no gate")
        elif table.normalised(axis):
            complaints += [
                f"{axis!r}: {slot.path} is no gain of an eqx.nn.LayerNorm or RMSNorm, the only norms "
                "that can be replaced by masked ones"
                for slot in table.normalised(axis)
                if _norm_of(model, slot) is None
            ]
        elif not any(slot.positions(axis, "consumed") for slot in slots):
            complaints.append(f"{axis!r}: no array consumes it, so no array can carry the gate")
    return [f"gates: {complaint}" for complaint in complaints]


def _stack_faults(table: Axes, axis: str, stream: str) -> list[str]:
    made = [s for s in table.having(axis, "param") if s.positions(stream, "produced")]
    closing = [s.path for s in made if any(d.axis == stream and d.normalised for d in s.dims)]
    if not made:
        return [f"{axis!r}: no array of the stack produces the stream {stream!r} (see `stream`)"]
    if closing:
        return [f"{axis!r}: blocks end in a norm, so no gate makes them the identity: {closing[0]}"]
    return []


def _norm_of(model: Any, slot: Slot) -> eqx.nn.LayerNorm | eqx.nn.RMSNorm | None:
    """The norm of `eqx.nn` that a slot is the gain of, over one dimension; None for any other."""
    owner = get(model, slot.steps[:-1])
    plain = isinstance(owner, eqx.nn.LayerNorm | eqx.nn.RMSNorm) and len(owner.shape) == 1
    return owner if plain and slot.steps[-1] == "weight" else None


def folded(model: Any, table: Axes, gates: Mapping[str, Gate | None], stream: str) -> Any:
    """The model with its gates multiplied into its arrays, and masked norms where they are needed.

    `table` and steps are those of `model`, which holds the arrays themselves.
    """
    values: dict[tuple, Any] = {}
    norms: dict[tuple, Any] = {}
    for axis, gate in gates.items():
        if gate is None:
            continue
        value = jax.lax.stop_gradient(gate.value)
        normalised = table.normalised(axis)
        inside = {slot.steps[:-1] for slot in normalised}
        for slot in table.having(axis, "param"):
            array = values.get(slot.steps, slot.value)
            if array is None or slot.steps[:-1] in inside:
                continue
            values[slot.steps] = _multiplied(table, slot, array, axis, value, stream)
        norms |= {slot.steps[:-1]: (slot, value) for slot in normalised}
    model = put(model, values)
    replaced = {}
    for steps, (slot, value) in norms.items():
        norm = get(model, steps)
        stacks = [table.size(dim.axis) for dim in slot.dims if dim.role == "stack"]
        replaced[steps] = MaskedNorm(norm, jnp.broadcast_to(value, (*stacks, *value.shape)))
    return put(model, replaced)


def _multiplied(
    table: Axes, slot: Slot, array: Array, axis: str, gate: Array, stream: str
) -> Array:
    """An array with a gate on one of its axes, on the side where it belongs."""
    normalised = bool(table.normalised(axis))

    def part(piece: Slot, x: Array) -> Array:
        x = piece.split(x, table.sizes)
        for i in piece.positions(axis):
            role = piece.dims[i].role
            if role == "stack":
                takes = bool(piece.positions(stream, "produced"))
            else:
                takes = role != "consumed" if normalised else role == "consumed"
            if takes:
                x = x * gate.astype(x.dtype).reshape(gate.shape + (1,) * (x.ndim - i - 1))
        return piece.join(x)

    return slot.mapped(part, array, table.sizes)
