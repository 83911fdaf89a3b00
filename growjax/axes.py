"""Named axes: the name of every dimension of every parameter, and the side that it is on.

A module declares its axes beside its arrays:

    class MLP(eqx.Module):
        up:   Array = param("embed -> mlp")       # consumes embed, produces mlp
        bias: Array = param("-> mlp")
        down: Array = param("mlp -> embed")
        gate: Gate | None = gate("mlp")           # hides new coordinates; None costs nothing

A *spec* names the dimensions in order, and arrows point from the axes that the leaf consumes to those
that it produces; `growjax.specs` has the full grammar. `axes_of(model)` reads the declarations into one
table, and everything else in growjax follows from it.
"""

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from growjax.errors import AxisError, GrowthError, raise_all
from growjax.specs import Dim, Role, Spec, solve_sizes
from growjax.trees import find as find
from growjax.trees import get as get
from growjax.trees import put as put


Kind = Literal["param", "buffer", "gate", "branch", "active"]
_METADATA = "growjax"


@dataclasses.dataclass(frozen=True)
class Declaration:
    """The declaration of a field: its kind, its spec and the initial values of fresh coordinates."""

    kind: Kind
    spec: str
    init: Literal["normal", "zeros", "ones"] | None = None
    fan_in: str | None = None
    born: str | None = None
    origin: str | None = None
    closes: str | None = None


def _field(
    kind: Kind, spec: str, init=None, fan_in=None, born=None, origin=None, closes=None, **kwargs
) -> Any:
    declared = Declaration(kind, spec, init, fan_in, born, origin, closes)
    return eqx.field(metadata={_METADATA: declared}, **kwargs)


def declaration_of(field: Any) -> Declaration | None:
    """The declaration that `param`, `buffer` and the like made of a field; None of any other."""
    declared = field.metadata.get(_METADATA) if isinstance(field, dataclasses.Field) else None
    return declared if isinstance(declared, Declaration) else None


def param(
    spec: str,
    *,
    init: Literal["normal", "zeros", "ones"] | None = None,
    fan_in: str | None = None,
    origin: str | None = None,
    closes: str | None = None,
) -> Any:
    """Declare a trained array. `init` is how fresh coordinates are drawn under `init="normal"`.

    The default is `ones` for a normalised axis (`~embed`), `zeros` for another vector and `normal`
    for a matrix. `fan_in` names the axes whose sizes make the fan-in, after which new layers are drawn
    (`gj.fresh`), if they are not those that the array consumes. The last two name attributes of the
    module: `origin` a number from which multipliers count (-1 where the module computes with `1 + w`),
    and `closes` whether the array ends its residual branch, so that it takes the share of a copied layer
    (None: the arrays that produce the stream do).
    """
    return _field("param", spec, init, fan_in, origin=origin, closes=closes)


def norm(axis: str) -> Any:
    """Declare that the module normalises over an axis without a gain: uneven copies would change it.

    The field holds None. A gain that may be absent, `Array | None = param("~embed")`, says the same.

    **Example**

        statistics: None = gj.axes.norm("embed")           # LayerNorm without weight and bias
    """
    return _field("param", f"~{axis}", default=None)


def buffer(spec: str = "", *, born: str | None = None, **kwargs: Any) -> Any:
    """Declare an array that is carried and grown but not trained (RoPE frequencies, epsilon).

    New coordinates repeat the old ones. `born` names an attribute of the module, the number that they
    start from if the model has no old ones (no layers, say).
    """
    return _field("buffer", spec, born=born, **kwargs)


def gate(spec: str) -> Any:
    """Declare an optional `Gate` on one axis. It is `None`, and costs nothing, until growth."""
    return _field("gate", spec, default=None)


def branch(spec: str) -> Any:
    """Declare an optional multiplier of the residual branches along a stack axis, `[layers]`.

    None until a sub-network or an operator sets it. A block is `x + it * f(x)`, so it is `x` at 0.
    """
    return _field("branch", spec, default=None)


def active(spec: str) -> Any:
    """Declare an optional flag along a stack axis, boolean `[layers]`: layers marked False are skipped.

    It is None, and every layer runs, until a sub-network sets it.
    """
    return _field("active", spec, default=None)


def stacked(axis: str) -> Any:
    """Declare a sub-module all of whose arrays carry a leading axis: one block that stands for many.

    **Example**

        class Tower(eqx.Module):
            block: Block = gj.stacked("layers")                  # every array of it is [layers, ...]
            scale: Array | None = gj.branch("layers")            # multiplies residual branches
            on: Array | None = gj.active("layers")               # layers marked False are skipped
    """
    return eqx.field(metadata={_METADATA: axis})


