"""Places in a tree of modules: the value at some steps, and a copy with other values there."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from growjax.errors import AxisError, raise_all


def get(model: Any, steps: Sequence[str | int]) -> Any:
    """Follow the steps of a slot's path into a model."""
    for step in steps:
        if isinstance(step, str) and not isinstance(model, dict):
            model = getattr(model, step)
        else:
            model = model[step]
    return model


def find(model: Any, steps: Sequence[str | int]) -> Any:
    """The result of `get`, or None where a tree has no such place (a masked optimizer's, for one)."""
    try:
        return get(model, steps)
    except (AttributeError, KeyError, TypeError):  # a dict lacks the key, or a leaf has none
        return None


def abstract(tree: Any) -> Any:
    """A tree with the shape of every array in its place."""

    def shape(x: Any) -> Any:
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype) if hasattr(x, "dtype") else x

    return jax.tree.map(shape, tree)


def replaced(model: Any, kind: Any, function: Callable[[Any], Any]) -> Any:
    """A copy of a model with `function(module)` in place of every module of a kind."""

    def is_one(node: Any) -> bool:
        return isinstance(node, kind)

    return jax.tree.map(lambda x: function(x) if is_one(x) else x, model, is_leaf=is_one)


def put(model: Any, values: Mapping[tuple[str | int, ...], Any]) -> Any:
    """A copy of the model with new values at some places, given by their steps.

    Unlike `eqx.tree_at` it also fills places that hold None and changes static fields. Raises `AxisError`
    for places that the model does not have.
    """
    return _put(model, dict(values), ())


def _put(node: Any, values: Mapping[tuple, Any], path: tuple) -> Any:
    if () in values:
        return values[()]
    below: dict[str | int, dict[tuple, Any]] = {}
    for steps, value in values.items():
        below.setdefault(steps[0], {})[steps[1:]] = value
    if not below:
        return node

    def child(name: str | int, old: Any) -> Any:
        inner = below.pop(name, None)
        return old if inner is None else _put(old, inner, (*path, name))

    if isinstance(node, dict):
        new: Any = copy.copy(node)  # of the same class, such as OrderedDict
        new.update({name: child(name, old) for name, old in node.items()})
    elif isinstance(node, tuple) and hasattr(node, "_fields"):
        # By name in a model, by number in the state of an optimizer
        names: Any = node._fields  # type: ignore[attr-defined]
        items = zip(names, enumerate(node), strict=True)
        new = type(node)(*[child(i if i in below else name, x) for name, (i, x) in items])
    elif isinstance(node, list | tuple):
        new = type(node)(child(i, old) for i, old in enumerate(node))
    elif not dataclasses.is_dataclass(node):
        new = node
    else:
        new = object.__new__(type(node))  # no __init__: sizes may be halfway between two models
        for field in dataclasses.fields(node):
            if hasattr(node, field.name):
                object.__setattr__(new, field.name, child(field.name, getattr(node, field.name)))
    raise_all(
        AxisError,
        f"these places are not in the {type(node).__name__}:",
        [".".join(map(str, (*path, name))) for name in below],
    )
    return new
