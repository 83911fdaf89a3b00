"""Axes for models that growjax did not write: declared from outside, by leaf path."""

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np

from growjax.axes import Declaration, axes_of, find, get, put
from growjax.errors import AxisError, raise_all


class Annotated(eqx.Module):
    """Somebody else's model with its axes declared; made by `annotate`, called like the model.

    `.model` is the model itself.
    """

    model: Any
    specs: tuple[tuple[str, Declaration], ...] = eqx.field(static=True)
    ignore: tuple[str, ...] = eqx.field(static=True)
    statics: tuple[tuple[str, str | tuple[str, ...]], ...] = eqx.field(static=True)

    def __call__(self, *args, **kwargs):
        if not callable(self.model):
            raise AxisError(
                f"a {type(self.model).__name__} cannot be called; say how it is applied, such as "
                "certify(..., forward=lambda model, batch: apply(model.model, batch))"
            )
        return self.model(*args, **kwargs)

    def declarations(self, steps: tuple) -> Iterator[tuple[tuple, Declaration, Any]]:
        """Every annotated array, and empty field, with the first declaration that matches it."""
        for path, inner, leaf in (*_array_leaves(self.model), *_empty_fields(self.model)):
            said = [d for pattern, d in self.specs if fnmatch.fnmatchcase(path, pattern)]
            if said and not any(fnmatch.fnmatchcase(path, p) for p in self.ignore):
                yield (*steps, "model", *inner), said[0], leaf

    def known_sizes(self) -> dict[str, int]:
        """Axis sizes that the model keeps as plain integers (a number of heads)."""
        return {
            axis: get(self.model, steps)
            for pattern, axis in self.statics
            if isinstance(axis, str)
            for steps in _static_places(self.model, pattern)
        }

    def resized(self, sizes: Mapping[str, int]) -> "Annotated":
        """The same model with the integers of `statics` set to new sizes."""
        values = {
            steps: sizes[axis] if isinstance(axis, str) else tuple(sizes[a] for a in axis)
            for pattern, axis in self.statics
            for steps in _static_places(self.model, pattern)
        }
        return put(self, {("model", *steps): value for steps, value in values.items()})


def _static_places(model, pattern: str) -> list[tuple]:
    places = []

    def visit(node, steps):
        if isinstance(node, eqx.Module):
            children = {f.name: getattr(node, f.name, None) for f in dataclasses.fields(node)}
        elif isinstance(node, list | tuple):
            children = dict(enumerate(node))
        else:
            return
        for name, child in children.items():
            here = (*steps, name)
            if fnmatch.fnmatchcase(".".join(map(str, here)), pattern):
                places.append(here)
            visit(child, here)

    visit(model, ())
    return places


def annotate(
    model: Any,
    specs: Mapping[str, str | Declaration],
    *,
    ignore: Sequence[str] = (),
    statics: Mapping[str, str | tuple[str, ...]] | None = None,
) -> Annotated:
    """Declare the axes of a model that growjax did not write: a module, or a dict of arrays.

    **Arguments**

    - `specs`: leaf-path pattern (`*` matches anything) to spec; the first match counts. A
      `Declaration` in place of the string says more than "a trained array". A pattern may match a field
      that holds None: `"norm.weight": "~embed"` declares a norm that has no gain.
    - `ignore`: patterns of arrays that are neither grown nor trained.
    - `statics`: pattern of a static field that repeats a size, to its axis (or a tuple of axes, for
      a shape). They are read for sizes that no array shows, and rewritten when the axis grows.

    Raises `AxisError` that lists every array without a match and every pattern without an array.

    **Example**

        model = gj.annotate(model, {"*.up.weight": "mlp <- embed", "*.up.bias": "-> mlp"},
                            statics={"*.up.out_features": "mlp"})
    """
    declared = tuple(
        (pattern, said if isinstance(said, Declaration) else Declaration("param", said))
        for pattern, said in specs.items()
    )
    annotated = Annotated(model, declared, tuple(ignore), tuple((statics or {}).items()))
    paths = [path for path, _, _ in (*_array_leaves(model), *_empty_fields(model))]
    complaints = [
        f"{path}: it is held by a {type(holder).__name__}, which cannot be rebuilt; give plain dicts of "
        "arrays (of Flax, flax.core.unfreeze(params) or nnx.to_pure_dict(state))"
        for path, steps, _ in _array_leaves(model)
        if (holder := _other_holder(model, steps)) is not None
    ]
    complaints += [
        f"pattern {pattern!r} matches no array"
        for pattern in (*specs, *ignore)
        if not fnmatch.filter(paths, pattern)
    ]
    complaints += [
        f"statics pattern {pattern!r} matches no field"
        for pattern, _ in annotated.statics
        if not _static_places(model, pattern)
    ]
    complaints += [
        f"{path}: shape {np.shape(leaf)} has no spec and is not ignored"
        for path, _, leaf in _array_leaves(model)
        if not any(fnmatch.fnmatchcase(path, p) for p in (*specs, *ignore))
    ]
    raise_all(AxisError, "the annotation does not fit the model:", complaints)
    axes_of(annotated)
    return annotated


def _other_holder(model, steps: tuple) -> Any:
    """The first thing on the way to a leaf that is no module, dict, list or tuple; None if all are."""
    for i in range(len(steps)):
        node = find(model, steps[:i])
        if not isinstance(node, dict | list | tuple) and not dataclasses.is_dataclass(node):
            return node
    return None


def _empty_fields(node: Any, steps: tuple = ()) -> Iterator[tuple[str, tuple, None]]:
    """The fields that are no arrays because they hold None: the weight of a norm without one."""
    if isinstance(node, eqx.Module):
        fields = [f for f in dataclasses.fields(node) if not f.metadata.get("static", False)]
        children = {f.name: getattr(node, f.name, None) for f in fields}
    elif isinstance(node, dict):
        children = node
    elif isinstance(node, list | tuple):
        children = dict(enumerate(node))
    else:
        return
    for name, child in children.items():
        if child is None:
            yield ".".join(map(str, (*steps, name))), (*steps, name), None
        else:
            yield from _empty_fields(child, (*steps, name))


def _array_leaves(model) -> list[tuple[str, tuple, Any]]:
    def step(entry):
        return getattr(entry, "name", getattr(entry, "idx", getattr(entry, "key", None)))

    leaves = jax.tree_util.tree_leaves_with_path(model)
    found = [(tuple(map(step, path)), leaf) for path, leaf in leaves if hasattr(leaf, "shape")]
    return [(".".join(map(str, steps)), steps, leaf) for steps, leaf in found]
