"""Named axes: what every dimension of every parameter is called, and on which side it stands.

A module declares its axes beside its arrays:

    class MLP(eqx.Module):
        up:   Array = param("embed -> mlp")       # consumes embed, produces mlp
        bias: Array = param("-> mlp")
        down: Array = param("mlp -> embed")
        gate: Gate | None = gate("mlp")           # hides new coordinates; None costs nothing

A *spec* names the dimensions in order. The arrow points from what a leaf consumes to what it
produces, either way round (`"mlp <- embed"` is a `[mlp, embed]` array that consumes `embed`), and
several arrows may be mixed. Around a name:

    embed          no arrow: elementwise (a gain multiplies coordinate by coordinate)
    ~embed         elementwise, and the statistics of a norm are taken over this axis
    [vocab]        looked up by index, not contracted
    <embed>        not a dimension: the leaf scales like a mean square over embed (a norm's epsilon)
    <~embed>       the same of a variance: the norm subtracts its mean (a LayerNorm's epsilon)
    (heads dim)    one dimension of the array that holds two axes, the first one slower
    layers: ...    before a colon: leading stack axes (`stacked` and `Stacked` add them themselves)
    {axis}         filled in from an attribute of the module

`axes_of(model)` reads these declarations into one table; everything else in growjax follows from it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from growjax.errors import AxisError, raise_all


Role = Literal["consumed", "produced", "elementwise", "lookup", "stack"]
Kind = Literal["param", "buffer", "gate", "branch", "active"]
_METADATA = "growjax"
_TOKEN = re.compile(r"->|<-|[()]|\[\w+\]|<~?\w+>|~?\w+|\S")


class Dim(NamedTuple):
    """One axis of one leaf: its name, its role and whether a norm averages over it."""

    axis: str
    role: Role
    normalised: bool = False


@dataclasses.dataclass(frozen=True)
class Spec:
    """A parsed spec. `groups[i]` is the number of axes that share dimension i of the array."""

    dims: tuple[Dim, ...]
    groups: tuple[int, ...]
    means: tuple[str, ...] = ()
    variances: tuple[str, ...] = ()

    @staticmethod
    @functools.cache
    def parse(text: str) -> "Spec":
        """Read a spec; raises `AxisError` that says what is wrong with it.

        **Example**

            Spec.parse("embed -> kv_heads head_dim").dims[0] == Dim("embed", "consumed")
        """
        stack, _, body = text.rpartition(":")
        tokens = _TOKEN.findall(body)
        arrows = [i for i, token in enumerate(tokens) if token in ("->", "<-")]

        def role(i: int) -> Role:
            left = max((a for a in arrows if a < i), default=None)
            right = min((a for a in arrows if a > i), default=None)
            into = [left is not None and tokens[left] == "->"]
            into.append(right is not None and tokens[right] == "<-")
            out = [left is not None and tokens[left] == "<-"]
            out.append(right is not None and tokens[right] == "->")
            if any(into) and any(out):
                raise AxisError(
                    f"spec {text!r}: {tokens[i]!r} lies between arrows that make it both "
                    "consumed and produced; let every arrow point from consumed to produced"
                )
            return "produced" if any(into) else "consumed" if any(out) else "elementwise"

        for name in stack.split():
            if not name.isidentifier():
                raise AxisError(f"spec {text!r}: cannot read {name!r}")
        dims = [Dim(name, "stack") for name in stack.split()]
        groups, open_group = [1] * len(dims), None
        means, variances = list[str](), list[str]()
        for i, token in enumerate(tokens):
            if token in ("->", "<-"):
                continue
            elif token == "(" and open_group is None:
                open_group = len(dims)
            elif token == ")" and open_group is not None:
                groups.append(len(dims) - open_group)
                open_group = None
            elif re.fullmatch(r"<~?\w+>", token):
                (variances if "~" in token else means).append(token.strip("<~>"))
            elif re.fullmatch(r"\[\w+\]|~?[A-Za-z_]\w*", token):
                name = token.strip("[]~")
                looked_up = token.startswith("[")
                dims.append(Dim(name, "lookup" if looked_up else role(i), token.startswith("~")))
                if open_group is None:
                    groups.append(1)
            else:
                raise AxisError(f"spec {text!r}: cannot read {token!r}")
        if open_group is not None:
            raise AxisError(f"spec {text!r}: a bracket is not closed")
        return Spec(tuple(dims), tuple(groups), tuple(means), tuple(variances))


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What a field says about itself: its kind, its spec and how fresh coordinates start."""

    kind: Kind
    spec: str
    init: Literal["normal", "zeros", "ones"] | None = None


