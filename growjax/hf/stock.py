"""Grown models as stock ones: every scale is folded into parameters, or the model is refused."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from growjax.axes import axes_of, get, put
from growjax.errors import HuggingFaceError, raise_all
from growjax.gates import is_gated, settle
from growjax.hf.family import ConfigFile, Family, read_config
from growjax.hf.files import shortened
from growjax.models import LlamaConfig
from growjax.nn import Attention, Block, Norm, Stacked, WidthNorm


class Inexpressible(HuggingFaceError):
    """A model of the family's kind, with numbers that no config.json of it can say."""


def stock(model: Any, family: Family) -> tuple[Any, Any]:
    """A model that computes the same function and is wholly described by a config, and that config.

    It folds open gates, multipliers of residual branches, and the scales of attention and head into
    weights. Missing biases become zeros if the family always has biases. Raises `GateError` while gates
    are not open, and `HuggingFaceError` with every other property that the family cannot express.
    """
    model = settle(model) if is_gated(model) else model
    complaints = []
    for name, stack in vars(model).items():
        if isinstance(stack, Stacked):
            if stack.active is not None:
                complaints.append(
                    f"{name}.active: layers are switched off; save the model, not a sub-network of it"
                )
            model = put(model, {(name,): _folded(stack, family)})
    raise_all(HuggingFaceError, f"this model cannot be written as {family.model_type}:", complaints)
    model = _with_biases(family.fold_scales(model), family)

    config = family.config_of(model)
    complaints = [
        f"{field}: expected {value!r}, got {getattr(config, field)!r}"
        for field, value in family.only.items()
        if getattr(config, field) != value
    ]
    complaints += family.limits(config)
    headline = f"this model cannot be written as {family.model_type}:"
    raise_all(HuggingFaceError, headline, shortened(complaints))
    raise_all(Inexpressible, headline, shortened(_differences(model, config)))
    return model, config


# Fields of configurations that say how something is computed, and not what; no config.json has them
_UNTOLD = {"dtype", "attention", "remat", "expert_body", "z_loss_coef"}


def check_keys(
    family: Family,
    keys: Mapping[str, Any],
    tensors: Mapping[str, Any],
    config: Any,
    dtype: str,
) -> None:
    """Raise `HuggingFaceError` unless the keys of a config.json, read again, are the configuration.

    `tensors` are those beside it, without the family's prefix; `dtype` is that of parameters.
    """
    file = ConfigFile(keys, tensors)
    again = read_config(family, file, lambda one, other: tensors[one] is tensors[other])
    file.check(family.model_type)
    again = again.decoder() if isinstance(again, LlamaConfig) else again
    config, again = _with_scale(config), _with_scale(again)
    complaints = [
        f"{field.name}: expected {told!r}, and the keys of config.json say {read!r}"
        for field in dataclasses.fields(config)
        if field.name not in _UNTOLD
        and not _alike(
            told := getattr(config, field.name), read := getattr(again, field.name), dtype
        )
    ]
    raise_all(HuggingFaceError, f"this model cannot be written as {family.model_type}:", complaints)


def _with_scale(config: Any) -> Any:
    """A configuration whose scale of scores is a number, and not the default."""
    if getattr(config, "scale", 1.0) is not None:
        return config
    return dataclasses.replace(config, scale=config.head_dim**-0.5)


def _alike(one: Any, other: Any, dtype: str) -> bool:
    """Whether two values of a configuration are equal, up to the rounding of numbers to `dtype`."""
    if isinstance(one, float) and isinstance(other, float):
        # A scale is written as its inverse square, and as an integer if that is close to one
        return math.isclose(one, other, rel_tol=max(float(jnp.finfo(dtype).eps), 1e-9))
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(_alike(*pair, dtype) for pair in zip(one, other, strict=True))
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)]
        return all(_alike(*pair, dtype) for pair in pairs)
    return one == other


def _folded(stack: Stacked, family: Family) -> Stacked:
    """A stack without multipliers of its branches, and with the family's scale of attention.

    `branch`, one multiplier per layer, goes into the last product of each residual branch.
    """
    block: Any = stack.block
    assert isinstance(block, Block)
    values: dict[tuple, Any] = {("branch",): None, ("read",): None}
    for path in (("attention",), ("cross",)):
        attention = get(block, path)
        if attention is not None:
            scale = family.scale(attention)
            values |= {("block", *path): _rescaled(attention, scale)}
    branch, stack = stack.branch, _without_multipliers(put(stack, values))
    if branch is None:
        return stack
    block = stack.block
    last = [("attention", "o"), ("attention", "o_bias"), ("cross", "o"), ("cross", "o_bias")]
    last += [("mlp", "down"), ("mlp", "down_bias")]
    if getattr(block.mlp, "shared", None) is not None:
        last += [("mlp", "shared", "down"), ("mlp", "shared", "down_bias")]
    folded = {}
    for name in ("attention_after", "mlp_after"):
        norm = get(block, (name,))
        if norm is not None:
            # The norm undoes factors of what it reads
            last = [path for path in last if path[0] != name.removesuffix("_after")]
            per_layer = jnp.reshape(jnp.asarray(branch, norm.weight.dtype), (-1, 1))
            folded[("block", name, "weight")] = _scaled_gain(norm, per_layer)
            if norm.bias is not None:
                folded[("block", name, "bias")] = norm.bias * per_layer
    for path in last:
        array = None if get(block, path[:1]) is None else get(block, path)
        if array is not None:
            # [layers, 1, ..., 1]: layers are the first axis of every array of a stack
            per_layer = jnp.reshape(jnp.asarray(branch, array.dtype), (-1, *[1] * (array.ndim - 1)))
            folded[("block", *path)] = array * per_layer
    return put(stack, folded)


