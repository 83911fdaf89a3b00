"""Axes for models that growjax did not write: declared from outside, by leaf path."""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox.nn import StateIndex

from growjax.annotation import layers
from growjax.annotation.checked import Checked
from growjax.annotation.declared import declared_arrays, matches, unreadable, written
from growjax.annotation.gating import faults as faults_of
from growjax.annotation.gating import folded
from growjax.annotation.packing import (
    Layers,
    children,
    has_shape,
    hidden,
    indices,
    lists,
    marked,
    pack,
    unpack,
    walk,
)
from growjax.annotation.undeclared import undeclared, unread
from growjax.axes import Declaration, axes_of, get, put
from growjax.errors import AxisError, raise_all
from growjax.gates import Gate


class Annotated(eqx.Module):
    """Somebody else's model with its axes declared; made by `annotate`, called like the model.

    `.model` is the model itself, `.state` its `eqx.nn.State`. `.tree` is the model as growjax holds it:
    lists of equal blocks packed, running statistics in the place of their initial values.
    """

    tree: Any
    specs: tuple[tuple[str, Declaration], ...] = eqx.field(static=True)
    ignore: tuple[str, ...] = eqx.field(static=True)
    statics: tuple[tuple[str, str | tuple[str, ...]], ...] = eqx.field(static=True)
    stacks: tuple[tuple[str, str], ...] = eqx.field(static=True, default=())
    stateful: bool = eqx.field(static=True, default=False)
    notes: tuple[str, ...] = eqx.field(static=True, default=())
    gates: dict[str, Gate | None] = eqx.field(default_factory=dict)
    stream: str = eqx.field(static=True, default="embed")
    residual: tuple[str, ...] = eqx.field(static=True, default=())
    traced: tuple[tuple[tuple[str, str], str], ...] = eqx.field(static=True, default=())

    @property
    def model(self) -> Any:
        """The model itself, with its own lists of blocks; gates, if any, are folded into its arrays."""
        model = unpack(self._open())
        return eqx.nn.delete_init_state(model) if self.stateful else model

    def _open(self) -> Any:
        """The tree with its gates, if any, folded into its arrays."""
        if all(gate is None for gate in self.gates.values()):
            return self.tree
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(self)):
            # A plan is checked with shapes in place of arrays, which cannot be multiplied
            return eqx.filter_eval_shape(_folded_tree, self)
        return _folded_tree(self)

    @property
    def state(self) -> eqx.nn.State:
        """The running statistics that belong to `.model`, to be called with."""
        return eqx.nn.State(unpack(self.tree))

    def with_state(self, state: eqx.nn.State) -> "Annotated":
        """The same model with the running statistics of `state`, the one that training left."""
        return dataclasses.replace(self, tree=with_state(self.tree, state))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        model = self.model
        if not callable(model):
            raise AxisError(
                f"a {type(model).__name__} cannot be called; say how it is applied, such as "
                "certify(..., forward=lambda model, batch: apply(model.model, batch))"
            )
        return model(*args, **kwargs)

    def __str__(self) -> str:
        """The call of `gj.annotate` that makes it, with the sizes of its axes and its notes."""
        sizes = ", ".join(f"{axis}={size}" for axis, size in axes_of(self).sizes.items())
        lines = [f"# axes: {sizes}", *(f"# {note}" for note in self.notes)]
        lines += ["gj.annotate(", "    model,", "    {"]
        lines += [
            f"        {pattern!r}: {written(declaration)}," for pattern, declaration in self.specs
        ]
        lines += ["    },"]
        if self.ignore:
            lines.append(f"    ignore={list(self.ignore)!r},")
        for name, pairs in (("statics", self.statics), ("stacks", self.stacks)):
            if pairs:
                lines.append(f"    {name}={dict(pairs)!r},")
        if self.stateful:
            lines.append("    state=state,")
        for name, axes in (("gates", self.gates), ("residual", self.residual)):
            if axes:
                lines.append(f"    {name}={list(axes)!r},")
        if self.stream != "embed":
            lines.append(f"    stream={self.stream!r},")
        if self.traced and any(unread(axes_of(self), self.gates)):
            lines.append("    example=batch,")  # without it this annotation is refused
        text = "\n".join([*lines, ")"])
        return text if '"' in text else text.replace("'", '"')

    def declarations(self, steps: tuple) -> Iterator[tuple[tuple, Declaration, Any, str]]:
        """Every annotated array, and norm without a gain, with the first declaration that matches it.

        Each with its path in the user's own model, where the first block of a list stands for all.
        """
        above = "".join(f"{step}." for step in steps)
        for inner, path, leaf in walk(self.tree):
            if not (has_shape(leaf) or leaf is None):
                continue
            if matches(path, self.ignore):
                packed = self._packed_axes(inner)
                if packed and leaf is not None:  # it is as long as its list, whatever it holds
                    rest = " ".join(map(str, leaf.shape[len(packed.split()) :]))
                    declaration = Declaration("buffer", f"{packed}: {rest}")
                    yield (*steps, "tree", *inner), declaration, leaf, above + path
                continue
            declaration = next((d for pattern, d in self.specs if matches(path, [pattern])), None)
            if declaration is not None and (leaf is not None or "~" in declaration.spec):
                declaration = self._stacked(declaration, inner)
                yield (*steps, "tree", *inner), declaration, leaf, above + path
        for axis, gate in self.gates.items():
            # No path of a model has brackets, so it is no array's
            yield (*steps, "gates", axis), Declaration("gate", axis), gate, f"{above}gates[{axis}]"

    def _packed_axes(self, steps: tuple) -> str:
        nodes = [get(self.tree, steps[:n]) for n in range(len(steps))]
        return " ".join(node.axis for node in nodes if isinstance(node, Layers))

    def _stacked(self, declaration: Declaration, steps: tuple) -> Declaration:
        """A declaration with the axes of the packed lists that the leaf is in."""
        axes = self._packed_axes(steps)
        if not axes:
            return declaration
        spec = (
            f"{axes} {declaration.spec}"
            if ":" in declaration.spec
            else f"{axes}: {declaration.spec}"
        )
        return dataclasses.replace(declaration, spec=spec)

    def known_sizes(self) -> dict[str, int]:
        """Axis sizes that the model keeps as plain integers (a number of heads, a norm's shape)."""
        sizes = {}
        for pattern, text in self.statics:
            for steps in _static_places(self.tree, pattern):
                held = get(self.tree, steps)
                pairs = [(text, held)] if isinstance(text, str) else zip(text, held, strict=False)
                sizes |= {axis: size for axis, size in pairs if axis.isidentifier()}
        return sizes

    def closings(self) -> dict[tuple[str, str], str]:
        """What was declared (`residual=`) or traced (`example=`, `gj.infer`) of every stack's blocks."""
        return {(axis, self.stream): "" for axis in self.residual} | dict(self.traced)

    def resized(self, sizes: Mapping[str, int]) -> "Annotated":
        """The same model with the static fields that repeat a size brought up to date."""
        values = {
            steps: _static_value(text, sizes)
            for pattern, text in self.statics
            for steps in _static_places(self.tree, pattern)
        }
        tree = put(self.tree, values)
        tree = put(tree, layers.stale(tree, values))
        return dataclasses.replace(self, tree=tree)


