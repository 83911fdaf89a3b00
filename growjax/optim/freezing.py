"""Layers that a step did not run stay as they were, and so does what the optimizer remembers of them."""

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
    """Take back what an update did to layers that did not run: `(updates, state)`.

    A layer that a sub-network leaves out has a gradient of zero. To an optimizer that is a gradient like
    any other: its moments decay, and the layer still moves by momentum and weight decay. Afterwards it is
    as if the layer had not been there: its updates are zero, its moments those of before, and its age
    (`growjax.optim.adamw`) counts only the steps that it ran. What belongs to no layer moves on.

    **Arguments**

    - `running`: for each stack of layers a flag [layers], such as `path.running(model, key=key)`.
    - `updates`, `state`: what an optax transformation returned for the gradient.
    - `before`: the state that it was given.

    Raises `StateError` that lists every leaf which is not shaped like its parameter, such as factored
    moments: nothing says which part of them is a layer's.

    **Example**

        updates, after = tx.update(gradient, state, trained)
        updates, state = growjax.optim.freeze(path.running(model, key=key), updates, after, state)

    Panigrahi et al. (RaPTr, 2025) do not say which of the two happens to the layers that they leave out.
    """

    def shaped(node) -> bool:
        return isinstance(node, type(updates) | Ages)

    leaves, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=shaped)
    complaints: list[str] = []
    kept = []
    for (path, new), old in zip(leaves, jax.tree.leaves(before, is_leaf=shaped), strict=True):
        if isinstance(new, Ages):
            new = Ages(
                {axis: _chosen(running, axis, age, old.of[axis]) for axis, age in new.of.items()}
            )
        elif shaped(new):
            complaints += [
                f"{jax.tree_util.keystr(path)}{fault}" for fault in _faults(new, updates)
            ]
            new = new if complaints else _rows(running, new, old)
        kept.append(new)
    raise_all(StateError, "layers of this optimizer state cannot be left as they were:", complaints)
    still = jax.tree.map(jnp.zeros_like, updates)
    return _rows(running, updates, still), jax.tree_util.tree_unflatten(structure, kept)


def _rows(running: Mapping[str, Array], new: Any, old: Any) -> Any:
    """The rows of layers that ran from `new`, the others from `old`."""
    slots = [slot for slot in axes_of(new).of_kind("param") if slot.arrays()]
    return put(
        new,
        {
            slot.steps: _chosen(running, slot.dims[0].axis, slot.value, find(old, slot.steps))
            for slot in slots
            if slot.dims
        },
    )


def _chosen(running: Mapping[str, Array], axis: str, new: Array, old: Array) -> Array:
    if axis not in running:
        return new
    return jnp.where(running[axis].reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def _faults(tree: Any, like: Any) -> list[str]:
    """The leaves of a tree that are not shaped like those of another."""
    found = []
    for slot in axes_of(like).of_kind("param"):
        value = find(tree, slot.steps)
        if slot.arrays() and getattr(value, "shape", slot.value.shape) != slot.value.shape:
            found.append(f".{slot.path}: expected {slot.value.shape}, got {value.shape}")
    return found