@dataclasses.dataclass(frozen=True)
class Slot:
    """One declared field of a model: its path, its value and its axes."""

    path: str
    steps: tuple[str | int, ...]
    kind: Kind
    spec: Spec
    init: Literal["normal", "zeros", "ones"]
    value: Any
    fan_in: tuple[str, ...] | None = None
    born: float | None = None
    origin: float = 0.0
    closes: bool | None = None

    @property
    def dims(self) -> tuple[Dim, ...]:
        """The axes of the leaf, in order."""
        return self.spec.dims

    def positions(self, axis: str, role: Role | None = None) -> list[int]:
        """Where an axis stands among `dims` (in a square matrix twice), in one role alone if given."""
        return [i for i, d in enumerate(self.dims) if d.axis == axis and role in (None, d.role)]

    @property
    def own_axis(self) -> str:
        """The axis that a gate, branch or active slot belongs to (its last one)."""
        return self.dims[-1].axis

    def fan(self, sizes: Sequence[int]) -> list[int]:
        """The sizes that make the fan-in, of those of all `dims`."""
        own = self.fan_in
        counted = [d.role == "consumed" if own is None else d.axis in own for d in self.dims]
        return list(itertools.compress(sizes, counted))

    @property
    def start(self) -> float:
        """The number that a buffer without old coordinates starts from; `AxisError` if it has none."""
        if self.born is None:
            raise AxisError(
                f"{self.path}: new coordinates of a buffer repeat the old ones, but it has none; "
                "declare its first value: gj.buffer(..., born='attribute')"
            )
        return self.born

    def require_fractions(self, array: Any, change: str) -> None:
        """Raise `GrowthError` if a map would change whole numbers or flags, which it would round."""
        if self.kind == "param" and not jnp.issubdtype(array.dtype, jnp.inexact):
            raise GrowthError(
                f"{self.path}: entries would be {change}, and {array.dtype} rounds them; declare what is "
                "not trained as gj.buffer, whose entries repeat"
            )

    def arrays(self) -> list[Array]:
        """The arrays in this slot: none, one, or the two of a gate."""
        return jax.tree.leaves(self.value)

    @property
    def parts(self) -> tuple["Slot", ...]:
        """The blocks of the leaf, each as a slot; itself where no dimension is a sum."""
        named = [(f"{self.path}[{i}]", spec) for i, spec in enumerate(self.spec.parts)]
        return tuple(dataclasses.replace(self, path=p, spec=s) for p, s in named) or (self,)

    def cut(self, array: Any, sizes: Mapping[str, int]) -> list[Any]:
        """An array like the leaf, as its `parts` have it."""
        if not self.spec.parts:
            return [array]
        terms = self.spec.terms[self.spec.summed]
        lengths = [math.prod(dim.size(sizes) for dim in term) for term in terms]
        before = (slice(None),) * self.spec.summed
        ends = zip(itertools.accumulate(lengths), lengths, strict=True)
        return [array[(*before, slice(end - n, end))] for end, n in ends]

    def paste(self, pieces: Sequence[Any]) -> Any:
        """The inverse of `cut`, for pieces of any sizes."""
        if not self.spec.parts:
            return pieces[0]
        numpy = np if isinstance(pieces[0], np.ndarray) else jnp
        return numpy.concatenate(pieces, self.spec.summed)

    def mapped(self, function: Callable, array: Any, sizes: Mapping[str, int]) -> Any:
        """An array like the leaf after `function(part, piece)` of every part."""
        return self.paste(list(map(function, self.parts, self.cut(array, sizes))))

    def split(self, array: Any, sizes: Mapping[str, int]) -> Any:
        """Give every axis of a part a dimension of its own (see `(heads dim)` in a spec)."""
        return array.reshape([dim.size(sizes) for dim in self.dims])

    def join(self, array: Any) -> Any:
        """The inverse of `split`."""
        shape, start = [], 0
        for count in self.spec.groups:
            shape.append(math.prod(array.shape[start : start + count]))
            start += count
        return array.reshape(shape)