def annotate(
    model: Any,
    specs: Mapping[str, str | Declaration | dataclasses.Field[Any]],
    *,
    ignore: Sequence[str] = (),
    statics: Mapping[str, str | tuple[str, ...]] | None = None,
    stacks: Mapping[str, str] | None = None,
    state: eqx.nn.State | None = None,
    gates: Sequence[str] = (),
    residual: Sequence[str] = (),
    stream: str = "embed",
    example: Any = None,
    forward: Callable[[Any, Any], Any] | None = None,
) -> Annotated:
    """Declare the axes of a model that growjax did not write: a module, or a dict of arrays.

    **Arguments**

    - `specs`: leaf-path pattern (`*` matches anything) to spec; the first match counts. A string
      declares a trained array (or a norm's epsilon, `"<embed>"`), `gj.buffer("head_dim")` one that grows
      and is not trained, and `gj.param(spec, init="zeros")` how new entries are drawn. A pattern may
      name a whole layer of `eqx.nn` instead of arrays (`growjax.annotation.layers`), or a field that
      holds None: `"norm.weight": "~embed"` declares a norm that has no gain.
    - `ignore`: patterns of arrays that are neither grown nor trained.
    - `statics`: pattern of a static field that repeats a size, to that size: an axis, a product
      (`"heads head_dim"`, `"4 embed"`), or a tuple of such for a shape. They are read for sizes that no
      array shows, and rewritten when an axis grows. Layers of `eqx.nn` keep their own up to date, but
      for the number of heads.
    - `stacks`: pattern of a list (or tuple) of equal blocks, to the name of its axis: depth grows like
      that of a scanned model, and `.model` has the longer list. The first block's paths stand for all.
    - `state`: the `eqx.nn.State` of the model; its arrays have the paths `*.batch_state_index.init.*`
      and the like, and they are declared (or ignored) as others are.

    - `gates`: axes that `gj.msg` may grow, though the model has no gates (`growjax.annotation.gating`).
      They are folded into its arrays at every call until `gj.settle` drops them.
    - `residual`: stacks whose blocks are `x + f(x)`, where `f` ends in arrays that produce the stream, so
      that a block does nothing once these are zero. A gate on a stack and `gj.stack(branch="zero")`
      need to know; an `example` shows it, too.
    - `stream`: the axis of the residual stream.
    - `example`: a batch (with a leading batch dimension; a tuple for several inputs) to trace the model
      with, by `forward(model, batch)` or under `vmap`. The annotation is checked against the
      program: roles, norms, sums over an axis that no array consumes, two names for one dimension, and
      constants that follow a size although no static field declares it. Shapes will do.

    Raises `AxisError` that lists every array without a match, every pattern without an array, every list
    of blocks that are not equal and every static field that differs from its declared size.

    **Example**

        model = gj.annotate(model, {"blocks.*.up": "embed -> mlp", "blocks.*.down": "mlp -> embed"},
                            stacks={"blocks": "layers"})
    """
    stacks = stacks or {}
    mappings = {"specs": specs, "statics": statics or {}, "stacks": stacks}
    names = {"ignore": ignore, "gates": gates, "residual": residual}
    faults = list(unreadable(mappings, names, stream))
    raise_all(AxisError, "the annotation does not fit the model:", faults)
    annotated = annotated_by(model, specs, ignore, statics or {}, stacks, state)
    table = axes_of(annotated)
    faults = faults_of(annotated, table, gates, stream)
    faults += [
        f"gates: {axis!r}: only the program shows whether a block is the identity where its gate is 0: "
        f"give an example=batch, or residual=[{axis!r}] if its blocks are x + f(x)"
        for axis in gates
        if "stack" in table.roles(axis) and example is None and axis not in residual
    ]
    faults += [
        f"residual: expected the axis of a stack, got {axis!r}"
        for axis in residual
        if "stack" not in table.roles(axis)
    ]
    if example is None:  # the program shows more of the same
        faults += unread(table, gates)
        faults += undeclared(annotated.tree, table, dict(annotated.statics), gates)
    raise_all(AxisError, "the annotation does not fit the model:", faults)
    annotated = dataclasses.replace(
        annotated, gates=dict.fromkeys(gates), stream=stream, residual=tuple(residual)
    )
    if example is not None:
        checked = Checked(annotated, example, forward)
        raise_all(AxisError, "the annotation does not match the model's program:", checked.faults())
        annotated = dataclasses.replace(annotated, traced=tuple(checked.closings.items()))
    return annotated


