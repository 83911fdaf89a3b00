"""Layers that a step does not run stay as they are, and so does the optimizer's state for them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from growjax.axes import axes_of, find, put
from growjax.errors import StateError, raise_all
from growjax.optim.age import Ages


def freeze(
    running: Mapping[str, Bool[Array, " layers"]], updates: Any, state: Any, before: Any
) -> tuple[Any, Any]:
    """Undo an update for the layers that did not run: `(updates, state)`.

    A layer that a sub-network leaves out has a gradient of zero. An optimizer treats it as any other
    gradient: the moments decay, and momentum and weight decay still move the layer. `freeze` sets the
    updates of such layers to zero and restores their moments and ages, so that an age
    (`growjax.optim.adamw`) counts only the steps that ran the layer. Parameters and state outside of
    layers take the update.

    **Arguments**

    - `running`: for each stack of layers a flag [layers], such as `path.running(model, key=key)`.
    - `updates`, `state`: the updates and the state that an optax transformation returned.
    - `before`: the state before that update.

    Raises `StateError` that lists every leaf which is not shaped like its parameter, such as factored
    moments, since their layers cannot be separated.

    **Example**

        updates, after = tx.update(gradient, state, trained)
        updates, state = growjax.optim.freeze(path.running(model, key=key), updates, after, state)

    Panigrahi et al. (RaPTr, 2025) do not specify whether layers that they leave out move or stay.
    """

    def shaped(node) -> bool:
        return isinstance(node, type(updates) | Ages)

    leaves, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=shaped)
    faults: list[str] = []
    restored = []
    for (path, new), old in zip(leaves, jax.tree.leaves(before, is_leaf=shaped), strict=True):
        if isinstance(new, Ages):
            new = Ages(
                {axis: _chosen(running, axis, age, old.of[axis]) for axis, age in new.of.items()}
            )
        elif shaped(new):
            faults += [f"{jax.tree_util.keystr(path)}{fault}" for fault in _faults(new, updates)]
            new = new if faults else _rows(running, new, old)
        restored.append(new)
    raise_all(StateError, "layers of this optimizer state cannot be frozen:", faults)
    zeros = jax.tree.map(jnp.zeros_like, updates)
    return _rows(running, updates, zeros), jax.tree_util.tree_unflatten(structure, restored)


def _rows(running: Mapping[str, Array], new: Any, old: Any) -> Any:
    """A tree with the rows of `new` for layers that ran, and those of `old` for the others."""
    return put(
        new,
        {
            slot.steps: _chosen(running, slot.dims[0].axis, slot.value, find(old, slot.steps))
            for slot in axes_of(new).params()
            if slot.dims
        },
    )


def _chosen(running: Mapping[str, Array], axis: str, new: Array, old: Array) -> Array:
    if axis not in running:
        return new
    return jnp.where(running[axis].reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def _faults(tree: Any, like: Any) -> list[str]:
    """One line for each leaf of `tree` that has another shape than that of `like`."""
    faults = []
    for slot in axes_of(like).params():
        value = find(tree, slot.steps)
        if getattr(value, "shape", slot.value.shape) != slot.value.shape:
            faults.append(f".{slot.path}: expected {slot.value.shape}, got {value.shape}")
    return faults
