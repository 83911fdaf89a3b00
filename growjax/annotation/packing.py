"""A list of equal blocks as one block whose arrays have a leading axis, and back."""

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox.nn import StateIndex

from growjax.axes import get, put
from growjax.errors import AxisError
from growjax.trees import replaced


class Layers(eqx.Module):
    """A list (or tuple) of equal blocks, packed: every array of `block` is `[axis, ...]`.

    `markers` are the keys of the stateful layers in an `eqx.nn.State`, block by block.
    """

    block: Any
    axis: str = eqx.field(static=True)
    kind: type = eqx.field(static=True)
    markers: tuple[tuple[Any, ...], ...] = eqx.field(static=True, default=())

    @property
    def length(self) -> int:
        """The number of blocks, read off the arrays."""
        arrays = [leaf for leaf in jax.tree.leaves(self.block) if has_shape(leaf)]
        if not arrays:
            raise AxisError(f"a tree without arrays does not show how long {self.axis!r} is")
        return arrays[0].shape[0]

    def names(self, i: int) -> tuple[Any, ...]:
        """The state keys of the stateful layers of block `i`; blocks added by growth get new keys."""
        if i < len(self.markers):
            return self.markers[i]
        return tuple((marker, i) for marker in self.markers[0])


def has_shape(leaf: Any) -> bool:
    """Whether a leaf is an array, or the shape of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def children(node: Any) -> Iterator[tuple[str | int, Any]]:
    """The children of a node: fields of a module, entries of a dict, elements of a list or tuple."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [field.name for field in dataclasses.fields(node)]
        yield from ((name, getattr(node, name)) for name in names if hasattr(node, name))
    elif isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list | tuple):
        yield from zip(getattr(node, "_fields", range(len(node))), node, strict=True)


def walk(tree: Any) -> Iterator[tuple[tuple, str, Any]]:
    """Every node of a model: its steps, its path in the user's own model, and the node itself.

    The first of packed blocks stands for all of them.
    """

    def visit(node, steps, path):
        yield steps, ".".join(map(str, path)), node
        for name, child in children(node):
            shown = (*path, 0 if isinstance(node, Layers) and name == "block" else name)
            yield from visit(child, (*steps, name), shown)

    yield from visit(tree, (), ())


def hidden(model: Any) -> list[tuple[str, str]]:
    """The paths of arrays that only JAX can reach, each with the type of the node that holds it."""
    seen = {id(leaf) for _, _, leaf in walk(model) if has_shape(leaf)}
    unreachable = []
    for entries, leaf in jax.tree_util.tree_leaves_with_path(model):
        if not has_shape(leaf) or id(leaf) in seen:
            continue
        node, steps = model, [_step(entry) for entry in entries]
        for step in steps:
            inner = dict(children(node))
            if step not in inner:
                break
            node = inner[step]
        unreachable.append((".".join(map(str, steps)), type(node).__name__))
    return unreachable


def _step(entry: Any) -> Any:
    return getattr(entry, "name", getattr(entry, "idx", getattr(entry, "key", None)))


def lists(model: Any, patterns: Mapping[str, str]) -> dict[tuple, str]:
    """The places of the lists that match a pattern, each with its axis, the deepest first."""
    places = {}
    for steps, path, node in walk(model):
        if isinstance(node, list | tuple) and not hasattr(node, "_fields"):
            for pattern, axis in patterns.items():
                if steps not in places and fnmatch.fnmatchcase(path, pattern):
                    places[steps] = axis
    return dict(sorted(places.items(), key=lambda item: -len(item[0])))


def pack(model: Any, places: Mapping[tuple, str]) -> tuple[Any, list[str]]:
    """The model with these lists packed, and the reasons why lists cannot be packed."""
    complaints = []
    for steps, axis in places.items():
        blocks = get(model, steps)
        faults = unlike(blocks)
        path = ".".join(map(str, steps))
        complaints += [f"stacks: {path}: {fault}" for fault in faults]
        if not faults:
            model = put(model, {steps: _packed(blocks, axis)})
    return model, complaints


def unlike(blocks: Any) -> list[str]:
    """The differences between the blocks of a list, any of which keeps them from being packed."""
    if not blocks:
        return ["an empty list has no block to repeat"]
    first, *rest = map(_unmarked, blocks)
    (leaves, tree), faults = jax.tree_util.tree_flatten_with_path(first), []
    if not any(has_shape(leaf) for _, leaf in leaves):
        return ["its elements hold no arrays"]
    for i, block in enumerate(rest, 1):
        if jax.tree.structure(block) != tree:
            faults.append(f"block {i} has other fields or static values than block 0")
            continue
        for (where, a), b in zip(leaves, jax.tree.leaves(block), strict=True):
            name = jax.tree_util.keystr(where)
            if has_shape(a) != has_shape(b) or (has_shape(a) and a.shape != b.shape):
                faults.append(f"block {i} has {_short(b)} at {name}, block 0 {_short(a)}")
            elif has_shape(a) and a.dtype != b.dtype:
                faults.append(f"block {i} has {b.dtype} at {name}, block 0 {a.dtype}")
            elif not has_shape(a) and not (a is b or a == b):
                faults.append(f"block {i} has {b!r} at {name}, block 0 {a!r}")
    return faults


def _short(leaf: Any) -> str:
    return f"shape {leaf.shape}" if has_shape(leaf) else repr(leaf)


def indices(block: Any) -> list[StateIndex]:
    """The indices by which the stateful layers of a block look up their states, in order."""
    leaves = jax.tree.leaves(block, is_leaf=lambda node: isinstance(node, StateIndex))
    return [leaf for leaf in leaves if isinstance(leaf, StateIndex)]


def marked(block: Any, markers: tuple[Any, ...]) -> Any:
    """The block with other markers in its state indices, in order."""
    rest = iter(markers)

    def rename(old: StateIndex) -> StateIndex:
        index = StateIndex(old.init)
        object.__setattr__(index, "marker", next(rest))
        return index

    return replaced(block, StateIndex, rename)


def _unmarked(block: Any) -> Any:
    return marked(block, tuple(range(len(indices(block)))))


def _packed(blocks: Any, axis: str) -> Layers:
    markers = tuple(tuple(index.marker for index in indices(block)) for block in blocks)
    block = jax.tree.map(_stack, *map(_unmarked, blocks))
    return Layers(block, axis, type(blocks), markers if markers[0] else ())


def _stack(first: Any, *rest: Any) -> Any:
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((1 + len(rest), *first.shape), first.dtype)
    if isinstance(first, np.ndarray):
        return np.stack([first, *rest])
    return jnp.stack([first, *rest]) if has_shape(first) else first


def unpack(tree: Any) -> Any:
    """The model with every packed list as the user wrote it."""
    return replaced(tree, Layers, _unpacked)


def _unpacked(node: Layers) -> Any:
    length = node.length
    leaves, tree = jax.tree.flatten(node.block)
    rows = zip(*(_unstacked(leaf, length) for leaf in leaves), strict=True)
    blocks = [jax.tree.unflatten(tree, row) for row in rows]
    if node.markers:
        blocks = [marked(block, node.names(i)) for i, block in enumerate(blocks)]
    return node.kind(map(unpack, blocks))


def _unstacked(leaf: Any, length: int) -> list[Any]:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)] * length
    if isinstance(leaf, np.ndarray):
        return list(leaf)
    if not has_shape(leaf):
        return [leaf] * length
    # One operation, whose transpose puts the gradients of all blocks together at once
    return [jnp.squeeze(row, 0) for row in jax.lax.split(leaf, [1] * length, axis=0)]