def _field(kind: Kind, spec: str, init=None, **kwargs) -> Any:
    return eqx.field(metadata={_METADATA: Declaration(kind, spec, init)}, **kwargs)


def param(spec: str, *, init: Literal["normal", "zeros", "ones"] | None = None) -> Any:
    """Declare a trained array. `init` is where a fresh coordinate rests under `init="normal"`.

    The default is `ones` for a normalised axis (`~embed`), `zeros` for another vector and `normal`
    for a matrix.
    """
    return _field("param", spec, init)


def buffer(spec: str = "") -> Any:
    """Declare an array that is carried and grown but not trained (RoPE frequencies, epsilon)."""
    return _field("buffer", spec)


def gate(spec: str) -> Any:
    """Declare an optional `Gate` on one axis. It is `None`, and costs nothing, until growth."""
    return _field("gate", spec, default=None)


def branch(spec: str) -> Any:
    """Declare an optional multiplier of the residual branches along a stack axis, `[layers]`.

    It is None until a sub-network or an operator sets it; the module multiplies its branches by it.
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
    """One declared place in a model: where it is, what stands there, and its axes."""

    path: str
    steps: tuple[str | int, ...]
    kind: Kind
    spec: Spec
    init: Literal["normal", "zeros", "ones"]
    value: Any

    @property
    def dims(self) -> tuple[Dim, ...]:
        """The axes of the leaf, in order."""
        return self.spec.dims

    def positions(self, axis: str) -> list[int]:
        """Where an axis stands among `dims`: nowhere, once, or twice in a square matrix."""
        return [i for i, dim in enumerate(self.dims) if dim.axis == axis]

    @property
    def own_axis(self) -> str:
        """The axis that a gate, branch or active slot belongs to (its last one)."""
        return self.dims[-1].axis

    def arrays(self) -> list[Array]:
        """The arrays in this slot: none, one, or the two of a gate."""
        return jax.tree.leaves(self.value)

    def split(self, array: Array, sizes: Mapping[str, int]) -> Array:
        """Give every axis a dimension of its own (see `(heads dim)` in a spec)."""
        return array.reshape([sizes[dim.axis] for dim in self.dims])

    def join(self, array: Array) -> Array:
        """The inverse of `split`."""
        shape, start = [], 0
        for count in self.spec.groups:
            shape.append(math.prod(array.shape[start : start + count]))
            start += count
        return array.reshape(shape)


class Axes(Mapping[str, Slot]):
    """The table of a model: leaf path to `Slot`, with the size of every axis."""

    def __init__(self, slots: Sequence[Slot], known: Mapping[str, int] | None = None):
        self._slots = {slot.path: slot for slot in slots}
        self.sizes = _solve_sizes(slots, known or {})

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

    def having(self, axis: str, kind: Kind | None = None) -> list[Slot]:
        """The slots that carry `axis`, in order, of one kind or of any."""
        return [
            slot for slot in self.values() if slot.positions(axis) and kind in (None, slot.kind)
        ]

    def of_kind(self, kind: Kind) -> list[Slot]:
        """The slots of one kind, in order."""
        return [slot for slot in self.values() if slot.kind == kind]

    def roles(self, axis: str) -> set[Role]:
        """Every role that `axis` plays in some leaf."""
        return {dim.role for slot in self.values() for dim in slot.dims if dim.axis == axis}

    def normalised(self, axis: str) -> list[Slot]:
        """The declared slots of norms that take their statistics over `axis`."""
        return [
            slot
            for slot in self.values()
            if any(dim.axis == axis and dim.normalised for dim in slot.dims)
        ]

    def is_stream(self, axis: str) -> bool:
        """Whether lookups produce this axis: it is the residual stream that blocks add to."""
        return any(
            dim.axis == axis and dim.role == "produced" and slot.dims[0].role == "lookup"
            for slot in self.having(axis, "param")
            for dim in slot.dims
        )

    def size(self, axis: str) -> int:
        """The size of an axis; raises `AxisError` with the known names if there is none."""
        if axis not in self.sizes:
            known = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
            raise AxisError(f"unknown axis {axis!r}; this model has {known}")
        return self.sizes[axis]


def _solve_sizes(slots: Sequence[Slot], known: Mapping[str, int]) -> dict[str, int]:
    """Read every axis's size off the arrays, and report all disagreements at once."""
    complaints: list[str] = []
    seen: dict[str, dict[int, str]] = {name: {n: "given"} for name, n in known.items()}
    shared: list[tuple[Slot, tuple[str, ...], int]] = []
    for slot in slots:
        for array in slot.arrays():
            shape, groups = np.shape(array), slot.spec.groups
            if len(shape) != len(groups):
                names = " ".join(dim.axis for dim in slot.dims) or "no axis"
                complaints.append(
                    f"{slot.path}: declared with {len(groups)} dimensions ({names}), "
                    f"but its shape is {shape}"
                )
                continue
            start = 0
            for length, count in zip(shape, groups, strict=True):
                names = tuple(dim.axis for dim in slot.dims[start : start + count])
                start += count
                if count == 1:
                    seen.setdefault(names[0], {}).setdefault(length, slot.path)
                else:
                    shared.append((slot, names, length))
    for slot, names, length in shared:
        open_names = [name for name in names if name not in seen]
        rest = math.prod(next(iter(seen[n])) for n in names if n in seen)
        if len(open_names) > 1 or length % rest:
            complaints.append(
                f"{slot.path}: cannot split a dimension of {length} into {names}; "
                "each but one needs a size from another leaf, and they must divide it"
            )
        elif open_names:
            seen[open_names[0]] = {length // rest: slot.path}
        elif rest != length:
            complaints.append(f"{slot.path}: {names} make {rest}, but the dimension is {length}")
    for axis, places in seen.items():
        if len(places) > 1:
            where = ", ".join(f"{size} at {path}" for size, path in places.items())
            complaints.append(f"axis {axis!r} has several sizes: {where}")
    raise_all(AxisError, "the declared axes do not fit the arrays:", complaints)
    return {axis: next(iter(places)) for axis, places in seen.items()}


def _default_init(spec: Spec) -> Literal["normal", "zeros", "ones"]:
    data = [dim for dim in spec.dims if dim.role != "stack"]
    if any(dim.normalised for dim in data):
        return "ones"
    return "zeros" if len(data) < 2 else "normal"


def slot_of(steps, declaration: Declaration, value, *, prefix: str = "", owner=None) -> Slot:
    """Make the slot of one leaf; `owner`'s attributes fill in the `{...}` of its spec."""
    text = _fill(declaration.spec, owner)
    spec = Spec.parse(f"{prefix} {text}" if ":" in text else f"{prefix}: {text}")
    path = ".".join(map(str, steps))
    return Slot(path, steps, declaration.kind, spec, declaration.init or _default_init(spec), value)


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

    def declarations(self, steps: tuple) -> Iterator[tuple[tuple, Declaration, Any]]:
        """Yield `(steps, declaration, value)` for every array that is grown."""
        ...

    def known_sizes(self) -> Mapping[str, int]:
        """Sizes of axes that no array shows."""
        ...

    def resized(self, sizes: Mapping[str, int]) -> Any:
        """The same module with everything that repeats a size brought up to date."""
        ...


def _walk(node, steps: tuple, prefix: str, slots: list[Slot], unmatched: list[str]) -> None:
    """Collect the slots of a module tree, and the arrays that nothing declares."""
    if isinstance(node, DeclaredOutside):
        slots.extend(slot_of(*where, prefix=prefix) for where in node.declarations(steps))
    elif isinstance(node, eqx.Module):
        for field in dataclasses.fields(node):
            if field.metadata.get("static", False):
                continue
            value, said = getattr(node, field.name), field.metadata.get(_METADATA)
            here = (*steps, field.name)
            if isinstance(said, Declaration):
                slots.append(slot_of(here, said, value, prefix=prefix, owner=node))
            elif isinstance(said, str):
                axis = _fill(said, node)
                _walk(value, here, f"{prefix} {axis}".strip(), slots, unmatched)
            else:
                _walk(value, here, prefix, slots, unmatched)
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            _walk(value, (*steps, i), prefix, slots, unmatched)
    elif isinstance(node, dict):
        for name, value in node.items():
            _walk(value, (*steps, name), prefix, slots, unmatched)
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
    _walk(model, (), "", slots, unmatched)
    raise_all(
        AxisError,
        "these arrays have no axes; declare them with param/buffer, or use gj.annotate:",
        unmatched,
    )
    known = model.known_sizes() if isinstance(model, DeclaredOutside) else {}
    return Axes(slots, known)


def sizes(model: Any) -> dict[str, int]:
    """The size of every named axis, read off the arrays: `{"embed": 256, "layers": 6, ...}`."""
    return dict(axes_of(model).sizes)


def get(model: Any, steps: Sequence[str | int]) -> Any:
    """Follow the steps of a slot's path into a model."""
    for step in steps:
        if isinstance(step, str) and not isinstance(model, dict):
            model = getattr(model, step)
        else:
            model = model[step]
    return model


def find(model: Any, steps: Sequence[str | int]) -> Any:
    """What `get` gives, or None where a tree has no such place (a masked optimizer's, for one)."""
    try:
        return get(model, steps)
    except (AttributeError, KeyError, TypeError):  # a dict lacks the key, or a leaf has none
        return None


def put(model: Any, values: Mapping[tuple[str | int, ...], Any]) -> Any:
    """A copy of the model with new values at some places, given by their steps.

    Unlike `eqx.tree_at` it also fills places that hold None and changes static fields.
    """
    if () in values:
        return values[()]
    below: dict[str | int, dict[tuple, Any]] = {}
    for steps, value in values.items():
        below.setdefault(steps[0], {})[steps[1:]] = value
    if not below:
        return model
    if isinstance(model, dict):
        return {name: put(old, below.get(name, {})) for name, old in model.items()}
    if isinstance(model, list | tuple):
        names = getattr(model, "_fields", range(len(model)))
        items = [
            put(old, below.get(name, below.get(i, {})))
            for i, (name, old) in enumerate(zip(names, model, strict=True))
        ]
        return type(model)(*items) if hasattr(model, "_fields") else type(model)(items)
    copy = object.__new__(type(model))  # no __init__: sizes may be halfway between two models
    for field in dataclasses.fields(model):
        if hasattr(model, field.name):
            old = getattr(model, field.name)
            object.__setattr__(copy, field.name, put(old, below.get(field.name, {})))
    return copy


def partition(model: Any) -> tuple[Any, Any]:
    """Split a model into what is trained and the rest; `eqx.combine(trained, rest)` is the model.

    Only floating-point `param`s are trained: never buffers, gates or ignored arrays, and gates leave
    no trace in the trained half, so opening or settling one does not disturb optimizer state.

    **Example**

        trained, rest = gj.partition(model)
        opt_state = tx.init(trained)
        model = eqx.combine(optax.apply_updates(trained, updates), rest)
    """
    table = axes_of(model)
    # A gate that no `__init__` set is absent from the tree, one that was dropped is None: agree.
    model = put(model, {slot.steps: slot.value for slot in table.values()})
    spec = jax.tree.map(lambda _: False, model)
    spec = put(spec, {s.steps: True for s in table.of_kind("param") if _floating(s.value)})
    trained, rest = eqx.partition(model, spec)
    empty = {s.steps: None for s in table.values() if s.kind not in ("param", "buffer")}
    return put(trained, empty), rest


def _floating(value) -> bool:
    return value is not None and jnp.issubdtype(value.dtype, jnp.floating)