def annotated_by(
    model: Any,
    specs: Mapping[str, Any],
    ignore: Sequence[str],
    statics: Mapping[str, Any],
    stacks: Mapping[str, str],
    state: eqx.nn.State | None,
) -> Annotated:
    """A model with these declarations, as far as they fit its arrays and fields; see `annotate`."""
    complaints = []
    places = lists(model, stacks)
    for pattern, axis in stacks.items():
        if axis not in places.values() or not lists(model, {pattern: axis}):
            complaints.append(f"stacks pattern {pattern!r} matches no list")
    tree, faults = pack(model, places)
    complaints += faults
    if state is not None:
        tree = with_state(tree, state)
    declared, own, faults = declared_arrays(tree, specs)
    complaints += faults
    annotated = Annotated(
        tree,
        tuple(declared),
        tuple(ignore),
        (*own.items(), *statics.items()),
        tuple(stacks.items()),
        state is not None,
    )
    arrays = [(path, leaf) for _, path, leaf in walk(tree) if has_shape(leaf)]
    paths = [path for path, _ in arrays]
    if not arrays and not any(children(model)):
        complaints.append(
            f"model: expected a module or a dict of arrays, got a {type(model).__name__}"
        )
    complaints += [
        f"pattern {pattern!r} matches no array"
        for pattern in ignore
        if not fnmatch.filter(paths, pattern)
    ]
    complaints += [
        f"statics pattern {pattern!r} matches no field"
        for pattern in statics
        if not _static_places(tree, pattern)
    ]
    complaints += _odd_statics(annotated)
    complaints += [
        f"{path}: it is held by a {holder}, which cannot be rebuilt; give plain dicts of arrays (of "
        "Flax, flax.core.unfreeze(params) or nnx.to_pure_dict(state))"
        for path, holder in hidden(model)
    ]
    complaints += [
        f"{path}: shape {np.shape(leaf)} has no spec and is not ignored"
        for path, leaf in arrays
        if not matches(path, [*specs, *(pattern for pattern, _ in declared), *ignore])
    ]
    raise_all(AxisError, "the annotation does not fit the model:", complaints)
    raise_all(
        AxisError,
        "static fields do not have their declared sizes:",
        _wrong_statics(annotated, axes_of(annotated).sizes),
    )
    return annotated