def _without_multipliers(stack: Stacked) -> Stacked:
    """The stack with the trained multipliers of its branches in the last product of each."""
    block: Any = stack.block
    values: dict[tuple, Any] = {}
    for part, names in (("attention", ("o", "o_bias")), ("mlp", ("down", "down_bias"))):
        multiplier = getattr(block, f"{part}_multiplier")
        if multiplier is None:
            continue
        values |= {("block", f"{part}_multiplier"): None, ("block", part, "inner"): False}
        for name in names:
            array = get(block, (part, name))
            if array is not None:
                weight = multiplier.weight.reshape(-1, *[1] * (array.ndim - 1))
                values[("block", part, name)] = array * weight.astype(array.dtype)
    return put(stack, values)


def _rescaled(attention: Attention, scale: float) -> Attention:
    """The same attention with another `scale`: queries, or the gain of their norm, take up the ratio."""
    if attention.scale == scale:
        return attention
    factor = attention.scale / scale
    if attention.q_norm is not None:
        gain = ("q_norm", "weight")
        return put(attention, {("scale",): scale, gain: _scaled_gain(attention.q_norm, factor)})
    bias = None if attention.q_bias is None else attention.q_bias * factor
    return put(attention, {("scale",): scale, ("q",): attention.q * factor, ("q_bias",): bias})


def _scaled_gain(norm: Norm | WidthNorm, factor: Any) -> Any:
    """The weight of a norm whose gain is multiplied by a factor."""
    if not norm.plus_one:
        return norm.weight * factor
    assert norm.weight is not None
    return (1 + norm.weight) * factor - 1


def _with_biases(model: Any, family: Family) -> Any:
    """The model with zeros for biases that it lacks and that the family always has."""
    if not family.zero_biases:
        return model
    config = dataclasses.replace(family.config_of(model), bias=True)
    table, dtype = axes_of(model), model.embedding.table.dtype
    zeros = {}
    for slot in axes_of(shapes_of(config)).of_kind("param"):
        if not slot.path.endswith("bias") or slot.value is None:
            continue
        if slot.path in table and table[slot.path].value is None:
            zeros[slot.steps] = jnp.zeros(slot.value.shape, dtype)
    return put(model, zeros)


def shapes_of(config: Any) -> Any:
    """The model of a config, with shapes and dtypes in place of arrays."""
    return eqx.filter_eval_shape(lambda key: config.build(key), jax.random.key(0))


def buffers_of(config: Any) -> dict[str, Any]:
    """The arrays of a model that its config determines: epsilons, frequencies, scales, by path."""

    @jax.jit
    def make():  # the parameters are not outputs, so the compiler removes their draws
        model = config.build(jax.random.key(0))
        return {slot.path: slot.value for slot in axes_of(model).of_kind("buffer")}

    return make()


def _differences(model: Any, config: Any) -> list[str]:
    """The differences of a model from the one that its config builds."""
    expected, table = shapes_of(config), axes_of(model)
    complaints = []
    for slot in axes_of(expected).values():
        own = table[slot.path].value
        shape = None if own is None else own.shape
        expected_shape = None if slot.value is None else slot.value.shape
        if slot.kind in ("param", "buffer") and shape != expected_shape:
            complaints.append(f"{slot.path}: expected the shape {expected_shape}, got {shape}")
    if complaints:
        return complaints
    for path, value in buffers_of(config).items():
        own = table[path].value
        if own is not None and not np.array_equal(own, value.astype(own.dtype)):
            complaints.append(
                f"{path}: expected {_brief(value)}, as its config determines it, got {_brief(own)}"
            )
    if not complaints and _structure(model) != _structure(expected):
        complaints.append(
            f"{type(model).__name__}: has a structure that no config builds: {config}"
        )
    return complaints


def _structure(model: Any) -> Any:
    """The structure of a model, without the epsilon that only layers grown from nothing would take."""

    def without_born_eps(node: Any) -> Any:
        return put(node, {("born_eps",): 0.0}) if isinstance(node, Norm | WidthNorm) else node

    return jax.tree.structure(
        jax.tree.map(
            without_born_eps, model, is_leaf=lambda node: isinstance(node, Norm | WidthNorm)
        )
    )


def _brief(array: Any) -> str:
    """The first distinct values of an array, for messages."""
    values = np.unique(np.asarray(array, np.float64))
    shown = ", ".join(f"{value:g}" for value in values[:4])
    return shown + ", ..." * (len(values) > 4)