class Axes(Mapping[str, Slot]):
    """The table of a model: leaf path to `Slot`, with the size of every axis.

    `closings`: `(stack, stream)` to why a traced block is not the identity once the arrays that produce
    the stream are zero; "" where it is.
    """

    def __init__(self, slots: Sequence[Slot], known: Mapping[str, int], closings: Mapping):
        self._slots, self.closings = {slot.path: slot for slot in slots}, closings
        lost = {slot.path for slot in slots if self._slots[slot.path] is not slot}
        raise_all(
            AxisError,
            "two arrays have one path, as by the keys 'a.b', and 'a' with 'b' inside; give other keys:",
            sorted(lost),
        )
        shaped = [(slot.path, slot.spec, np.shape(x)) for slot in slots for x in slot.arrays()]
        self.sizes = solve_sizes(shaped, known)

    def __getitem__(self, path: str) -> Slot:
        return self._slots[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __repr__(self) -> str:
        rows = [
            f"{slot.kind:7}{slot.path:44}"
            + " ".join(
                f"{'~' * dim.normalised}{dim.axis}={self.sizes.get(dim.axis, '?')}:{dim.role}"
                for dim in slot.dims
            )
            for slot in self.values()
        ]
        return "\n".join(rows)

    def resized(self, sizes: Mapping[str, int]) -> "Axes":
        """The same table with other sizes of some axes."""
        table = copy.copy(self)
        table.sizes = {**self.sizes, **sizes}
        return table

    def having(self, axis: str, kind: Kind | None = None) -> list[Slot]:
        """The slots that carry `axis`, in order, of one kind or of any."""
        return [
            slot for slot in self.values() if slot.positions(axis) and kind in (None, slot.kind)
        ]

    def of_kind(self, kind: Kind) -> list[Slot]:
        """The slots of one kind, in order."""
        return [slot for slot in self.values() if slot.kind == kind]

    def params(self) -> list[Slot]:
        """The slots of parameters, without None and the placeholders of masked optimizers."""
        return [slot for slot in self.of_kind("param") if slot.arrays()]

    def roles(self, axis: str) -> set[Role]:
        """Every role that `axis` plays in some leaf."""
        return {dim.role for slot in self.values() for dim in slot.dims if dim.axis == axis}

    def normalised(self, axis: str) -> list[Slot]:
        """The declared slots of norms that take their statistics over `axis`."""
        return [s for s in self.values() if any(d.axis == axis and d.normalised for d in s.dims)]

    def is_stream(self, axis: str) -> bool:
        """Whether lookups produce this axis: it is the residual stream that blocks add to."""
        # A leaf that consumes something as well is no table: the matrices of experts, say
        return any(
            dim.axis == axis and dim.role == "produced" and slot.dims[0].role == "lookup"
            for slot in self.having(axis, "param")
            for dim in slot.dims
            if all(d.role != "consumed" for d in slot.dims)
        )

    def named(self, name: str) -> tuple[str, ...]:
        """The axes that a name stands for, itself or those of `heads`, the query heads, where factored.

        Raises `AxisError` with the known names for any other name.
        """
        factored = {"heads": ("kv_heads", "group")}.get(name, ())
        if name not in self.sizes and factored and set(factored) <= set(self.sizes):
            return factored
        self.size(name)
        return (name,)

    def size(self, axis: str) -> int:
        """The size of an axis; raises `AxisError` with the known names for an unknown axis."""
        if axis not in self.sizes:
            known = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
            raise AxisError(f"unknown axis {axis!r}; this model has {known}")
        return self.sizes[axis]


def _default_init(spec: Spec) -> Literal["normal", "zeros", "ones"]:
    if any(dim.normalised for dim in spec.dims):
        return "ones"
    stacks = sum(dim.role == "stack" for dim in spec.dims)
    return "zeros" if len(spec.groups) - stacks < 2 else "normal"


def slot_of(
    steps,
    declaration: Declaration,
    value,
    path: str | None = None,
    *,
    prefix: str = "",
    owner=None,
) -> Slot:
    """Make the slot of one leaf; `owner`'s attributes fill in the `{...}` of its spec.

    `path` is what the leaf is called, by default its steps.
    """
    text = _fill(declaration.spec, owner)
    spec = Spec.parse(f"{prefix} {text}" if ":" in text else f"{prefix}: {text}")
    path = ".".join(map(str, steps)) if path is None else path
    fan_in = None if declaration.fan_in is None else tuple(_fill(declaration.fan_in, owner).split())
    init = declaration.init or _default_init(spec)
    born = None if declaration.born is None else getattr(owner, declaration.born)
    origin = 0.0 if declaration.origin is None else getattr(owner, declaration.origin)
    closes = None if declaration.closes is None else getattr(owner, declaration.closes)
    if init == "ones" and origin == -1:
        init = "zeros"  # the module adds the one itself
    return Slot(path, steps, declaration.kind, spec, init, value, fan_in, born, origin, closes)


def _fill(text: str, owner) -> str:
    """Fill the `{...}` of a spec in from the attributes of the module that declares it."""
    names = re.findall(r"\{(\w+)\}", text)
    raise_all(
        AxisError,
        f"spec {text!r} of {type(owner).__name__} names attributes that it does not have:",
        [name for name in names if not hasattr(owner, name)],
    )
    return re.sub(r"\{(\w+)\}", lambda match: getattr(owner, match[1]), text)


@runtime_checkable
class DeclaredOutside(Protocol):
    """A module that lists its leaves' declarations itself (`growjax.annotate`)."""

    def declarations(self, steps: tuple) -> Iterator[tuple[tuple, Declaration, Any, str]]:
        """Yield `(steps, declaration, value, path)` for every array that is grown."""
        ...

    def known_sizes(self) -> Mapping[str, int]:
        """Sizes of axes that no array shows."""
        ...

    def closings(self) -> Mapping[tuple[str, str], str]:
        """What a trace showed of every stack (see `Axes`)."""
        ...

    def resized(self, sizes: Mapping[str, int]) -> Any:
        """The same module with everything that repeats a size brought up to date."""
        ...


def _walk(
    node, steps: tuple, prefix: str, slots: list[Slot], unmatched: list[str], outside: list
) -> None:
    """Collect the slots of a module tree, the arrays that nothing declares, and annotated modules."""
    if isinstance(node, DeclaredOutside):
        outside.append(node)
        slots.extend(slot_of(*where, prefix=prefix) for where in node.declarations(steps))
    elif isinstance(node, eqx.Module):
        for field in dataclasses.fields(node):
            if field.metadata.get("static", False):
                continue
            value, declared = getattr(node, field.name), field.metadata.get(_METADATA)
            here = (*steps, field.name)
            if isinstance(declared, Declaration):
                slots.append(slot_of(here, declared, value, prefix=prefix, owner=node))
            elif isinstance(declared, str):
                axis = _fill(declared, node)
                _walk(value, here, f"{prefix} {axis}".strip(), slots, unmatched, outside)
            else:
                _walk(value, here, prefix, slots, unmatched, outside)
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            _walk(value, (*steps, i), prefix, slots, unmatched, outside)
    elif isinstance(node, dict):
        for name, value in node.items():
            _walk(value, (*steps, name), prefix, slots, unmatched, outside)
    elif eqx.is_array(node) or isinstance(node, jax.ShapeDtypeStruct):
        unmatched.append(f"{'.'.join(map(str, steps))}: shape {node.shape}")


def axes_of(model: Any) -> Axes:
    """The axis table of a model: every declared leaf with its axes, roles and sizes.

    Works on arrays, on `jax.ShapeDtypeStruct`s and under `jit`. Raises `AxisError` listing every
    undeclared array, every rank that does not match and every axis with two sizes.

    **Example**

        axes_of(model)["blocks.block.mlp.up"].dims
    """
    slots: list[Slot] = []
    unmatched: list[str] = []
    outside: list[DeclaredOutside] = []
    _walk(model, (), "", slots, unmatched, outside)
    hint = "declare them with param/buffer, or use gj.annotate (of a gj.State, give state.model)"
    raise_all(AxisError, f"these arrays have no axes; {hint}:", unmatched)
    known = {axis: size for each in outside for axis, size in each.known_sizes().items()}
    closings = model.closings() if isinstance(model, DeclaredOutside) else {}
    return Axes(slots, known, closings)


def sizes(model: Any) -> dict[str, int]:
    """The size of every named axis, read off the arrays: `{"embed": 256, "layers": 6, ...}`."""
    return dict(axes_of(model).sizes)


def recheck(node) -> None:
    """Run every `__check_init__` of a model again, since growth changes sizes without building it."""
    children: Any = ()
    if isinstance(node, eqx.Module):
        for cls in type(node).__mro__:
            if "__check_init__" in vars(cls):
                cls.__check_init__(node)
        children = vars(node).values()
    elif isinstance(node, list | tuple):
        children = node
    elif isinstance(node, dict):
        children = node.values()
    for child in children:
        recheck(child)


def partition(model: Any) -> tuple[Any, Any]:
    """Split a model into its trained arrays and the rest; `eqx.combine(trained, rest)` is the model.

    Only floating-point `param`s are trained: never buffers, gates or ignored arrays, and gates leave
    no trace in the trained half, so opening or settling one does not disturb optimizer state.

    **Example**

        trained, rest = gj.partition(model)
        opt_state = tx.init(trained)
        model = eqx.combine(optax.apply_updates(trained, updates), rest)
    """
    table = axes_of(model)
    raise_all(
        AxisError,
        "these parameters are no arrays; give jnp.asarray of the number:",
        [s.path for s in table.of_kind("param") for x in s.arrays() if not hasattr(x, "dtype")],
    )
    # A gate that no `__init__` set is absent from the tree, one that was dropped is None: agree.
    model = put(model, {slot.steps: slot.value for slot in table.values()})
    spec = jax.tree.map(lambda _: False, model)
    spec = put(spec, {s.steps: True for s in table.of_kind("param") if _floating(s.value)})
    trained, rest = eqx.partition(model, spec)
    empty = {s.steps: None for s in table.values() if s.kind not in ("param", "buffer")}
    return put(trained, empty), rest


def _floating(value) -> bool:
    return value is not None and jnp.issubdtype(value.dtype, jnp.floating)