def _folded_tree(annotated: Annotated) -> Any:
    """The tree with its gates multiplied into its arrays."""
    return folded(annotated, axes_of(annotated), annotated.gates, annotated.stream).tree


# State ---------------------------------------------------------------------------------------


def with_state(tree: Any, state: eqx.nn.State) -> Any:
    """The tree with the values of a state in the place of the initial ones."""
    values = {}
    for steps, path, node in walk(tree):
        if not isinstance(node, StateIndex):
            continue
        above = [get(tree, steps[:n]) for n in range(len(steps))]
        packed = [n for n, node in enumerate(above) if isinstance(node, Layers)]
        if len(packed) > 1:
            raise AxisError(f"{path}: a list of stateful blocks inside another cannot be packed")
        same = [node]
        if packed:
            outer = above[packed[0]]
            mine = [n for n, index in enumerate(indices(outer.block)) if index is node]
            same = [
                indices(marked(outer.block, outer.names(i)))[mine[0]] for i in range(outer.length)
            ]
        try:
            rows = [state.get(index) for index in same]
        except KeyError as error:
            raise AxisError(
                f"state: it has no entry for {path}; pass the state of this model"
            ) from error
        value = jax.tree.map(lambda *x: jnp.stack(x), *rows) if packed else rows[0]
        values[*steps, "init"] = value
    if not values:
        raise AxisError("state: this model has no stateful layer")
    return put(tree, values)


# Static fields -------------------------------------------------------------------------------


def _static_places(tree, pattern: str) -> list[tuple]:
    return [
        steps
        for steps, path, node in walk(tree)
        if fnmatch.fnmatchcase(path, pattern) and not has_shape(node) and steps
    ]


def _static_value(text: str | tuple[str, ...], sizes: Mapping[str, int]) -> Any:
    """The expected value of a static field: a sum of products of axis sizes, or a tuple of them."""
    if not isinstance(text, str):
        return tuple(_static_value(each, sizes) for each in text)
    total = 0
    for term in text.strip().strip("()").split("+"):
        total += math.prod(int(x) if x.isdigit() else sizes[x] for x in term.split())
    return total


def _names(text: str | tuple[str, ...]) -> set[str]:
    texts = [text] if isinstance(text, str) else list(text)
    return {name for each in texts for name in re.findall(r"[A-Za-z_]\w*", each)}


def _odd_statics(annotated: Annotated) -> Iterator[str]:
    """The static fields that hold no size where one is declared, or no tuple of sizes."""
    for pattern, text in annotated.statics:
        for steps in _static_places(annotated.tree, pattern):
            held = get(annotated.tree, steps)
            path = ".".join(map(str, steps))
            if isinstance(text, str) and not isinstance(held, Real):
                yield f"statics: {path}: expected a number for {text!r}, got {held!r}"
            numbers = isinstance(held, tuple | list) and all(isinstance(x, Real) for x in held)
            if not isinstance(text, str) and not numbers:
                yield f"statics: {path}: expected a tuple of numbers for {text!r}, got {held!r}"


def _wrong_statics(annotated: Annotated, sizes: Mapping[str, int]) -> list[str]:
    complaints = []
    for pattern, text in annotated.statics:
        unknown = sorted(_names(text) - set(sizes))
        if unknown:
            known = ", ".join(sizes)
            complaints.append(
                f"{pattern}: unknown axis {', '.join(unknown)}; this model has {known}"
            )
            continue
        for steps in _static_places(annotated.tree, pattern):
            held, expected = get(annotated.tree, steps), _static_value(text, sizes)
            if held != expected:
                path = ".".join(map(str, steps))
                complaints.append(f"{path} is {held!r}, but {text!r} makes {expected!r}")
    return complaints
