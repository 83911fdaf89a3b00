"""Grown models as stock ones: every scale folded into parameters, or the reason why that cannot be."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from growjax.axes import axes_of, get, put
from growjax.errors import HuggingFaceError, raise_all
from growjax.gates import is_gated, settle
from growjax.hf.family import Family
from growjax.hf.files import shortened
from growjax.nn import Attention, Block, Stacked


def stock(model: Any, family: Family) -> tuple[Any, Any]:
    """The same function as a model that its config says in full, and that config.

    Folds open gates, multipliers of residual branches, the scale that attention was born with and what
    a head is scaled by; writes biases that the model has not as zeros where the family always has some.
    Raises `GateError` while gates are not open, and `HuggingFaceError` with everything else that the
    family cannot say.
    """
    model = settle(model) if is_gated(model) else model
    complaints = []
    for name, stack in vars(model).items():
        if isinstance(stack, Stacked):
            complaints += [
                f"{name}.active: layers are switched off; save the model, not a sub-network of it"
            ] * (stack.active is not None)
            model = put(model, {(name,): _plain(stack, family)})
    raise_all(HuggingFaceError, f"this model cannot be written as {family.model_type}:", complaints)
    model = _with_biases(family.settled(model), family)

    config = family.config_of(model)
    complaints = [
        f"{field}: it is {value!r} there, and {getattr(config, field)!r} here"
        for field, value in family.only.items()
        if getattr(config, field) != value
    ]
    complaints += family.limits(config)
    if not complaints:
        complaints += _unsaid(model, config, family)
    raise_all(
        HuggingFaceError,
        f"this model cannot be written as {family.model_type}:",
        shortened(complaints),
    )
    return model, config


def _plain(stack: Stacked, family: Family) -> Stacked:
    """A stack without multipliers of its branches, and with the scale of attention that is derived."""
    block: Any = stack.block
    assert isinstance(block, Block)
    values: dict[tuple, Any] = {("branch",): None, ("read",): None}
    for path in (("attention",), ("cross",)):
        attention = get(block, path)
        if attention is not None:
            values |= {("block", *path): _rescaled(attention, family.scale(attention.q.shape[-1]))}
    stack, scale = put(stack, values), stack.branch
    if scale is None:
        return stack
    ends = [("attention", "o"), ("attention", "o_bias"), ("cross", "o"), ("cross", "o_bias")]
    ends += [("mlp", "down"), ("mlp", "down_bias")]
    folded = {}
    for path in ends:
        array = None if get(block, path[:1]) is None else get(block, path)
        if array is not None:
            along = jnp.reshape(jnp.asarray(scale, array.dtype), (-1, *[1] * (array.ndim - 1)))
            folded[("block", *path)] = array * along
    return put(stack, folded)


def _rescaled(attention: Attention, scale: float) -> Attention:
    """The same attention with another `scale`: queries take up the difference."""
    if attention.scale == scale or attention.q_norm is not None:
        return attention
    factor = attention.scale / scale
    bias = None if attention.q_bias is None else attention.q_bias * factor
    return put(attention, {("scale",): scale, ("q",): attention.q * factor, ("q_bias",): bias})


def _with_biases(model: Any, family: Family) -> Any:
    """The model with zeros for biases that it has not and that the family always has."""
    if not family.zero_biases:
        return model
    config = dataclasses.replace(family.config_of(model), bias=True)
    table, dtype = axes_of(model), model.embedding.table.dtype
    return put(
        model,
        {
            slot.steps: jnp.zeros(slot.value.shape, dtype)
            for slot in axes_of(shapes_of(config, family)).of_kind("param")
            if slot.path.endswith("bias") and slot.value is not None
            if slot.path in table and table[slot.path].value is None
        },
    )


def shapes_of(config: Any, family: Family) -> Any:
    """The model of a config without its numbers."""
    return eqx.filter_eval_shape(family.model, config, key=jax.random.key(0))


def buffers_of(config: Any, family: Family) -> dict[str, Any]:
    """What a config says of a model besides its parameters: epsilons, frequencies, scales, by path."""

    @jax.jit
    def make():  # the parameters are never drawn: nothing asks for them
        model = family.model(config, key=jax.random.key(0))
        return {slot.path: slot.value for slot in axes_of(model).of_kind("buffer")}

    return make()


def _unsaid(model: Any, config: Any, family: Family) -> list[str]:
    """Where a model is not the one that its config builds."""
    wanted, table = shapes_of(config, family), axes_of(model)
    complaints = []
    for slot in axes_of(wanted).values():
        have, want = (None if x is None else x.shape for x in (table[slot.path].value, slot.value))
        if slot.kind in ("param", "buffer") and have != want:
            complaints.append(f"{slot.path}: expected the shape {want}, got {have}")
    if complaints:
        return complaints
    for path, want in buffers_of(config, family).items():
        have = table[path].value
        if have is not None and not np.array_equal(have, want.astype(have.dtype)):
            complaints.append(
                f"{path}: the config there can only say {_brief(want)}, not {_brief(have)}"
            )
    if not complaints and jax.tree.structure(model) != jax.tree.structure(wanted):
        complaints.append(f"{type(model).__name__}: its choices are not those of any {config}")
    return complaints


def _brief(array: Any) -> str:
    values = np.unique(np.asarray(array, np.float64))
    shown = ", ".join(f"{value:g}" for value in values[:4])
    return shown + ", ..." * (len(values) > 4)
